"""Predict the memory of an update without allocating it, by running the same code on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch

from gradaccum.bars import progress
from gradaccum.memory.follow import ROLES
from gradaccum.memory.libraries import held_within
from gradaccum.memory.measure import MemoryReport, measure_memory
from gradaccum.memory.pretend import Operations, followed, without_data

CUDA_BLOCK: Final = 512  # CUDA's caching allocator rounds sizes up to multiples of this


class Guess(NamedTuple):
    """A value that the program read and that the prediction had to guess.

    Attributes:
        where: "file:line" of the code that read it.
        what: its dtype, and the guess.
        times: how often it was read.
    """

    where: str
    what: str
    times: int


class PredictedMemory(MemoryReport):
    """The result of `predict_memory`: a `MemoryReport` of the second update, and in `first` that of the first.

    Attributes:
        device: the device that is predicted, "cpu" or "cuda".
        first: the `MemoryReport` of the first update, in which an optimizer creates its state.
        guessed: the values that were guessed, as `Guess(where, what, times)`; empty if there were none.

    Example:
        >>> report = predict_memory(lambda: (torch.zeros(1000),), lambda x: (x * 2).sum(), device="cpu")
        >>> print(repr(report).splitlines()[0])
        Predicted for cpu, second update. Peak memory: 8,004 bytes (start 4,000, end 4,000)
    """

    device: str
    first: MemoryReport
    guessed: list[Guess]

    def __repr__(self) -> str:
        lines = [f"Predicted for {self.device}, second update. {super().__repr__()}"]
        lines += [f"  guessed at {where}: {what}, {times} x" for where, what, times in self.guessed]
        return "\n".join(lines)


def predict_memory(
    build: Callable[[], Any],
    step: Callable[..., object],
    *,
    device: str | torch.device = "cuda",
    timeline: bool = False,
) -> PredictedMemory:
    """Predict the memory of an update on `device`, without allocating it and without the device.

    `build`, and then `step` twice, run on tensors that have a shape but no data, and their memory is tracked as in
    `measure_memory`. For "cpu" the result is what `measure_memory` measures, to the byte if `guessed` is empty. For
    "cuda" every storage is rounded up to 512 bytes, optimizers use CUDA's default implementation (foreach), their step
    counters on the host are not counted, attention, norms, dropout and autocast save what they save on CUDA, and calls
    that name "cuda" (a device, autocast, GradScaler) behave as if a GPU were present. All tensors count as being on the
    device: a batch that `step` moves there counts from the start. The role "libraries" is the memory of cuBLAS from the
    first matrix product on: 8,519,680 bytes each for the forward's and the backward's thread, as measured on an A100;
    newer GPUs are said to use 32 MiB each.

    A value that is read (`.item()`, `.tolist()`, `if tensor`) is known if it depends only on integers and booleans
    of at most 2^20 elements, such as a mask of ones, or on at most 2^10 floats from `torch.tensor`, `arange` or
    `linspace`, and not on random numbers. Otherwise it is guessed: as the middle of the range that `rand`,
    `randint` or `uniform_` draws from, else as 1 or False, and `guessed` says where. For a GradScaler, no gradient
    overflows. Not counted: memory inside a kernel (except group norm's backward on "cuda"), the CUDA context (0.5 to
    1.5 GB), and tensors in objects that `build` returns, other than modules, optimizers and their wrappers, tensors,
    and lists, tuples and dicts of these. autocast, GradScaler, dropout, attention and `Module.to` are patched while
    it runs, so no other thread should use them. If tqdm is installed, a prediction of more than two seconds shows its
    progress.

    `reserved_bytes` is what must fit on the GPU beside the context: `CachingAllocator` replays the tracked storages.
    If these are right, it is accurate to 1 or 2 %, which depends on the order of allocations and releases. cuDNN's
    workspaces, several streams and `expandable_segments` are not modelled.

    Of published measurements on an A100, 25 counters of single layers, forward and backward, are predicted to the
    last digit, and the reserved memory of three GPT trainings to 0.3 % (`benchmarks/published.py`).

    To predict one rank of a `fully_shard` model, use torch's `fake` process group, which has no other ranks:
    initialize it first, create the mesh outside of `build`, and shard inside it. `accumulate` then assumes that the
    other ranks have the same data.

    Args:
        build: creates everything, without arguments: the model, the optimizer, the data. It may return a tuple or a
            list; anything else is passed to `step` as its only argument.
        step: one update, called as `step(*built)`; its result is ignored.
        device: "cuda" or "cpu".
        timeline: also report the `timeline` of both updates, which keeps a record of every storage.

    Returns:
        A `PredictedMemory`: the `MemoryReport` of the second update, and in `first` that of the first.

    Raises:
        TypeError: `build` or `step` is not callable, or `device` is not a device.
        ValueError: a tensor created outside of `build` and `step` is used in them, or `build` returns the result of a
            forward, whose graph holds memory that is not counted.
        NotImplementedError: prediction is not possible: another device, recurrent layers, `nn.EmbeddingBag`, LBFGS,
            compiled code, DistributedDataParallel, sparse tensors, a shape that depends on values, an operation that
            torch cannot run without data.
        Exception: errors from `build` and `step` are passed on.

    Example:
        >>> def build():
        ...     model = torch.nn.Linear(100_000, 100_000)  # 40 GB
        ...     return model, torch.optim.Adam(model.parameters()), torch.zeros(8, 100_000)
        >>> def step(model, optimizer, batch):
        ...     model(batch).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> memory = predict_memory(build, step)
        >>> memory.first.peak_bytes, memory.peak_bytes  # Adam creates its two copies in the first
        (200022241280, 200022241280)
    """
    for name, function in (("build", build), ("step", step)):
        if not callable(function):
            given = f"{name} must be a function, but {function!r:.80} is of type {type(function).__name__}"
            raise TypeError(f"{given}: pass the function itself, not its result.")
    with progress("predicting") as tick:
        return _predict(build, step, predicted_type(device), tick, timeline)


def _predict(
    build: Callable[[], Any], step: Callable[..., object], kind: str, tick: Callable[[], None], timeline: bool = False
) -> PredictedMemory:
    predicted, reports = PredictedMemory(), []
    with without_data(kind, tick) as operations:
        try:
            built = _tuple(build())
            for _ in range(2):
                with _Follow(kind, operations, built, timeline) as report:
                    step(*built)
                reports.append(report)
        except Exception as error:
            for guess in operations.guesses:  # the cause may be a wrong guess
                error.add_note("A prediction has no values: at {}, {}.".format(*guess))
            raise
    vars(predicted).update(vars(reports[1]), device=kind, first=reports[0])
    predicted.guessed = [Guess(*guess, count) for guess, count in operations.guesses.items()]
    return predicted


def _start_bytes(build: Callable[[], Any], device: str, tick: Callable[[], None]) -> int:
    """Return the `start_bytes` of a prediction with `build`, without a step."""
    with without_data(device, tick) as operations:
        built = _tuple(build())  # keep it alive while it is counted
        with _Follow(device, operations, built) as report:
            return report.start_bytes


def _tuple(built: object) -> tuple[Any, ...]:
    if any(getattr(each, "grad_fn", None) is not None for each in followed(built)):
        given = "build returns the result of a forward, whose graph holds memory that is not counted"
        raise ValueError(f"{given}: run the forward in step, or detach the result.")
    return tuple(built) if isinstance(built, tuple | list) else (built,)


class _Follow(measure_memory):  # type: ignore[no-untyped-call]
    """Count memory as the device would."""

    def __init__(self, device: str, operations: Operations, built: object, timeline: bool = False) -> None:
        self._block, self._operations = CUDA_BLOCK if device == "cuda" else 1, operations
        self.roles = (*ROLES, "libraries") if device == "cuda" else ROLES
        super().__init__(*followed(built), device="cpu", timeline=timeline)
        if device == "cuda":
            self._known["libraries"] = list(operations.workspaces.held.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (block := self._operations.workspaces.made_for(func)) is not None:
            self._add(block.untyped_storage(), block, "cuBLAS", "libraries")
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self._operations.allocator:
            held = [torch.empty(size, dtype=torch.uint8) for size in held_within(func, args)]
            for each in held:  # beside the results, until here
                self._add(each.untyped_storage(), each, func, self._role_now())
        return result

    def _add(self, storage: torch.UntypedStorage, *made: Any) -> None:
        if self._operations.allocator:
            self._operations.allocator.hold(storage)
        super()._add(storage, *made)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._operations.allocator:
            self._report.reserved_bytes = self._operations.allocator.reserved_bytes

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._block) * self._block

    def _is_new(self, storage: torch.UntypedStorage, *made: Any) -> bool:
        return storage not in self._operations.elsewhere and super()._is_new(storage, *made)


def predicted_type(device: object) -> str:
    """Return "cpu" or "cuda", or raise for any other device.

    Example:
        >>> predicted_type("cuda:1")
        'cuda'
    """
    try:
        kind = torch.device(device).type  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise TypeError(f'device must be "cuda" or "cpu", but {device!r:.80} was given.') from None
    if kind not in ("cpu", "cuda"):
        raise NotImplementedError(f'Memory is predicted for "cuda" and "cpu", not for {kind!r}: use one of these.')
    return str(kind)

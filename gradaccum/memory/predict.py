"""What an update would hold in memory, found without allocating it: the same code run on tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

# Private, but the only tensors that have a device, a storage of the right size and a graph, and no memory.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

# Private: the one as in measure.py; the other so that a measure_memory around a prediction counts none of it.
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gradaccum.bars import progress
from gradaccum.memory.device import DeviceFunctions, predicted_type
from gradaccum.memory.measure import MemoryReport, measure_memory

CUDA_BLOCK: Final = 512  # the sizes that CUDA's caching allocator hands out are multiples of this
_aten = torch.ops.aten
# On a CPU and on CUDA these reduce into the memory of the loss of each element, and keep all of it.
_KEEP_ALL: Final = {
    _aten.mse_loss.default,
    _aten.smooth_l1_loss.default,
    _aten.soft_margin_loss.default,
    _aten.binary_cross_entropy.default,
}


class PredictedMemory(MemoryReport):
    """What `predict_memory` returns: a `MemoryReport` of the second update, with the first one's.

    Attributes:
        device: the device that it speaks for, "cpu" or "cuda".
        first: the `MemoryReport` of the first update, during which an optimizer makes its state.

    Example:
        >>> report = predict_memory(lambda: (torch.zeros(1000),), lambda x: (x * 2).sum(), device="cpu")
        >>> print(repr(report).splitlines()[0])
        Predicted for cpu, second update. Peak memory: 8,004 bytes (start 4,000, end 4,000)
    """

    device: str
    first: MemoryReport

    def __repr__(self) -> str:
        return f"Predicted for {self.device}, second update. {super().__repr__()}"


def predict_memory(
    build: Callable[[], Any],
    step: Callable[..., object],
    *,
    device: str | torch.device = "cuda",
    timeline: bool = False,
) -> PredictedMemory:
    """Predict what an update holds in memory on `device`, without allocating it and without having the device.

    `build` and then `step`, twice, run on tensors that have a shape and no data, and what they hold is followed as
    `measure_memory` follows it. For "cpu" the result is what `measure_memory` measures, to the byte. For "cuda"
    every storage is rounded up to 512 bytes, optimizers take the path that is CUDA's default (foreach), the step
    counters that they keep on the host are not counted, dropout and autocast keep what they keep there, and
    whatever names "cuda" (a device, autocast, GradScaler) is answered as if it were there. All tensors count as
    being on the device: a batch that is moved there in `step` counts from the start.

    A value that is read (`.item()`, `.tolist()`, `if tensor`) is not known: it is 1, or False; a GradScaler is told
    that no gradient overflowed. Not counted: memory within a kernel and workspaces of libraries (cuBLAS), the
    CUDA context, what the allocator holds beyond the blocks in use, tensors in objects that `build` returns other
    than modules, optimizers, tensors and lists, tuples and dicts of them. While it runs, no other thread should
    use autocast, GradScaler or `Module.to`, which are replaced for the while. Where tqdm is installed, a prediction
    of more than two seconds shows its progress.

    One rank of a model in `fully_shard` is predicted on torch's `fake` process group, which no other rank joins:
    initialize it before, make the mesh outside of `build` and shard in it. `accumulate` then takes the other ranks
    to have what this one has.

    Args:
        build: makes everything afresh, without arguments: the model, the optimizer, the data. It may return a
            tuple or a list; anything else is passed to `step` as its one argument.
        step: one update, called as `step(*built)`; what it returns is dropped.
        device: "cuda" or "cpu".
        timeline: report both updates' `timeline` too, which keeps a record of every storage.

    Returns:
        A `PredictedMemory`: the `MemoryReport` of the second update, and in `first` that of the first.

    Raises:
        TypeError: `build` or `step` is not callable, or `device` is no device.
        ValueError: a tensor made outside of `build` and `step` is used in them.
        NotImplementedError: no number can be given: another device, recurrent layers, `nn.EmbeddingBag`, LBFGS,
            compiled code, DistributedDataParallel, sparse tensors, a shape that depends on values, an operation that
            torch cannot run without data.
        Exception: what `build` and `step` raise passes through.

    Example:
        >>> def build():
        ...     model = nn.Linear(100_000, 100_000)  # 40 GB
        ...     return model, torch.optim.Adam(model.parameters()), torch.zeros(8, 100_000)
        >>> def step(model, optimizer, batch):
        ...     model(batch).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> memory = predict_memory(build, step)
        >>> memory.first.peak_bytes, memory.peak_bytes  # Adam makes its two copies in the first
        (200005201920, 200005201920)
    """
    for name, function in (("build", build), ("step", step)):
        if not callable(function):
            given = f"{name} must be a function, but {function!r:.80} is of type {type(function).__name__}"
            raise TypeError(f"{given}: give the function itself, not what it returns.")
    with progress("predicting") as tick:
        return _predict(build, step, predicted_type(device), tick, timeline)


def _predict(
    build: Callable[[], Any], step: Callable[..., object], kind: str, tick: Callable[[], None], timeline: bool = False
) -> PredictedMemory:
    with _without_data(kind, tick) as follow:
        built = _tuple(build())
        reports = []
        for _ in range(2):
            with follow(built, timeline) as report:
                step(*built)
            reports.append(report)
    predicted = PredictedMemory()
    vars(predicted).update(vars(reports[1]), device=kind, first=reports[0])
    return predicted


def _start_bytes(build: Callable[[], Any], device: str, tick: Callable[[], None]) -> int:
    """Return what `build` would make `predict_memory` start with, in bytes, without a step."""
    with _without_data(device, tick) as follow:
        built = _tuple(build())  # kept while it is counted
        with follow(built) as report:
            return report.start_bytes


def _tuple(built: object) -> tuple[Any, ...]:
    return tuple(built) if isinstance(built, tuple | list) else (built,)


@contextmanager
def _without_data(device: str, tick: Callable[[], None]) -> Iterator[Callable[..., measure_memory]]:
    """Let the block's tensors have no data; give what makes a `measure_memory` that counts as `device` would."""
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.random.fork_rng(devices=[]))  # a seed set in `build` is not left behind
        stack.enter_context(_replaced(device))
        fakes = stack.enter_context(FakeTensorMode())
        stack.enter_context(DeviceFunctions(device))
        operations = stack.enter_context(_Operations(device, fakes, tick))
        stack.callback(register_optimizer_step_pre_hook(operations.before_step).remove)
        stack.callback(register_optimizer_step_post_hook(operations.after_step).remove)
        yield lambda built, timeline=False: _Follow(device, operations.elsewhere, built, timeline)


class _Follow(measure_memory):  # type: ignore[no-untyped-call]
    def __init__(self, device: str, elsewhere: weakref.WeakSet[torch.UntypedStorage], built: object, timeline: bool):
        self._block, self._elsewhere = CUDA_BLOCK if device == "cuda" else 1, elsewhere
        super().__init__(*_followed(built), device="cpu", timeline=timeline)

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._block) * self._block

    def _is_new(self, storage: torch.UntypedStorage, *made: Any) -> bool:
        return storage not in self._elsewhere and super()._is_new(storage, *made)


def _followed(built: object) -> list[Any]:
    """Pick what measure_memory takes; a scaler, a schedule or a function is passed over."""
    if isinstance(built, list | tuple | Mapping):
        items = built.values() if isinstance(built, Mapping) else built
        return [found for item in items for found in _followed(item)]
    return [built] if isinstance(built, Tensor | nn.Module | torch.optim.Optimizer) else []


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answer reads of values, refuse what has no answer, and note what is not on the device."""

    def __init__(self, device: str, fakes: FakeTensorMode, tick: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device, self._fakes, self._tick, self._stepping = device, fakes, tick, False
        self.elsewhere = weakref.WeakSet[torch.UntypedStorage]()
        self._overflows = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._tick()
        try:
            result = func(*args, **(kwargs or {}))
        except DataDependentOutputException as error:
            if func is not _aten._local_scalar_dense.default:
                raise NotImplementedError(f"{func} depends on values, which a prediction has none of.") from error
            if args[0].untyped_storage() in self._overflows:
                return 0.0  # so that a GradScaler steps
            return args[0].dtype != torch.bool and (1.0 if args[0].dtype.is_floating_point else 1)
        except DynamicOutputShapeException as error:
            given = f"{func} makes a tensor whose size depends on values, which a prediction has none of"
            raise NotImplementedError(f"{given}: use torch.where or a mask that is multiplied.") from error
        except UnsupportedOperatorException as error:
            raise NotImplementedError(f"torch does not know the shapes that {func} makes.") from error
        except AssertionError as error:
            foreign = (x for x in _followed([args, kwargs]) if getattr(x, "fake_mode", None) is not self._fakes)
            real = next(foreign, None)
            if real is None:
                raise
            shape = f"A tensor of shape {tuple(real.shape)} made outside of build was used in {func}"
            raise ValueError(f"{shape}: make the model, the optimizer and the data inside build.") from error
        if func is _aten.lift_fresh.default and (
            # Made in step() without a device: a step counter, which stays on the host beside CUDA.
            self._stepping if self._device == "cuda" else not args[0].untyped_storage().resizable()  # NumPy's
        ):
            self.elsewhere.add(result.untyped_storage())
        elif func in _KEEP_ALL and not result.dim():
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
            result = result.new_empty(shape).resize_(())
        elif func is _aten._amp_foreach_non_finite_check_and_unscale_.default:
            self._overflows.add(args[1].untyped_storage())
        return result

    def before_step(self, optimizer: torch.optim.Optimizer, *call: object) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise NotImplementedError(
                "LBFGS is not predicted: how often it evaluates and what it keeps is up to values."
            )
        self._stepping = True
        for group in optimizer.param_groups if self._device == "cuda" else ():
            alone = group.get("differentiable") or (isinstance(group["lr"], Tensor) and not group.get("capturable"))
            if "foreach" in group and group["foreach"] is group.get("fused") is None and not alone:
                group["foreach"] = not isinstance(optimizer, torch.optim.Adafactor)  # as the default is on CUDA

    def after_step(self, optimizer: torch.optim.Optimizer, *call: object) -> None:
        self._stepping = False


@contextmanager
def _replaced(device: str) -> Iterator[None]:
    """Replace for the while what neither mode sees: autocast, GradScaler, Module.to, and compiling."""
    autocast, scaler = torch.autocast.__init__, torch.amp.GradScaler.__init__

    def autocast_on_host(self: Any, device_type: str, dtype: Any = None, *rest: Any, **options: Any) -> None:
        if device == "cuda" and device_type in ("cpu", "cuda"):  # "cpu" is what a tensor's device says here
            device_type, dtype = "cpu", dtype or torch.get_autocast_dtype("cuda")
        autocast(self, device_type, dtype, *rest, **options)

    def scaler_on_host(self: Any, device_type: str = "cuda", *rest: Any, **options: Any) -> None:
        scaler(self, "cpu" if device == "cuda" else device_type, *rest, **options)

    def apply(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # torch's own swaps parameters for new ones, which fails for those without data.
        for module in self.modules() if recurse else [self]:
            for parameter in module._parameters.values():
                for old in () if parameter is None else (parameter, parameter.grad):
                    if old is not None and (new := change(old.detach())).dtype != old.dtype:
                        old.data = new
            buffers = module._buffers.items()
            module._buffers.update({name: x if x is None else change(x) for name, x in buffers})
        return self

    def compiled(*args: Any, **options: Any) -> None:
        raise NotImplementedError("Compiled code is not predicted: leave torch.compile out of build and step.")

    def replicated(*args: Any, **options: Any) -> None:
        raise NotImplementedError(
            "DistributedDataParallel is not predicted, since its buckets are made out of sight: predict the model that "
            "it wraps, and add the bytes of the gradients once."
        )

    places: list[tuple[Any, str, Any]] = [
        (torch.autocast, "__init__", autocast_on_host),
        (torch.amp.GradScaler, "__init__", scaler_on_host),
        (nn.Module, "_apply", apply),  # private: all of to(), cuda(), half() ... are made of it
        (nn.Module, "compile", compiled),
        (nn.parallel.DistributedDataParallel, "__init__", replicated),
        (torch, "compile", compiled),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, new in places:
            setattr(owner, name, new)
        with torch.compiler.set_stance("fail_on_recompile"):  # for what was compiled before
            yield
    except RuntimeError as error:
        if "fail_on_recompile" in str(error):
            compiled()
        raise
    finally:
        for owner, name, old in before:
            setattr(owner, name, old)

"""Tools for probes: small models, windows of data, plain numbers, functions from text; all in float64.

A probe may run in a process that has this file but no question files: everything else it must import itself.
"""

from __future__ import annotations

import inspect
import textwrap
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradaccum.accumulation import accumulate
from gradaccum.data import IGNORED, count_targets, random_tokens
from gradaccum.exercises.compare import Difference, Plain
from gradaccum.exercises.run import Told, shown, trying
from gradaccum.memory import measure_memory
from gradaccum.models import embedding_linear

Batch = tuple[Tensor, Tensor]


def classifier(seed: int) -> nn.Sequential:
    """Return a model from samples of 3 numbers to the logits of 3 classes."""
    torch.default_generator.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def samples(sizes: Sequence[int], seed: int, scale: float = 1.0) -> list[Batch]:
    """Return random micro-batches of these sizes: scaled inputs of shape (size, 3), targets of shape (size,).

    Example:
        >>> [inputs.shape[0] for inputs, targets in samples([4, 1, 3], seed=0)]
        [4, 1, 3]
    """
    draw = torch.Generator().manual_seed(seed)
    options = {"generator": draw, "dtype": torch.float64}
    return [(scale * torch.randn(n, 3, **options), torch.randint(3, (n,), generator=draw)) for n in sizes]  # type: ignore[call-overload]


def token_model(seed: int, vocabulary: int = 7, width: int = 4) -> nn.Sequential:
    """Return the lesson's model with a small vocabulary."""
    torch.default_generator.manual_seed(seed)
    return embedding_linear(vocabulary, width).double()


def joined(window: Sequence[Batch]) -> Batch:
    """Concatenate micro-batches into one batch."""
    return torch.cat([inputs for inputs, _ in window]), torch.cat([targets for _, targets in window])


def gradient(model: nn.Module) -> list[float]:
    """Return all of `.grad` as one list of numbers, zeros where it is None."""
    held = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return _numbers(held)


def weights(model: nn.Module) -> list[float]:
    """Return all parameters as one list of numbers."""
    return _numbers(list(model.parameters()))


def plain_number(value: object) -> object:
    """Convert a number of any type to int if it is integral, otherwise float; return other values unchanged."""
    if not hasattr(value, "__float__"):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number


def peak_beyond_start(run: Callable[[], object], *known: object) -> int:
    """Return the peak memory of `run`, in bytes, beyond what is `known` at the start."""
    with measure_memory(*known) as memory:
        run()
    return memory.peak_bytes - memory.start_bytes


def at_most(unit: str) -> Callable[[int, int], Difference | None]:
    """Return a judge of an amount that must not be larger than expected."""
    return lambda got, limit: None if got <= limit else Difference(f"at most {limit:,} {unit}", f"{got:,} {unit}")


at_most_bytes = at_most("bytes beyond the start")


def text_of(function: Callable[..., object]) -> str:
    """Return a function's source as plain data for a case; `function_of` is the inverse.

    Example:
        >>> function_of(text_of(classifier))(seed=1)[0].in_features
        3
    """
    return textwrap.dedent(inspect.getsource(function))


def function_of(text: str) -> Callable[..., Any]:
    """Return the last function that a text defines; the text may use every name of this file."""
    names: dict[str, Any] = {}
    exec(compile(text, "<a step>", "exec"), dict(globals()), names)
    made: Callable[..., Any] = list(names.values())[-1]
    return made


def update_with(fill: Callable[..., Any]) -> Callable[..., Any]:
    """Return a training step that calls `fill` to set `.grad`, and returns its result."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: Sequence[Batch]) -> Any:
        optimizer.zero_grad()
        found = fill(model, micro_batches)
        optimizer.step()
        optimizer.zero_grad()
        return found

    return step


def verdict(is_right: Callable[..., Any], text: str, does: str) -> bool:
    """Return a learner's verdict on the step that fills with `text`; raise if it is neither True nor False."""
    trying(f"a step that {does}", AssertionError="A test here returns its verdict: return False instead of asserting.")
    found = is_right(update_with(function_of(text)))
    if isinstance(found, bool):
        return found
    if str(getattr(found, "dtype", "")) in ("bool", "torch.bool") and len(found.flatten()) == 1:
        return bool(found)
    value = f"{found:.3g}" if isinstance(found, float) else shown(found, 80)
    raise Told(f"Your test returned {value}: return True or False.")


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    found: list[float] = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).tolist()
    return found


# lesson 1


def token_batches(shapes: Sequence[Sequence[int]], seed: int) -> list[Batch]:
    """Return random inputs and targets for `token_model`, both of shape (rows, length), for each shape."""
    draw = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(7, (2, *shape), generator=draw) for shape in shapes]
    return [(inputs, targets) for inputs, targets in drawn]


def optimizer_for(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Return "SGD with momentum" or "Adam" for a model."""
    if name == "Adam":
        return torch.optim.Adam(model.parameters(), lr=0.02)
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def moved(model: nn.Module, before: Sequence[float]) -> dict[str, list[float]]:
    """Return the change of each weight."""
    return {"weights moved by": [now - then for now, then in zip(weights(model), before, strict=True)]}


def kind(value: object) -> str:
    """Describe a value that should be a float: "a float", "a tensor", "nothing"."""
    if isinstance(value, Tensor):
        return "a tensor that holds its graph" if value.requires_grad else "a tensor"
    if isinstance(value, Real) and not isinstance(value, bool):
        return "a float"
    return "nothing" if value is None else f"an object of type {type(value).__name__}"


def number(value: Any) -> float | str:
    """Return an answer's number as a float, or a description of the value if it is not a number.

    Example:
        >>> number(torch.tensor([2.0])), number("2.0"), number(None)
        (2.0, 'an object of type str', 'nothing')
    """
    try:
        return kind(value) if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return kind(value)


# lesson 2


def run_of_windows(case: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer, list[list[Batch]]]:
    """Return a case's model, its SGD and its windows of equal micro-batches."""
    k, model = case["accumulation_steps"], classifier(case["seed"])
    micro_batches = samples([case["size"]] * k * case["windows"], case["seed"])
    windows = [micro_batches[i : i + k] for i in range(0, len(micro_batches), k)]
    windows += windows[:-1]  # as in a second epoch: an answer may not spoil its data
    return model, torch.optim.SGD(model.parameters(), lr=case["learning_rate"]), windows


def run_of_batches(case: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer, list[Batch]]:
    """Return a case's model, its SGD and its batches of the given numbers of rows."""
    model, rows = classifier(case["seed"]), case["rows"]
    batches = samples(rows if isinstance(rows, list) else [rows], case["seed"])
    batches += batches[:-1]  # as in a second epoch: an answer may not spoil its data
    return model, torch.optim.SGD(model.parameters(), lr=case["learning_rate"]), batches


# lesson 4


def stream(values: Sequence[Any], source: str) -> Iterable[Any]:
    """Return values as a list, or as a generator, which has no length and can be read once."""
    return list(values) if source == "list" else (value for value in values)


def trained(case: dict[str, Any], train: Callable[..., object]) -> dict[str, Any]:
    """Return the number of updates of train(model, optimizer, micro_batches, k), the weights' change, and the path.

    The path has, for each update, the gradient and the weights after it.
    """
    model, path = classifier(case["seed"]), list[list[list[float]]]()
    # With momentum, no other learning rate compensates for a window's divisor.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    optimizer.register_step_post_hook(lambda *_: path.append([gradient(model), weights(model)]))
    start = weights(model)
    train(model, optimizer, samples([case["size"]] * case["number"], case["seed"]), case["k"])
    moved = [after - before for after, before in zip(weights(model), start, strict=True)]
    return {"updates": len(path), "change of the weights": moved, "each update": path}


def used(number: int, train: Callable[..., object]) -> list[list[int]]:
    """Return for each update of train(model, optimizer, micro_batches) the micro-batches, from 1, that it uses."""
    model, updates = nn.Linear(number, 3, bias=False, dtype=torch.float64), list[list[int]]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def note(*_: object) -> None:  # only number i contributes to column i
        held = torch.zeros_like(model.weight) if model.weight.grad is None else model.weight.grad
        updates.append([column + 1 for column in range(number) if held[:, column].any()])

    optimizer.register_step_post_hook(note)  # not before the step: a closure computes gradients in it
    inputs, targets = torch.eye(number, dtype=torch.float64)[:, None], torch.arange(number).remainder(3)[:, None]
    train(model, optimizer, list(zip(inputs, targets, strict=True)))
    return updates


def linear_model_and_windows(case: dict[str, Any]) -> tuple[nn.Module, list[list[Batch]]]:
    """Return a case's model and windows; without saturation, so that large inputs have large gradients."""
    torch.default_generator.manual_seed(case["seed"])
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)).double()
    windows = [samples([case["size"]] * length, case["seed"] + i) for i, length in enumerate(case["windows"])]
    for factor, window in zip(case["inputs times"], windows, strict=True):
        window[:] = [(factor * inputs, targets) for inputs, targets in window]
    return model, windows


def shrink(model: nn.Module) -> None:
    """Change all weights a little."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


def epoch_of_windows(case: dict[str, Any], answer: Callable[..., Any]) -> dict[str, Any]:
    """Return gradients, rates and losses of an epoch of answer(model, optimizer, schedule, windows, max_norm).

    The weights change a little after each step, whatever the step did: a loss computed too early or too late then
    differs, and at a rate of 0 a wrong gradient affects only its own update.
    """
    model, windows = linear_model_and_windows(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=case["lr"])
    gradients, rates = dict[str, list[float]](), list[float]()

    def note(*_: object) -> None:  # after the step, not before: a closure computes gradients in the step
        gradients[f"at update {len(rates) + 1} the gradient"] = gradient(model)
        rates.append(optimizer.param_groups[0]["lr"])
        shrink(model)

    optimizer.register_step_post_hook(note)
    found = scheduled(answer, model, optimizer, windows, case["max_norm"])
    numbers = found if isinstance(found, list) else []
    return {
        "gradients": gradients,
        # The next rate too, which shows whether the schedule was stepped after the last update.
        "rates": {"learning rates": [*rates, optimizer.param_groups[0]["lr"]]},
        "losses": {"logged": [*map(plain_number, numbers)] or plain_number(found)},
        "graphs": ["graph" if getattr(each, "requires_grad", False) else "no graph" for each in numbers],
    }


def scheduled(answer: Callable[..., Any], model: nn.Module, optimizer: torch.optim.Optimizer, *more: object) -> Any:
    """Return answer(model, optimizer, schedule, *more), with the values of a generator as a list."""
    found = answer(model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5), *more)
    return list(found) if hasattr(found, "__iter__") else found


# lesson 5


def padded_text(counts: Sequence[Sequence[int]], seed: int, vocabulary: int = 7) -> list[Batch]:
    """Return random micro-batches of padded text, with the given counts of targets per row; others are ignored.

    Example:
        >>> [(targets != IGNORED).sum(dim=1).tolist() for inputs, targets in padded_text([[3, 1], [0]], seed=0)]
        [[3, 1], [0]]
    """
    draw, window = torch.Generator().manual_seed(seed), []
    for rows in counts:
        inputs = torch.zeros(len(rows), max(rows) + 2, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        for row, count in enumerate(rows):
            inputs[row, : count + 1] = torch.randint(1, vocabulary, (count + 1,), generator=draw)
            targets[row, 1 : count + 1] = torch.randint(vocabulary, (count,), generator=draw)
            if count:
                targets[row, count] = 0  # a line's end, as in the lesson
        order = torch.randperm(inputs.shape[1], generator=draw)  # any position may be ignored
        window.append((inputs[:, order], targets[:, order]))
    return window


def target_count(*micro_batches: Batch) -> int:
    """Return the number of targets that are not ignored."""
    return sum(int(count_targets(each)) for each in micro_batches)


def token_loss(model: nn.Module, micro_batch: Batch, reduction: str = "sum") -> Tensor:
    """Return the loss over the targets that are not ignored."""
    inputs, targets = micro_batch
    return cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), reduction=reduction)


def filled_with(losses: Callable[..., Iterable[Tensor]]) -> Callable[..., float]:
    """Return a function that calls backward on each loss of a generator, and returns their sum."""

    @wraps(losses)  # so that its source is that of the generator, with this decorator
    def fill(model: nn.Module, micro_batches: Sequence[Batch]) -> float:
        total = 0.0
        for loss in losses(model, micro_batches):
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    return fill


def returned_mean(value: object) -> object:
    """Convert a returned mean to a float, and nan to text, so that it compares equal to another nan."""
    if getattr(value, "requires_grad", False):
        return "a tensor with its graph"
    found = plain_number(value)
    return "not a number" if found != found else found


def steep_model(seed: int, vocabulary: int = 7) -> nn.Sequential:
    """Return a token model with large weights, whose gradients have a norm above 1, so that clipping shows."""
    model = token_model(seed, vocabulary)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def plain_sgd(model: nn.Module, momentum: float = 0.0) -> torch.optim.SGD:
    """Return an SGD; with momentum no learning rate compensates for a wrong divisor."""
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)


LOSSES = "weighted", "masked", "by_line", "decayed", "matched"


def three_outputs(seed: int) -> nn.Module:
    """Return the model of 5.5: it maps a last dimension of 4 to 3, and has weights for 3 classes."""
    torch.default_generator.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model.register_buffer("class_weights", torch.tensor([1.5, 2.5, 6.0]))
    return model.double()


def rows_for(loss: str, counts: Sequence[Sequence[int]], seed: int) -> list[Batch]:
    """Return random micro-batches for a loss of 5.5, with the given counts in the rows of y, if not all count.

    Example:
        >>> [(x.shape, y.shape) for x, y in rows_for("by_line", [[3, 1], [2]], seed=0)]
        [(torch.Size([2, 5, 4]), torch.Size([2, 5])), (torch.Size([1, 4, 4]), torch.Size([1, 4]))]
    """
    draw, window = torch.Generator().manual_seed(seed), []
    options: dict[str, Any] = {"generator": draw, "dtype": torch.float64}
    for rows, (_, y) in zip(counts, padded_text(counts, seed, vocabulary=3), strict=True):
        if loss not in ("weighted", "by_line"):
            y = torch.randn(len(rows), 3, **options)
        if loss == "masked":
            known = torch.arange(3) < torch.tensor(rows)[:, None]
            y = torch.where(known, (y > 0).double(), -1.0)
        shape = y.shape if y.dtype == torch.int64 else y.shape[:1]
        window.append((torch.randn(*shape, 4, **options), y))
    return window


def accumulated(answer: Callable[..., Any], loss: str, model: nn.Module, window: Sequence[Batch]) -> dict[str, Any]:
    """Run `accumulate` with an answer's pairs (sum, count) for the micro-batches of a loss."""
    pairs = []
    for micro_batch in window:
        try:
            found = answer(loss, model, micro_batch)
        except NotImplementedError:  # the learner may write one loss after the other
            raise TypeError(f"{loss!r} is not written yet.") from None
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise TypeError(f"For {loss!r} {'None' if found is None else 'no pair'} was returned: return a pair.")
        pairs.append(found)
    done = accumulate(model, range(len(pairs)), lambda index: pairs[index][0], lambda index: pairs[index][1])
    return {"gradient": gradient(model), "loss": returned_mean(done.loss)}


def kinds_of(answer: Callable[..., Any], model: nn.Module, windows: dict[str, Sequence[Batch]]) -> dict[str, str]:
    """Return for each loss whether an answer gives None, something, or an error; raise if none is written."""
    found, stubs = dict[str, str](), 0
    for loss, window in windows.items():
        try:
            found[loss] = "None" if answer(loss, model, window[0]) is None else "something"
        except NotImplementedError:
            stubs, found[loss] = stubs + 1, "not written"
            if stubs == len(windows):
                raise
        except Exception:  # its own property reports it
            found[loss] = "an error"
    return found


# lesson 6


@contextmanager
def in_float32() -> Iterator[None]:
    """Make float32 the default dtype in the block, as in a notebook; checks otherwise use float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def peak_of(peak: dict[str, int], samples: int) -> Callable[[int], int]:
    """Return the function that 6.2 calls: proportional to the samples, or flat at first, or in steps."""
    least, step = peak.get("flat up to", 0), peak.get("in steps of", 1)

    def asked(micro_batch: int) -> int:
        if micro_batch not in range(1, samples + 1):
            raise ValueError(f"peak_of takes an int from 1 to {samples:,}, but was called with {micro_batch}.")
        return peak["base"] + peak["for each sample"] * max(least, -(-int(micro_batch) // step) * step)

    return asked


def deep_token_model(case: dict[str, Plain]) -> tuple[nn.Module, torch.optim.Optimizer, list[Batch]]:
    """Return the lesson's model with more layers, its optimizer, and a window of k micro-batches."""
    model = token_model(case["seed"], case["vocabulary"], width=8)
    for _ in range(case["layers"]):
        model.insert(1, nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    shape = {"length": 5, "vocabulary": case["vocabulary"], "seed": case["seed"]}
    return model, optimizer, list(random_tokens(case["k"], case["rows"], **shape))


def kept_outside_torch(run: Callable[[], object], model: nn.Module) -> int:
    """Return the largest growth of Python's and NumPy's memory from the model's first call to a later one, in bytes.

    `measure_memory` tracks tensors; `run` may also keep lists and arrays between two calls.
    """
    held: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: held.append(tracemalloc.get_traced_memory()[0]))
    tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        run()
    finally:
        hook.remove()
        if not tracing:
            tracemalloc.stop()
    return max(held) - held[0] if held else 0

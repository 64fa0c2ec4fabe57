"""May this loss be cut? The gradient of the whole batch beside what `accumulate` makes of its pieces."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gradaccum import refusals
from gradaccum.accumulation import Counts, Sums, accumulate
from gradaccum.borrowed import borrowed, convert, gradient_of, random_state
from gradaccum.gradients import relative_error
from gradaccum.refusals import Model

Batch = TypeVar("Batch")
MicroBatch = TypeVar("MicroBatch")
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass(frozen=True)
class Split:
    """What `check_split` found; it counts as true where `ok` is True, and `str()` gives the verdict.

    Attributes:
        ok: True, the loss may be cut so; False, it may not; None, it cannot be told.
        error: the relative error of the pieces' gradient; NaN where nothing could be compared.
        buffers: the names of the buffers that end elsewhere.
        verdict: what was found, in a sentence or two.
    """

    ok: bool | None
    error: float = math.nan
    buffers: list[str] = field(default_factory=list)
    verdict: str = ""

    def __str__(self) -> str:
        return self.verdict

    def __bool__(self) -> bool:
        return self.ok is True


def check_split(
    model: Model,
    batch: Batch,
    loss: Callable[[Batch], Tensor],
    micro_batches: Iterable[MicroBatch],
    loss_sum: Callable[[MicroBatch], Sums],
    count: Callable[[MicroBatch], Counts],
    *,
    dtype: torch.dtype | None = None,
) -> Split:
    """Tell whether a loss may be cut like that, so that `accumulate` on the pieces gives the whole batch's gradient.

    Compared are the gradient of your own loss of the whole batch, what `accumulate` makes of the pieces, and the
    buffers that each of them leaves. Equal is below 1e-5 in float32 and below 1e-9 in float64. What is not is
    computed again in float64, and is called a fault only where it is larger than rounding. Modules that draw random
    numbers (dropout) are in eval mode for the while; normalizations keep their mode. All of it runs on the model
    itself. Its parameters, buffers, modes, `.grad` and the random state are put back, also after an error; a state
    that the loss keeps elsewhere is not.

    Args:
        model: the module whose parameters the loss trains, or a list or tuple of modules.
        batch: all the items at once; a small batch of unequal items shows more than a large one.
        loss: returns the loss that you mean, of the whole batch, a tensor of shape ().
        micro_batches: the pieces of the same batch, as for `accumulate`.
        loss_sum: as for `accumulate`.
        count: as for `accumulate`.
        dtype: computes in this dtype instead of the model's own.

    Returns:
        A `Split` with `ok`, `error`, `buffers` and `verdict`.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as `accumulate` and `full_batch_gradient` do.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Tanh())
        >>> x = torch.arange(12.0).view(6, 2).cos()
        >>> split = check_split(
        ...     model, x, lambda x: model(x).mean(), x.split(2), lambda x: model(x).sum(), lambda x: 3 * len(x)
        ... )
        >>> split.ok, split.buffers
        (False, ['1.running_mean', '1.running_var', '1.num_batches_tracked'])
    """
    modules = refusals.modules_of(model)
    refusals.refuse_several_processes(modules)
    case = _Case(modules, batch, loss, list(micro_batches), loss_sum, count)
    found = case.run(dtype)
    if found.drew:
        case.quiet, remembers = case.what_draws(dtype)
        found = case.run(dtype)
        if found.drew or remembers:
            what = (
                f"{remembers[0]} draws random numbers and remembers" if remembers else "the loss draws random numbers"
            )
            return Split(None, verdict=f"Cannot tell: {what}. Draw them with the batch, before it is cut.")
    split = _judged(case, found, dtype)
    if not case.quiet:
        return split
    kinds = ", ".join(sorted({type(module).__name__ for module in case.quiet}))
    return replace(split, verdict=f"{split.verdict} ({kinds} drew random numbers, and was in eval mode here.)")


def _judged(case: _Case, found: _Found, dtype: torch.dtype | None) -> Split:
    lowest = dtype or case.lowest_dtype()
    limit = LIMITS.get(lowest, 1e-5)
    if not found.finite:
        return found.cannot_tell("a gradient is not finite.")
    if found.size == found.error == 0:
        return found.cannot_tell("the gradient of the whole batch is 0.")
    if lowest in LIMITS and found.error < limit:
        return _compared(case, found, limit, dtype, "")
    again = relative_error(case.run(dtype).whole, found.whole)
    if again > max(limit, found.error / 10):
        return found.cannot_tell(
            "called again with the same batch, the loss has another gradient. It keeps a state, or draws from a "
            "generator of its own."
        )
    try:
        exact, single = case.run(torch.float64), case.run(torch.float32)
    except Exception as failure:  # whatever a loss may do that meets another dtype
        first_line = str(failure).partition("\n")[0]
        return found.cannot_tell(
            f"{_percent(found.error)} off in {lowest}, which may be rounding, and in float64 the loss fails "
            f"({type(failure).__name__}: {first_line})."
        )
    # What float32 loses of the whole batch's gradient, float64 loses 2**29 times less of; a hundred times that is
    # more than a cut does. Where a good part of it is lost (at an optimum, where items cancel), nothing can be told.
    rounding = 100 * 2.0**-29 * relative_error(single.whole, exact.whole)
    if not exact.finite or limit <= exact.error <= rounding:
        return exact.cannot_tell("the gradient of the whole batch is as small as the rounding of its parts.")
    if lowest == torch.float64 and limit <= exact.error < 1e-6:
        return exact.cannot_tell(
            f"a relative error of {exact.error:.1g} is much for float64 and little for float32, in which some of it "
            "may have been computed."
        )
    split = _compared(case, exact, limit, torch.float64, ", compared in float64")
    if not split or lowest in LIMITS:
        return split
    pieces, one = (relative_error(gradients, exact.whole) for gradients in (found.pieces, found.whole))
    off = f" In {lowest} rounding makes it {_percent(pieces)} off, and the one batch {_percent(one)}"
    advice = ": set parameter.grad_dtype = torch.float32." if pieces > 2 * one else "."
    return replace(split, verdict=split.verdict + off + advice)


def _compared(case: _Case, found: _Found, limit: float, dtype: torch.dtype | None, where: str) -> Split:
    if found.error < limit and not found.buffers:
        equal = f"{len(case.pieces)} pieces give the gradient of the whole batch"
        return Split(True, found.error, [], f"May be cut: {equal} (relative error {found.error:.0e}{where}).")
    off = "" if found.error < limit else f"{_percent(found.error)} off the whole batch's gradient{where}. "
    reason = _reason(case, found, limit, dtype)
    return Split(False, found.error, found.buffers, f"May not be cut so: {off}{reason}")


def _reason(case: _Case, found: _Found, limit: float, dtype: torch.dtype | None) -> str:
    if found.error < limit:
        listed = ", ".join(found.buffers)
        return f"the gradient is equal, but a forward remembers: these buffers end elsewhere: {listed}."
    said = ""
    if norms := refusals.batch_norms(case.modules):
        said = f"BatchNorm ({', '.join(map(repr, norms))}) normalizes each micro-batch by its own statistics. "
        frozen = case.run(dtype, eval_mode=norms.values())
        if frozen.error < limit:
            return f"{said}With it in eval mode the pieces are equal."
        if frozen.error != found.error:  # else it keeps no running statistics, and eval mode changes nothing
            said += f"With it in eval mode they are still {_percent(frozen.error)} off. "
        found = frozen
    if not _norm(found.pieces):
        return f"{said}The pieces have no gradient at all."
    factor = found.factor
    if relative_error(found.pieces, [None if one is None else factor * one for one in found.whole]) < limit:
        return (
            f"{said}The pieces give {factor:.6g} times that gradient, in the same direction: look at what count "
            "returns, and at a factor in loss or loss_sum."
        )
    apart = "Items see each other, or a term is no sum over items"
    try:
        uncut = case.run(dtype, pieces=[case.batch])
    except Exception:  # loss_sum need not take the whole batch
        return f"{said}{apart}."
    if uncut.error >= limit:
        return (
            f"{said}The cut is not all: as one micro-batch, loss_sum / count is {_percent(uncut.error)} off the loss "
            "already, so the sum or the count is not this loss's, or a term in it is no sum over items."
        )
    apart = f"{said}As one micro-batch, loss_sum / count is the loss: {apart[0].lower()}{apart[1:]}"
    whole, *pieces = (torch.as_tensor(case.count(each)).item() for each in (case.batch, *case.pieces))
    if whole != sum(pieces):
        return f"{apart}, or the pieces are not the batch (they count {sum(pieces):g}, it {whole:g})."
    return f"{apart}."


class _Found(NamedTuple):
    whole: list[Tensor | None]
    pieces: list[Tensor | None]
    buffers: list[str]
    drew: bool

    @property
    def error(self) -> float:
        return relative_error(self.pieces, self.whole)

    @property
    def size(self) -> float:
        return _norm(self.whole)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.size) and math.isfinite(_norm(self.pieces))

    def cannot_tell(self, why: str) -> Split:
        return Split(None, self.error, self.buffers, f"Cannot tell: {why}")

    @property
    def factor(self) -> float:
        """How often the whole gradient is in that of the pieces."""
        pairs = [
            (one.double(), other.double())
            for one, other in zip(self.whole, self.pieces, strict=True)
            if one is not None and other is not None
        ]
        return sum((one * other).sum().item() for one, other in pairs) / self.size**2


@dataclass
class _Case:
    """A batch, its pieces, and how they are run."""

    modules: list[nn.Module]
    batch: Any
    loss: Callable[[Any], Tensor]
    pieces: list[Any]
    loss_sum: Callable[[Any], Sums]
    count: Callable[[Any], Counts]
    quiet: Sequence[nn.Module] = ()  # in eval mode, because they draw

    def lowest_dtype(self) -> torch.dtype:
        """Return the dtype of the trainable parameters that has the fewest bits."""
        dtypes = {one.dtype for module in self.modules for one in module.parameters() if one.requires_grad}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def run(
        self,
        dtype: torch.dtype | None,
        eval_mode: Iterable[nn.Module] = (),
        pieces: Sequence[Any] | None = None,
    ) -> _Found:
        """Run the whole batch, put everything back, and run the pieces."""
        batch, pieces = self.batch, self.pieces if pieces is None else pieces
        if dtype is not None:
            batch, pieces = convert(batch, dtype), [convert(piece, dtype) for piece in pieces]
        quiet = [*self.quiet, *eval_mode]
        ends = []
        with borrowed(self.modules, dtype) as restart, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "BatchNorm|Gradients of torch")  # the verdict says it
            before = random_state(self.modules)
            for run in (self._whole, self._pieces):
                restart()
                for module in quiet:
                    module.training = False  # not eval(): what is inside it keeps its mode
                gradients = run(batch if run == self._whole else pieces)
                left = {name: one.detach().clone() for name, one in refusals.named(self.modules, "buffers").items()}
                ends.append((gradients, left, random_state(self.modules) != before))
        (whole, one, drew), (cut, other, drew_again) = ends
        limit = LIMITS.get(dtype or self.lowest_dtype(), 1e-5)
        moved = [name for name in one | other if not _same(one.get(name), other.get(name), limit)]
        return _Found(whole, cut, moved, drew or drew_again)

    def _whole(self, batch: Any) -> list[Tensor | None]:
        return gradient_of(self.modules, batch, self.loss)

    def _pieces(self, pieces: Sequence[Any]) -> list[Tensor | None]:
        accumulate(self.modules, pieces, self.loss_sum, self.count)
        return [parameter.grad for parameter in refusals.named(self.modules, "parameters").values()]

    def what_draws(self, dtype: torch.dtype | None) -> tuple[list[nn.Module], list[str]]:
        """Return the modules that draw random numbers themselves, and the names of those that have moving buffers."""
        drawing: set[nn.Module] = set()
        running: list[list[Any]] = []  # each module whose forward runs, and the last random state that was its doing

        def enter(module: nn.Module, *_: Any) -> None:
            state = random_state(self.modules)
            if running and running[-1][1] != state:
                drawing.add(running[-1][0])
            running.append([module, state])

        def leave(module: nn.Module, *_: Any) -> None:
            state = random_state(self.modules)
            if running.pop()[1] != state:
                drawing.add(module)
            if running:
                running[-1][1] = state

        names = {module: name for outer in self.modules for name, module in outer.named_modules()}
        with borrowed(self.modules, dtype), torch.enable_grad():
            handles = [module.register_forward_pre_hook(enter) for module in names]
            handles += [module.register_forward_hook(leave) for module in names]
            before = {module: [one.clone() for one in module.buffers(recurse=False)] for module in names}
            try:
                self.loss(self.batch if dtype is None else convert(self.batch, dtype))
            finally:
                for handle in handles:
                    handle.remove()
            after = {module: list(module.buffers(recurse=False)) for module in names}
            moving = [
                f"{name!r} ({type(module).__name__})"
                for module, name in names.items()
                if module in drawing
                and not all(_same(one, other, 1e-9) for one, other in zip(before[module], after[module], strict=False))
            ]
        return list(drawing), moving


def _norm(gradients: Iterable[Tensor | None]) -> float:
    return math.hypot(*(torch.linalg.vector_norm(one.double()).item() for one in gradients if one is not None))


def _same(one: Tensor | None, other: Tensor | None, limit: float) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.equal(one, other) or relative_error(one, other) < limit


def _percent(error: float) -> str:
    return f"{100 * error:.2g} %" if error < 1 else f"{100 * error:.0f} %"

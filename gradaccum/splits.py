"""Check whether a loss can be split: compare the gradient of the whole batch with `accumulate` on its pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from gradaccum import refusals
from gradaccum.accumulation import Counts, Sums
from gradaccum.borrowed import random_state_kept, refuse_to_borrow
from gradaccum.compared import Case, Compared, limit_of, lost, norm
from gradaccum.gradients import relative_error
from gradaccum.refusals import Model
from gradaccum.verdicts import percent

Batch = TypeVar("Batch")
MicroBatch = TypeVar("MicroBatch")
# Suffixes of the names of modules that draw random numbers in training, for each item separately.
ITEM_BY_ITEM = ("Dropout", "DropPath", "StochasticDepth")


@dataclass(frozen=True)
class Split:
    """The result of `check_split`; true if `ok` is True, and `str()` returns the verdict.

    Attributes:
        ok: True if the loss can be split like that, False if not, None if the check cannot tell.
        error: the relative error of the pieces' gradient; NaN if nothing could be compared.
        buffers: the names of the buffers, and of the frozen parameters, whose final values differ.
        verdict: the finding, in one or two sentences.
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
    """Check whether `accumulate` on these pieces gives the gradient of the whole batch.

    It compares the gradient of your own loss on the whole batch with that of `accumulate` on the pieces, and the final
    buffers of both. Gradients are equal if their relative error is below 1e-5 in float32, or 1e-9 in float64. Otherwise
    they are computed again in float64, and differ only if the error is larger than rounding. Dropout is left out; other
    modules that draw random numbers run in eval mode; normalizations keep their mode. Everything runs on the model
    itself. Its parameters, buffers, modes, `.grad` and the random state are restored, also after an error; any state
    that the loss keeps elsewhere is not.

    Args:
        model: the module whose parameters the loss trains, or a list or tuple of modules.
        batch: all items at once; a small batch of unequal items shows more than a large one.
        loss: returns your own loss of the whole batch, a tensor of shape ().
        micro_batches: the pieces of the same batch, as for `accumulate`.
        loss_sum: as for `accumulate`.
        count: as for `accumulate`.
        dtype: the dtype to compute in, instead of the model's own.

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
    refuse_to_borrow(modules, dtype)
    refusals.refuse_several_processes(modules)
    with random_state_kept(modules):  # a DataLoader draws
        pieces = list(micro_batches)
    case = Case(modules, batch, loss, pieces, loss_sum, count)
    found = case.run(dtype)
    if not found.drew:
        return _judged(case, found, dtype)
    case.without_dropout, note = True, "Dropout was left out"
    try:
        found = case.run(dtype)
    except Exception as failure:  # where what it is left out of is run again by other means
        return Split(None, verdict=f"Cannot tell: the loss draws random numbers, and without dropout {_what(failure)}.")
    if found.drew:
        try:
            _, case.quiet = case.watch(dtype)
            found = case.run(dtype)
        except Exception as failure:  # some modules give other things in eval mode, compiled ones take no hooks
            what = f"the loss draws random numbers, and in eval mode {_what(failure)}"
            return Split(None, verdict=f"Cannot tell: {what}.")
        kinds = ", ".join(sorted({type(module).__name__ for module in case.quiet}))
        note += f", and {kinds}, which draws random numbers, was in eval mode"
        if found.drew:
            return Split(None, verdict=DRAWS)
    split = _judged(case, found, dtype)
    unknown = [module for module in case.quiet if not type(module).__name__.endswith(ITEM_BY_ITEM)]
    if split and unknown:
        return replace(split, ok=None, verdict=f"Cannot tell: {note}, where the pieces are equal; it may mix items.")
    return replace(split, verdict=f"{split.verdict} ({note}.)")


DRAWS = (
    "Cannot tell: the loss draws random numbers. "
    "Draw them with the batch, before it is split, or check the model in eval mode."
)


def _judged(case: Case, found: Compared, dtype: torch.dtype | None) -> Split:
    lowest = dtype or case.lowest_dtype()
    limit = limit_of(lowest)
    if not found.finite:
        return _cannot_tell(found, "a gradient is not finite.")
    if found.size == found.error == 0:
        return _cannot_tell(found, "the gradient of the whole batch is 0.")
    small = found.error < limit
    if small and not found.buffers and not found.apart(1e-3):
        return _compared(case, found, limit, dtype, "")
    if not small and relative_error(case.run(dtype).whole, found.whole) > max(limit, found.error / 10):
        return _cannot_tell(
            found,
            "called again with the same batch, the loss has a different gradient. It keeps a state, or draws from its "
            "own generator.",
        )
    try:
        exact = case.run(torch.float64)
        single = case.run(torch.float32) if lowest == torch.float64 else found
    except Exception as failure:  # whatever a loss may do that meets another dtype
        # Parameters that are one bit larger show what rounding does to this gradient, in its own dtype.
        nudged = case.run(dtype, nudged=True).whole if limit else []
        if small or (limit and found.error > 100 * relative_error(nudged, found.whole)):
            return _compared(case, found, limit, dtype, "")
        return _cannot_tell(
            found,
            f"{percent(found.error)} off in {lowest}, which may be rounding, and in float64 {_what(failure)}.",
        )
    limit = limit or limit_of(torch.float32)
    if not exact.finite or limit <= exact.error <= lost(single.whole, exact.whole):
        return _cannot_tell(exact, "the gradient of the whole batch is as small as the rounding of its parts.")
    if limit < 1e-6 and limit <= exact.error < 1e-6:
        return _cannot_tell(
            exact,
            f"a relative error of {exact.error:.1g} is large for float64 but small for float32, in which part of it "
            "may have been computed.",
        )
    if exact.error < limit and (apart := exact.apart(1e-5, single)):
        name, error = max(apart.items(), key=lambda pair: pair[1])
        return replace(
            _compared(case, exact, limit, torch.float64, ""),
            ok=False,
            verdict=f"Cannot be split like this: {name} is {percent(error)} off, as are {len(apart) - 1} more. "
            f"Over the whole gradient the error is small ({exact.error:.0e}), compared in float64.",
        )
    split = _compared(case, exact, limit, torch.float64, ", compared in float64")
    if not split or limit_of(lowest):
        return split
    cut, one = (relative_error(gradients, exact.whole) for gradients in (found.pieces, found.whole))
    off = f" In {lowest} rounding makes it {percent(cut)} off, and the one batch {percent(one)}"
    advice = ": set parameter.grad_dtype = torch.float32." if cut > 2 * one else "."
    return replace(split, verdict=split.verdict + off + advice)


def _compared(case: Case, found: Compared, limit: float, dtype: torch.dtype | None, where: str) -> Split:
    if found.error < limit and not found.buffers:
        equal = f"{len(case.pieces)} pieces give the gradient of the whole batch"
        return Split(True, found.error, [], f"Can be split: {equal} (relative error {found.error:.0e}{where}).")
    off = "" if found.error < limit else f"{percent(found.error)} off the whole batch's gradient{where}. "
    reason = _reason(case, found, limit, dtype)
    return Split(False, found.error, found.buffers, f"Cannot be split like this: {off}{reason}")


def _reason(case: Case, found: Compared, limit: float, dtype: torch.dtype | None) -> str:
    if found.error < limit:
        listed = ", ".join(found.buffers)
        return f"the gradient is equal, but a forward changes state: these buffers end with other values: {listed}."
    said = ""
    try:
        ran, _ = case.watch(dtype)
    except Exception:  # compiled modules take no hooks
        ran = set(refusals.inner(case.modules))
    if norms := {name: module for name, module in refusals.batch_norms(case.modules).items() if module in ran}:
        said = f"BatchNorm ({', '.join(map(repr, norms))}) normalizes each micro-batch by its own statistics. "
        frozen = case.run(dtype, eval_mode=norms.values())
        if frozen.error < limit:
            return f"{said}With it in eval mode the pieces are equal."
        if frozen.error != found.error:  # else it keeps no running statistics, and eval mode changes nothing
            said += f"With it in eval mode they are still {percent(frozen.error)} off. "
        found = frozen
    if not norm(found.pieces):
        return f"{said}The pieces have no gradient at all."
    if found.size:
        factor = found.factor
        if relative_error(found.pieces, [None if one is None else factor * one for one in found.whole]) < limit:
            way = "same" if factor > 0 else "opposite"
            return (
                f"{said}The pieces give {factor:.10g} times that gradient, in the {way} direction: check what count "
                "returns, and any factor in loss or loss_sum."
            )
    try:
        uncut = case.run(dtype, pieces=[case.batch])
    except Exception:  # loss_sum need not take the whole batch
        return f"{said}Items see each other, or a term is not a sum over items."
    if not uncut.error < limit:
        return (
            f"{said}The split is not the only cause: as one micro-batch, loss_sum / count is already "
            f"{percent(uncut.error)} off, so sum or count do not match this loss, or a term is not a sum over items."
        )
    said += "As one micro-batch, loss_sum / count is the loss"
    whole, pieces = (
        refusals.counts_and_totals([case.count(each) for each in some])[1] for some in ([case.batch], case.pieces)
    )
    for key, one in whole.items():
        if one != pieces[key]:
            counts = f"the pieces count {pieces[key]} and it counts {one}"
            return f"{said}, but {counts}: items are miscounted or missing."
    return f"{said}: items see each other, or a term is not a sum over items."


def _cannot_tell(found: Compared, why: str) -> Split:
    return Split(None, found.error, found.buffers, f"Cannot tell: {why}")


def _what(failure: Exception) -> str:
    first_line = str(failure).partition("\n")[0]
    return f"the loss fails ({type(failure).__name__}: {first_line})"

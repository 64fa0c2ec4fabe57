"""Gradient accumulation: group micro-batches into windows, and sum the gradient of a window over its micro-batches.

The normalization rule: count the window's items first, then divide each micro-batch's summed loss by that count.
The rest of an update (clip, step, schedule, clear) stays in the caller's loop, once per window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from gradaccum import collective, refusals
from gradaccum.refusals import Model

MicroBatch = TypeVar("MicroBatch")
Sums: TypeAlias = Tensor | Mapping[str, Tensor]
Count: TypeAlias = int | float | Tensor
Counts: TypeAlias = Count | Mapping[str, Count]


class Window(list[MicroBatch]):
    """A list of micro-batches from `windows(..., group=...)`; empty on a rank that has run out.

    Attributes:
        spare: a micro-batch of this rank. If the window is empty, `accumulate` runs it with weight 0.

    Example:
        >>> window = Window([10, 20, 30], spare=10)
        >>> window.without([1]), window.without([0, 1, 2]), window.without([0, 1, 2]).spare
        ([10, 30], [], 10)
    """

    def __init__(self, micro_batches: Iterable[MicroBatch], spare: MicroBatch) -> None:
        super().__init__(micro_batches)
        self.spare = spare

    def without(self, indices: Iterable[int]) -> Window[MicroBatch]:
        """Return a window without the micro-batches at these indices and with the same spare."""
        left_out = set(indices)
        return Window((each for index, each in enumerate(self) if index not in left_out), self.spare)


class Windows(Generic[MicroBatch]):
    """An iterable of lists of micro-batches, one list per update; returned by `windows`."""

    def __init__(self, micro_batches: Iterable[MicroBatch], accumulation_steps: int, group: Any = None) -> None:
        self._micro_batches = micro_batches
        self._accumulation_steps = accumulation_steps
        self._group = group

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        stream = iter(self._micro_batches)
        if self._group is None:
            while window := list(islice(stream, self._accumulation_steps)):
                yield window
                del window  # otherwise it is alive while the next window is read
        else:
            yield from self._as_many_as_the_others(stream)

    def _as_many_as_the_others(self, stream: Iterator[MicroBatch]) -> Iterator[Window[MicroBatch]]:
        spare: list[MicroBatch] = []
        window: list[MicroBatch] = []
        while True:
            error = None
            try:
                window = list(islice(stream, self._accumulation_steps))
            except Exception as caught:  # the others must not wait for this rank
                error = caught
            spare = spare or window[:1]
            if not collective.any_has_more(self._group, bool(window), bool(spare), error):
                return
            yield Window(window, spare[0])
            window = []

    def __len__(self) -> int:
        """Return the number of windows; raise TypeError if the micro-batches have no length."""
        return -(-len(self._micro_batches) // self._accumulation_steps)  # type: ignore[arg-type]

    def __bool__(self) -> bool:  # otherwise bool() would call __len__, which may raise
        return True


def windows(micro_batches: Iterable[MicroBatch], accumulation_steps: int, *, group: Any = None) -> Windows[MicroBatch]:
    """Group `micro_batches` into lists of `accumulation_steps`; the last list may be shorter, never empty.

    Args:
        micro_batches: any iterable: a DataLoader, a list, a generator. It is read no further than the list
            being yielded. If it can be iterated again, epoch after epoch, so can the result.
        accumulation_steps: k, how many micro-batches make one update; an int of at least 1.
        group: the process group that trains together (`torch.distributed.group.WORLD`, or a mesh's `get_group()`),
            if ranks may run out of data at different times. Every rank then gets the same number of `Window`s; a rank
            that has run out gets empty ones, with the epoch's first micro-batch as a spare for `accumulate`. This
            takes one small blocking collective per window, so no rank may leave the loop early.

    Returns:
        An iterable of lists. It has a `len` (the number of updates, rounded up) if `micro_batches` has one; with a
        group, `len` counts only the windows of this rank's own micro-batches.
        It releases a list before it reads the next one. If the loop does so too, with `del window` at its end, the
        inputs of one window are in memory at a time, not of two.

    Raises:
        TypeError: `accumulation_steps` is not an int, `micro_batches` is not iterable, or `group` is not a group.
        ValueError: `accumulation_steps` is below 1; in the loop, on all ranks of a group, if a rank has no micro-batch.
        RuntimeError: in the loop, if another rank of the group failed to read its micro-batches.

    Example:
        >>> list(windows(range(7), accumulation_steps=3))
        [[0, 1, 2], [3, 4, 5], [6]]
        >>> len(windows(range(7), accumulation_steps=3))
        3
    """
    if not isinstance(accumulation_steps, int) or isinstance(accumulation_steps, bool):
        raise TypeError(
            f"accumulation_steps must be an int such as 4, but {accumulation_steps!r} "
            f"is of type {type(accumulation_steps).__name__}."
        )
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be at least 1, but {accumulation_steps} was given.")
    if not isinstance(micro_batches, Iterable) and not hasattr(type(micro_batches), "__getitem__"):
        raise TypeError(
            "micro_batches must be iterable, such as a DataLoader or a list, "
            f"but {micro_batches!r} is of type {type(micro_batches).__name__}."
        )
    collective.refuse_unless_group(group)
    return Windows(micro_batches, accumulation_steps, group)


class Accumulated(NamedTuple):
    """The result of `accumulate`.

    Attributes:
        loss: the window's mean loss, detached, a tensor of shape (); with several losses, the sum of their means.
        count: N, the number of items in the window; with several losses, a dict of numbers.
        losses: with several losses, a dict of their means, detached, without losses of count 0; otherwise None.
    """

    loss: Tensor
    count: int | float | dict[str, int | float]  # type: ignore[assignment]  # hides tuple.count, which is not needed
    losses: dict[str, Tensor] | None = None


class NonFiniteLoss(ArithmeticError):
    """Raised by `accumulate(..., nonfinite="raise")` if the loss of a micro-batch is infinite or NaN.

    Attributes:
        micro_batches: the indices of these micro-batches in the window. On several ranks, those in this rank's window:
            empty if only other ranks are at fault. All ranks must call `accumulate` again.
    """

    def __init__(self, micro_batches: Sequence[int]) -> None:
        super().__init__(list(micro_batches))
        self.micro_batches = list(micro_batches)

    def __str__(self) -> str:
        if not self.micro_batches:
            return "The loss of a micro-batch on another rank is not finite: call accumulate again with this window."
        which = "micro-batch" + "es" * (len(self.micro_batches) > 1)
        listed = ", ".join(map(str, self.micro_batches))
        return f"The loss of {which} {listed} is not finite: leave out what is at fault and call accumulate again."


def accumulate(
    model: Model,
    window: Iterable[MicroBatch],
    loss_sum: Callable[[MicroBatch], Sums],
    count: Callable[[MicroBatch], Counts],
    *,
    scaler: torch.amp.GradScaler | None = None,
    nonfinite: str = "pass",
    sync: str = "last",
    alone: bool = False,
) -> Accumulated:
    """Set `.grad` to the gradient of the mean loss over the window, with one micro-batch's activations in memory.

    Accumulation gives the large batch's gradient where the loss is a sum over items, each computed from its item
    alone by a forward that remembers nothing, divided by a number known beforehand. The split then affects rounding
    only; dividing by the number of micro-batches instead also needs equal counts (huggingface/transformers#34191).
    Otherwise (BatchNorm in training, negatives or weights taken from the batch) the result depends on how the window
    is split: check a loss with `check_split`. `accumulate` never steps, clips, schedules or clears.

    On several processes, call it on all of them with the model in DistributedDataParallel or `fully_shard` (FSDP2,
    HSDP), which is found through wrappers and `torch.compile`. Counts are summed over the ranks that the engine
    averages over. `.grad`, `loss` and `count` are then over the items of all these ranks. Ranks may have different
    numbers of items and micro-batches. Gradients are synchronized once, in the last pass. If all ranks must run the
    same number of passes (`fully_shard`, `sync="each"`, SyncBatchNorm), a rank with fewer micro-batches runs its last
    one again with weight 0, which updates BatchNorm's statistics and draws random numbers again. If `loss_sum` itself
    communicates, use `sync="each"`; if it calls a frozen `fully_shard` model, pass that model too.

    Args:
        model: the module that has every parameter the loss trains, or a list or tuple of modules (two towers; a loss
            with its own parameters). Each `.grad` must be None. On several processes, every trainable parameter must
            be in an engine over the same ranks, and `loss_sum` must call the engine, not the module that it wraps.
        window: the micro-batches of one update, in any form that `loss_sum` and `count` take. A `Window` with a spare,
            from `windows(..., group=...)`, may be empty on some ranks.
        loss_sum: returns the **sum** of a micro-batch's losses, a tensor of shape () with a graph. Move the inputs to
            the device here, so that only one micro-batch is on the device at a time, not the window.
        count: returns the number of items in that sum (samples, target tokens), an int or a tensor of shape ().
            Tensors are read together, which synchronizes with the accelerator once per window.
            For losses with different denominators, `loss_sum` and `count` return dicts with the same keys. Each sum is
            divided by its own total, and the results are added; a factor on a loss goes into its sum. A key whose
            count is 0 in the whole window is left out.
        scaler: a GradScaler whose `scale` is applied to each loss. Call `unscale_`, `step` and `update` yourself, in
            this order, and clip after `unscale_`.
        nonfinite: "pass" lets an infinite or NaN loss propagate to every `.grad`; "raise" raises `NonFiniteLoss` after
            the last backward, which synchronizes with the device once more. Neither detects a finite loss with a
            gradient that is not finite. All ranks raise together. Leave micro-batches out with `window.without(...)`:
            a list made from a `Window` has no spare.
        sync: on several processes, "last" synchronizes the gradients in the window's last pass, and until then each
            rank holds the whole gradient; "each" synchronizes them in every pass, so that with `fully_shard` a rank
            holds only its shard.
        alone: allows a model without an engine to train on this process alone while several processes run.

    Returns:
        `Accumulated(loss, count, losses)`: the window's mean loss, detached and unscaled, N, and None for one loss.

    Raises:
        ValueError, TypeError: before the first forward, if the window is empty, the model has nothing to train,
            a `.grad` is not None, or a count is not a number, negative, not finite, or zero over the window;
            after a forward, if a loss is not a scalar tensor with a graph; at the end, if no parameter has a gradient.
            On several ranks, errors before the first forward are raised on all of them, and name a rank. There, also
            before the model's first backward, if the loss trains a parameter of a module that was not passed.
        NotImplementedError: before the first forward, if several processes train together and the model has no
            engine, or one that is not supported (FSDP1, DDP with `join()` or a hook of torch's that does not average or
            that steps, `set_all_reduce_hook`, parts with different groups or factors).
        NonFiniteLoss: a loss is not finite, with `nonfinite="raise"`.
        RuntimeError: after the first backward of a model's first window, if a hook has cleared a `.grad`, as an
            optimizer in the backward pass does (LOMO, GaLore by layer); its step has already been made. On several
            ranks, if another rank raised, a pass bypassed the engine, or the engine did not send all gradients.
        Exception: errors from `loss_sum`, out-of-memory errors included, are passed on.
            After any error every `.grad` is None, so that the same window can be retried in smaller micro-batches.
            Retry after the `except` block, which keeps the failed graph alive. Buffers (BatchNorm's) and the random
            state are not restored.

    Warns:
        UserWarning: once per model, before the first forward, if a window of two or more meets BatchNorm in training,
            or has so many micro-batches that 16-bit gradients lose small contributions.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> window = [torch.tensor([[1.0]]), torch.tensor([[2.0], [6.0]])]
        >>> result = accumulate(model, window, loss_sum=lambda x: model(x).sum(), count=len)
        >>> result.count, model.weight.grad.item()  # 3 items; the mean of 1, 2 and 6
        (3, 3.0)

        Leave out a micro-batch whose loss is not finite; the mean is over the others:

        >>> model.zero_grad()
        >>> window.append(torch.tensor([[torch.inf]]))
        >>> try:
        ...     result = accumulate(model, window, lambda x: model(x).sum(), len, nonfinite="raise")
        ... except NonFiniteLoss as error:
        ...     kept = [each for index, each in enumerate(window) if index not in error.micro_batches]
        ...     result = accumulate(model, kept, lambda x: model(x).sum(), len)
        >>> result.count, model.weight.grad.item()
        (3, 3.0)
    """
    given, window = window, list(window)
    spare = [given.spare] if isinstance(given, Window) and not window else []
    modules = refusals.modules_of(model)
    engine = collective.together(modules, alone=alone)

    def checked() -> tuple[list[torch.nn.Parameter], list[Any]]:
        if nonfinite not in ("pass", "raise"):
            raise ValueError(f"nonfinite must be 'pass' or 'raise', but {nonfinite!r} was given.")
        if sync not in ("last", "each"):
            raise ValueError(f"sync must be 'last' or 'each', but {sync!r} was given.")
        if alone and engine:
            raise ValueError("alone=True is for a model without an engine, but this one has one: leave it out.")
        if not window and not (spare and engine):
            raise ValueError("The window is empty: give accumulate at least one micro-batch.")
        parameters = refusals.trainable_and_clear(modules)
        counted = [count(micro_batch) for micro_batch in window or spare]
        if engine:  # here, so that a warning turned into an error on one rank is raised on all
            warn(parameters, 6)
        return parameters, counted

    def warn(parameters: list[torch.nn.Parameter], level: int) -> None:
        if len(window) > 1:
            refusals.warn_of_batch_statistics(modules, len(window), level)
        if len(window) >= refusals.MANY:
            refusals.warn_of_sixteen_bits(modules, parameters, len(window), level)

    if engine is None:
        parameters, counted = checked()
        counts, totals = refusals.counts_and_totals(counted)
        divisors: Mapping[Any, int | float] = totals
        warn(parameters, 4)
    else:
        parameters, counts, totals = engine.agree(
            len(window), checked, each=sync == "each", raises=nonfinite == "raise"
        )
        divisors = {key: total / engine.divisor for key, total in totals.items()}  # the engine divides by D, not by N
    first_window = refusals.is_new(modules)
    losses: dict[Any, list[Tensor]] = {key: [] for key, total in totals.items() if total}
    try:
        if engine:
            engine.begin()
        for index, micro_batch in enumerate(window):
            with engine.during(index) if engine else nullcontext():
                loss = loss_sum(micro_batch)
                if (
                    None in totals
                    and isinstance(loss, Tensor)
                    and loss.ndim == 0
                    and loss.requires_grad
                    and loss.is_floating_point()
                ):
                    loss = loss / divisors[None]
                    losses[None].append(loss.detach())
                else:
                    loss = _divided(loss, index, counts[index], divisors, losses)
                if engine:
                    engine.refuse_bypassed(loss, index)
                if loss.requires_grad:  # a micro-batch with count 0 may have no graph
                    loss = loss if scaler is None else scaler.scale(loss)
                    if first_window:
                        with refusals.no_gradient_is_taken_away(parameters):
                            loss.backward()  # type: ignore[no-untyped-call]
                        refusals.SEEN.update(modules)
                        first_window = engine is not None and index + 1 < engine.passes  # fully_shard's hooks wait
                    else:
                        loss.backward()  # type: ignore[no-untyped-call]
            del loss  # so that nothing of this graph is alive during the next forward
        if engine:
            with refusals.no_gradient_is_taken_away(parameters) if first_window else nullcontext():
                engine.fill_up(len(window), (window or spare)[-1], loss_sum, scaler)
        means, bad = (engine.means if engine else _means)(losses, nonfinite == "raise")
        if all(parameter.grad is None for parameter in parameters):
            raise ValueError(
                "No parameter of the model got a gradient: give accumulate the modules that loss_sum trains."
            )
        if bad is not None:
            raise NonFiniteLoss(bad)
    except BaseException:  # an interrupt too: half a window's gradient must not reach an optimizer
        if engine:
            engine.forget()
        for module in modules:
            for parameter in module.parameters():
                parameter.grad = None
        raise
    finally:
        if engine:
            engine.end()
    if None in totals:
        return Accumulated(means[None], totals[None])
    return Accumulated(torch.stack(list(means.values())).sum(), totals, means)


def _divided(
    given: Any, index: int, counts: dict[Any, Any], totals: Mapping[Any, int | float], losses: dict[Any, list[Tensor]]
) -> Tensor:
    """Return a micro-batch's part of the sum of several losses; append each loss's part, detached, to `losses`."""
    sums = refusals.sums_of(given, counts, index)
    parts = [sums[key] / totals[key] for key in losses]
    for part, noted in zip(parts, losses.values(), strict=True):
        noted.append(part.detach())
    return torch.stack(parts).sum()


def _means(losses: dict[Any, list[Tensor]], raises: bool) -> tuple[dict[Any, Tensor], list[int] | None]:
    """Return each loss's mean, and with `raises` the indices of non-finite micro-batches, None if there are none."""
    bad = None
    if raises:
        finite = torch.stack([torch.stack(each).isfinite() for each in losses.values()]).all(dim=0)
        bad = [index for index, good in enumerate(finite.tolist()) if not good] or None
    stacked = {key: torch.stack(each) for key, each in losses.items()}
    return {key: each.sum(dtype=torch.promote_types(each.dtype, torch.float32)) for key, each in stacked.items()}, bad

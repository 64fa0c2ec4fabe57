"""Gradient accumulation: group micro-batches into windows, and sum a window's gradient piece by piece.

One rule normalizes it: count the window's items first, then divide each micro-batch's summed loss by that count.
Everything that belongs to an update (clip, step, schedule, clear) stays in the caller's loop, once per window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from gradaccum import refusals
from gradaccum.refusals import Model

MicroBatch = TypeVar("MicroBatch")
Sums: TypeAlias = Tensor | Mapping[str, Tensor]
Count: TypeAlias = int | float | Tensor
Counts: TypeAlias = Count | Mapping[str, Count]


class Windows(Generic[MicroBatch]):
    """The micro-batches of an iterable in lists, one list per update; made by `windows`."""

    def __init__(self, micro_batches: Iterable[MicroBatch], accumulation_steps: int) -> None:
        self._micro_batches = micro_batches
        self._accumulation_steps = accumulation_steps

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        stream = iter(self._micro_batches)
        while window := list(islice(stream, self._accumulation_steps)):
            yield window
            del window  # or it would be alive while the next one is read

    def __len__(self) -> int:
        """Count the windows; a TypeError where the micro-batches themselves have no length."""
        return -(-len(self._micro_batches) // self._accumulation_steps)  # type: ignore[arg-type]

    def __bool__(self) -> bool:  # without it, truth would be asked of a length that may not exist
        return True


def windows(micro_batches: Iterable[MicroBatch], accumulation_steps: int) -> Windows[MicroBatch]:
    """Group `micro_batches` into lists of `accumulation_steps`; the last list may be shorter, never empty.

    Args:
        micro_batches: any iterable: a DataLoader, a list, a generator. It is read no further than the list
            being yielded. Whatever can be iterated again, epoch after epoch, can be here too.
        accumulation_steps: k, how many micro-batches make one update; an int of at least 1.

    Returns:
        An iterable of lists. It has a `len` (the number of updates, rounded up) if `micro_batches` has one.
        It lets go of a list before it reads the next one; a loop that ends with `del window` does too, and then
        the inputs of one window are held, not of two.

    Raises:
        TypeError: `accumulation_steps` is not an int, or `micro_batches` cannot be iterated.
        ValueError: `accumulation_steps` is below 1.

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
            "micro_batches must be something to iterate over, such as a DataLoader or a list, "
            f"but {micro_batches!r} is of type {type(micro_batches).__name__}."
        )
    return Windows(micro_batches, accumulation_steps)


class Accumulated(NamedTuple):
    """What `accumulate` returns.

    Attributes:
        loss: the window's mean loss, detached, a tensor of shape (); with several losses, their sum.
        count: N, the items in it; with several losses, a dict of them.
        losses: with several losses, each one's mean, detached; a key that counts nothing is absent. Else None.
    """

    loss: Tensor
    count: int | float | dict[str, int | float]  # type: ignore[assignment]  # it hides tuple.count, of no use here
    losses: dict[str, Tensor] | None = None


class NonFiniteLoss(ArithmeticError):
    """The loss of some micro-batch is infinite or NaN; raised by `accumulate(..., nonfinite="raise")`.

    Attributes:
        micro_batches: the indices of those micro-batches in the window.
    """

    def __init__(self, micro_batches: Sequence[int]) -> None:
        super().__init__(list(micro_batches))
        self.micro_batches = list(micro_batches)

    def __str__(self) -> str:
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
) -> Accumulated:
    """Leave in `.grad` the gradient of the mean loss over the window, holding one micro-batch's activations.

    Accumulation gives the large batch's gradient where the loss is a sum over items, each computed from its item
    alone by a forward that remembers nothing, divided by a number known beforehand. There the cut matters by rounding
    only; dividing by the number of micro-batches instead needs equal counts too (huggingface/transformers#34191).
    Elsewhere (BatchNorm in training, negatives or weights taken from the batch) the result is the gradient of the
    window as it was cut: `check_split` says whether a loss may be cut. It never steps, clips, schedules or clears,
    and it is for one process.

    Args:
        model: the module that holds every parameter the loss trains, or a list or tuple of modules (two towers; a
            loss with parameters of its own). Each `.grad` must be None.
        window: the micro-batches of one update, whatever `loss_sum` and `count` take.
        loss_sum: returns the **sum** of a micro-batch's losses, a tensor of shape () with a graph. Move the inputs to
            the device in it: then one micro-batch of them is there, not a window.
        count: returns the number of items in that sum (samples, target tokens), an int or a tensor of shape ().
            Tensors are read together: an accelerator is waited for once per window.
            Losses with denominators of their own: both return dicts with the same keys. Each sum is divided by its own
            total, and the loss is what they add up to; a factor between them belongs into the sums. A key that counts
            nothing in the whole window is left out.
        scaler: a GradScaler whose `scale` is applied to each loss. Call `unscale_`, `step` and `update` yourself, in
            this order and with clipping after `unscale_`.
        nonfinite: "pass" lets an infinite or NaN loss through, into every `.grad`; "raise" raises `NonFiniteLoss`
            after the last backward, and waits for the device once more. A finite loss whose gradient is not finite is
            found by neither.

    Returns:
        `Accumulated(loss, count, losses)`: the window's mean loss, detached and unscaled, N, and None for one loss.

    Raises:
        ValueError, TypeError: before the first forward, if the window is empty, the model has nothing to train,
            a `.grad` is not None, or a count is not a number, negative, not finite, or zero over the window;
            when it is seen, if a loss is not a scalar tensor with a graph; at the end, if no parameter has a gradient.
        NotImplementedError: before the first forward, if several processes train together.
        NonFiniteLoss: a loss is not finite, with `nonfinite="raise"`.
        RuntimeError: after the first backward of a model's first window, if a hook has taken a `.grad` away, as an
            optimizer in the backward pass does (LOMO, GaLore by layer): its step has been made.
        Exception: whatever `loss_sum` raises passes through (running out of memory too).
            After every error each `.grad` is None, so that the same window can be tried in smaller pieces
            (after the `except` block, which holds the failed graph while it runs). Buffers (BatchNorm's) and the
            random state are not put back.

    Warns:
        UserWarning: once a model, before the first forward, for a window of two or more with BatchNorm in training,
            and for so many micro-batches that gradients of 16 bits lose the small ones.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> window = [torch.tensor([[1.0]]), torch.tensor([[2.0], [6.0]])]
        >>> result = accumulate(model, window, loss_sum=lambda x: model(x).sum(), count=len)
        >>> result.count, model.weight.grad.item()  # 3 items; the mean of 1, 2 and 6
        (3, 3.0)

        A micro-batch whose loss is not finite is left out; the mean is then over what is kept:

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
    window = list(window)
    modules = refusals.modules_of(model)
    if nonfinite not in ("pass", "raise"):
        raise ValueError(f"nonfinite must be 'pass' or 'raise', but {nonfinite!r} was given.")
    if not window:
        raise ValueError("The window is empty: give accumulate at least one micro-batch.")
    parameters = refusals.trainable_and_clear(modules)
    refusals.refuse_several_processes(modules)
    counts, totals = refusals.counts_and_totals([count(micro_batch) for micro_batch in window])
    if len(window) > 1:
        refusals.warn_of_batch_statistics(modules, len(window))
    if len(window) >= refusals.MANY:
        refusals.warn_of_sixteen_bits(modules, parameters, len(window))
    first_window = refusals.is_new(modules)
    losses: dict[Any, list[Tensor]] = {key: [] for key, total in totals.items() if total}
    try:
        for index, micro_batch in enumerate(window):
            loss = loss_sum(micro_batch)
            if (
                None in totals
                and isinstance(loss, Tensor)
                and loss.ndim == 0
                and loss.requires_grad
                and loss.is_floating_point()
            ):
                loss = loss / totals[None]
                losses[None].append(loss.detach())
            else:
                loss = _divided(loss, index, counts[index], totals, losses)
            if loss.requires_grad:  # a micro-batch that counts nothing may have no graph
                loss = loss if scaler is None else scaler.scale(loss)
                if first_window:
                    with refusals.no_gradient_is_taken_away(parameters):
                        loss.backward()  # type: ignore[no-untyped-call]
                    refusals.SEEN.update(modules)
                    first_window = False
                else:
                    loss.backward()  # type: ignore[no-untyped-call]
            del loss  # so that nothing of this graph is alive during the next forward
        if all(parameter.grad is None for parameter in parameters):
            raise ValueError(
                "No parameter of the model got a gradient: give accumulate the modules that loss_sum trains."
            )
        if nonfinite == "raise":
            finite = torch.stack([torch.stack(each).isfinite() for each in losses.values()]).all(dim=0)
            if bad := [index for index, good in enumerate(finite.tolist()) if not good]:
                raise NonFiniteLoss(bad)
        means = {key: _mean(torch.stack(each)) for key, each in losses.items()}
    except BaseException:  # an interrupt too: half a window's gradient must not reach an optimizer
        for module in modules:
            for parameter in module.parameters():
                parameter.grad = None
        raise
    if None in totals:
        return Accumulated(means[None], totals[None])
    return Accumulated(torch.stack(list(means.values())).sum(), totals, means)


def _divided(
    given: Any, index: int, counts: dict[Any, Any], totals: dict[Any, int | float], losses: dict[Any, list[Tensor]]
) -> Tensor:
    """Return a micro-batch's part of a loss of several; each key's part is noted, detached, in `losses`."""
    sums = refusals.sums_of(given, counts, index)
    parts = [sums[key] / totals[key] for key in losses]
    for part, noted in zip(parts, losses.values(), strict=True):
        noted.append(part.detach())
    return torch.stack(parts).sum()


def _mean(losses: Tensor) -> Tensor:
    return losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))

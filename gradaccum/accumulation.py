"""Gradient accumulation: group micro-batches into windows, and sum a window's gradient piece by piece.

One rule normalizes it: count the window's items first, then divide each micro-batch's summed loss by that count.
Everything that belongs to an update (clip, step, schedule, clear) stays in the caller's loop, once per window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from numbers import Integral, Real
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

MicroBatch = TypeVar("MicroBatch")


class Windows(Generic[MicroBatch]):
    """The micro-batches of an iterable in lists, one list per update; made by `windows`."""

    def __init__(self, micro_batches: Iterable[MicroBatch], accumulation_steps: int) -> None:
        self._micro_batches = micro_batches
        self._accumulation_steps = accumulation_steps

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        stream = iter(self._micro_batches)
        while window := list(islice(stream, self._accumulation_steps)):
            yield window

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
    """What `accumulate` returns: the window's mean loss (detached, a scalar tensor) and its number of items."""

    loss: Tensor
    count: int | float  # type: ignore[assignment]  # it hides tuple.count, which has no use here


def accumulate(
    model: nn.Module,
    window: Iterable[MicroBatch],
    loss_sum: Callable[[MicroBatch], Tensor],
    count: Callable[[MicroBatch], int | float | Tensor],
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> Accumulated:
    """Leave in `.grad` the gradient of the mean loss over the window, holding one micro-batch's activations.

    Accumulation gives the large batch's gradient where the loss is a sum over items, each computed from its item
    alone by a forward that remembers nothing, divided by a number known beforehand. There the cut matters by rounding
    only; dividing by the number of micro-batches instead needs equal counts too (huggingface/transformers#34191).
    Elsewhere (BatchNorm in training, negatives or weights taken from the batch) the result is the gradient of the
    window as it was cut. It never steps, clips, schedules or clears, and it is for one process.

    Args:
        model: the module that holds every parameter the loss trains. Each `.grad` must be None.
        window: the micro-batches of one update, whatever `loss_sum` and `count` take.
        loss_sum: gives the **sum** of a micro-batch's losses, a tensor of shape () with a graph.
        count: gives the number of items in that sum (samples, target tokens), an int or a tensor of shape ().
            Tensors are read together: an accelerator is waited for once per window.
        scaler: a GradScaler whose `scale` is applied to each loss. Call `unscale_`, `step` and `update` yourself.

    Returns:
        `Accumulated(loss, count)`: the window's mean loss, detached and unscaled, and N, the items in it.

    Raises:
        ValueError, TypeError: before the first forward, if the window is empty, the model has nothing to train,
            a `.grad` is not None, or a count is not a number, negative, not finite, or zero over the window;
            when it is seen, if a loss is not a scalar tensor with a graph.
        Exception: whatever `loss_sum` raises passes through (running out of memory too).
            After every error each `.grad` is None, so that the same window can be tried in smaller pieces
            (after the `except` block, which holds the failed graph while it runs).

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> window = [torch.tensor([[1.0]]), torch.tensor([[2.0], [6.0]])]
        >>> result = accumulate(model, window, loss_sum=lambda x: model(x).sum(), count=len)
        >>> result.count, model.weight.grad.item()  # 3 items; the mean of 1, 2 and 6
        (3, 3.0)
    """
    window = list(window)
    _refuse_unless_ready(model, window)
    total = _total_count([count(micro_batch) for micro_batch in window])
    losses: list[Tensor] = []
    try:
        for index, micro_batch in enumerate(window):
            loss = loss_sum(micro_batch)
            _refuse_unless_scalar_with_graph(loss, index)
            loss = loss / total
            (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            del loss  # so that nothing of this graph is alive during the next forward
        mean = torch.stack(losses)
        mean = mean.sum(dtype=torch.promote_types(mean.dtype, torch.float32))
    except BaseException:  # an interrupt too: half a window's gradient must not reach an optimizer
        for parameter in model.parameters():
            parameter.grad = None
        raise
    return Accumulated(mean, total)


def _refuse_unless_ready(model: nn.Module, window: Sequence[Any]) -> None:
    if not window:
        raise ValueError("The window is empty: give accumulate at least one micro-batch.")
    trainable = False
    for name, parameter in model.named_parameters():
        trainable = trainable or parameter.requires_grad
        if parameter.grad is not None:
            raise ValueError(f"Parameter {name!r} has a .grad: call optimizer.zero_grad(set_to_none=True) first.")
    if not trainable:
        raise ValueError(f"The model ({type(model).__name__}) has no trainable parameter: set requires_grad on some.")


def _total_count(counts: Sequence[Any]) -> int | float:
    """Add up the counts, reading all the tensors among them in one transfer."""
    if all(type(value) is int and value > 0 for value in counts):  # the usual case, spared the slower checks
        return int(sum(counts))
    for index, value in enumerate(counts):
        if not _is_number(value):
            given = f"{value!r} ({type(value).__name__})"
            if isinstance(value, Tensor):
                given = f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
            raise TypeError(
                "count must return the number of items as an int or a tensor of shape (), "
                f"but for micro-batch {index} it returned {given}."
            )
    tensors = [value for value in counts if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    numbers = [next(read) if isinstance(value, Tensor) else value for value in counts]
    for index, number in enumerate(numbers):
        if not 0 <= number < math.inf:  # a NaN fails this too
            raise ValueError(
                f"count must return a finite number of at least 0, but for micro-batch {index} it returned {number}."
            )
    total = sum(numbers)
    if total == 0:
        raise ValueError(
            f"count returned 0 for all {len(numbers)} micro-batches: skip this window, its mean has no gradient."
        )
    return int(total) if isinstance(total, Integral) else float(total)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype != torch.bool and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def _refuse_unless_scalar_with_graph(loss: Any, index: int) -> None:
    if not isinstance(loss, Tensor):
        given = f"the {type(loss).__name__} {loss!r}"
        raise TypeError(f"loss_sum must return a scalar tensor, but for micro-batch {index} it returned {given}.")
    if loss.ndim != 0:
        raise ValueError(
            f"loss_sum must return the sum of the losses, a tensor of shape (), but for micro-batch {index} "
            f"it returned shape {tuple(loss.shape)}: use reduction='sum' or .sum()."
        )
    if not loss.requires_grad:
        raise ValueError(
            f"loss_sum returned a loss without a graph for micro-batch {index}: compute it from the model's output, "
            "without torch.no_grad(), .detach() or .item()."
        )

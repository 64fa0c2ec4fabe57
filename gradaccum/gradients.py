"""The gradient of a whole batch, computed as one graph, and the relative error between gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Never, TypeVar

import torch
from torch import Tensor

from gradaccum import refusals
from gradaccum.borrowed import borrowed, convert, dense, gradient_of, refuse_to_borrow
from gradaccum.refusals import Model

Batch = TypeVar("Batch")
Gradients = Tensor | None | Iterable[Tensor | None]


def relative_error(actual: Gradients, expected: Gradients) -> float:
    """Return |actual - expected| / |expected|, with one L2 norm over all tensors.

    It is computed in float64 on the CPU. 0 means equal, 1 is the error of a zero gradient; 0/0 is 0 and x/0 is inf.

    Args:
        actual: a tensor, or tensors in some order, such as `[p.grad for p in model.parameters()]`; None counts as 0.
        expected: the same number of tensors, of the same shapes, in the same order.

    Raises:
        ValueError: the numbers of tensors differ, or two shapes; nothing is broadcast.
        TypeError: an element is neither a tensor nor None.

    Example:
        >>> relative_error([torch.tensor([3.0, 8.0]), None], [torch.tensor([3.0, 4.0]), torch.zeros(2)])
        0.8
    """
    ours, theirs = _tensors(actual, "actual"), _tensors(expected, "expected")
    if len(ours) != len(theirs):
        raise ValueError(f"actual has {len(ours)} tensors and expected {len(theirs)}: give both in the same order.")
    differences, norms = [], []
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one is not None and other is not None and one.shape != other.shape:
            raise ValueError(
                f"Tensor {index} has shape {tuple(one.shape)} in actual and {tuple(other.shape)} in expected: "
                "compare tensors of the same shape."
            )
        if one is None and other is None:
            continue
        left = torch.zeros_like(dense(other)) if one is None else dense(one)  # type: ignore[arg-type]
        right = torch.zeros_like(left) if other is None else dense(other)
        differences.append(torch.linalg.vector_norm(left - right).item())
        norms.append(torch.linalg.vector_norm(right).item())
    difference, norm = math.hypot(*differences), math.hypot(*norms)
    if norm == 0:
        return 0.0 if difference == 0 else math.nan if math.isnan(difference) else math.inf
    return difference / norm


def full_batch_gradient(
    model: Model,
    batch: Batch,
    loss: Callable[[Batch], Tensor],
    *removed: Never,
    dtype: torch.dtype | None = None,
    **removed_names: Never,
) -> list[Tensor | None]:
    """Return the gradient of your own loss on one batch, computed as one graph: the reference for accumulation.

    It shares no code with `accumulate`, no sum and no count, so a comparison shows everything that splitting changes.
    Parameters, buffers, modes, `.grad` and the random state are restored afterwards.

    Args:
        model: the module whose parameters the loss trains, or a list or tuple of modules.
        batch: all items at once, in any form that `loss` takes.
        loss: returns your own loss of the whole batch, a tensor of shape ().
        dtype: the dtype to compute in instead of the model's own, such as `torch.float64`. It applies to parameters,
            buffers, floating-point tensors in the batch (also in lists, tuples and dicts) and all other operands.
        *removed: raises TypeError; an early version took a window, its sums and its counts.
        **removed_names: raises TypeError too.

    Returns:
        One tensor per parameter, in the order of `model.parameters()`; None if the loss does not depend on it.

    Raises:
        TypeError, ValueError: the loss is not a scalar tensor with a graph, or depends on no parameter of the model.
        NotImplementedError: the model is wrapped to train on several processes.
        RuntimeError: an optimizer steps in the backward pass.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> full_batch_gradient(model, torch.tensor([[1.0], [2.0], [6.0]]), lambda x: model(x).mean())
        [tensor([[3.]])]
    """
    if removed or removed_names:
        raise TypeError(
            "full_batch_gradient takes one batch and your own loss of it, not a window with its sums and counts: "
            "call full_batch_gradient(model, batch, loss), where loss(batch) returns your own mean loss."
        )
    modules = refusals.modules_of(model)
    refuse_to_borrow(modules, dtype)
    with borrowed(modules, dtype):
        return gradient_of(modules, convert(batch, dtype), loss)


def _tensors(given: Gradients, name: str) -> Sequence[Tensor | None]:
    tensors = [given] if given is None or isinstance(given, Tensor) else list(given)
    for tensor in tensors:
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must contain tensors or None, but {tensor!r} is a {type(tensor).__name__}.")
    return tensors

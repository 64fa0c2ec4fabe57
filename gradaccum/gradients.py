"""What "equal" means: the gradient of a whole window, computed the slow way, and the distance from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

MicroBatch = TypeVar("MicroBatch")
Gradients = Tensor | None | Iterable[Tensor | None]


def relative_error(actual: Gradients, expected: Gradients) -> float:
    """Measure how far `actual` is from `expected`: |actual - expected| / |expected|, one L2 norm over all tensors.

    Computed in float64 on the CPU. 0 is equal, 1 means as far off as no gradient at all; 0/0 is 0 and x/0 is inf.

    Args:
        actual: a tensor, or tensors in some order, such as `[p.grad for p in model.parameters()]`; None counts as 0.
        expected: as many tensors, of the same shapes in the same order.

    Raises:
        ValueError: the numbers of tensors or two shapes differ; nothing is broadcast.
        TypeError: something is neither a tensor nor None.

    Example:
        >>> relative_error([torch.tensor([3.0, 8.0]), None], [torch.tensor([3.0, 4.0]), torch.zeros(2)])
        0.8
    """
    ours, theirs = _tensors(actual, "actual"), _tensors(expected, "expected")
    if len(ours) != len(theirs):
        raise ValueError(f"actual holds {len(ours)} tensors and expected {len(theirs)}: give both in the same order.")
    differences, norms = [], []
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one is not None and other is not None and one.shape != other.shape:
            raise ValueError(
                f"Tensor {index} has shape {tuple(one.shape)} in actual and {tuple(other.shape)} in expected: "
                "compare tensors of the same shape."
            )
        if one is None and other is None:
            continue
        left = torch.zeros_like(_float64(other)) if one is None else _float64(one)  # type: ignore[arg-type]
        right = torch.zeros_like(left) if other is None else _float64(other)
        differences.append(torch.linalg.vector_norm(left - right).item())
        norms.append(torch.linalg.vector_norm(right).item())
    difference, norm = math.hypot(*differences), math.hypot(*norms)
    if norm == 0:
        return 0.0 if difference == 0 else math.nan if math.isnan(difference) else math.inf
    return difference / norm


def full_batch_gradient(
    model: nn.Module,
    window: Iterable[MicroBatch],
    loss_sum: Callable[[MicroBatch], Tensor],
    count: Callable[[MicroBatch], int | float | Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor | None]:
    """Compute the gradient of the mean loss over the whole window as one graph: slow, and as large as the full batch.

    `loss_sum` sees one micro-batch at a time here too: this is the large batch's gradient where `accumulate`'s is, and
    cannot tell whether that is so. Where items see each other (BatchNorm in training), give all of them as one
    micro-batch. The model's parameters, buffers, `.grad` and the random state are afterwards what they were before.

    Args:
        model: the module whose parameters `loss_sum` uses.
        window: the micro-batches, as for `accumulate`.
        loss_sum: gives the sum of a micro-batch's losses, a tensor of shape ().
        count: gives the number of items in that sum.
        dtype: computes in this dtype instead of the model's own, `torch.float64` say: parameters, buffers and the
            window's floating-point tensors (also inside lists, tuples and dicts) are converted for the while.

    Returns:
        One tensor per parameter, in the order of `model.parameters()`; None where the loss does not depend on it.

    Raises:
        ValueError: the window is empty, or its count is zero.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> window = [torch.tensor([[1.0]]), torch.tensor([[2.0], [6.0]])]
        >>> full_batch_gradient(model, window, lambda x: model(x).sum(), len)
        [tensor([[3.]])]
    """
    window = [micro_batch if dtype is None else _convert(micro_batch, dtype) for micro_batch in window]
    total = sum(float(count(micro_batch)) for micro_batch in window)
    if total == 0:
        raise ValueError(
            f"The window of {len(window)} micro-batches counts no items: there is no mean to differentiate."
        )
    with _borrowed(model, dtype), torch.enable_grad():
        mean = torch.stack([loss_sum(micro_batch) for micro_batch in window]).sum() / total
        parameters = list(model.parameters())
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        found = iter(torch.autograd.grad(mean, trainable, allow_unused=True))
        return [next(found) if parameter.requires_grad else None for parameter in parameters]


@contextmanager
def _borrowed(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Let the model run on copies of its tensors, converted to `dtype`, and on a copy of the random state."""
    saved = {tensor: tensor.data for tensor in [*model.parameters(), *model.buffers()]}
    buffers = [
        (module, name, tensor) for module in model.modules() for name, tensor in module.named_buffers(recurse=False)
    ]
    chosen: list[tuple[Tensor, torch.dtype | None]] = []  # what a parameter's own grad_dtype was
    # MPS keeps one random state for all, out of fork_rng's reach.
    accelerators = {tensor.device for tensor in saved if tensor.device.type not in ("cpu", "mps")}
    with torch.random.fork_rng(
        [device.index for device in accelerators], device_type=next((d.type for d in accelerators), "cuda")
    ):
        try:
            for tensor, data in saved.items():
                tensor.data = data.to(dtype, copy=True) if dtype and data.is_floating_point() else data.clone()
                if dtype and tensor.requires_grad and tensor.grad_dtype not in (None, dtype):
                    chosen.append((tensor, tensor.grad_dtype))  # it would round the gradient
                    tensor.grad_dtype = None
            yield
        finally:
            for tensor, data in saved.items():
                tensor.data = data
            for tensor, grad_dtype in chosen:
                tensor.grad_dtype = grad_dtype
            for module, name, tensor in buffers:  # a forward may have put another tensor in a buffer's place
                setattr(module, name, tensor)


def _tensors(given: Gradients, name: str) -> Sequence[Tensor | None]:
    tensors = [given] if given is None or isinstance(given, Tensor) else list(given)
    for tensor in tensors:
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must hold tensors or None, but {tensor!r} is a {type(tensor).__name__}.")
    return tensors


def _float64(tensor: Tensor) -> Tensor:
    dense = tensor.detach().cpu()
    dense = dense.to_dense() if dense.layout != torch.strided else dense
    return dense.to(torch.promote_types(dense.dtype, torch.float64))


def _convert(micro_batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(micro_batch, Tensor):
        return micro_batch.to(dtype) if micro_batch.is_floating_point() else micro_batch
    if isinstance(micro_batch, dict):
        return {key: _convert(value, dtype) for key, value in micro_batch.items()}
    if isinstance(micro_batch, tuple) and hasattr(micro_batch, "_fields"):  # a named tuple
        return type(micro_batch)(*(_convert(value, dtype) for value in micro_batch))
    if isinstance(micro_batch, list | tuple):
        return type(micro_batch)(_convert(value, dtype) for value in micro_batch)
    return micro_batch

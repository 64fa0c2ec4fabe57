"""The memory of libraries on CUDA, and corrections of torch's shapes for tensors without data."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

# Private: as kernels ask for it in C++, channels last where the strides say so.
from torch._prims_common import suggest_memory_format
from torch.autograd.function import once_differentiable

WORKSPACE: Final = 8_519_680  # bytes
LOW: Final = torch.bfloat16, torch.float16
_aten = torch.ops.aten
_MATMULS: Final = {
    getattr(_aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "addbmm", "linear")
}


class Workspaces:
    """The workspaces of cuBLAS on CUDA: a block per thread, from its first matrix product on.

    The size is torch's default for devices before Hopper, (2 x 4,096 + 8 x 16) KiB (`parseChosenWorkspaceSize` in
    aten/src/ATen/cuda/CublasHandlePool.cpp); Hopper's is said to be 32 MiB, which has not been verified here.
    """

    def __init__(self, device: str) -> None:
        self._is_counted = device == "cuda"
        self.held: dict[str, Tensor] = {}

    def made_for(self, func: Any) -> Tensor | None:
        """Return the workspace that torch allocates for an operation, None if it allocates none."""
        if func.overloadpacket not in _MATMULS or not self._is_counted:
            return None
        # Private: there is no public way to know whether a backward is running. On CUDA it has its own thread.
        thread = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
        if thread in self.held:
            return None
        self.held[thread] = torch.empty(WORKSPACE, dtype=torch.uint8)
        return self.held[thread]


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Return an empty result of `aten._grouped_mm`, whose shapes torch computes only for bfloat16.

    Rows begin at multiples of 16 bytes (`create_grouped_gemm_output_tensor` in ATen/native/GroupedMMUtils.h).

    Example:
        >>> grouped_mm(torch.zeros(6, 4), torch.zeros(2, 4, 3), torch.tensor([2, 6])).stride()
        (4, 1)
    """
    groups = [a.shape[0] if offs is None else offs.shape[0]] * (a.dim() == b.dim())
    dtype = out_dtype or a.dtype
    row = -(-b.shape[-1] * dtype.itemsize // 16) * 16 // dtype.itemsize
    return a.new_empty_strided(
        (*groups, a.shape[-2], b.shape[-1]), (a.shape[-2] * row, row, 1)[-2 - len(groups) :], dtype=dtype
    )


def with_statistics(func: Callable[..., Any], *, wide: bool) -> Callable[..., tuple[Any, ...]]:
    """Return a norm whose mean and deviation have the kernels' dtype; torch reports that of the input.

    They are in float32 for 16-bit inputs if `wide` (on CUDA, `toAccumulateType` in layer_norm_kernel.cu and
    Normalization.cu), else if the first parameter is not of the input's dtype (`is_mixed_type` in
    aten/src/ATen/native/cpu/mixed_data_type.h).

    Example:
        >>> norm = with_statistics(torch.ops.aten.native_layer_norm.default, wide=False)
        >>> norm(torch.zeros(2, 3, dtype=torch.bfloat16), [3], torch.ones(3), None, 1e-5)[1].dtype
        torch.float32
    """

    def norm(x: Tensor, *rest: Any) -> tuple[Any, ...]:
        out, *kept = func(x, *rest)
        first = next((each.dtype for each in rest if isinstance(each, Tensor)), x.dtype)
        dtype = torch.float32 if x.dtype in LOW and (wide or first != x.dtype) else x.dtype
        return out, *(each if each.dtype == dtype else each.new_empty(each.shape, dtype=dtype) for each in kept)

    return norm


def rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Allocate what `rms_norm` allocates on CUDA: one fused kernel, where a CPU runs single operations.

    Of parameters of another dtype, CUDA runs the single operations too (aten/src/ATen/native/layer_norm.cpp).

    Example:
        >>> rms_norm(torch.zeros(2, 3), [3]).shape
        torch.Size([2, 3])
    """
    if weight is not None and weight.dtype != x.dtype:
        return torch.rms_norm(x, normalized_shape, weight, eps)
    return _RMSNorm.apply(x, weight, len(normalized_shape))  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """`_fused_rms_norm` of layer_norm_kernel.cu: keeps its input and a deviation per row, in float32 for 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dims: int) -> Tensor:
        """Allocate the output and the deviations."""
        rows = x.contiguous()  # for the kernel alone; the input itself is kept
        out = torch.empty_like(rows)
        deviation = x.new_empty(x.shape[:-dims], dtype=torch.float32 if x.dtype in LOW else x.dtype)
        ctx.save_for_backward(x, weight, deviation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Allocate the gradients."""
        x, weight, _ = ctx.saved_tensors
        held = grad.contiguous(), x.contiguous()
        of_weight = torch.empty_like(weight) if weight is not None and ctx.needs_input_grad[1] else None
        return torch.empty_like(held[1]) if ctx.needs_input_grad[0] else None, of_weight, None


def _laid_out(func: Callable[..., Any], layout: Callable[[Tensor], Any] = lambda _: torch.contiguous_format) -> Any:
    """Return an operation whose results lie as kernels lay them; torch says that they lie as the inputs do."""

    def lay(made: Any) -> Any:
        if isinstance(made, tuple):
            return tuple(map(lay, made))
        return made if made is None else made.contiguous(memory_format=layout(made))

    return lambda *args, **kwargs: lay(func(*args, **kwargs))


def _batch_norm_backward(*args: Any) -> tuple[Any, ...]:
    made = _aten.native_batch_norm_backward.default(*args)
    return tuple(each if asked else None for each, asked in zip(made, args[-1], strict=True))  # as kernels do


_CONTIGUOUS = _aten.native_layer_norm_backward, _aten._log_softmax_backward_data, _aten._softmax_backward_data


def corrected(device: str) -> dict[Any, Callable[..., Any]]:
    """Return, for operations whose results torch describes wrongly, those that describe what kernels make.

    Example:
        >>> torch.ops.aten._grouped_mm.default in corrected("cpu")
        True
    """
    wide = device == "cuda"
    batch_norm = with_statistics(_aten.native_batch_norm.default, wide=wide)
    return {
        _aten._grouped_mm.default: grouped_mm,
        _aten.native_batch_norm.default: _laid_out(batch_norm, suggest_memory_format),
        _aten.native_batch_norm_backward.default: _laid_out(_batch_norm_backward, suggest_memory_format),
        _aten.native_layer_norm.default: with_statistics(_aten.native_layer_norm.default, wide=wide),
        _aten.native_group_norm.default: with_statistics(_aten.native_group_norm.default, wide=False),
        **{each.default: _laid_out(each.default) for each in _CONTIGUOUS},
    }


def held_within(func: Any, args: Any) -> list[int]:
    """Return the sizes of what a kernel holds on CUDA until it returns, in bytes: group norm's backward alone.

    By torch's source, aten/src/ATen/native/cuda/group_norm_kernel.cu (GroupNormBackwardKernelImplInternal).

    Example:
        >>> held_within(torch.ops.aten.mm.default, (torch.zeros(2, 2), torch.zeros(2, 2)))
        []
    """
    if func is not _aten.native_group_norm_backward.default:
        return []
    _, x, _, _, weight, rows, channels, area, groups, (of_input, *_) = args
    wide, whole = max(x.itemsize, 4), (2 + (of_input and weight is not None)) * (area > 1)
    return [rows * channels * wide] * whole + [rows * groups * wide] * (2 * of_input)


def refuse_quantized(optimizer: torch.optim.Optimizer) -> None:
    """Raise NotImplementedError for an optimizer, by name, with a 4-bit or 8-bit state from its own kernels.

    Example:
        >>> refuse_quantized(torch.optim.AdamW([torch.zeros(2)]))
    """
    name = type(optimizer).__name__
    if re.search("(4|8)bit|fp8", name, re.IGNORECASE):
        given = f"{name} cannot be predicted, since its own kernels allocate its state"
        raise NotImplementedError(f"{given}: predict torch's AdamW or SGD instead, which use more memory.")

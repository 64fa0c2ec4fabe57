"""The memory of libraries on CUDA, and corrections of torch's shapes for tensors without data."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

# Private: as kernels ask for it in C++, channels last where the strides say so.
from torch._prims_common import suggest_memory_format

WORKSPACE: Final = 8_519_680  # bytes
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


def batch_norm(x: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """Run batch norm, with mean and deviation of 16-bit inputs in float32 as in the kernels; torch reports 16 bits.

    Example:
        >>> x, weight, mean = torch.zeros(2, 3, dtype=torch.bfloat16), torch.ones(3), torch.zeros(3)
        >>> batch_norm(x, weight, weight, mean, mean, True, 0.1, 1e-5)[1].dtype
        torch.float32
    """
    out, *kept = _aten.native_batch_norm.default(x, weight, *rest)
    given = next((each.dtype for each in (weight, rest[1]) if each is not None), x.dtype)
    return out, *(each if each.dtype == given else each.new_empty(each.shape, dtype=given) for each in kept)


def _laid_out(func: Callable[..., Any], layout: Callable[[Tensor], Any] = lambda _: torch.contiguous_format) -> Any:
    """Return an operation whose results lie as kernels lay them; torch says that they lie as the inputs do."""

    def lay(made: Any) -> Any:
        if isinstance(made, tuple):
            return tuple(map(lay, made))
        return made if made is None else made.contiguous(memory_format=layout(made))

    return lambda *args, **kwargs: lay(func(*args, **kwargs))


_CONTIGUOUS = _aten.native_layer_norm_backward, _aten._log_softmax_backward_data, _aten._softmax_backward_data
CORRECTED: Final[dict[Any, Callable[..., Any]]] = {
    _aten._grouped_mm.default: grouped_mm,
    _aten.native_batch_norm.default: _laid_out(batch_norm, suggest_memory_format),
    _aten.native_batch_norm_backward.default: _laid_out(_aten.native_batch_norm_backward, suggest_memory_format),
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

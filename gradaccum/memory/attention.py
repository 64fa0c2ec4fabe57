"""The memory of scaled dot-product attention on CUDA, whose kernels differ from those on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from gradaccum.memory.libraries import LOW


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Allocate what `scaled_dot_product_attention` allocates on CUDA, on tensors without data, with the same shapes.

    The kernel is chosen as in torch (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp): FlashAttention for 16 bits
    without a mask, the memory-efficient kernel for other cases, plain operations if neither is possible. The first two
    keep their inputs, the output and a float32 logsumexp, never the scores, with or without dropout.

    Example:
        >>> query = torch.empty(2, 4, 64, 16, device="meta")
        >>> attention(query, query, query, dropout_p=0.1).shape
        torch.Size([2, 4, 64, 16])
    """
    if torch.is_autocast_enabled("cpu"):  # which a prediction uses for CUDA's
        low = torch.get_autocast_dtype("cpu")
        query, key, value = (each.to(low) if each.dtype == torch.float32 else each for each in (query, key, value))
        if attn_mask is not None and attn_mask.dtype == torch.float32:
            attn_mask = attn_mask.to(low)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        inverted = attn_mask.logical_not()
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(inverted, -math.inf)
        del inverted
    kernel = _kernel(query, key, value, attn_mask)
    if kernel == "plain":
        return _plain(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if kernel == "efficient" and attn_mask is not None:
        if attn_mask.shape[-1] % 8:  # its rows must be aligned
            whole = functional.pad(attn_mask, (0, -attn_mask.shape[-1] % 8))
            attn_mask = whole[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    width = value.shape[-1]
    if kernel == "flash" and query.shape[-1] % 8:
        query, key, value = (functional.pad(each, (0, -each.shape[-1] % 8)) for each in (query, key, value))
    out: Tensor = _Fused.apply(query, key, value, attn_mask, kernel == "flash")  # type: ignore[no-untyped-call]
    return out if out.shape[-1] == width else out[..., :width]


def _kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str:
    cuda: Any = torch.backends.cuda
    width = query.shape[-1]
    is_16_bits = query.dtype in LOW
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or not query.dtype == key.dtype == value.dtype:
        return "plain"
    if cuda.flash_sdp_enabled() and is_16_bits and mask is None and width == value.shape[-1] <= 256:
        return "flash"
    aligned = not any(each.shape[-1] % (8 if is_16_bits else 4) for each in (query, value))
    same_heads = query.shape[1] == key.shape[1] == value.shape[1]
    if cuda.mem_efficient_sdp_enabled() and (is_16_bits or query.dtype == torch.float32) and aligned and same_heads:
        return "efficient"
    return "plain"


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, gqa: bool
) -> Tensor:
    """Allocate what torch's plain formula allocates: the scores, in float32 for 16 bits."""
    dtype = query.dtype
    cuda: Any = torch.backends.cuda
    if dtype in LOW and not cuda.fp16_bf16_reduction_math_sdp_allowed():
        query, key, value = query.float(), key.float(), value.float()
    if gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(seen.logical_not(), -math.inf)
        del seen
    root = query.shape[-1] ** -0.25
    scores = (query * root) @ (key * root).transpose(-2, -1)
    if mask is not None:
        scores.add_(mask)
    weights = scores.softmax(-1)
    del scores
    if 0 < dropout_p < 1:
        weights = torch.native_dropout(weights, dropout_p, True)[0]
    found: Tensor = (weights @ value).to(dtype)
    return found


class _Fused(torch.autograd.Function):
    """The allocations of the two fused kernels, with torch's names (aten/.../cuda/attention{,_backward}.cu)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, flash: bool) -> Tensor:
        """Allocate the output, in the kernel's layout, and the logsumexp."""
        batch, heads, rows, _ = query.shape
        is_trained = any(ctx.needs_input_grad)
        if flash:  # has the query's layout
            out = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
            logsumexp = query.new_empty((batch, heads, rows), dtype=torch.float32)
        else:  # contiguous as (batch, rows, heads, width), whatever the query's layout
            out = query.new_empty((batch, rows, heads, value.shape[-1])).transpose(1, 2)
            logsumexp = query.new_empty((batch, heads, -(-rows // 32) * 32 * is_trained), dtype=torch.float32)
        ctx.flash = flash
        ctx.save_for_backward(query, key, value, mask, out, logsumexp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Allocate the gradients and the kernels' accumulators."""
        query, key, value, mask, out, _ = ctx.saved_tensors
        batch, heads, rows, width = query.shape
        copies = [each.transpose(1, 2).contiguous() for each in (grad, out)] if ctx.flash else [grad]
        if copies[0].stride(-1) != 1:
            copies[0] = grad.contiguous()
        gradients: list[Tensor | None] = [torch.empty_like(each.transpose(1, 2)) for each in (query, key, value)]
        held = [query.new_empty((batch, heads, -(-rows // 128) * 128), dtype=torch.float32)]
        if ctx.flash:
            wide = -(-width // 32) * 32
            held.append(query.new_empty((batch, -(-rows // 128) * 128, heads, wide), dtype=torch.float32))
            if key.shape[1] != heads:  # first a gradient per query head, then their sums
                shape = batch, key.shape[2], heads, width
                held += [key.new_empty(shape), value.new_empty(shape)]
        of_mask = None
        if mask is not None and ctx.needs_input_grad[3]:
            of_mask = mask.new_empty(mask.shape)
        return (*(each.transpose(1, 2) for each in gradients if each is not None), of_mask, None)

"""silu(gate) * up, one kernel each way. packed [rows, 2 F] holds gate in its first half, up in its second; the result is [rows, F]."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program: 16 a thread of four warps.
_ELEMENTS = 2048


@triton.jit
def _forward(packed_ptr, h_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    gate = tl.load(packed_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(packed_ptr + row * 2 * width + width + column, mask=inside, other=0.0)
    # silu is rounded first, as the two operations one after the other round it.
    silu = (gate * tl.sigmoid(gate)).to(packed_ptr.dtype.element_ty)
    tl.store(h_ptr + row * width + column, (silu.to(tl.float32) * up.to(tl.float32)).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dh_ptr, packed_ptr, dpacked_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    dh = tl.load(dh_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(packed_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(packed_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate = dh * up * share * (1.0 + gate * (1.0 - share))
    tl.store(dpacked_ptr + row * 2 * width + column, dgate.to(dpacked_ptr.dtype.element_ty), mask=inside)
    tl.store(dpacked_ptr + row * 2 * width + width + column, (dh * gate * share).to(dpacked_ptr.dtype.element_ty), mask=inside)


def _tile(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the shape of a tile: the widest power of two that divides the width, so that no lane is idle."""
    block = min(max(width & -width, 128), _ELEMENTS)
    tall = _ELEMENTS // block
    return (triton.cdiv(rows, tall), triton.cdiv(width, block)), {"ROWS": tall, "BLOCK": block}


@torch.library.custom_op("holdfast::swiglu", mutates_args=())
def swiglu_forward(packed: Tensor) -> Tensor:
    packed = packed.contiguous()
    width = packed.shape[-1] // 2
    rows = packed.numel() // packed.shape[-1]
    h = packed.new_empty(*packed.shape[:-1], width)
    grid, tile = _tile(rows, width)
    _forward[grid](packed, h, rows, width, num_warps=4, **tile)
    return h


@swiglu_forward.register_fake
def _(packed: Tensor) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


@torch.library.custom_op("holdfast::swiglu_backward", mutates_args=())
def swiglu_backward(dh: Tensor, packed: Tensor) -> Tensor:
    dh, packed = dh.contiguous(), packed.contiguous()
    rows, width = dh.numel() // dh.shape[-1], dh.shape[-1]
    dpacked = torch.empty_like(packed)
    grid, tile = _tile(rows, width)
    _backward[grid](dh, packed, dpacked, rows, width, num_warps=4, **tile)
    return dpacked


@swiglu_backward.register_fake
def _(dh: Tensor, packed: Tensor) -> Tensor:
    return packed.new_empty(packed.shape)


class SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        return swiglu_forward(packed)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        return swiglu_backward(dh, packed)

"""Rotary positions on packed queries, keys and values, one kernel each way.

packed [B, T, H + 2 K, C] holds the H query heads, then K key heads, then K value heads of a token. Forward turns queries and keys
into a tensor of their own [B, T, H + K, C]; backward turns their gradients back and puts those of the values beside them, so that
the gradient of the packed projection is written once. cos, sin: fp32 [T, C / 2]."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(packed_ptr, cos_ptr, sin_ptr, out_ptr, length, HEADS: tl.constexpr, TURNED: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + (token % length) * HALF + pair)
    sin = tl.load(sin_ptr + (token % length) * HALF + pair)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    inside = (head < TURNED) & (pair < HALF)
    at = (token * HEADS + head) * 2 * HALF + pair
    first = tl.load(packed_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(packed_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = (token * TURNED + head) * 2 * HALF + pair
    tl.store(out_ptr + to, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + to + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, dpacked_ptr, length,
              dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head,
              Q: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // length, row % length
    pair = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + token * HALF + pair)
    sin = tl.load(sin_ptr + token * HALF + pair)
    base = row * (Q + 2 * K) * 2 * HALF

    head = tl.arange(0, TILE_Q)[:, None]
    inside = (head < Q) & (pair < HALF)
    at = batch * dq_batch + token * dq_token + head * dq_head + pair
    first = tl.load(dq_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(dq_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = base + head * 2 * HALF + pair
    tl.store(dpacked_ptr + to, (first * cos + second * sin).to(dpacked_ptr.dtype.element_ty), mask=inside)
    tl.store(dpacked_ptr + to + HALF, (second * cos - first * sin).to(dpacked_ptr.dtype.element_ty), mask=inside)

    head = tl.arange(0, TILE_K)[:, None]
    inside = (head < K) & (pair < HALF)
    at = batch * dk_batch + token * dk_token + head * dk_head + pair
    first = tl.load(dk_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(dk_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = base + (Q + head) * 2 * HALF + pair
    tl.store(dpacked_ptr + to, (first * cos + second * sin).to(dpacked_ptr.dtype.element_ty), mask=inside)
    tl.store(dpacked_ptr + to + HALF, (second * cos - first * sin).to(dpacked_ptr.dtype.element_ty), mask=inside)

    at = batch * dv_batch + token * dv_token + head * dv_head + pair
    to = base + (Q + K + head) * 2 * HALF + pair
    tl.store(dpacked_ptr + to, tl.load(dv_ptr + at, mask=inside, other=0.0), mask=inside)
    tl.store(dpacked_ptr + to + HALF, tl.load(dv_ptr + at + HALF, mask=inside, other=0.0), mask=inside)


@torch.library.custom_op("holdfast::rotary", mutates_args=())
def rotary_forward(packed: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """The first `turned` heads of packed [B, T, heads, C], turned: [B, T, turned, C]."""
    packed = packed.contiguous()
    B, T, heads, C = packed.shape
    out = packed.new_empty(B, T, turned, C)
    tile = triton.next_power_of_2(turned)
    _forward[(B * T, 1)](packed, cos, sin, out, T, HEADS=heads, TURNED=turned, HALF=C // 2, TILE=tile, num_warps=min(max(tile * C // 1024, 1), 8))
    return out


@rotary_forward.register_fake
def _(packed: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    B, T, _, C = packed.shape
    return packed.new_empty(B, T, turned, C)


@torch.library.custom_op("holdfast::rotary_backward", mutates_args=())
def rotary_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients of turned queries [B, T, H, C] and keys, and of values [B, T, K, C], in any layout whose last dimension is dense:
    the gradient of the packed tensor."""
    dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk, dv))
    B, T, Q, C = dq.shape
    K = dk.shape[2]
    dpacked = dq.new_empty(B, T, Q + 2 * K, C)
    tile_q, tile_k = triton.next_power_of_2(Q), triton.next_power_of_2(K)
    _backward[(B * T,)](
        dq, dk, dv, cos, sin, dpacked, T, *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        Q=Q, K=K, HALF=C // 2, TILE_Q=tile_q, TILE_K=tile_k, num_warps=min(max(tile_q * C // 512, 1), 8),
    )  # fmt: skip
    return dpacked


@rotary_backward.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, T, Q, C = dq.shape
    return dq.new_empty(B, T, Q + 2 * dk.shape[2], C)


class Rotary(torch.autograd.Function):
    """packed -> (q, k, v) as [B, T, heads, C], queries and keys turned."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        turned = rotary_forward(packed, cos, sin, heads + kv_heads)
        ctx.save_for_backward(cos, sin)
        return turned[:, :, :heads], turned[:, :, heads:], packed[:, :, heads + kv_heads :]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return rotary_backward(dq, dk, dv, cos, sin), None, None, None, None

"""What the built-in model does between its matrix products, in plain torch or by the kernels of train/kernels.

Both compute in fp32 and round at the same places. Shapes as in gpt.py; `dtype` is that of the products that read a norm."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Ops:
    """embed(tokens [...], weight [V, D]) -> rows of weight
    add_norm(x, delta, weight, eps, dtype) -> x + delta, norm(x + delta)
    swiglu(packed [..., 2 F]) -> silu(first half) * second half
    rotary(packed [B, T, H + 2 K, C], cos, sin, H, K) -> q, k, v [B, T, heads, C], the first two turned"""

    embed: Callable[[Tensor, Tensor], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor, float, torch.dtype], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]]


def norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight, computed in fp32 and returned in `dtype` (Zhang and Sennrich 2019)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight).to(dtype)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = x + delta
    return x, norm(x, weight, eps, dtype)


def swiglu(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + C/2) of x [B, T, heads, C] by their position's angle; cos, sin [T, C/2].

    Halves, not neighbours, form pairs: the layout of Llama checkpoints in transformers, so weights can be exchanged."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary(packed: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = packed.split((heads, kv_heads, kv_heads), dim=2)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


PLAIN = Ops(F.embedding, add_norm, swiglu, rotary)


def fused(channels: int) -> Ops:
    """By Triton kernels; `channels` of a head decide whether rotary positions can be. Only where train.kernels.usable says so."""
    from train.kernels.embedding import Embedding
    from train.kernels.norm import AddNorm
    from train.kernels.rotary import Rotary
    from train.kernels.swiglu import SwiGLUFunction

    # A tile of the kernel is a power of two wide.
    whole = channels & (channels - 1) == 0
    return Ops(Embedding.apply, AddNorm.apply, SwiGLUFunction.apply, Rotary.apply if whole else rotary)

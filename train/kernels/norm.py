"""RMSNorm with the residual stream, one kernel each way: what is added, normed, and the sum of both gradients never meet memory twice.

Shapes: x, delta, y [rows, D]; weight fp32 [D]; rstd fp32 [rows], 1 / rms of a row. Bandwidth-bound: forward reads x and delta and
writes their sum and y; backward reads the sum and two gradients and writes one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs per multiprocessor in the backward pass: each keeps a share of the gradient by the weight in registers, so there are few.
_PROGRAMS_PER_SM = 4
# Rows that a program of the backward pass has in flight at once: on an H200, 32,768 rows of 2,048 took 148 us with 1, 151 with 2.
_TALL = 1


@triton.jit
def _forward(x_ptr, delta_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr, width, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # Rounded to the type of the stream before it is normed: the same numbers as x + delta, then norm.
    total = (x + tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + at, total, mask=inside)
    wide = total.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (wide * rstd * weight).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward(dy_ptr, dsum_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr, rows, width,
              HAS_DSUM: tl.constexpr, ROUNDS: tl.constexpr, TALL: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([TALL, BLOCK], dtype=tl.float32)
    for one in range(ROUNDS):
        row = (program + one * programs) * TALL + tl.arange(0, TALL)
        at = row[:, None].to(tl.int64) * width + columns[None, :]
        there = (row < rows)[:, None] & inside[None, :]
        x = tl.load(x_ptr + at, mask=there, other=0.0)
        dy = tl.load(dy_ptr + at, mask=there, other=0.0)
        if HAS_DSUM:
            dsum = tl.load(dsum_ptr + at, mask=there, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = x.to(tl.float32) * rstd
        wide = dy.to(tl.float32)
        dweight += wide * normed
        dnormed = wide * weight
        dx = (dnormed - normed * (tl.sum(dnormed * normed, axis=1)[:, None] / width)) * rstd
        if HAS_DSUM:
            dx += dsum.to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=there)
    tl.store(dweight_ptr + program.to(tl.int64) * width + columns, tl.sum(dweight, axis=0), mask=inside)


def _warps(block: int) -> int:
    """16 elements a thread: two or four loads of 16 bytes in flight."""
    return min(max(block // 512, 1), 16)


@torch.library.custom_op("holdfast::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta in the dtype of x, RMSNorm of it in `dtype`, and 1 / rms of each row."""
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    x, delta = x.contiguous(), delta.contiguous()
    total, y, rstd = torch.empty_like(x), torch.empty_like(x, dtype=dtype), torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _forward[(rows,)](x, delta, weight, total, y, rstd, width, eps, BLOCK=block, num_warps=_warps(block))
    return total, y, rstd


@add_rms_norm.register_fake
def _(x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("holdfast::add_rms_norm_backward", mutates_args=())
def add_rms_norm_backward(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by x (and by delta, which is the same), and by the weight [D] in fp32."""
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    dy, dsum = dy.contiguous(), None if dsum is None else dsum.contiguous()
    dx = torch.empty_like(x)
    programs = triton.cdiv(rows, _TALL)
    if x.is_cuda:
        programs = min(programs, _PROGRAMS_PER_SM * torch.cuda.get_device_properties(x.device).multi_processor_count)
    parts = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _backward[(programs,)](
        dy, dy if dsum is None else dsum, x, weight, rstd, dx, parts, rows, width, HAS_DSUM=dsum is not None, ROUNDS=triton.cdiv(rows, programs * _TALL), TALL=_TALL, BLOCK=block, num_warps=min(2 * _warps(block * _TALL), 16),
    )  # fmt: skip
    return dx, parts.sum(0)


@add_rms_norm_backward.register_fake
def _(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=torch.float32)


class AddNorm(torch.autograd.Function):
    """(x + delta, norm(x + delta))"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # the last norm of a model has no stream behind it
        total, y, rstd = add_rms_norm(x, delta, weight, eps, dtype)
        ctx.delta_dtype = delta.dtype
        ctx.save_for_backward(total, weight, rstd)
        return total, y

    @staticmethod
    def backward(ctx: Any, dsum: Tensor | None, dy: Tensor) -> Any:
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = add_rms_norm_backward(dy, dsum, total, weight, rstd)
        return dx, dx.to(ctx.delta_dtype), dweight.to(weight.dtype), None, None

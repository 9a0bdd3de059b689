"""One AdamW update of a weight in a single pass: the gradient is scaled (clipping, loss normalisation) on the way, and the 16-bit
working copy of an fp32 master is written beside it. Loshchilov and Hutter 2019; bit for bit no other implementation's, to rounding all's."""

import math

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _update(weight_ptr, grad_ptr, mean_ptr, square_ptr, low_ptr, step_ptr, factor_ptr, bad_ptr, count,
            lr, decay, beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps, HAS_LOW: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # A gradient that is not finite changes nothing: known on the device only, and nothing waits for it.
    inside = at < tl.where(tl.load(bad_ptr) == 0.0, count, 0)
    step = tl.load(step_ptr)
    # 1 - beta ** step is a small difference of near numbers at the start: fp64.
    correction1 = (1.0 - tl.exp((step * log_beta1).to(tl.float64))).to(tl.float32)
    correction2 = tl.sqrt((1.0 - tl.exp((step * log_beta2).to(tl.float64))).to(tl.float32))
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * tl.load(factor_ptr)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0) * beta1 + grad * rest1
    square = tl.load(square_ptr + at, mask=inside, other=0.0) * beta2 + grad * grad * rest2
    weight = weight * (1.0 - lr * decay) - (lr / correction1) * mean / (tl.sqrt(square) / correction2 + eps)
    tl.store(weight_ptr + at, weight, mask=inside)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    if HAS_LOW:
        tl.store(low_ptr + at, weight.to(low_ptr.dtype.element_ty), mask=inside)


def update(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, low: Tensor | None, step: Tensor, factor: Tensor, bad: Tensor,
    *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """In place, all of one shape and dense in the same order: weight, mean, square fp32; grad fp32 or 16-bit; low 16-bit or None.

    step, factor, bad: fp32 scalars on the device: the number of this step from 1, what the gradient is multiplied by, and 1
    where nothing shall change."""
    beta1, beta2 = betas
    count = weight.numel()
    _update[(triton.cdiv(count, _BLOCK),)](
        weight, grad, mean, square, weight if low is None else low, step, factor, bad, count,
        lr, weight_decay, beta1, beta2, 1.0 - beta1, 1.0 - beta2, math.log(beta1) if beta1 else -math.inf, math.log(beta2) if beta2 else -math.inf, eps,
        HAS_LOW=low is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip

"""The gradient of an embedding table, without waiting for the GPU.

torch's own backward asks the device how many different tokens there were: the host then stands still until the backward pass is
through, has no lead when the next step begins, and a step of many small kernels runs dry (27 of 379 ms with Transformer Engine).
Here a program of the kernel owns some columns of one row of the table and adds up the tokens that read it, in their order: the result is the
same every time."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# Tokens that a program has in flight: text has tokens that come thousands of times, and each would cost the latency of memory.
_TILE = 16
_COLUMNS = 256


@triton.jit
def _add_up(grad_ptr, order_ptr, end_ptr, out_ptr, width, TILE: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    at = tl.load(end_ptr + row - 1, mask=row > 0, other=0)
    end = tl.load(end_ptr + row)
    total = tl.zeros([TILE, COLUMNS], dtype=tl.float32)
    while at < end:
        one = at + tl.arange(0, TILE)
        token = tl.load(order_ptr + one, mask=one < end, other=0)
        total += tl.load(grad_ptr + token[:, None] * width + column[None, :], mask=(one < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        at += TILE
    tl.store(out_ptr + row * width + column, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("holdfast::embedding_backward", mutates_args=())
def embedding_backward(grad: Tensor, tokens: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, D] in `dtype`: for each token number the sum of grad [..., D] where it was looked up; tokens int64 [...]."""
    grad, width = grad.contiguous(), grad.shape[-1]
    ordered, order = torch.sort(tokens.reshape(-1), stable=True)
    end = torch.searchsorted(ordered, torch.arange(rows, device=tokens.device), right=True)
    out = torch.empty(rows, width, dtype=dtype, device=grad.device)
    _add_up[(rows, triton.cdiv(width, _COLUMNS))](grad, order, end, out, width, TILE=_TILE, COLUMNS=_COLUMNS, num_warps=4)
    return out


@embedding_backward.register_fake
def _(grad: Tensor, tokens: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(rows, grad.shape[-1], dtype=dtype)


class Embedding(torch.autograd.Function):
    """Rows of weight [V, D] for tokens int64 [...]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (tokens,) = ctx.saved_tensors
        return None, embedding_backward(grad, tokens, ctx.rows, ctx.dtype)

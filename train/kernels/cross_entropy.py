"""Cross entropy and its gradient by the logits, in their place.

torch.compile writes the gradient in fp32 to put the targets in, and reads it again: 14.7 GB for 32,768 tokens of a vocabulary of
32,000. Here a row comes from memory once and goes back once, 4.2 GB; its second reading, when the sum is known, is served by the cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _in_place(logits_ptr, target_ptr, scale_ptr, loss_ptr, vocab, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    target = tl.load(target_ptr + row)
    scale = tl.load(scale_ptr + row)
    picked = tl.load(logits_ptr + target).to(tl.float32)
    # A maximum and a sum for each lane: lanes meet once a row, not once a block.
    most = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for one in range(ROUNDS):
        column = one * BLOCK + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, logit)
        # A lane that has seen nothing but -inf has nothing to add up: -inf minus itself would be NaN.
        floor = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(most - floor) + tl.exp(logit - floor)
        most = higher
    highest = tl.max(most, axis=0)
    # The sum is at least 1, where no logit is infinite. One that is makes NaN, as in plain torch.
    log_norm = highest + tl.log(tl.sum(total * tl.exp(most - highest), axis=0))
    tl.store(loss_ptr + row, (log_norm - picked) * scale)
    for one in range(ROUNDS):
        column = one * BLOCK + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
        grad = tl.exp(logit - log_norm) - tl.where(column == target, 1.0, 0.0)
        tl.store(logits_ptr + column, (grad * scale).to(logits_ptr.dtype.element_ty), mask=column < vocab)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Cross entropy of each row times `scale`, in nats, fp32 [c]; `logits` [c, V], of any float type, becomes the gradient of their sum.

    targets int64 [c], 0 .. V - 1; scale fp32 [c]. Softmax and sums are fp32."""
    rows, vocab = logits.shape
    assert logits.is_contiguous() and targets.is_contiguous() and scale.is_contiguous()
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    _in_place[(rows,)](logits, targets, scale, loss, vocab, ROUNDS=triton.cdiv(vocab, block), BLOCK=block, num_warps=_WARPS)
    return loss


def terms(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """As train.models.loss.chunk_terms."""
    logits = hidden @ weight.t()
    loss = cross_entropy_(logits, targets, scale).sum()
    return loss, logits

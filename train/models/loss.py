"""Head and cross entropy in one, over chunks of tokens: the [tokens, vocab] logits are never held whole.

For 32,768 tokens and a vocabulary of 32,000 the logits are 2.1 GB in bf16 and 4.2 GB in fp32, more than anything else
in the model. The gradient of the loss by the logits needs nothing that the forward pass does not have, so each chunk
makes it at once and turns it into gradients of its input and of the head's weight. The backward pass only scales these:
the head's matrix product is done once, where recomputing the logits would do it twice. The price is that the gradient
of the head's weight exists, in fp32, from the forward pass on.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jobs.specs.model_presets import LOSS_CHUNK_TOKENS
from train.models.contract import IGNORE

Terms = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def chunk_terms(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Loss sum (fp32 scalar) of one chunk, and its gradient by the logits [c, V] in the dtype of `hidden`.

    hidden [c, d] and weight [V, d] share a dtype; targets int64 [c], 0 .. V - 1; scale fp32 [c], 0 where none counts.
    Softmax and sums are fp32 whatever the dtype."""
    logits = (hidden @ weight.t()).float()
    log_norm = torch.logsumexp(logits, dim=-1, keepdim=True)
    picked = logits.gather(1, targets.unsqueeze(1))
    loss = ((log_norm - picked).squeeze(1) * scale).sum()
    grad = torch.exp(logits - log_norm)
    grad.scatter_add_(1, targets.unsqueeze(1), torch.full_like(picked, -1.0))
    return loss, (grad * scale.unsqueeze(1)).to(hidden.dtype)


def chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """The loss sum alone, where no gradient is wanted (evaluation)."""
    logits = (hidden @ weight.t()).float()
    picked = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    return ((torch.logsumexp(logits, dim=-1) - picked) * scale).sum()


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        size: int,
        terms: Terms,
    ) -> Tensor:
        low = weight.to(dtype)
        # fp32 sum over chunks: in bf16 a token's share would be rounded away against what is already there.
        grad_weight: Tensor | None = None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads = []
        for h, t, s in zip(*(x.split(size) for x in (hidden, targets, scale)), strict=True):  # type: ignore[no-untyped-call]
            h = h.to(dtype)
            loss, grad_logits = terms(h, low, t, s)
            total = total + loss
            grads.append((grad_logits @ low).to(hidden.dtype))
            if ctx.needs_input_grad[1]:
                share = grad_logits.t() @ h
                grad_weight = share.float() if grad_weight is None else grad_weight.add_(share)
        ctx.save_for_backward(torch.cat(grads) if len(grads) > 1 else grads[0], grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        by_weight = None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype)
        return (grad_hidden * grad).to(grad_hidden.dtype), by_weight, None, None, None, None, None


def chunked_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_mask: Tensor | None = None,
    *,
    chunk_tokens: int = LOSS_CHUNK_TOKENS,
    terms: Terms = chunk_terms,
) -> Tensor:
    """Sum of token cross entropies of `hidden @ weight.T`, an fp32 scalar in nats.

    hidden [..., d]; weight [V, d]; targets int64 [...], -100 where there is none; loss_mask [...] multiplies each
    token's loss. The product runs in autocast's dtype where autocast is on. `terms` may be a compiled `chunk_terms`."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    flat = hidden.reshape(-1, hidden.shape[-1])
    targets = targets.reshape(-1)
    counted = targets != IGNORE
    scale = counted.float()
    if loss_mask is not None:
        scale = scale * loss_mask.reshape(-1).float()
    targets = torch.where(counted, targets, torch.zeros_like(targets))
    # Equal chunks, at most one of them shorter: a compiled chunk sees one shape, or two.
    chunks = max(1, -(-flat.shape[0] // chunk_tokens))
    size = max(1, -(-flat.shape[0] // chunks))
    # Dtypes are explicit below; autocast's cache of cast weights would only keep a second copy alive.
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return _ChunkedLoss.apply(flat, weight, targets, scale, dtype, size, terms)  # type: ignore
        low = weight.to(dtype)
        parts = zip(*(x.split(size) for x in (flat, targets, scale)), strict=True)  # type: ignore[no-untyped-call]
        return torch.stack([chunk_loss(h.to(dtype), low, t, s) for h, t, s in parts]).sum()

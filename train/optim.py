"""The optimizer: AdamW with weight decay on matrices only, its state by parameter name."""

from collections.abc import Iterable

import torch
from torch import nn

from jobs.settings import Job


def build(job: Job, model: nn.Module) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in the order of `named_parameters`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": job.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type == "cuda" for _, p in named)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=job.lr, betas=(job.beta1, job.beta2), eps=job.eps, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """`<parameter>/<moment>` -> tensor, for every moment that the optimizer holds."""
    return {f"{name}/{key}": value for name, p in model.named_parameters() for key, value in optimizer.state.get(p, {}).items() if isinstance(value, torch.Tensor)}


def load_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """Puts named moments back. Returns the names of parameters for which there were none; those start fresh."""
    missing = []
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        name, _, moment = key.rpartition("/")
        by_parameter.setdefault(name, {})[moment] = tensor
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        moments = by_parameter.get(name)
        if moments is None:
            missing.append(name)
            continue
        optimizer.state[p] = {
            # The step counter stays where AdamW keeps it: on the CPU, unless the fused kernel wants it beside the weights.
            moment: tensor.to(p.device if tensor.ndim or optimizer.defaults.get("fused") else "cpu", copy=True)
            for moment, tensor in moments.items()
        }
    return missing


def global_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients together, as a tensor on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

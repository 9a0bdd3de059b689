"""The optimizer: AdamW with weight decay on matrices only, fp32 masters of 16-bit weights, its state by parameter name."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from jobs.config.settings import Job
from jobs.specs.precision import MODES
from train.distributed.parallel import local, whole
from train.kernels import usable

# A 16-bit parameter carries its fp32 master under this name; the optimizer, and checkpoints, see the master.
_MASTER = "_holdfast_master"


def use_16_bit_parameters(job: Job, model: nn.Module) -> None:
    """amp_opt_level O2: matrices become 16-bit, each with an fp32 master that the optimizer works on.

    Vectors (norms, biases) stay fp32: they are few, and their updates are the first to be lost in 16 bits."""
    dtype = getattr(torch, MODES[job.precision].autocast or "float32")
    for p in model.parameters():
        if p.ndim >= 2 and p.dtype == torch.float32:
            master = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            p.data = p.data.to(dtype)
            setattr(p, _MASTER, master)


def fp32_of(p: torch.Tensor) -> torch.Tensor:
    """The fp32 weight behind a parameter: its master, or itself."""
    master: torch.Tensor = getattr(p, _MASTER, p)
    return master


class AdamW(torch.optim.AdamW):
    """torch's, with its state and its ways; `kernels`: updates are made by train/kernels/adamw.py, which takes 16-bit gradients and
    writes 16-bit weights by itself."""

    kernels = False


@torch.no_grad()
def gradients_to_masters(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    if by_kernels(optimizer):
        return
    for p in model.parameters():
        if p.grad is not None and hasattr(p, _MASTER):
            fp32_of(p).grad = p.grad.float()


@torch.no_grad()
def masters_to_parameters(model: nn.Module) -> None:
    """Rounds the masters into the 16-bit weights, after a step and after loading."""
    for p in model.parameters():
        if hasattr(p, _MASTER):
            p.copy_(fp32_of(p))


def by_kernels(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, AdamW) and optimizer.kernels


def build(job: Job, model: nn.Module) -> AdamW:
    """AdamW over the fp32 weights of the trainable parameters, in the order of `named_parameters`."""
    weights = [fp32_of(p) for _, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": job.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type == "cuda" for p in weights)
    optimizer = AdamW([g for g in groups if g["params"]], lr=job.lr, betas=(job.beta1, job.beta2), eps=job.eps, fused=fused)
    dense = all(p.is_contiguous() and p.dtype == torch.float32 and not isinstance(p, DTensor) for p in weights)
    optimizer.kernels = job.fused_kernels and fused and dense and all(usable(device) is None for device in {p.device for p in weights})
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """`<parameter>/<moment>` -> tensor, for every moment that the optimizer holds."""
    return {
        f"{name}/{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(fp32_of(p), {}).items()
        if isinstance(value, torch.Tensor)
    }


def load_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """Puts named moments back: themselves where they lie on the device of their parameter. Returns the names of parameters for which
    there were none; those start fresh."""
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
        optimizer.state[fp32_of(p)] = {
            # The step counter stays where AdamW keeps it: on the CPU, unless the fused kernel wants it beside the weights.
            moment: tensor.to(p.device if tensor.ndim or optimizer.defaults.get("fused") else "cpu")
            for moment, tensor in moments.items()
        }
    return missing


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    """The gradients that the optimizer will use: of the masters where these have any."""
    return [g for g in (p.grad if fp32_of(p).grad is None else fp32_of(p).grad for p in model.parameters()) if g is not None]


def global_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together, as an fp32 tensor on their device, the same on every rank."""
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    if set(by_dtype) <= {torch.float32}:
        return whole(torch.nn.utils.get_total_norm(by_dtype.get(torch.float32, [])))
    # torch's own total would round the norm of each 16-bit gradient to 16 bits.
    norms = [norm for group in by_dtype.values() for norm in torch._foreach_norm(group, 2, torch.float32)]
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def first_nonfinite(model: nn.Module) -> torch.Tensor:
    """Index, among the parameters that have a gradient, of the first one that is not finite; an int64 scalar, their number where all are.

    From the norms of the gradients, on the device. Of a sharded model only this rank's parts are seen."""
    gradients = [local(gradient) for gradient in gradients_of(model)]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, 2)]) if gradients else torch.zeros(1, device=next(model.parameters()).device)
    bad = ~torch.isfinite(norms)
    return torch.where(bad.any(), torch.argmax(bad.to(torch.int8)), len(gradients))


def parameters_with_gradient(model: nn.Module) -> list[str]:
    """Names of the parameters in the order of `gradients_of`."""
    return [name for name, p in model.named_parameters() if p.grad is not None or fp32_of(p).grad is not None]


@torch.no_grad()
def scale_and_step(optimizer: torch.optim.Optimizer, model: nn.Module, factor: torch.Tensor, bad: torch.Tensor) -> None:
    """One update of all weights with their gradients times `factor`; none at all where `bad` (a float scalar) is 1.

    Both stay on the device: nothing here waits for the GPU."""
    if by_kernels(optimizer):
        _step_by_kernels(optimizer, model, factor, bad)
    elif optimizer.defaults.get("fused"):
        # The fused kernel takes them as they are, and saves a pass over the gradients.
        optimizer.grad_scale, optimizer.found_inf = factor.reciprocal(), bad  # type: ignore[attr-defined]
        optimizer.step()
        masters_to_parameters(model)
    elif not bool(bad):
        torch._foreach_mul_([local(g) for g in gradients_of(model)], factor)
        optimizer.step()
        masters_to_parameters(model)


def _step_by_kernels(optimizer: torch.optim.Optimizer, model: nn.Module, factor: torch.Tensor, bad: torch.Tensor) -> None:
    from train.kernels import adamw

    gradients = {id(fp32_of(p)): (p.grad, None if fp32_of(p) is p else p) for p in model.parameters() if p.grad is not None}
    todo = [(group, weight, *gradients[id(weight)]) for group in optimizer.param_groups for weight in group["params"] if id(weight) in gradients]
    for _, weight, _, _ in todo:
        state = optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
    if todo:
        # A list of the one tensor: torch takes a single one for a number, and waits for the GPU to read it.
        torch._foreach_add_([optimizer.state[weight]["step"] for _, weight, _, _ in todo], [1.0 - bad] * len(todo))
    for group, weight, gradient, low in todo:
        state = optimizer.state[weight]
        adamw.update(
            weight, gradient.contiguous(), state["exp_avg"], state["exp_avg_sq"], low, state["step"], factor, bad,
            lr=group["lr"], weight_decay=group["weight_decay"], betas=group["betas"], eps=group["eps"],
        )  # fmt: skip

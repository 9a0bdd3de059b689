"""Steps that must end a run: a gradient that is not finite without a loss scale to shrink, or a batch without any target.

The first such step is kept in two numbers on the device, because looking at each step would wait for each. They are read before
every log line and every checkpoint: the outcome does not depend on LOG_EVERY, and no checkpoint holds what such a step left.
"""

import torch
from torch import nn

from jobs.config.settings import Job
from train import optim
from train.precision.numerics import GradientOverflow, first_nonfinite_grad
from train.train_step import NO_FAULT, NO_TARGET, WRONG_LOSS


def no_fault(device: torch.device) -> torch.Tensor:
    """[step, kind] before any fault; int64 [2]."""
    return torch.full((2,), NO_FAULT, dtype=torch.int64, device=device)


def first_fault(known: torch.Tensor, step: int, fault: torch.Tensor) -> torch.Tensor:
    """`known`, or this step and its fault (`StepResult.fault`) if it is the first."""
    now = torch.stack([torch.full_like(fault, step), fault])
    return torch.where((known[1] == NO_FAULT) & (fault != NO_FAULT), now, known)


def raise_on_fault(known: list[int], job: Job, model: nn.Module, step: int) -> None:
    """Raises GradientOverflow for the fault that `first_fault` kept; `step` is the last one that was done."""
    at, kind = known
    if kind == NO_FAULT:
        return
    if kind == NO_TARGET:
        raise GradientOverflow(
            f"at step {at} no sample of the batch has a target (all are -100 or masked). Check the labels, and whether SEQ_LEN={job.seq_len} cuts them off."
        )
    if kind == WRONG_LOSS:
        raise GradientOverflow(f"at step {at} the loss is not finite, though the gradient is. Look for an infinite sample or a division by zero in the loss.")
    names = optim.parameters_with_gradient(model)
    first = first_nonfinite_grad(model) if at == step else names[kind] if kind < len(names) else "a parameter of another rank"
    raise GradientOverflow(
        f"at step {at} the gradient is not finite, first in {first}. A lower LR or more warm-up may help, or a sample holds NaN; DEBUG=true finds the operation."
    )

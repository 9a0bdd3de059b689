"""Totals of finished steps that stay on the device until a log line or a checkpoint reads them."""

import torch
from torch import nn

from jobs.config.settings import Job
from train.distributed.runtime import Distributed
from train.step_faults import first_fault, no_fault, raise_on_fault
from train.train_step import StepResult


class StepTotals:
    """Targets of this rank since the last `reduce`, and the first step with a fault. `add` does not wait for the device, `reduce` does."""

    def __init__(self, dist: Distributed, job: Job, model: nn.Module):
        self._dist, self._job, self._model = dist, job, model
        self._targets = torch.zeros((), dtype=torch.float64, device=dist.device)
        self._fault = no_fault(dist.device)

    def add(self, step: int, result: StepResult) -> None:
        """Count a step that is finished."""
        self._targets += result.targets
        self._fault = first_fault(self._fault, step, result.fault)

    def reduce(self, step: int, *sums: torch.Tensor) -> tuple[int, list[float]]:
        """Sum over all ranks: the targets since the last call, and each of `sums`. Collective.

        `step` is the last finished one. Raises GradientOverflow for the first fault up to it."""
        raise_on_fault(self._fault.tolist(), self._job, self._model, step)
        *reduced, targets = self._dist.all_reduce_sum(torch.stack([*sums, self._targets])).tolist()
        self._targets.zero_()
        return int(targets), reduced

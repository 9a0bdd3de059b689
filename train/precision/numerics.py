"""Mixed precision: autocast context, dynamic loss scaling, and the policy for gradients that are not finite."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from jobs.config.settings import Job
from jobs.core.errors import HoldfastError
from jobs.specs.precision import MODES, Precision

# Below this the gradients themselves are broken, not their scale: nothing is left to shrink.
_SMALLEST_SCALE = 1.0


class GradientOverflow(HoldfastError):
    """Training cannot continue: gradients stayed non-finite. Ends the attempt as a code error."""


@dataclass
class GradScaler:
    """Dynamic loss scaling, as a state machine on the host.

    The scale is a power of the growth factor, so scaling and unscaling are exact. An overflow shrinks it and the step is
    tried again with the same batch: neither the schedule nor the data order notices."""

    scale: float = 1.0
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    good_steps: int = 0

    @classmethod
    def from_job(cls, job: Job) -> "GradScaler | None":
        """Return the scaler of a job, or None where its precision needs none."""
        if not MODES[job.precision].loss_scaling:
            return None
        return cls(job.grad_scaler_init, job.grad_scaler_growth, job.grad_scaler_backoff, job.grad_scaler_growth_interval)

    def update(self, overflow: bool) -> None:
        if overflow:
            self.scale *= self.backoff
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps >= self.interval:
            self.scale *= self.growth
            self.good_steps = 0

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])


class OverflowPolicy:
    """Counts consecutive overflows and applies ON_OVERFLOW."""

    def __init__(self, job: Job, scale: GradScaler | None):
        self.policy, self.limit, self.scale = job.on_overflow, job.max_overflows, scale
        self.in_a_row = 0

    def record_success(self) -> None:
        self.in_a_row = 0
        if self.scale:
            self.scale.update(overflow=False)

    def record_overflow(self, step: int, first: str) -> bool:
        """Count an overflow. True: repeat the step. False: fall back to bf16. Raises GradientOverflow where the policy ends training."""
        self.in_a_row += 1
        before = self.scale.scale if self.scale else 1.0
        if self.scale:
            self.scale.update(overflow=True)
        said = f"gradient overflow at step {step}, first in {first}, loss scale {before:g}"
        if self.policy == "abort":
            raise GradientOverflow(f"{said}; ON_OVERFLOW=abort")
        exhausted = self.in_a_row > self.limit or (self.scale is not None and self.scale.scale < _SMALLEST_SCALE)
        if self.scale is None or exhausted:
            if self.policy == "fallback" and self.scale is not None:
                return False
            times = (
                f"{self.in_a_row} times in a row (MAX_OVERFLOWS={self.limit})"
                if self.scale
                else f"and {self.policy!r} can help only where there is a loss scale"
            )
            raise GradientOverflow(f"{said}, {times}. The loss or a weight is not finite: a lower LR, more warm-up or PRECISION=bf16 may help.")
        return True


def first_nonfinite_grad(model: nn.Module) -> str:
    """Return the name of the first parameter whose gradient is not finite, in the order of the model."""
    for name, p in model.named_parameters():
        if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
            return name
    return "no parameter of this rank"


def autocast_context(
    precision: Precision, device: torch.device, fp8: Callable[[], AbstractContextManager[object]] | None = None
) -> Callable[[], AbstractContextManager[object]]:
    """Return the context of every forward pass of training and validation: autocast where the mode has it, fp8 inside."""
    dtype_name = MODES[precision].autocast

    @contextmanager
    def context() -> Iterator[None]:
        with ExitStack() as stack:
            if dtype_name is not None:
                stack.enter_context(torch.autocast(device.type, getattr(torch, dtype_name)))
            if fp8 is not None:
                stack.enter_context(fp8())
            yield

    return context

"""One optimizer step: forward and backward of every micro-batch, one division, one clip, one update."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from jobs.config.settings import Job
from train import optim
from train.distributed.parallel import accumulating, saved_buffers, send_buffers
from train.distributed.runtime import Runtime
from train.models.contract import read_loss, targets_of
from train.precision.numerics import LossScale

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for the log, on the device: nothing here has waited for it.

    loss_sum, targets: of this rank. norm: of the whole gradient, before clipping, without loss scale.
    overflow: whether the update was skipped; known only where there is a loss scale, else False.
    fault: int64 scalar: NO_FAULT, NO_TARGET, WRONG_LOSS (a loss that is not finite with a gradient that is), or the index of the first parameter
    whose gradient is not finite. Every rank has a fault or none has; the index is that of its own part of a sharded model."""

    loss_sum: torch.Tensor
    targets: torch.Tensor
    norm: torch.Tensor
    overflow: bool
    fault: torch.Tensor


NO_FAULT, NO_TARGET, WRONG_LOSS = -1, -2, -3


@dataclass
class Stepper:
    """The arithmetic of a step. `model` is what forward goes through (DDP or the module itself), `inner` the module."""

    job: Job
    rt: Runtime
    model: nn.Module
    inner: nn.Module
    optimizer: torch.optim.Optimizer
    context: Callable[[], AbstractContextManager[object]]
    scale: LossScale | None
    _buffers: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._buffers = saved_buffers(self.inner)

    def run(self, batches: Iterable[Batch]) -> StepResult:
        """Trains on the micro-batches of one step. The optimizer's lr is already set."""
        job, rt = self.job, self.rt
        assert job.grad_accum_steps is not None
        scale = self.scale.scale if self.scale else 1.0
        # Each rank's forward passes leave others behind, and a checkpoint has those of rank 0: a step that reads them begins with these.
        if rt.world > 1:
            send_buffers(self._buffers, rt)
        # A step that is tried again counts once in running statistics, and what overflowed not at all.
        before = [buffer.clone() for buffer in self._buffers] if self.scale is not None else []
        loss_total = torch.zeros((), device=rt.device)
        targets_total = torch.zeros((), dtype=torch.float64, device=rt.device)
        nominal = 0
        self.optimizer.zero_grad(set_to_none=True)
        self.inner.zero_grad(set_to_none=True)
        for index, batch in enumerate(batches):
            # A number of targets that every rank knows beforehand, to keep 16-bit gradients in range. Ranks with batches of other
            # lengths must not scale by their own: the mean over ranks would weigh them differently. What counted is divided by at the end.
            nominal = nominal or job.batch_size * nominal_targets(batch, job.seq_len)
            with accumulating(self.model, rt, last=index == job.grad_accum_steps - 1):
                with self.context():
                    loss_sum, targets = read_loss(self.model(**batch), batch)
                # The mean over ranks that DDP and FSDP take, times their number, is the sum.
                (loss_sum * (rt.world * scale / nominal)).backward()
            loss_total += loss_sum.detach()
            targets_total += targets
        # One division by the targets of the whole global batch: short windows and padding weigh what they weigh.
        everyone, broken = rt.total(torch.stack([targets_total, (~torch.isfinite(loss_total)).double()]))
        empty = everyone == 0
        everyone = torch.where(empty, torch.ones_like(everyone), everyone)
        optim.gradients_to_masters(self.optimizer, self.inner)
        factor = (nominal / (everyone * scale)).float()
        norm = optim.global_norm(optim.gradients_of(self.inner)) * factor
        bad = (~torch.isfinite(norm)).float()
        wrong_loss = (broken > 0) & (bad == 0)
        overflow = self.scale is not None and bool(bad)
        found = torch.where(bad.bool(), optim.first_nonfinite(self.inner), torch.full_like(targets_total, NO_FAULT, dtype=torch.int64))
        if overflow:
            for buffer, kept in zip(self._buffers, before, strict=True):
                buffer.copy_(kept)
        else:
            clipped = factor * torch.clamp(job.grad_clip / (norm + 1e-6), max=1.0) if job.grad_clip > 0 else factor
            optim.scale_and_step(self.optimizer, self.inner, clipped, bad)
        for condition, fault in ((wrong_loss, WRONG_LOSS), (empty, NO_TARGET)):
            found = torch.where(condition, torch.full_like(found, fault), found)
        return StepResult(loss_total, targets_total, norm, overflow, found)

    def settle(self, batch: Batch) -> None:
        """One backward pass whose gradients are thrown away, before the first step of an attempt.

        DDP lays its gradient buckets out anew after the first backward of a process. The layout decides in which order the
        ranks' gradients are added up, so a resumed run would differ in the last bits from one that was never interrupted."""
        if self.rt.world == 1 or self.model is self.inner:
            return
        buffers = {name: tensor.clone() for name, tensor in self.inner.named_buffers()}
        with self.context():
            loss_sum, _ = read_loss(self.model(**batch), batch)
        (loss_sum * 0.0).backward()
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, tensor in self.inner.named_buffers():
                tensor.copy_(buffers[name])


def shape_targets(batch: Batch) -> int:
    """Targets per sample by shape alone: padded and masked ones included."""
    targets = targets_of(batch)
    return 1 if targets is None else max(targets.numel() // targets.shape[0], 1)


def nominal_targets(batch: Batch, seq_len: int) -> int:
    """Targets per sample as every rank and every step has them: the sequence length, or 1 for one target a sample."""
    targets = targets_of(batch)
    return seq_len if targets is not None and targets.ndim > 1 else 1

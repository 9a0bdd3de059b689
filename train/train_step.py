"""One optimizer step: forward and backward of every micro-batch, one division, one clip, one update."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from jobs.config.settings import Job
from train import optim
from train.distributed.parallel import accumulating, saved_buffers, send_buffers
from train.distributed.runtime import Distributed
from train.models.contract import read_loss, targets_of
from train.precision.numerics import GradScaler

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """Results of one step as device tensors; making them has not waited for the device, except for `overflow`.

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


@dataclass(frozen=True)
class _Gradients:
    """What the backward passes of a step left: sums of this rank, as device tensors, and the constant that each loss was divided by."""

    loss_sum: torch.Tensor
    targets: torch.Tensor
    divisor: int


@dataclass
class TrainStep:
    """The arithmetic of one optimizer step. `model` is what forward goes through (DDP or the module itself), `inner` the module.

    `scale` and `context` change when training falls back to bf16 (train/overflow_policy.py)."""

    job: Job
    rt: Distributed
    model: nn.Module
    inner: nn.Module
    optimizer: torch.optim.Optimizer
    context: Callable[[], AbstractContextManager[object]]
    scale: GradScaler | None
    _buffers: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._buffers = saved_buffers(self.inner)

    def __call__(self, batches: Iterable[Batch]) -> StepResult:
        """Train on the micro-batches of one step, with the learning rate that the optimizer has. Collective.

        Where there is a loss scale this waits for the device, to know whether to skip the update; else it does not."""
        # Each rank's forward passes leave other buffers, and a checkpoint has those of rank 0: each step begins with these.
        if self.rt.world_size > 1:
            send_buffers(self._buffers, self.rt)
        # An overflow leaves no trace in running statistics: the step is tried again, and counts once.
        before = [buffer.clone() for buffer in self._buffers] if self.scale is not None else []
        scale = self.scale.scale if self.scale else 1.0
        return self._update(self._backward(batches, scale), scale, before)

    def _backward(self, batches: Iterable[Batch], scale: float) -> _Gradients:
        """Forward and backward of every micro-batch. Gradients are reduced over the ranks in the last one."""
        job, rt = self.job, self.rt
        assert job.grad_accum_steps is not None
        loss_total = torch.zeros((), device=rt.device)
        targets_total = torch.zeros((), dtype=torch.float64, device=rt.device)
        nominal = 0
        self.optimizer.zero_grad(set_to_none=True)
        self.inner.zero_grad(set_to_none=True)
        for index, batch in enumerate(batches):
            # A number of targets that every rank knows beforehand, to keep 16-bit gradients in range. Ranks with batches of other
            # lengths must not scale by their own: the mean over ranks would weigh them differently. `_update` divides by what counted.
            nominal = nominal or job.batch_size * nominal_targets(batch, job.seq_len)
            with accumulating(self.model, rt, last=index == job.grad_accum_steps - 1):
                with self.context():
                    loss_sum, targets = read_loss(self.model(**batch), batch)
                # The mean over ranks that DDP and FSDP take, times their number, is the sum.
                (loss_sum * (rt.world_size * scale / nominal)).backward()
            loss_total += loss_sum.detach()
            targets_total += targets
        return _Gradients(loss_total, targets_total, nominal)

    def _update(self, done: _Gradients, scale: float, buffers_before: list[torch.Tensor]) -> StepResult:
        """One division by the targets of the whole global batch, one clip and one update; with a scale none after an overflow."""
        job = self.job
        # One division for all ranks: short windows and padding count as what they are.
        everyone, broken = self.rt.all_reduce_sum(torch.stack([done.targets, (~torch.isfinite(done.loss_sum)).double()]))
        empty = everyone == 0
        everyone = torch.where(empty, torch.ones_like(everyone), everyone)
        optim.gradients_to_masters(self.optimizer, self.inner)
        factor = (done.divisor / (everyone * scale)).float()
        norm = optim.global_norm(optim.gradients_of(self.inner)) * factor
        bad = (~torch.isfinite(norm)).float()
        wrong_loss = (broken > 0) & (bad == 0)
        overflow = self.scale is not None and bool(bad)
        fault = torch.where(bad.bool(), optim.first_nonfinite(self.inner), torch.full_like(done.targets, NO_FAULT, dtype=torch.int64))
        if overflow:
            for buffer, saved in zip(self._buffers, buffers_before, strict=True):
                buffer.copy_(saved)
        else:
            clipped = factor * torch.clamp(job.grad_clip / (norm + 1e-6), max=1.0) if job.grad_clip > 0 else factor
            optim.scale_and_step(self.optimizer, self.inner, clipped, bad)
        for condition, kind in ((wrong_loss, WRONG_LOSS), (empty, NO_TARGET)):
            fault = torch.where(condition, torch.full_like(fault, kind), fault)
        return StepResult(done.loss_sum, done.targets, norm, overflow, fault)

    def warm_up(self, batch: Batch) -> None:
        """Do one backward pass whose gradients are discarded, before the first step of an attempt.

        DDP rebuilds its gradient buckets after the first backward pass of a process. The layout decides in which order the
        gradients of the ranks are summed, so a resumed run would differ in the last bits from one that was never interrupted."""
        if self.rt.world_size == 1 or self.model is self.inner:
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

"""The training loop, and what surrounds it: build, resume, step, validate, log, save, stop."""

import os
import platform
import random
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from torch import nn

from jobs import ledger
from jobs.contract import Event
from jobs.errors import SettingError
from jobs.rules import schedule_of
from jobs.rundir import AttemptDir, RunDir
from jobs.schedule import describe, lr_at
from jobs.settings import Job
from train import checkpoint, optim, runtime
from train.data.order import rank_slice, sample_ids
from train.data.sources import Dataset, open_data
from train.evaluate import evaluate
from train.metrics import MetricsLog
from train.models.contract import count_targets, read_loss
from train.models.registry import PRESETS, build_model
from train.runtime import Runtime
from train.stop import StopFlag, name_of

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """Where training ended; `stopped_by` is TERM, USR2 and so on, or None when the last step is done."""

    step: int
    stopped_by: str | None


class Progress:
    """The last finished step, where the end of the attempt finds it whatever became of this process."""

    def __init__(self, attempt: AttemptDir, enabled: bool):
        self._fd = os.open(attempt.progress, os.O_WRONLY | os.O_CREAT, 0o644) if enabled else None

    def set(self, step: int) -> None:
        if self._fd is not None:
            os.pwrite(self._fd, f"{step:<12d}".encode(), 0)


def train(job: Job, run: RunDir, flag: StopFlag) -> Outcome:
    """Trains until `max_steps` or until all ranks agree to stop. Raises the errors of jobs.errors."""
    rt = runtime.start(job)
    say = _Speaker(rt.is_main)
    say(f"attempt {rt.attempt} of run {run.id}")
    say("  " + runtime.describe(job, rt))

    schedule = schedule_of(job)
    for line in describe(schedule):
        say("  " + line)
    seed_everything(job.seed, step=0)
    data, val_data = _open(job, run, "train"), _open(job, run, "val")
    inner = _build(job, data, rt)
    optimizer = optim.build(job, inner)
    resumed, pending = _resume(job, run, rt, inner, optimizer, data, say)
    prepared = rt.accelerator.prepare_model(inner)
    if sum(p.requires_grad for p in inner.parameters()):
        say(f"  model {job.model}: {sum(p.numel() for p in inner.parameters()):,} parameters · data {data.name}: {len(data):,} samples · batch {job.batch_size} = {rt.world} x {job.micro_batch_size} x {job.grad_accum_steps}")

    metrics = MetricsLog(run.metrics, resumed) if rt.is_main else None
    progress = Progress(run.attempt(rt.attempt), rt.is_main)
    progress.set(resumed)
    stop_file: Path | None = run.stop_file if rt.is_main else None
    micro_batches = _MicroBatches(job, rt, data)
    _settle_buckets(prepared, micro_batches.of_step(resumed), rt)
    saved = resumed
    tokens_per_step = 0
    window = _Window()
    step = resumed
    stopped_by = 0

    def agreed_to_stop() -> bool:
        nonlocal stopped_by
        stopped_by = stopped_by or rt.agree(flag.code(stop_file))
        return stopped_by != 0

    def save(pending_line: dict[str, Any] | None = None) -> None:
        nonlocal saved
        begun = time.monotonic()
        if rt.is_main:
            assert metrics is not None
            metrics.sync()
            state = checkpoint.State(
                step=step,
                tokens=step * tokens_per_step,
                seed=job.seed,
                max_steps=job.max_steps,
                batch_size=job.batch_size,
                data=data.name,
                precision=str(job.precision),
                world=rt.world,
                pending=pending_line,
                versions=_versions(),
            )
            checkpoint.save(run.checkpoints, rt.attempt, state, inner, optimizer, job.keep_last)
            ledger.append(run.ledger, Event.CHECKPOINT, attempt=rt.attempt, job_id=rt.job_id, step=step, seconds=round(time.monotonic() - begun, 3))
        saved = step

    def log(line: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.write(**line)
        say(_progress_text(line, job.max_steps))

    def validate() -> dict[str, float] | None:
        assert job.micro_batch_size is not None
        result = evaluate(inner, val_data, rt, samples=job.eval_samples, micro_batch=job.micro_batch_size, should_stop=agreed_to_stop)
        return result.metrics(val_data) if result else None

    prepared.train()
    if pending is not None:
        # The attempt before was stopped while it validated: that is done first, so that no line of metrics is missing.
        values = validate()
        if values is None:
            save(pending)
        else:
            log({**pending, **values})

    while step < job.max_steps and not agreed_to_stop():
        lr = lr_at(schedule, step)
        optim.set_lr(optimizer, lr)
        seed_everything(job.seed, step, rt.rank)
        loss_sum, targets, norm = _step(job, prepared, optimizer, micro_batches.of_step(step), rt)
        step += 1
        progress.set(step)
        tokens_per_step = tokens_per_step or int(rt.total(targets.double().clone()).item())
        window.add(tokens_per_step)

        due_eval = step == job.max_steps or (job.eval_every > 0 and step % job.eval_every == 0)
        if due_eval or step % job.log_every == 0 or step == 1:
            total, count = rt.total(torch.stack([loss_sum.double(), targets.double()])).tolist()
            line: dict[str, Any] = {"step": step, "loss": total / count, "lr": lr, "grad_norm": norm.item(), "tokens": step * tokens_per_step, "tokens_per_s": window.rate(), "attempt": rt.attempt, "time": round(time.time(), 3)}
            if due_eval:
                values = validate()
                if values is None:
                    save(line)
                    break
                line |= values
                window.restart()
            log(line)
        if step % job.checkpoint_every == 0 or step == job.max_steps:
            save()

    if stopped_by:
        if rt.is_main:
            ledger.append(run.ledger, Event.STOP, attempt=rt.attempt, job_id=rt.job_id, step=step, signal=name_of(stopped_by))
        if saved < step or not checkpoint.complete(run.checkpoints):
            save()
        say(f"stopped by {name_of(stopped_by)} at step {step:,}; saved, nothing is lost")
    # No rank leaves before rank 0 has saved: its exit could otherwise end the step while rank 0 still writes.
    rt.barrier()
    if metrics is not None:
        metrics.close()
    return Outcome(step, name_of(stopped_by) if stopped_by else None)


def seed_everything(seed: int, step: int, rank: int = 0) -> None:
    """Random numbers as a function of seed, step and rank: there is no generator state to save, and none to lose."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)


def _step(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], rt: Runtime) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One optimizer step: this rank's loss sum and number of targets, and the gradient norm before clipping."""
    assert job.grad_accum_steps is not None
    loss_total = torch.zeros((), device=rt.device)
    targets_total = torch.zeros((), dtype=torch.int64, device=rt.device)
    optimizer.zero_grad(set_to_none=True)
    for index, batch in enumerate(batches):
        last = index == job.grad_accum_steps - 1
        with nullcontext() if last else rt.accelerator.no_sync(model):
            loss_sum, targets = read_loss(model(**batch), batch)
            # DDP takes the mean over ranks; times their number it is the sum, divided by the targets below.
            (loss_sum * rt.world).backward()
        loss_total += loss_sum.detach()
        targets_total += targets
    # One division by the targets of the whole global batch: short windows and padding weigh what they weigh.
    everyone = rt.total(targets_total.double().clone())
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_div_(gradients, everyone.to(torch.float32))
    norm = optim.global_norm(parameters)
    if job.grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, job.grad_clip, norm)
    optimizer.step()
    return loss_total, targets_total, norm


class _MicroBatches:
    """This rank's forward passes of any step, assembled from the pure data order."""

    def __init__(self, job: Job, rt: Runtime, data: Dataset):
        assert job.micro_batch_size is not None
        self.job, self.rt, self.data = job, rt, data
        self.slices = rank_slice(job.batch_size, job.micro_batch_size, rt.world, rt.rank)

    def of_step(self, step: int) -> Iterator[Batch]:
        ids = sample_ids(step, self.job.batch_size, len(self.data), self.job.seed)
        for piece in self.slices:
            batch = self.data.batch(ids[piece])
            if self.rt.device.type == "cuda":
                batch = {name: tensor.pin_memory().to(self.rt.device, non_blocking=True) for name, tensor in batch.items()}
            yield batch


def _settle_buckets(model: nn.Module, batches: Iterator[Batch], rt: Runtime) -> None:
    """One backward pass whose gradients are thrown away.

    DDP lays its gradient buckets out anew after the first backward of a process. The layout decides in which order the
    ranks' gradients are added up, so a resumed run would differ in the last bits from one that was never interrupted."""
    if rt.world == 1:
        return
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    batch = next(batches)
    loss_sum, _ = read_loss(model(**batch), batch)
    loss_sum.backward()
    for p in model.parameters():
        p.grad = None
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            tensor.copy_(buffers[name])
    count_targets(batch)


def _build(job: Job, data: Dataset, rt: Runtime) -> nn.Module:
    """The model on its device, with recomputation and compilation where they are asked for."""
    options = dict(job.model_options)
    if job.grad_checkpointing and job.model in PRESETS:
        options.setdefault("checkpoint_blocks", True)
    model = build_model(job.model, vocab_size=data.vocab_size, seq_len=job.seq_len, overrides=options)
    if job.grad_checkpointing and job.model not in PRESETS:
        enable = getattr(getattr(model, "model", model), "gradient_checkpointing_enable", None)
        if enable is None:
            raise SettingError(f"GRAD_CHECKPOINTING: {job.model} has no gradient_checkpointing_enable(); recompute inside your own model instead.")
        enable()
    model.to(rt.device)
    if job.compile:
        regions = getattr(model, "compile_regions", model.compile)
        regions()
    return model


def _open(job: Job, run: RunDir, split: Any) -> Dataset:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast"
    return open_data(job.data, seq_len=job.seq_len, split=split, cache_dir=cache)


def _resume(job: Job, run: RunDir, rt: Runtime, model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset, say: "_Speaker") -> tuple[int, dict[str, Any] | None]:
    """Loads the newest checkpoint that verifies. Returns the step to go on from, and a log line left to finish."""
    chosen: str | None = None
    if rt.is_main:
        checkpoint.clear_leftovers(run.checkpoints)
        path, damaged = checkpoint.newest_verified(run.checkpoints, rt.attempt)
        for name, reason in damaged:
            ledger.append(run.ledger, Event.DAMAGED, attempt=rt.attempt, job_id=rt.job_id, name=name, reason=reason)
            say(f"  WARNING: checkpoint {reason}; it is kept as checkpoints/{name} and the one before is used")
        chosen = path.name if path else None
    # Rank 0 chooses for all: on a shared file system each node may see another listing.
    chosen = rt.broadcast(chosen)
    step, pending = 0, None
    if chosen is not None:
        begun = time.monotonic()
        state, remarks = checkpoint.load(run.checkpoints / chosen, model, optimizer)
        step, pending = state.step, state.pending
        for name, then, now in (("data", state.data, data.name), ("batch_size", state.batch_size, job.batch_size), ("max_steps", state.max_steps, job.max_steps), ("seed", state.seed, job.seed), ("precision", state.precision, str(job.precision)), ("world size", state.world, rt.world)):
            if then != now:
                remarks.append(f"{name} was {then}, now {now}")
        say(f"  resumed at step {step:,} ({chosen} verified, {time.monotonic() - begun:.1f} s)" + "".join(f"; {remark}" for remark in remarks))
    if rt.is_main:
        ledger.append(run.ledger, Event.RESUMED, attempt=rt.attempt, job_id=rt.job_id, step=step)
    return step, pending


class _Window:
    """Targets per second since the last logged line."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._begun, self._targets = time.monotonic(), 0

    def add(self, targets: int) -> None:
        self._targets += targets

    def rate(self) -> float:
        rate = self._targets / max(time.monotonic() - self._begun, 1e-9)
        self.restart()
        return round(rate, 1)


class _Speaker:
    """Prints on rank 0."""

    def __init__(self, enabled: bool):
        self.enabled = enabled

    def __call__(self, text: str) -> None:
        if self.enabled:
            print(text, flush=True)


def _progress_text(line: dict[str, Any], max_steps: int) -> str:
    parts = [f"step {line['step']:,}/{max_steps:,}", f"loss {line['loss']:.4f}", f"lr {line['lr']:.2e}", f"{line['tokens_per_s']:,.0f} tok/s"]
    if "val_loss" in line:
        parts.append(f"val loss {line['val_loss']:.4f}")
    if "val_bits_per_byte" in line:
        parts.append(f"{line['val_bits_per_byte']:.3f} bits/byte")
    return " · ".join(parts)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "accelerate": accelerate.__version__, "numpy": np.__version__, "platform": sys.platform}

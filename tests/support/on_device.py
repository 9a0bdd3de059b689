"""Training in small on any device, through the code of the loop: what tests/train/test_gpu.py does on a GPU and
tests/train/test_on_device.py on a CPU. Run as a program it is one rank of several, and leaves its gradients in a file."""

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from jobs.config.settings import Job
from jobs.run import event_log
from jobs.run.rundir import RunDir
from jobs.specs.precision import MODES, Precision
from train import build, optim
from train.checkpoint import state_dict
from train.checkpoint.manager import CheckpointManager
from train.compilation import toolchain
from train.data.order import rank_slice
from train.data.sources import open_data
from train.distributed import runtime
from train.distributed.parallel import prepare, whole
from train.overflow_policy import handle_overflow, restore_scaler, scaler_state
from train.precision.numerics import GradScaler, OverflowPolicy
from train.rng import seed_everything
from train.train_step import TrainStep

HERE = Path(__file__).resolve().parent
# Heads of 128 channels and widths that every fp8 recipe takes; 256 tokens per forward pass, for the same reason.
SHAPE = {"n_layers": 2, "d_model": 256, "n_heads": 2, "d_ff": 512}
SMALL_SHAPE = {"n_layers": 2, "d_model": 64, "n_heads": 2, "d_ff": 128}
LOSS_AT_START = 5.545  # log(256)
# For tests that compile on a CPU. A minimal Debian has neither a C++ compiler nor the header files of Python, and no test installs them.
_MISSING = toolchain.find_missing(torch.device("cpu"))
needs_compiler = pytest.mark.skipif(bool(_MISSING), reason=f"COMPILE=true needs {' and '.join(_MISSING)}: install {' '.join(_MISSING.values())}")


class One:
    """A runtime of one process: what a step needs of it, without a process group."""

    rank, world_size, attempt, job_id, is_main = 0, 1, 1, "test", True

    def __init__(self, device: torch.device):
        self.device, self.accelerator = device, self

    def no_sync(self, model: nn.Module) -> Any:
        return nullcontext()

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def barrier(self) -> None: ...


def job_of(precision: str, device: str, **settings: Any) -> Job:
    base = {"job_name": "t", "model": "nano", "model_options": SHAPE, "data": "synthetic", "seq_len": 64, "batch_size": 4, "micro_batch_size": 4, "grad_accum_steps": 1, "max_steps": 1000,
            "lr": 1e-3, "warmup_steps": 0, "device": device, "precision": precision, "max_overflows": 60}  # fmt: skip
    return Job(**{**base, **settings})


@dataclass
class Training:
    """A model in training, made and stepped by the functions of the loop."""

    job: Job
    device: torch.device
    folder: Path
    said: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        torch.set_float32_matmul_precision(MODES[self.job.precision].matmul_precision)
        self.rt: Any = One(self.device)
        self.run = RunDir(self.folder)
        self.run.path.mkdir(parents=True, exist_ok=True)
        self.data = open_data("synthetic", seq_len=self.job.seq_len, split="train", vocab_size=256)
        seed_everything(self.job.seed, 0)
        self.model, context = build.build(self.job, self.data, self.rt, self.said.append)  # type: ignore[arg-type]
        self.optimizer = optim.build(self.job, self.model)
        scale = GradScaler.from_job(self.job)
        self.guard = OverflowPolicy(self.job, scale)
        self.stepper = TrainStep(self.job, self.rt, self.model, self.model, self.optimizer, context, scale)
        self.saver = CheckpointManager(self.run, self.job, self.rt, self.said.append, sharded=False, saved=None)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        import numpy as np

        found = self.data.batch(np.arange(step * self.job.batch_size, (step + 1) * self.job.batch_size))
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    def train(self, steps: int) -> "Training":
        end = self.step + steps
        while self.step < end:
            optim.set_lr(self.optimizer, self.job.lr)
            seed_everything(self.job.seed, self.step)
            done = self.stepper([self.batch(self.step)])
            if done.overflow:
                handle_overflow(self.stepper, self.guard, self.run, self.step, self.said.append)  # type: ignore[arg-type]
                continue
            self.guard.record_success()
            self.step += 1
            self.losses.append(float(done.loss_sum / done.targets))
        return self

    def overflows(self) -> list[dict[str, Any]]:
        return [event for event in event_log.read(self.run.ledger) if event["event"] == "overflow"]

    def save(self, *, blocking: bool = True) -> None:
        scaler = scaler_state(self.stepper)
        state = state_dict.TrainStateRecord(
            self.step, 0, self.job.seed, self.job.max_steps, self.job.batch_size, self.data.name, str(self.job.precision), 1, scaler=scaler
        )
        self.saver.save(state, self.model, self.optimizer, blocking=blocking)

    def load(self, source: "Training") -> list[str]:
        """Takes over the newest checkpoint of another one. Returns what was remarked."""
        (path,) = sorted(source.run.checkpoints.glob("step-*"))[-1:]
        state, remarks = state_dict.load(path, self.model, self.optimizer)
        restore_scaler(self.stepper, self.guard, state, self.job, self.said.append)
        self.step = state.step
        return remarks

    def weights(self) -> dict[str, torch.Tensor]:
        """fp32 weights, copied."""
        return {name: tensor.detach().float().clone() for name, tensor in state_dict.named_tensors(self.model).items()}


def falls(training: Training) -> bool:
    """Whether the loss came down by a fifth, from knowing nothing."""
    first, last = training.losses[0], sum(training.losses[-3:]) / 3
    return abs(first - LOSS_AT_START) < 1.0 and last < 0.8 * first


def largest_gap(training: Training, reference: Training) -> float:
    """Largest difference of losses, relative to the reference's; below one nat per target it counts as it is."""
    return max(abs(a - b) / max(b, 1.0) for a, b in zip(training.losses, reference.losses, strict=True))


# -- several ranks -----------------------------------------------------------------------------------------------------

GLOBAL_BATCH, LENGTH = 8, 16
CASES = ("whole", "ragged")


def global_batch(case: str) -> dict[str, torch.Tensor]:
    """Eight samples. `ragged`: the last window has few targets, and the ranks have different numbers of them."""
    tokens = torch.randint(0, 256, (GLOBAL_BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    if case == "ragged":
        batch["targets"][4:6, 3:] = -100
        batch["targets"][6:, 1:] = -100
        batch["targets"][7] = -100
    return batch


def gradient_job(device: str, world: int, parallel: str = "ddp") -> Job:
    return job_of(
        "fp32",
        device,
        model_options=SMALL_SHAPE,
        seq_len=LENGTH,
        batch_size=GLOBAL_BATCH,
        micro_batch_size=2,
        grad_accum_steps=4 // world,
        gpus_per_node=world,
        parallel=parallel,
        grad_clip=0,
    )


def gradients_of(job: Job, rt: Any, case: str) -> dict[str, torch.Tensor]:
    """The gradients of one step over a global batch, divided by all of its targets: whole, on the CPU, on every rank.

    As the update takes them: what lies in `grad` afterwards is scaled by one optimizer and not by another."""
    data = open_data("synthetic", seq_len=LENGTH, split="train", vocab_size=256)
    seed_everything(0, 0)
    torch.set_float32_matmul_precision(MODES[Precision.FP32].matmul_precision)
    inner, context = build.build(job, data, rt, lambda text: None)  # type: ignore[arg-type]
    model = prepare(inner, job, rt)
    stepper = TrainStep(job, rt, model, inner, optim.build(job, inner), context, None)
    batch = global_batch(case)
    assert job.micro_batch_size is not None
    found: dict[str, torch.Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, model: nn.Module, factor: torch.Tensor, bad: torch.Tensor) -> None:
        found.update({name: (whole(p.grad) * factor).cpu() for name, p in model.named_parameters() if p.grad is not None})

    with mock.patch.object(optim, "scale_and_step", keep):
        done = stepper(
            [
                {name: tensor[piece].to(rt.device) for name, tensor in batch.items()}
                for piece in rank_slice(GLOBAL_BATCH, job.micro_batch_size, rt.world_size, rt.rank)
            ]
        )
    assert float(rt.all_reduce_sum(done.targets.clone())) == int((batch["targets"] != -100).sum())
    return found


def gradients_over_ranks(world: int, device: str, folder: Path, timeout: float = 150) -> dict[str, dict[str, torch.Tensor]]:
    """`ddp whole`, `ddp ragged`, `fsdp whole`, ... -> gradients, from as many processes as asked for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    ranks = []
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
               "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parents[1]), str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")])), "OMP_NUM_THREADS": "1"}  # fmt: skip
        log = open(folder / f"{rank}.log", "wb")
        ranks.append(subprocess.Popen([sys.executable, __file__, device, str(world), str(folder)], env=env, stdout=log, stderr=subprocess.STDOUT))
        log.close()
    try:
        codes = [rank.wait(timeout) for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    assert codes == [0] * world, "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(world))
    return torch.load(folder / "gradients.pt", weights_only=True)  # type: ignore[no-any-return]


def main() -> None:
    device, world, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    rt = runtime.init(gradient_job(device, world))
    found = {f"{parallel} {case}": gradients_of(gradient_job(device, world, parallel), rt, case) for parallel in ("ddp", "fsdp") for case in CASES}
    if rt.is_main:
        torch.save(found, folder / "gradients.pt")
    rt.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

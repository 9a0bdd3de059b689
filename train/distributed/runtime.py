"""Distributed setup: device, process groups, and small CPU collectives."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from jobs.config.settings import Job
from jobs.core.contract import RankEnv
from jobs.core.errors import ImpossibleJobError
from jobs.specs.precision import MODES, nearest_that_runs, runs_on

# A collective that takes longer than this is taken for a hang.
_COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Distributed:
    """Rank, device and process groups of this process. `control_group` is a gloo group on the CPU, apart from the one for gradients."""

    accelerator: Accelerator
    device: torch.device
    rank: int
    world_size: int
    attempt: int
    job_id: str
    control_group: Any

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_max(self, *codes: int) -> tuple[int, ...]:
        """Return the maximum of each value over all ranks, on every rank. Runs on the CPU: does not wait for the GPU."""
        if self.world_size == 1:
            return codes
        flags = torch.tensor(codes, dtype=torch.int64)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.control_group)
        return tuple(flags.tolist())

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.control_group)

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor on this rank's device over all ranks, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


def init(job: Job, environ: Mapping[str, str] = os.environ) -> Distributed:
    """Join the process group of the job. Raises ImpossibleJobError when this machine cannot do what the job asks."""
    rank, world = int(environ.get(RankEnv.RANK, "0")), int(environ.get(RankEnv.WORLD_SIZE, "1"))
    if world != job.world_size:
        raise ImpossibleJobError(
            f"this attempt has {world} processes, but the job has {job.world_size} (NODES={job.nodes} x GPUS_PER_NODE={job.gpus_per_node}). Submit it again with the size it shall have."
        )
    use_cpu = _use_cpu(job, environ)
    local_world = int(environ.get(RankEnv.LOCAL_WORLD_SIZE, "1"))
    if not use_cpu and local_world > torch.cuda.device_count():
        raise ImpossibleJobError(
            f"{local_world} processes on this node, but it shows {torch.cuda.device_count()} GPU(s). GPUS_PER_NODE and what Slurm was asked for must agree."
        )
    arch = None if use_cpu else _arch()
    mode = MODES[job.precision]
    if not runs_on(mode, arch):
        here = "a CPU" if arch is None else f"a GPU of sm_{arch}"
        raise ImpossibleJobError(f"PRECISION={job.precision} does not run on {here}. Nearest that works: PRECISION={nearest_that_runs(mode, arch)}.")
    # A user's saved Accelerate configuration or left-over variables must not change a job: everything is passed here.
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    if use_cpu:
        torch.set_num_threads(job.cpu_threads)
        torch.set_num_interop_threads(1)
    # The one setter that keeps torch's old and new switches for TF32 consistent.
    torch.set_float32_matmul_precision(mode.matmul_precision)
    if mode.matmul_precision == "highest":
        torch.backends.cudnn.allow_tf32 = False
    # torch 2.13 renames this option; the new name is not in 2.11, and means something else at the start.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    accelerator = Accelerator(
        cpu=use_cpu,
        # Autocast is ours (train/precision/numerics.py): one home for training, validation and both ways of spreading a model, and no
        # hidden cast of outputs to fp32.
        mixed_precision="no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT)],
    )
    if accelerator.num_processes != world:
        raise ImpossibleJobError(f"Accelerate sees {accelerator.num_processes} processes where the job has {world}; is another launcher's environment set?")
    control = dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT) if world > 1 else None
    job_id = environ.get("HOLDFAST_JOB_ID", "local")
    return Distributed(accelerator, accelerator.device, rank, world, int(environ.get(RankEnv.ATTEMPT, "0")), job_id, control)


def describe(job: Job, runtime: Distributed, origin: str = "default") -> str:
    """One line: precision, who chose it, what it means for weights and loss, and the hardware it runs on."""
    mode = MODES[job.precision]
    if runtime.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(runtime.device)
        where = f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)"
    else:
        where = f"CPU, {job.cpu_threads} thread{'s' if job.cpu_threads > 1 else ''} per process"
    scaling = "no loss scaling"
    if mode.loss_scaling:
        scaling = f"loss scaled by {job.grad_scaler_init:g} at first, x{job.grad_scaler_growth:g} after {job.grad_scaler_growth_interval} good steps, x{job.grad_scaler_backoff:g} at an overflow"
    level, weights = "", f"weights {mode.weights}"
    if job.amp_opt_level is not None:
        level = f" {job.amp_opt_level}"
    if job.amp_opt_level == "O2":
        weights = f"matrices {mode.autocast} with fp32 masters, vectors fp32"
    return f"precision {mode.name}{level} ({origin}): {mode.compute}; {weights}, {scaling} · {runtime.world_size} x {where}"


def _use_cpu(job: Job, environ: Mapping[str, str]) -> bool:
    if job.device == "cpu":
        return True
    if torch.cuda.is_available():
        return False
    asked_slurm = "SLURM_JOB_ID" in environ and job.gpu_request != "none"
    if job.device == "cuda" or asked_slurm:
        raise ImpossibleJobError(
            "this node shows no GPU that torch can use, and the job asks for one. DEVICE=cpu trains on the CPU on purpose; nvidia-smi and `python -c 'import torch; print(torch.version.cuda)'` tell the two usual reasons apart."
        )
    return True


def _arch() -> int:
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor

"""What settings demand of each other: batch arithmetic, hardware, and the values that follow from others."""

from collections.abc import Mapping
from typing import Any

from jobs.config.settings import Job
from jobs.config.types import step_range
from jobs.core.errors import SettingError
from jobs.core.imports import check_form
from jobs.specs.lr_schedule import LRSchedule, warmup_steps_from_pct
from jobs.specs.model_presets import DATA_SPECS, MODEL_SPECS
from jobs.specs.precision import FP8_RECIPES, MODES, MXFP8_ARCH, Precision, arch_number, nearest_that_runs, runs_on

# What follows from the size of the batch unless a person gave it.
BATCH_PARTS = ("micro_batch_size", "grad_accum_steps")


def check(job: Job, origins: Mapping[str, str]) -> tuple[list[str], dict[str, Any]]:
    """All problems of the combination, one line each, and the values that were left out and follow.

    Raises SettingError for a model or data that no node could know."""

    def said(name: str) -> str:
        return f"{name.upper()}={job.text(name)} ({origins.get(name, 'default')})"

    _names(job, origins)
    problems: list[str] = []
    derived: dict[str, Any] = {}
    # A person's own script has batches and a precision of its own: settings that it does not use must not stop it.
    if job.entry is None:
        problem, batch = _batch(job, said)
        problems += problem
        derived |= batch
    if job.amp_opt_level == "O0" and job.precision is not Precision.FP32:
        if origins.get("precision", "default") != "default":
            problems.append(f"{said('amp_opt_level')} means no mixed precision, but {said('precision')}. Give one of them.")
        derived["precision"] = Precision.FP32
        job = job.model_copy(update=derived)
    elif job.amp_opt_level == "O2" and MODES[job.precision].autocast is None:
        problems.append(
            f"{said('amp_opt_level')} keeps 16-bit parameters with fp32 masters, which needs PRECISION=bf16, fp16 or fp8, not {said('precision')}. AMP_OPT_LEVEL=none leaves it out."
        )
    elif job.amp_opt_level == "O1" and MODES[job.precision].autocast is None:
        problems.append(f"{said('amp_opt_level')} is autocast, but {said('precision')} computes in fp32. Nearest that works: PRECISION=bf16.")
    if job.amp_opt_level == "O2" and job.parallel == "fsdp":
        problems.append(
            f"{said('amp_opt_level')} and {said('parallel')}: sharding keeps fp32 masters and 16-bit working copies by itself; leave AMP_OPT_LEVEL out."
        )
    if job.entry is None:
        problems += _hardware(job, said)
    if job.precision is Precision.FP8 and job.fp8_recipe is not None and job.fp8_recipe not in FP8_RECIPES[job.fp8_backend]:
        problems.append(f"{said('fp8_recipe')} is not one of {said('fp8_backend')}; choose one of {', '.join(FP8_RECIPES[job.fp8_backend])}.")
    if job.precision is Precision.FP8 and job.fp8_fast_accum != "forward" and job.fp8_recipe in ("delayed", "block", "mxfp8"):
        problems.append(f"{said('fp8_fast_accum')} is for the recipes current, tensorwise and rowwise, not {said('fp8_recipe')}.")
    if job.stop_signal not in ("auto", "USR2") and job.entry is None:
        problems.append(f"{said('stop_signal')} applies to a user script (ENTRY) only: the built-in training always gets USR2. Remove STOP_SIGNAL.")
    if job.accelerate_config is not None and (job.launch != "accelerate" or job.entry is None):
        problems.append(
            f"{said('accelerate_config')} is read by accelerate launch for a script of your own: give LAUNCH=accelerate and ENTRY. The built-in training has settings of its own for all that it says."
        )
    if job.stop_lead_s >= job.time_limit * 60:
        problems.append(f"{said('stop_lead_s')} seconds of warning do not fit into {said('time_limit')}.")
    if job.profile_steps and step_range(job.profile_steps)[0] > job.max_steps:
        problems.append(f"{said('profile_steps')} lies behind {said('max_steps')}.")
    if job.warmup_steps is not None and job.warmup_steps > job.max_steps:
        problems.append(f"{said('warmup_steps')} is more than {said('max_steps')}.")
    else:
        try:
            schedule_of(job)
        except SettingError as err:
            problems.append(f"{err} ({origins.get('lr_scheduler_params', 'default')}).")
    return problems, derived


def _names(job: Job, origins: Mapping[str, str]) -> None:
    """A misspelt name is refused here, not by the node after a night in the queue. What lies behind a path or a module only the node can tell."""
    faults = []
    for name, specs in (("model", MODEL_SPECS), ("data", DATA_SPECS)):
        try:
            check_form(name, job.text(name), specs)
        except SettingError as err:
            faults.append(f"{err} (from {origins.get(name, 'default')})")
    if faults and job.entry is None:
        raise SettingError("\n".join(faults))


def schedule_of(job: Job) -> LRSchedule:
    """The learning-rate curve of a job. Raises SettingError for parameters that describe no curve."""
    params = dict(job.lr_scheduler_params)
    warmup = job.warmup_steps if job.warmup_steps is not None else warmup_steps_from_pct(job.max_steps, job.warmup_pct or 0.0)
    params.setdefault("warmup_steps", warmup)
    return LRSchedule.from_params(job.lr_scheduler, job.lr, job.max_steps, params)


def _batch(job: Job, said: Any) -> tuple[list[str], dict[str, Any]]:
    """batch_size = processes x micro_batch_size x grad_accum_steps; one or two of the last may be left out."""
    world = job.world_size
    gpus = f"{world} process{'es' if world > 1 else ''} (NODES={job.nodes} x GPUS_PER_NODE={job.gpus_per_node})"
    micro, accum = job.micro_batch_size, job.grad_accum_steps
    unit = world * (micro or 1) * (accum or 1)
    if micro and accum and unit != job.batch_size:
        return [
            f"{said('micro_batch_size')} x {said('grad_accum_steps')} x {gpus} = {unit}, but {said('batch_size')}. Leave one of them out and it follows."
        ], {}
    if job.batch_size % unit:
        parts = [gpus]
        parts += [f"{said('micro_batch_size')}"] if micro else []
        parts += [f"{said('grad_accum_steps')}"] if accum else []
        below, above = job.batch_size // unit * unit, (job.batch_size // unit + 1) * unit
        near = ", ".join(str(n) for n in (above, below) if n)
        return [f"{said('batch_size')} is not divisible by {' x '.join(parts)} = {unit}. Near values: {near}."], {}
    per_rank = job.batch_size // world
    micro = micro or per_rank // (accum or 1)
    return [], {"micro_batch_size": micro, "grad_accum_steps": per_rank // micro}


def _hardware(job: Job, said: Any) -> list[str]:
    """What the site says its GPUs cannot do is refused before queueing; the node itself is asked again at the start."""
    mode = MODES[job.precision]
    if job.device == "cpu":
        arch: int | None = None
        where = said("device")
    elif job.gpu_arch is None:
        return []
    else:
        try:
            arch = arch_number(job.gpu_arch)
        except ValueError as err:
            return [f"GPU_ARCH: {err}."]
        where = f"{said('gpu_arch')}"
    if runs_on(mode, arch):
        if mode.name is Precision.FP8 and job.fp8_recipe == "mxfp8" and arch is not None and arch < MXFP8_ARCH:
            return [f"{said('fp8_recipe')} needs sm_{MXFP8_ARCH}, but {where}. Nearest that works: FP8_RECIPE=current."]
        return []
    need = f"sm_{mode.min_arch}" if arch is not None else "a GPU"
    return [f"{said('precision')} needs {need}, but {where}. Nearest that works: PRECISION={nearest_that_runs(mode, arch)}."]

"""Switches for speed that only do something under conditions: what each one does in this run, said once at the start."""

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from jobs.config.settings import Job
from train.data.sources import Dataset


def apply(job: Job, model: nn.Module, data: Dataset, device: torch.device) -> list[str]:
    """Turns cuDNN's own choice of algorithms on or off. Returns a line for each switch that was set and what came of it."""
    reason = no_cudnn_benchmark(model, data, device)
    torch.backends.cudnn.benchmark = job.cudnn_benchmark and reason is None
    lines = []
    if job.cudnn_benchmark:
        lines.append(
            f"warning: CUDNN_BENCHMARK has no effect: {reason}"
            if reason
            else "cudnn_benchmark: convolutions are timed in the first step, the fastest way is kept"
        )
    defaults = Job.model_fields
    if not job.num_workers:
        unused = [name for name in ("prefetch_factor", "persistent_workers") if getattr(job, name) != defaults[name].default]
        lines += [f"warning: {name.upper()} has no effect: NUM_WORKERS=0 reads in one thread, one step ahead" for name in unused]
    return lines


def no_cudnn_benchmark(model: nn.Module, data: Dataset, device: torch.device) -> str | None:
    """Why timing convolutions would gain nothing or lose time, or None.

    Each new shape is timed anew: with samples of varying sizes that would be most of the run."""
    if device.type != "cuda":
        return "there is no GPU here"
    if not any(isinstance(module, _ConvNd) for module in model.modules()):
        return "the model has no convolution"
    if not getattr(data, "fixed_shapes", False):
        return f"the data {data.name!r} do not say that all samples have one shape (attribute fixed_shapes = True)"
    return None

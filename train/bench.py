"""One precision measured on one model: `python -m train.bench`, a process of its own for each, so that none inherits the
memory, the compiled code or the switches of another.

It trains the job's model with the job's data, optimizer and loop arithmetic for some steps on one device, always from the same
weights and on the same samples, and writes down speed, memory, losses, and a sample of the first gradient.
`holdfast precision` (launcher/commands/precision.py) starts one for each mode and compares them.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from jobs.config.resolver import load
from jobs.config.settings import Job
from jobs.core.errors import HoldfastError, ImpossibleJobError
from train import optim, perf_flags
from train.batch_size_finder import expected_to_fit, largest_micro_batch
from train.build import build, open_split
from train.data.loader import TrainLoader
from train.distributed import runtime
from train.distributed.runtime import Distributed
from train.metrics.flops import flops_per_sample
from train.precision.numerics import GradScaler, first_nonfinite_grad
from train.rng import seed_everything
from train.train_step import TrainStep, shape_targets

# Entries of the first gradient that are kept for comparison: enough for a cosine to four digits, small enough to send about.
_GRADIENT_ENTRIES = 1_000_000
# A loss scale that halves more often than this in a row has no value left that works.
_MAX_OVERFLOWS = 40


@dataclass
class Measurement:
    """What one precision did in `steps` steps of `samples` samples. None: this device cannot tell.

    step_ms: median and 95th percentile after the warm-up, of what a GPU does between the first and the last kernel of a step; window_s:
    seconds by the wall clock for each `window` steps, up to a synchronisation. memory_gb: peak, and what of it holds parameters (masters
    included), gradients and optimizer; activations are the rest of the peak. flops_per_sample: model FLOPs, forward and backward."""

    precision: str
    device: str
    samples: int
    targets_per_sample: int
    parameters: int
    losses: list[float] = field(default_factory=list)
    step_ms: float = 0.0
    step_ms_p95: float = 0.0
    first_step_s: float = 0.0
    window_s: list[float] = field(default_factory=list)
    memory_gb: dict[str, float | None] = field(default_factory=dict)
    flops_per_sample: float = 0.0
    flops_formula: str = ""
    overflows: int = 0
    culprit: str = ""
    cosine: float | None = None
    layers: list[str] = field(default_factory=list)


def measure(job: Job, steps: int, warm_up: int, window: int = 0) -> tuple[Measurement, "np.ndarray[Any, np.dtype[np.float32]]"]:
    """Trains `steps` steps and returns what was seen, with entries of the first gradient [n], evenly chosen. `window`: after so many steps
    the GPU is waited for each time, as a line of metrics does.

    Raises ImpossibleJobError where this machine, or the model, cannot do the precision."""
    rt = runtime.init(job)
    on_gpu = rt.device.type == "cuda"
    seed_everything(job.seed, step=0)
    data = open_split(job, "train")
    said: list[str] = []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model, context = build(job, data, rt, said.append)
    perf_flags.apply(job, model, data, rt.device)
    optimizer = optim.build(job, model)
    scale = GradScaler.from_job(job)
    stepper = TrainStep(job, rt, model, model, optimizer, context, scale)
    feed = TrainLoader(job, rt, data)
    model.train()
    batch = feed.peek(0)
    found = Measurement(
        precision=str(job.precision),
        device=torch.cuda.get_device_name(rt.device) if on_gpu else "CPU",
        samples=job.batch_size,
        targets_per_sample=shape_targets(batch),
        parameters=sum(p.numel() for p in model.parameters()),
        layers=said,
    )
    flops, found.flops_formula = flops_per_sample(model, batch)
    found.flops_per_sample = flops or 0.0
    sums, clock, gradient = [], _Clock(rt), np.zeros(0, dtype=np.float32)
    step, window_began = 0, time.perf_counter()
    while step < steps:
        # A short warm-up of the rate: what is compared is arithmetic, not a schedule.
        optim.set_lr(optimizer, job.lr * min(1.0, (step + 1) / max(steps // 5, 1)))
        seed_everything(job.seed, step, rt.rank)
        clock.start()
        done = stepper(feed.take(step))
        clock.stop()
        if done.overflow:
            found.overflows += 1
            found.culprit = first_nonfinite_grad(model)
            assert scale is not None
            scale.update(overflow=True)
            if found.overflows > _MAX_OVERFLOWS:
                raise ImpossibleJobError(f"the gradient overflowed {found.overflows} times, first in {found.culprit}, down to a loss scale of {scale.scale:g}")
            clock.forget()
            continue
        if step == 0:
            gc.freeze()  # as the loop does
            gradient = sample_gradient(model, 1.0 if scale is None else scale.scale)
            found.memory_gb |= {
                "parameters": held_gb(weights_of(model)),
                "gradients": held_gb(optim.gradients_of(model)),
                "optimizer": held_gb(optim.state_by_name(optimizer, model).values()),
            }
        sums.append(torch.stack([done.loss_sum.double(), done.targets.double()]))
        step += 1
        if window and step % window == 0:
            sums[-1].tolist()  # waits for the GPU
            now = time.perf_counter()
            found.window_s.append(now - window_began)
            window_began = now
    feed.close()
    found.losses = [total / count for total, count in torch.stack(sums).cpu().tolist()]
    seconds = clock.seconds()
    found.first_step_s = round(seconds[0], 3)
    steady = sorted(1000 * one for one in seconds[warm_up:])
    found.step_ms, found.step_ms_p95 = statistics.median(steady), steady[min(len(steady) - 1, int(0.95 * len(steady)))]
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    known = sum(value for value in found.memory_gb.values() if value is not None)
    found.memory_gb |= {"peak": peak, "activations": None if peak is None else max(peak - known, 0.0)}
    return found, gradient


def peak_gb(job: Job) -> float | None:
    """The most memory that two steps of this job take, GB; None where the GPU has too little."""
    forget()
    try:
        return measure(job, steps=2, warm_up=1)[0].memory_gb["peak"]
    except torch.OutOfMemoryError:
        return None


def forget() -> None:
    """Frees what earlier measurements in this process left: models are cycles of references, and `measure` takes what there is
    after its first step out of the garbage collector's sight."""
    gc.unfreeze()
    # What was compiled holds on to the model it was compiled for, and would make the next size a dynamic one.
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, and the fp32 masters behind 16-bit ones."""
    return [tensor for p in model.parameters() for tensor in ({id(p): p, id(optim.fp32_of(p)): optim.fp32_of(p)}).values()]


def held_gb(tensors: Any) -> float:
    """Bytes of these tensors in GB (10^9), those on the device only."""
    return float(sum(t.numel() * t.element_size() for t in tensors if t.ndim)) / 1e9


def sample_gradient(model: nn.Module, scale: float) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Every k-th entry of every gradient, in the order of the parameters, in fp32 without loss scale: [at most about a million]."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    stride = max(sum(g.numel() for g in gradients) // _GRADIENT_ENTRIES, 1)
    parts = [(g.detach().reshape(-1)[::stride].float() / scale).cpu().numpy() for g in gradients]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def cosine(a: "np.ndarray[Any, Any]", b: "np.ndarray[Any, Any]") -> float | None:
    """Of the angle between two gradients [n]; None where they are not of one model."""
    if a.shape != b.shape:
        return None
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else None


class _Clock:
    """Times of steps: by events on a GPU, which is not waited for, by the wall clock elsewhere."""

    def __init__(self, rt: Distributed):
        self._gpu = rt.device.type == "cuda"
        self._pairs: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self._pairs.append((self._now(), None))

    def stop(self) -> None:
        self._pairs[-1] = (self._pairs[-1][0], self._now())

    def forget(self) -> None:
        """The last step does not count."""
        self._pairs.pop()

    def seconds(self) -> list[float]:
        if not self._gpu:
            return [end - begin for begin, end in self._pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in self._pairs]

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def hardware() -> dict[str, Any]:
    """What this machine has: device, architecture (90 for sm_90), memory in GB, and the fp8 backends that can be imported."""
    if not torch.cuda.is_available():
        return {"device": "CPU", "arch": None, "memory_gb": None, "fp8": [], "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "arch": properties.major * 10 + properties.minor,
        "memory_gb": properties.total_memory / 1e9,
        "fp8": [name for name, module in (("te", "transformer_engine.pytorch"), ("torchao", "torchao.float8")) if _can_import(module)],
        "torch": torch.__version__,
    }


def _can_import(module: str) -> bool:
    import importlib

    try:
        importlib.import_module(module)
    except Exception:  # a library built against another torch raises whatever it likes
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m train.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", action="store_true", help="only say what this machine has")
    parser.add_argument("--job", type=Path, help="resolved job file")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--largest", action="store_true", help="also look for the largest micro-batch")
    parser.add_argument("--out", type=Path, required=True, help="file for the result, as JSON")
    parser.add_argument("--keep-gradient", type=Path, help="file for entries of the first gradient (.npy)")
    parser.add_argument("--compare-gradient", type=Path, help="such a file, to take the cosine with")
    args = parser.parse_args()
    try:
        if args.hardware:
            args.out.write_text(json.dumps(hardware()))
            return 0
        job = load(args.job)
        found, gradient = measure(job, args.steps, args.warm_up)
        if args.keep_gradient:
            np.save(args.keep_gradient, gradient)
        other = args.keep_gradient or args.compare_gradient
        if other and other.exists():
            found.cosine = cosine(gradient, np.load(other))
        result = asdict(found)
        if args.largest and found.memory_gb["peak"] is not None:
            memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
            result["largest_micro_batch"], result["largest_peak_gb"] = largest_micro_batch(
                job, found.samples, found.memory_gb, memory_gb, peak_gb, expected_to_fit(job, memory_gb)
            )
    except HoldfastError as err:
        args.out.write_text(json.dumps({"refused": str(err)}))
        return 0
    except torch.OutOfMemoryError as err:
        args.out.write_text(json.dumps({"refused": f"does not fit: {str(err).splitlines()[0]}"}))
        return 0
    args.out.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

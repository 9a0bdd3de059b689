"""What spreading a step over GPUs costs, by the way it is spread: the step alone on every GPU at once, then with gradients reduced.

    python -m benchmarks.scaling [--gpus 2] [--shape 1b] [--steps 15] [--batch 14] [--only DDP] [--json figures.json] [--trace FOLDER] [KEY=value ...]

One process a GPU. Each builds the model of the job once; every variant wraps it anew and trains some steps of the loop's own step function
after a warm-up. Milliseconds are medians of the slowest rank, by the GPU's own events. Alone, a step reduces nothing but three numbers: that is what one GPU
does while its neighbours are as busy. It is measured before and after every variant, since cards grow warm, and the share is that of the mean of the two. With
PARALLEL=fsdp the weights are sharded: one variant, with nothing to compare in the same call; `--only none` without it says what these weights take alone.
With --trace three more steps of each are traced on rank 0, and a row says where the GPU's time went in them (benchmarks/trace.py).
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import train  # noqa: F401  before torch, for which it chooses how memory is taken
from benchmarks import trace
from benchmarks.peer_loops import SHAPES

_WARM_UP = 6
_TRACED = 3


@dataclass(frozen=True)
class Variant:
    """How gradients travel. bucket_mb: of DDP, that of the job where it is None. ctas: programs that NCCL may run at once. first: its stream before that of the products."""

    name: str
    bucket_mb: int | None = None
    ctas: int | None = None
    first: bool = False
    static: bool = False


VARIANTS = (
    Variant("DDP"),
    Variant("DDP, buckets of 25 MB", bucket_mb=25),
    Variant("DDP, buckets of 100 MB", bucket_mb=100),
    Variant("DDP, buckets of 200 MB", bucket_mb=200),
    Variant("DDP, buckets of 400 MB", bucket_mb=400),
    Variant("DDP, buckets of 2 GB", bucket_mb=2000),
    Variant("DDP, all at once", bucket_mb=10_000),
    Variant("DDP, 8 programs", ctas=8),
    Variant("DDP, 4 programs", ctas=4),
    Variant("DDP, high priority", first=True),
    Variant("DDP, 8 programs, high priority, 100 MB", bucket_mb=100, ctas=8, first=True),
    Variant("DDP, static graph, 100 MB", bucket_mb=100, static=True),
)
NAMES = tuple(variant.name for variant in VARIANTS)


def ranks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """In each of the processes. The rows of rank 0 are those of all."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from benchmarks.peers import chosen, words_of
    from launcher.submission.create_run import resolve_here
    from train import optim, perf_flags
    from train.build import build, open_split
    from train.data.loader import TrainLoader
    from train.distributed import runtime
    from train.distributed.parallel import ddp_options, is_sharded
    from train.precision.numerics import GradScaler
    from train.rng import seed_everything
    from train.train_step import TrainStep

    shape = SHAPES[args.shape]
    shape = replace(shape, batch=args.batch or shape.batch)
    job = resolve_here([*words_of(shape, args.words, args.folder, args.gpus), "DATA=synthetic", "MAX_STEPS=1000"], os.environ, Path.cwd()).job
    rt = runtime.init(job)
    gpu = rt.device.type == "cuda"
    seed_everything(job.seed, step=0)
    data = open_split(job, "train")
    inner, context = build(job, data, rt, lambda text: None)
    perf_flags.apply(job, inner, data, rt.device)
    optimizer = optim.build(job, inner)
    feed = TrainLoader(job, rt, data)
    inner.train()
    batch = feed.peek(0)
    step = 0

    def group(variant: Variant) -> Any:
        if not gpu or (variant.ctas is None and not variant.first):
            return None
        options = dist.ProcessGroupNCCL.Options()
        options.is_high_priority_stream = variant.first
        if variant.ctas is not None:
            options.config.max_ctas = variant.ctas
        return dist.new_group(backend="nccl", pg_options=options)

    def timed(model: Any, warm_up: bool = True) -> dict[str, Any]:
        """step_ms; on a GPU what torch had allocated and reserved at most by then, of both ranks this one's."""
        nonlocal step
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        stepper = TrainStep(job, rt, model, inner, optimizer, context, GradScaler.from_job(job))
        if warm_up:
            stepper.warm_up(batch)
        events, begun = [], time.perf_counter()
        for number in range(_WARM_UP + args.steps):
            begun = time.perf_counter() if number == _WARM_UP else begun
            optim.set_lr(optimizer, 1e-5)
            stepper(feed.take(step))
            step += 1
            if gpu:
                events.append(torch.cuda.Event(enable_timing=True))
                events[-1].record()
        found = [1000 * (time.perf_counter() - begun) / args.steps]
        if gpu:
            torch.cuda.synchronize()
            found = [begin.elapsed_time(end) for begin, end in itertools.pairwise(events[_WARM_UP - 1 :])]
        if args.trace:
            traced(stepper)
        slowest = torch.tensor(statistics.median(found), device=rt.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        inner.zero_grad(set_to_none=True)
        figures = {"step_ms": round(slowest.item(), 2)}
        if gpu:
            figures |= {"allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1), "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 1)}
        return figures

    # What traces have shown, in the order of the rows that will say it.
    told: list[dict[str, Any]] = []

    def traced(stepper: Any) -> None:
        """Every rank makes the steps under the profiler, which slows all of them alike; rank 0's is kept. On a GPU without torch's operators, whose
        recording would cost the lead that Python has."""
        nonlocal step
        kinds = [torch.profiler.ProfilerActivity.CUDA] if gpu else None
        with torch.profiler.profile(activities=kinds) as profile:
            for _ in range(_TRACED):
                stepper(feed.take(step))
                step += 1
            if gpu:
                torch.cuda.synchronize()
        if rt.is_main:
            file = args.trace / f"{step}.json.gz"
            profile.export_chrome_trace(str(file))
            told.append({"trace": file.name, "ms_of_a_step": trace.summary(trace.read(file), _TRACED)})

    def say(row: dict[str, Any]) -> None:
        row |= told.pop(0) if told else {}
        rows.append(row)
        if rt.is_main:
            print(json.dumps(row), flush=True)

    rows: list[dict[str, Any]] = []
    if is_sharded(inner):
        say({"variant": "FSDP2"} | timed(inner))
    else:
        say({"variant": "alone"} | timed(inner))
        for variant in [one for one in VARIANTS if any(chosen(word, one.name, NAMES) for word in args.only.split(";"))]:
            before = rows[-1]["step_ms"]
            wrapped = DistributedDataParallel(
                inner, device_ids=[rt.device.index] if gpu else None, process_group=group(variant), static_graph=variant.static,
                **(ddp_options(job, inner) | ({"bucket_cap_mb": variant.bucket_mb} if variant.bucket_mb else {})),
            )  # fmt: skip
            row = {"variant": variant.name} | timed(wrapped, warm_up=not variant.static)
            del wrapped
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()  # NCCL takes what a group needs beside torch's
            after = timed(inner)
            say(row | {"of_alone_pct": round(50 * (before + after["step_ms"]) / row["step_ms"], 1)})
            say({"variant": "alone"} | after)
    feed.close()
    dist.destroy_process_group()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, help="sequences a GPU: fewer where the memory does not do")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--only", default="", help="variants that have one of these names, or one of these texts in their name; separated by semicolons")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path, help="folder for traces")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help="of the job: PRECISION=bf16 AMP_OPT_LEVEL=O2 when there are none")
    args = parser.parse_args()
    args.words = args.words or ["PRECISION=bf16", "AMP_OPT_LEVEL=O2"]
    if "LOCAL_RANK" not in os.environ:
        if args.trace:
            args.trace.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="hf-scaling-") as folder:
            launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(args.gpus), "-m", "benchmarks.scaling", "--folder", folder]
            return subprocess.run([sys.executable, "-m", *launch, *sys.argv[1:]], timeout=900).returncode
    rows = ranks(args)
    if os.environ["LOCAL_RANK"] == "0":
        for row in rows:
            print(
                f"{row['variant']:42} {row['step_ms']:8.2f} ms"
                + (f"  {row['of_alone_pct']:5.1f} %" if "of_alone_pct" in row else "")
                + (f"  {row['ms_of_a_step']}" if row.get("ms_of_a_step") else "")
            )
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

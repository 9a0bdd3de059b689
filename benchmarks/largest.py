"""The largest micro-batch of each precision for the presets, on this GPU, with its peak beside what `holdfast explain` expects of it.

    python -m benchmarks.largest [--models 1b,3b,8b] [--only bf16] [--recompute no] [--limit-s 500] [--json figures.json] [--out table.md]

Sequences of 2,048 tokens, compiled, 16-bit weights (O2) where there are any, with and without GRAD_CHECKPOINTING. Each cell is a process
of its own (train/bench.py) on a GPU of its own: two steps of a small micro-batch say what a sample takes, then the guess is tried out and
made smaller or larger, so a figure is the largest to within 7 %.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.hardware import PRECISIONS, available
from jobs.config.memory_estimate import estimate
from jobs.config.settings import Job
from jobs.config.yaml_io import dump_yaml
from launcher.submission.create_run import resolve_here

_NAMES = ("bf16 O2", "fp16 O2", "fp8 te current", "fp8 torchao tensorwise", "fp32", "tf32")
_SHAPE = ["SEQ_LEN=2048", "DATA=synthetic", "COMPILE=true", "DEVICE=cuda", "NODES=1", "GPUS_PER_NODE=1", "SITE=generic"]
# Sequences of the first try: enough that what does not grow with them is little beside what does.
_FIRST = {"1b": 4, "3b": 2, "8b": 1}


def job_of_cell(model: str, precision: str, recompute: bool) -> Job:
    """The job whose micro-batch is made larger, with that of the first try."""
    first = _FIRST[model]
    words = [
        f"MODEL={model}",
        *_SHAPE,
        f"BATCH_SIZE={first}",
        f"MICRO_BATCH_SIZE={first}",
        *PRECISIONS[precision],
        *(["AMP_OPT_LEVEL=O2"] if precision.startswith("fp8") else []),
        f"GRAD_CHECKPOINTING={str(recompute).lower()}",
    ]
    return resolve_here(words, os.environ, Path.cwd()).job


def cell(model: str, precision: str, recompute: bool, folder: Path, gpu: str, limit_s: int) -> dict[str, Any]:
    """What was found for one model in one precision: `largest` micro-batch, its `peak_gb` and the `expected_gb`; or `why` there is none."""
    job = job_of_cell(model, precision, recompute)
    place, out = (folder / f"{model}-{precision.replace(' ', '-')}-{recompute}{ending}" for ending in (".yaml", ".json"))
    place.write_text(dump_yaml(job.model_dump(mode="json")))
    begun = time.monotonic()
    command = [sys.executable, "-m", "train.bench", "--job", str(place), "--steps", "2", "--warm-up", "1", "--largest", "--out", str(out)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu})
        why = "; ".join(done.stderr.strip().splitlines()[-1:]) or f"ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        why = f"not found within {limit_s} s"
    found = json.loads(out.read_text()) if out.exists() else {"refused": why}
    row: dict[str, Any] = {"model": model, "precision": precision, "recompute": recompute, "took_s": round(time.monotonic() - begun)}
    if "refused" in found:
        return row | {"largest": None, "why": str(found["refused"])[:160]}
    largest = found["largest_micro_batch"]
    return row | {"largest": largest, "peak_gb": round(found["largest_peak_gb"], 1), "expected_gb": expected_gb(job, largest)}


def expected_gb(job: Job, samples: int) -> float | None:
    """What `holdfast explain` says of the peak at this micro-batch, GB."""
    found = estimate(job.model_copy(update={"batch_size": samples, "micro_batch_size": samples, "grad_accum_steps": 1}))
    return round(found.peak / 1e9, 1) if found else None


def visible() -> list[str]:
    """The GPUs of this machine that this process may use."""
    import torch

    there = [str(number) for number in range(torch.cuda.device_count())]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[: len(there)] if named else there


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in the order of the models and precisions."""
    lines = ["| model | precision | recomputed | largest | peak, GB | expected, GB |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["model"], _NAMES.index(row["precision"]), row["recompute"])):
        figures = [row["largest"], row["peak_gb"], row["expected_gb"]] if row["largest"] else ["none", row["why"], ""]
        lines.append(f"| {row['model']} | {row['precision']} | {'yes' if row['recompute'] else ''} | " + " | ".join(str(one) for one in figures) + " |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.largest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1b,3b,8b")
    parser.add_argument("--only", default="", help="precisions whose name has one of these texts, separated by semicolons")
    parser.add_argument("--recompute", choices=("yes", "no"), help="only with, or only without GRAD_CHECKPOINTING")
    # About five models are built and compiled; in fp32 a step of an 8b takes more than a minute.
    parser.add_argument("--limit-s", type=int, default=500, help="seconds that a cell may take")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="file for the table, as Markdown")
    args = parser.parse_args()
    names = available([name for name in _NAMES if not args.only or any(word in name for word in args.only.split(";"))])
    models, gpus = args.models.split(","), visible()
    if unknown := [model for model in models if model not in _FIRST]:
        parser.error(f"--models {','.join(unknown)}: the presets are {', '.join(_FIRST)}")
    if not names:
        parser.error(f"--only {args.only}: of {', '.join(_NAMES)} none has it in its name, or its library is not installed")
    if not gpus:
        parser.error("this machine shows no GPU that torch can use")
    rows: list[dict[str, Any]] = []
    free: SimpleQueue[str] = SimpleQueue()
    for gpu in gpus:
        free.put(gpu)

    def on_a_free_gpu(model: str, precision: str, recompute: bool, folder: Path) -> dict[str, Any]:
        gpu = free.get()
        try:
            return cell(model, precision, recompute, folder, gpu, args.limit_s)
        finally:
            free.put(gpu)

    with tempfile.TemporaryDirectory(prefix="hf-largest-") as folder, ThreadPoolExecutor(len(gpus)) as pool:
        cells = itertools.product(models, names, [one for one in (False, True) if args.recompute in (None, "yes" if one else "no")])
        for done in as_completed([pool.submit(on_a_free_gpu, *one, Path(folder)) for one in cells]):
            rows.append(done.result())
            print(json.dumps(rows[-1]), flush=True)
            # After each cell: what was measured is not lost with the machine.
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))
            if args.out:
                args.out.write_text(table(rows))
    print("\n" + table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

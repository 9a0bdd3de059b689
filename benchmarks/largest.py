"""The largest micro-batch of each precision for the presets, on this GPU, beside what `holdfast explain` expects of it.

    python -m benchmarks.largest [--models 1b,3b,8b] [--only bf16] [--json figures.json]

Sequences of 2,048 tokens, compiled, 16-bit weights (O2) where there are any, with and without GRAD_CHECKPOINTING. Each cell is a process
of its own (train/bench.py): two steps of a small micro-batch say what a sample takes, then the guess is tried out and made smaller or
larger, so a figure is the largest to within 7 %.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.hardware import PRECISIONS, available
from jobs.memory import estimate
from jobs.settings import Job
from jobs.yaml_text import dump_yaml
from launcher.prepare import resolve_here

_NAMES = ("bf16 O2", "fp16 O2", "fp8 te current", "fp8 torchao tensorwise", "fp32")
_SHAPE = ["SEQ_LEN=2048", "DATA=synthetic", "COMPILE=true", "DEVICE=cuda", "NODES=1", "GPUS_PER_NODE=1", "SITE=generic"]
# Sequences of the first try: enough that what does not grow with them is little beside what does.
_FIRST = {"1b": 4, "3b": 2, "8b": 1}


def cell(model: str, precision: str, recompute: bool, folder: Path) -> dict[str, Any]:
    """What was found for one model in one precision."""
    first = _FIRST.get(model, 4)
    words = [
        f"MODEL={model}",
        *_SHAPE,
        f"BATCH_SIZE={first}",
        f"MICRO_BATCH_SIZE={first}",
        *PRECISIONS[precision],
        *(["AMP_OPT_LEVEL=O2"] if precision.startswith("fp8") else []),
        f"GRAD_CHECKPOINTING={str(recompute).lower()}",
    ]
    job = resolve_here(words, os.environ, Path.cwd()).job
    place, out = folder / "job.yaml", folder / "out.json"
    place.write_text(dump_yaml(job.model_dump(mode="json")))
    out.unlink(missing_ok=True)
    begun = time.monotonic()
    command = [sys.executable, "-m", "train.bench", "--job", str(place), "--steps", "2", "--warm-up", "1", "--largest", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = json.loads(out.read_text()) if out.exists() else {"refused": done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]}
    row: dict[str, Any] = {"model": model, "precision": precision, "recompute": recompute, "took_s": round(time.monotonic() - begun)}
    if "refused" in found:
        return row | {"largest": None, "why": str(found["refused"])[:160]}
    largest = found["largest_micro_batch"]
    return row | {"largest": largest, "expected_gb": expected_gb(job, largest)}


def expected_gb(job: Job, samples: int) -> float | None:
    """What `holdfast explain` says of the peak at this micro-batch, GB."""
    found = estimate(job.model_copy(update={"batch_size": samples, "micro_batch_size": samples, "grad_accum_steps": 1}))
    return round(found.peak / 1e9, 1) if found else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.largest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1b,3b,8b")
    parser.add_argument("--only", default="", help="precisions whose name has one of these texts, separated by semicolons")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = available([name for name in _NAMES if not args.only or any(word in name for word in args.only.split(";"))])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hf-largest-") as folder:
        for model in args.models.split(","):
            for precision in names:
                for recompute in (False, True):
                    rows.append(cell(model, precision, recompute, Path(folder)))
                    print(json.dumps(rows[-1]), flush=True)
                    if args.json:
                        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

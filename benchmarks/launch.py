"""`make bench-launch`: what launching costs. Medians of repeated runs on this machine; the Slurm part on a private lab.

    python -m benchmarks.launch [--repeat 20]
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jobs import ledger
from jobs.rundir import RunDir
from slurm import lab

HOLDFAST = str(Path(sys.executable).with_name("holdfast"))
TINY = ["MODEL_OPTIONS=n_layers=1,d_model=64,n_heads=2,d_ff=128", "SEQ_LEN=64", "BATCH_SIZE=16", "MAX_STEPS=2", "EVAL_SAMPLES=8", "NODES=2", "GPUS_PER_NODE=2"]


def seconds(command: list[str], repeat: int, environ: dict[str, str] | None = None) -> tuple[float, float]:
    """Median and maximum wall time of a command, after one unmeasured run."""
    times = []
    for index in range(repeat + 1):
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environ)
        if index:
            times.append(time.perf_counter() - begun)
    return statistics.median(times), max(times)


def until(condition: Callable[[], bool], limit_s: float) -> float:
    begun = time.perf_counter()
    while not condition():
        if time.perf_counter() - begun > limit_s:
            raise SystemExit(f"waited {limit_s:.0f} s in vain")
        time.sleep(0.01)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {args.repeat} repetitions, median (maximum)")
    base, worst = seconds([sys.executable, "-c", "pass"], args.repeat)
    print(f"python -c pass           {base * 1e3:7.1f} ms ({worst * 1e3:.1f})")
    # A render whose inputs are all as they were is answered from what was kept; the other one has never seen its words.
    rows: tuple[tuple[str, list[str], dict[str, str] | None], ...] = (
        ("holdfast render", [HOLDFAST, "render"], None),
        ("  of words never seen", [HOLDFAST, "render"], {**os.environ, "XDG_CACHE_HOME": "/proc/nowhere"}),
        ("holdfast --help", [HOLDFAST, "--help"], None),
    )
    for name, command, environ in rows:
        median, worst = seconds(command, args.repeat, environ)
        print(f"{name:24} {median * 1e3:7.1f} ms ({worst * 1e3:.1f})   {median / base:.1f} x python -c pass")
    missing = lab.missing_programs()
    if missing:
        print(f"left out: submit and start, which need {', '.join(missing)}")
        return
    room = Path(tempfile.mkdtemp(prefix="hf-bench-", dir="/tmp"))
    room.chmod(0o755)
    here = lab.start(room / "lab", lab.LabConfig())
    try:
        environ = {**os.environ, **here.env(), "HOLDFAST_SITE": "lab", "RUNS_DIR": str(room / "runs")}
        submits, starts, steps = [], [], []
        for _ in range(3):
            begun = time.perf_counter()
            done = subprocess.run([HOLDFAST, "submit", "--json", *TINY], env=environ, check=True, capture_output=True, text=True)
            submits.append(time.perf_counter() - begun)
            run = RunDir(Path(json.loads(done.stdout)["path"]))
            until(lambda run=run: any(e["event"] == "start" for e in ledger.read(run.ledger)), 60)
            starts.append(time.perf_counter() - begun)
            until(lambda run=run: run.metrics.exists() and run.metrics.stat().st_size > 0, 120)
            steps.append(time.perf_counter() - begun)
            until(lambda run=run: any(e["event"] == "end" for e in ledger.read(run.ledger)), 60)
        print(f"holdfast submit          {statistics.median(submits):7.2f} s    one process, run directory with code snapshot, two sbatch calls")
        print(f"submit to attempt begun  {statistics.median(starts):7.2f} s")
        print(f"submit to first step     {statistics.median(steps):7.2f} s    2 nodes x 2 ranks, imports of torch on {os.cpu_count()} cores included")
        begun = time.perf_counter()
        subprocess.run([HOLDFAST, "submit", "--json", "--array", "SEED=1..20", *TINY[:-2], "ARRAY_PARALLEL=1"], env=environ, check=True, capture_output=True)
        print(f"array of 20 runs         {time.perf_counter() - begun:7.2f} s    one sbatch, {(time.perf_counter() - begun) / 20 * 1e3:.0f} ms per run")
    finally:
        here.stop()
        shutil.rmtree(room, ignore_errors=True)


if __name__ == "__main__":
    main()

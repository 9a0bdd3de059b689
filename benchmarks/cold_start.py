"""How long an attempt takes to its first step: without caches, on another node, and on the same node. On one GPU.

    python -m benchmarks.cold_start [--precision bf16] [--json figures.json] [KEY=value ...]

One run of jobs/gpt_1b_h100.yaml whose rank is killed twice. The first attempt finds nothing; before the second the node's compile caches
are emptied, as on another node, and what the run's folder holds has to do; the third finds both. Seconds are from the START
line of the attempt to the line of its first step in metrics.jsonl, the loading of 15 GB of checkpoint included. Beside them: the longest
of the later steps, which the preparation of saves must not hold up, and how long each save took.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.hardware import train
from jobs.checkpoint.directory import complete
from jobs.core.contract import Event
from jobs.run import event_log, metrics_log
from jobs.run.rundir import RunDir
from launcher.local.executor import pid_of_rank

REPOSITORY = Path(__file__).resolve().parents[1]
_EVERY = 8
_ATTEMPTS = ("no cache", "another node: caches emptied", "the same node")


def first_step_s(run: RunDir, number: int) -> float:
    """From the START line of an attempt to the line of its first step in metrics.jsonl, seconds."""
    attempt = next(one for one in event_log.attempts(event_log.read(run.ledger)) if one.number == number)
    return float(next(line["time"] for line in metrics_log.read(run.metrics) if line["attempt"] == number)) - attempt.started


def longest_step_s(lines: list[dict[str, Any]], attempt: int) -> float:
    """The longest time between two lines of metrics, each a step, of one attempt."""
    times = [float(line["time"]) for line in lines if line["attempt"] == attempt]
    return round(max((after - before for before, after in itertools.pairwise(times)), default=0.0), 2)


def saves_s(run: RunDir, attempt: int) -> list[float]:
    """How long each save of an attempt took, in the background or not."""
    return [round(float(event["seconds"]), 1) for event in event_log.read(run.ledger) if event["event"] == Event.CHECKPOINT and event["attempt"] == attempt]


def _kill(run: RunDir, caches: Path, limit_s: float = 500) -> None:
    """Kills rank 0 when its attempt has saved, at the end of each but the last attempt, and says what is known by then; empties the
    caches the first time."""
    end = time.monotonic() + limit_s
    for attempt in range(1, len(_ATTEMPTS)):
        newest = _EVERY * attempt
        while not any(path.name == f"step-{newest:08}" for path in complete(run.checkpoints)):
            if time.monotonic() > end:
                return
            time.sleep(0.05)
        print(f"{_ATTEMPTS[attempt - 1]:32} first step after {first_step_s(run, attempt):.1f} s", flush=True)
        pid = pid_of_rank(run, 0)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        if attempt == 1:
            shutil.rmtree(caches, ignore_errors=True)


def measure(precision: list[str], words: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="hf-start-") as folder:
        caches = Path(folder) / "caches"
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
        run = RunDir(Path(folder) / "quickstart-start")
        killer = threading.Thread(target=_kill, args=(run, caches), daemon=True)
        killer.start()
        shape = [
            str(REPOSITORY / "jobs" / "gpt_1b_h100.yaml"),
            *precision,
            "JOB_NAME=quickstart",
            "DATA=synthetic",
            "SITE=generic",
            "DEVICE=cuda",
            "LOG_EVERY=1",
        ]
        steps = [f"MAX_STEPS={3 * _EVERY}", f"CHECKPOINT_EVERY={_EVERY}", "EVAL_EVERY=0", "EVAL_SAMPLES=16", "KEEP_LAST=1", "MAX_KILLED=9", "MAX_NO_PROGRESS=9"]
        train(Path(folder), "start", [*shape, *steps, *words], timeout=560)
        killer.join(1)
        lines, rows = metrics_log.read(run.metrics), []
        for what, attempt in zip(_ATTEMPTS, event_log.attempts(event_log.read(run.ledger)), strict=True):
            first = next(line for line in lines if line["attempt"] == attempt.number)
            clock = json.loads(run.attempt(attempt.number).clock.read_text()) if run.attempt(attempt.number).clock.exists() else {}
            row = {"what": what, "first step after, s": round(first_step_s(run, attempt.number), 1), "step": first["step"], "clock": clock}
            rows.append(row | {"longest step, s": longest_step_s(lines, attempt.number), "saves, s": saves_s(run, attempt.number)})
        return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16", help="words of the job, separated by commas: fp8,FP8_BACKEND=te")
    parser.add_argument("--json", type=Path)
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    first, *more = args.precision.split(",")
    rows = measure([f"PRECISION={first}", *more], args.words)
    for row in rows:
        print(
            f"{args.precision:24} {row['what']:32} first step after {row['first step after, s']} s (step {row['step']}), longest later one {row['longest step, s']} s, saves {row['saves, s']} s"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Run directories as a busy month leaves them, for measuring and testing what looks at many of them.

python -m benchmarks.many_runs FOLDER [--runs 1000] [--lines 500]
"""

import argparse
import itertools
import json
import math
import os
import random
import time
from pathlib import Path

from jobs.config.yaml_io import dump_yaml
from jobs.core.contract import Cause, Event
from jobs.run import store
from jobs.run.rundir import RunDir
from launcher.submission.create_run import resolve_here

# What the last attempt of a run came to, in turn; None still runs, "waiting" has never begun.
_ENDS: tuple[Cause | str | None, ...] = (Cause.FINISHED, Cause.FINISHED, None, Cause.CODE_ERROR, "waiting", Cause.PREEMPTED, Cause.CANCELLED, Cause.FINISHED)
_STEPS_PER_LINE = 10


def make(folder: Path, runs: int, lines: int = 500, seed: int = 0, first_job: int = 100) -> list[RunDir]:
    """So many runs in `folder`, each with settings, a ledger of three attempts with checkpoints, and so many lines of metrics."""
    rng = random.Random(seed)
    steps = lines * _STEPS_PER_LINE
    resolved = resolve_here([f"MAX_STEPS={steps}", "CHECKPOINT_EVERY=500"], {}, Path("/nowhere"))
    settings = dump_yaml(resolved.job.model_dump(mode="json"))
    now = time.time()
    text = _metrics(lines, now - 7200, rng)
    ids = itertools.cycle(_ENDS)
    made = []
    for index in range(runs):
        run = store.place(folder, "quickstart", f"{index:04d}")
        run.logs.mkdir(parents=True)
        run.job_yaml.write_text(settings)
        run.origins.write_text(json.dumps(resolved.origins, indent=1) + "\n")
        end = next(ids)
        last_step = 0 if end == "waiting" else steps if end is Cause.FINISHED else steps * (index % 90 + 5) // 100
        begun = now - 7200 + index
        _write_ledger(run, str(first_job + index), begun, last_step, end)
        if last_step:
            run.metrics.write_text("".join(text[: last_step // _STEPS_PER_LINE]))
            run.attempt(3).path.mkdir(parents=True)
            run.attempt(3).progress.write_text(f"{last_step:<12d}")
        made.append(run)
    return made


def _write_ledger(run: RunDir, job_id: str, begun: float, last_step: int, end: Cause | str | None) -> None:
    lines = [{"event": Event.SUBMITTED, "attempt": 0, "job_id": job_id, "time": begun, "by": "submitit"}]

    def add(event: Event, attempt: int, step: int, **fields: object) -> None:
        lines.append({"event": event, "attempt": attempt, "job_id": job_id, "time": round(begun + step, 3), "step": step, **fields})

    if last_step:
        borders = [0, last_step // 3, last_step * 2 // 3, last_step]
        for attempt in (1, 2, 3):
            start, stop = borders[attempt - 1], borders[attempt]
            add(Event.START, attempt, start, nodes=["node1", "node2"], world=4, restarts=attempt - 1, host="node1")
            add(Event.RESUMED, attempt, start)
            for step in range(start - start % 500 + 500, stop + 1, 500):
                add(Event.CHECKPOINT, attempt, step, seconds=1.2, bytes=5_900_000)
            cause = Cause.PREEMPTED if attempt < 3 else end
            if isinstance(cause, Cause):
                add(
                    Event.END,
                    attempt,
                    stop,
                    cause=cause,
                    evidence="as the ledger of a benchmark says",
                    start_step=start,
                    saved_step=stop,
                    lost_steps=0,
                    seconds=600.0,
                )
            if attempt < 3:
                add(Event.REQUEUE, attempt, stop, way="requeued by holdfast")
    run.ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _metrics(lines: int, begun: float, rng: random.Random) -> list[str]:
    text = []
    for step in range(_STEPS_PER_LINE, lines * _STEPS_PER_LINE + 1, _STEPS_PER_LINE):
        loss = 5.5 * math.exp(-step / 800) + 1.6 + rng.gauss(0, 0.05)
        rate = round(51_000 + rng.gauss(0, 500), 1)
        line = {
            "step": step,
            "loss": loss,
            "lr": 1e-3,
            "grad_norm": rng.random(),
            "tokens": step * 4096,
            "tokens_per_s": rate,
            "attempt": 1,
            "time": round(begun + step, 3),
        }
        text.append(json.dumps(line) + "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--lines", type=int, default=500)
    args = parser.parse_args()
    os.umask(0o022)
    made = make(args.folder, args.runs, args.lines)
    print(f"{len(made)} runs in {args.folder}")


if __name__ == "__main__":
    main()

"""A stop at every 50 ms of a save, with saves from a tenth of the grace to three times as long, by the signals that Slurm sends.

    PYTHONPATH=. python tests/support/save_sweep.py      every point, one JSON line each (`make chaos` runs it as row 27s)

TERM comes so long after a save began, and KILL when the grace is over. Real training and real saves, made longer; what is not
real here is Slurm, which sends the same two signals in rows 27a to 27g. Forked ranks begin in tenths of a second and several
points wait side by side, so that hundreds of them cost some minutes.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from conftest import REPOSITORY
from training import Farm, logs, result

from jobs.core.contract import Exit
from jobs.run import event_log, goodput
from jobs.run.rundir import RunDir
from launcher.local import executor

GRACE_S = 2.0
APART_S = 0.05
SHARES = (0.1, 0.4, 0.9, 1.5, 3.0)
INTERVAL = 8
WORKERS = 6
# What one step, the way to a step boundary and the end of a process may take on a busy machine.
_MARGIN_S = 0.9
_SETTINGS = {
    "MAX_STEPS": "40",
    "CHECKPOINT_EVERY": str(INTERVAL),
    "EVAL_EVERY": "0",
    "NODES": "1",
    "GPUS_PER_NODE": "1",
    "PREFLIGHT_S": "0",
    "HANG_AFTER_S": "0",
}


@dataclass(frozen=True)
class Point:
    """One stop. `fits`: the rest of the save that runs and one more save are done before the grace is over."""

    save_s: float
    after_s: float
    fits: bool
    lost: int
    causes: list[str]
    identical: bool
    attempts: list[dict[str, float]]


def points() -> list[tuple[float, float]]:
    """(seconds of a save, seconds after its beginning)"""
    return [(share * GRACE_S, number * APART_S) for share in SHARES for number in range(round(share * GRACE_S / APART_S))]


def stop_in_a_save(farm: Farm, plain: object, save_s: float, after_s: float) -> Point:
    run = farm.prepare(**_SETTINGS, NODE_ENV=f"SLOW_SAVE_S={save_s}")
    code = farm.train(run, lambda here, run: _stop(here, run, after_s))
    assert code == Exit.DONE, logs(run)
    known = event_log.attempts(event_log.read(run.ledger))
    spent = [{"seconds": one.seconds, **one.parts_s} for one in goodput.account(event_log.read(run.ledger)).attempts]
    fits = (save_s - after_s) + save_s + _MARGIN_S <= GRACE_S
    return Point(save_s, after_s, fits, sum(one.lost_steps for one in known), [str(one.cause) for one in known], result(run) == plain, spent)


def _stop(farm: Farm, run: RunDir, after_s: float) -> None:
    limit = time.monotonic() + 60
    while not any(name.startswith(".step-") for name in (os.listdir(run.checkpoints) if run.checkpoints.is_dir() else [])):
        assert time.monotonic() < limit, "no save began"
        time.sleep(0.002)
    time.sleep(after_s)
    ranks = list(farm.ranks)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    limit = time.monotonic() + GRACE_S
    while time.monotonic() < limit and any(rank.poll() is None for rank in ranks):
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()


def work(todo: list[tuple[float, float]], root: Path) -> None:
    farm = Farm(root)
    executor.spawn = farm.spawn  # type: ignore[assignment]
    try:
        plain = result(farm.finished(**_SETTINGS))
        farm.before = "slow_first_saves"
        for save_s, after_s in todo:
            print(json.dumps(asdict(stop_in_a_save(farm, plain, save_s, after_s))), flush=True)
    finally:
        farm.close()


def sweep(todo: list[tuple[float, float]], workers: int = WORKERS) -> list[Point]:
    """All points, several at a time. Raises where a worker failed."""
    found: list[Point] = []
    faults: list[str] = []

    def one(index: int) -> None:
        mine = todo[index::workers]
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(mine)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(str(REPOSITORY / place) for place in ("", "tests", "tests/support"))},
            capture_output=True,
            text=True,
            timeout=3000,
        )
        found.extend(Point(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{"))
        if done.returncode:
            faults.append(done.stderr[-2000:])

    threads = [threading.Thread(target=one, args=(index,)) for index in range(min(workers, len(todo)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults[0]
    assert len(found) == len(todo)
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory(prefix="hf-sweep-") as folder:
            work([tuple(pair) for pair in json.loads(sys.argv[1])], Path(folder))
    else:
        for point in sweep(points()):
            print(json.dumps(asdict(point)))

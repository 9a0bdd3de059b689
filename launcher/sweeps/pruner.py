"""Giving up bad trials of a sweep: a process beside the ranks tells the study of each validation, and asks.

    python -m launcher.sweeps.pruner PID        beside srun, whose process is PID; ends when that one ends

A trial is given up by the run's stop file: the ranks save and leave at their next step, as for anybody who makes that file, and
what it says becomes the cause. Training knows nothing of sweeps. A trial that a person resumes after that is left alone.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jobs.core import safe_read
from jobs.core.atomic_write import create_file
from jobs.core.contract import PRUNED_WORD, Cause, RankEnv
from jobs.run import event_log
from jobs.run.claim import alive
from jobs.run.rundir import RunDir
from launcher import subprocesses

# Seconds between two looks at metrics.jsonl: one metadata call.
_POLL_S = 0.5
# Failures of the study in a row after which nothing is given up any more in this attempt.
_PATIENCE = 5


def beside(run: RunDir, pid: int) -> "subprocess.Popen[bytes] | None":
    """Starts the process where the run is a trial of a sweep that prunes; None elsewhere."""
    if not run.is_member:
        return None
    try:
        wanted = safe_read.read_object(run.array.sweep)["pruner"] != "none"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not wanted or was_pruned(run):
        return None
    return subprocess.Popen(
        subprocesses.command("launcher.sweeps.pruner", str(pid)), env={**os.environ, RankEnv.RUN_DIR: str(run.path)}, stdin=subprocess.DEVNULL
    )


def was_pruned(run: RunDir) -> bool:
    """Whether this run was given up before: then it runs because a person wants it to."""
    return any(attempt.cause is Cause.PRUNED for attempt in event_log.attempts(event_log.read(run.ledger)))


class Judge:
    """Looks at one trial's validations; `look` returns why it is given up, once."""

    def __init__(self, run: RunDir):
        from jobs.config.resolver import load
        from jobs.sweep import search_space

        self._run, self._number = run, int(run.path.name)
        self._sweep = search_space.load(run.array.sweep)
        self._max_steps = load(run.job_yaml).max_steps
        self._size, self._last, self._failures = -1, 0, 0
        self._study: Any = None
        self._journal = 0

    def look(self) -> str:
        """Reads what is new. A study that cannot be asked just now is asked again at the next validation."""
        from launcher.sweeps import study

        try:
            size = self._run.metrics.stat().st_size
        except OSError:
            return ""
        if size == self._size or self._failures >= _PATIENCE:
            return ""
        self._size = size
        curve = study.curve_of(self._run, self._sweep)
        last = max(curve, default=0)
        # At its last step there is nothing left to save.
        if last <= self._last or last >= self._max_steps:
            return ""
        try:
            journal = self._run.array.study.stat().st_ino
            if self._study is None or journal != self._journal:
                # Another file: it was written anew, and what Optuna remembers of the old one's lines does not fit.
                self._study = study.opened(self._run.array, self._sweep, self._number, repair=False)
                self._journal = journal
            study.update(self._study, self._run.array, self._sweep)
            study.report(self._study, self._number, curve)
            hopeless = study.is_hopeless(self._study, self._number)
        except Exception as err:  # an optimisation may fail; the training beside it must not
            self._failures += 1
            self._study = None
            self._size = -1
            print(f"holdfast: the study of {self._run.array.id} could not be asked: {type(err).__name__}: {err}", flush=True)
            return ""
        self._last, self._failures = last, 0
        if not hopeless:
            return ""
        return f"{PRUNED_WORD} at step {last}: {self._sweep.metric} {curve[last]:.4g}, worse than the median"


def give_up(run: RunDir, reason: str) -> None:
    """Makes the stop file, unless there is one."""
    create_file(run.stop_file, reason + "\n")


def main() -> int:
    pid = int(sys.argv[1])
    run = RunDir(Path(os.environ[RankEnv.RUN_DIR]))
    asked: list[int] = []
    # Not in the middle of a word to the study: others would wait for its lock.
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    judge = Judge(run)
    while alive(pid) and not asked:
        reason = judge.look()
        if reason:
            print(f"holdfast: {reason}; the run saves and ends", flush=True)
            give_up(run, reason)
            return 0
        time.sleep(_POLL_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Guard of a user script's step: forwards the warning of the time limit, ends the attempt before the limit, and kills ranks that outlive a failure.

    python -m launcher.attempt.step_guard SRUN_PID --signal auto --lead 120 --peer-wait 20 --world 8     beside srun

Slurm warns only the batch script of a user script, since a signal without a handler kills a process. The batch script creates
`AttemptDir.warned`; with --signal auto the ranks get USR2 once every rank has imported the helper, otherwise they get no signal.
Shortly before the limit the batch script gets ALRM: it ends the attempt and requeues the job, which Slurm does not do at a limit.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from jobs.core import safe_read
from jobs.core.atomic_write import replace_file
from jobs.core.contract import LEAD_SIGNAL, LOG_OFFSET, Exit, RankEnv
from jobs.core.errors import DamagedFileError, SubmitError
from jobs.run.claim import alive
from jobs.run.rundir import RunDir
from launcher.attempt.watchdog import kill_step
from slurm.allocation import local_time
from slurm.client import JobInfo, Slurm
from slurm.daemon_log import cancel_reasons

_POLL_S = 0.5
# Seconds before the limit at which the attempt is ended: the end of the attempt and the requeue must fit. At most half of the lead.
_MARGIN_S = 20.0
# Slurm warns up to 60 s early; a warning earlier than that is a preemption (preempt_send_user_signal).
_EARLY_S = 75.0
_FAILURE = re.compile(r"^srun: error: \S+: tasks? \[?(\d+)[^:]*: (?:Exited with exit code (\d+)|(?!Exited).*)$", re.M)


def first_failure(log: str) -> tuple[int, int] | None:
    """(task, exit code) of the first task that failed, from srun's messages; 137 stands for every signal. 75 is a stop and no failure."""
    for task, code in _FAILURE.findall(log):
        if code != str(int(Exit.REQUEUE)):
            return int(task), int(code) if code else 137
    return None


class Guard:
    """State of one attempt; `tick` is called about twice per second until srun has ended."""

    def __init__(self, run: RunDir, attempt: int, args: argparse.Namespace, environ: Mapping[str, str], slurm: Slurm):
        self._attempt, self._args, self._slurm = run.attempt(attempt), args, slurm
        self._job_id = environ.get("SLURM_JOB_ID", "")
        self._log = run.log(environ.get("HOLDFAST_JOB_ID", self._job_id), "batch")
        offset = environ.get(LOG_OFFSET, "")
        self._offset = int(offset) if offset.isdecimal() else 0
        self._record: dict[str, object] = {}
        self._deadline: float | None = None
        self._preempted = False
        self._failed_at: float | None = None
        self.done = False

    def tick(self, now: float) -> None:
        if self._deadline is None and self._attempt.warned.exists():
            self._take_warning(now)
        if self._deadline is not None:
            self._forward()
            if now >= self._deadline:
                self._deadline = self._limit(now)
                if now >= self._deadline:
                    self._note(limit=True)
                    print("holdfast: the time limit is near and the script is still running; the attempt ends and the job is requeued", flush=True)
                    os.kill(os.getppid(), signal.SIGALRM)
                    self.done = True
        else:
            self._check_failure(now)

    def _take_warning(self, now: float) -> None:
        self._deadline = self._limit(now)
        info = self._ask()
        far = self._deadline - now > self._args.lead + _EARLY_S
        self._preempted = bool(info and info.preempted_at) or far

    def _ask(self) -> JobInfo | None:
        with suppress(SubmitError):
            return self._slurm.job(self._job_id)
        return None

    def _limit(self, now: float) -> float:
        """When the attempt must end, in wall-clock seconds: by Slurm's end time, which may have changed since the warning."""
        margin = min(_MARGIN_S, self._args.lead / 2)
        info = self._ask()
        if info is not None:
            if info.end_time == "Unknown":
                return float("inf")
            with suppress(ValueError):
                return float(local_time(info.end_time) - margin)
        return self._deadline if self._deadline is not None else now + self._args.lead - margin

    def _forward(self) -> None:
        if "signal" in self._record:
            return
        name = self._args.signal
        if name == "auto":
            helped = all(self._attempt.helper(rank).exists() for rank in range(self._args.world))
            name = LEAD_SIGNAL.name.removeprefix("SIG") if helped else "none"
        if name == "none":
            if not self._preempted:
                return
            name = "TERM"  # what Slurm sends at a preemption without preempt_send_user_signal
        self._note(signal=name)
        with suppress(SubmitError):
            # Without a step id: every step of the job, and not the batch script.
            self._slurm.run("scancel", "-s", name, self._job_id)

    def _check_failure(self, now: float) -> None:
        """Starts the clock at the first failure. After a stop by Slurm there is none: Slurm ends the step itself."""
        text = ""
        with suppress(OSError, DamagedFileError), safe_read.open_file(self._log) as file:
            file.seek(self._offset)
            text = safe_read.read_some(file, self._log, 1 << 20).decode(errors="replace")
        failed = first_failure(text)
        if failed is None or cancel_reasons(text):
            return
        self._failed_at = self._failed_at or now
        if now - self._failed_at >= self._args.peer_wait:
            self._note(failed=list(failed))
            print(f"holdfast: srun task {failed[0]} failed {self._args.peer_wait} s ago and others still run; the step is killed", flush=True)
            kill_step(self._job_id, "", self._args.srun_pid)
            self.done = True

    def _note(self, **fields: object) -> None:
        self._record.update(fields)
        with suppress(OSError):
            replace_file(self._attempt.step_guard, json.dumps(self._record), flush=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.attempt.step_guard")
    parser.add_argument("srun_pid", type=int)
    parser.add_argument("--signal", required=True)
    for name in ("--lead", "--peer-wait", "--world"):
        parser.add_argument(name, type=int, required=True)
    args = parser.parse_args()
    guard = Guard(RunDir(Path(os.environ[RankEnv.RUN_DIR])), int(os.environ[RankEnv.ATTEMPT]), args, os.environ, Slurm())
    while alive(args.srun_pid) and not guard.done:
        guard.tick(time.time())
        time.sleep(_POLL_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())

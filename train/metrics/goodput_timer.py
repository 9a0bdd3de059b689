"""Goodput timer of rank 0: seconds per part of `jobs/run/goodput.py`, as the training process measures them.

Time counts from the START event of the attempt, by the monotonic clock, which the batch script on the same node shares.
A thread writes the state to a file twice a second: the loop makes no system call, and a kill -9 loses half a second of
measurement. Nothing here waits for a GPU: queued kernels count for the section that waits for them.
"""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jobs.core.contract import RankEnv
from jobs.run.goodput import Part

# The record is rewritten in place: always this many bytes, within one page.
_BYTES = 1024
_BEAT_S = 0.5
# As many saves as may lie between the newest complete checkpoint and the end of the attempt, and a few that failed.
_MARKS = 8


class GoodputTimer:
    """Seconds by part. One part is current at any time; `unfinished` is the work on a step that is not finished yet."""

    def __init__(self, path: Path | None = None, started: float | None = None, now: Callable[[], float] = time.monotonic):
        """`path` None: nothing is written down. `started`: reading of `now` when the attempt began."""
        self._now = now
        self._zero = now() if started is None or started > now() else started
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(Part, 0.0)
        self._unfinished = 0.0
        # Of the waits for samples, those since the last finished step: where it comes to a hang, they were part of it.
        self._waited = 0.0
        self._steps = 0
        self._marks: deque[tuple[int, float]] = deque(maxlen=_MARKS)
        self._part, self._since = Part.START_UP, self._zero
        self._fd: int | None = None
        if path is not None:
            # Knowing where the time goes is worth no training: a disk that refuses leaves the time unexplained.
            with suppress(OSError):
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
                self.write()
                threading.Thread(target=self._beat, name="clock", daemon=True).start()

    @classmethod
    def of_rank(cls, path: Path, rank: int, environ: Mapping[str, str] = os.environ) -> "GoodputTimer":
        """Return the timer of a rank; only that of rank 0 is written to a file."""
        try:
            started = float(environ[RankEnv.STARTED])
        except (KeyError, ValueError):
            started = None
        return cls(path if rank == 0 else None, started)

    def enter(self, part: Part) -> Part:
        """Enter a part and return the previous one. After `stop` the part does not change any more."""
        with self._lock:
            self._take()
            before = self._part
            if before is not Part.STOP:
                self._part = part
        return before

    @contextmanager
    def during(self, part: Part) -> Iterator[None]:
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def now(self) -> float:
        return self._now()

    def count(self, part: Part, since: float) -> None:
        """Assign the time from `since` (a reading of `now`) until now to `part`, in retrospect."""
        with self._lock:
            self._take()
            seconds = self._since - since
            if self._part is Part.USEFUL:
                self._unfinished -= seconds
            else:
                self._seconds[self._part] -= seconds
            self._seconds[part] += seconds
            if part is Part.DATA_WAIT:
                self._waited += seconds

    def finished_step(self) -> None:
        """Count a finished step. The first step of an attempt has a part of its own."""
        with self._lock:
            self._take()
            self._settle(Part.USEFUL)
            self._steps += 1
            self._waited = 0.0
            self._part = Part.USEFUL

    def saving(self, step: int) -> None:
        """Mark the begin of a save: if its checkpoint is the newest at the end of the attempt, the work from here on is lost."""
        with self._lock:
            self._take()
            self._marks.append((step, self._seconds[Part.USEFUL] + self._unfinished))

    def stop(self, *, failed: bool = False) -> None:
        """End the last step; from here on time counts as STOP. `failed`: in the middle of a step, which is lost."""
        with self._lock:
            self._take()
            self._settle(Part.LOST if failed else Part.USEFUL)
            self._part = Part.STOP
        self.write()

    def record(self) -> dict[str, Any]:
        """Return the state in the form that the end of the attempt reads; seconds since the attempt began."""
        with self._lock:
            return {
                "passed": round(self._now() - self._zero, 3),
                "part": self._part,
                "since": round(self._since - self._zero, 3),
                "unfinished": round(self._unfinished, 3),
                "waited": round(self._waited, 3),
                "steps": self._steps,
                "seconds": {part: round(seconds, 3) for part, seconds in self._seconds.items() if seconds},
                "marks": [(step, round(seconds, 3)) for step, seconds in self._marks],
            }

    def write(self) -> None:
        if self._fd is not None:
            with suppress(OSError):
                os.pwrite(self._fd, json.dumps(self.record()).ljust(_BYTES - 1).encode() + b"\n", 0)

    def _take(self) -> None:
        now = self._now()
        if self._part is Part.USEFUL:
            self._unfinished += now - self._since
        else:
            self._seconds[self._part] += now - self._since
            if self._part is Part.DATA_WAIT:
                self._waited += now - self._since
        self._since = now

    def _settle(self, part: Part) -> None:
        self._seconds[part] += self._unfinished
        self._unfinished = 0.0

    def _beat(self) -> None:
        rest = threading.Event()
        while not rest.wait(_BEAT_S):
            self.write()

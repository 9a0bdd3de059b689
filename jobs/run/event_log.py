"""The ledger of a run: one JSON line per event, appended whole and flushed to disk, read leniently.

A line torn by a power cut or a kill is skipped by the reader and never joined with the next one by the writer.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.core.contract import Cause, Event
from jobs.run.retry_policy import cause_of

# Seconds to wait for another writer's lock. A lock service that does not answer must not stop a run: then it goes without.
_LOCK_WAIT_S = 2.0


def append(path: Path, event: Event, *, attempt: int, job_id: str, **fields: Any) -> None:
    """Adds one event with the present time (Unix seconds). One write and one fsync: the line is there or it is not.

    Raises OSError when it could not be written or not be flushed; half a line may then be left, which readers skip."""
    line = json.dumps({"event": event, "attempt": attempt, "job_id": job_id, "time": round(time.time(), 3), **fields})
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # Over NFS two hosts that append at once overwrite each other; taking a lock also brings the true size.
        _lock(fd)
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        data = (("\n" if torn else "") + line + "\n").encode()
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(fd)
        if size == 0:
            _sync_folder(path.parent)
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    limit = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as err:
            if err.errno not in (errno.EACCES, errno.EAGAIN) or time.monotonic() > limit:
                return
        time.sleep(0.01)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path) -> list[dict[str, Any]]:
    """All events, oldest first; an empty list when there is no ledger. Lines that are no event are left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if _is_event(event):
            events.append(event)
    return events


def _is_event(event: Any) -> bool:
    return (
        isinstance(event, dict)
        and isinstance(event.get("event"), str)
        and isinstance(event.get("attempt"), int)
        and isinstance(event.get("job_id"), str)
        and isinstance(event.get("time"), int | float)
    )


@dataclass(frozen=True)
class Attempt:
    """One attempt as its ledger lines tell it. Times are Unix seconds; `cause` is None while it runs."""

    number: int
    job_id: str
    started: float
    start_step: int
    ended: float | None
    cause: Cause | None
    step: int | None
    lost_steps: int
    evidence: str
    nodes: tuple[str, ...]


def attempts(events: Iterable[Mapping[str, Any]]) -> list[Attempt]:
    """The attempts of a run, in order. Of two ends of one attempt the first counts: the run has acted upon it."""
    starts: dict[int, Mapping[str, Any]] = {}
    resumed: dict[int, int] = {}
    ends: dict[int, Mapping[str, Any]] = {}
    for event in events:
        number = int(event.get("attempt", 0))
        if event["event"] == Event.START:
            starts.setdefault(number, event)
        elif event["event"] == Event.RESUMED:
            resumed[number] = int(event.get("step", 0))
        elif event["event"] == Event.END:
            ends.setdefault(number, event)
    result = []
    for number in sorted(starts):
        start, end = starts[number], ends.get(number)
        result.append(
            Attempt(
                number=number,
                job_id=str(start["job_id"]),
                started=float(start["time"]),
                start_step=resumed.get(number, int(start.get("step", 0))),
                ended=float(end["time"]) if end else None,
                cause=cause_of(end) if end else None,
                step=int(end.get("step", 0)) if end else None,
                lost_steps=int(end.get("lost_steps", 0)) if end else 0,
                evidence=str(end.get("evidence", "")) if end else "",
                nodes=tuple(start.get("nodes", ())),
            )
        )
    return result

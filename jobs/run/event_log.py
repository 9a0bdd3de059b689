"""The ledger of a run: one JSON line per event, appended whole and flushed to disk.

A line torn by a power cut or a kill is skipped by the reader and never joined with the next one by the writer. An event whose fields
have other types than the writers give them is an error, not a torn line.
"""

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from jobs.core import safe_read
from jobs.core.contract import Cause, Event
from jobs.core.errors import DamagedFileError
from jobs.core.safe_read import is_count, is_number, is_text_list, is_time
from jobs.run.retry_policy import cause_of

# Seconds to wait for another writer's lock. A lock service that does not answer must not stop a run: then it goes without.
_LOCK_WAIT_S = 2.0
# Bytes of a ledger that are read: 300,000 events, of a run that saves every minute for half a year.
LIMIT = 64 * 2**20
_JOB_ID = re.compile(r"[A-Za-z0-9_.+:,;%@\[\]-]{0,200}")


def append(path: Path, event: Event, *, attempt: int, job_id: str, **fields: Any) -> None:
    """Adds one event with the present time (Unix seconds). One write and one fsync: the line is there or it is not.

    Raises OSError when it could not be written or not be flushed; half a line may then be left, which readers skip."""
    line = json.dumps({"event": event, "attempt": attempt, "job_id": job_id, "time": round(time.time(), 3), **fields})
    try:
        fd = safe_read.open_fd(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    except DamagedFileError as err:
        raise err.__cause__ if isinstance(err.__cause__, OSError) else OSError(errno.EINVAL, "not a regular file", str(path)) from err
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
    """All events, oldest first; an empty list when there is no ledger. Lines that are no event are left out.

    Raises DamagedFileError for a file that cannot be read, for one with other content than events, and for an event whose fields
    have wrong types."""
    events, foreign = [], 0
    try:
        for number, line in safe_read.lines(path, LIMIT):
            event = safe_read.parse_line(line, f"{path}: line {number}") if line else None
            if _is_event(event):
                events.append(_check_fields(event, path, number))
            elif not foreign and not safe_read.is_torn(line, b'{"event":'):
                foreign = number
    except FileNotFoundError:
        return []
    if foreign and not events:
        raise DamagedFileError(f"{path}: line {foreign} is no event, and there is none in the file")
    return events


def _check_fields(event: dict[str, Any], path: Path, number: int) -> dict[str, Any]:
    """Returns the event, without what this version does not know and that may be large. Raises DamagedFileError."""
    unknown = False
    for name, value in event.items():
        rule = _FIELDS.get(name)
        if rule is None:
            unknown = unknown or type(value) in (dict, list)
        elif not rule[0](value):
            raise DamagedFileError(f"{path}: line {number}: {name} is {safe_read.describe(value)}; allowed: {rule[1]}")
    return {name: value for name, value in event.items() if name in _FIELDS or type(value) not in (dict, list)} if unknown else event


def _or_none(test: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or test(value)


def _is_job_id(value: object) -> bool:
    """No line break, and nothing that leads out of the folder of logs."""
    return isinstance(value, str) and _JOB_ID.fullmatch(value) is not None


def _is_parts(value: object) -> bool:
    return value is None or (isinstance(value, dict) and all(is_number(seconds) for seconds in value.values()))


def _is_marks(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(mark, list) and len(mark) == 2 and is_count(mark[0]) and is_number(mark[1]) for mark in value))  # fmt: skip


_COUNT, _NUMBER, _TEXT = (is_count, "a whole number from 0"), (is_number, "a finite number"), (lambda value: value is None or type(value) is str, "text")
_TEXTS, _ID = (_or_none(is_text_list), "a list of names"), (_is_job_id, "the id of a job")
# Field of an event -> test of its value, and what is allowed in words.
_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "event": _TEXT, "attempt": _COUNT, "job_id": _ID, "time": (is_time, "a time in Unix seconds"), "step": _COUNT, "start_step": _COUNT, "lost_steps": _COUNT,
    "saved_step": (_or_none(is_count), "a whole number from 0, or null"), "world": _COUNT, "restarts": _COUNT, "setup_s": _COUNT, "bytes": _COUNT,
    "seconds": _NUMBER, "gpu_seconds": _NUMBER, "blocked_s": _NUMBER, "scale": _NUMBER, "exit_code": (_or_none(is_number), "a number, or null"),
    "parts": (_is_parts, "seconds by part"), "marks": (_is_marks, "pairs of step and seconds"), "nodes": _TEXTS, "avoids": _TEXTS, "successor": (_or_none(_is_job_id), "the id of a job"),
    "cause": _TEXT, "evidence": _TEXT, "reason": _TEXT, "node": _TEXT, "name": _TEXT, "first": _TEXT, "cluster": _TEXT, "host": _TEXT, "way": _TEXT, "by": _TEXT,
    "changes": (lambda value: isinstance(value, dict) and all(isinstance(pair, list) and len(pair) == 2 for pair in value.values()), "[before, now] by setting"),
}  # fmt: skip


def _is_event(event: Any) -> TypeGuard[dict[str, Any]]:
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

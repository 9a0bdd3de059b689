"""The ledger of a run: one JSON line per event, appended whole and flushed to disk, read leniently.

A line torn by a power cut or a kill is skipped by the reader and never joined with the next one by the writer.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.contract import Cause, Event


def append(path: Path, event: Event, *, attempt: int, job_id: str, **fields: Any) -> None:
    """Adds one event with the present time (Unix seconds). One write and one fsync: the line is there or it is not."""
    line = json.dumps({"event": event, "attempt": attempt, "job_id": job_id, "time": round(time.time(), 3), **fields})
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        os.write(fd, (("\n" if torn else "") + line + "\n").encode())
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
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


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
    """The attempts of a run, in order."""
    starts: dict[int, Mapping[str, Any]] = {}
    resumed: dict[int, int] = {}
    ends: dict[int, Mapping[str, Any]] = {}
    for event in events:
        number = int(event.get("attempt", 0))
        if event["event"] == Event.START:
            starts[number] = event
        elif event["event"] == Event.RESUMED:
            resumed[number] = int(event["step"])
        elif event["event"] == Event.END:
            ends[number] = event
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
                cause=Cause(end["cause"]) if end else None,
                step=int(end["step"]) if end else None,
                lost_steps=int(end["lost_steps"]) if end else 0,
                evidence=str(end.get("evidence", "")) if end else "",
                nodes=tuple(start.get("nodes", ())),
            )
        )
    return result

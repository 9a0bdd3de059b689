"""The ledger: whole lines or none, from many writers at once, flushed before it is believed."""

import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import stat
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from jobs.core.atomic_write import replace_file
from jobs.core.contract import Cause, Event
from jobs.run import event_log


def write(path: Path, count: int, event: Event = Event.CHECKPOINT) -> None:
    for step in range(count):
        event_log.append(path, event, attempt=1, job_id="7", step=step)


@given(cut=st.integers(1, 200))
@examples(60)
def test_a_torn_last_line_costs_itself_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "ledger.jsonl"
    write(path, 3)
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    torn = whole[: max(len(whole) - cut, 0)]
    path.write_bytes(torn)
    event_log.append(path, Event.STOP, attempt=1, job_id="7", step=9)
    steps = [event["step"] for event in event_log.read(path)]
    # Only what lies before the cut can be there, and of that every whole line is; the last newline may be what was cut.
    kept = sum(1 for number in range(1, 4) if len(b"\n".join(lines[:number])) <= len(torn))
    assert steps == [*range(kept), 9]


@pytest.mark.parametrize(
    "rubbish",
    [
        b'{"event": "sta',
        b"\0" * 512,
        b"[1, 2]\n",
        b'{"event": "end"}\n',
        b'{"event": "end", "attempt": "1", "job_id": "7", "time": 1}\n',
        b'"end"\n',
        b"\xff\xfe\n",
    ],
)
def test_what_is_no_event_is_left_out(tmp_path: Path, rubbish: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, 1)
    with open(path, "ab") as file:
        file.write(rubbish)
    write(path, 1)
    assert [event["step"] for event in event_log.read(path)] == [0, 0]
    assert event_log.attempts(event_log.read(path)) == []


def test_no_ledger_is_an_empty_one(tmp_path: Path) -> None:
    assert event_log.read(tmp_path / "ledger.jsonl") == []


def test_writers_at_the_same_time_lose_and_mix_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_many, args=(path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    events = event_log.read(path)
    assert len(events) == 4 * 40 == len(path.read_bytes().splitlines())
    for number in range(4):
        assert [event["step"] for event in events if event["attempt"] == number] == list(range(40))


def _many(path: Path, number: int) -> None:
    for step in range(40):
        event_log.append(path, Event.CHECKPOINT, attempt=number, job_id="7", step=step, padding="x" * (step * 50))


def test_a_line_is_flushed_before_append_returns_and_a_new_file_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    path = tmp_path / "ledger.jsonl"
    write(path, 1)
    assert flushed == [str(path), str(tmp_path)]
    write(path, 1)
    assert flushed[2:] == [str(path)]


def test_a_disk_that_is_full_is_an_error_and_harms_no_other_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, 1)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:20]))
    with pytest.raises(OSError) as err:
        write(path, 1)
    assert err.value.errno == errno.ENOSPC
    monkeypatch.undo()
    write(path, 2)
    assert [event["step"] for event in event_log.read(path)] == [0, 0, 1]


def test_a_lock_that_cannot_be_had_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(fd: int, how: int) -> None:
        asked.append(how)
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("jobs.run.event_log.fcntl.lockf", refuse)
    write(tmp_path / "ledger.jsonl", 1)
    assert len(asked) == 1  # asking again would not help
    assert len(event_log.read(tmp_path / "ledger.jsonl")) == 1


def hold(path: Path, ready: Connection, stay: Connection) -> None:
    with open(path, "ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        ready.send(True)
        stay.recv()


def test_a_writer_waits_for_the_lock_of_another_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("fork")
    (here, ready), (stay, release) = context.Pipe(), context.Pipe()
    holder = context.Process(target=hold, args=(path, ready, stay), daemon=True)
    holder.start()
    assert here.poll(30) and here.recv()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert path.read_bytes() == b"", "written while another had the lock"
        if len(slept) == 3:
            release.send(True)
            holder.join(30)

    seconds = itertools.count()
    monkeypatch.setattr("jobs.run.event_log._LOCK_WAIT_S", 60.0)
    monkeypatch.setattr("jobs.run.event_log.time", SimpleNamespace(time=time.time, monotonic=lambda: float(next(seconds)), sleep=sleep))
    write(path, 1)
    assert len(slept) == 3 and max(slept) < 0.1 and len(event_log.read(path)) == 1
    holder = context.Process(target=hold, args=(path, ready, stay), daemon=True)
    holder.start()
    assert here.poll(30)
    clock = iter([0.0, 59.0, 60.0, 60.1])
    monkeypatch.setattr("jobs.run.event_log.time", SimpleNamespace(time=time.time, monotonic=lambda: next(clock), sleep=slept.append))
    write(path, 1)
    release.send(True)
    holder.join(30)
    assert len(slept) == 5 and len(event_log.read(path)) == 2


def test_a_writer_leaves_no_file_open_and_a_ledger_that_others_may_read(tmp_path: Path) -> None:
    path, before = tmp_path / "ledger.jsonl", os.listdir("/proc/self/fd")
    mask = os.umask(0)
    try:
        write(path, 2)
    finally:
        os.umask(mask)
    assert os.listdir("/proc/self/fd") == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_one_torn_byte_is_not_joined_with_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"{")
    write(path, 1)
    assert path.read_bytes().startswith(b"{\n{") and len(event_log.read(path)) == 1


def event(kind: str, attempt: int, **fields: object) -> dict[str, object]:
    return {"event": kind, "attempt": attempt, "job_id": "7", "time": 100.0, **fields}


def test_attempts_are_told_by_their_lines_in_any_order() -> None:
    lines = [event("start", 1, nodes=["node1"]), event("start", 2), event("resumed", 2, step=40), event("end", 1, cause="preempted", step=40, lost_steps=0)]
    first, second = event_log.attempts(lines)
    assert (first.cause, first.step, first.nodes) == (Cause.PREEMPTED, 40, ("node1",))
    assert (second.cause, second.start_step, second.ended) == (None, 40, None)


def test_an_attempt_has_every_field_of_its_lines_and_plain_ones_where_a_line_is_bare() -> None:
    full = [
        {"event": "start", "attempt": 2, "job_id": "7_1", "time": 100, "step": 20, "nodes": ["a", "b"]},
        {"event": "checkpoint", "attempt": 2, "job_id": "7_1", "time": 105.0, "step": 99},
        {"event": "end", "attempt": 2, "job_id": "8", "time": 110.5, "cause": "killed", "step": 50, "lost_steps": 10, "evidence": "signal 9"},
        {"event": "start", "attempt": 1, "job_id": "6", "time": 1.0},
        {"event": "end", "attempt": 1, "job_id": "6", "time": 2.0},
        {"event": "start", "attempt": 1, "job_id": "9", "time": 3.0},
        {"event": "end", "attempt": 3, "job_id": "6", "time": 2.0},
        {"event": "resumed", "attempt": 4, "job_id": "9", "time": 3.0},
        {"event": "start", "attempt": 4, "job_id": "9", "time": 3.0, "step": 7},
    ]
    first, second, fourth = event_log.attempts(full)
    assert second == event_log.Attempt(2, "7_1", 100.0, 20, 110.5, Cause.KILLED, 50, 10, "signal 9", ("a", "b"))
    assert first == event_log.Attempt(1, "6", 1.0, 0, 2.0, Cause.UNKNOWN, 0, 0, "", ())
    assert fourth == event_log.Attempt(4, "9", 3.0, 0, None, None, None, 0, "", ())
    assert event_log.attempts([{"event": "start", "job_id": "9", "time": 3.0}])[0].number == 0


def test_of_two_ends_of_one_attempt_the_first_counts() -> None:
    lines = [event("start", 1), event("end", 1, cause="preempted", step=40, lost_steps=0), event("end", 1, cause="killed", step=40, lost_steps=9)]
    assert event_log.attempts(lines)[0].cause is Cause.PREEMPTED


def test_a_cause_of_a_newer_version_is_unknown_and_not_a_crash() -> None:
    assert event_log.attempts([event("start", 1), event("end", 1, cause="flood", step=1, lost_steps=0)])[0].cause is Cause.UNKNOWN


def test_lines_are_json_that_other_programs_read(tmp_path: Path) -> None:
    write(tmp_path / "ledger.jsonl", 1, Event.START)
    assert {"event", "attempt", "job_id", "time"} <= set(json.loads((tmp_path / "ledger.jsonl").read_text()))


def test_a_small_file_is_replaced_whole_or_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "job.yaml"
    replace_file(path, "one\n")
    replace_file(path, "two\n", flush=False)
    assert path.read_text() == "two\n" and path.stat().st_mode & 0o022 == 0
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "\ud800")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        replace_file(path, "three\n")
    assert path.read_text() == "two\n" and [found.name for found in tmp_path.iterdir()] == ["job.yaml"]

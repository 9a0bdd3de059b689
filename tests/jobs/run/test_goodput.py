"""Where the time went: rank 0's clock, the parts of an attempt, and what a later attempt makes of an earlier one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training import Farm, at_step, farm, logs  # noqa: F401

from jobs.core.contract import Cause, Event, Exit
from jobs.run import event_log, goodput
from jobs.run.goodput import Part, account, parts_of
from jobs.run.rundir import RunDir
from launcher.attempt.evidence import clock_record
from train.metrics.goodput_timer import GoodputTimer


class Hands:
    """A clock whose hands a test moves."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def sections(*moves: tuple[str, float]) -> tuple[dict[str, Any], float]:
    """The record after these moves of a clock: a word and the seconds that pass after it; and all seconds together."""
    hands = Hands()
    clock = GoodputTimer(None, hands.at, hands)
    for word, seconds in moves:
        if word == "step":
            clock.finished_step()
        elif word == "stop":
            clock.stop()
        elif word == "fail":
            clock.stop(failed=True)
        elif word.startswith("save") and word != "save_stall":
            clock.saving(int(word[4:]))
        elif word:
            clock.enter(Part(word))
        hands.at += seconds
    return json.loads(json.dumps(clock.record())), hands.at - 100.0


ORDERLY = [
    ("", 3),
    ("restore", 2),
    ("first_step", 6),
    ("step", 1),
    ("step", 1),
    ("save2", 0),
    ("save_stall", 0.5),
    ("useful", 0),
    ("step", 2),
    ("data_wait", 0.5),
    ("useful", 0.5),
    ("step", 0.25),
    ("stop", 4),
]


def test_an_orderly_attempt_is_split_without_a_rest() -> None:
    record, seconds = sections(*ORDERLY)
    parts = parts_of(record, seconds + 1, Cause.PREEMPTED)
    # Four steps in all: 4.75 s of work in three of them, the first one's worth is taken out of its 6 s.
    ordinary = round(4.75 / 3, 3)
    assert parts == {
        "start_up": 3,
        "restore": 2,
        "first_step": round(6 - ordinary, 3),
        "useful": round(4.75 + ordinary, 3),
        "save_stall": 0.5,
        "data_wait": 0.5,
        "stop": 5,
    }
    assert sum(parts.values()) == pytest.approx(seconds + 1)
    # The third step was at work when the save of the second began.
    assert record["marks"] == [[2, 2.0]]


def test_a_step_that_was_never_finished_is_lost_and_dying_is_no_work() -> None:
    killed, seconds = sections(("", 3), ("first_step", 2), ("step", 1), ("step", 0.5), ("data_wait", 0.25), ("useful", 0.25))
    parts = parts_of(killed, seconds + 2, Cause.KILLED)
    assert parts["lost"] == 0.75 and parts["stop"] == 2 and "other" not in parts
    failed, seconds = sections(("", 3), ("first_step", 2), ("step", 1), ("step", 0.5), ("fail", 7))
    assert parts_of(failed, seconds, Cause.CODE_ERROR)["lost"] == 0.5
    assert parts_of(failed, seconds, Cause.CODE_ERROR)["stop"] == 7


def test_a_hang_is_the_silence_from_the_last_movement_to_the_end() -> None:
    record, seconds = sections(("", 3), ("first_step", 2), ("step", 1), ("step", 30))
    parts = parts_of(record, seconds + 5, Cause.HANG)
    assert parts["hang"] == 35 and "stop" not in parts
    # Looking for samples again and again is no movement; a wait before a step that was finished is no part of it.
    record, seconds = sections(("first_step", 2), ("step", 1), ("data_wait", 4), ("useful", 1), ("step", 0), *[("data_wait", 1.5), ("useful", 0)] * 8)
    parts = parts_of(record, seconds + 5, Cause.HANG)
    assert parts["hang"] == 17 and parts["data_wait"] == 4


def test_samples_that_another_rank_waited_for_are_counted_when_one_learns_of_them() -> None:
    hands = Hands()
    clock = GoodputTimer(None, hands.at, hands)
    clock.enter(Part.FIRST_STEP)
    clock.finished_step()
    asked = clock.now()
    hands.at += 4
    clock.count(Part.DATA_WAIT, since=asked)
    clock.stop()
    assert clock.record()["seconds"] == {"data_wait": 4}


def test_what_the_clock_does_not_explain_is_a_rest_and_not_some_part() -> None:
    record, seconds = sections(*ORDERLY[:-1])
    # The clock stood still for ten seconds, or was lost with the work that it had seen.
    record["seconds"]["useful"] -= 1
    assert parts_of(record, seconds, None)["other"] == 1
    assert parts_of(record, seconds + 10, None)["other"] == 11
    assert parts_of({}, 20, Cause.KILLED) == parts_of(None, 20, Cause.KILLED, worked=True) == {"other": 20}
    # Nothing of training had begun, or nobody can look inside.
    assert parts_of(None, 20, Cause.PREEMPTED) == {"start_up": 20}
    assert parts_of(None, 20, Cause.PREEMPTED, own_script=True) == {"script": 20}


def line(event: Event, attempt: int, at: float, **more: Any) -> dict[str, Any]:
    return {"event": event.value, "attempt": attempt, "job_id": "7", "time": at, **more}


def test_work_that_a_later_attempt_repeats_is_lost_up_to_where_that_one_began() -> None:
    first = {"useful": 10.0, "stop": 5.0}
    history = [
        line(Event.SUBMITTED, 0, 0.0),
        line(Event.START, 1, 4.0, world=2),
        line(Event.RESUMED, 1, 5.0, step=0),
        # 60 steps in 10 s: the first 40 took 8 s of them.
        line(Event.END, 1, 19.0, cause="killed", step=60, saved_step=40, seconds=15.0, parts=first, marks=[[20, 3.0], [40, 8.0]]),
        line(Event.START, 2, 25.0, world=2),
        line(Event.RESUMED, 2, 26.0, step=40),
        line(Event.END, 2, 35.0, cause="preempted", start_step=40, step=80, saved_step=80, seconds=10.0, parts={"useful": 10.0}, marks=[]),
    ]
    found = account(history)
    assert [one.parts_s["lost"] for one in found.attempts] == [2.0, 0.0]
    assert found.parts_s["useful"] == 18 and found.parts_s["stop"] == 5 and found.allocation_s == 25 and found.queue_s == 10
    assert found.gpu_hours == 50 / 3600 and found.parts_gpu_hours["useful"] == 36 / 3600 and found.useful_share == 36 / 50
    # Both later checkpoints are damaged: all of the second attempt, and what the first made after step 20, is made again.
    third = [*history, line(Event.START, 3, 40.0, world=2), line(Event.RESUMED, 3, 41.0, step=20)]
    found = account(third)
    assert [one.parts_s["lost"] for one in found.attempts] == [7.0, 10.0]
    # A running attempt counts from its clock's record.
    running, seconds = sections(("", 3), ("first_step", 1), ("step", 1), ("step", 1))
    live = account(third, now=46.0, open_record=running).attempts[2]
    assert live.seconds == 6.0 and live.parts_s["start_up"] == 3 and sum(live.parts_s.values()) == 6.0


def test_a_ledger_from_before_the_clock_is_all_other_and_an_empty_one_is_nothing() -> None:
    old = account([line(Event.START, 1, 4.0, world=2), line(Event.END, 1, 19.0, cause="killed", step=60, saved_step=40, seconds=15.0)])
    assert old.parts_s["other"] == 15 and old.useful_share == 0
    assert account([]).allocation_s == 0 and account([]).useful_share is None


MOVES = st.lists(
    st.tuples(st.sampled_from(["restore", "first_step", "step", "save3", "save_stall", "data_wait", "evaluation", "useful", "stop", "fail"]), st.floats(0, 50)),
    max_size=30,
)


@given(MOVES, st.floats(0, 100), st.sampled_from([*Cause, None]))
def test_the_parts_always_sum_to_the_allocation(moves: list[tuple[str, float]], dying: float, cause: Cause | None) -> None:
    record, seconds = sections(("", 1.0), *moves)
    seconds += dying
    parts = parts_of(record, seconds, cause)
    assert abs(sum(parts.values()) - seconds) <= 0.01 + 0.0001 * seconds
    assert all(value >= 0 for value in parts.values())
    if cause is not None:
        assert parts.get("other", 0.0) <= 0.01 + 0.0001 * seconds


# ------------------------------------------------------------------------------------------------------------- real runs


def identity(run: RunDir, least_useful_s: float = 0.0) -> goodput.Account:
    """The account of a run, held to what is promised of it."""
    found = account(event_log.read(run.ledger))
    for one in found.attempts:
        assert abs(sum(one.parts_s.values()) - one.seconds) <= 0.01 * one.seconds + 0.01, one
        assert one.parts_s["other"] <= max(0.05 * one.seconds, 2.0), one
    assert found.parts_s["useful"] > least_useful_s
    return found


def test_a_run_that_is_stopped_killed_and_finished_accounts_for_every_second(farm: Farm) -> None:  # noqa: F811
    run = farm.prepare(MAX_STEPS="60", EVAL_EVERY="30", CHECKPOINT_EVERY="20")

    def stop(here: Farm, run: RunDir) -> None:
        assert at_step(run, 10)
        here.ranks[0].send_signal(signal.SIGTERM)

    assert farm.train(run, stop) == Exit.DONE, logs(run)
    found = identity(run)
    assert len(found.attempts) == 2
    first, second = found.attempts
    assert first.parts_s["stop"] > 0 and first.parts_s["start_up"] > 0 and first.parts_s["lost"] == 0
    assert second.parts_s["restore"] > 0 and second.parts_s["evaluation"] > 0 and second.parts_s["save_stall"] > 0
    ends = [event for event in event_log.read(run.ledger) if event["event"] == Event.END]
    assert all(event["gpu_seconds"] == pytest.approx(2 * event["seconds"], abs=0.2) for event in ends)


def test_steps_after_the_newest_checkpoint_are_lost_when_the_ranks_are_killed(farm: Farm) -> None:  # noqa: F811
    run = farm.prepare(MAX_STEPS="200", EVAL_EVERY="0", CHECKPOINT_EVERY="1000")

    def kill(here: Farm, run: RunDir) -> None:
        assert at_step(run, 40)
        time.sleep(0.6)  # a beat of the clock
        here.kill_all()

    assert farm.train(run, kill) == Exit.DONE, logs(run)
    found = identity(run)
    assert found.attempts[0].parts_s["useful"] == 0 < found.attempts[0].parts_s["lost"]
    assert found.attempts[1].parts_s["lost"] == 0 < found.attempts[1].parts_s["useful"]


def test_a_process_that_is_killed_leaves_its_clock_at_most_a_second_behind(tmp_path: Path) -> None:
    path = tmp_path / "clock.json"
    code = f"import sys, time; from pathlib import Path; from train.metrics.goodput_timer import GoodputTimer; clock = GoodputTimer(Path({str(path)!r}), time.monotonic() - 5); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    record = json.loads(path.read_text())
    assert record["part"] == "start_up" and 5.9 <= record["passed"] and path.stat().st_size == 1024


def test_a_disk_that_refuses_costs_the_record_and_not_the_training(tmp_path: Path) -> None:
    clock = GoodputTimer(tmp_path / "missing" / "clock.json")
    clock.finished_step()
    clock.stop()
    run = RunDir(tmp_path / "a-1")
    assert clock_record(run, 1) is None
    run.attempt(1).path.mkdir(parents=True)
    run.attempt(1).clock.write_text("{")
    assert clock_record(run, 1) == {}

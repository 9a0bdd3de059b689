"""Whether a run goes on: budgets, and the beginning and end of attempts against a Slurm that does whatever it likes."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
from conftest import examples
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jobs.config.resolver import load
from jobs.config.settings import Job
from jobs.config.yaml_io import dump_yaml
from jobs.core.contract import LOCAL, Cause, Event
from jobs.core.errors import HoldfastError, RunOwnedError, SubmitError
from jobs.run import claim, event_log
from jobs.run.retry_policy import BY_OWN_WISH, FINAL, UNLIMITED, Budgets, budgets_of, judge
from jobs.run.rundir import RunDir
from launcher.attempt import lifecycle
from launcher.attempt.evidence import evidence_of
from launcher.attempt.requeue import send_back
from launcher.status import run_status
from launcher.submission.create_run import resolve_here
from slurm.client import Slurm

BUDGETS = budgets_of(Job())
# A name that is looked up at once: where it means nothing, some machines ask a name server for seconds.
HERE = "localhost"


def ended(number: int, cause: str, start: int = 0, saved: int | None = None, step: int | None = None, job: str = "7") -> dict[str, Any]:
    saved = number * 10 if saved is None else saved
    return {
        "event": "end",
        "attempt": number,
        "job_id": job,
        "time": 1.0,
        "cause": cause,
        "start_step": start,
        "saved_step": saved,
        "step": saved if step is None else step,
        "lost_steps": 0,
    }


def events(*causes: str) -> list[dict[str, Any]]:
    """Attempts that each save ten steps more."""
    return [ended(number, cause, start=(number - 1) * 10) for number, cause in enumerate(causes, 1)]


def marked(word: str, job: str = "7") -> dict[str, Any]:
    return {"event": word, "attempt": 0, "job_id": job, "time": 1.0}


@pytest.mark.parametrize("cause", sorted(UNLIMITED))
def test_what_slurm_does_never_uses_a_budget_up(cause: str) -> None:
    assert judge(events(*[cause] * 500), BUDGETS).again


@pytest.mark.parametrize("cause", sorted(set(Cause) - UNLIMITED - FINAL))
def test_every_other_cause_has_a_budget_of_its_own_and_uses_no_other(cause: Cause) -> None:
    allowed = BUDGETS.of(cause)
    assert allowed == 0 or judge(events(*[cause] * allowed), BUDGETS).again
    over = judge(events(*[cause] * (allowed + 1)), BUDGETS)
    assert not over.again and f"max_{cause.value}" in over.reason
    for other in set(Cause) - FINAL - {cause}:
        if BUDGETS.of(other) if other not in UNLIMITED else True:
            assert judge(events(*[cause] * allowed, other), BUDGETS).again, other


@pytest.mark.parametrize("cause", sorted(FINAL))
def test_the_end_is_the_end(cause: str) -> None:
    assert not judge(events("preempted", cause), BUDGETS).again


@pytest.mark.parametrize("cause", ["preempted", "time_limit", "requeued", "killed", "node_failure", "unknown"])
def test_attempts_that_train_and_save_nothing_are_given_up(cause: str) -> None:
    stuck = [ended(number, cause, start=40, saved=40, step=55) for number in range(1, 4)]
    assert judge(stuck[:2], BUDGETS).again
    verdict = judge(stuck, BUDGETS)
    assert not verdict.again and "no progress" in verdict.reason


def test_progress_in_between_makes_the_count_of_attempts_without_it_begin_anew() -> None:
    stuck = [
        ended(1, "preempted", 0, 0, 5),
        ended(2, "preempted", 0, 0, 5),
        ended(3, "preempted", 0, 10, 10),
        ended(4, "preempted", 10, 10, 15),
        ended(5, "preempted", 10, 10, 15),
    ]
    assert judge(stuck, BUDGETS).again


def test_a_run_that_is_thrown_out_before_its_first_step_is_not_at_fault_but_does_not_go_on_for_ever() -> None:
    thrown = [ended(number, "preempted", start=40, saved=40, step=40) for number in range(1, 31)]
    assert judge(thrown[:29], BUDGETS).again
    assert not judge(thrown, BUDGETS).again


def test_submitting_again_starts_the_budgets_anew_and_forgets_a_cancel() -> None:
    lines = [*events("killed", "killed", "killed", "killed"), marked("submitted", "8")]
    assert not judge(lines[:-1], BUDGETS).again
    assert judge(lines, BUDGETS).again
    assert judge([*lines, ended(5, "killed", 40, job="8")], BUDGETS).again
    assert judge([ended(1, "cancelled"), marked("cancel"), marked("submitted", "8")], BUDGETS).again


def test_a_line_about_the_submission_that_comes_after_the_end_takes_nothing_back() -> None:
    assert not judge([ended(1, "code_error"), marked("submitted")], BUDGETS).again


def test_a_wish_to_cancel_holds_whatever_ended_the_attempt() -> None:
    assert not judge([marked("submitted"), marked("cancel"), *events("preempted")], BUDGETS).again
    assert not judge([marked("submitted"), marked("cancel")], BUDGETS).again


def test_an_attempt_whose_end_was_written_twice_counts_once() -> None:
    lines = events("killed", "killed", "killed")
    assert judge([*lines, lines[-1], {**lines[0], "cause": "code_error"}], BUDGETS).again


def test_of_two_ends_of_one_attempt_the_first_decides_also_when_the_second_comes_after_a_new_submission() -> None:
    late = ended(1, "code_error")
    assert judge([ended(1, "preempted"), late], BUDGETS).again
    assert judge([ended(1, "preempted"), marked("submitted", "8"), late], BUDGETS).reason == "no attempt has ended yet"


def test_only_an_end_is_an_end() -> None:
    lines = [marked("submitted"), {**ended(1, "code_error"), "event": "start"}, {**ended(1, "code_error"), "event": "checkpoint"}]
    assert judge(lines, BUDGETS).reason == "no attempt has ended yet"


def test_a_script_that_saves_where_nobody_sees_it_is_not_said_to_make_no_progress() -> None:
    unseen = [{**ended(number, "time_limit", start=0), "saved_step": None} for number in range(1, 9)]
    assert judge(unseen, BUDGETS).again
    unsaid = [{key: value for key, value in line.items() if key != "saved_step"} for line in unseen]
    assert not judge(unsaid, BUDGETS).again


def test_a_script_that_leaves_with_75_whatever_happens_is_given_up_and_one_that_trains_in_pieces_is_not() -> None:
    def asks(number: int, seconds: float, **more: Any) -> dict[str, Any]:
        return {**ended(number, "requeued"), "saved_step": None, "step": 0, "seconds": seconds, "evidence": f"{BY_OWN_WISH}: it left with 75", **more}

    short = [asks(number, 4.0) for number in range(1, 4)]
    assert judge(short[:2], BUDGETS).again
    verdict = judge(short, BUDGETS)
    assert not verdict.again and "max_no_progress 3" in verdict.reason
    assert judge([asks(number, 3600.0) for number in range(1, 100)], BUDGETS).again
    # One in between that was long, or that was ended from outside, says that it can work.
    assert judge([*short[:2], asks(3, 3600.0), asks(4, 4.0)], BUDGETS).again
    assert judge([*short[:2], asks(3, 4.0, evidence="slurmstepd: cancelled due to job requeue"), asks(4, 4.0)], BUDGETS).again
    # With the helper it is seen whether it saves: then the time says nothing.
    assert judge([asks(number, 4.0, start_step=number * 10 - 10, saved_step=number * 10) for number in range(1, 100)], BUDGETS).again
    assert not judge([asks(number, 3600.0, start_step=10, saved_step=10, step=10) for number in range(1, 4)], BUDGETS).again


def test_an_attempt_that_says_no_step_began_at_the_first() -> None:
    bare = [{key: value for key, value in ended(number, "preempted", saved=1).items() if key != "start_step"} for number in range(1, 9)]
    assert judge(bare, BUDGETS).again


def test_the_reason_is_a_sentence_for_the_person_who_reads_the_ledger() -> None:
    assert judge([marked("cancel")], BUDGETS).reason == judge([marked("cancel"), *events("killed")], BUDGETS).reason == "cancelled"
    assert judge(events("pruned"), BUDGETS).reason == "pruned"
    assert judge(events("killed"), BUDGETS).reason == "killed, 1 of 3 allowed"
    assert judge(events("killed", "preempted"), BUDGETS).reason == "preempted, and the run makes progress"
    for count, word in ((1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (13, "13th"), (22, "22nd"), (111, "111th")):
        budgets = replace(BUDGETS, out_of_memory=count - 1)
        assert judge(events(*["out_of_memory"] * count), budgets).reason == f"out_of_memory for the {word} time, {count - 1} allowed (max_out_of_memory)"


def test_lines_of_a_newer_version_or_with_fields_missing_do_not_crash_the_verdict() -> None:
    assert judge([{"event": "end", "attempt": 1, "job_id": "7", "time": 1.0, "cause": "flood"}], BUDGETS).again
    assert judge([{"event": "tide", "attempt": 1}], BUDGETS).again


# ------------------------------------------------------------------------------------------- a Slurm that does what it likes


T = TypeVar("T")


@dataclass
class FakeJob:
    """A job as slurmctld has it, and the incarnation of its batch script that is alive."""

    id: str
    state: str = "PENDING"
    restarts: int = 0
    preempted: str = "None"
    rows: list[tuple[str, float, float]] = field(default_factory=list)  # state, start, end of earlier incarnations
    started: float = 0.0


class FakeSlurm(Slurm):
    """Answers at the border of processes: command in, text out. So the parsers are part of what is tested."""

    def __init__(self) -> None:
        super().__init__({})
        self.jobs: dict[str, FakeJob] = {}
        self.reachable = True
        self.requeue_works = True
        self.sacct = "works"
        self.successors = True

    def new(self) -> FakeJob:
        job = FakeJob(str(100 + len(self.jobs)))
        self.jobs[job.id] = job
        return job

    def patiently(self, ask: Any, patience_s: float) -> Any:
        return ask()

    def run(self, *command: str, **_: Any) -> str:
        if not self.reachable:
            raise SubmitError(f"{command[0]}: Unable to contact slurm controller (connect failure)")
        words = " ".join(command)
        if words.startswith("scontrol -o show job"):
            job = self.jobs.get(command[-1])
            if job is None or job.state == "GONE":
                raise SubmitError("scontrol: slurm_load_jobs error: Invalid job id specified")
            end = "Unknown" if job.state in ("COMPLETING", "PENDING") else "2026-11-22T00:00:00"
            return f"JobId={job.id} JobName=x JobState={job.state} Reason=None Restarts={job.restarts} NodeList=node1 PreemptTime={job.preempted} EndTime={end} TimeLimit=01:00:00 Partition=low ExitCode=0:0 Comment=(null)\n"
        if command[:2] == ("scontrol", "requeue"):
            job = self.jobs[command[2]]
            if job.state == "PENDING":
                raise SubmitError("scontrol: Job is pending execution")
            if not self.requeue_works or job.state == "GONE":
                raise SubmitError("scontrol: Requested operation is presently disabled")
            self.back(job, "REQUEUED")
            return ""
        if command[0] == "squeue":
            return "".join(f"{job.id}|{job.id}\n" for job in self.jobs.values() if job.state == "PENDING")
        if command[0] == "sbatch":
            if not self.successors:
                raise SubmitError("sbatch: error: Batch job submission failed")
            return self.new().id
        if command[0] == "sacct":
            if self.sacct == "fails":
                raise SubmitError("sacct: Slurm accounting storage is disabled")
            job = self.jobs[command[command.index("-j") + 1]]
            rows = {"works": job.rows, "late": job.rows[:-1], "empty": []}[self.sacct]
            stamp = datetime.fromtimestamp
            return "".join(
                f"{job.id}|{state}|0:0|{stamp(start).isoformat(timespec='seconds')}|{stamp(end).isoformat(timespec='seconds')}\n" for state, start, end in rows
            )
        if words.startswith("scontrol -o show partition"):
            return "PartitionName=low TotalNodes=4\n"
        if words.startswith("scontrol -o show node"):
            return "NodeName=node1 State=IDLE\n"
        return ""

    def back(self, job: FakeJob, state: str) -> None:
        """Into the queue again, with the row that the accounting will have."""
        job.rows.append((state, job.started, time.time()))
        job.state, job.preempted, job.restarts = "PENDING", "None", job.restarts + 1

    def over(self, job: FakeJob, state: str) -> None:
        job.rows.append((state, job.started, time.time()))
        job.state = "GONE"


@dataclass
class Live:
    """One batch script that began an attempt."""

    job: FakeJob
    environ: dict[str, str]
    number: int


def made_run(folder: Path) -> tuple[RunDir, Budgets]:
    run = RunDir(folder / "a-1")
    run.logs.mkdir(parents=True)
    resolved = resolve_here(
        ["MODEL=nano", "NODES=1", "GPUS_PER_NODE=2", "DEVICE=cpu", "GPU_REQUEST=none", f"RUNS_DIR={folder}", "MAX_STEPS=100000", "REQUEUE_CONFIRM_S=0"],
        {},
        Path.cwd(),
    )
    run.job_yaml.write_text(dump_yaml(resolved.job.model_dump(mode="json")))
    run.script.write_text("#!/bin/bash\n")
    return run, budgets_of(resolved.job)


class Histories(RuleBasedStateMachine):
    """Everything that may happen to a run, in any order; the beginning and end of attempts are the real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="hf-verdict-"))
        self.slurm = FakeSlurm()
        self.live: Live | None = None
        self.ghosts: list[Live] = []
        self.truth: dict[int, set[Cause]] = {}
        self.offset = 0.0
        real = time.time
        self.patches = [
            mock.patch("time.time", lambda: real() + self.offset),
            mock.patch("builtins.print"),
            mock.patch("launcher.attempt.lifecycle.checked", lambda *_, **__: {}),
        ]
        self.patches.append(mock.patch("launcher.attempt.requeue.signal.signal"))
        for patch in self.patches:
            patch.start()

    @initialize()
    def submit(self) -> None:
        self.run, self.budgets = made_run(self.folder)
        job = self.slurm.new()
        event_log.append(self.run.ledger, Event.SUBMITTED, attempt=0, job_id=job.id, by="submitit")

    def teardown(self) -> None:
        try:
            if hasattr(self, "run"):
                self.to_the_end()
        finally:
            for patch in reversed(self.patches):
                patch.stop()
            shutil.rmtree(self.folder, ignore_errors=True)

    # -- what Slurm and people do ------------------------------------------------------------------------------------------

    def _waiting(self) -> list[FakeJob]:
        return [job for job in self.slurm.jobs.values() if job.state == "PENDING"]

    @precondition(lambda self: self._waiting())
    @rule(which=st.integers(0, 5))
    def slurm_starts_a_job(self, which: int) -> None:
        waiting = self._waiting()
        self.start(waiting[which % len(waiting)])

    def start(self, job: FakeJob) -> None:
        """A ghost may still be alive on its node meanwhile; another live job makes this one give way."""
        # Slurm needs seconds to start a job again, and sacct tells times in seconds: two attempts never share one.
        self.offset += 2
        job.state, job.started = "RUNNING", time.time()
        environ = {"SLURM_JOB_ID": job.id, "SLURM_RESTART_COUNT": str(job.restarts), "SLURM_JOB_NODELIST": HERE}
        reachable, self.slurm.reachable = self.slurm.reachable, True
        try:
            values = lifecycle.begin(self.run, environ, self.slurm)
        except RunOwnedError:
            # To one that runs, or to one that Slurm has in the queue again and whose attempt nobody closed yet.
            others = [other for other in self.slurm.jobs.values() if other is not job and other.state in ("RUNNING", "PENDING")]
            assert others, "a job gave way to nobody"
            self.slurm.over(job, "FAILED")
            return
        except HoldfastError as err:
            assert "is over" in str(err)
            self.slurm.over(job, "FAILED")
            return
        finally:
            self.slurm.reachable = reachable
        assert self.live is None, "two live attempts"
        self.live = Live(job, {**environ, **values}, int(values["HOLDFAST_ATTEMPT"]))
        start = max((int(event["step"]) for event in event_log.read(self.run.ledger) if event["event"] == Event.CHECKPOINT), default=0)
        event_log.append(self.run.ledger, Event.RESUMED, attempt=self.live.number, job_id=job.id, step=start)
        self.run.attempt(self.live.number).progress.write_text(str(start))

    @precondition(lambda self: self.live)
    @rule(steps=st.integers(1, 30), save=st.sampled_from(["ok", "fails", "none"]))
    def ranks_train(self, steps: int, save: str) -> None:
        assert self.live
        progress = self.run.attempt(self.live.number).progress
        step = int(progress.read_text()) + steps
        progress.write_text(str(step))
        if save != "none":
            event_log.append(
                self.run.ledger, Event.CHECKPOINT if save == "ok" else Event.SAVE_FAILED, attempt=self.live.number, job_id=self.live.job.id, step=step
            )

    def leave(self, reason: str, rank: int, **fields: object) -> None:
        assert self.live
        marker = {"rank": rank, "time": time.time(), "reason": reason, **fields}
        self.run.attempt(self.live.number).marker(rank).write_text(json.dumps(marker))

    def say(self, text: str) -> None:
        assert self.live
        with open(self.run.log(self.live.job.id, "batch"), "a") as log:
            log.write(text + "\n")

    def save_at_stop(self) -> None:
        assert self.live
        step = int(self.run.attempt(self.live.number).progress.read_text())
        event_log.append(self.run.ledger, Event.CHECKPOINT, attempt=self.live.number, job_id=self.live.job.id, step=step)

    def ends(self, truth: set[Cause], code: int, signals: list[str]) -> None:
        """The batch script lives to call the end of the attempt."""
        live = self.live
        assert live
        self.truth[live.number] = truth
        self.live = None
        verdict, cause = lifecycle.end(self.run, live.environ, self.slurm, code, signals)
        if not verdict.again:
            # Slurm may have put it back into the queue itself; that is its own business, and the beginning refuses.
            assert not [event for event in event_log.read(self.run.ledger) if event["event"] == Event.REQUEUE and event["attempt"] == live.number]
        if live.job.state in ("RUNNING", "COMPLETING"):
            self.slurm.over(live.job, "COMPLETED" if cause is Cause.FINISHED else "FAILED")

    @precondition(lambda self: self.live)
    @rule(
        kind=st.sampled_from(["PREEMPTION", "JOB REQUEUE", "NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS"]),
        saved=st.booleans(),
        slurm_first=st.booleans(),
        script_lives=st.booleans(),
        ghost=st.booleans(),
    )
    def slurm_takes_the_nodes(self, kind: str, saved: bool, slurm_first: bool, script_lives: bool, ghost: bool) -> None:
        assert self.live
        live, job = self.live, self.live.job
        truth = {"PREEMPTION": Cause.PREEMPTED, "JOB REQUEUE": Cause.REQUEUED}.get(kind, Cause.NODE_FAILURE)
        silent = truth is Cause.NODE_FAILURE and not script_lives
        if not silent:
            self.say(f"slurmstepd: error: *** JOB {job.id} ON node1 CANCELLED AT 2026-11-21T23:43:04 DUE TO {kind} ***")
        if saved and not silent:
            self.save_at_stop()
            for rank in range(2):
                self.leave("stopped", rank, signal="TERM")
        state = {"PREEMPTION": "PREEMPTED", "JOB REQUEUE": "REQUEUED"}.get(kind, "NODE_FAIL")
        if not script_lives:
            self.truth[live.number] = {truth}
            self.live = None
            if ghost:
                self.ghosts.append(live)
            self.slurm.back(job, state)
            return
        if slurm_first:
            self.slurm.back(job, state)
        else:
            job.state = "COMPLETING"
        self.ends({truth}, 75 if saved else 143, ["TERM"])

    @precondition(lambda self: self.live)
    @rule(requeue=st.booleans())
    def the_time_limit_comes(self, requeue: bool) -> None:
        assert self.live
        self.save_at_stop()
        for rank in range(2):
            self.leave("stopped", rank, signal="USR2")
        # By the wall's clock the attempt may have begun at any time; only the clock that nobody sets counts.
        self.live.environ["HOLDFAST_STARTED"] = f"{time.monotonic() - 3590:.3f}"
        self.slurm.requeue_works = requeue
        self.ends({Cause.TIME_LIMIT}, 75, [])
        self.slurm.requeue_works = True

    @precondition(lambda self: self.live)
    @rule(kind=st.sampled_from(["finished", "code", "oom", "kill", "hang", "storage", "nothing"]))
    def ranks_end_by_themselves(self, kind: str) -> None:
        assert self.live
        number = self.live.number
        peer = {"kind": "RuntimeError", "message": "Connection closed by peer"}
        if kind == "finished":
            for rank in range(2):
                self.leave("finished", rank)
            self.ends({Cause.FINISHED}, 0, [])
        elif kind == "nothing":
            self.ends({Cause.UNKNOWN}, 1, [])
        elif kind == "hang":
            self.run.attempt(number).hang.write_text(json.dumps({"evidence": "no progress", "ranks": [1], "nodes": ["node1"]}))
            self.ends({Cause.HANG}, 137, [])
        elif kind == "kill":
            self.leave("error", 0, **peer)
            self.ends({Cause.KILLED}, 137, [])
        else:
            error = {
                "code": {"kind": "ValueError", "message": "x"},
                "oom": {"kind": "OutOfMemoryError", "message": "CUDA out of memory"},
                "storage": {"kind": "OSError", "message": "No space left", "errno": 28},
            }[kind]
            self.leave("error", 0, **peer)
            self.leave("error", 1, **error)
            self.ends({{"code": Cause.CODE_ERROR, "oom": Cause.OUT_OF_MEMORY, "storage": Cause.STORAGE}[kind]}, 1, [])

    @precondition(lambda self: self.live)
    @rule(by_holdfast=st.booleans())
    def a_person_cancels(self, by_holdfast: bool) -> None:
        assert self.live
        if by_holdfast:
            event_log.append(self.run.ledger, Event.CANCEL, attempt=self.live.number, job_id=self.live.job.id)
        self.save_at_stop()
        for rank in range(2):
            self.leave("stopped", rank, signal="TERM")
        self.say(f"slurmstepd: error: *** JOB {self.live.job.id} ON node1 CANCELLED AT 2026-11-21T23:43:04 ***")
        self.live.job.state = "CANCELLED"
        self.ends({Cause.CANCELLED} if by_holdfast or self.slurm.reachable else {Cause.CANCELLED, Cause.REQUEUED}, 75, ["TERM"])
        # What was asked of slurmctld while it did not answer may have been a requeue: scancel wins in the end.
        for job in self._waiting():
            self.slurm.over(job, "CANCELLED")

    @rule()
    def a_person_submits_the_script_once_more(self) -> None:
        if len(self.slurm.jobs) >= 8:
            return
        self.slurm.new()

    @precondition(lambda self: self.ghosts)
    @rule(code=st.sampled_from([0, 1, 75, 137]))
    def a_ghost_comes_to_its_end(self, code: int) -> None:
        """A batch script on a node that Slurm thought dead: it may write and requeue nothing once it has a successor."""
        ghost = self.ghosts.pop()
        before, jobs = self.run.ledger.read_bytes(), [(job.state, job.restarts) for job in self.slurm.jobs.values()]
        superseded = claim.superseded(self.run, ghost.number)
        lifecycle.end(self.run, ghost.environ, self.slurm, code, [])
        if superseded:
            assert self.run.ledger.read_bytes() == before
        # Slurm had put its job back already: it must not be thrown out a second time.
        if self.slurm.reachable and ghost.job.restarts > int(ghost.environ["SLURM_RESTART_COUNT"]):
            assert [(job.state, job.restarts) for job in self.slurm.jobs.values()][: len(jobs)] == jobs

    # -- what disks, clocks and daemons do ---------------------------------------------------------------------------------

    @rule(hours=st.floats(-100, 100))
    def the_clock_jumps(self, hours: float) -> None:
        self.offset += hours * 3600

    @rule(text=st.sampled_from([b'{"event": "end", "attempt": 1, "cau', b"\0\0\0", b"}"]))
    def a_line_is_torn(self, text: bytes) -> None:
        with open(self.run.ledger, "ab") as file:
            file.write(text)

    @rule()
    def the_last_line_is_there_twice(self) -> None:
        lines = [line for line in self.run.ledger.read_bytes().split(b"\n") if line.strip()]
        with open(self.run.ledger, "ab") as file:
            file.write(b"\n" + lines[-1] + b"\n")

    @rule(how=st.sampled_from(["works", "late", "empty", "fails"]), reachable=st.booleans(), successors=st.booleans())
    def daemons_come_and_go(self, how: str, reachable: bool, successors: bool) -> None:
        self.slurm.sacct, self.slurm.reachable, self.slurm.successors = how, reachable, successors

    # -- what must hold ------------------------------------------------------------------------------------------------------

    @invariant()
    def a_recorded_cause_is_never_wrong(self) -> None:
        if not hasattr(self, "run"):
            return
        for recorded in event_log.attempts(event_log.read(self.run.ledger)):
            if recorded.cause is not None and recorded.number in self.truth:
                assert recorded.cause in self.truth[recorded.number] | {Cause.UNKNOWN}, (recorded, self.truth)

    @invariant()
    def at_most_one_attempt_is_open_and_it_is_the_live_one(self) -> None:
        if not hasattr(self, "run"):
            return
        open_ones = [recorded.number for recorded in event_log.attempts(event_log.read(self.run.ledger)) if recorded.cause is None]
        if self.live:
            assert open_ones == [self.live.number]
        assert len(open_ones) <= 1

    @invariant()
    def the_verdict_is_a_function_of_the_ledger_and_budgets_fall_by_their_own_cause_only(self) -> None:
        if not hasattr(self, "run"):
            return
        lines = event_log.read(self.run.ledger)
        verdict = judge(lines, self.budgets)
        assert verdict == judge(lines, self.budgets) and verdict.reason
        recorded = [event for event in lines if event["event"] == Event.END]
        if recorded and not verdict.again and "allowed (max_" in verdict.reason:
            cause = Cause(recorded[-1]["cause"])
            assert len({event["attempt"] for event in recorded if event["cause"] == cause}) > self.budgets.of(cause)

    @invariant()
    def the_time_of_every_attempt_is_accounted_for_whatever_the_clocks_did(self) -> None:
        if not hasattr(self, "run"):
            return
        for event in event_log.read(self.run.ledger):
            if event["event"] == Event.END:
                assert event["seconds"] >= 0 and abs(sum(event["parts"].values()) - event["seconds"]) <= 0.01 * event["seconds"] + 0.01, event

    def to_the_end(self) -> None:
        """Whatever happened before: left to itself, the run finishes, is queued no more and says why, or waits for a person
        who is told so."""
        self.slurm.reachable = self.slurm.successors = True
        for _ in range(60):
            if self.live:
                for rank in range(2):
                    self.leave("finished", rank)
                self.ends({Cause.FINISHED}, 0, [])
            elif self._waiting():
                self.start(self._waiting()[0])
            else:
                break
        assert not self._waiting() and self.live is None
        with mock.patch.object(run_status, "ask_queue", return_value=({}, "")):
            row = run_status.collect([self.run], {})[0]
        assert row.state in ("finished", "failed", "cancelled", "stopped"), row
        assert row.state in ("finished", "cancelled") or row.note, row


Histories.TestCase.settings = settings(examples(100), stateful_step_count=25, suppress_health_check=list(HealthCheck))
TestHistories = Histories.TestCase


def test_two_jobs_that_begin_at_once_get_one_attempt_between_them(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a-1")
    assert claim.claim(run, 1, {"job_id": "7"})
    assert not claim.claim(run, 1, {"job_id": "8"})
    assert claim.owner_of(run, 1) == {"job_id": "7"} and claim.newest(run) == 1
    assert not claim.superseded(run, 1)
    assert claim.claim(run, 2, {"job_id": "8"}) and claim.superseded(run, 1)
    with suppress(FileNotFoundError):
        assert not [name for name in os.listdir(run.attempt(1).path.parent) if not name.isdigit()]


def test_a_run_without_slurm_is_left_alone_while_its_process_lives_and_taken_over_when_it_is_gone(tmp_path: Path) -> None:
    run, _ = made_run(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as other:
        job_id = f"{LOCAL}{other.pid}"
        owner = {"job_id": job_id, "host": socket.gethostname(), "pid": other.pid, "stamp": claim.process_stamp(other.pid)}
        assert claim.claim(run, 1, owner)
        with pytest.raises(RunOwnedError, match=f"job {job_id} is training"):  # claimed, and its start not written yet
            lifecycle.begin(run, {}, None)
        event_log.append(run.ledger, Event.START, attempt=1, job_id=job_id, nodes=[socket.gethostname()], world=2)
        with pytest.raises(RunOwnedError, match=f"job {job_id} is training"):
            lifecycle.begin(run, {}, None)
        assert claim.newest(run) == 1
        other.kill()
    assert lifecycle.begin(run, {}, None)["HOLDFAST_ATTEMPT"] == "2"
    assert event_log.attempts(event_log.read(run.ledger))[0].cause is Cause.KILLED


@pytest.mark.parametrize("place", ["variable", "file", "default"])
def test_a_job_submitted_by_hand_comes_back_to_its_run_whatever_became_of_its_job_file(tmp_path: Path, place: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("entry: mine.py\ndevice: cpu\njob_name: first\n" + ("runs_dir: there\n" if place == "file" else ""))
    (tmp_path / "mine.py").touch()
    environ = {"SLURM_JOB_ID": "17", "SLURM_CLUSTER_NAME": "a", "HOLDFAST_JOB": str(file)} | ({"RUNS_DIR": "there"} if place == "variable" else {})
    first = lifecycle.adopt(environ, tmp_path)
    assert first == tmp_path / ("runs" if place == "default" else "there") / "first-j17" / "submit.sbatch"
    again = {**environ, "SLURM_RESTART_COUNT": "1"}
    file.write_text(file.read_text().replace("first", "second"))
    assert lifecycle.adopt(again, tmp_path) == first
    if place != "file":
        file.write_text("no_such_setting: 1\n")
        assert lifecycle.adopt(again, tmp_path) == first
        file.unlink()
        assert lifecycle.adopt(again, tmp_path) == first
    # The same number in another cluster, or of a job that begins, is another job.
    file.write_text(f"entry: mine.py\ndevice: cpu\njob_name: third\nruns_dir: {first.parent.parent}\n")
    assert lifecycle.adopt({**again, "SLURM_CLUSTER_NAME": "b"}, tmp_path).parent.name == "third-j17"
    file.write_text(file.read_text().replace("third", "fourth"))
    assert lifecycle.adopt(environ, tmp_path).parent.name == "fourth-j17"


def test_a_ghost_neither_writes_nor_requeues(tmp_path: Path) -> None:
    run, _ = made_run(tmp_path)
    slurm = FakeSlurm()
    job = slurm.new()
    job.state = "RUNNING"
    environ = {"SLURM_JOB_ID": job.id, "SLURM_JOB_NODELIST": HERE}
    ghost = {**environ, **lifecycle.begin(run, environ, slurm)}
    slurm.back(job, "NODE_FAIL")
    job.state = "RUNNING"
    assert lifecycle.begin(run, {**environ, "SLURM_RESTART_COUNT": "1"}, slurm)["HOLDFAST_ATTEMPT"] == "2"
    before = run.ledger.read_bytes()
    lifecycle.end(run, ghost, slurm, 75, ["TERM"])
    assert run.ledger.read_bytes() == before and job.state == "RUNNING" and job.restarts == 1


def test_a_job_gives_way_when_slurm_cannot_say_whether_the_owner_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = made_run(tmp_path)
    slurm = FakeSlurm()
    first, second = slurm.new(), slurm.new()
    first.state = second.state = "RUNNING"
    lifecycle.begin(run, {"SLURM_JOB_ID": first.id, "SLURM_JOB_NODELIST": HERE}, slurm)
    slurm.reachable = False
    with pytest.raises(RunOwnedError, match="does not say whether it lives"):
        lifecycle.begin(run, {"SLURM_JOB_ID": second.id, "SLURM_JOB_NODELIST": HERE}, slurm)
    slurm.reachable, first.state = True, "GONE"
    assert lifecycle.begin(run, {"SLURM_JOB_ID": second.id, "SLURM_JOB_NODELIST": HERE}, slurm)["HOLDFAST_ATTEMPT"] == "2"


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("scontrol: Unable to contact slurm controller (connect failure)", "unknown"),
        ("scontrol: slurm_load_jobs error: Invalid job id specified", "unknown"),
        # A node that has no clients of Slurm: then nobody was asked, and the exit code says it.
        ("scontrol is not on this machine; is this a login node of the cluster?", "killed"),
    ],
)
def test_ranks_killed_without_a_word_are_called_so_where_slurm_did_not_fail_to_answer(tmp_path: Path, said: str, cause: str) -> None:
    run, _ = made_run(tmp_path)
    slurm = FakeSlurm()
    job = slurm.new()
    job.state = "RUNNING"
    environ = {"SLURM_JOB_ID": job.id, "SLURM_JOB_NODELIST": HERE}
    environ |= lifecycle.begin(run, environ, slurm)

    def refuse(*_: str, **__: Any) -> str:
        raise SubmitError(said)

    with mock.patch.object(slurm, "run", refuse):
        lifecycle.end(run, environ, slurm, 137, [])
    assert event_log.attempts(event_log.read(run.ledger))[0].cause == cause


@pytest.mark.parametrize(
    ("state", "lost"),
    [
        ("DOWN", True), ("DOWN*+DRAIN", True), ("IDLE*", True), ("IDLE+CLOUD+NOT_RESPONDING", True), ("FAIL", True), ("MIXED+FAILING", True), ("DOWN~", True),
        ("IDLE+CLOUD+POWERED_DOWN", False), ("IDLE+CLOUD+POWERING_DOWN", False), ("IDLE+POWER_DOWN", False), ("ALLOCATED+CLOUD", False), ("IDLE~", False), ("", False),
    ],
)  # fmt: skip
def test_a_node_is_lost_by_a_whole_word_of_its_state_and_not_while_it_saves_power(tmp_path: Path, state: str, lost: bool) -> None:
    run, _ = made_run(tmp_path)
    event_log.append(run.ledger, Event.START, attempt=1, job_id="7", nodes=["node1"], world=2)
    with mock.patch.object(slurm := FakeSlurm(), "node_states", return_value={"node1": state}):
        assert evidence_of(run, load(run.job_yaml), 1, "7", slurm).lost_nodes == (["node1"] if lost else [])


@pytest.mark.parametrize(("lived", "signals", "attempts"), [(2.0, "", 3), (3000.0, "", 12), (2.0, "TERM", 12)])
def test_a_script_of_ones_own_that_always_leaves_with_75_comes_to_an_end(tmp_path: Path, lived: float, signals: str, attempts: int) -> None:
    run, _ = made_run(tmp_path)
    run.job_yaml.write_text(dump_yaml(load(run.job_yaml).model_copy(update={"entry": "t.py", "time_limit": 60}).model_dump(mode="json")))
    slurm = FakeSlurm()
    job, made = slurm.new(), 0
    for number in range(1, 13):
        job.state, job.restarts = "RUNNING", number - 1
        environ = {"SLURM_JOB_ID": job.id, "SLURM_RESTART_COUNT": str(job.restarts), "SLURM_JOB_NODELIST": HERE}
        with mock.patch("launcher.attempt.lifecycle.checked", return_value={}), mock.patch("launcher.attempt.requeue.signal.signal"):
            environ |= lifecycle.begin(run, environ, slurm)
            environ["HOLDFAST_STARTED"] = f"{time.monotonic() - lived:.3f}"
            verdict, cause = lifecycle.end(run, environ, slurm, 75, [signals] if signals else [])
        made += 1
        assert cause is Cause.REQUEUED
        if not verdict.again:
            break
    assert made == attempts


def left_out(run: RunDir, job: Job, number: int, job_id: str, slurm: FakeSlurm) -> tuple[str, ...]:
    """Sends the job back at the end of an attempt, and returns what Slurm is told of its nodes."""
    slurm.jobs[job_id].state, slurm.jobs[job_id].restarts = "RUNNING", number - 1
    with mock.patch.object(slurm, "run", wraps=slurm.run) as ran, mock.patch("launcher.attempt.requeue.signal.signal"):
        send_back(run, job, number, job_id, number - 1, slurm)
    return next((call.args[2:] for call in ran.call_args_list if call.args[:2] == ("scontrol", "update")), ())


def test_a_bad_node_is_left_out_beside_the_jobs_own_and_used_again_when_its_time_is_over(tmp_path: Path) -> None:
    run, _ = made_run(tmp_path)
    # As EXCLUDE=node[1,3] is read: split at the comma.
    job = load(run.job_yaml).model_copy(update={"exclude": ("node[1", "3]")})
    slurm = FakeSlurm()
    job_id = slurm.new().id
    assert left_out(run, job, 1, job_id, slurm) == ()
    event_log.append(run.ledger, Event.BAD_NODE, attempt=1, job_id=job_id, node="node2", reason="x")
    assert left_out(run, job, 2, job_id, slurm) == (f"JobId={job_id}", "ExcNodeList=node[1,3],node2")
    with mock.patch("launcher.attempt.requeue.time.time", return_value=time.time() + job.avoid_node_h * 3600 + 60):
        assert left_out(run, job, 3, job_id, slurm) == (f"JobId={job_id}", "ExcNodeList=node[1,3]")
        assert left_out(run, job.model_copy(update={"exclude": ()}), 4, job_id, slurm) == (f"JobId={job_id}", "ExcNodeList=")
    # When too few nodes would be left, those of before are not held back either; the partition has four, and EXCLUDE takes two.
    assert left_out(run, job.model_copy(update={"nodes": 2}), 5, job_id, slurm) == (f"JobId={job_id}", "ExcNodeList=node[1,3]")


def test_a_successor_that_was_kept_away_from_a_node_takes_it_again_too(tmp_path: Path) -> None:
    run, _ = made_run(tmp_path)
    job, slurm = load(run.job_yaml), FakeSlurm()
    first, slurm.requeue_works = slurm.new().id, False
    event_log.append(run.ledger, Event.BAD_NODE, attempt=1, job_id=first, node="node2", reason="x")
    told = left_out(run, job, 1, first, slurm)
    successor = event_log.read(run.ledger)[-1]["successor"]
    assert told == (f"JobId={successor}", "ExcNodeList=node2")
    slurm.requeue_works = True
    with mock.patch("launcher.attempt.requeue.time.time", return_value=time.time() + job.avoid_node_h * 3600 + 60):
        assert left_out(run, job, 2, successor, slurm) == (f"JobId={successor}", "ExcNodeList=")


@pytest.mark.parametrize(
    ("refused", "said"),
    [(False, "Not requeued: cancelled"), (True, "holdfast resume")],
    ids=["cancelled by scancel", "refused by Slurm"],
)
def test_an_attempt_whose_nodes_fail_their_checks_says_when_it_is_not_requeued(tmp_path: Path, refused: bool, said: str) -> None:
    """A fake: a job that is cancelled between the checks of its nodes and its requeue."""
    run, _ = made_run(tmp_path)
    slurm = FakeSlurm()
    job = slurm.new()
    job.state = "RUNNING" if refused else "CANCELLED"
    slurm.requeue_works = slurm.successors = not refused
    environ = {"SLURM_JOB_ID": job.id, "SLURM_JOB_NODELIST": HERE}
    with (
        mock.patch("launcher.attempt.lifecycle.checked", return_value={"node1": "2 of 8 GPUs"}),
        mock.patch("launcher.attempt.requeue.signal.signal"),
        pytest.raises(HoldfastError, match=said) as err,
    ):
        lifecycle.begin(run, environ, slurm)
    assert "goes back into the queue" not in str(err.value) and job.restarts == 0
    assert isinstance(err.value, RunOwnedError) is refused
    assert judge(event_log.read(run.ledger), budgets_of(load(run.job_yaml))).again is refused


@pytest.mark.parametrize("job_is_known", [True, False])
def test_a_lost_requeue_excludes_the_bad_nodes_again(tmp_path: Path, job_is_known: bool) -> None:
    """A fake: slurmctld forgets the request while the script sleeps, or the whole job (`slurmctld -c`)."""
    run, _ = made_run(tmp_path)
    job, slurm = load(run.job_yaml).model_copy(update={"requeue_confirm_s": 3}), FakeSlurm()
    mine = slurm.new()
    mine.state, slept = "RUNNING", []

    def crash(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            mine.state, mine.restarts = ("RUNNING" if job_is_known else "GONE"), 0

    event_log.append(run.ledger, Event.BAD_NODE, attempt=1, job_id=mine.id, node="node2", reason="x")
    with (
        mock.patch.object(slurm, "run", wraps=slurm.run) as ran,
        mock.patch("launcher.attempt.requeue.signal.signal"),
        mock.patch("launcher.attempt.requeue.time.sleep", crash),
    ):
        assert send_back(run, job, 1, mine.id, 0, slurm)
    waiting = mine.id if job_is_known else "101"
    assert slept == [3, 3] and slurm.jobs[waiting].state == "PENDING"
    assert [call.args[2] for call in ran.call_args_list if call.args[:2] == ("scontrol", "update")] == [f"JobId={mine.id}", f"JobId={waiting}"]
    requests = [event for event in event_log.read(run.ledger) if event["event"] == Event.REQUEUE]
    assert len(requests) == 2 and "slurmctld lost the request before in a crash" in requests[1]["way"]


def test_a_request_that_is_lost_every_time_starts_no_attempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fake: slurmctld forgets each request."""
    run, _ = made_run(tmp_path)
    job, slurm = load(run.job_yaml).model_copy(update={"requeue_confirm_s": 3}), FakeSlurm()
    mine = slurm.new()
    mine.state = "RUNNING"

    def crash(_: float) -> None:
        mine.state, mine.restarts = "RUNNING", 0

    with mock.patch("launcher.attempt.requeue.signal.signal"), mock.patch("launcher.attempt.requeue.time.sleep", crash):
        assert not send_back(run, job, 1, mine.id, 0, slurm)
    assert f"slurmctld lost 20 requests to requeue job {mine.id}; holdfast resume {run.id} starts the run again" in capsys.readouterr().out

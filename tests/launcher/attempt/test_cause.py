"""From what is left behind to a cause: every row that was seen on a real Slurm, and those that the lab cannot make.

The texts are as Slurm 22.05.8 wrote them; docs/explanation/preemption.md has the table."""

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobs.core.contract import Cause
from jobs.run.retry_policy import BY_OWN_WISH
from launcher.attempt.classify_exit import Evidence, classify
from slurm.client import JobInfo
from slurm.states import ENDED


def stopped(signal: str, ranks: int = 2) -> dict[int, dict[str, object]]:
    return {rank: {"rank": rank, "reason": "stopped", "signal": signal, "step": 7} for rank in range(ranks)}


def failed(rank: int, kind: str, message: str, time: float = 1.0, **more: object) -> dict[int, dict[str, object]]:
    return {rank: {"rank": rank, "reason": "error", "kind": kind, "message": message, "time": time, **more}}


def finished(*ranks: int) -> dict[int, dict[str, object]]:
    return {rank: {"rank": rank, "reason": "finished", "step": 150} for rank in ranks}


def job(state: str = "RUNNING", **more: object) -> JobInfo:
    fields = {
        "job_id": "7",
        "state": state,
        "reason": "None",
        "restarts": 0,
        "nodes": "node[1-2]",
        "name": "a",
        "comment": "",
        "exit_code": "0:0",
        "preempted_at": None,
        "end_time": "2026-11-22T23:42:21",
        "time_limit": "01:00:00",
    }
    return JobInfo(**{**fields, **more})  # type: ignore[arg-type]


def line(reason: str = "", what: str = "JOB 7") -> str:
    return f"slurmstepd-node1: error: *** {what} ON node1 CANCELLED AT 2026-11-21T23:43:04{reason} ***\n"


PREEMPTION, REQUEUE, LIMIT = line(" DUE TO PREEMPTION"), line(" DUE TO JOB REQUEUE"), line(" DUE TO TIME LIMIT")
NODE = line(" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS")
PEER = failed(0, "RuntimeError", "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.12]:31222", 5.0)
ABORTED = "srun: Job step aborted: Waiting up to 6 seconds for job step to finish.\n"
NCCL_PEER = failed(0, "DistBackendError", "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error", 5.0)

# name: (evidence, cause)
TABLE: dict[str, tuple[dict[str, object], Cause]] = {
    "finished": ({"code": 0, "markers": finished(0, 1)}, Cause.FINISHED),
    "rank 0 finished, the other one was too slow to leave": ({"code": 137, "markers": finished(0)}, Cause.FINISHED),
    "finished, but srun was killed over it": ({"code": 137, "markers": finished(0, 1)}, Cause.FINISHED),
    "rank 0 is not heard of although srun says 0": ({"code": 0, "markers": finished(1)}, Cause.UNKNOWN),
    # preemption
    "preempted, grace 0": (
        {"code": 75, "markers": stopped("TERM"), "signals": ["TERM"], "log": PREEMPTION, "job": job("COMPLETING", end_time="Unknown")},
        Cause.PREEMPTED,
    ),
    "preempted, grace 12: no reason in the log yet": (
        {"code": 75, "markers": stopped("TERM"), "log": line(), "job": job(preempted_at="2026-11-21T23:43:00")},
        Cause.PREEMPTED,
    ),
    "preempted, user signal": (
        {"code": 75, "markers": stopped("USR2"), "job": job(preempted_at="2026-11-21T23:43:00"), "seconds_to_limit": 90.0, "lead_s": 120},
        Cause.PREEMPTED,
    ),
    "preempted, user signal, controller does not answer": (
        {"code": 75, "markers": stopped("USR2"), "seconds_to_limit": 3000.0, "lead_s": 120},
        Cause.PREEMPTED,
    ),
    "preempted, mode CANCEL": ({"code": 75, "markers": stopped("TERM"), "log": PREEMPTION, "job": job("PREEMPTED")}, Cause.PREEMPTED),
    "preempted, ranks had no time": ({"code": 137, "signals": ["TERM"], "log": PREEMPTION, "job": job("COMPLETING", end_time="Unknown")}, Cause.PREEMPTED),
    "preempted, nobody had time": ({"code": 1, "log": PREEMPTION, "brought_back": True}, Cause.PREEMPTED),
    "preempted, one rank stopped, another broke over it": (
        {"code": 75, "markers": {**stopped("TERM", 1), **failed(1, "RuntimeError", "Broken pipe")}, "log": PREEMPTION},
        Cause.PREEMPTED,
    ),
    "preempted while importing": (
        {"code": 143, "signals": ["TERM"], "job": job("COMPLETING", end_time="Unknown"), "log": PREEMPTION + ABORTED},
        Cause.PREEMPTED,
    ),
    # time limit
    "time limit, warned": ({"code": 75, "markers": stopped("USR2"), "job": job(), "seconds_to_limit": 31.0, "lead_s": 45}, Cause.TIME_LIMIT),
    "time limit, warned 60 s early": ({"code": 75, "markers": stopped("USR2"), "job": job(), "seconds_to_limit": 104.0, "lead_s": 45}, Cause.TIME_LIMIT),
    "time limit, warned before any rank could listen": ({"code": 140, "job": job(), "seconds_to_limit": 38.0, "lead_s": 38}, Cause.TIME_LIMIT),
    "preempted, user signal before any rank could listen": (
        {"code": 140, "job": job(preempted_at="2026-11-21T23:43:00"), "seconds_to_limit": 3000.0, "lead_s": 120},
        Cause.PREEMPTED,
    ),
    "a script of one's own that does not listen": ({"code": 140, "own_script": True, "job": job(), "seconds_to_limit": 38.0, "lead_s": 38}, Cause.KILLED),
    "time limit, the warning was lost": ({"code": 75, "markers": stopped("TERM"), "log": LIMIT, "job": job("COMPLETING")}, Cause.TIME_LIMIT),
    "time limit, state says it": ({"code": 75, "markers": stopped("TERM"), "job": job("TIMEOUT")}, Cause.TIME_LIMIT),
    "time limit, killed in a save": ({"code": 137, "log": line() + LIMIT, "signals": ["TERM"]}, Cause.TIME_LIMIT),
    # requeue by others
    "scontrol requeue": (
        {"code": 75, "markers": stopped("TERM"), "signals": ["TERM"], "log": REQUEUE, "job": job("COMPLETING", end_time="Unknown")},
        Cause.REQUEUED,
    ),
    "scontrol requeue, pending already": ({"code": 75, "markers": stopped("TERM"), "job": job("PENDING")}, Cause.REQUEUED),
    "a person sends TERM to the step": ({"code": 75, "markers": stopped("TERM"), "job": job()}, Cause.REQUEUED),
    # scancel
    "scancel": ({"code": 75, "markers": stopped("TERM"), "signals": ["TERM"], "log": line(), "job": job("COMPLETING")}, Cause.CANCELLED),
    "scancel, 26.05: a reason that is none": (
        {"code": 75, "markers": stopped("TERM"), "signals": ["TERM"], "log": line(" DUE to SIGNAL Terminated"), "job": job("COMPLETING")},
        Cause.CANCELLED,
    ),
    "scancel, no log": ({"code": 75, "markers": stopped("TERM"), "signals": ["TERM"], "job": job("COMPLETING")}, Cause.CANCELLED),
    "scancel, the state behind COMPLETING": ({"code": 75, "markers": stopped("TERM"), "job": job("COMPLETING", ended_as="CANCELLED")}, Cause.CANCELLED),
    "scancel, and the log of a script that prints a daemon's line": (
        {"code": 75, "markers": stopped("TERM"), "log": PREEMPTION, "job": job("COMPLETING", ended_as="CANCELLED")},
        Cause.CANCELLED,
    ),
    "scancel of 26.05, nobody could say, and another job comes": (
        {"code": 75, "markers": stopped("TERM"), "log": line(" DUE to SIGNAL Terminated"), "gone": True},
        Cause.CANCELLED,
    ),
    "preempted, the state behind COMPLETING": ({"code": 75, "markers": stopped("TERM"), "job": job("COMPLETING", ended_as="PREEMPTED")}, Cause.PREEMPTED),
    "put back by Slurm, no log": ({"code": 75, "markers": stopped("TERM"), "job": job("COMPLETING", ended_as="PENDING"), "put_back": True}, Cause.REQUEUED),
    "scancel, state says it": ({"code": 75, "markers": stopped("TERM"), "log": line(), "job": job("CANCELLED")}, Cause.CANCELLED),
    "scancel, nobody could say, and another job comes": ({"code": 75, "markers": stopped("TERM"), "log": line(), "gone": True}, Cause.CANCELLED),
    "scancel, killed at once, and another job comes": ({"code": 1, "log": line(), "gone": True}, Cause.CANCELLED),
    "scancel, sacct": ({"code": 1, "accounting": ["CANCELLED by 1000", "CANCELLED"], "gone": True}, Cause.CANCELLED),
    "holdfast cancel": ({"code": 75, "markers": stopped("TERM"), "log": PREEMPTION, "cancel_wished": True}, Cause.CANCELLED),
    "a stop file": ({"code": 75, "markers": stopped("stop file"), "job": job()}, Cause.CANCELLED),
    "a stop file with a reason": ({"code": 75, "markers": stopped("stop file"), "stop_file": "lunch"}, Cause.CANCELLED),
    "a sweep gives a trial up": ({"code": 75, "markers": stopped("stop file"), "job": job(), "stop_file": "pruned at step 40"}, Cause.PRUNED),
    "a sweep gives a trial up, and a preemption is faster": (
        {"code": 75, "markers": stopped("TERM"), "log": PREEMPTION, "stop_file": "pruned at step 40"},
        Cause.PRUNED,
    ),
    "a sweep gives a trial of a person's own script up": ({"code": 75, "own_script": True, "stop_file": "pruned at step 40"}, Cause.PRUNED),
    "a trial finished before it heard that it is given up": ({"code": 0, "markers": finished(0, 1), "stop_file": "pruned at step 40"}, Cause.FINISHED),
    # nodes
    "node down, told by scontrol update": ({"code": 143, "log": NODE + ABORTED, "signals": ["TERM"]}, Cause.NODE_FAILURE),
    "node down, ranks stopped in time": ({"code": 75, "markers": stopped("TERM"), "log": NODE, "signals": ["TERM"]}, Cause.NODE_FAILURE),
    "slurmd and tasks killed, srun says 0": (
        {"code": 0, "markers": PEER, "log": "srun: First task exited 5s ago\nsrun: StepId=2.0 task 1: running\nsrun: error: Node failure on node2\n"},
        Cause.NODE_FAILURE,
    ),
    "slurmd and tasks killed, not noticed yet by srun": ({"code": 1, "markers": PEER, "lost_nodes": ["node2"]}, Cause.NODE_FAILURE),
    "the batch node died": ({"code": 1, "brought_back": True}, Cause.NODE_FAILURE),
    "Slurm took the node for dead, and its script still lived": ({"code": 137, "put_back": True}, Cause.NODE_FAILURE),
    "the same, and all ranks had left in time": ({"code": 75, "put_back": True, "markers": stopped("TERM")}, Cause.REQUEUED),
    "the batch node died, sacct": ({"code": 1, "accounting": ["NODE_FAIL", "FAILED", "COMPLETED"]}, Cause.NODE_FAILURE),
    "an ECC error": ({"code": 1, "markers": failed(1, "AcceleratorError", "CUDA error: uncorrectable ECC error encountered")}, Cause.NODE_FAILURE),
    # memory
    "OverMemoryKill": (
        {"code": 137, "log": "slurmstepd-node1: error: Exceeded job memory limit\n" + line(what="STEP 1.0") + "srun: error: node2: task 1: Killed\n"},
        Cause.OUT_OF_MEMORY,
    ),
    "OverMemoryKill, in the rank's log": (
        {"code": 137, "rank_logs": "slurmstepd-node2: error: StepId=1.0 exceeded memory limit (193884160 > 157286400), being killed\n"},
        Cause.OUT_OF_MEMORY,
    ),
    "cgroup": (
        {
            "code": 137,
            "markers": PEER,
            "log": "slurmstepd: error: Detected 1 oom_kill event in StepId=5.0. Some of the step tasks have been OOM Killed.\nsrun: error: node1: task 1: Out Of Memory\n",
        },
        Cause.OUT_OF_MEMORY,
    ),
    "cgroup, older words": (
        {
            "code": 137,
            "log": "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=5.batch. Some of your processes may have been killed by the cgroup out-of-memory handler.\n",
        },
        Cause.OUT_OF_MEMORY,
    ),
    "the step's row in sacct": ({"code": 137, "accounting": ["FAILED", "OUT_OF_MEMORY"]}, Cause.OUT_OF_MEMORY),
    "CUDA memory": ({"code": 1, "markers": {**failed(1, "OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB"), **PEER}}, Cause.OUT_OF_MEMORY),
    "Python's memory": ({"code": 1, "markers": failed(0, "MemoryError", "")}, Cause.OUT_OF_MEMORY),
    # code
    "a rank raises": ({"code": 1, "markers": {**failed(1, "ValueError", "shapes do not fit", 1.0), **PEER}}, Cause.CODE_ERROR),
    "a rank raises, over NCCL": ({"code": 1, "markers": {**failed(1, "KeyError", "'labels'", 1.0), **NCCL_PEER}}, Cause.CODE_ERROR),
    "a job that can never run": ({"code": 78, "markers": failed(0, "ImpossibleJobError", "PRECISION=fp8 does not run on a CPU")}, Cause.CODE_ERROR),
    "import fails before a marker can be written": ({"code": 78}, Cause.CODE_ERROR),
    # storage
    "disk full": (
        {"code": 1, "markers": {**failed(0, "OSError", "No space left on device", errno=28), **failed(1, "RuntimeError", "Connection reset by peer", 3.0)}},
        Cause.STORAGE,
    ),
    "a checkpoint cannot be written": ({"code": 1, "markers": failed(0, "CheckpointError", "checkpoint of step 7 could not be written")}, Cause.STORAGE),
    # killed
    "SIGKILL of a rank": ({"code": 137, "markers": PEER, "job": job()}, Cause.KILLED),
    "SIGKILL of a rank over NCCL": ({"code": 137, "markers": NCCL_PEER}, Cause.KILLED),
    "SIGKILL of the only rank": ({"code": 137, "world": 1}, Cause.KILLED),
    "SIGSEGV": ({"code": 139}, Cause.KILLED),
    # hang
    "hang": ({"code": 137, "hang": {"evidence": "no progress for 20 s", "ranks": [1]}}, Cause.HANG),
    "hang, and a rank that stopped when it was killed": (
        {"code": 137, "hang": {"evidence": "x"}, "markers": stopped("TERM", 1), "signals": ["TERM"]},
        Cause.HANG,
    ),
    # a person's own script, which leaves no markers
    "own script, srun starts no task": (
        {"code": 1, "own_script": True, "job": job(), "log": "srun: error: Unable to create step for job 6: Invalid generic resource (gres) specification\n"},
        Cause.UNKNOWN,
    ),
    "own script, fails in a step that srun made in the end": (
        {
            "code": 1,
            "own_script": True,
            "job": job(),
            "log": "srun: error: Unable to create step for job 6: Nodes busy\nsrun: error: node1: task 0: Exited with exit code 1\n",
        },
        Cause.CODE_ERROR,
    ),
    "own script, done": ({"code": 0, "own_script": True}, Cause.FINISHED),
    "own script, ends with 0 after a preemption": ({"code": 0, "own_script": True, "signals": ["TERM"], "log": PREEMPTION}, Cause.PREEMPTED),
    "own script, ends with 0 in the grace": (
        {"code": 0, "own_script": True, "log": line(), "job": job(preempted_at="2026-11-21T23:43:00")},
        Cause.PREEMPTED,
    ),
    "own script, ends with 0 after scancel": ({"code": 0, "own_script": True, "signals": ["TERM"], "log": line(), "job": job("COMPLETING")}, Cause.CANCELLED),
    "own script, ends with 0 after holdfast cancel": ({"code": 0, "own_script": True, "signals": ["TERM"], "cancel_wished": True}, Cause.CANCELLED),
    "own script, ends with 0 after Ctrl-C": ({"code": 0, "own_script": True, "stop_sent": "INT"}, Cause.REQUEUED),
    "own script, ends with 0 after the stop file": ({"code": 0, "own_script": True, "stop_sent": "stop file"}, Cause.CANCELLED),
    "own script, ends with 0 after its stop signal": (
        {"code": 0, "own_script": True, "stop_sent": "USR1", "signals": ["USR2"], "job": job(), "seconds_to_limit": 50.0, "lead_s": 45},
        Cause.TIME_LIMIT,
    ),
    "own script, killed by its stop signal": (
        {"code": 138, "own_script": True, "stop_sent": "USR1", "job": job(), "seconds_to_limit": 50.0, "lead_s": 45},
        Cause.TIME_LIMIT,
    ),
    "own script, ends with 0 after a warning that was not forwarded": ({"code": 0, "own_script": True, "signals": ["USR2"], "job": job()}, Cause.FINISHED),
    "own script, declares itself finished": (
        {"code": 143, "own_script": True, "markers": finished(0), "world": 2, "signals": ["TERM"], "log": PREEMPTION},
        Cause.FINISHED,
    ),
    "own script, still running near the limit": (
        {"code": 75, "own_script": True, "signals": ["USR2"], "limit_near": True, "job": job(), "seconds_to_limit": 14.0, "lead_s": 30},
        Cause.TIME_LIMIT,
    ),
    "own script, one fails and the others are killed": ({"code": 137, "own_script": True, "failed_rank": (1, 3), "world": 2}, Cause.CODE_ERROR),
    "own script, stopped at a preemption": ({"code": 75, "own_script": True, "signals": ["TERM"], "log": PREEMPTION}, Cause.PREEMPTED),
    "own script, stopped in the grace": ({"code": 75, "own_script": True, "log": line(), "job": job(preempted_at="2026-11-21T23:43:00")}, Cause.PREEMPTED),
    "own script, stopped at the warning": ({"code": 75, "own_script": True, "job": job(), "seconds_to_limit": 50.0, "lead_s": 45}, Cause.TIME_LIMIT),
    "own script, leaves with 75 unasked": ({"code": 75, "own_script": True, "job": job(), "seconds_to_limit": 3500.0, "lead_s": 120}, Cause.REQUEUED),
    "own script, knows no signals": ({"code": 143, "own_script": True, "signals": ["TERM"], "log": PREEMPTION}, Cause.PREEMPTED),
    "own script, scancel": ({"code": 143, "own_script": True, "signals": ["TERM"], "log": line(), "job": job("COMPLETING")}, Cause.CANCELLED),
    "own script, raises": ({"code": 1, "own_script": True}, Cause.CODE_ERROR),
    "own script, SIGKILL": ({"code": 137, "own_script": True}, Cause.KILLED),
    "own script, node lost": ({"code": 1, "own_script": True, "lost_nodes": ["node2"]}, Cause.NODE_FAILURE),
    # nothing to go by
    "nothing": ({"code": 1}, Cause.UNKNOWN),
    "sacct knows only that it failed": ({"code": 1, "accounting": ["FAILED", "FAILED"]}, Cause.UNKNOWN),
    "sacct says of a step that it was cancelled": ({"code": 137, "accounting": ["FAILED", "CANCELLED by 0"]}, Cause.KILLED),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_evidence_of_each_fault_leads_to_its_cause(name: str) -> None:
    fields, cause = TABLE[name]
    seen = Evidence(**{"world": 2, **fields})  # type: ignore[arg-type]
    found, words = classify(seen)
    assert found is cause, words
    assert words and "\n" not in words


def test_the_failing_rank_is_named_and_not_its_echo() -> None:
    seen = Evidence(code=1, world=2, markers={**PEER, **failed(1, "ValueError", "shapes do not fit", 9.0)})
    assert classify(seen)[1] == "rank 1: ValueError: shapes do not fit"


def test_of_two_own_errors_the_first_is_named() -> None:
    seen = Evidence(code=1, world=2, markers={**failed(0, "ValueError", "late", 9.0), **failed(1, "KeyError", "early", 2.0)})
    assert "rank 1" in classify(seen)[1]


def test_a_script_that_leaves_with_75_asked_for_it_itself_only_where_no_sign_of_a_stop_was_seen() -> None:
    seen = Evidence(code=75, own_script=True, job=job(), seconds_to_limit=3500.0, lead_s=120)
    assert classify(seen)[1].startswith(BY_OWN_WISH)
    helped = {0: {"rank": 0, "reason": "stopped", "signal": "its own wish"}}
    assert classify(replace(seen, markers=helped))[1].startswith(BY_OWN_WISH)
    asked: list[dict[str, Any]] = [
        {"signals": ["TERM"]}, {"signals": ["INT"]}, {"job": job("PENDING")}, {"job": job(preempted_at="2026-11-21T23:43:00")},
        {"log": PREEMPTION}, {"log": line(), "job": None}, {"seconds_to_limit": 100.0}, {"unanswered": True, "job": None},
    ]  # fmt: skip
    for more in asked:
        assert not classify(replace(seen, **more))[1].startswith(BY_OWN_WISH), more


def test_every_state_that_ends_a_job_has_a_cause() -> None:
    assert {"COMPLETED", "PREEMPTED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "CANCELLED", "FAILED", "DEADLINE"} <= set(ENDED)


_markers = st.dictionaries(
    st.integers(0, 3),
    st.fixed_dictionaries(
        {},
        optional={
            "rank": st.integers(0, 3), "reason": st.sampled_from(["stopped", "error", "finished", "", None]), "signal": st.sampled_from(["TERM", "USR2", "INT", "stop file", "a later attempt"]),
            "kind": st.text(max_size=8), "message": st.text(max_size=20), "time": st.one_of(st.floats(allow_nan=False), st.none(), st.text(max_size=3)), "errno": st.one_of(st.none(), st.integers(0, 130)),
        },
    ),
)  # fmt: skip
_evidence = st.builds(
    Evidence,
    code=st.integers(0, 255),
    signals=st.lists(st.sampled_from(["TERM", "USR2"]), max_size=3),
    markers=_markers,
    world=st.integers(1, 4),
    log=st.sampled_from(["", PREEMPTION, REQUEUE, NODE, line(), ABORTED, "srun: error: Node failure on node2", "Exceeded job memory limit"]),
    rank_logs=st.sampled_from(["", "Detected 1 oom_kill event"]),
    job=st.one_of(
        st.none(), st.builds(job, st.sampled_from(["RUNNING", "COMPLETING", "PENDING", *ENDED]), preempted_at=st.sampled_from([None, "2026-11-21T23:43:00"]))
    ),
    seconds_to_limit=st.one_of(st.none(), st.floats(-1e9, 1e9)),
    lead_s=st.integers(0, 600),
    cancel_wished=st.booleans(),
    accounting=st.lists(st.sampled_from([*ENDED, "RUNNING", "", "CANCELLED by 1000"]), max_size=3),
    hang=st.one_of(st.none(), st.just({}), st.just({"evidence": "x"})),
    lost_nodes=st.lists(st.just("node2"), max_size=1),
    brought_back=st.booleans(),
    put_back=st.booleans(),
    gone=st.booleans(),
    unanswered=st.booleans(),
    own_script=st.booleans(),
    stop_file=st.sampled_from(["", "lunch", "pruned at step 40"]),
)


def test_what_srun_says_of_a_step_that_could_not_be_made_stands_in_the_evidence() -> None:
    log = "srun: error: Unable to create step for job 29: Invalid generic resource (gres) specification\n"
    cause, evidence = classify(Evidence(code=1, world=2, log=log))
    assert cause is Cause.UNKNOWN and "Unable to create step" in evidence


@pytest.mark.parametrize("lost", [{}, {1: {"rank": 1, "reason": "error", "kind": "DistNetworkError", "message": "Connection closed by peer"}}])
def test_what_is_gone_without_a_word_was_killed_unless_slurm_could_not_be_asked(lost: dict[int, dict[str, Any]]) -> None:
    seen = Evidence(code=137, world=2, markers=lost)
    assert classify(seen)[0] is Cause.KILLED
    cause, evidence = classify(replace(seen, unanswered=True))
    assert cause is Cause.UNKNOWN and "Slurm did not say" in evidence and f"rank {'0' if lost else '0, 1'} left" in evidence
    # What the log says needs no answer.
    assert classify(replace(seen, unanswered=True, log=PREEMPTION))[0] is Cause.PREEMPTED


@given(_evidence)
def test_classifying_is_pure_and_total(seen: Evidence) -> None:
    before = copy.deepcopy(seen)
    first = classify(seen)
    assert classify(seen) == first and seen == before
    assert isinstance(first[0], Cause) and isinstance(first[1], str) and first[1]


@given(_evidence)
@example(Evidence(code=0, world=1, markers={1: {"reason": "finished"}}))  # of a rank that there is not
def test_a_run_is_finished_only_when_rank_0_says_so_behind_the_barrier_of_all(seen: Evidence) -> None:
    if classify(seen)[0] is Cause.FINISHED and not (seen.own_script and seen.code == 0):
        assert seen.markers[0].get("reason") == "finished"


@given(_evidence)
def test_a_wish_to_cancel_is_never_overruled_by_anything_but_the_end_or_a_hang(seen: Evidence) -> None:
    if seen.cancel_wished:
        assert classify(seen)[0] in (Cause.CANCELLED, Cause.FINISHED, Cause.HANG)

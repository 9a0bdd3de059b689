"""Every fault of the table, done to a run on a real Slurm, and what became of it.

    python -m tools.chaos            all rows (`make chaos`)
    python -m tools.chaos 10 18      these rows only

Both write what was seen to docs/evidence/survival.json, row by row, and docs/evidence/survival.md from it.

Each row is a function that breaks something and returns a `Row`; tests/slurm/test_survival.py runs a few of them in `make test`.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "tests", "tests/support")]

import save_sweep
from conftest import REPOSITORY, SMALL, Cluster, losses, until, weights_sha

from jobs.core.contract import Event
from jobs.run import event_log, goodput
from jobs.run.rundir import RunDir
from launcher.local.executor import pid_of_rank
from slurm.daemon_log import cancel_reasons
from slurm.devcluster import lab, proc, slurm_conf

# Two nodes with one rank each: the least that has a network between the ranks.
PAIR = {"NODES": "2", "GPUS_PER_NODE": "1", "MAX_STEPS": "120", "EVAL_EVERY": "60"}
INTERVAL = int(SMALL["CHECKPOINT_EVERY"])
_MODELS = Path(__file__).resolve().parents[1] / "tests" / "support" / "models"
RESULTS = REPOSITORY / "docs" / "evidence" / "survival.json"


@dataclass
class Row:
    """One fault. `truth` is what was done to the first attempt, `causes` what the ledger says of all of them."""

    fault: str
    truth: str
    causes: list[str] = field(default_factory=list)
    sent: str = ""
    lost: int = 0
    seconds: float | None = None
    identical: str = "-"
    note: str = ""
    number: str = ""
    # Worst case of steps lost that the row allows; None where the run is not to come back.
    allowed: int | None = 0
    # What was recorded about every attempt that a fault ended; the last one of a run that finished had none.
    pairs: list[tuple[str, str]] = field(default_factory=list)
    # Where the time went: seconds from START to END and their parts, of every attempt.
    spent: list[dict[str, float]] = field(default_factory=list)


class Stage:
    """A cluster, and the undisturbed runs to compare with. Those do not depend on the cluster and are kept over all of them."""

    references: dict[str, tuple[str, list[tuple[int, float, float | None]]]] = {}

    def __init__(self, cluster: Cluster):
        self.cluster = cluster

    def submit(self, *words: str, fault: str = "", node_env: str = "", **settings: str) -> RunDir:
        env = f"PYTHONPATH={_MODELS}" + (f",FAULT={fault}" if fault else "") + (f",{node_env}" if node_env else "")
        return self.cluster.submit(*words, **{**PAIR, **settings, "DATA": "faults:build", "NODE_ENV": env})

    def same(self, run: RunDir, **settings: str) -> bool:
        """Whether weights and every logged loss are those of an undisturbed run of the same settings, bit for bit."""
        return (weights_sha(run), losses(run)) == self.reference(**settings)

    def reference(self, **settings: str) -> tuple[str, list[tuple[int, float, float | None]]]:
        plain = {**PAIR, **settings}
        for name in ("TIME_LIMIT", "STOP_LEAD_S", "HANG_AFTER_S", "HANG_QUIET_S", "MEM_GB", "CHECKPOINT_EVERY", "CPUS_PER_GPU", "EXCLUDE"):
            plain.pop(name, None)
        key = json.dumps(plain, sort_keys=True)
        if key not in self.references:
            reference = self.submit(**plain)
            attempts = self.cluster.finished(reference, 200)
            assert len(attempts) == 1, self.cluster.logs(reference)
            self.references[key] = (weights_sha(reference), losses(reference))
        return self.references[key]

    def new_step(self, run: RunDir, after: int, seconds: float = 150) -> float:
        """Waits until a later attempt than `after` has made a step of its own; Unix seconds of it."""

        def made() -> float | None:
            for known in event_log.attempts(event_log.read(run.ledger)):
                if known.number <= after:
                    continue
                with contextlib.suppress(OSError, ValueError):
                    progress = run.attempt(known.number).progress
                    if int(progress.read_text()) > known.start_step and any(
                        e["event"] == Event.RESUMED and e["attempt"] == known.number for e in event_log.read(run.ledger)
                    ):
                        return progress.stat().st_mtime
            return None

        return float(until(made, seconds, lambda: f"a step after attempt {after} of {run.id}\n{self.cluster.logs(run)}"))

    def survived(self, row: Row, run: RunDir, fault_at: float, seconds: float = 150, after: int = 1, **settings: str) -> Row:
        """Fills in a row whose run comes back and finishes."""
        row.seconds = round(self.new_step(run, after, seconds) - fault_at, 1)
        attempts = self.cluster.finished(run, seconds)
        row.causes = [str(known.cause) for known in attempts]
        row.pairs = [(row.truth, cause) for cause in row.causes[:-1]]
        row.lost = sum(known.lost_steps for known in attempts)
        row.sent = sent(run, attempts[0])
        row.identical = "yes" if self.same(run, **settings) else "NO"
        self.nothing_left(run)
        return booked(row, run)

    def ended(self, row: Row, run: RunDir, seconds: float = 90, attempts: int = 1) -> Row:
        """Fills in a row whose run is over, and waits long enough to see that it does not come back."""
        until(
            lambda: len([known for known in event_log.attempts(event_log.read(run.ledger)) if known.cause]) >= attempts,
            seconds,
            lambda: f"the end of {run.id}\n{self.cluster.logs(run)}",
        )
        until(lambda: not self.queued(run), 60, f"{run.id} to leave the queue")
        time.sleep(8)  # longer than a requeued job waits
        assert not self.queued(run), "it came back"
        found = event_log.attempts(event_log.read(run.ledger))
        row.causes, row.allowed = [str(known.cause) for known in found], None
        row.pairs = [(row.truth, cause) for cause in row.causes]
        row.lost = sum(known.lost_steps for known in found)
        row.sent = sent(run, found[0])
        self.nothing_left(run)
        return booked(row, run)

    def queued(self, run: RunDir) -> str:
        return self.cluster.slurm("squeue", "-h", "-n", run.id).strip()

    def nothing_left(self, run: RunDir) -> None:
        """No process of a job stays behind on any node (a stopped one would)."""

        def gone() -> bool:
            jobs = [process for found in proc.of_lab(self.cluster.lab.root).jobs.values() for process in found]
            return not [p for p in jobs if proc.environment(p.pid).get("HOLDFAST_RUN_DIR") == str(run.path)]

        until(gone, 40, f"the last process of {run.id} to end")

    def preempt(self, nodes: int = 4) -> float:
        now = time.time()
        self.cluster.slurm("sbatch", "-p", "high", f"-N{nodes}", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null")
        return now

    def signal(self, run: RunDir, name: str) -> float:
        now = time.time()
        self.cluster.slurm("scancel", "-s", name, self.cluster.job_id(run))
        return now

    def nodes(self, run: RunDir, attempt: int = 1) -> list[str]:
        return list(event_log.attempts(event_log.read(run.ledger))[attempt - 1].nodes)


def booked(row: Row, *runs: RunDir) -> Row:
    """The row with the account of its runs' time."""
    for run in runs:
        row.spent += [{"seconds": one.seconds, **one.parts_s} for one in goodput.account(event_log.read(run.ledger)).attempts]
    return row


def unbalanced(attempt: dict[str, float]) -> bool:
    """Whether an attempt's parts do not sum to its allocation within 1 %, or leave too much unexplained."""
    seconds = attempt["seconds"]
    parts = sum(value for name, value in attempt.items() if name != "seconds")
    return abs(parts - seconds) > 0.01 * seconds or attempt["other"] > max(0.05 * seconds, 2.0)


def sent(run: RunDir, first: event_log.Attempt) -> str:
    """What Slurm sent in an attempt, as the ranks and the batch log tell it."""
    signals = []
    for marker in sorted(run.attempt(first.number).path.glob("exit.*.json")):
        with contextlib.suppress(ValueError):
            signals.append(json.loads(marker.read_text()).get("signal"))
    heard = sorted({word for word in signals if word})
    log = run.log(first.job_id, "batch")
    text = log.read_text(errors="replace") if log.exists() else ""
    # What comes behind is Slurm's answer to our own requeue.
    text = text.partition(f"holdfast: attempt {first.number} ended")[0]
    reasons = list(dict.fromkeys(cancel_reasons(text)))
    words = [f"{'+'.join(heard)} to the ranks"] if heard else ["nothing that a rank could act on"]
    if reasons:
        words.append("log: " + ", ".join(f"DUE TO {reason}" if reason else "CANCELLED" for reason in reasons))
    return "; ".join(words)


# ------------------------------------------------------------------------------------------------------------- the rows


def _preemption(stage: Stage, fault: str, **settings: str) -> Row:
    run = stage.submit(**settings)
    stage.cluster.at_step(run, 25)
    return stage.survived(Row(fault, "preempted"), run, stage.preempt(), **settings)


def row_1(stage: Stage) -> Row:
    return _preemption(stage, "preemption, REQUEUE, GraceTime 5")


def row_2(stage: Stage) -> Row:
    return _preemption(stage, "preemption, REQUEUE, GraceTime 0")


def row_3(stage: Stage) -> Row:
    return _preemption(stage, "preemption, `preempt_send_user_signal`, GraceTime 5")


def row_4(stage: Stage) -> Row:
    return _preemption(stage, "preemption, PreemptMode=CANCEL")


def _time_limit(stage: Stage, fault: str, **more: str) -> tuple[Row, RunDir]:
    settings = {"TIME_LIMIT": "1", "STOP_LEAD_S": "45", "CHECKPOINT_EVERY": "1000", **more}
    node_env = settings.pop("node_env", "")
    run = stage.submit(node_env=node_env, **settings)
    until(lambda: any(e["event"] == Event.STOP for e in event_log.read(run.ledger)), 90, lambda: f"the warning\n{stage.cluster.logs(run)}")
    row = stage.survived(Row(fault, "time_limit"), run, time.time(), seconds=250, **{k: v for k, v in more.items() if k != "node_env"})
    return row, run


def row_5(stage: Stage) -> Row:
    return _time_limit(stage, "time limit, warned 45 s before", MAX_STEPS="600", EVAL_EVERY="300")[0]


def row_6(stage: Stage) -> Row:
    # Validations of about 6 s with hardly a step between them.
    row, run = _time_limit(stage, "time limit while validating", MAX_STEPS="40", EVAL_EVERY="8", EVAL_SAMPLES="64", node_env="SLOW_VAL_S=1.5")
    pending = "was stopped while it validated" if any("pending" in line for line in run.metrics.read_text().splitlines()) else ""
    row.note = pending
    return row


def row_7(stage: Stage) -> Row:
    run = stage.submit()
    stage.cluster.at_step(run, 25)
    at = time.time()
    stage.cluster.slurm("scontrol", "requeue", stage.cluster.job_id(run))
    return stage.survived(Row("`scontrol requeue` by a person", "requeued"), run, at)


def row_8(stage: Stage) -> Row:
    run = stage.submit()
    stage.cluster.at_step(run, 60)
    node = stage.nodes(run)[1]
    at = time.time()
    stage.cluster.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=chaos")
    row = stage.survived(Row("node down (`scontrol update`)", "node_failure", allowed=INTERVAL), run, at)
    with contextlib.suppress(subprocess.CalledProcessError):
        stage.cluster.slurm("scontrol", "update", f"nodename={node}", "state=resume")
    return row


def _dead_node(stage: Stage, which: int, fault: str, told: bool, node_env: str = "") -> Row:
    run = stage.submit(node_env=node_env)
    stage.cluster.at_step(run, 60)
    node = stage.nodes(run)[which]
    at = time.time()
    stage.cluster.lab.kill_node(node)
    if told:
        stage.cluster.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=chaos")
    try:
        return stage.survived(Row(fault, "node_failure", allowed=INTERVAL), run, at)
    finally:
        stage.cluster.lab.restart_node(node)


def row_9(stage: Stage) -> Row:
    return _dead_node(stage, 1, "slurmd and tasks of a node killed -9", told=False)


def row_9b(stage: Stage) -> Row:
    return _dead_node(stage, 0, "the same for the node of the batch script", told=False)


def row_10(stage: Stage) -> Row:
    run = stage.submit()
    stage.cluster.at_step(run, 60)
    at = time.time()
    kill_rank(run, 1, signal.SIGKILL)
    return stage.survived(Row("SIGKILL of one rank", "killed", allowed=INTERVAL), run, at)


def row_11(stage: Stage) -> Row:
    run = stage.submit(fault="raise:60:1")
    row = stage.ended(Row("a rank raises", "code_error"), run)
    assert "this sample cannot be read" in run.log(stage.cluster.job_id(run), "batch").read_text()
    row.note = "the traceback is in the batch log and in `status`"
    return row


def row_12(stage: Stage) -> Row:
    run = stage.submit(fault="eat:60:1", MEM_GB="1")
    return stage.ended(Row("out of memory (OverMemoryKill)", "out_of_memory"), run)


def row_12b(stage: Stage) -> Row:
    run = stage.submit(fault="eat:60:1", MEM_GB="1")
    return stage.ended(Row("out of memory (memory cgroup, the kernel kills)", "out_of_memory"), run)


def row_13(stage: Stage) -> Row:
    # Before the fault: in the first seconds of a new slurmctld a step may be refused ("Invalid generic resource"), until the nodes
    # have told it what they have. A run meets that with another attempt; the one to compare with shall have one only.
    stage.reference(MAX_STEPS="300", EVAL_EVERY="150")
    run = stage.submit(MAX_STEPS="300", EVAL_EVERY="150")
    stage.cluster.at_step(run, 25)
    stage.cluster.lab.kill_controller()
    time.sleep(20)
    stage.cluster.lab.start_controller()
    attempts = stage.cluster.finished(run, 150)
    row = Row("slurmctld killed, started 20 s later, while the job runs", "-", [str(known.cause) for known in attempts], "nothing")
    row.identical = "yes" if stage.same(run, MAX_STEPS="300", EVAL_EVERY="150") else "NO"
    stage.nothing_left(run)
    return booked(row, run)


def row_13b(stage: Stage) -> Row:
    run = stage.submit()
    stage.cluster.at_step(run, 25)
    at = stage.signal(run, "TERM")
    stage.cluster.lab.kill_controller()
    time.sleep(20)
    stage.cluster.lab.start_controller()
    return stage.survived(Row("the same while the job stops (TERM from a person)", "requeued"), run, at)


def row_14(stage: Stage) -> Row:
    with tools(sacct="echo 'sacct: error: slurm_persist_conn_open' >&2; exit 1") as path:
        return _dead_node(stage, 0, "`sacct` fails, batch node lost", told=True, node_env=f"PATH={path}")


def row_14b(stage: Stage) -> Row:
    with tools(sacct="sleep 60") as path:
        return _dead_node(stage, 0, "`sacct` hangs, batch node lost", told=True, node_env=f"PATH={path}")


def row_14c(stage: Stage) -> Row:
    # The row of another time, as an accounting that lags shows it.
    with tools(
        sacct='while [ $# -gt 0 ]; do [ "$1" = -j ] && j=$2; shift; done; echo "$j|PREEMPTED|0:0|2026-01-01T00:00:00|2026-01-01T00:01:00"; echo "$j|RUNNING|0:0|Unknown|Unknown"'
    ) as path:
        return _dead_node(stage, 0, "`sacct` lags and shows an older attempt, batch node lost", told=True, node_env=f"PATH={path}")


def row_15(stage: Stage) -> Row:
    run = stage.submit()
    stage.cluster.at_step(run, 25)
    at = stage.signal(run, "USR2")
    time.sleep(0.05)
    stage.signal(run, "TERM")
    row = stage.survived(Row("USR2, and TERM 50 ms later", "requeued"), run, at)
    # USR2 long before the limit is what a preemption with preempt_send_user_signal looks like, and nobody else sends it.
    row.truth, row.pairs = "preempted", [("preempted", cause) for cause in row.causes[:-1]]
    row.note = "USR2 counts, the second one changes nothing"
    return row


def row_15b(stage: Stage) -> Row:
    run = stage.submit(node_env="SLOW_SAVE_S=3")
    until(lambda: list(run.checkpoints.glob(".*")), 60, "a save")
    time.sleep(0.3)
    return stage.survived(Row("a signal during a save", "requeued"), run, stage.signal(run, "TERM"))


def row_16(stage: Stage) -> Row:
    run = stage.submit(CHECKPOINT_EVERY="1000")
    row = Row("preempted three times before the first checkpoint", "preempted")
    at = 0.0
    for attempt, step in ((1, 10), (2, -1), (3, 40)):
        if step < 0:
            # As soon as the attempt has begun: its ranks are still importing.
            until(lambda: len(event_log.attempts(event_log.read(run.ledger))) == 2, 60, "the second attempt")
            time.sleep(1)
        else:
            stage.cluster.at_step(run, step, attempt, 90)
        at = stage.preempt()
        until(lambda n=attempt: len([a for a in event_log.attempts(event_log.read(run.ledger)) if a.cause]) >= n, 60, "its end")  # type: ignore[misc]
    return stage.survived(row, run, at, after=3)


def row_17(stage: Stage) -> Row:
    run = stage.submit(fault="raise:10:1:always", MAX_CODE_ERROR="9")
    row = stage.ended(Row("crash loop", "code_error"), run, seconds=200, attempts=3)
    row.note = "stopped by max_no_progress, although 9 code errors were allowed"
    return row


def _hang(stage: Stage, fault: str, kind: str, suspect: str = "rank 1") -> Row:
    quick = {"HANG_AFTER_S": "3", "HANG_QUIET_S": "45"}
    # Between the first checkpoint and the first validation: of that one the watchdog knows nothing yet, and waits longer.
    run = stage.submit(fault="" if kind == "stop" else f"{kind}:42:1", **quick)
    stage.cluster.at_step(run, 42)
    at = time.time()
    if kind == "stop":
        kill_rank(run, 1, signal.SIGSTOP)
    row = stage.survived(Row(fault, "hang", allowed=2 * INTERVAL), run, at, **quick)
    evidence = event_log.attempts(event_log.read(run.ledger))[0].evidence
    assert suspect in evidence, evidence
    row.note = evidence.partition("suspect: ")[2].partition(", which")[0] + " named"
    assert "File" in run.attempt(1).stacks(0).read_text()
    # Rank 0 waits for the other one in a collective, and torch's flight recorder says in which.
    entries = json.loads(run.attempt(1).collectives(0).read_text())["entries"]
    assert any(entry["profiling_name"].startswith("gloo:") for entry in entries), entries
    return row


def row_18(stage: Stage) -> Row:
    return _hang(stage, "a rank hangs (asleep in Python)", "hang")


def row_19(stage: Stage) -> Row:
    run = stage.submit()
    stage.cluster.at_step(run, 20)
    stage.cluster.slurm("scancel", stage.cluster.job_id(run))
    return stage.ended(Row("scancel", "cancelled"), run)


def row_20(stage: Stage) -> Row:
    settings = {"NODES": "1", "GPUS_PER_NODE": "1", "MAX_STEPS": "40", "EVAL_SAMPLES": "16", "EVAL_EVERY": "40"}
    pairs = [f"{k}={v}" for k, v in {**SMALL, **settings, "DATA": "faults:build", "NODE_ENV": f"PYTHONPATH={_MODELS}", "CPUS_PER_GPU": "8"}.items()]
    answer = json.loads(stage.cluster.holdfast("submit", "--json", "--array", "NOTE=a,b,c,d,e,f,g,h", *pairs).stdout)
    members = [RunDir(Path(answer["path"])).member(index) for index in range(8)]
    until(lambda: any(member.attempt(1).progress.exists() for member in members), 120, "the first step of a task")
    at = stage.preempt(2)
    causes: list[list[str]] = []
    for member in members:
        causes.append([str(known.cause) for known in stage.cluster.finished(member, 250)])
    hit = [index for index, found in enumerate(causes) if len(found) > 1]
    again = [known for index in hit for known in event_log.attempts(event_log.read(members[index].ledger))[1:2]]
    row = Row(f"array of 8, {len(hit)} tasks preempted", "preempted", sorted({c for found in causes for c in found}), "TERM to the ranks of these tasks")
    row.pairs = [("preempted", found[0]) for found in causes if len(found) > 1]
    row.lost = sum(known.lost_steps for member in members for known in event_log.attempts(event_log.read(member.ledger)))
    row.seconds = round(max(known.started for known in again) - at, 1) if again else None
    row.identical = "yes" if all(stage.same(member, **settings) for member in members) else "NO"
    row.note = "seconds until the last of them began again; the untouched ones went on"
    assert 0 < len(hit) < 8
    return booked(row, *members)


def row_21(stage: Stage) -> Row:
    return _preemption(stage, "4 nodes through submitit, preempted", NODES="4", MAX_STEPS="80", EVAL_EVERY="40")


def row_22(stage: Stage) -> Row:
    run = stage.submit()
    stage.cluster.at_step(run, 25)
    node = stage.nodes(run)[0]
    stage.cluster.slurm("scontrol", "update", f"nodename={node}", "state=drain", "reason=chaos")
    at = time.time()
    stage.cluster.slurm("scontrol", "requeue", stage.cluster.job_id(run))
    try:
        row = stage.survived(Row("node drained, job requeued elsewhere", "requeued"), run, at)
    finally:
        stage.cluster.slurm("scontrol", "update", f"nodename={node}", "state=resume")
    assert node not in stage.nodes(run, 2)
    row.note = f"{','.join(stage.nodes(run))} -> {','.join(stage.nodes(run, 2))}"
    return row


def row_23(stage: Stage) -> Row:
    run = stage.submit()
    stage.cluster.at_step(run, 10)
    others = [stage.cluster.slurm("sbatch", "--parsable", str(run.script)).strip() for _ in range(2)]
    attempts = stage.cluster.finished(run, 120)
    row = Row("three jobs of one run at once", "-", [str(known.cause) for known in attempts], "nothing")
    said = [run.log(other, "batch").read_text() for other in others if run.log(other, "batch").exists()]
    assert len(attempts) == 1 and all("leaves it alone" in text for text in said) and len(said) == 2, said
    row.identical = "yes" if stage.same(run) else "NO"
    row.note = "the others ended with 75 before they touched anything"
    return booked(row, run)


def row_23b(stage: Stage) -> Row:
    run = stage.submit()
    stage.cluster.at_step(run, 10)
    at = time.time()
    stage.cluster.slurm("scancel", stage.cluster.job_id(run))
    until(lambda: not stage.queued(run), 40, "the job to leave")
    others = [stage.cluster.slurm("sbatch", "--parsable", str(run.script)).strip() for _ in range(2)]
    row = stage.survived(Row("two jobs of a cancelled run begin in the same moment", "cancelled"), run, at)
    assert len(row.causes) == 2 and len({e["job_id"] for e in event_log.read(run.ledger) if e["event"] == Event.START} & set(others)) == 1
    return row


def row_24(stage: Stage) -> Row:
    with tools(scontrol=None) as path:
        run = stage.submit(node_env=f"PATH={path}")
        stage.cluster.at_step(run, 25)
        row = stage.survived(Row("no `scontrol` on the nodes, TERM from a person", "requeued"), run, stage.signal(run, "TERM"))
    way = next(e for e in event_log.read(run.ledger) if e["event"] == Event.REQUEUE)
    assert way.get("successor"), way
    row.note = "went on in a job of its own (`--dependency=afterany`)"
    return row


def row_25(stage: Stage) -> Row:
    run = stage.submit()
    stage.cluster.at_step(run, 25)
    for process in proc.of_lab(stage.cluster.lab.root).daemons.get("slurmdbd", []):
        proc.send(process, signal.SIGKILL)
    return stage.survived(Row("slurmdbd killed, then preempted", "preempted"), run, stage.preempt())


def row_26(stage: Stage) -> Row:
    return _hang(stage, "a rank is stopped (SIGSTOP)", "stop")


def row_26b(stage: Stage) -> Row:
    return _hang(stage, "a rank holds the GIL in one C call", "gil")


def slow_save(save_s: float, after_s: float) -> Callable[[Stage], Row]:
    """Preempted so many seconds after a save of `save_s` seconds began, with 4 s until the kill."""

    def row(stage: Stage) -> Row:
        run = stage.submit(node_env=f"SLOW_SAVE_S={save_s}")
        until(lambda: list(run.checkpoints.glob(".*")), 60, "a save")
        time.sleep(after_s)
        fits = 2 * save_s < 3.5
        found = Row(f"preempted {after_s * 1000:.0f} ms into a save of {save_s / 4:.1f}x the grace", "preempted", allowed=0 if fits else 2 * INTERVAL)
        return stage.survived(found, run, stage.preempt())

    return row


def row_27s(stage: Stage) -> Row:
    return swept(save_sweep.sweep(save_sweep.points()))


def swept(found: list[save_sweep.Point]) -> Row:
    """One row for many stops: what fits into the grace may lose nothing, the rest two intervals at most; all end identically."""
    fitting, others = [point for point in found if point.fits], [point for point in found if not point.fits]
    shares = ", ".join(f"{share:g}" for share in save_sweep.SHARES)
    row = Row(
        f"TERM at every {save_sweep.APART_S * 1000:.0f} ms of a save of {shares} times the grace, KILL after it ({save_sweep.GRACE_S:g} s): {len(found)} points",
        "-",
    )
    row.sent = "TERM and KILL from the test itself"
    row.causes = sorted({point.causes[0] for point in found})
    row.lost = max((point.lost for point in fitting), default=0)
    worst = max((point.lost for point in others), default=0)
    row.identical = "yes" if all(point.identical and point.causes[-1] == "finished" for point in found) and worst <= 2 * save_sweep.INTERVAL else "NO"
    row.note = f"{len(fitting)} points whose saves fit lost {row.lost} steps; of the {len(others)} others the worst lost {worst}, two intervals are {2 * save_sweep.INTERVAL}"
    assert not any(unbalanced(attempt) for point in found for attempt in point.attempts)
    row.spent = [{name: round(sum(attempt[name] for point in found for attempt in point.attempts), 3) for name in found[0].attempts[0]}]
    return row


# ------------------------------------------------------------------------------------------------------------ around them


def kill_rank(run: RunDir, rank: int, number: signal.Signals) -> None:
    pid = pid_of_rank(run, rank)
    assert pid is not None, f"no process of rank {rank} of {run.id}"
    os.kill(pid, number)


@contextlib.contextmanager
def tools(**other: str | None) -> Iterator[str]:
    """A PATH with all programs of this machine but these: None for one that is missing, shell text for one that misbehaves."""
    folder = Path(tempfile.mkdtemp(prefix="hf-bin-", dir="/tmp"))
    try:
        for place in reversed([Path(part) for part in os.environ["PATH"].split(":")]):
            for program in place.glob("*") if place.is_dir() else []:
                link = folder / program.name
                if program.name not in other:
                    link.unlink(missing_ok=True)
                    link.symlink_to(program)
        for name, text in other.items():
            if text is not None:
                (folder / name).write_text(f"#!/bin/bash\n{text}\n")
                (folder / name).chmod(0o755)
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def staged(config: lab.LabConfig) -> Iterator[Stage]:
    root = Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp"))
    root.chmod(0o755)
    here = lab.start(root / "lab", config)
    try:
        (root / "runs").mkdir()
        cluster = Cluster(here, root / "runs")
        del cluster.env["REQUEUE_CONFIRM_S"]  # runs are submitted as users do it
        yield Stage(cluster)
    finally:
        here.stop()
        shutil.rmtree(root, ignore_errors=True)


PLAIN = lab.LabConfig()
ACCOUNTING = lab.LabConfig(accounting=True, extra_conf="JobAcctGatherParams=OverMemoryKill")
CGROUP = lab.LabConfig(accounting=True, memory_cgroup=True)
# Limits by the kernel can be set as root where cgroup v1 has them; elsewhere that row is left out.
CAN_LIMIT = os.access(slurm_conf.MEMORY_CGROUPS, os.W_OK) and os.geteuid() == 0
SHORT_WAIT = lab.LabConfig(kill_wait_s=4)
TABLE: list[tuple[str, lab.LabConfig, Callable[[Stage], Row]]] = [
    ("2", PLAIN, row_2), ("5", PLAIN, row_5), ("6", PLAIN, row_6), ("7", PLAIN, row_7), ("8", PLAIN, row_8), ("9", PLAIN, row_9), ("9b", PLAIN, row_9b),
    ("10", PLAIN, row_10), ("11", PLAIN, row_11), ("13", PLAIN, row_13), ("13b", PLAIN, row_13b), ("15", PLAIN, row_15), ("15b", PLAIN, row_15b),
    ("16", PLAIN, row_16), ("17", PLAIN, row_17), ("18", PLAIN, row_18), ("19", PLAIN, row_19), ("20", PLAIN, row_20), ("21", PLAIN, row_21), ("22", PLAIN, row_22),
    ("23", PLAIN, row_23), ("23b", PLAIN, row_23b), ("24", PLAIN, row_24), ("26", PLAIN, row_26), ("26b", PLAIN, row_26b),
    ("1", lab.LabConfig(grace_s=5), row_1), ("3", lab.LabConfig(grace_s=5, user_signal=True), row_3), ("4", lab.LabConfig(preempt_mode="CANCEL"), row_4),
    ("12", ACCOUNTING, row_12), *([("12b", CGROUP, row_12b)] if CAN_LIMIT else []), ("14", ACCOUNTING, row_14), ("14b", ACCOUNTING, row_14b), ("14c", ACCOUNTING, row_14c), ("25", ACCOUNTING, row_25),
    *((f"27{letter}", SHORT_WAIT, slow_save(save_s, after_s)) for letter, save_s, after_s in (("a", 0.4, 0.0), ("b", 0.4, 0.2), ("c", 1.6, 0.05), ("d", 1.6, 1.0), ("e", 6.0, 0.05), ("f", 6.0, 2.0), ("g", 12.0, 1.0))),
    ("27s", SHORT_WAIT, row_27s),
]  # fmt: skip


def main(words: list[str]) -> int:
    wanted = set(words)
    faults = 0
    todo = [entry for entry in TABLE if not wanted or entry[0] in wanted or re.sub(r"\D", "", entry[0]) in wanted]
    begun = time.monotonic()
    while todo:
        config = todo[0][1]
        here, todo = [entry for entry in todo if entry[1] == config], [entry for entry in todo if entry[1] != config]
        with staged(config) as stage:
            for number, _, make in here:
                try:
                    row = make(stage)
                    faults += bad(row)
                except BaseException as err:
                    if isinstance(err, KeyboardInterrupt):
                        raise
                    traceback.print_exc()
                    row, faults = Row(f"row {number}", "?", ["FAILED: " + str(err).splitlines()[0][:120] if str(err) else repr(err)]), faults + 1
                row.number = number
                keep(row)
                print(f"{time.monotonic() - begun:5.0f} s  {as_line(row)}", flush=True)
    return 1 if faults else 0


def keep(row: Row) -> None:
    """Puts a row among those of earlier calls, and writes the page anew."""
    known = (
        {old["number"]: Row(**{**old, "pairs": [tuple(pair) for pair in old["pairs"]]}) for old in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    )
    known[row.number] = row
    numbers = [number for number, _, _ in TABLE]
    rows = sorted((kept for kept in known.values() if kept.number in numbers), key=lambda kept: (int(re.sub(r"\D", "", kept.number)), kept.number))
    RESULTS.write_text(json.dumps([asdict(kept) for kept in rows], indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(rows))


def bad(row: Row) -> int:
    """1 when the row does not hold what is promised."""
    wrong = any(recorded not in (truth, "unknown") for truth, recorded in row.pairs)
    return int(wrong or row.identical == "NO" or (row.allowed is not None and row.lost > row.allowed) or not row.spent or any(map(unbalanced, row.spent)))


def as_line(row: Row) -> str:
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    shown = " -> ".join(f"{c} x{n}" if n > 1 else c for c, n in _runs(row.causes))
    return f"| {row.number} | {row.fault} | {row.sent} | {shown} | {row.lost} | {seconds} | {row.identical} | {row.note} |"


def _runs(words: list[str]) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for word in words:
        if found and found[-1][0] == word:
            found[-1] = (word, found[-1][1] + 1)
        else:
            found.append((word, 1))
    return found


def page(rows: list[Row]) -> str:
    matrix = Counter(pair for row in rows for pair in row.pairs)
    truths = sorted({truth for truth, _ in matrix})
    recorded = sorted({found for _, found in matrix})
    lines = [
        "<!-- Written by `make chaos`; changes made here are lost. -->", "# What a run survives", "",
        "Every fault was done to a run on a real Slurm 22.05 (the lab: virtual nodes on one machine, CPU, fp32, two ranks on two nodes",
        f"unless a row says otherwise; 120 steps, a checkpoint every {INTERVAL}). Nobody touched a run after its fault. \"Identical\" compares the final weights",
        "and every logged loss with a run that nobody disturbed, bit for bit. Seconds are from the fault to the first new step; 6 of",
        "them are what the lab makes a requeued job wait, and about 5 the start of Python and torch on two busy cores.", "",
        "| row | fault | what Slurm sent | causes recorded | steps lost | seconds | identical | |", "|---|---|---|---|---|---|---|---|",
        *map(as_line, rows), "",
        "## Scored causes", "", "Rows: what was done. Columns: what the ledger says. `unknown` would be allowed, anything else off the diagonal is a fault.", "",
        "| done | " + " | ".join(recorded) + " |", "|---" * (len(recorded) + 1) + "|",
        *(f"| {truth} | " + " | ".join(str(matrix[truth, found] or "") for found in recorded) + " |" for truth in truths), "",
        *_time_table([row for row in rows if row.spent]),
    ]  # fmt: skip
    return "\n".join(lines)


def _time_table(rows: list[Row]) -> list[str]:
    """The accounting identity over every row: seconds of its attempts, split (jobs/run/goodput.py says what each part is)."""
    shown = [part.value for part in goodput.Part if any(attempt[part.value] >= 0.05 for row in rows for attempt in row.spent)]
    lines = [
        "## Where the time went", "", "Seconds of all attempts of a row from START to END, as the clock of rank 0 and the ends of the attempts split them. The parts of",
        "every attempt must sum to its allocation within 1 %, and `other`, which nothing explains, be at most 5 % of it or 2 s: a row is",
        f"wrong where they do not. Over these {sum(len(row.spent) for row in rows)} attempts the largest difference is "
        f"{max((abs(sum(v for n, v in a.items() if n != 'seconds') - a['seconds']) / max(a['seconds'], 1e-9) for row in rows for a in row.spent), default=0):.2%}, "
        f"the largest `other` {max((a['other'] for row in rows for a in row.spent), default=0):.2f} s.", "",
        "| row | attempts | allocation | " + " | ".join(word.replace("_", " ") for word in shown) + " | sum |", "|---" * (len(shown) + 4) + "|",
    ]  # fmt: skip
    for row in rows:
        sums = {part.value: sum(attempt[part.value] for attempt in row.spent) for part in goodput.Part}
        seconds = sum(attempt["seconds"] for attempt in row.spent)
        lines.append(
            f"| {row.number} | {len(row.spent)} | {seconds:.1f} | "
            + " | ".join(f"{sums[word]:.1f}" if sums[word] >= 0.05 else "" for word in shown)
            + f" | {sum(sums.values()):.1f} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

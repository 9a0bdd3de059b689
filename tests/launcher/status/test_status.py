"""`holdfast status`: right about every run, and quick about a thousand of them."""

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, examples
from counting import counted
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import many_runs
from jobs.config import plain_yaml, yaml_io
from jobs.config.settings import Job
from jobs.core.contract import Event
from jobs.run import claim, event_log, metrics_log, store
from jobs.run.rundir import RunDir
from launcher.commands import submit
from launcher.output import table
from launcher.status import run_status
from slurm.client import Slurm
from slurm.job_queue import Queue
from slurm.pending_reasons import in_words

HOLDFAST = Path(sys.executable).with_name("holdfast")


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("thousand") / "runs"
    many_runs.make(folder, 1000)
    yield folder


# No Slurm to be asked.
QUIET = {**{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HOLDFAST_"))}, "PATH": "/nowhere"}


def holdfast(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HOLDFAST, *words], env={**QUIET, **env}, capture_output=True, text=True, timeout=120)


# -- a thousand runs ---------------------------------------------------------------------------------------------------


def test_status_of_a_thousand_runs_is_a_thousand_lines_and_little_work(thousand: Path) -> None:
    done, calls = counted("status", f"RUNS_DIR={thousand}", env=QUIET)
    assert len(done.stdout.splitlines()) == 1001, done.stderr
    assert calls < 2_700_000  # 2.14 million, 0.7 s of a processor


def test_status_says_of_each_run_what_its_files_say(thousand: Path) -> None:
    rows = {row.run: row for row in run_status.collect(store.all_runs(thousand), {"102": ("RUNNING", "None", "node1"), "104": ("PENDING", "Priority", "")})}
    assert [rows[f"quickstart-000{index}"].state for index in range(8)] == [
        "finished",
        "finished",
        "running",
        "failed",
        "waiting",
        "stopped",
        "cancelled",
        "finished",
    ]
    run = RunDir(thousand / "quickstart-0000")
    last = json.loads(run.metrics.read_text().splitlines()[-1])
    row = rows["quickstart-0000"]
    assert (row.step, row.max_steps, row.loss, row.attempt, row.causes) == (5000, 5000, last["loss"], 3, ["preempted", "preempted", "finished"])
    assert row.checkpoint_step == 5000 and row.seconds_left is None
    # One step a second by the times in its metrics.
    running = rows["quickstart-0002"]
    assert running.seconds_left == pytest.approx(5000 - running.step, rel=0.01) and running.queue_reason == ""
    assert rows["quickstart-0004"].queue_reason == "jobs of higher priority are before it" == rows["quickstart-0004"].note


def test_slurm_is_asked_once_however_many_runs_there_are(thousand: Path, tmp_path: Path) -> None:
    for name in ("sbatch", "srun", "squeue", "sacct", "scontrol"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/calls\n")
        (tmp_path / name).chmod(0o755)
    done = holdfast("status", "--json", f"RUNS_DIR={thousand}", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert len(json.loads(done.stdout)) == 1000
    assert (tmp_path / "calls").read_text() == "squeue\n"


def test_only_the_end_of_metrics_is_read(thousand: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 1, "loss": 1.0}) + "\n"
    path.write_text(line * 3_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    assert metrics_log.tail(path, 8) == [{"step": 1, "loss": 1.0}] * 8
    assert len(metrics_log.sample(path, 50)) == 50
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 0.2


def test_a_cancelled_run_that_never_began_is_not_said_to_be_lost(tmp_path: Path) -> None:
    (run,) = [run for run in many_runs.make(tmp_path / "runs", 5) if run.id.endswith("0004")]
    assert run_status.collect([run], {})[0].state == "stopped"
    event_log.append(run.ledger, Event.CANCEL, attempt=0, job_id="104")
    row = run_status.collect([run], {})[0]
    assert row.state == "cancelled" and f"holdfast resume {run.id}" in row.note


@pytest.mark.parametrize("cause", ["cancelled", "preempted", "code_error", "finished", "pruned", None])
def test_a_run_that_was_resumed_waits_until_its_new_job_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str | None) -> None:
    run = many_runs.make(tmp_path / "runs", 3)[2]
    if cause:
        event_log.append(run.ledger, Event.END, attempt=3, job_id="102", cause=cause, evidence="so it was", step=900, saved_step=900)
    before = run_status.collect([run], {})[0]
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id="500", by="resume")
    for queue in ({"500": ("PENDING", "Priority", "")}, None):  # None: Slurm does not say
        row = run_status.collect([run], queue)[0]
        assert (row.state, row.job_id) == ("waiting", "500")
    # Cancelled before it began.
    told: list[str] = []
    monkeypatch.setattr(run_status, "ask_queue", lambda: ({"500": ("PENDING", "Priority", "")}, ""))
    monkeypatch.setattr(Slurm, "cancel", lambda self, *job_ids: told.extend(job_ids))
    monkeypatch.setattr(submit, "require_jobs_of", lambda *_: None)  # needs a real queue: tests/slurm/test_job_identity.py
    submit.cancel_run(run)
    row = run_status.collect([run], {})[0]
    assert told == ["500"] and row.state == (before.state if before.state == "finished" else "cancelled")
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id="501", by="resume")
    event_log.append(run.ledger, Event.START, attempt=4, job_id="501", world=4)
    row = run_status.collect([run], {"501": ("RUNNING", "None", "node1")})[0]
    assert (row.state, row.job_id) == ("running", "501")


def test_the_job_of_a_run_is_the_one_that_came_last(tmp_path: Path) -> None:
    run = many_runs.make(tmp_path / "runs", 2)[1]  # finished as job 101, three attempts
    # A submission that is written down after its job has begun; a successor, the line about which comes after its start.
    for said in ({"event": Event.SUBMITTED, "attempt": 0, "job_id": "101"}, {"event": Event.REQUEUE, "attempt": 1, "job_id": "101", "successor": "7"}):
        event_log.append(run.ledger, **said)
        assert run_status.collect([run], {"7": ("PENDING", "", "")})[0].job_id == "101"
    event_log.append(run.ledger, Event.REQUEUE, attempt=3, job_id="101", successor="8")
    assert run_status.collect([run], {"8": ("PENDING", "Dependency", "")})[0].job_id == "8"
    # A person is told the number of the process that was submitted; training is a child of it.
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id="local-5")
    event_log.append(run.ledger, Event.START, attempt=4, job_id="local-6", world=1)
    assert run_status.collect([run], {})[0].job_id == "local-5"


@pytest.mark.parametrize(
    ("jobs", "state", "note"),
    [
        ({"102": ("FAILED", "NonZeroExitCode", "node1")}, "stopped", "preempted, not requeued: job 102 ended as FAILED; holdfast resume"),
        ({"102": ("CANCELLED", "None", "")}, "cancelled", "scancel of job 102; holdfast resume"),
        ({}, "stopped", "preempted, not in the queue: job 102 is gone; holdfast resume"),
        ({"102": ("PENDING", "BeginTime", "")}, "waiting", "preempted, queued again"),
    ],
)
def test_slurm_decides_whether_a_run_was_requeued(tmp_path: Path, jobs: dict[str, tuple[str, str, str]], state: str, note: str) -> None:
    run = many_runs.make(tmp_path / "runs", 3)[2]
    event_log.append(run.ledger, Event.END, attempt=3, job_id="102", cause="preempted", evidence="so it was", step=900, saved_step=900)
    event_log.append(run.ledger, Event.REQUEUE, attempt=3, job_id="102", way="requeued by holdfast")
    row = run_status.collect([run], Queue.of(jobs))[0]
    assert row.state == state and row.note.startswith(note)


@pytest.mark.parametrize("state", ["PENDING", "SPECIAL_EXIT", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING"])
def test_a_job_that_waits_in_any_way_waits(tmp_path: Path, state: str) -> None:
    run = many_runs.make(tmp_path / "runs", 3)[2]
    row = run_status.collect([run], {"102": (state, "JobHeldUser", "")})[0]
    assert row.state == "waiting" and row.queue_reason == "held by you: scontrol release starts it" == row.note


@pytest.mark.parametrize("loss", ["NaN", "Infinity", "-Infinity"])
def test_a_loss_that_is_no_number_is_null_in_json_and_itself_in_the_table(tmp_path: Path, loss: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = many_runs.make(tmp_path / "runs", 1)[0]
    run.metrics.write_text(f'{{"step": 5, "loss": {loss}, "tokens_per_s": {loss}, "time": 1}}\n')

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    for as_json in (True, False):
        run_status.status(tmp_path / "runs", run.id, as_json, every=True)
        said = capsys.readouterr().out
        if as_json:
            (row,) = json.loads(said, parse_constant=refuse)
            assert row["loss"] is None and row["tokens_per_s"] is None
        else:
            assert f" {float(loss)} " in said


def test_a_process_with_the_number_of_one_that_is_gone_is_not_the_run(tmp_path: Path) -> None:
    run = many_runs.make(tmp_path / "runs", 5)[4]
    pid = os.getpid()
    owner = {"job_id": f"local-{pid}", "host": socket.gethostname(), "pid": pid, "stamp": claim.process_stamp(pid)}
    assert claim.claim(run, 1, owner) and claim.claim(run, 2, {**owner, "stamp": "another boot:77"})
    for number, state in ((1, "running"), (2, "stopped")):
        event_log.append(run.ledger, Event.START, attempt=number, job_id=f"local-{pid}", world=1)
        assert run_status.collect([run], {})[0].state == state
    assert "its process is gone" in run_status.collect([run], {})[0].note


def test_a_job_that_ended_before_its_attempt_began_points_to_its_words(tmp_path: Path) -> None:
    run = many_runs.make(tmp_path / "runs", 5)[4]
    run.ledger.write_text("")
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id="89")
    assert "gone from the queue" in run_status.collect([run], {})[0].note
    run.logs.mkdir(exist_ok=True)
    run.log("89", "batch").write_text("module: command not found\n")
    row = run_status.collect([run], {})[0]
    assert row.state == "stopped" and row.note == f"job 89 ended before its attempt began (holdfast logs {run.id}); holdfast resume {run.id}"


@pytest.mark.parametrize(("code", "word"), [(78, 78), (2, 2), (1, 1), (75, 1), (137, 1)])
def test_waiting_for_one_run_ends_with_its_exit_code_where_that_says_what_to_do(tmp_path: Path, code: int, word: int) -> None:
    run = many_runs.make(tmp_path / "runs", 5)[4]
    run.ledger.write_text("")
    event_log.append(run.ledger, Event.START, attempt=1, job_id="7", world=1)
    event_log.append(run.ledger, Event.END, attempt=1, job_id="7", cause="code_error", exit_code=code)
    assert submit.wait_for([run], None) == word
    assert submit.wait_for([run, run], None) == 1


def test_the_share_of_the_peak_is_the_one_that_training_logs(tmp_path: Path) -> None:
    run = many_runs.make(tmp_path / "runs", 3, lines=20)[2]
    with open(run.metrics, "a") as file:
        file.write(json.dumps({"step": 70, "loss": 1.0, "peak_pct": 55.25}) + "\n")
    assert "peak_pct" in (REPOSITORY / "train" / "metrics" / "throughput.py").read_text()
    assert run_status.collect([run], {"102": ("RUNNING", "None", "node1")})[0].peak_pct == 55.25
    assert run_status.collect([run], {})[0].peak_pct is None


def test_json_has_the_fields_that_are_documented(thousand: Path) -> None:
    done = holdfast("status", "--json", str(thousand / "quickstart-0000"))
    (row,) = json.loads(done.stdout)
    assert list(row) == list(run_status.FIELDS) == [field.name for field in fields(run_status.RunStatus)]
    # What programs read since the first version; nothing of it may go.
    kept = "run path state job_id attempt step max_steps loss tokens_per_s lost_steps causes checkpoint_step checkpoint_time note"
    assert list(row)[: len(kept.split())] == kept.split()


# -- metrics -----------------------------------------------------------------------------------------------------------

_TORN = [b'{"step": 7, "lo', b"", b"[1, 2]", b"null", b"\xff\xfe\x00", b'{"loss": 1.0}', b"x" * 5000]


@examples(60)
@given(lines=st.lists(st.one_of(st.integers(1, 10**6), st.sampled_from(_TORN)), max_size=60), count=st.integers(1, 9), ends=st.booleans())
def test_the_tail_is_the_end_of_the_whole_however_torn_the_file_is(tmp_path_factory: pytest.TempPathFactory, lines: list[Any], count: int, ends: bool) -> None:
    path = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    whole = [{"step": step, "loss": step / 3, "note": "x" * (step % 700)} for step in lines if isinstance(step, int)]
    data = b"\n".join(json.dumps({"step": line, "loss": line / 3, "note": "x" * (line % 700)}).encode() if isinstance(line, int) else line for line in lines)
    path.write_bytes(data + b"\n" * ends)
    assert metrics_log.tail(path, count) == whole[-count:]
    assert all(line in whole for line in metrics_log.sample(path, 10))
    assert not whole or metrics_log.sample(path, 10)[-1] == whole[-1]


def test_no_metrics_are_no_lines(tmp_path: Path) -> None:
    assert metrics_log.tail(tmp_path / "none") == metrics_log.sample(tmp_path / "none", 5) == []


# -- job.yaml, read quickly --------------------------------------------------------------------------------------------

_TEXT = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    ["no", "1e3", "0x10", "24:00:00", "~", "#", "a: b", "\\", '"', "\ud7ff", "😀", "\x85", "- x", "010"]
)
_SCALAR = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | _TEXT
_VALUE = st.recursive(_SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3), max_leaves=6)


def by_yaml(text: str) -> Any:
    return yaml_io.parse(text)


@examples(100)
@given(st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True), _VALUE, max_size=5))
def test_what_is_read_quickly_is_what_yaml_reads(values: dict[str, Any]) -> None:
    text = yaml_io.dump_yaml(values)
    quick = plain_yaml.read(text)
    if quick is not None:
        assert (quick or None) == by_yaml(text) and repr(quick or None) == repr(by_yaml(text))


@examples(300)
@given(
    st.lists(
        st.sampled_from(
            [
                "a: 1",
                "b: no",
                'c: "x"',
                "d: 1e3",
                "e: 010",
                "f: [1, 2]",
                "a: 2",
                "g: {x: 1}",
                'h: {"x": 1, "x": 2}',
                "i: 1 # x",
                "j: NaN",
                "  k: 1",
                "true: 1",
                "l:",
                'm: "\\ud83d\\ude00"',
                'n: 1, "o": 2',
                "p: .5",
                "q: -0",
                "r: 1.",
                "# s",
                "t: 'u'",
                "v: Infinity",
                'w: "\\/"',
                "x: -0.0",
                "y: 1E400",
            ]
        ),
        max_size=6,
    )
)
def test_lines_by_hand_mean_what_yaml_says_they_mean(lines: list[str]) -> None:
    text = "\n".join(lines)
    quick = plain_yaml.read(text)
    if quick:
        assert repr({str(key): value for key, value in by_yaml(text).items()}) == repr(quick)


def test_a_job_of_ours_is_read_quickly() -> None:
    assert plain_yaml.read(yaml_io.dump_yaml(Job().model_dump(mode="json"))) is not None


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("Priority", "jobs of higher priority are before it"),
        ("(Resources)", "not enough nodes are free yet"),
        ("QOSMaxJobsPerUserLimit", "the limit of the QOS is reached: running jobs of one user"),
        ("AssocGrpGRES", "the limit of your account is reached: GPUs of all jobs together"),
        ("AssocGrpCPURunMinutesLimit", "the limit of your account is reached: minutes of CPUs of all jobs together"),
        ("QOSMinGRES", "asks for less than the QOS wants: GPUs"),
        ("ReqNodeNotAvail, UnavailableNodes:node[1-3]", "a node that it needs is down, drained or reserved (node[1-3])"),
        ("None", ""),
        ("", ""),
        ("SomethingNew", "Slurm says SomethingNew"),
    ],
)
def test_reasons_of_slurm_are_said_in_words(code: str, said: str) -> None:
    assert in_words(code) == said


def test_a_table_wraps_its_last_column_only() -> None:
    lines = table.lines(("run", "note"), [("a-long-name", "one two three four five six seven")], width=30)
    assert lines[0] == "run          note" and all(len(line) <= 30 for line in lines)
    assert [line[:11].strip() for line in lines[1:]] == ["a-long-name", *[""] * (len(lines) - 2)]
    assert len(table.lines(("run", "note"), [("a", "word " * 99)])) == 2


@pytest.mark.parametrize("width", [12, 40, 60, 80, 120, 200])
def test_a_table_of_runs_fits_the_terminal_and_its_notes_can_be_read(width: int) -> None:
    head = ("run", "state", "job", "attempt", "step", "loss", "tok/s", "left", "checkpoint", "note")
    note = "rank 1 of node n2: RuntimeError: a loss that is not finite in blocks.3.attention at step 139, after 12 steps like that (holdfast logs gpt-1b-k3f9)"
    rows = [
        ("gpt-1b-k3f9", "failed", "1234567", "3", "139/10,000", "2.714", "", "", "step 120, 31 min ago", note),
        ("b-c", "finished", "12", "1", "9/9", "", "", "", "", ""),
    ]
    lines = table.lines(head, rows, width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    if width >= 40:
        # The note stands beside the columns or below its row, in few lines.
        assert lines[0].startswith("run") and "139/10,000" in lines[1] and lines[-1].split()[:2] == ["b-c", "finished"]
        assert len(lines) <= 3 + -(-len(note) // min(width - 12, 36)) and (width == 200 or note in text)
    if width in (60, 80):
        assert "tok/s" not in lines[0] and "left" not in lines[0] and "note" not in lines[0] and lines[2].startswith("    rank 1 of")
    assert ("checkpoint" in lines[0]) == (width >= 80)

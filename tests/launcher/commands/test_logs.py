"""`holdfast logs`: every attempt's own words, none lost and none twice, while they are written and afterwards."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import Cluster, until

from jobs.config.settings import Job
from jobs.config.yaml_io import dump_yaml
from jobs.core.contract import Cause, Event, Exit
from jobs.core.errors import NotFoundError, SettingError
from jobs.run import event_log
from jobs.run.rundir import RunDir
from launcher.cli.app import run_app
from launcher.commands.logs import copy_logs, follow_logs

HOLDFAST = Path(sys.executable).with_name("holdfast")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "mine-abcd")
    run.logs.mkdir(parents=True)
    run.job_yaml.write_text(dump_yaml(Job(job_name="mine").model_dump(mode="json")))
    return run


def begin(run: RunDir, number: int, job_id: str) -> None:
    """What `launcher.attempt begin` leaves behind, in its order."""
    attempt = run.attempt(number)
    attempt.path.mkdir(parents=True)
    sizes = {path.name.split(".")[-2]: path.stat().st_size for path in run.logs.glob(f"{job_id}.*.out")}
    attempt.log_sizes.write_text(json.dumps(sizes))
    event_log.append(run.ledger, Event.START, attempt=number, job_id=job_id)


def write(run: RunDir, job_id: str, stream: str, text: str) -> None:
    with open(run.log(job_id, stream), "a") as file:
        file.write(text)


def end(run: RunDir, number: int, job_id: str, cause: Cause) -> None:
    event_log.append(run.ledger, Event.END, attempt=number, job_id=job_id, cause=cause, step=number, start_step=number - 1, saved_step=number)


def two_attempts(run: RunDir, second_job: str = "12") -> None:
    begin(run, 1, "12")
    write(run, "12", "batch", "script one\n")
    write(run, "12", "0", "zero one\nhalf a line")
    write(run, "12", "1", "one one\n")
    end(run, 1, "12", Cause.PREEMPTED)
    begin(run, 2, second_job)
    write(run, second_job, "0", "zero two\n")
    write(run, second_job, "1", "one two")


def copied(run: RunDir, rank: str = "0", attempt: str | None = None) -> str:
    out = io.BytesIO()
    copy_logs(run, rank, attempt, out)
    return out.getvalue().decode()


def test_a_rank_of_accelerate_launch_is_looked_for_in_the_log_of_its_node(run: RunDir) -> None:
    run.job_yaml.write_text(dump_yaml(Job(job_name="mine", launch="accelerate", nodes=2, gpus_per_node=4).model_dump(mode="json")))
    begin(run, 1, "12")
    for node in ("0", "1"):
        write(run, "12", node, f"node {node}\n")
    assert copied(run, "6") == copied(run, "4") == "--- attempt 1 · job 12 · log of node 1: ranks 4 to 7 ---\nnode 1\n"
    assert copied(run, "1").endswith("ranks 0 to 3 ---\nnode 0\n") and "log of" not in copied(run, "all")
    with pytest.raises(NotFoundError, match="has written no log of rank 8 yet"):
        copied(run, "8")
    # Without Slurm each rank has a log of its own.
    end(run, 1, "12", Cause.PREEMPTED)
    begin(run, 2, "local-77")
    write(run, "local-77", "6", "rank 6\n")
    write(run, "local-77", "1", "rank 1\n")
    assert copied(run, "6") == "--- attempt 2 · job local-77 · after preemption ---\nrank 6\n"


# -- as it lies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second_job", ["12", "13"])
def test_the_newest_attempt_begins_where_it_began_also_in_a_file_that_two_share(run: RunDir, second_job: str) -> None:
    two_attempts(run, second_job)
    assert copied(run) == f"--- attempt 2 · job {second_job} · after preemption ---\nzero two\n"
    assert copied(run, attempt="1") == "--- attempt 1 · job 12 ---\nzero one\nhalf a line"
    assert (
        copied(run, attempt="all") == f"--- attempt 1 · job 12 ---\nzero one\nhalf a line\n--- attempt 2 · job {second_job} · after preemption ---\nzero two\n"
    )


def test_all_ranks_have_their_names_before_each_line(run: RunDir) -> None:
    two_attempts(run)
    write(run, "12", "10", "ten two\n")
    assert copied(run, "batch", "1").splitlines()[1:] == ["script one"]
    text = copied(run, "all", "all")
    assert text.splitlines() == [
        "--- attempt 1 · job 12 ---",
        "batch: script one",
        "0: zero one",
        "1: one one",
        "0: half a line",
        "--- attempt 2 · job 12 · after preemption ---",
        "0: zero two",
        "10: ten two",
    ]


def test_what_is_not_there_is_named_beside_what_is(run: RunDir) -> None:
    with pytest.raises(NotFoundError, match="no attempt has started yet"):
        copied(run)
    two_attempts(run)
    with pytest.raises(NotFoundError, match="attempt 2 has written no log of rank 7 yet; there is batch, 0, 1"):
        copied(run, "7")
    with pytest.raises(NotFoundError, match="there is no attempt 9, the last one is 2"):
        copied(run, attempt="9")
    for rank, attempt in (("zero", None), ("-1", None), ("0", "last")):
        with pytest.raises(SettingError, match="write"):
            copied(run, rank, attempt)


@pytest.mark.parametrize("rank", ["0", "batch", "all"])
def test_a_job_that_died_before_its_attempt_began_says_what_its_script_wrote(run: RunDir, rank: str) -> None:
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id="12")
    with pytest.raises(NotFoundError, match="no attempt has started yet"):
        copied(run, rank)
    write(run, "12", "batch", "module: command not found")
    said = "batch: module: command not found\n" if rank == "all" else "module: command not found"
    assert copied(run, rank) == f"--- job 12 · has begun no attempt · log of its script ---\n{said}"
    with pytest.raises(NotFoundError, match="no attempt has started yet"):
        copied(run, rank, attempt="1")


def test_a_later_job_that_began_no_attempt_stands_behind_the_last_attempt(run: RunDir) -> None:
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id="12")
    two_attempts(run)
    assert "has begun no attempt" not in copied(run)
    end(run, 2, "12", Cause.CODE_ERROR)
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id="13")
    write(run, "13", "batch", "/shared/env.sh: No such file or directory\n")
    assert copied(run).endswith("zero two\n--- job 13 · has begun no attempt · log of its script ---\n/shared/env.sh: No such file or directory\n")


def test_an_array_has_logs_and_checkpoints_in_its_tasks_only(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run.member(0).path.mkdir(parents=True)
    for words in (["logs"], ["ckpt", "ls"], ["ckpt", "verify"], ["ckpt", "export"], ["verify", "data"]):
        assert run_app([*words, str(run.path)]) == Exit.USAGE
        assert capsys.readouterr().err == "mine-abcd is an array; name one of its tasks, such as mine-abcd/tasks/0\n"


def test_a_reader_that_goes_away_is_no_error(run: RunDir) -> None:
    two_attempts(run)
    write(run, "12", "0", "a line\n" * 200_000)
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"'{HOLDFAST}' logs '{run.path}' | head -1"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "--- attempt 2 · job 12 · after preemption ---\n" and done.stderr == "" and done.returncode == 0


# -- as it grows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", ["0", "all"])
def test_following_loses_nothing_and_repeats_nothing_over_attempts(run: RunDir, rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.status.run_status.ask_queue", lambda: ({"12": ("RUNNING", "None", "node1")}, ""))
    out = io.BytesIO()
    follower = threading.Thread(target=follow_logs, args=(run, rank, None, out, lambda seconds: time.sleep(0.002) or False), daemon=True)
    follower.start()
    wanted = []
    for attempt in (1, 2, 3):
        begin(run, attempt, "12")
        wanted.append(f"--- attempt {attempt} · job 12{'' if attempt == 1 else ' · after a requeue'} ---")
        for number in range(150):
            # Lines come in two halves, and the last one of an attempt has no end.
            write(run, "12", "0", f"line {number} of attempt ")
            write(run, "12", "0", f"{attempt}" + "\n" * (number < 149))
            wanted.append(f"{'0: ' * (rank == 'all')}line {number} of attempt {attempt}")
        if attempt == 1:
            # Following begins with the newest attempt that is there when it looks for the first time.
            until(lambda: b"line 0 of attempt 1" in out.getvalue(), 20, "the first line")
        end(run, attempt, "12", Cause.REQUEUED if attempt < 3 else Cause.FINISHED)
        until(lambda: f"line 149 of attempt {attempt}".encode() in out.getvalue() or rank == "all", 20, "the last line")  # noqa: B023
    # After the last line of the ledger, too, as `launcher.attempt.lifecycle end` and a slow disk do it.
    write(run, "12", "0", "\nthe very last\n")
    wanted.append("0: the very last" if rank == "all" else "the very last")
    follower.join(30)
    assert not follower.is_alive()
    assert out.getvalue().decode().splitlines() == wanted


def test_following_a_run_that_left_the_queue_ends(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("launcher.commands.logs._ASK_S", 0.2)
    monkeypatch.setattr("launcher.commands.logs._DRAIN_S", 0.1)
    asked: list[None] = []
    answers = [{"12": ("PENDING", "Priority", "")}, {}, {"12": ("RUNNING", "None", "")}, {}, {}]
    monkeypatch.setattr("launcher.status.run_status.ask_queue", lambda: (asked.append(None) or answers[min(len(asked), len(answers)) - 1], ""))
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id="12")
    follow_logs(run, "0", None, io.BytesIO())
    # One answer that it is gone is not believed: a requeue has a moment like that.
    assert len(asked) == 5
    assert "run mine-abcd is waiting: jobs of higher priority are before it" in capsys.readouterr().err
    write(run, "12", "batch", "module: command not found\n")
    out = io.BytesIO()
    follow_logs(run, "0", None, out)
    assert b"module: command not found" in out.getvalue()


def test_following_a_run_that_was_resumed_waits_for_its_new_job(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("launcher.commands.logs._ASK_S", 0.1)
    monkeypatch.setattr("launcher.commands.logs._DRAIN_S", 0.05)
    monkeypatch.setattr("launcher.status.run_status.ask_queue", lambda: ({"13": ("PENDING", "Priority", "")}, ""))
    begin(run, 1, "12")
    end(run, 1, "12", Cause.CANCELLED)
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id="13", by="resume")
    begun = time.monotonic()
    follow_logs(run, "0", None, io.BytesIO(), lambda seconds: time.sleep(0.01) or time.monotonic() - begun > 1)
    assert time.monotonic() - begun > 1, "it ended by itself"
    assert "is waiting: cancelled, queued again" in capsys.readouterr().err


def test_following_can_be_left(run: RunDir) -> None:
    two_attempts(run)
    out = io.BytesIO()
    follow_logs(run, "0", None, out, lambda seconds: True)
    assert out.getvalue().decode().endswith("zero two\n")


# -- for real ----------------------------------------------------------------------------------------------------------

_SPEAKS = """\
import os, sys, time
attempt, rank = os.environ["HOLDFAST_ATTEMPT"], os.environ["RANK"]
for number in range(5):
    print(f"rank {rank} attempt {attempt} line {number}", flush=True)
    time.sleep(0.1)
sys.exit(75 if attempt == "1" else 0)
"""
_PLAIN = ["DEVICE=cpu", "NODES=1", "GPUS_PER_NODE=2", "MAX_NO_PROGRESS=9", "PREFLIGHT_S=0"]


def spoken(attempt: int, ranks: str) -> set[str]:
    return {f"{rank}: rank {rank} attempt {attempt} line {number}" for rank in ranks for number in range(5)}


@pytest.mark.trains
def test_a_local_run_is_followed_over_its_attempts(tmp_path: Path) -> None:
    (tmp_path / "speaks.py").write_text(_SPEAKS)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HOLDFAST_"))}
    done = subprocess.run(
        [HOLDFAST, "submit", "--local", "--json", f"ENTRY={tmp_path}/speaks.py", *_PLAIN], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    path = json.loads(done.stdout)["path"]
    followed = subprocess.run(
        [HOLDFAST, "logs", "-f", "--rank", "all", "--attempt", "all", path], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    lines = followed.stdout.splitlines()
    borders = [index for index, line in enumerate(lines) if line.startswith("--- attempt")]
    assert followed.returncode == 0 and len(borders) == 2, followed.stdout + followed.stderr
    assert set(lines[: borders[1]]) >= spoken(1, "01") and set(lines[borders[1] :]) >= spoken(2, "01")
    assert len(lines) == len(set(lines)), "a line came twice"


@pytest.mark.slow
def test_a_requeued_job_of_slurm_is_followed_over_its_attempts(cluster: Cluster, tmp_path: Path) -> None:
    script = cluster.runs.parent / "speaks.py"
    script.write_text(_SPEAKS)
    run = RunDir(Path(json.loads(cluster.holdfast("submit", "--json", f"ENTRY={script}", *_PLAIN).stdout)["path"]))
    with open(tmp_path / "out", "w") as out:
        follower = subprocess.Popen([HOLDFAST, "logs", "-f", "--rank", "all", run.path], env=cluster.env, stdout=out)
        try:
            cluster.finished(run, 90)
            assert follower.wait(60) == 0
        finally:
            follower.kill()
    text = (tmp_path / "out").read_text()
    job = cluster.job_id(run)
    first, border, second = text.partition(f"--- attempt 2 · job {job} · after a requeue ---\n")
    assert border and first.startswith(f"--- attempt 1 · job {job} ---\n"), text
    assert set(first.splitlines()) >= spoken(1, "01") and set(second.splitlines()) >= spoken(2, "01")
    assert "attempt 1 ended" in first and "attempt 2 ended: finished" in second and "attempt 2" not in first
    # One file for both attempts: the border is in the middle of it.
    assert run.log(job, 0).read_text().count("line 4") == 2
    assert cluster.holdfast("logs", "--attempt", "1", str(run.path)).stdout == f"--- attempt 1 · job {job} ---\n" + "".join(
        f"rank 0 attempt 1 line {number}\n" for number in range(5)
    )

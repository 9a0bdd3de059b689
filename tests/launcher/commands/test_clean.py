"""`holdfast clean` removes runs that are over and nothing else, whatever lies in the runs directory."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from conftest import REPOSITORY, Cluster, until

from jobs.checkpoint import directory, user_checkpoint
from jobs.core.contract import Event
from jobs.core.errors import SettingError
from jobs.run import claim, event_log
from jobs.run.rundir import RunDir
from jobs.sweep import parser
from launcher.cli.app import run_app
from launcher.commands import clean
from launcher.submission import snapshot

DAY_S = 86_400


def made(folder: Path, name: str, cause: str | None = "finished", age_s: float = 0.0, job_id: str = "local-1", **settings: object) -> RunDir:
    """A run as it lies there afterwards: settings, ledger, a checkpoint, a log, code."""
    run = RunDir(folder / name)
    (run.path / "logs").mkdir(parents=True)
    run.code.mkdir(exist_ok=True)
    (run.code / "x.py").write_text("x" * 5000)
    run.job_yaml.write_text(f'job_name: "{name}"\n' + "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=job_id)
    event_log.append(run.ledger, Event.START, attempt=1, job_id=job_id, world=1)
    if cause:
        event_log.append(run.ledger, Event.END, attempt=1, job_id=job_id, cause=cause, step=5, saved_step=5)
    source = user_checkpoint.staging(run.checkpoints, 5, 1)
    (source / "w").write_bytes(b"w" * 10_000)
    user_checkpoint.commit(source, run.checkpoints, 5, 1, 2)
    then = time.time() - age_s
    for path in (run.ledger, run.job_yaml):
        os.utime(path, (then, then))
    return run


def cleaned(folder: Path, *words: str, code: int = 0, queue: dict[str, tuple[str, str, str]] | None = None, trouble: str = "") -> dict[str, str]:
    """Run -> why it was left (empty: it goes), as the command says it on a machine without Slurm, or where squeue says `queue`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), mock.patch("launcher.status.run_status.ask_queue", lambda: (queue, trouble)):
        assert run_app(["clean", "--json", *words, f"RUNS_DIR={folder}"]) == code, out.getvalue()
    return {one["run"]: one["why_left"] for one in json.loads(out.getvalue())["runs"]} if out.getvalue() else {}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_without_yes_nothing_goes_and_what_would_is_said_with_its_size(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    made(runs, "old", age_s=40 * DAY_S), made(runs, "new")
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli.app", "clean", "--older", "30d", f"RUNS_DIR={runs}"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "1 of 2 runs would go" in done.stdout and "--yes does it" in done.stdout and " MB" in done.stdout
    assert "left: last touched" in done.stdout
    assert names(runs) == ["new", "old"]
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli.app", "clean", "--yes", f"RUNS_DIR={runs}"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert "nothing is chosen" in done.stdout and names(runs) == ["new", "old"]


def test_filters_choose_and_names_narrow(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    made(runs, "a-old", age_s=9 * DAY_S), made(runs, "b-bad", "code_error"), made(runs, "c-bad-old", "code_error", 9 * DAY_S), made(runs, "d-new")
    assert [run for run, why in cleaned(runs, "--older", "1w").items() if not why] == ["a-old", "c-bad-old"]
    assert [run for run, why in cleaned(runs, "--failed").items() if not why] == ["c-bad-old", "b-bad"]
    assert cleaned(runs, "--older", "1w", "--failed", "--yes")["c-bad-old"] == ""
    assert names(runs) == ["a-old", "b-bad", "d-new"]
    assert cleaned(runs, "d-new", "b-bad", "--yes") == {"d-new": "", "b-bad": ""}
    assert names(runs) == ["a-old"]
    assert cleaned(runs, "nothing", code=2) == {}
    for word, seconds in (("12h", 43_200), ("30d", 30 * DAY_S), ("0.5w", 3.5 * DAY_S)):
        assert clean.parse_age(word) == seconds
    for word in ("30", "d", "-1d", "3m", "1d 2h"):
        with pytest.raises(SettingError, match="such as 12h"):
            clean.parse_age(word)


def test_what_is_not_certainly_a_run_of_ones_own_that_is_over_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    made(runs, "goes")
    made(runs, "works", None, job_id=f"local-{os.getpid()}")
    base = made(runs, "base")
    made(runs, "unseen", None, job_id="local-999999999")
    made(runs, "lost", None, 2 * 3600, job_id="local-999999999")
    made(runs, "child", None, job_id=f"local-{os.getpid()}", init_from=str(base.checkpoints / "step-00000005"))
    (runs / "foreign").mkdir()
    (runs / "foreign" / "thesis.tex").write_text("years of work")
    (runs / "alike").mkdir()
    (runs / "alike" / "job.yaml").write_text("kind: Deployment\n")
    (runs / "odd" / "logs").mkdir(parents=True)
    (runs / "odd" / "job.yaml").write_text("kind: Deployment\n")
    elsewhere = made(tmp_path / "elsewhere", "linked")
    (runs / "linked").symlink_to(elsewhere.path)
    (runs / "goes" / "data").symlink_to(tmp_path / "elsewhere")
    before = names(runs)
    said = {run: re.sub(r"to \d+ s ago", "to 0 s ago", why) for run, why in cleaned(runs, "--older", "0d", "--yes").items()}
    assert said == {
        "goes": "", "lost": "", "unseen": "it has no end yet and was written to 0 s ago", "works": "it is running", "base": "run child starts from it", "child": "it is running", "alike": "it is no run directory of ours",
        "odd": "its job.yaml cannot be read, so it may be something else", "linked": "it is a symbolic link",
    }  # fmt: skip
    assert names(runs) == [name for name in before if name not in ("goes", "lost")]
    assert (elsewhere.path / "job.yaml").exists(), "a link inside of a run was followed"
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert clean.not_ours(base) == "it belongs to somebody else"


def test_what_a_queued_array_will_start_from_stays_and_so_does_what_is_reached_by_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    for name in ("a", "b", "c", "d", "e"):
        made(runs, name)
    (tmp_path / "link").symlink_to(runs)
    (tmp_path / "best").symlink_to(runs / "b" / "checkpoints" / "step-00000005")
    monkeypatch.setenv("HOME", str(tmp_path))
    array = made(runs, "many", None, job_id="7", init_from=str(tmp_path / "link" / "a"))
    (array.member(0).path / "logs").mkdir(parents=True)
    made(runs, "by-link", None, init_from=str(tmp_path / "best")), made(runs, "of-home", None, init_from="~/runs/c")
    search = made(runs, "search", None, job_id="8")
    (search.member(0).path / "logs").mkdir(parents=True)
    search.sweep.write_text(parser.define([f"INIT_FROM={runs}/e,/elsewhere"], {}, None, "", 256).model_dump_json())
    said = cleaned(runs, "a", "b", "c", "d", "e", "--yes", queue={"7_0": ("PENDING", "Priority", "")})
    starts = {"a": "many", "b": "by-link", "c": "of-home", "e": "search"}
    assert said == {"d": ""} | {run: f"run {user} starts from it" for run, user in starts.items()}
    # The runs directory itself may be named by a link.
    assert cleaned(tmp_path / "link", "a", "b", "--yes") == {"a": "run many starts from it", "b": "run by-link starts from it"}


def test_a_local_run_of_another_machine_stays_until_it_has_an_end_or_is_said_to_be_gone(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run = made(runs, "far", None, 9 * DAY_S, job_id="local-999999999")
    assert claim.claim(run, 1, {"job_id": "local-999999999", "host": "gpubox", "pid": 999_999_999, "stamp": "x:1"})
    (why,) = cleaned(runs, "far", "--yes").values()
    assert why.startswith("it was begun on gpubox without Slurm") and f"delete {run.attempt(1).owner}" in why
    shutil.copytree(run.path, runs / "ended")
    event_log.append(RunDir(runs / "ended").ledger, Event.END, attempt=1, job_id="local-999999999", cause="finished", step=5, saved_step=5)
    run.attempt(1).owner.unlink()
    assert cleaned(runs, "far", "ended", "--yes") == {"far": "", "ended": ""}


def test_an_array_goes_as_a_whole_or_stays(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    array = made(runs, "many")
    for index, cause in enumerate(("finished", None)):
        made(array.members, str(index), cause, job_id=f"local-{os.getpid()}")
    assert cleaned(runs, "many", "--yes") == {"many": "it is running"}
    assert cleaned(runs, str(array.member(0).path), "--yes") == {"many.0": "it is one task of an array; name the array, many"}
    event_log.append(array.member(1).ledger, Event.END, attempt=1, job_id="local-1", cause="finished", step=5, saved_step=5)
    assert cleaned(runs, "many", "--yes") == {"many": ""}
    assert names(runs) == []


def test_a_sweep_whose_last_trials_have_not_begun_stays_where_slurm_cannot_be_asked(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    array = made(runs, "many", job_id="7")
    made(array.members, "0", job_id="7_0")
    (array.member(1).path / "logs").mkdir(parents=True)
    for trouble in ("", "Slurm does not answer"):
        assert cleaned(runs, "many", "--yes", trouble=trouble) == {"many": "it is waiting"}
    assert cleaned(runs, "many", queue={"7_1": ("PENDING", "Priority", "")}) == {"many": "a job of it is queued"}
    # Values that cannot be run are an end too.
    array.member(1).trial.write_text(json.dumps({"number": 1, "values": {}, "problem": "trial 1 cannot be run"}))
    assert cleaned(runs, "many", trouble="Slurm does not answer") == {"many": ""}
    array.member(1).trial.unlink()
    assert cleaned(runs, "many", "--yes", queue={}) == {"many": ""}


def test_checkpoints_and_records_can_be_kept(tmp_path: Path) -> None:
    run = made(tmp_path / "runs", "kept")
    run.code.mkdir(exist_ok=True)
    (run.code / "x").write_bytes(b"x" * 50_000)
    before, frees = clean.size_of(run.path), clean._frees(run, keep_checkpoints=True)
    assert cleaned(tmp_path / "runs", "kept", "--keep-checkpoints", "--yes") == {"kept": ""}
    assert names(run.path) == ["checkpoints", "job.yaml", "ledger.jsonl", "logs"]
    # What is said to have gone is what has gone, without the checkpoint.
    assert frees == before - clean.size_of(run.path) >= 50_000
    with pytest.raises(SettingError, match=f"code of run {run.id} is gone.*INIT_FROM="):
        snapshot.refuse_without_code(run)
    assert directory.verify(directory.path_of(run.checkpoints, 5)).step == 5
    assert cleaned(tmp_path / "runs", "kept", "--yes") == {"kept": ""}
    assert names(tmp_path / "runs") == []


def test_of_an_array_the_checkpoints_and_records_of_every_task_can_be_kept(tmp_path: Path) -> None:
    array = made(tmp_path / "runs", "many")
    for path in (array.sweep, array.study, array.script, array.sweep_plot):
        path.touch()
    shutil.rmtree(array.checkpoints)
    tasks = [made(array.members, str(index), cause) for index, cause in enumerate(("finished", "code_error"))]
    for task in tasks:
        task.trial.touch()
    shutil.rmtree(tasks[1].checkpoints)
    assert cleaned(tmp_path / "runs", "many", "--keep-checkpoints", "--yes") == {"many": ""}
    assert names(array.path) == ["job.yaml", "ledger.jsonl", "logs", "study.journal", "submit.sbatch", "sweep.json", "tasks"]
    assert directory.verify(directory.path_of(tasks[0].checkpoints, 5)).step == 5
    assert [names(task.path) for task in tasks] == [
        ["checkpoints", "job.yaml", "ledger.jsonl", "logs", "trial.json"], ["job.yaml", "ledger.jsonl", "logs", "trial.json"]
    ]  # fmt: skip
    shutil.rmtree(tasks[0].checkpoints)
    assert cleaned(tmp_path / "runs", "many", "--keep-checkpoints", "--yes") == {"many": ""}
    assert names(tmp_path / "runs") == []


def test_what_a_killed_clean_left_aside_goes_when_it_is_old(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    made(runs, "goes")
    for name, age_s in ((".trash-x-1", 2 * DAY_S), (".staging-y-2", 2 * DAY_S), (".trash-z-3", 60), (".hidden", 9 * DAY_S)):
        (runs / name).mkdir()
        (runs / name / "f").touch()
        os.utime(runs / name, (time.time() - age_s,) * 2)
    cleaned(runs, "goes", "--yes")
    assert names(runs) == [".hidden", ".trash-z-3"]


def test_what_cannot_be_deleted_is_said_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path / "runs", "stuck")

    def refuse(*args: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    assert clean.clean(tmp_path / "runs", [run], older=None, failed=False, keep_checkpoints=False, yes=True, as_json=False) == 1
    said = capsys.readouterr().out
    assert "stuck: Permission denied" in said and "0 of 1 runs removed" in said
    assert run.job_yaml.exists()


@pytest.mark.slurm
def test_what_slurm_runs_or_queues_stays_and_so_does_everything_when_slurm_is_silent(cluster: Cluster) -> None:
    args = {"ENTRY": "tests/support/scripts/helped_script.py", "ENTRY_ARGS": "100000,5,0.05", "GPUS_PER_NODE": "1"}
    run = cluster.submit(NODES="1", **args)
    queued = cluster.submit("--array", "SEED=1..2", NODES="4", SBATCH_OPTIONS="exclusive=,begin=now+1hour", **args)
    try:
        cluster.at_step(run, 3)
        said = json.loads(cluster.holdfast("clean", "--json", "--yes", str(run.path), str(queued.path)).stdout)
        assert [one["why_left"] for one in said["runs"]] == ["it is running", "it is waiting"]
        silent = cluster.lab.conf.read_text().replace(f"SlurmctldPort={cluster.lab.base_port}", "SlurmctldPort=9")
        conf = cluster.runs.parent / "silent.conf"
        conf.write_text(silent)
        preempted = made(cluster.runs, "preempted", "preempted", job_id="77")
        said = json.loads(cluster.holdfast("clean", "--json", "--yes", str(queued.path), str(preempted.path), SLURM_CONF=str(conf)).stdout)
        assert [one["why_left"] for one in said["runs"]] == ["it is waiting", "Slurm does not answer, so nobody knows whether it is queued"]
    finally:
        for one in (cluster.job_id(run), cluster.job_id(queued.member(0)).partition("_")[0]):
            cluster.slurm("scancel", one)
    until(lambda: event_log.attempts(event_log.read(run.ledger))[-1].cause, 90, "the end of the run")
    until(lambda: not cluster.slurm("squeue", "-h", "-j", cluster.job_id(run)).strip(), 90, "its job to leave the queue")
    said = json.loads(cluster.holdfast("clean", "--json", "--yes", str(run.path), str(queued.path), str(preempted.path)).stdout)
    assert [one["why_left"] for one in said["runs"]] == ["", "", ""]
    assert not run.path.exists() and not queued.path.exists()

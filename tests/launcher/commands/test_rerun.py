"""`holdfast rerun` and `holdfast diff`: the same bytes give the same weights, and whatever is not the same is said."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, Cluster, weights_sha
from training import Farm, curve, farm  # noqa: F401

from jobs.config.resolver import load
from jobs.core.contract import Exit
from jobs.core.errors import ImpossibleJobError, NotFoundError, SettingError
from jobs.run import event_log, store
from jobs.run.rundir import RunDir
from launcher.commands import diff
from launcher.commands.rerun import rerun
from launcher.local.executor import run_attempts
from launcher.submission.create_run import prepare, resolve_here

ENVIRON = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}


def holdfast(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HOLDFAST_"))}
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli.app", *words], cwd=cwd, env={**clean, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working tree with a script that prints a word of another file and leaves a checkpoint of its seed."""
    (tmp_path / "mine.py").write_text(
        "import holdfast, other\nfolder = holdfast.new_checkpoint(1)\n(folder / 'w').write_text(other.WORD + str(holdfast.setting('seed')))\n"
        "holdfast.log(step=1, loss=len(other.WORD) + holdfast.setting('seed'))\nholdfast.commit(folder)\nprint(other.WORD)\n"
    )
    (tmp_path / "other.py").write_text("WORD = 'first'\n")
    (tmp_path / ".gitignore").write_text("runs/\n__pycache__/\n")
    for words in (("init",), ("add", "."), ("commit", "-m", "x")):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def first_run(project: Path) -> RunDir:
    words = ["ENTRY=mine.py", "DEVICE=cpu", "NODES=1", "GPUS_PER_NODE=1", "SEED=7", "RUN_ID=one", f"RUNS_DIR={project}/runs"]
    run, _ = prepare(resolve_here(words, {}, project), project, sys.executable)
    assert run_attempts(run, ENVIRON) == Exit.DONE
    return run


def newest(project: Path) -> RunDir:
    return store.find(None, project / "runs")


def said_by(run: RunDir) -> str:
    return run.log(event_log.attempts(event_log.read(run.ledger))[0].job_id, 0).read_text()


def test_a_rerun_uses_the_frozen_code_and_with_current_code_the_working_tree(project: Path) -> None:
    first = first_run(project)
    (project / "other.py").write_text("WORD = 'second'\n")
    done = holdfast(project, "rerun", "one")
    assert done.returncode == 0, done.stderr
    again = newest(project)
    assert said_by(again) == "first\n" and "the same" in done.stdout and "bit for bit" in done.stdout
    assert again.path.parent == first.path.parent and load(again.job_yaml).seed == 7
    assert holdfast(project, "diff", "one", again.id).returncode == 0
    assert json.loads(again.snapshot.read_text())["rerun_of"] == first.id
    done = holdfast(project, "rerun", "one", "--with-current-code", "SEED=9", "NOTE=other words")
    changed = newest(project)
    assert said_by(changed) == "second\n"
    assert "SEED 7 -> 9" in done.stdout and "M other.py" in done.stdout and "1 file differ" in done.stdout
    compared = holdfast(project, "diff", "--code", "one", changed.id)
    assert compared.returncode == 1
    for part in ("SEED", "7 (command line) -> 9 (command line)", "M other.py", "-WORD = 'first'", "+WORD = 'second'", "weights     different"):
        assert part in compared.stdout, compared.stdout


def test_frozen_code_that_was_changed_is_not_called_the_same(project: Path) -> None:
    first = first_run(project)
    (first.code / "other.py").write_text("WORD = 'edited in the run directory'\n")
    done = holdfast(project, "rerun", "one")
    assert done.returncode == 2 and "other.py" in done.stderr and "--with-current-code" in done.stderr
    assert [run.id for run in store.all_runs(project / "runs")] == [first.id]
    assert [path.name for path in (project / "runs").iterdir()] == [first.path.name]


def test_a_rerun_keeps_the_python_of_the_first_run(project: Path) -> None:
    first = first_run(project)
    other = project / "python with a space"
    other.symlink_to(sys.executable)
    first.script.write_text(first.script.read_text().replace(f"python={shlex.quote(sys.executable)}", f"python={shlex.quote(str(other))}"))
    assert holdfast(project, "rerun", "one").returncode == 0
    assert f"python={shlex.quote(str(other))}\n" in newest(project).script.read_text()


def test_what_cannot_be_rerun_or_compared_is_refused_and_leaves_nothing(project: Path) -> None:
    first = first_run(project)
    for words, error, said in (
        (["SITE=h100"], SettingError, "keeps the settings of its site"),
        (["SEED=x"], SettingError, "whole number"),
        (["STOP_LEAD_S=60000"], ImpossibleJobError, "do not fit"),
        (["RUN_ID=one"], SettingError, "exists already"),
        (["SEDE=1"], SettingError, "Did you mean SEED"),
    ):
        with pytest.raises(error, match=said):
            rerun(first, words, project, current_code=False, local=True, as_json=False)
    first.members.mkdir()
    with pytest.raises(SettingError, match="is an array"):
        rerun(first, [], project, current_code=False, local=True, as_json=False)
    with pytest.raises(NotFoundError, match="is an array"):
        diff.diff(first, first, code=False, as_json=False)
    first.members.rmdir()
    assert holdfast(project, "diff", "one").returncode == 2
    assert holdfast(project, "diff", "one", "two").returncode == 2
    assert [path.name for path in (project / "runs").iterdir()] == [first.path.name]


def test_versions_are_compared_where_both_are_known() -> None:
    assert diff.changed_versions({"torch": "2.12", "numpy": "2"}, {"torch": "2.13", "numpy": "2", "torchao": "1"}) == {"torch": ("2.12", "2.13")}
    assert diff.changed_files({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "d": "4"}) == {"b": "M", "c": "D", "d": "A"}


@pytest.mark.slurm
@pytest.mark.slow
def test_on_a_cluster_a_rerun_is_submitted(cluster: Cluster) -> None:
    run = cluster.submit("ENTRY=tests/support/scripts/helped_script.py", "ENTRY_ARGS=10,5,0", NODES="1", GPUS_PER_NODE="1", SEED="3")
    cluster.finished(run, 150)
    answer = json.loads(cluster.holdfast("rerun", "--json", str(run.path), "TIME_LIMIT=20").stdout)
    again = RunDir(Path(answer["path"]))
    assert answer["rerun_of"] == run.id and answer["settings"] == ["time_limit"] and not answer["files"]
    cluster.finished(again, 150)
    assert (again.path / "end.0").read_text() == (run.path / "end.0").read_text()
    compared = cluster.holdfast("diff", str(run.path), str(again.path), check=False)
    assert compared.returncode == 1 and "TIME_LIMIT" in compared.stdout and "identical, bit for bit" in compared.stdout


# Last: its ranks are forked instead of started, for the whole module.
def test_a_rerun_on_a_cpu_in_fp32_ends_with_identical_weights(farm: Farm, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    first = farm.finished(MAX_STEPS="16", EVAL_EVERY="8", GPUS_PER_NODE="1")
    assert rerun(first, [], REPOSITORY, current_code=False, local=False, as_json=False) == Exit.DONE
    said = capfd.readouterr().out
    assert "settings    the same" in said and "the same weights, bit for bit" in said
    again = store.find(None, farm.root)
    assert again.path != first.path
    assert (weights_sha(again), curve(again)) == (weights_sha(first), curve(first))
    assert diff.diff(first, again, code=False, as_json=False) == Exit.DONE
    assert "identical, bit for bit" in capfd.readouterr().out
    # Another seed is another training, and is said to be one.
    assert rerun(first, ["SEED=8"], REPOSITORY, current_code=False, local=False, as_json=False) == Exit.DONE
    said = capfd.readouterr().out
    assert "SEED 7 -> 8" in said and "other weights" in said
    assert diff.diff(first, store.find(None, farm.root), code=False, as_json=True) == Exit.FAILED
    answer = json.loads(capfd.readouterr().out)
    assert answer["settings"] == {"seed": {"values": ["7", "8"], "from": ["command line", "command line"]}}
    assert {"weights", "loss"} <= set(answer["result"]["different"]) and not answer["code"]["files"]

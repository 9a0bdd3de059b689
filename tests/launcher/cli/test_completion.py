"""`holdfast completion`: what a shell offers at a Tab, and what a Tab imports."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from conftest import REPOSITORY, until
from terminal import Terminal

from benchmarks import many_runs
from jobs.config.settings import names
from jobs.run.rundir import RunDir
from jobs.specs.precision import Precision
from launcher.cli import completion
from launcher.cli.app import app

HOLDFAST = Path(sys.executable).with_name("holdfast")


def offered(line: str, cwd: Path = REPOSITORY, **environ: str) -> list[str]:
    return [word for word, _ in completion.candidates(typer.main.get_command(app), line, environ, cwd)]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    many_runs.make(tmp_path / "runs", 3, lines=2)
    (tmp_path / "runs" / ".staging-x").mkdir()
    (tmp_path / "runs" / "no-run").mkdir()
    array = RunDir(tmp_path / "runs" / "sweep-zzzz")
    for index in range(3):
        array.member(index).path.mkdir(parents=True)
        array.member(index).job_yaml.write_text("")
    array.job_yaml.write_text("")
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "other.yaml").write_text("")
    return tmp_path / "runs"


# -- words -------------------------------------------------------------------------------------------------------------


def test_commands_and_their_commands() -> None:
    assert {"submit", "status", "watch", "logs", "completion", "lab"} <= set(offered("holdfast "))
    assert offered("holdfast wat") == ["watch"]
    assert offered("holdfast lab st") == ["start", "status", "stop"]
    assert offered("holdfast completion ") == ["bash", "fish", "zsh"]
    assert offered("holdfast nothing ") == []


def test_options_but_not_the_hidden_ones_and_their_values() -> None:
    assert offered("holdfast submit --") == ["--array", "--json", "--local", "--test-only", "--wait"]
    assert offered("holdfast completion --") == []
    assert offered("holdfast logs --rank ") == ["0", "all", "batch"]


def test_every_setting_as_a_word_in_the_case_that_is_being_written() -> None:
    words = offered("holdfast submit ")
    assert {f"{name.upper()}=" for name in names()} <= set(words) and "jobs/quickstart.yaml" in words
    assert offered("holdfast submit PREC") == ["PRECISION="] and offered("holdfast run prec") == ["precision="]
    assert offered("holdfast submit PRECISION=fp16 PREC") == []
    assert "PRECISION=" in offered("holdfast resume x PREC") and "PRECISION=" not in offered("holdfast status PREC")


def test_values_of_settings_that_have_a_closed_set() -> None:
    assert offered("holdfast submit PRECISION=") == sorted(f"PRECISION={mode}" for mode in Precision)
    assert offered("holdfast submit precision=f") == ["precision=fp16", "precision=fp32", "precision=fp8"]
    assert offered("holdfast submit FP8_RECIPE=t") == ["FP8_RECIPE=tensorwise"]
    assert offered("holdfast submit COMPILE=") == ["COMPILE=false", "COMPILE=true"]
    assert offered("holdfast submit CHECKPOINT_EVERY=") == ["CHECKPOINT_EVERY=auto"]
    sites = sorted(path.stem for path in (REPOSITORY / "slurm" / "sites").glob("*.yaml"))
    assert offered("holdfast submit SITE=") == [f"SITE={site}" for site in sites] and "generic" in sites
    assert offered("holdfast submit LR=") == [] and offered("holdfast submit NOTHING=") == []


def test_job_files_of_ours_and_of_the_folder(runs: Path) -> None:
    cwd = runs.parent
    assert offered("holdfast submit jobs/q", cwd) == ["jobs/quickstart.yaml"]
    assert offered("holdfast submit mi", cwd) == ["micro_batch_size=", "mine.yaml"]
    assert offered("holdfast submit mo", cwd) == ["model=", "model_options=", "modules=", "more/"]
    assert offered("holdfast submit more/", cwd) == ["more/other.yaml"]
    assert "JOB=mine.yaml" in offered("holdfast submit JOB=", cwd)


def test_runs_of_the_directory_that_is_meant(runs: Path) -> None:
    cwd = runs.parent
    expected = ["RUN=", "RUNS_DIR=", "quickstart-0000", "quickstart-0001", "quickstart-0002", "sweep-zzzz"]
    assert offered("holdfast status ", cwd) == expected
    assert offered("holdfast status ", cwd, RUNS_DIR="more") == ["RUN=", "RUNS_DIR="]
    assert offered(f"holdfast logs RUNS_DIR={runs} quick", REPOSITORY) == expected[2:5]
    assert offered("holdfast cancel RUN=sweep", cwd) == ["RUN=sweep-zzzz"]
    # Members of an array only once it is named: there may be ten thousand.
    assert offered("holdfast cancel sweep-zzzz.", cwd) == ["sweep-zzzz.0", "sweep-zzzz.1", "sweep-zzzz.2"]


def test_quotes_and_spaces_do_no_harm() -> None:
    assert offered("holdfast submit NOTE='two words' PREC") == ["PRECISION="]
    assert offered("holdfast submit NOTE='open PREC") == ["PRECISION="]


# -- shells ------------------------------------------------------------------------------------------------------------


def test_bash_completes_words_as_readline_cuts_them(runs: Path, tmp_path: Path) -> None:
    ask = """
source <(holdfast completion bash)
ask() { COMP_LINE="$1" COMP_POINT=${#1}; _holdfast; printf '%s|' "${COMPREPLY[@]}"; echo; }
ask 'holdfast wat'
ask 'holdfast submit PREC'
ask 'holdfast submit PRECISION=bf'
ask 'holdfast submit PRECISION='
ask 'holdfast status quickstart-'
COMP_WORDBREAKS=' '
ask 'holdfast submit PRECISION=bf'
complete -p holdfast
"""
    bin_folder = f"{HOLDFAST.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", ask],
        cwd=runs.parent,
        env={**os.environ, "PATH": bin_folder, "RUNS_DIR": str(runs)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [
        "watch|",
        "PRECISION=|",
        "bf16|",
        "bf16|fp16|fp32|fp8|tf32|",
        "quickstart-0000|quickstart-0001|quickstart-0002|",
        "PRECISION=bf16|",
        "complete -o default -F _holdfast holdfast",
    ], done.stderr


def test_tab_in_a_real_bash_writes_the_word(tmp_path: Path) -> None:
    env = {**os.environ, "PATH": f"{HOLDFAST.parent}:{os.environ['PATH']}", "PS1": "ready> ", "INPUTRC": "/dev/null"}
    with Terminal(["bash", "--norc", "--noprofile", "-i"], env, tmp_path) as terminal:
        until(lambda: "ready> " in terminal.raw, 20, "the prompt")
        terminal.type("source <(holdfast completion bash) && echo sour''ced\n")
        until(lambda: "sourced" in terminal.raw, 20, "the script")
        terminal.type("holdfast submit PREC\t")
        until(lambda: "submit PRECISION=" in terminal.raw, 20, "the name")
        # No space behind the '=', so that the value follows at once.
        terminal.type("b\t")
        until(lambda: "PRECISION=bf16 " in terminal.raw, 20, "the value")
        terminal.type("\x15exit\n")
        assert terminal.process.wait(20) == 0


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_scripts_of_other_shells_are_whole(shell: str) -> None:
    script = subprocess.run([HOLDFAST, "completion", shell], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "completion --line" in script and "@" not in script.replace("[@]", "")
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n", "/dev/stdin"], input=script, capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stderr


def test_a_tab_loads_nothing_heavy() -> None:
    code = "import sys; from launcher.cli.app import run_app; run_app(['completion', '--line', 'holdfast submit PREC']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    *shown, loaded = done.stdout.splitlines()
    assert shown[0].startswith("PRECISION=\t")
    assert not {"torch", "submitit", "numpy", "rich.table", "optuna"} & set(loaded.split())

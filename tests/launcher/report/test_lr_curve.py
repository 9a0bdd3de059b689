"""`holdfast explain --curve`: the picture agrees with the schedule, in the terminal, in a pipe and as a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from jobs.config.validation import schedule_of
from jobs.specs.lr_schedule import LRSchedule, describe
from launcher.report.lr_plot import plot


def explain(*words: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"}
    return subprocess.run([sys.executable, "-m", "launcher.cli.app", "explain", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def stars(lines: list[str]) -> list[set[int]]:
    """For each row of the plot from the top: the columns with a star."""
    return [{column for column, mark in enumerate(line.partition("|")[2]) if mark == "*"} for line in lines if "|" in line]


@pytest.mark.parametrize("schedule", [
    LRSchedule("cosine_with_restarts", 1e-3, 1000, 100, 1e-4, T_0=100, T_mult=2),
    LRSchedule("cosine", 1e-3, 1000, 50), LRSchedule("wsd", 1e-3, 997, 50, decay_steps=200), LRSchedule("linear", 1e-3, 10), LRSchedule("constant", 1e-3, 1),
], ids=lambda s: s.kind)  # fmt: skip
def test_every_star_of_the_plot_is_a_rate_and_every_column_has_one(schedule: LRSchedule) -> None:
    rows = stars(plot(schedule, 72, 14))
    columns = max(max(row, default=0) for row in rows) + 1
    assert columns == min(72, max(2, schedule.total_steps)) or schedule.total_steps == 1
    assert all(any(column in row for row in rows) for column in range(min(columns, schedule.total_steps)))
    # The first step of each column lies where the column has a star, within a row.
    for column in range(min(columns, schedule.total_steps)):
        at = 13 - round(schedule(column * schedule.total_steps // columns) / schedule.base_lr * 13)
        assert any(column in rows[row] for row in range(max(0, at - 1), min(14, at + 2)))


def test_a_restart_inside_one_column_is_a_line_from_floor_to_peak() -> None:
    rows = stars(plot(LRSchedule("cosine_with_restarts", 1e-3, 100_000, T_0=1000), 20, 10))
    assert all(len(row) == 20 for row in rows)


def test_the_command_draws_in_a_pipe_without_colour_and_as_json() -> None:
    done = explain("jobs/cosine_restarts.yaml", "--curve")
    assert done.returncode == 0 and "\x1b" not in done.stdout, done.stderr
    assert "restarts: 2, at steps 500, 1300" in done.stdout and done.stdout.count("*") > 72 and "2,900" in done.stdout
    shown = json.loads(explain("--json", "jobs/cosine_restarts.yaml", "--curve", "MAX_STEPS=1300").stdout)
    assert shown["curve"][0] == [0, pytest.approx(6e-14)] and [100, 6e-4] in shown["curve"] and shown["curve"][-1][0] == 1299


def test_the_command_draws_into_a_file_or_says_why_not(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = explain("wsd", "--curve", "lr.png", cwd=tmp_path)
    assert done.returncode == 0 and "-> lr.png" in done.stdout, done.stderr
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG") and [path.name for path in tmp_path.iterdir()] == ["lr.png"]
    refused = explain("wsd", "--curve", "nowhere/lr.png", cwd=tmp_path)
    assert refused.returncode == 2 and "nowhere/lr.png" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_schedule_of_a_shipped_job_file_leaves_nothing_to_warn_of(path: Path) -> None:
    job = load_resolved(path)
    assert not [line for line in describe(schedule_of(job)) if line.startswith("warning")]


def load_resolved(path: Path):
    from launcher.submission.create_run import resolve_here

    return resolve_here([f"JOB={path}", "SITE=generic"], {}, REPOSITORY).job


def test_example_jobs_show_what_they_are_there_for() -> None:
    fp16 = load_resolved(REPOSITORY / "jobs/fp16_scaler.yaml")
    text = (REPOSITORY / "jobs/fp16_scaler.yaml").read_text()
    assert fp16.precision == "fp16" and all(f"\n{name}:" in text for name in type(fp16).model_fields if name.startswith("grad_scaler_"))
    restarts = load_resolved(REPOSITORY / "jobs/cosine_restarts.yaml")
    assert set(restarts.lr_scheduler_params) == {"T_0", "T_mult", "eta_min"} and load_resolved(REPOSITORY / "jobs/wsd.yaml").lr_scheduler == "wsd"
    block = load_resolved(REPOSITORY / "jobs/amp_block.yaml")
    assert (block.precision, block.grad_accum_steps, block.warmup_steps, block.lr) == ("bf16", 2, 100, 6e-4)

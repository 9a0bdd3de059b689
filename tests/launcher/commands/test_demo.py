"""`holdfast demo`: what it says where Slurm is missing, and the whole of it on a small model."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

from jobs.core.errors import SettingError
from launcher.cluster import demo
from slurm.devcluster import lab


def test_where_slurm_is_missing_it_says_what_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[str]] = []

    def stop_here(words: list[str], *_: object) -> None:
        seen.append(words)
        raise SettingError("no further")

    monkeypatch.setattr(lab, "missing_programs", lambda: ["slurmctld", "munged"])
    monkeypatch.setattr(demo, "resolve_here", stop_here)
    monkeypatch.chdir(tmp_path)
    assert demo.demo(["SEED=3"]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "missing: slurmctld, munged" in said and "local executor" in said and lab.how_to_install() in said
    demo.demo(["--precision=fp32"])
    assert seen == [["PRECISION=bf16", "SEED=3", "DEVICE=cpu"], ["--precision=fp32", "DEVICE=cpu"]]


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.skipif(bool(lab.missing_programs()), reason="needs the Slurm programs")
def test_it_is_preempted_and_comes_back_from_any_folder(tmp_path: Path) -> None:
    small = {name: value for name, value in SMALL.items() if name != "MAX_STEPS"} | {"MAX_STEPS": "300"}
    done = subprocess.run(
        [Path(sys.executable).with_name("holdfast"), "demo", *(f"{key}={value}" for key, value in small.items())],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Slurm preempts our run" in done.stdout and "attempt 2 starts" in done.stdout and "finished" in done.stdout
    assert list((tmp_path / "runs").iterdir())

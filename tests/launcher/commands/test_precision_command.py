"""`holdfast precision`: measured on this machine's CPU, judged and recommended also for hardware that is not here, and PRECISION=auto.

Run: pytest tests/launcher/commands/test_precision_command.py"""

import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from on_device import One, job_of, needs_compiler

from jobs.config import precision_cache
from jobs.config.memory_estimate import estimate
from jobs.config.settings import Job
from jobs.core.errors import HoldfastError, SettingError
from jobs.specs.precision import MODES
from launcher.commands.precision import LEAST_GAIN, Row, candidates, judge, markdown, name_of, recommend, table
from launcher.submission.create_run import resolve_here
from train import batch_size_finder, bench

H100 = {"device": "NVIDIA H100", "arch": 90, "fp8": ["te", "torchao"], "memory_gb": 80.0, "torch": "2.11"}
CPU = {"device": "CPU", "arch": None, "fp8": [], "memory_gb": None, "torch": "2.13"}
NANO = ["MODEL_OPTIONS=n_layers=1,d_model=64,n_heads=2,d_ff=128", "SEQ_LEN=64", "BATCH_SIZE=16", "MICRO_BATCH_SIZE=4"]


def holdfast(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HOLDFAST_"))}
    return subprocess.run([sys.executable, "-m", "launcher.cli.app", *words], cwd=REPOSITORY, env={**clean, **env}, capture_output=True, text=True, timeout=500)


def job(**settings: Any) -> Job:
    return Job(job_name="a", **{"micro_batch_size": 32, **settings})


# ----------------------------------------------------------------------------------------------------------- measured here


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    runs = tmp_path_factory.mktemp("runs")
    done = holdfast("precision", *NANO, f"RUNS_DIR={runs}", "--steps", "8", "--json")
    assert done.returncode == 0, done.stderr
    return runs, json.loads(done.stdout)


def test_every_precision_of_this_machine_is_measured_on_the_share_of_one_process(measured: tuple[Path, dict[str, Any]]) -> None:
    _, report = measured
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [mode.name.value for mode in MODES.values() if mode.on_cpu]
    assert report["samples"] == 4
    for row in rows.values():
        assert row["per_s"] == pytest.approx(4 * 64 / (row["step_ms"] / 1000), rel=1e-3) and row["step_ms_p95"] >= row["step_ms"] > 0
        assert len(row["losses"]) == 8 and row["losses"][-1] < row["losses"][0]
        # Exact by count: fp32 weights and gradients, and two moments.
        assert row["memory_gb"]["parameters"] == row["memory_gb"]["gradients"] == row["memory_gb"]["optimizer"] / 2 > 0
        assert row["memory_gb"]["peak"] is None, "a CPU does not tell"
    assert rows["fp32"]["max_gap"] == 0 and rows["fp32"]["cosine"] == pytest.approx(1)
    assert 0 < rows["bf16"]["max_gap"] < 0.05 and 0.98 < rows["bf16"]["cosine"] < 1
    assert report["settings"]["precision"] in rows and report["rule"]


def test_auto_takes_what_was_recommended_and_says_so(measured: tuple[Path, dict[str, Any]]) -> None:
    runs, report = measured
    resolved = resolve_here(["DEVICE=cpu", "PRECISION=auto", *NANO, f"RUNS_DIR={runs}"], {}, REPOSITORY)
    assert resolved.job.precision == report["settings"]["precision"]
    assert resolved.origins["precision"] == f"auto: measured on CPU, {report['date']}"
    # Another shape was not measured, and neither was a GPU.
    for words in (["DEVICE=cpu", "SEQ_LEN=32"], ["DEVICE=cuda"], ["DEVICE=auto", "GPU_ARCH=sm_90"]):
        with pytest.raises(SettingError, match="was not measured yet.*holdfast precision"):
            resolve_here([*NANO, "PRECISION=auto", f"RUNS_DIR={runs}", *words], {}, REPOSITORY)


def test_the_page_beside_it_holds_the_table(measured: tuple[Path, dict[str, Any]]) -> None:
    runs, report = measured
    page = next((runs / ".precision").glob("*.md")).read_text()
    assert "| precision | per second |" in page and f"Take `PRECISION={report['settings']['precision']}`" in page
    assert next((runs / ".precision").glob("*.png")).read_bytes()[:4] == b"\x89PNG"
    assert holdfast("status", "--json", f"RUNS_DIR={runs}").stdout.strip() == "[]", "a measurement is no run"


@pytest.mark.parametrize(
    "words", [["MODEL=convnet", "DATA=digits"], ["MODEL=own_models:regression", "DATA=own_models:numbers"]], ids=["convnet", "a module of one's own"]
)
def test_other_models_are_measured_too_and_only_leaves_modes_out_and_keeps_nothing(tmp_path: Path, words: list[str]) -> None:
    done = holdfast(
        "precision", *words, "BATCH_SIZE=8", f"RUNS_DIR={tmp_path}", "--steps", "6", "--only", "fp32", PYTHONPATH=str(REPOSITORY / "tests/support/models")
    )
    assert done.returncode == 0, done.stderr
    assert "-> PRECISION=fp32" in done.stdout and "bf16" not in done.stdout.replace("x bf16", "")
    assert not (tmp_path / ".precision").exists()


def test_a_mode_that_this_machine_has_not_is_refused_beside_those_it_has(tmp_path: Path) -> None:
    refused = holdfast("precision", f"RUNS_DIR={tmp_path}", "--only", "fp8")
    assert refused.returncode == 2 and "this machine (CPU) has none of it; it has fp32, bf16" in refused.stderr


# ------------------------------------------------------------------------------------------------- judged, for any hardware


def test_a_hopper_gpu_is_asked_for_each_backend_and_recipe_but_not_for_what_blackwell_brings() -> None:
    names = [name_of(settings) for settings in candidates(H100, job(), "")]
    assert names == ["fp32", "tf32", "bf16", "fp16", "fp8 te current", "fp8 te delayed", "fp8 te block", "fp8 torchao tensorwise", "fp8 torchao rowwise"]
    assert "fp8 te mxfp8" in [name_of(settings) for settings in candidates({**H100, "arch": 100}, job(), "")]
    assert [name_of(s) for s in candidates({**H100, "arch": 80}, job(), "")] == ["fp32", "tf32", "bf16", "fp16"]
    assert [name_of(s) for s in candidates({**H100, "fp8": ["torchao"]}, job(), "torchao")] == ["fp32", "fp8 torchao tensorwise", "fp8 torchao rowwise"]
    with pytest.raises(HoldfastError, match="has none of it"):
        candidates(CPU, job(), "te")


def rows(**speeds: float) -> list[Row]:
    found = []
    for name, speed in speeds.items():
        precision, _, rest = name.partition("_")
        settings = {"precision": precision, **({"fp8_backend": "te", "fp8_recipe": rest} if rest else {})}
        found.append(Row(name_of(settings), settings, per_s=speed, losses=[2.0, 1.0], cosine=0.999))
    return found


@pytest.mark.parametrize(
    ("speeds", "spoilt", "chosen", "why"),
    [
        ({"fp32": 1, "bf16": 10, "fp16": 10.2, "fp8_current": 13}, {}, "fp8 te current", "fastest"),
        ({"fp32": 1, "bf16": 10, "fp16": 10.2, "fp8_current": 10.25}, {}, "bf16", "2.5 % faster"),
        ({"fp32": 1, "bf16": 10, "fp8_current": 13}, {"fp8 te current": {"losses": [2.0, 1.1]}}, "bf16", "fastest"),
        ({"fp32": 1, "bf16": 10, "fp8_current": 13}, {"fp8 te current": {"cosine": 0.5}}, "bf16", "fastest"),
        ({"fp32": 1, "bf16": 10, "fp16": 12}, {"fp16": {"losses": [2.0, float("nan")]}}, "bf16", "fastest"),
        ({"fp32": 3, "bf16": 1}, {}, "fp32", "fastest"),
        ({"fp32": 1, "bf16": 10, "fp8_current": 13, "fp8_delayed": 13.2}, {}, "fp8 te delayed", "fastest"),
    ],
)
def test_the_fastest_within_parity_is_recommended_unless_a_simpler_one_is_nearly_as_fast(
    speeds: dict[str, float], spoilt: dict[str, dict[str, Any]], chosen: str, why: str
) -> None:
    found = [replace(row, **spoilt.get(row.name, {})) for row in rows(**speeds)]
    judge(found, 0.02)
    best, rule = recommend(found)
    assert best is not None and best.name == chosen and why in rule
    assert best.verdict.startswith("recommended")
    assert LEAST_GAIN > 1


def test_a_mode_that_was_left_out_says_why_and_is_never_taken() -> None:
    found = rows(fp32=1, bf16=2)
    found.append(
        Row("fp8 te current", {"precision": "fp8", "fp8_backend": "te", "fp8_recipe": "current"}, verdict="left out: no layer of this model can be converted")
    )
    judge(found, 0.02)
    assert recommend(found)[0] is found[1]
    headings, lines = table(found)
    assert lines[2][headings.index("verdict")].startswith("left out: no layer")
    assert "memory" not in headings and "overflows" not in headings, "columns without a figure are not shown"
    report = {"device": "x", "samples": 1, "seq_len": 1, "steps": 2, "date": "2026-01-01", "torch": "2", "settings": found[1].settings, "rule": "r"}
    assert "left out" in markdown(job(), report, found)


def test_nothing_is_recommended_when_nothing_trains_as_fp32_does() -> None:
    broken = [replace(row, losses=[float("nan")] * 2, culprit="blocks.0.mlp") for row in rows(bf16=2)]
    found = [*(replace(row, verdict="left out: no memory", per_s=None) for row in rows(fp32=1)), *broken]
    judge(found, 0.02)
    # Without fp32 there is nothing to compare with; what is not finite is still no choice.
    assert found[1].verdict == "no fp32 to compare with" or "not finite" in found[1].verdict
    with_reference = [*rows(fp32=1), *broken]
    judge(with_reference, 0.02)
    assert with_reference[1].verdict == "not finite, first in blocks.0.mlp" and not with_reference[1].passed


def test_the_largest_micro_batch_is_guessed_from_one_sample_and_then_tried_out() -> None:
    first: dict[str, float | None] = {"peak": 30.0, "activations": 10.0}
    tried: list[int] = []

    def peak(one: Job, most: int) -> float | None:
        tried.append(one.batch_size)
        return 20 + 2.5 * one.batch_size if one.batch_size <= most else None

    def limit(most: int) -> tuple[int, float | None]:
        tried.clear()
        return batch_size_finder.largest_micro_batch(job(), 4, first, 80.0, lambda one: peak(one, most))

    # 77.6 GB of 80 less the 20 that do not grow, at 2.5 GB a sample.
    assert limit(23) == (23, 77.5) and tried == [23, 24]
    assert limit(25) == (25, 82.5) and tried == [23, 24, 25, 26]
    size, held = limit(20)
    assert 18 <= size <= 20 and held == 20 + 2.5 * size and tried[0] == 23
    assert limit(4) == (4, 30.0)
    # A first try that leaves less than one more sample.
    first["peak"] = 79.0
    assert limit(4) == (4, 79.0) and tried == [5]
    # What seemed to grow with the samples does not: with recomputation most of it is a single block.
    first["peak"] = 30.0
    tried.clear()

    def slow(one: Job) -> float | None:
        tried.append(one.batch_size)
        return 28 + 0.5 * one.batch_size if one.batch_size < 103 else None

    assert batch_size_finder.largest_micro_batch(job(), 4, first, 80.0, slow) == (99, 77.5) and tried == [23, 99, 105]
    tried.clear()
    assert batch_size_finder.largest_micro_batch(job(), 4, first, 80.0, slow, guess=98) == (98, 77.0) and tried == [98, 104]


def test_the_first_guess_of_a_built_in_model_is_what_the_estimate_has_room_for() -> None:
    of_1b = job(model="1b", seq_len=2048, compile=True, amp_opt_level="O2")
    size = batch_size_finder.expected_to_fit(of_1b, 85.0)
    assert size is not None
    fits, too_many = (estimate(batch_size_finder.with_micro_batch(of_1b, one)) for one in (size, size + 1))
    assert fits is not None and too_many is not None and fits.peak <= 0.97 * 85e9 < too_many.peak
    assert batch_size_finder.expected_to_fit(of_1b, 10.0) is None and batch_size_finder.expected_to_fit(job(model="convnet"), 85.0) is None


@needs_compiler
def test_nothing_of_a_compiled_model_is_left_when_the_next_size_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiled blocks are cycles of references, and a measurement takes them out of the garbage collector's sight, as training does.
    left: list[weakref.ref[object]] = []
    build = bench.build

    def kept(*args: Any) -> Any:
        found = build(*args)
        left.extend(weakref.ref(p) for p in found[0].parameters())
        return found

    monkeypatch.setattr(bench, "build", kept)
    monkeypatch.setattr(bench.runtime, "init", lambda job: One(torch.device("cpu")))
    shape = {"n_layers": 1, "d_model": 16, "n_heads": 1, "d_ff": 16}
    bench.measure(job_of("bf16", "cpu", model_options=shape, seq_len=16, compile=True), 2, 1)
    assert any(one() is not None for one in left), "as it was when 1b left 9 of 80 GB to none"
    bench.forget()
    assert left and not any(one() is not None for one in left)


def test_a_cosine_is_that_of_the_angle() -> None:
    assert bench.cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(2**-0.5)
    assert bench.cosine(np.array([2.0]), np.array([-1.0])) == pytest.approx(-1.0)
    assert bench.cosine(np.array([2.0]), np.array([1.0, 1.0])) is None


# -------------------------------------------------------------------------------------------------------------- kept advice


def test_advice_that_is_torn_or_of_other_hardware_is_not_taken_and_the_newest_wins(tmp_path: Path) -> None:
    one = job(gpu_arch="sm_90")
    content = {"settings": {"precision": "fp8", "fp8_backend": "te"}, "device": "H100", "date": "2026-01-01", "rule": "fastest"}
    assert precision_cache.look_up(tmp_path, one) is None
    precision_cache.keep(precision_cache.place(tmp_path, one, 90), content)
    found = precision_cache.look_up(tmp_path, one)
    assert found is not None and found.settings == content["settings"] and found.device == "H100"
    assert precision_cache.look_up(tmp_path, job(gpu_arch="sm_80")) is None
    assert precision_cache.look_up(tmp_path, job(device="cpu")) is None
    assert precision_cache.look_up(tmp_path, job(gpu_arch="sm_90", model="124m")) is None
    assert precision_cache.look_up(tmp_path, job(gpu_arch="sm_90", lr=0.5, seed=9)) is not None, "these change neither speed nor rounding"
    newer = precision_cache.place(tmp_path, one, 80)
    precision_cache.keep(newer, {**content, "device": "A100"})
    os.utime(newer, (2e9, 2e9))
    anywhere = precision_cache.look_up(tmp_path, job())
    assert anywhere is not None and anywhere.device == "A100"
    precision_cache.place(tmp_path, one, 90).write_text('{"settings": {')
    assert precision_cache.look_up(tmp_path, one) is None


def test_a_resume_cannot_ask_for_auto(tmp_path: Path) -> None:
    from jobs.config.resolver import amend

    with pytest.raises(SettingError, match="looked up at submit"):
        amend({"job_name": "a", "batch_size": 8}, {}, ["PRECISION=auto"])


def test_a_value_of_ones_own_goes_before_the_advice(tmp_path: Path) -> None:
    one = job(gpu_arch="sm_90", seq_len=128)
    precision_cache.keep(
        precision_cache.place(tmp_path, one, 90),
        {"settings": {"precision": "fp8", "fp8_backend": "te", "fp8_recipe": "current"}, "device": "H100", "date": "2026-01-01", "rule": "fastest"},
    )
    words = ["MODEL=nano", "MODEL_OPTIONS={}", "SEQ_LEN=128", "GPU_ARCH=sm_90", "PRECISION=auto", "FP8_RECIPE=delayed", f"RUNS_DIR={tmp_path}"]
    resolved = resolve_here(words, {}, REPOSITORY)
    assert (resolved.job.precision, resolved.job.fp8_recipe) == ("fp8", "delayed")
    assert resolved.origins["fp8_recipe"] == "command line"

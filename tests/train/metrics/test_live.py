"""What a run says about its speed: FLOPs by the named formula, shares of a peak, waits, and the profiler's trace.

Run: pytest tests/train/metrics/test_live.py"""

import gzip
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from on_device import One
from torch import nn
from training import Farm, farm, logs

from jobs.config.settings import Job
from jobs.run import metrics_log
from jobs.run.goodput import Part
from jobs.specs.gpu_peaks import peak_of
from jobs.specs.precision import Precision
from train.distributed import runtime
from train.metrics.flops import flops_per_sample
from train.metrics.goodput_timer import GoodputTimer
from train.metrics.profiler import StepProfiler
from train.metrics.throughput import Throughput, progress_text
from train.models.registry import build_model

__all__ = ["farm"]
CPU = torch.device("cpu")


def job_of(**settings: Any) -> Job:
    return Job(**{"job_name": "t", "batch_size": 8, "precision": "bf16", **settings})


def batch_of(length: int) -> dict[str, torch.Tensor]:
    return {"tokens": torch.zeros(2, length, dtype=torch.int64)}


def test_the_built_in_model_counts_by_its_own_formula_others_by_6_n_and_images_not_at_all() -> None:
    gpt = build_model("nano", vocab_size=256, seq_len=64)
    flops, formula = flops_per_sample(gpt, batch_of(64))
    assert flops == gpt.flops_per_token(64) * 64 and "6 N + 6 L d T" in formula
    other = nn.Linear(10, 10, bias=False)
    flops, formula = flops_per_sample(other, batch_of(32))
    assert flops == 6 * 100 * 32 and "600 FLOP per token = 6 N " in formula
    flops, formula = flops_per_sample(other, {"images": torch.zeros(2, 1, 8, 8)})
    assert flops is None and "not counted" in formula


@pytest.mark.parametrize(
    ("name", "precision", "tflops", "kind"),
    [
        ("NVIDIA H200", Precision.BF16, 989.4, "dense bf16"), ("NVIDIA H100 80GB HBM3", Precision.FP8, 989.4, "dense bf16"), ("NVIDIA H100 PCIe", Precision.FP16, 756, "dense fp16"),
        ("NVIDIA H100 NVL", Precision.BF16, 835.5, "dense bf16"), ("NVIDIA GH200 480GB", Precision.TF32, 494.7, "dense tf32"), ("NVIDIA A100-SXM4-80GB", Precision.FP32, 19.5, "fp32"),
        ("NVIDIA L40S", Precision.BF16, 362, "dense bf16"), ("NVIDIA L4", Precision.BF16, 121, "dense bf16"), ("Tesla V100-SXM2-32GB", Precision.FP16, 125, "dense fp16"),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_gpu_and_the_arithmetic(name: str, precision: Precision, tflops: float, kind: str) -> None:
    peak = peak_of(name, precision)
    assert peak and (peak.tflops, peak.kind) == (tflops, kind)


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "NVIDIA A10G", "NVIDIA RTX A1000", "NVIDIA L40 ", "", "AMD Instinct MI300X"])
def test_a_gpu_that_is_not_in_the_table_has_no_peak(name: str) -> None:
    assert peak_of(name, Precision.BF16) is None
    assert peak_of("Tesla V100-SXM2-32GB", Precision.TF32) is None


def test_a_line_covers_the_time_since_the_one_before() -> None:
    now = [100.0]
    clock = GoodputTimer(now=lambda: now[0])
    live = Throughput(job_of(), One(CPU), (5e8, "x"), clock)  # type: ignore[arg-type]
    clock.enter(Part.DATA_WAIT)
    now[0] += 0.25
    clock.enter(Part.SAVE_STALL)
    now[0] += 0.125
    clock.enter(Part.USEFUL)
    live._begun = time.monotonic() - 1.0
    live.step()
    live.step()
    line = live.values(1000)
    assert line["tokens_per_s"] == pytest.approx(1000, rel=0.05) and line["tflops"] == pytest.approx(8e-3, rel=0.05)
    assert line["data_wait_pct"] == pytest.approx(25, rel=0.05) and line["save_wait_pct"] == pytest.approx(12.5, rel=0.05)
    assert "peak_pct" not in line and "gpu_memory_gib" not in line
    assert live.lines() == ["model FLOPs: x; no % of peak: the table has no entry for a CPU"]
    # The next line begins anew.
    live.step()
    assert live.values(500)["data_wait_pct"] == 0.0


def test_the_progress_line_says_what_there_is_and_leaves_out_what_was_not_waited_for() -> None:
    line = {
        "step": 20,
        "loss": 2.5,
        "lr": 1e-3,
        "tokens_per_s": 12345.6,
        "tflops": 523.4,
        "peak_pct": 52.9,
        "gpu_memory_gib": 45.25,
        "loss_scale": 65536.0,
        "data_wait_pct": 12.3,
        "save_wait_pct": 0.2,
    }
    assert (
        progress_text(line, 100)
        == "step 20/100 · loss 2.5000 · lr 1.00e-03 · 12,346 tok/s · 523 TFLOP/s (52.9 % of peak) · 45.2 GiB · loss scale 65536 · 12 % waiting for data"
    )
    plain = {"step": 1, "loss": 2.5, "lr": 0.0, "tokens_per_s": 10.0, "tflops": 0.00123, "data_wait_pct": 0.0, "save_wait_pct": 0.0, "val_loss": 2.0}
    assert progress_text(plain, 9) == "step 1/9 · loss 2.5000 · lr 0.00e+00 · 10 tok/s · 0.00123 TFLOP/s · val loss 2.0000"


@pytest.mark.parametrize(("text", "said"), [("14-10", "10-14"), ("0-3", "10-14"), ("a", "10-14"), ("1-2-3", "10-14"), ("1-51", "more than 50 steps")])
def test_a_range_of_steps_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        job_of(profile_steps=text)


def test_live_figures_and_a_trace_of_the_asked_steps_come_with_a_run(farm: Farm) -> None:
    run = farm.finished(PRECISION="fp32", MAX_STEPS="12", EVAL_EVERY="6", LOG_EVERY="1", PROFILE_STEPS="3-5")
    lines = metrics_log.read(run.metrics)
    assert len(lines) == 12 and all({"tokens_per_s", "tflops", "data_wait_pct", "save_wait_pct"} <= set(line) for line in lines)
    assert all(line["tflops"] > 0 and 0 <= line["data_wait_pct"] <= 100 and 0 <= line["save_wait_pct"] <= 100 for line in lines)
    said = logs(run)
    assert "FLOP per token = 6 N + 6 L d T" in said and "no % of peak" in said and "profile written to" in said
    (attempt,) = (run.path / "attempts").iterdir()
    assert [path.name for path in attempt.glob("*trace*")] == ["trace.json.gz"]
    events = json.loads(gzip.decompress(run.attempt(1).trace.read_bytes()))["traceEvents"]
    names = {str(event.get("name")) for event in events}
    assert any("mm" in name for name in names)
    # One gradient exchange of DDP or optimizer step per step of the range.
    assert sum("Optimizer.step" in str(event.get("name")) for event in events if event.get("ph") == "X") == 3


def test_a_run_that_ends_inside_the_range_still_leaves_its_trace(tmp_path: Any) -> None:
    said: list[str] = []
    tracer = StepProfiler(job_of(profile_steps="2-9"), tmp_path / "trace.json.gz", said.append, enabled=True)
    for step in (1, 2, 3):
        tracer.before(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        tracer.after(step)
    assert not (tmp_path / "trace.json.gz").exists()
    tracer.close()
    names = [event.get("name") for event in json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]]
    assert names.count("aten::matmul") == 2 and [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]
    # A disk that refuses, and a rank that is not asked.
    missing = StepProfiler(job_of(profile_steps="1"), tmp_path / "nowhere" / "trace.json.gz", said.append, enabled=True)
    missing.before(1)
    missing.after(1)
    assert "could not be written" in said[-1]
    other = StepProfiler(job_of(profile_steps="1"), tmp_path / "other.json.gz", said.append, enabled=False)
    other.before(1)
    other.after(1)
    assert not (tmp_path / "other.json.gz").exists()


def test_the_first_line_says_precision_reason_weights_scale_and_hardware() -> None:
    def said(**settings: Any) -> str:
        return runtime.describe(job_of(**settings), SimpleNamespace(device=CPU, world_size=2), "command line")  # type: ignore[arg-type]

    assert said(precision="fp32") == "precision fp32 (command line): ieee fp32; weights fp32, no loss scaling · 2 x CPU, 1 thread per process"
    assert "bf16 O2 (command line)" in said(amp_opt_level="O2") and "matrices bfloat16 with fp32 masters" in said(amp_opt_level="O2")
    assert "loss scaled by 65536 at first, x2 after 2000 good steps, x0.5 at an overflow" in said(precision="fp16")

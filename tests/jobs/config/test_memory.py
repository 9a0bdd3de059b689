"""The memory estimate against what torch holds on a CPU: weights, moments, gradients and saved activations to the byte.

Run: pytest tests/jobs/config/test_memory.py"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from on_device import One

from benchmarks.largest import expected_gb, job_of_cell
from jobs.config.memory_estimate import Shape, activations, estimate
from jobs.config.settings import Job
from jobs.config.yaml_io import read_yaml
from jobs.specs.precision import MODES, Precision
from train import optim
from train.models.registry import PRESETS, build_model
from train.precision.numerics import GradScaler, autocast_context
from train.train_step import TrainStep

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"n_layers": 3, "d_model": 64, "n_heads": 4, "d_ff": 160},
    "grouped heads, tied": {"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "tie_embeddings": True},
    "other head size": {"n_layers": 2, "d_model": 64, "n_heads": 2, "head_dim": 16, "d_ff": 96},
}


def job_of(precision: str, shape: dict[str, Any], **settings: Any) -> Job:
    return Job(
        **{
            "job_name": "t",
            "model": "nano",
            "model_options": shape,
            "seq_len": 32,
            "batch_size": 4,
            "micro_batch_size": 4,
            "grad_accum_steps": 1,
            "precision": precision,
            "fused_kernels": False,  # there are none on a CPU
            **settings,
        }
    )


def batch_of(job: Job) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 256, (job.batch_size, job.seq_len + 1), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t.ndim)


@pytest.mark.parametrize("name", PRESETS)
def test_the_count_of_parameters_is_that_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, seq_len=128)
    shape = Shape.of(Job(job_name="t", model=name, seq_len=128))
    assert shape and shape.matrices + shape.vectors == sum(p.numel() for p in model.parameters())
    assert shape.block_matrices == sum(p.numel() for key, p in model.named_parameters() if key.startswith("blocks") and p.ndim == 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("precision", "level"), [("fp32", None), ("bf16", None), ("bf16", "O2")])
def test_weights_moments_and_gradients_are_exact(shape: str, precision: str, level: str | None) -> None:
    job = job_of(precision, SHAPES[shape], amp_opt_level=level)
    model = build_model("nano", vocab_size=256, seq_len=32, overrides=SHAPES[shape])
    if level == "O2":
        optim.use_16_bit_parameters(job, model)
    stepper = TrainStep(job, One(CPU), model, model, optim.build(job, model), autocast_context(job.precision, CPU), GradScaler.from_job(job))  # type: ignore[arg-type]
    stepper([batch_of(job)])
    found = estimate(job)
    assert found
    masters = {id(t): t for p in model.parameters() for t in (p, optim.fp32_of(p))}
    assert found.weights == bytes_of(masters.values())
    assert found.moments == bytes_of(optim.state_by_name(stepper.optimizer, model).values())
    assert found.gradients == bytes_of(t.grad for t in masters.values() if t.grad is not None)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_an_eager_forward_pass_keeps_is_exact(shape: str, precision: str, checkpointed: bool) -> None:
    options = {**SHAPES[shape], "checkpoint_blocks": checkpointed}
    job = job_of(precision, options)
    model = build_model("nano", vocab_size=256, seq_len=32, overrides=options)
    ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    batch = batch_of(job)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast_context(Precision(precision), CPU)():
        model(**batch)
    found = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in ours)
    s, expected = Shape.of(job), estimate(job)
    assert s and expected
    element, tokens = (2 if MODES[Precision(precision)].autocast else 4), 4 * 32
    # Beside them: the head's gradient, made in the forward pass; token numbers; copies of the weights, when not made again.
    rest = 4 * s.table + 8 * tokens + (element if checkpointed else expected.copies)
    # With recomputation a block is given its input, and one zero to add to it.
    # The last norm's output is not kept, the gradient of the same size by it is. Recomputation keeps no block's insides.
    assert found - rest == kept_by(s, element, tokens) - (insides_of_a_block(s, element, tokens) if checkpointed else 0)


def kept_by(s: Shape, element: int, tokens: int) -> int:
    return activations(s, tokens, element, fused=False, residual=element)


def insides_of_a_block(s: Shape, element: int, tokens: int) -> int:
    """What is there only while a block is computed again."""
    again, plain = (replace(s, layers=0, checkpointed=checkpointed) for checkpointed in (True, False))
    return kept_by(again, element, tokens) - kept_by(plain, element, tokens)


def test_sharding_recomputation_and_accumulation_change_what_they_should() -> None:
    base = {"model": "1b", "seq_len": 2048, "batch_size": 16, "micro_batch_size": 16, "job_name": "t", "fused_kernels": False}
    plain = estimate(Job(**base))
    assert plain and plain.peak > plain.weights + plain.moments + plain.activations
    recomputed, compiled = estimate(Job(**base, grad_checkpointing=True)), estimate(Job(**base, compile=True))
    assert recomputed and compiled and recomputed.activations < plain.activations / 5 and compiled.activations < plain.activations * 0.7
    two = estimate(Job(**{**base, "micro_batch_size": 8}, gpus_per_node=2, parallel="fsdp"))
    assert two and (two.weights, two.moments, two.gradients) == (plain.weights // 2, plain.moments // 2, plain.gradients // 2)
    accumulated = estimate(Job(**{**base, "micro_batch_size": 8}, grad_accum_steps=2))
    assert accumulated and accumulated.activations == plain.activations // 2
    # The known sum of a 1.26 B model: 4 + 8 bytes per parameter for weights and moments.
    assert plain.weights + plain.moments == 12 * 1_261_529_088


# Preset, sequences of 2,048 tokens, precision, recomputed: what torch had allocated at most, GB (benchmarks/results/2026-11-28-precisions-and-memory.md; torch 2.11, compiled,
# on an H200 where 16 of 1b were trained, else the largest micro-batch of an H100 or of an H200).
MEASURED = [
    ("1b", 16, "bf16 O2", False, 73.5),
    ("1b", 16, "fp8 te current", False, 70.2),
    ("1b", 16, "fp8 torchao tensorwise", False, 66.5),
    ("1b", 18, "bf16 O2", False, 80.2),
    ("1b", 16, "fp16 O2", False, 79.5),
    ("1b", 172, "bf16 O2", True, 83.9),
    ("1b", 20, "fp8 te current", False, 82.4),
    ("3b", 7, "bf16 O2", False, 83.5),
    ("3b", 62, "bf16 O2", True, 81.0),
    ("3b", 6, "fp16 O2", False, 82.0),
    ("3b", 38, "fp16 O2", True, 81.0),
    ("3b", 6, "fp8 te current", False, 79.5),
    ("3b", 65, "fp8 te current", True, 83.7),
    ("3b", 8, "fp8 torchao tensorwise", False, 82.7),
    ("1b", 21, "fp8 torchao tensorwise", False, 81.1),
    ("1b", 9, "fp32", False, 78.4),
    ("3b", 3, "fp32", False, 72.2),
    ("1b", 163, "fp8 te current", True, 81.6),
    ("1b", 174, "fp8 torchao tensorwise", True, 83.2),
    ("1b", 110, "fp16 O2", True, 83.2),
    ("3b", 66, "fp8 torchao tensorwise", True, 82.7),
    ("3b", 37, "fp32", True, 83.0),
    ("8b", 3, "bf16 O2", False, 147.3),
    ("8b", 35, "bf16 O2", True, 147.3),
    ("8b", 2, "fp16 O2", False, 139.6),
    ("8b", 22, "fp16 O2", True, 147.7),
    ("8b", 2, "fp8 te current", False, 149.0),
    ("8b", 36, "fp8 te current", True, 148.9),
    ("8b", 3, "fp8 torchao tensorwise", False, 142.8),
    ("8b", 37, "fp8 torchao tensorwise", True, 148.6),
    ("8b", 2, "fp32", False, 142.2),
    ("8b", 24, "fp32", True, 147.4),
    ("1b", 166, "fp32", True, 143.0),
    ("1b", 85, "tf32", True, 80.8),
    ("1b", 166, "tf32", True, 143.0),
    ("1b", 19, "tf32", False, 146.7),
    ("3b", 9, "tf32", False, 142.9),
    ("3b", 89, "tf32", True, 148.0),
]


@pytest.mark.parametrize("model, samples, precision, recomputed, measured", MEASURED)
def test_the_estimate_lies_within_a_thirtieth_of_what_a_gpu_held(model: str, samples: int, precision: str, recomputed: bool, measured: float) -> None:
    assert expected_gb(job_of_cell(model, precision, recomputed), samples) == pytest.approx(measured, rel=1 / 30)


def test_without_our_kernels_it_lies_within_a_tenth() -> None:
    job = Job(**read_yaml(REPOSITORY / "jobs" / "gpt_1b_h100.yaml", "the job file")).model_copy(
        update={"grad_accum_steps": 1, "amp_opt_level": None, "fused_kernels": False}
    )
    expected = estimate(job)
    assert expected and expected.peak / 1e9 == pytest.approx(74.7, rel=0.1)


def test_other_models_and_cpus_have_no_estimate() -> None:
    assert estimate(Job(job_name="t", model="hf:/somewhere")) is None and estimate(Job(job_name="t", model="convnet")) is None
    assert estimate(Job(job_name="t", model="1b", device="cpu")) is None
    assert estimate(Job(job_name="t", model="nano", model_options={"n_heads": "many"})) is None


def test_explain_tells_it_where_it_can() -> None:
    def explain(*words: str) -> str:
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(
            [sys.executable, "-m", "launcher.cli.app", "explain", *words], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    line = explain("jobs/gpt_1b_h100.yaml").rstrip().splitlines()[-1]
    assert line.startswith("about ") and " GB of GPU memory at the peak" in line and "weights 7.6, moments 10.1, gradients 2.5" in line
    assert "GPU memory at the peak" not in explain("jobs/gpt_1b_h100.yaml", "SITE=lab")
    assert isinstance(json.loads(explain("--json")), list)

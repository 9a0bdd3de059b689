"""Every precision, overflow, checkpoints, compilation and two ranks on a real GPU: `make test-gpu`.

The helpers are those of tests/train/test_on_device.py, which a CPU runs."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from on_device import CASES, One, Training, falls, gradient_job, gradients_of, gradients_over_ranks, job_of, largest_gap

from benchmarks.trace import read
from jobs.run import metrics_log
from jobs.specs.gpu_peaks import peak_of
from jobs.specs.precision import MODES, Precision, runs_on
from train import optim, perf_flags
from train.checkpoint.host_staging import PinnedCopier
from train.data.loader import TrainLoader
from train.data.sources import open_data
from train.data.synthetic import AffineTokens
from train.distributed import runtime
from train.models.convnet import ConvNet
from train.precision.check import TOLERANCE
from train.precision.fp8 import load_early
from train.rng import seed_everything

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"), pytest.mark.timeout(900)]
GPU = torch.device("cuda")

# Name -> settings, the package that is needed, and the compute capability where it is more than the precision's own.
MODES_HERE: dict[str, tuple[dict[str, Any], str, int]] = {
    "fp32": ({}, "torch", 0),
    "tf32": ({}, "torch", 0),
    "bf16": ({}, "torch", 0),
    "bf16 O2": ({"amp_opt_level": "O2"}, "torch", 0),
    "fp16": ({}, "torch", 0),
    "fp16 O2": ({"amp_opt_level": "O2"}, "torch", 0),
    "fp8 te current": ({"fp8_recipe": "current"}, "transformer_engine", 89),
    "fp8 te delayed": ({"fp8_recipe": "delayed"}, "transformer_engine", 89),
    "fp8 te block": ({"fp8_recipe": "block"}, "transformer_engine", 90),
    "fp8 torchao tensorwise": ({"fp8_backend": "torchao", "fp8_recipe": "tensorwise"}, "torchao", 89),
    "fp8 torchao rowwise": ({"fp8_backend": "torchao", "fp8_recipe": "rowwise"}, "torchao", 90),
}
if torch.cuda.is_available():
    load_early()
# fp8 may leave another path after some steps; so many are compared.
STEPS = 25


def unavailable(name: str) -> str:
    """Why a mode cannot run here, or nothing."""
    settings, package, arch = MODES_HERE[name]
    major, minor = torch.cuda.get_device_capability()
    here = major * 10 + minor
    if not runs_on(MODES[Precision(name.split()[0])], here) or here < arch:
        return f"{name} needs sm_{max(arch, MODES[Precision(name.split()[0])].min_arch or 0)}, this GPU is sm_{here}"
    return "" if importlib.util.find_spec(package) else f"{name} needs {package}"


def training(folder: Path, name: str, **settings: Any) -> Training:
    reason = unavailable(name)
    if reason:
        pytest.skip(reason)
    return Training(job_of(name.split()[0], "cuda", **{**MODES_HERE[name][0], **settings}), GPU, folder)


@pytest.mark.parametrize("name", MODES_HERE)
def test_every_precision_falls_like_fp32(tmp_path: Path, name: str) -> None:
    """Parity: the tolerances of train.precision.check, relative to fp32's loss at the same step (below 1 nat: to 1 nat).

    On a CPU the same 25 steps gave bf16 0.006, bf16 O2 0.004, and fp8 as torchao emulates it 0.039."""
    run = training(tmp_path / "run", name).train(STEPS)
    reference = training(tmp_path / "fp32", "fp32").train(STEPS)
    assert falls(run) and falls(reference)
    # Two runs of fp32 differ too: sums on a GPU are not taken in a fixed order.
    assert largest_gap(run, reference) <= (1e-3 if name == "fp32" else TOLERANCE[run.job.precision]), (run.losses, reference.losses)


@pytest.mark.parametrize("name", ["fp16", "fp16 O2"])
def test_fp16_that_overflows_is_recorded_step_by_step_and_survived(tmp_path: Path, name: str) -> None:
    run = training(tmp_path / "fp16", name, grad_scaler_init=2.0**36).train(STEPS)
    events = run.overflows()
    assert len(events) > 3 and events[0]["step"] == 0
    assert [event["scale"] for event in events] == [2.0 ** (36 - n) for n in range(len(events))]
    assert all(event["first"] in dict(run.model.named_parameters()) for event in events)
    assert falls(run) and run.stepper.scale and run.stepper.scale.scale == events[-1]["scale"] / 2


@pytest.mark.parametrize("source", MODES_HERE)
def test_a_checkpoint_of_every_precision_goes_on_in_every_other(tmp_path: Path, source: str) -> None:
    """The weights are the same bits, and the next loss is that of the precision that goes on, within its tolerance."""
    saved = training(tmp_path / "source", source).train(8)
    saved.save()
    straight = training(tmp_path / "fp32", "fp32")
    straight.load(saved)
    straight.train(1)
    tried = []
    for n, name in enumerate(MODES_HERE):
        if unavailable(name):
            continue
        target = training(tmp_path / str(n), name)
        target.load(saved)
        assert all(torch.equal(tensor, saved.weights()[key]) for key, tensor in target.weights().items()), name
        assert target.step == 8
        target.train(2)
        assert largest_gap_at_first(target, straight) <= max(TOLERANCE[target.job.precision], 1e-3), name
        tried.append(name)
    assert {"fp32", "fp16"} <= set(tried)


def largest_gap_at_first(target: Training, straight: Training) -> float:
    return abs(target.losses[0] - straight.losses[0]) / max(straight.losses[0], 1.0)


@pytest.mark.parametrize("name", ["bf16 O2", "fp16 O2"])
def test_o2_holds_16_bit_matrices_and_fp32_masters_on_the_gpu(tmp_path: Path, name: str) -> None:
    run = training(tmp_path / "run", name).train(3)
    dtype = torch.bfloat16 if name.startswith("bf16") else torch.float16
    assert {p.dtype for p in run.model.parameters() if p.ndim >= 2} == {dtype}
    assert {p.dtype for p in run.model.parameters() if p.ndim < 2} == {torch.float32}
    assert {tensor.dtype for group in run.optimizer.param_groups for tensor in group["params"]} == {torch.float32}
    assert run.optimizer.defaults["fused"] and all(tensor.device.type == "cuda" for group in run.optimizer.param_groups for tensor in group["params"])


_PRODUCTS = """
import sys, torch
from on_device import job_of
from train.distributed import runtime
runtime.init(job_of(sys.argv[1], "cuda"))
g = torch.Generator().manual_seed(0)
a, b = (torch.randn(512, 512, generator=g, dtype=torch.float64) for _ in range(2))
x, w = torch.randn(4, 64, 32, 32, generator=g, dtype=torch.float64), torch.randn(64, 64, 3, 3, generator=g, dtype=torch.float64)
def error(got, exact):
    return float((got.double().cpu() - exact).norm() / exact.norm())
print(error(a.float().cuda() @ b.float().cuda(), a @ b), error(torch.nn.functional.conv2d(x.float().cuda(), w.float().cuda()), torch.nn.functional.conv2d(x, w)))
"""


@pytest.mark.parametrize("name", ["fp32", "tf32"])
def test_tf32_is_really_off_and_really_on(name: str) -> None:
    """Relative error of products against fp64: 23 bits of mantissa leave below 1e-5, 10 bits some 3e-4."""
    if unavailable(name):
        pytest.skip(unavailable(name))
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [
                str(REPOSITORY),
                str(REPOSITORY / "tests"),
                str(REPOSITORY / "tests/support"),
                str(REPOSITORY / "tests/support/models"),
                os.environ.get("PYTHONPATH", ""),
            ]
        ),
    }
    done = subprocess.run([sys.executable, "-c", _PRODUCTS, name], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [float(word) for word in done.stdout.split()[-2:]]
    assert all(error > 5e-5 for error in errors) if name == "tf32" else all(error < 1e-5 for error in errors), errors


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8 te current", "fp8 torchao tensorwise"])
def test_compiled_blocks_train_like_eager_ones(tmp_path: Path, name: str) -> None:
    eager = training(tmp_path / "eager", name).train(10)
    compiled = training(tmp_path / "compiled", name, compile=True).train(10)
    assert largest_gap(compiled, eager) <= TOLERANCE[compiled.job.precision]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", MODES_HERE)
def test_recomputing_activations_changes_no_loss(tmp_path: Path, name: str, compiled: bool) -> None:
    kept = training(tmp_path / "kept", name, compile=compiled).train(4)
    again = training(tmp_path / "again", name, compile=compiled, grad_checkpointing=True).train(4)
    # Other kernels may be compiled where less is kept; the sum of a block's two outputs is rounded where one tensor is kept for it.
    assert largest_gap(again, kept) <= TOLERANCE[again.job.precision]


def test_a_save_in_the_background_goes_through_pinned_memory_and_holds_its_step(tmp_path: Path) -> None:
    run = training(tmp_path / "run", "bf16").train(3)
    run.saver.preallocate(run.model, run.optimizer)
    assert run.saver._reserving is not None
    run.saver._reserving.join()
    assert all(buffer.is_pinned() for buffer in run.saver._memory._buffers.values())
    before = run.weights()
    run.save(blocking=False)
    run.train(3)
    run.saver.join()
    other = training(tmp_path / "other", "bf16")
    other.load(run)
    assert other.step == 3 and all(torch.equal(tensor, before[name]) for name, tensor in other.weights().items())


def test_tensors_of_every_kind_are_filled_through_blocks_that_are_used_again() -> None:
    here = torch.Generator().manual_seed(0)
    sources = [torch.randn(shape, generator=here) for shape in [(), (0, 3), (1,), (255,), (257, 3), (300, 1024), (5000, 7)]]
    sources += [torch.arange(1000), torch.rand(333, generator=here) < 0.5, torch.randn(64, 32, generator=here).t()]
    with torch.cuda.stream(torch.cuda.Stream()), PinnedCopier(threads=3, block=1024) as filling:
        filled = [filling.new(source, torch.device("cuda")) for source in sources]
        weight = torch.nn.Parameter(torch.zeros(300, 1024, dtype=torch.bfloat16, device="cuda"))
        filling.add(weight, sources[5])
        turned = torch.zeros(7, 5000, device="cuda").t()
        filling.add(turned, sources[6])
    torch.cuda.synchronize()
    assert all(torch.equal(there.cpu(), source) for there, source in zip(filled, sources, strict=True))
    assert torch.equal(weight.cpu(), sources[5].bfloat16()) and torch.equal(turned.cpu(), sources[6])


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_samples_reach_the_gpu_and_are_pinned_where_asked(pinned: bool, workers: int) -> None:
    job = job_of("bf16", "cuda", pin_memory=pinned, num_workers=workers, max_steps=3)
    feed = TrainLoader(job, One(GPU), open_data("synthetic", seq_len=job.seq_len, split="train", vocab_size=256))  # type: ignore[arg-type]
    try:
        assert feed.ready(0, wait_s=60)
        assert all(tensor.is_pinned() == pinned for batch in feed._steps[0].result() for tensor in batch.values())
        assert all(tensor.device.type == "cuda" for step in range(3) for batch in feed.take(step) for tensor in batch.values())
    finally:
        feed.close()


def test_cudnn_times_its_convolutions_where_shapes_are_fixed() -> None:
    model, data = ConvNet().to(GPU), AffineTokens(seq_len=8, vocab_size=16, split="train")
    before = torch.backends.cudnn.benchmark
    try:
        (line,) = perf_flags.apply(job_of("fp32", "cuda", cudnn_benchmark=True), model, data, GPU)
        assert torch.backends.cudnn.benchmark and not line.startswith("warning")
        model(images=torch.rand(8, 1, 8, 8, device=GPU), targets=torch.zeros(8, dtype=torch.int64, device=GPU)).backward()
    finally:
        torch.backends.cudnn.benchmark = before


def test_the_ordinary_entry_point_names_the_gpu_and_logs_finite_numbers(tmp_path: Path) -> None:
    from benchmarks.hardware import train

    words = [
        "MODEL=nano",
        "SEQ_LEN=64",
        "BATCH_SIZE=8",
        "MAX_STEPS=20",
        "EVAL_EVERY=10",
        "EVAL_SAMPLES=16",
        "CHECKPOINT_EVERY=10",
        "LOG_EVERY=1",
        "DEVICE=cuda",
        "NODES=1",
        "GPUS_PER_NODE=1",
        "SITE=generic",
        "PROFILE_STEPS=3-4",
    ]
    run = train(tmp_path, "gpu", words)
    text = "\n".join(path.read_text() for path in run.logs.glob("*.0.out"))
    gpu = torch.cuda.get_device_properties(0)
    assert gpu.name in text and f"sm_{gpu.major}{gpu.minor}" in text and "GiB" in text
    lines = metrics_log.read(run.metrics)
    assert [line["step"] for line in lines] == list(range(1, 21)) and lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["tflops"] > 0 and line["gpu_memory_gib"] > 0 for line in lines)
    # So small a model is far from the peak: its share may be 0.00 %.
    known = peak_of(gpu.name, Precision.BF16) is not None
    assert all(("peak_pct" in line) == known and 0 <= line.get("peak_pct", 0) < 100 for line in lines)
    kernels = [event for event in read(run.attempt(1).trace) if event.get("cat") == "kernel"]
    assert kernels


@pytest.mark.parametrize("name", ["bf16", "bf16 O2", "fp8 te current", "fp8 torchao tensorwise"])
def test_no_step_waits_for_the_gpu_between_two_lines_of_metrics(tmp_path: Path, name: str) -> None:
    """fp16 does, once a step: whether a gradient overflowed decides what comes next."""
    from benchmarks.hardware import PRECISIONS, train

    reason = unavailable(name)
    if reason:
        pytest.skip(reason)
    shape = ["MODEL=nano", "MODEL_OPTIONS=n_layers=2,d_model=256,n_heads=2,d_ff=512", "SEQ_LEN=64", "BATCH_SIZE=8", "COMPILE=true", "DEVICE=cuda", "NODES=1"]
    rhythm = ["GPUS_PER_NODE=1", "SITE=generic", "MAX_STEPS=12", "EVAL_EVERY=0", "EVAL_SAMPLES=16", "CHECKPOINT_EVERY=12", "LOG_EVERY=10", "PROFILE_STEPS=4-8"]
    run = train(tmp_path, "quiet", [*shape, *rhythm, *PRECISIONS[name]])
    trace = read(run.attempt(1).trace)
    calls = Counter(str(event["name"]) for event in trace if event.get("cat") in ("cuda_runtime", "cuda_driver"))
    # The profiler waits for the device when it begins and when it ends.
    waits = [event for event in trace if "Synchronize" in str(event["name"]) and event.get("cat") in ("cuda_runtime", "cuda_driver")]
    ours = [event for event in waits if event["name"] != "cudaDeviceSynchronize"]
    assert sum(calls.values()) > 100 and len(waits) - len(ours) <= 3 and not ours, {around(event, trace) for event in ours}


def around(event: dict[str, Any], trace: list[dict[str, Any]]) -> str:
    """The operations of torch that a call was made in, the outermost first."""
    held = [one for one in trace if one.get("cat") == "cpu_op" and one["tid"] == event["tid"] and one["ts"] <= event["ts"] <= one["ts"] + one["dur"]]
    return " > ".join(str(one["name"]) for one in sorted(held, key=lambda one: (one["ts"], -one["dur"])))


def test_the_first_line_of_a_run_describes_this_gpu() -> None:
    gpu = torch.cuda.get_device_properties(0)
    said = runtime.describe(job_of("bf16", "cuda"), One(GPU))  # type: ignore[arg-type]
    assert gpu.name in said and f"sm_{gpu.major}{gpu.minor}" in said and f"{gpu.total_memory / 2**30:.0f} GiB" in said


def test_memory_is_taken_in_segments_that_grow() -> None:
    """In a process of its own: this one has allocated before."""
    code = (
        "import torch; from on_device import gradient_job; from train.distributed import runtime\n"
        "torch.empty(1000, device=runtime.init(gradient_job('cuda', 1)).device)\n"
        "print([segment['is_expandable'] for segment in torch.cuda.memory_snapshot()])"
    )
    env = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    env["PYTHONPATH"] = os.pathsep.join(
        [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests/support"), str(REPOSITORY / "tests/support/models"), env.get("PYTHONPATH", "")]
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1:] == ["[True]"], done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs two CUDA devices, this machine has {torch.cuda.device_count()}")
def test_gradients_of_two_gpus_under_ddp_and_fsdp_equal_those_of_one(tmp_path: Path) -> None:
    """fp32 without TF32; kernels add in no fixed order, so 1e-4 of the largest gradient of a weight."""
    over_two = gradients_over_ranks(2, "cuda", tmp_path / "two", timeout=400)
    for case in CASES:
        one = gradients_of(gradient_job("cuda", 1), One(GPU), case)
        for name, expected in one.items():
            for way in ("ddp", "fsdp"):
                torch.testing.assert_close(
                    over_two[f"{way} {case}"][name],
                    expected,
                    rtol=0,
                    atol=1e-4 * float(expected.abs().max()),
                    msg=lambda text, name=name, way=way: f"{name}, {way}: {text}",
                )


def test_fused_kernels_compute_what_plain_torch_computes() -> None:
    """At the true widths, beyond one tile, and with a last row that fills none: relative error of outputs and gradients."""
    from interpreted_kernels import both

    from train.models import ops

    rows, width, ff = 4097, 2048, 5632
    g = torch.Generator().manual_seed(0)

    def on_gpu(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(GPU, torch.bfloat16)

    angle = torch.rand(33, 64, generator=g).to(GPU) * 6
    cases = {
        "add_norm": (lambda o: lambda *t: o.add_norm(*t, 1e-5, torch.bfloat16), [on_gpu(rows, width), on_gpu(rows, width), torch.rand(width, device=GPU)]),
        "swiglu": (lambda o: o.swiglu, [on_gpu(rows, 2 * ff)]),
        "rotary": (lambda o: lambda t: o.rotary(t, angle.cos(), angle.sin(), 12, 3), [on_gpu(5, 33, 18, 128)]),
    }
    for name, (of, inputs) in cases.items():
        for plain, fused in both(of(ops.PLAIN), of(ops.fused(128)), inputs):
            assert plain.dtype == fused.dtype
            assert float((plain.double() - fused.double()).norm() / plain.double().norm()) < 0.006, name


def test_what_was_compiled_is_there_for_an_attempt_on_another_node(tmp_path: Path) -> None:
    from compiled_attempts import two_attempts

    first, second = two_attempts(tmp_path, "cuda")
    assert "hits 0 misses 1" in first and "hits 1 misses 0" in second
    assert "kernels compiled: 1" in first and "kernels of an earlier attempt loaded" not in first
    assert "kernels of an earlier attempt loaded" in second and "kernels compiled: 0" in second


def test_the_fused_loss_is_that_of_plain_torch() -> None:
    from train.kernels.cross_entropy import terms
    from train.models.loss import chunk_terms

    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g).to(GPU, torch.bfloat16) for shape in ((1031, 256), (32_000, 256)))
    targets, scale = torch.randint(0, 32_000, (1031,), generator=g).to(GPU), torch.rand(1031, generator=g).to(GPU)
    (plain, by_plain), (fused, by_fused) = (one(hidden, weight * 0.1, targets, scale) for one in (chunk_terms, terms))
    assert float((plain - fused).abs() / plain) < 1e-5
    assert float((by_plain.double() - by_fused.double()).norm() / by_plain.double().norm()) < 1e-3


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16 O2", "fp16 O2", "fp8 te current"])
def test_fused_kernels_train_like_plain_torch(tmp_path: Path, name: str) -> None:
    fused = training(tmp_path / "fused", name).train(STEPS)
    plain = training(tmp_path / "plain", name, fused_kernels=False).train(STEPS)
    assert fused.optimizer.kernels and not plain.optimizer.kernels  # type: ignore[attr-defined]
    # Moments and masters of 25 steps went through other kernels; what differs is rounding.
    assert largest_gap(fused, plain) <= (1e-3 if name == "fp32" else TOLERANCE[fused.job.precision])


def test_a_gradient_that_is_not_finite_changes_no_weight_under_the_kernels(tmp_path: Path) -> None:
    run = training(tmp_path / "run", "bf16 O2").train(2)
    before = run.weights()
    steps = [float(state["step"]) for state in run.optimizer.state.values()]
    next(run.model.parameters()).grad = torch.full_like(next(run.model.parameters()), float("nan"))
    optim.scale_and_step(run.optimizer, run.model, torch.ones((), device=GPU), torch.ones((), device=GPU))
    assert all(torch.equal(tensor, before[key]) for key, tensor in run.weights().items())
    assert steps == [float(state["step"]) for state in run.optimizer.state.values()]


def test_the_gpu_draws_the_numbers_of_its_step() -> None:
    def drawn(step: int) -> torch.Tensor:
        seed_everything(7, step, 1)
        return torch.rand(8, device=GPU)

    first, second = drawn(3), drawn(4)
    assert torch.equal(drawn(3), first) and not torch.equal(first, second)
    torch.manual_seed(torch.initial_seed())
    assert torch.equal(torch.rand(8, device=GPU), first)

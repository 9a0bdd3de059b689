"""Precision at work, on a CPU: loss scaling, overflow policies, 16-bit parameters with fp32 masters, fp8 conversion."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.config import resolver
from jobs.config.settings import Job
from jobs.core.errors import ImpossibleJobError, SettingError
from jobs.run import event_log
from jobs.run.rundir import RunDir
from jobs.specs.precision import MODES, Precision, nearest_that_runs, runs_on
from train import build, optim
from train.data.sources import open_data
from train.models.registry import build_model
from train.precision import fp8
from train.precision.numerics import GradientOverflow, GradScaler, OverflowPolicy, autocast_context, first_nonfinite_grad
from train.train_step import TrainStep

REPOSITORY = Path(__file__).resolve().parents[3]
TINY = {"n_layers": 1, "d_model": 64, "n_heads": 2, "d_ff": 128}


def job_of(**settings: object) -> Job:
    base = {
        "job_name": "t",
        "model": "nano",
        "model_options": TINY,
        "seq_len": 32,
        "batch_size": 8,
        "micro_batch_size": 8,
        "grad_accum_steps": 1,
        "device": "cpu",
        "precision": "fp32",
    }
    return Job(**{**base, **settings})


class Alone:
    """A runtime of one process without Accelerate: what a step needs of it."""

    def __init__(self) -> None:
        self.device, self.rank, self.world_size = torch.device("cpu"), 0, 1
        self.accelerator = self

    def no_sync(self, model: nn.Module) -> torch.no_grad:
        from contextlib import nullcontext

        return nullcontext()  # type: ignore[return-value]

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


def batch_of(job: Job, seed: int = 0) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 256, (job.batch_size, job.seq_len + 1), generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def stepper_of(job: Job, model: nn.Module | None = None) -> TrainStep:
    torch.manual_seed(0)
    model = model or build_model(job.model, vocab_size=256, seq_len=job.seq_len, overrides=job.model_options)
    if job.amp_opt_level == "O2":
        optim.use_16_bit_parameters(job, model)
    rt = Alone()
    return TrainStep(job, rt, model, model, optim.build(job, model), autocast_context(job.precision, rt.device), GradScaler.from_job(job))  # type: ignore[arg-type]


def gradients(stepper: TrainStep) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in stepper.inner.named_parameters() if p.grad is not None}


def test_accumulation_gives_the_gradient_of_the_whole_batch() -> None:
    whole, cut = job_of(grad_clip=0), job_of(grad_clip=0, micro_batch_size=2, grad_accum_steps=4)
    batch = batch_of(whole)
    pieces = [{name: tensor[i : i + 2] for name, tensor in batch.items()} for i in range(0, 8, 2)]
    first, second = stepper_of(whole), stepper_of(cut)
    a, b = first([batch]), second(pieces)
    # fp32 sums of 256 terms in another order: 1e-5 of the largest gradient is ten times what was seen.
    for name, gradient in gradients(first).items():
        torch.testing.assert_close(gradients(second)[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert float(a.loss_sum) == pytest.approx(float(b.loss_sum), rel=1e-6)
    assert float(a.norm) == pytest.approx(float(b.norm), rel=1e-5)


def test_a_ragged_window_weighs_its_targets_and_not_its_windows() -> None:
    """Six samples count fully, of two only a quarter of the targets: the same gradient whether in one window or in four."""
    job, cut = job_of(grad_clip=0), job_of(grad_clip=0, micro_batch_size=2, grad_accum_steps=4)
    batch = batch_of(job)
    batch["targets"][6:, 8:] = -100
    pieces = [{name: tensor[i : i + 2] for name, tensor in batch.items()} for i in range(0, 8, 2)]
    first, second = stepper_of(job), stepper_of(cut)
    a, b = first([batch]), second(pieces)
    assert int(a.targets) == int(b.targets) == 6 * 32 + 2 * 8
    reference = build_model("nano", vocab_size=256, seq_len=32, overrides=TINY)
    reference.load_state_dict(stepper_of(job).inner.state_dict())
    (reference(**batch) / int(a.targets)).backward()
    assert float(a.norm) == pytest.approx(float(torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])), rel=1e-4)
    assert float(a.norm) == pytest.approx(float(b.norm), rel=1e-4)


def test_clipping_sees_the_true_norm_whatever_the_loss_scale() -> None:
    job = job_of(grad_clip=0.5)
    plain, scaled = stepper_of(job), stepper_of(job)
    scaled.scale = GradScaler(scale=1024.0)
    batch = batch_of(job)
    a, b = plain([batch]), scaled([batch])
    assert float(a.norm) > 0.5
    assert float(b.norm) == pytest.approx(float(a.norm), rel=1e-6)
    for p, q in zip(plain.inner.parameters(), scaled.inner.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


class Waits(TorchDispatchMode):
    """Counts what on a GPU would wait for it: a number that is read from a tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("level", [None, "O2"])
def test_a_step_reads_nothing_back_where_the_kernels_update(monkeypatch: pytest.MonkeyPatch, level: str | None) -> None:
    """The kernel itself is a stand-in that does nothing: Triton has no GPU here. A GPU's own calls are looked at in test_gpu.py."""
    monkeypatch.setitem(sys.modules, "train.kernels.adamw", SimpleNamespace(update=lambda *tensors, **numbers: None))
    job = job_of(precision="bf16", amp_opt_level=level)
    stepper = stepper_of(job)
    batch = batch_of(job)
    with Waits() as plain:
        stepper([batch])
    stepper.optimizer.kernels = True  # type: ignore[attr-defined]
    with Waits() as waits:
        stepper([batch])
    assert plain.count > 0 == waits.count
    assert {float(state["step"]) for state in stepper.optimizer.state.values()} == {2.0}


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5))
def test_the_loss_scale_shrinks_at_each_overflow_and_grows_after_an_interval(overflows: list[bool], interval: int) -> None:
    scale = GradScaler(65536.0, 2.0, 0.5, interval)
    good = 0
    expected = 65536.0
    for overflow in overflows:
        scale.update(overflow)
        good = 0 if overflow else good + 1
        expected = expected * 0.5 if overflow else expected * 2 if good == interval else expected
        good = 0 if good == interval else good
        assert scale.scale == expected
    again = GradScaler()
    again.load(scale.state())
    assert again.state() == scale.state()


class Overflowing(nn.Module):
    """Gradients that leave the range while the loss scale is above a limit: what fp16 does, without fp16."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.inner = build_model("nano", vocab_size=256, seq_len=32, overrides=TINY)
        self.limit, self.scale = limit, GradScaler()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.inner(**batch)
        self.steps += 1
        return loss * (float("inf") if self.scale.scale > self.limit else 1.0)


def test_an_overflow_skips_the_update_and_names_the_first_bad_parameter() -> None:
    job = job_of()
    model = Overflowing(limit=100.0)
    stepper = stepper_of(job, model)
    stepper.scale = model.scale = GradScaler(scale=400.0)
    guard = OverflowPolicy(job, stepper.scale)
    before = [p.clone() for p in model.parameters()]
    skips = 0
    while (done := stepper([batch_of(job)])).overflow:
        assert first_nonfinite_grad(model) == "inner.embedding.weight"
        assert guard.record_overflow(0, first_nonfinite_grad(model))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        skips += 1
        assert model.steps == 0
    assert model.steps == 1, "a step that is tried again counts once in what the model keeps of its batches"
    assert skips == 2 and stepper.scale.scale == 100.0 and not done.overflow
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(("policy", "outcome"), [("skip", "raises"), ("abort", "raises"), ("fallback", "falls back")])
def test_an_overflow_that_does_not_end_meets_the_policy(policy: str, outcome: str) -> None:
    job = job_of(on_overflow=policy, max_overflows=3)
    guard = OverflowPolicy(job, GradScaler(scale=65536.0))
    tried = 0
    try:
        while guard.record_overflow(7, "blocks.0.mlp"):
            tried += 1
        assert outcome == "falls back"
    except GradientOverflow as err:
        assert outcome == "raises"
        assert "step 7" in str(err) and "blocks.0.mlp" in str(err)
    assert tried == (0 if policy == "abort" else 3)


def test_a_scale_below_one_ends_the_run_before_it_decays_for_ever() -> None:
    guard = OverflowPolicy(job_of(max_overflows=1000), GradScaler(scale=4.0))
    assert guard.record_overflow(1, "w") and guard.record_overflow(1, "w")
    with pytest.raises(GradientOverflow, match="not finite"):
        guard.record_overflow(1, "w")


def test_o2_keeps_fp32_masters_that_see_updates_too_small_for_16_bits() -> None:
    job = job_of(precision="bf16", amp_opt_level="O2", lr=1e-5, weight_decay=0.0)
    stepper = stepper_of(job)
    weight = stepper.inner.blocks[0].mlp.down.weight
    assert weight.dtype == torch.bfloat16 and optim.fp32_of(weight).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in stepper.inner.parameters() if p.ndim < 2)
    start, rounded = optim.fp32_of(weight).clone(), weight.clone()
    for seed in range(3):
        optim.set_lr(stepper.optimizer, 1e-7)
        stepper([batch_of(job, seed)])
    moved = (optim.fp32_of(weight) != start).float().mean()
    assert moved > 0.9, "the masters moved"
    assert (weight != rounded).float().mean() < 0.5, "most 16-bit weights could not show it yet"
    assert torch.equal(weight, optim.fp32_of(weight).bfloat16())


def test_o0_means_no_mixed_precision_and_o2_needs_16_bits(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("device: cpu\n")
    job_file = tmp_path / "job.yaml"
    job_file.write_text("seq_len: 32\n")

    def resolve(*words: str) -> Job:
        return resolver.resolve([str(job_file), *words], {}, tmp_path, lambda word: (site, "site.yaml")).job

    assert resolve("AMP_OPT_LEVEL=O0").precision is Precision.FP32
    assert resolve("AMP_OPT_LEVEL=O1").precision is Precision.BF16
    with pytest.raises(ImpossibleJobError, match="O2"):
        resolve("AMP_OPT_LEVEL=O2", "PRECISION=fp32")


class Odd(nn.Module):
    """Layers that fp8 can take, beside ones that it cannot: the odd one first, where a converter that stops would stop."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Linear(30, 64)
        self.body = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 128, bias=False)])
        self.embedding = nn.Embedding(256, 128)
        self.tied = nn.Linear(128, 256, bias=False)
        self.tied.weight = self.embedding.weight
        self.lm_head = nn.Linear(128, 256)


def test_fp8_conversion_looks_at_every_layer_and_says_why_one_stays() -> None:
    layers = {layer.name: layer.reason for layer in fp8.plan(Odd())}
    assert layers["body.0"] == layers["body.1"] == ""
    assert "multiple of 16" in layers["odd"]
    assert layers["tied"] == "tied weight"
    assert layers["lm_head"] == "output head"


class Stand_in(nn.Module):
    """In place of Transformer Engine's Linear, which needs a GPU: same attributes, product in bf16."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(old.weight))
        self.bias = nn.Parameter(torch.empty_like(old.bias)) if old.bias is not None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


def test_te_conversion_keeps_names_weights_and_ties() -> None:
    model = Odd()
    names, weights = [n for n, _ in model.named_parameters()], dict(model.named_parameters())
    converted = fp8.convert(model, job_of(precision="fp8"), make_linear=Stand_in)
    assert isinstance(model.body[0], Stand_in) and isinstance(model.odd, nn.Linear) and isinstance(model.tied, nn.Linear)
    assert sorted(n for n, _ in model.named_parameters()) == sorted(names)
    assert all(p is weights[n] for n, p in model.named_parameters()), "the optimizer would otherwise train copies"
    assert model.tied.weight is model.embedding.weight
    report = "\n".join(converted.lines())
    assert "2 of 5 linear layers" in report and "odd" in report and "tied weight" in report


class Engine:
    """In place of Transformer Engine, which needs a GPU: what a forward pass does depends on whether it is inside of the autocast, and it
    notes in which phases it was entered. tests/train/test_gpu.py has the real one."""

    def __init__(self) -> None:
        self.on, self.phases = False, []

    @contextmanager
    def autocast(self, *, enabled: bool, recipe: object) -> Iterator[None]:
        was, self.on = self.on, enabled
        try:
            yield
        finally:
            self.on = was

    @contextmanager
    def activation_recompute_forward(self, *, activation_recompute: bool, recompute_phase: bool) -> Iterator[None]:
        self.phases.append("again" if recompute_phase else "first")
        yield

    def Linear(self, width: int, to: int, *, bias: bool, params_dtype: torch.dtype) -> nn.Module:
        engine = self

        class Layer(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return nn.functional.linear(x.to(torch.float8_e4m3fn).to(x.dtype), self.weight) if engine.on else super().forward(x)

        return Layer(width, to, bias=bias, dtype=params_dtype)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        modules = {name: ModuleType(name) for name in (
            "transformer_engine", "transformer_engine.common", "transformer_engine.common.recipe",
            "transformer_engine.pytorch", "transformer_engine.pytorch.distributed",
        )}  # fmt: skip
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(modules[parent], child, module)
        vars(modules["transformer_engine.pytorch"]).update(autocast=self.autocast, Linear=self.Linear)
        vars(modules["transformer_engine.common.recipe"]).update(
            dict.fromkeys(("MMParams", "Float8CurrentScaling"), lambda **_: None), Float8BlockScaling=None, MXFP8BlockScaling=None
        )
        vars(modules["transformer_engine.pytorch.distributed"]).update(activation_recompute_forward=self.activation_recompute_forward)


@pytest.mark.parametrize("model", ["nano", "hf"])
def test_activations_are_recomputed_inside_of_the_context_of_fp8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    engine = Engine()
    engine.install(monkeypatch)
    found = []
    for recompute in (False, True):
        settings = {"precision": "fp8", "fp8_backend": "te", "grad_checkpointing": recompute, "compile": False, "amp_opt_level": None}
        if model == "hf":
            settings |= {"model": f"hf:{small_llama(tmp_path)}", "model_options": {}}
        torch.manual_seed(0)
        job = job_of(**settings)
        net, context = build.build(
            job, open_data("synthetic", seq_len=32, split="train", vocab_size=256), SimpleNamespace(device=torch.device("cpu"), world_size=1), lambda text: None
        )
        net.train()
        tokens = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0))
        with context():
            loss = net(tokens, tokens)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert engine.phases and engine.phases.count("first") == engine.phases.count("again")
    assert not engine.on and len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("takes", "engine", "said"),
    [(True, True, None), (True, False, None), (False, False, None), (False, True, "no gradient_checkpointing_kwargs"), (None, False, "has no gradient")],
)
def test_a_model_of_ones_own_is_told_how_to_recompute_where_it_can_be(takes: bool | None, engine: bool, said: str | None) -> None:
    class Own(nn.Module):
        told: dict[str, object] | None = None

    def with_words(gradient_checkpointing_kwargs: dict[str, object]) -> None:
        model.told = gradient_checkpointing_kwargs

    def without() -> None:
        model.told = {}

    model = Own()
    if takes is not None:
        model.gradient_checkpointing_enable = with_words if takes else without
    contexts = (lambda: (nullcontext(), nullcontext())) if engine else None
    with pytest.raises(SettingError, match=said) if said else nullcontext():
        build._recompute(model, job_of(model="own:make"), contexts)
    wanted = {"use_reentrant": False} | ({"context_fn": contexts} if engine else {})
    assert model.told == (None if said else wanted if takes else {})


def small_llama(folder: Path) -> Path:
    """A folder with the configuration of a model of transformers."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, attention_dropout=0.0
    ).save_pretrained(folder)
    return folder


def test_torchao_conversion_trains_with_fp8_rounding_and_unchanged_names() -> None:
    pytest.importorskip("torchao")
    job = job_of(precision="fp8", fp8_backend="torchao")
    plain, eight = stepper_of(job_of(precision="bf16")), stepper_of(job_of(precision="bf16"))
    names = [n for n, _ in eight.inner.named_parameters()]
    converted = fp8.convert(eight.inner, job, emulate=True)
    assert sum(layer.converted for layer in converted.layers) == 4
    assert [n for n, _ in eight.inner.named_parameters()] == names
    losses = [[float(stepper([batch_of(job, seed)]).loss_sum) for seed in range(5)] for stepper in (plain, eight)]
    assert losses[0] != losses[1], "fp8 rounds"
    # fp8 has 3 mantissa bits; over five steps of a tiny model the loss of 256 targets stays within 1 %.
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_fp8_is_refused_where_shapes_cannot_with_the_reason() -> None:
    with pytest.raises(ImpossibleJobError, match="multiple of 16"):
        fp8.convert(nn.Sequential(nn.Linear(30, 30)), job_of(precision="fp8"), make_linear=Stand_in)
    with pytest.raises(ImpossibleJobError, match="tokens is no multiple of 16"):
        fp8.convert(Odd(), job_of(precision="fp8", micro_batch_size=1, batch_size=1, seq_len=40), make_linear=Stand_in)
    with pytest.raises(ImpossibleJobError, match="rowwise"):
        fp8.recipe_of(job_of(precision="fp8", fp8_recipe="rowwise"))


def test_every_mode_says_where_it_runs_and_what_runs_instead() -> None:
    assert [mode.name for mode in MODES.values() if runs_on(mode, None)] == [Precision.FP32, Precision.BF16]
    assert nearest_that_runs(MODES[Precision.FP8], 80) is Precision.BF16
    assert nearest_that_runs(MODES[Precision.FP8], 75) is Precision.FP16
    assert nearest_that_runs(MODES[Precision.FP16], None) is Precision.FP32
    for mode, arch in itertools.product([mode for mode in MODES.values() if mode.name is not Precision.FP32], (None, 70, 80, 90)):
        assert runs_on(MODES[nearest_that_runs(mode, arch)], arch)


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_the_one_tf32_switch_keeps_torchs_old_and_new_settings_consistent(precision: str) -> None:
    code = (
        f"import torch; torch.set_float32_matmul_precision({precision!r}); print(torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(precision == "high"), precision], done.stderr


@pytest.mark.parametrize("words", [["PRECISION=fp16"], ["PRECISION=tf32"], ["PRECISION=fp8"]])
def test_a_gpu_precision_on_a_cpu_is_refused_with_what_works(tmp_path: Path, words: list[str]) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("holdfast"), "run", *words, f"RUNS_DIR={tmp_path}/runs"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 78
    assert "Nearest that works" in done.stdout + done.stderr


def test_a_loss_that_is_not_finite_ends_the_run_with_the_step(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("holdfast"), "run", "DEVICE=cpu", "LR=1e30", "WARMUP_PCT=0", "GRAD_CLIP=0", "MAX_STEPS=50", "LOG_EVERY=1", "SEQ_LEN=32", "BATCH_SIZE=8", f"RUNS_DIR={tmp_path}/runs", "RUN_ID=nan"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "at step" in done.stdout and "A lower LR" in done.stdout
    run = RunDir(tmp_path / "runs" / "quickstart-nan")
    assert [a.cause.value for a in event_log.attempts(event_log.read(run.ledger)) if a.cause] == ["code_error"]

"""The fused forward pass of transformers' causal language models, against transformers' own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from on_device import needs_compiler
from torch import Tensor

transformers = pytest.importorskip("transformers")

from train.models import hf_blocks, hf_equality, hf_layer  # noqa: E402
from train.models.hf import HFCausalLM  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + i / 8 for i in range(8)],
    "original_max_position_embeddings": 64,
}

# name -> model_type, fields of its config
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one kv head per head": ("llama", {"num_key_value_heads": 4}),
    "llama, head_dim of its own": ("llama", {"head_dim": 24}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn rope": ("llama", {"rope_parameters": YARN}),
    "llama, linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama without padding token": ("llama", {"pad_token_id": None}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with window": ("mistral", {"sliding_window": 8}),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen2": ("qwen2", {}),
    "qwen2 with window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    "phi3, partial rotary": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "phi3 with window": ("phi3", {"sliding_window": 8}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "granite": ("granite", {"embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22, "logits_scaling": 8.0}),
    "olmo": ("olmo", {}),
    "olmo clipped": ("olmo", {"clip_qkv": 0.02}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "seed_oss": ("seed_oss", {"head_dim": 16, "attention_bias": True, "residual_dropout": 0.0, "attention_dropout": 0.0}),
}  # fmt: skip


def built(name: str, **changes: Any) -> HFCausalLM:
    """A model of tiny shape whose weights, gains and biases are all random."""
    kind, fields = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **{**SMALL, **fields, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1 + 0.2 * torch.randn_like(p) if p.ndim == 1 and bool((p == 1).all()) else p + 0.05 * torch.randn_like(p))
    return HFCausalLM(model.float().train())


def batch(T: int = 40) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, 96, (3, T + 1), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -100
    return tokens[:, :-1], targets


def own_forward(model: HFCausalLM, tokens: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss sum and gradients by transformers' own forward pass and torch's own cross entropy."""
    model.zero_grad()
    logits = model.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    return logits.detach(), loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fused_forward(model: HFCausalLM, tokens: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(tokens=tokens, targets=targets, attention_mask=mask)
    loss.backward()
    return model.logits(tokens, mask).detach(), loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(made: tuple[Tensor, Tensor, dict[str, Tensor]], reference: tuple[Tensor, Tensor, dict[str, Tensor]], rows: Tensor | None = None) -> None:
    logits, expected = (x if rows is None else x[rows] for x in (made[0], reference[0]))
    assert float((logits - expected).norm() / expected.norm()) < 1e-5
    assert float(abs(made[1] - reference[1]) / reference[1]) < 1e-5
    assert made[2].keys() == reference[2].keys()
    largest = max(float(g.norm()) for g in reference[2].values())
    for name, gradient in reference[2].items():
        # A gradient that is zero but for rounding (bias of keys) is compared with the largest.
        assert float((made[2][name] - gradient).norm()) < 1e-5 * max(float(gradient.norm()), 1e-2 * largest), name


@pytest.mark.parametrize("name", MODELS)
def test_fused_forward_equals_transformers(name: str) -> None:
    model = built(name)
    names = list(model.state_dict())
    for T in (40, 100):  # longrope has another table beyond 64
        reference = own_forward(model, *batch(T))
        said = hf_equality.accelerate(model, seq_len=T, kernels=False)
        assert model.fused is not None, said
        assert_equal(fused_forward(model, *batch(T)), reference)
        assert list(model.state_dict()) == names and [n for n, _ in model.named_parameters()] == [n for n in names if n in dict(model.named_parameters())]
        model.fused.remove()
        model.fused = None
        assert_equal(own_forward(model, *batch(T)), reference)


def test_every_family_is_compared() -> None:
    assert {kind for kind, _ in MODELS.values()} == set(hf_blocks.FAMILIES)


@pytest.mark.parametrize("name", ["llama", "mistral with window", "qwen3", "phi3", "olmo2", "granite", "smollm3"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batch_equals_transformers(name: str, side: str) -> None:
    model = built(name)
    tokens, targets = batch()
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 7, 20)):
        where = slice(tokens.shape[1] - padding, None) if side == "right" else slice(0, padding)
        mask[row, where] = 0
        tokens[row, where], targets[row, where] = 0, -100
    reference = own_forward(model, tokens, targets, mask)
    hf_equality.accelerate(model, seq_len=40, kernels=False)
    assert model.fused is not None
    assert_equal(fused_forward(model, tokens, targets, mask), reference, rows=mask.bool())


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gemma", "mixtral"])
def test_another_family_keeps_its_own_forward(kind: str) -> None:
    small = (
        {**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "head_dim": 16, "num_local_experts": 2}
        if kind in ("gpt2", "mixtral", "gemma")
        else SMALL
    )
    torch.manual_seed(0)
    model = HFCausalLM(transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **small)).float().eval())
    reference = own_forward(model, *batch())
    said = hf_equality.accelerate(model, seq_len=40, kernels=False)
    assert model.fused is None and f"model_type '{kind}' has no fused form" in said
    assert torch.equal(model.logits(batch()[0]), reference[0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"hidden_act": "gelu"}, "hidden_act 'gelu'"), ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic")],
)
def test_unknown_feature_is_named(changes: dict[str, Any], reason: str) -> None:
    model = built("llama", **changes)
    assert reason in hf_equality.accelerate(model, seq_len=40, kernels=False)
    assert model.fused is None


@pytest.mark.parametrize("fault", ["swiglu", "rotary", "scale", "residual", "table", "padding", "raises"])
def test_planted_mismatch_keeps_the_original(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama")
    reference = own_forward(model, *batch())
    plan, table = hf_blocks.plan_of, hf_blocks.FusedDecoder._table
    ops = hf_blocks.PLAIN
    if fault == "swiglu":
        monkeypatch.setattr(hf_blocks, "PLAIN", hf_blocks.PLAIN.__class__(ops.embed, ops.add_norm, lambda packed: ops.swiglu(packed) * 1.001, ops.rotary))
    elif fault == "rotary":
        monkeypatch.setattr(hf_blocks, "PLAIN", ops.__class__(ops.embed, ops.add_norm, ops.swiglu, lambda p, c, s, h, k: ops.rotary(p, c, -s, h, k)))
    elif fault in ("scale", "residual"):
        import dataclasses

        monkeypatch.setattr(hf_blocks, "plan_of", lambda *a: dataclasses.replace(plan(*a), **{fault: getattr(plan(*a), fault) * 1.01}))
    elif fault == "table":
        monkeypatch.setattr(hf_blocks.FusedDecoder, "_table", lambda self, T, *rest: tuple(t * 1.001 for t in table(self, T, *rest)))
    elif fault == "padding":
        monkeypatch.setattr(hf_blocks.FusedDecoder, "_embed", lambda self, tokens: F.embedding(tokens, self.body.embed_tokens.weight))
    else:

        def broken(*args: Any) -> Tensor:
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(hf_layer, "_attention", broken)
    said = hf_equality.accelerate(model, seq_len=40, kernels=False)
    assert model.fused is None
    assert "no such kernel" in said if fault == "raises" else "the fused form differs by" in said, said
    assert_equal(own_forward(model, *batch()), reference)
    assert_equal(fused_forward(model, *batch()), reference)


def test_the_comparison_leaves_random_numbers_and_gradients_alone() -> None:
    model = built("llama")
    model.zero_grad()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    hf_equality.accelerate(model, seq_len=40, kernels=False)
    assert torch.equal(torch.rand(4), expected)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_dropout_is_applied_in_training_alone() -> None:
    model = built("phi3", resid_pdrop=0.5, attention_dropout=0.3)
    hf_equality.accelerate(model, seq_len=40, kernels=False)
    assert model.fused is not None
    tokens, targets = batch()
    torch.manual_seed(0)
    first = model(tokens=tokens, targets=targets)
    assert not torch.equal(first, model(tokens=tokens, targets=targets))
    model.eval()
    assert torch.equal(model(tokens=tokens, targets=targets), model(tokens=tokens, targets=targets))


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "olmo2", "smollm3"])
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    from torch.utils.checkpoint import noop_context_fn

    model = built(name)
    hf_equality.accelerate(model, seq_len=40, kernels=False)
    assert model.fused is not None
    reference = fused_forward(model, *batch())
    model.fused.recompute = noop_context_fn
    assert_equal(fused_forward(model, *batch()), reference)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_fp8_products_stay_joined(name: str) -> None:
    """torchao's rounding, emulated: the joined product has one scale for its weights, so it is near and not equal to separate ones."""
    pytest.importorskip("torchao")
    from jobs.config.settings import Job
    from train.precision.fp8 import convert

    model = built(name)
    names = list(model.state_dict())
    hf_equality.accelerate(model, seq_len=40, kernels=False)
    assert model.fused is not None
    reference = fused_forward(model, *batch())
    converted = convert(model, Job(job_name="t", precision="fp8", fp8_backend="torchao"), emulate=True)
    model.fused.join_products(converted.make)
    layer = model.fused.layers[0]
    assert "Float8" in type(layer.fused_qkv).__name__ and "Float8" in type(layer.fused_gate_up).__name__
    assert list(model.state_dict()) == names and (name == "phi3" or not list(layer.fused_qkv.parameters(recurse=False)))
    made = fused_forward(model, *batch())
    assert 0 < float((made[0] - reference[0]).norm() / reference[0].norm()) < 0.1
    assert made[2].keys() == reference[2].keys()


@needs_compiler
def test_compiled_layers_equal_transformers() -> None:
    model = built("llama")
    reference = own_forward(model, *batch())
    hf_equality.accelerate(model, seq_len=40, kernels=False)
    model.compile_regions()
    assert_equal(fused_forward(model, *batch()), reference)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3, partial rotary", "granite", "olmo", "olmo2", "smollm3", "mistral with window"])
@pytest.mark.parametrize("compiled", [False, True])
def test_kernels_equal_transformers(name: str, compiled: bool) -> None:
    """fp32 on a GPU, with the Triton kernels, each layer compiled or not."""
    torch._dynamo.reset()
    model = built(name, head_dim=32).cuda() if name == "llama" else built(name).cuda()
    tokens, targets = (x.cuda() for x in batch())
    reference = own_forward(model, tokens, targets)
    said = hf_equality.accelerate(model, seq_len=40, kernels=True)
    assert model.fused is not None, said
    if compiled:
        model.compile_regions()
    made = fused_forward(model, tokens, targets)
    assert float((made[0] - reference[0]).norm() / reference[0].norm()) < 1e-5
    for gradient_name, gradient in reference[2].items():
        assert float((made[2][gradient_name] - gradient).norm()) < 1e-4 * max(float(gradient.norm()), 1.0), gradient_name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("backend", ["te", "torchao"])
@pytest.mark.parametrize("recompute", [False, True])
def test_fp8_products_are_joined_on_a_gpu(backend: str, recompute: bool) -> None:
    """Losses and gradients near bf16's, with one product for q, k and v; compiled."""
    from jobs.config.settings import Job
    from jobs.specs.precision import Precision
    from train.precision.fp8 import convert, load_early
    from train.precision.numerics import autocast_context

    if importlib.util.find_spec("transformer_engine" if backend == "te" else "torchao") is None:
        pytest.skip(f"{backend} is not installed")
    if backend == "te":
        load_early()  # before parts of the system's cuDNN are

    torch._dynamo.reset()
    model = built("llama", head_dim=32).cuda()
    tokens, targets = (x.cuda() for x in batch())
    hf_equality.accelerate(model, seq_len=40, kernels=True)
    assert model.fused is not None
    with torch.autocast("cuda", torch.bfloat16):
        reference = fused_forward(model, tokens, targets)
    converted = convert(model, Job(job_name="t", precision="fp8", fp8_backend=backend, micro_batch_size=3, seq_len=40 * 2))
    model.fused.join_products(converted.make)
    assert type(model.fused.layers[0].fused_qkv).__name__.startswith("Joined")
    # A bias that no part has would cost a sum over all tokens.
    assert not list(model.fused.layers[0].fused_qkv.parameters(recurse=False))
    if recompute:
        from torch.utils.checkpoint import noop_context_fn

        model.fused.recompute = converted.recompute or noop_context_fn
    model.compile_regions()
    tokens, targets = tokens[:2], targets[:2]
    with autocast_context(Precision.FP8, tokens.device, converted.context)():
        made = fused_forward(model, tokens, targets)
    assert made[2].keys() == reference[2].keys() and all(bool(torch.isfinite(g).all()) for g in made[2].values())
    assert float((made[0].float() - reference[0][:2].float()).norm() / reference[0][:2].float().norm()) < 0.1


def test_ddp_and_fsdp2_give_the_gradients_of_one_process() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.support.hf_ranks"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests/support", "tests/support/models", "tests"])}
    done = subprocess.run(command, cwd=Path(__file__).parents[3], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

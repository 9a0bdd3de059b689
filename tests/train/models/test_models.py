"""The models: what their loss is, that its gradients are right, and how large they are.

Run: pytest tests/train/models/test_models.py"""

import importlib.util
import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jobs.config.settings import Job
from jobs.core.errors import SettingError
from train.models.contract import LossSum, count_targets, read_loss
from train.models.gpt import GPT, GPTConfig, rope_tables
from train.models.loss import chunked_loss_sum
from train.models.ops import rotate
from train.models.registry import PRESETS, build_model, preset_config

SMALL = GPTConfig(vocab_size=96, seq_len=32, d_model=32, n_layers=2, n_heads=4, d_ff=64)
has_transformers = importlib.util.find_spec("transformers") is not None


def small(seed: int = 0, **changes: object) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**(SMALL.__dict__ | changes)))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start: differences between ways to compute would show
            parameter.mul_(3.0) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens_of(config: GPTConfig = SMALL, batch: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    window = torch.randint(0, config.vocab_size, (batch, config.seq_len + 1), generator=generator)
    return {"tokens": window[:, :-1].contiguous(), "targets": window[:, 1:].contiguous()}


def gradients(model: nn.Module, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    read_loss(model(**batch), batch).loss_sum.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def on_meta(name: str) -> GPT:
    with torch.device("meta"):
        return GPT(PRESETS[name])


# ---- the loss


def test_loss_is_the_sum_of_token_cross_entropies() -> None:
    model, batch = small(), tokens_of()
    expected = F.cross_entropy(model.logits(batch["tokens"]).flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    loss = model(**batch)
    assert loss.dtype == torch.float32 and loss.shape == ()
    # 1e-6: one fp32 sum in two orders.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert read_loss(loss, batch).num_targets == 3 * 32


def test_a_new_model_knows_nothing() -> None:
    torch.manual_seed(0)
    model, batch = GPT(SMALL), tokens_of(batch=8)
    assert float(model(**batch).detach()) / (8 * 32) == pytest.approx(math.log(96), rel=0.02)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 32, 95, 96, 1000])
def test_chunked_loss_and_its_gradients_equal_the_unchunked_ones(chunk: int, tied: bool) -> None:
    model, batch = small(tie_embeddings=tied, loss_chunk_tokens=chunk), tokens_of()
    got = gradients(model, **batch)
    model.zero_grad()
    logits = model.logits(batch["tokens"]).flatten(0, 1)
    F.cross_entropy(logits, batch["targets"].flatten(), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        # fp32 sums over 96 tokens in another order: 1e-5 of the largest entry.
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-5, atol=1e-5 * float(parameter.grad.abs().max()))


def test_chunked_loss_passes_gradcheck_in_double_precision() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    targets, mask = torch.tensor([0, 5, -100, 2, 1]), torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0])
    chunked_loss_sum(hidden, weight, targets, mask, chunk_tokens=2).backward()
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    losses = F.cross_entropy(hidden @ weight.t(), targets, reduction="none", ignore_index=-100)
    (losses * mask).sum().backward()
    # 1e-6 although the input is double: softmax and sums are fp32 by design.
    torch.testing.assert_close(got, (hidden.grad, weight.grad), rtol=1e-6, atol=1e-6)


def test_loss_scale_goes_through_the_gradient() -> None:
    model, batch = small(), tokens_of()
    plain = gradients(model, **batch)
    model.zero_grad()
    (model(**batch) * 1024.0).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name] * 1024.0, rtol=1e-5, atol=1e-3)


def test_masked_and_ignored_targets_do_not_count() -> None:
    model, batch = small(), tokens_of()
    mask = torch.ones_like(batch["targets"])
    mask[0, 5:] = 0
    ignored = {**batch, "targets": torch.where(mask.bool(), batch["targets"], -100)}
    masked = {**batch, "loss_mask": mask}
    torch.testing.assert_close(model(**ignored), model(**masked), rtol=1e-6, atol=0)
    assert count_targets(ignored) == count_targets(masked) == 3 * 32 - 27
    nothing = {**batch, "targets": torch.full_like(batch["targets"], -100)}
    assert float(model(**nothing).detach()) == 0.0 and count_targets(nothing) == 0
    assert all(float(g.abs().max()) == 0.0 for g in gradients(model, **nothing).values())


def test_sums_of_parts_are_the_sum_of_the_whole_batch() -> None:
    """What makes the gradient independent of micro-batches and processes."""
    model, batch = small(), tokens_of(batch=4)
    whole = gradients(model, **batch)
    parts = [gradients(model, **{k: v[s] for k, v in batch.items()}) for s in (slice(0, 1), slice(1, 4))]
    for name, gradient in whole.items():
        close_to = {"rtol": 1e-5, "atol": 1e-5 * float(gradient.abs().max())}  # fp32 sums in two orders
        torch.testing.assert_close(parts[0][name] + parts[1][name], gradient, **close_to)


def test_evaluation_without_gradients_gives_the_same_loss() -> None:
    model, batch = small(loss_chunk_tokens=20), tokens_of()
    with torch.no_grad():
        plain = model(**batch)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, model(**batch).detach(), rtol=1e-6, atol=0)


def test_frozen_head_still_passes_gradients_on() -> None:
    model, batch = small(), tokens_of()
    expected = gradients(model, **batch)
    model.zero_grad()
    model.lm_head.weight.requires_grad_(False)
    model(**batch).backward()
    assert model.lm_head.weight.grad is None
    torch.testing.assert_close(model.embedding.weight.grad, expected["embedding.weight"])


def test_bf16_autocast_keeps_weights_gradients_and_loss_in_fp32() -> None:
    model, batch = small(), tokens_of()
    exact = float(model(**batch).detach())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch)
        assert model.hidden(batch["tokens"]).dtype == torch.bfloat16
        with torch.no_grad():
            evaluated = model(**batch)
    loss.backward()
    assert loss.dtype == torch.float32 and {p.grad.dtype for p in model.parameters()} == {torch.float32}
    # bf16 has 8 bits: a few 1e-3 for single values, less for a mean over 96 tokens.
    assert float(loss.detach()) == pytest.approx(exact, rel=5e-3)
    torch.testing.assert_close(evaluated, loss.detach(), rtol=1e-6, atol=0)


# ---- the network


def test_recomputing_blocks_changes_no_gradient() -> None:
    batch = tokens_of()
    plain, recomputed = gradients(small(), **batch), gradients(small(checkpoint_blocks=True), **batch)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "tie_embeddings": True}])
def test_a_later_token_changes_no_earlier_logit(changes: dict) -> None:
    model, tokens = small(**changes), tokens_of()["tokens"]
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % SMALL.vocab_size
    before, after = model.logits(tokens), model.logits(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amax(-1).min() > 1e-4


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values() -> None:
    grouped, full = small(n_kv_heads=2), small()
    state = grouped.state_dict()
    for name in [n for n in state if n.endswith("qkv.weight")]:
        q, k, v = state[name].view(8, 8, 32).split((4, 2, 2))
        state[name] = torch.cat((q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0))).reshape(96, 32)
    full.load_state_dict(state)
    tokens = tokens_of()["tokens"]
    torch.testing.assert_close(grouped.logits(tokens), full.logits(tokens), rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    cos, sin = rope_tables(64, 16, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 64, 1, 16)
    score = torch.einsum("bthc,bshc->ts", rotate(q, cos, sin), rotate(k, cos, sin))
    for distance in (0, 1, 7, 30):
        diagonal = torch.diagonal(score, -distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (score[0, 0] - score[9, 0]).abs() > 1e-2
    torch.testing.assert_close(rotate(q, cos, sin).norm(dim=-1), q.norm(dim=-1))


def test_shorter_samples_than_built_for_work_and_longer_ones_are_refused() -> None:
    model, tokens = small(), tokens_of()["tokens"]
    torch.testing.assert_close(model.logits(tokens[:, :10]), model.logits(tokens)[:, :10], rtol=1e-5, atol=1e-5)
    with pytest.raises(SettingError, match="built for seq_len 32"):
        model.logits(torch.zeros(1, 33, dtype=torch.int64))


def test_start_is_scaled_by_depth_and_drawn_from_the_seed() -> None:
    torch.manual_seed(3)
    model = GPT(PRESETS["nano"])
    assert float(model.blocks[0].mlp.gate_up.weight.detach().std()) == pytest.approx(0.06, rel=0.02)
    for weight in (model.blocks[1].mlp.down.weight, model.blocks[1].attention.out.weight):
        assert float(weight.detach().std()) == pytest.approx(0.03, rel=0.03)  # 0.06 / sqrt(2 * 2)
    torch.manual_seed(3)
    with torch.device("meta"):
        empty = GPT(PRESETS["nano"])
    empty.to_empty(device="cpu").init_weights()
    batch = tokens_of(PRESETS["nano"], batch=1)
    assert torch.equal(empty(**batch), model(**batch))


def test_the_start_is_the_same_by_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cores in ({0}, {0, 1, 2}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: cores)
        torch.manual_seed(3)
        found.append([*GPT(PRESETS["nano"]).parameters(), torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    weights = [w for w in found[0] if w.dim() == 2]
    assert len({float(w.detach().flatten()[0]) for w in weights}) == len(weights)


def test_a_checkpoint_does_not_depend_on_the_sample_length() -> None:
    model, longer = small(), small(seq_len=64)
    longer.load_state_dict(model.state_dict(), strict=True)
    tokens = tokens_of()["tokens"]
    assert torch.equal(model.logits(tokens), longer.logits(tokens))


def test_nano_learns_the_synthetic_stream() -> None:
    from train.data.sources import open_data

    torch.manual_seed(0)
    data, model = open_data("synthetic", seq_len=32, split="train", vocab_size=64), build_model("nano", seq_len=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        batch = data.batch(np.arange(step * 16, step * 16 + 16))
        loss = model(**batch) / (16 * 32)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(256), rel=0.06) and losses[-1] < 1.0


@pytest.mark.parametrize("changes", [{}, {"checkpoint_blocks": True, "tie_embeddings": True, "loss_chunk_tokens": 40}])
def test_gradients_under_ddp_are_those_of_the_bare_model(tmp_path: Path, changes: dict) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        batch, model = tokens_of(), small(**changes)
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        for _ in range(2):
            model.zero_grad()
            read_loss(wrapped(**batch), batch).loss_sum.backward()
        expected = gradients(small(**changes), **batch)
        assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("words", "mb"), [({}, 800), ({"nodes": 2}, 25), ({"bucket_cap_mb": 7}, 7), ({"model": "nano"}, 25)])
def test_gradients_go_in_a_few_large_buckets_on_one_node_and_in_small_ones_between_nodes(words: dict, mb: int) -> None:
    """1.26 billion gradients in fp32 are 4,812 MiB; the 2 of nano are less than torch's own bucket."""
    from train.distributed.parallel import ddp_options

    job = Job(**{"job_name": "t", "model": "1b", **words})
    assert ddp_options(job, on_meta(job.model))["bucket_cap_mb"] == pytest.approx(mb, abs=3)


# ---- sizes


@pytest.mark.parametrize(
    ("name", "count", "heads"),
    # 8b: the number published for Llama-3-8B.
    [("nano", 492_160, 32), ("124m", 123_587_328, 128), ("350m", 359_842_816, 128), ("1b", 1_261_529_088, 128),
     ("3b", 3_015_355_392, 128), ("8b", 8_030_261_248, 128)],
)  # fmt: skip
def test_presets_have_the_parameters_that_their_names_say(name: str, count: int, heads: int) -> None:
    assert on_meta(name).num_params() == count
    assert PRESETS[name].channels == heads
    assert all(width % 128 == 0 for width in (PRESETS[name].d_model, PRESETS[name].d_ff, PRESETS[name].vocab_size))


def test_tied_embeddings_are_one_table_and_counted_once() -> None:
    tied, untied = small(tie_embeddings=True), small()
    table = SMALL.vocab_size * SMALL.d_model
    assert untied.num_params() - tied.num_params() == table
    assert tied.num_params(non_embedding=True) == untied.num_params(non_embedding=True) == untied.num_params() - table
    assert tied.head_weight is tied.embedding.weight and "lm_head.weight" not in tied.state_dict()


def test_flops_per_token_follow_the_stated_formula() -> None:
    model = on_meta("1b")
    parts = model.flops_by_part(2048)
    assert model.flops_per_token(2048) == 6 * model.num_params(non_embedding=True) + 6 * 22 * 2048 * 2048
    # 32,768 tokens of the 1b shape: 253.3 TFLOP, of which blocks 222.3, head 12.9, attention 18.1.
    assert [round(parts[k] * 32_768 / 1e12, 1) for k in ("blocks", "head", "attention")] == [222.3, 12.9, 18.1]
    assert round(model.flops_per_token(2048) * 32_768 / 1e12, 1) == 253.3


# ---- models by name


def test_data_enlarges_a_vocabulary_but_never_shrinks_it() -> None:
    assert preset_config("nano", vocab_size=256).vocab_size == 256
    assert preset_config("nano", vocab_size=50_257).vocab_size == 50_304
    assert preset_config("1b", vocab_size=256, seq_len=512).vocab_size == 32_000
    assert preset_config("nano", vocab_size=300, overrides={"vocab_size": 300}).vocab_size == 300
    with pytest.raises(SettingError, match="below the 256 of the data"):
        preset_config("nano", vocab_size=256, overrides={"vocab_size": 128})


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("nanu", {}, "Did you mean 'nano'"),
        ("nano", {"n_layer": 3}, "Did you mean 'n_layers'"),
        ("nano", {"n_kv_heads": 3}, "multiple of n_kv_heads 3"),
        ("nano", {"n_heads": 3}, "d_model 128 must be a multiple of n_heads 3"),
        ("nano", {"d_ff": 0}, "d_ff 0 is not allowed"),
        ("convnet", {"widht": 3}, "Did you mean 'width'"),  # codespell:ignore widht
        ("hf:", {}, "choose one of nano"),
        ("no_such_module:build", {}, "cannot be found"),
    ],
)
def test_a_wrong_model_is_answered_with_what_is_allowed(spec: str, options: dict, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        build_model(spec, vocab_size=None, seq_len=32, overrides=options)


def test_options_reach_the_model() -> None:
    model = build_model("nano", seq_len=64, overrides={"n_layers": 1, "checkpoint_blocks": True})
    assert len(model.blocks) == 1 and model.config.checkpoint_blocks and model.config.seq_len == 64


def test_a_small_convnet_learns_and_counts_images() -> None:
    torch.manual_seed(0)
    model = build_model("convnet", vocab_size=4, overrides={"width": 8})
    images, targets = torch.randn(32, 1, 8, 8), torch.arange(32) % 4
    images += targets.view(-1, 1, 1, 1).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch, losses = {"images": images, "targets": targets}, []
    for _ in range(20):
        loss = model(**batch)
        (loss / 32).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2 and count_targets(batch) == 32
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


class Own(nn.Module):
    def __init__(self, returns: str) -> None:
        super().__init__()
        self.table, self.returns = nn.Parameter(torch.full((8,), 2.0)), returns

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> object:
        mean = self.table[tokens].mean()
        return {
            "mean": mean, "mapping": {"loss": mean}, "count": {"loss": mean, "n_tokens": 5},
            "object": types.SimpleNamespace(loss=mean), "vector": self.table, "nothing": {"logits": mean},
        }[self.returns]  # fmt: skip


def test_own_models_may_return_a_mean_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_models")
    module.build = lambda vocab_size, returns="mean": Own(returns)
    module.number = lambda **_: 3
    monkeypatch.setitem(sys.modules, "my_models", module)
    batch = {"tokens": torch.zeros(2, 6, dtype=torch.int64), "targets": torch.tensor([[1, 1, 1, 1, 1, -100]] * 2)}
    for returns, count in (("mean", 10), ("mapping", 10), ("object", 10), ("count", 5)):
        model = build_model("my_models:build", vocab_size=8, seq_len=6, overrides={"returns": returns})
        loss = read_loss(model(**batch), batch)
        assert isinstance(loss, LossSum)
        assert int(loss.num_targets) == count and float(loss.loss_sum.detach()) == 2.0 * count
    for returns, said in (("vector", r"a tensor of shape \(8,\)"), ("nothing", "a mapping with logits")):
        model = build_model("my_models:build", vocab_size=8, seq_len=6, overrides={"returns": returns})
        with pytest.raises(SettingError, match=said):
            model(**batch)
    with pytest.raises(SettingError, match="Did you mean 'returns'"):
        build_model("my_models:build", vocab_size=8, seq_len=6, overrides={"return": 1})
    with pytest.raises(SettingError, match="returned a int"):
        build_model("my_models:number", vocab_size=8, seq_len=6)


def test_an_own_model_that_keeps_the_contract_is_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_models")
    own = small()
    own.returns_loss_sum = True
    module.build = lambda: own
    monkeypatch.setitem(sys.modules, "my_models", module)
    assert build_model("my_models:build", vocab_size=8, seq_len=6) is own


# ---- transformers


def llama_state(model: GPT) -> dict[str, torch.Tensor]:
    """Our weights under the names of transformers' Llama."""
    c, state = model.config, {}
    for i, block in enumerate(model.blocks):
        at = f"model.layers.{i}."
        heads = (c.n_heads * c.channels, c.kv_heads * c.channels, c.kv_heads * c.channels)
        for name, part in zip("qkv", block.attention.qkv.weight.split(heads), strict=True):
            state[f"{at}self_attn.{name}_proj.weight"] = part
        state[f"{at}self_attn.o_proj.weight"] = block.attention.out.weight
        gate, up = block.mlp.gate_up.weight.chunk(2)
        state |= {f"{at}mlp.gate_proj.weight": gate, f"{at}mlp.up_proj.weight": up}
        state[f"{at}mlp.down_proj.weight"] = block.mlp.down.weight
        state[f"{at}input_layernorm.weight"] = block.attention_norm.weight
        state[f"{at}post_attention_layernorm.weight"] = block.mlp_norm.weight
    head = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    return state | head | {"lm_head.weight": model.lm_head.weight}


@pytest.mark.skipif(not has_transformers, reason="needs transformers (group hf)")
def test_the_same_weights_give_the_same_logits_as_llama_in_transformers(tmp_path: Path) -> None:
    import transformers

    ours = small(n_kv_heads=2)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    theirs = build_model(f"hf:{tmp_path}", vocab_size=96, seq_len=32)
    assert theirs._body_and_head == ("model", "lm_head")
    theirs.model.load_state_dict(llama_state(ours))
    batch = tokens_of()
    torch.testing.assert_close(theirs.logits(batch["tokens"]), ours.logits(batch["tokens"]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs(**batch), ours(**batch), rtol=1e-5, atol=0)
    theirs.model.save_pretrained(tmp_path / "saved")
    loaded = build_model(f"hf:{tmp_path / 'saved'}", vocab_size=96, seq_len=32)
    assert torch.equal(loaded(**batch), theirs(**batch))
    with pytest.raises(SettingError, match="vocab_size is 96, this job needs 256"):
        build_model(f"hf:{tmp_path}", vocab_size=256, seq_len=32)
    with pytest.raises(SettingError, match="Did you mean 'hidden_size'"):
        build_model(f"hf:{tmp_path}", vocab_size=96, seq_len=32, overrides={"hiden_size": 2})


@pytest.mark.skipif(not has_transformers, reason="needs transformers (group hf)")
def test_transformers_models_with_changed_logits_tied_heads_and_classes(tmp_path: Path) -> None:
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    scaled = transformers.GraniteConfig(**shape, vocab_size=96, num_key_value_heads=4, logits_scaling=7.0)
    gpt2 = transformers.GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=1, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    bert = transformers.BertConfig(**shape, vocab_size=96, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    kinds = (
        (scaled, "GraniteForCausalLM", None),
        (gpt2, "GPT2LMHeadModel", ("transformer", "lm_head")),
        (bert, "BertForSequenceClassification", "classes"),
    )
    for config, architecture, expected in kinds:
        config.architectures = [architecture]
        config.save_pretrained(tmp_path / architecture)
        torch.manual_seed(0)
        model = build_model(f"hf:{tmp_path / architecture / 'config.json'}", vocab_size=96, seq_len=32)
        batch = tokens_of()
        if expected == "classes":
            batch["targets"], batch["attention_mask"] = torch.tensor([0, 2, -100]), torch.ones(3, 32, dtype=torch.int64)
            expected_loss = F.cross_entropy(model.logits(batch["tokens"]), batch["targets"], reduction="sum")
            assert count_targets(batch) == 2
        else:
            assert model._body_and_head == expected
            logits = model.logits(batch["tokens"]).flatten(0, 1)
            expected_loss = F.cross_entropy(logits, batch["targets"].flatten(), reduction="sum")
        torch.testing.assert_close(model(**batch), expected_loss, rtol=1e-5, atol=0)
        gradients(model, **batch)
    with pytest.raises(SettingError, match="models are not fetched"):
        build_model("hf:someone/some-model", vocab_size=96, seq_len=32)


# ---- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("way", ["whole", "regions", "regions with recomputed blocks"])
def test_compiled_model_gives_the_same_loss_and_gradients(way: str) -> None:
    torch._dynamo.reset()
    batch = tokens_of()
    expected = gradients(small(n_kv_heads=2), **batch)
    model = small(n_kv_heads=2, loss_chunk_tokens=48, checkpoint_blocks="recomputed" in way)
    if way == "whole":
        model.compile(dynamic=False, fullgraph=True)
    else:
        model.compile_regions()
    got = gradients(model, **batch)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    torch.testing.assert_close(model(**batch), small(n_kv_heads=2)(**batch), rtol=1e-5, atol=0)


def test_blocks_stay_whole_under_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    """With buckets smaller than a block, as in the real models, where torch by itself cuts each block in pieces."""
    import torch.distributed as dist
    from torch._dynamo import config as dynamo
    from torch.nn.parallel import DistributedDataParallel

    def graphs(wrap: bool) -> int:
        found: list[object] = []
        torch._dynamo.reset()
        monkeypatch.setattr(dynamo, "optimize_ddp", True)
        model = small(n_layers=3)
        model.compile_regions(backend=lambda graph, inputs: found.append(graph) or graph.forward)
        forward = DistributedDataParallel(model, bucket_cap_mb=0.01) if wrap else model  # type: ignore[arg-type]
        forward(**tokens_of()).sum().backward()
        return len(found)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert graphs(wrap=True) == graphs(wrap=False) > 0
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()


def test_a_model_for_a_checkpoint_draws_no_weights_and_has_its_tables() -> None:
    from types import SimpleNamespace

    from train.build import build

    job = Job(job_name="t", model="nano", seq_len=16, precision="fp32", device="cpu")
    data, rt = SimpleNamespace(vocab_size=256), SimpleNamespace(device=torch.device("cpu"), world=1)
    torch.manual_seed(0)
    drawn, _ = build(job, data, rt, lambda text: None)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    empty, _ = build(job, data, rt, lambda text: None, drawn=False)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state) and not any(p.is_meta for p in (*empty.parameters(), *empty.buffers()))
    empty.load_state_dict(drawn.state_dict())
    tokens = torch.randint(0, 256, (2, 16))
    assert torch.equal(empty(tokens, tokens), drawn(tokens, tokens))

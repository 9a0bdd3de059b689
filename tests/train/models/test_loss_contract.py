"""Gradients of models that users bring: equal to plain torch on the whole batch, however it is cut, or refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ragged_models
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from ragged_models import Ragged
from training import Farm, events, farm, logs  # noqa: F401

from jobs.checkpoint import directory
from jobs.core.contract import Exit
from jobs.core.errors import SettingError
from jobs.run.rundir import RunDir
from train.data.order import sample_ids
from train.models.contract import MeanLossModel, find_count_rule, read_loss
from train.models.hf import build_hf
from train.rng import seed_everything

pytestmark = pytest.mark.trains

OWN = {"MODEL": "ragged_models:mean", "MODEL_OPTIONS": "{}", "DATA": "ragged_models:ragged", "PRECISION": "fp32", "SEQ_LEN": "40", "BATCH_SIZE": "16",
       "MAX_STEPS": "3", "LR": "1e-2", "WEIGHT_DECAY": "0", "GRAD_CLIP": "0", "LR_SCHEDULER": "constant", "WARMUP_STEPS": "0", "LOG_EVERY": "1",
       "EVAL_EVERY": "0", "EVAL_SAMPLES": "4", "CHECKPOINT_EVERY": "100", "GPUS_PER_NODE": "1", "SEED": "7"}  # fmt: skip


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in run.metrics.read_text().splitlines()]


def error_of(run: RunDir) -> str:
    return "".join(path.read_text(errors="replace") for path in [*run.logs.glob("*.out"), *run.path.rglob("error*")] if path.is_file())


def run_log(run: RunDir, rank: int) -> str:
    return "".join(path.read_text() for path in run.logs.glob(f"*.{rank}.out"))


def plain_torch(model: str, names: str = "targets", empty: int = 0) -> tuple[float, float, int]:
    """Loss, gradient norm and number of targets of the first step: the whole batch in one piece, without any code of the trainer."""
    seed_everything(7, step=0)
    module = getattr(ragged_models, model)()
    ids = np.asarray(sample_ids(0, 16, 64, 7))
    batch = Ragged("train", names, empty).batch(ids)
    output = module(**batch)
    loss = output["loss"] if isinstance(output, dict) else output
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
    counted = batch["targets"] if names == "targets" else batch["labels"][:, 1:]
    return float(loss.detach()), float(norm), int((counted != -100).sum())


CUTS = {
    "one process": {},
    "accumulation": {"GRAD_ACCUM_STEPS": "16"},
    "two ranks": {"GPUS_PER_NODE": "2"},
    "two ranks, sharded, accumulation": {"GPUS_PER_NODE": "2", "PARALLEL": "fsdp", "GRAD_ACCUM_STEPS": "2"},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("model", "names", "empty"),
    [("mean", "targets", 0), ("shifted", "labels", 0), ("weighted_with_count", "targets", 0), ("divided_by_mask", "targets", 16)],
    ids=["mean of targets", "labels shifted inside", "own denominator", "empty micro-batch"],
)
def test_first_gradient_equals_plain_torch_however_the_batch_is_cut(farm: Farm, cut: str, model: str, names: str, empty: int) -> None:  # noqa: F811
    loss, norm, targets = plain_torch(model, names, empty)
    run = farm.finished(**{**OWN, "MODEL": f"ragged_models:{model}", "DATA_OPTIONS": f"names={names},empty={empty}", **CUTS[cut]})
    first = lines(run)[0]
    assert first["loss"] == pytest.approx(loss, rel=1e-6) and first["grad_norm"] == pytest.approx(norm, rel=2e-6)
    assert model == "weighted_with_count" or first["tokens"] == targets


def test_ranks_hold_the_same_weights_after_ragged_steps(farm: Farm) -> None:  # noqa: F811
    settings = {**OWN, "MODEL": "ragged_models:reporting"}
    one = farm.finished(**settings)
    two = farm.finished(**{**settings, "GPUS_PER_NODE": "2"})
    assert [line["loss"] for line in lines(two)] == pytest.approx([line["loss"] for line in lines(one)], rel=1e-6)
    assert [line["grad_norm"] for line in lines(two)] == pytest.approx([line["grad_norm"] for line in lines(one)], rel=1e-5)
    ranks = [[line for line in run_log(two, rank).splitlines() if line.startswith("weights ")] for rank in range(2)]
    assert len(ranks[0]) > 3 and len(set(ranks[0])) > 2 and ranks[0] == ranks[1]


@pytest.mark.parametrize("model", ["weighted", "own_ignore_index"])
def test_a_mean_with_an_unknown_denominator_is_refused_when_the_batch_is_cut(farm: Farm, model: str) -> None:  # noqa: F811
    run = farm.prepare(**{**OWN, "MODEL": f"ragged_models:{model}", "GRAD_ACCUM_STEPS": "4"})
    assert farm.train(run) != Exit.DONE
    said = error_of(run)
    assert "n_tokens" in said and "denominator" in said, logs(run)
    assert not run.metrics.exists() or not lines(run), "nothing was trained"
    farm.finished(**{**OWN, "MODEL": f"ragged_models:{model}", "MAX_STEPS": "1"})  # in one piece there is nothing to know
    farm.finished(**{**OWN, "MODEL": f"ragged_models:{model}", "MAX_STEPS": "1", "GRAD_ACCUM_STEPS": "4", "CHECK_MODEL": "off"})


def test_the_count_rule_is_found_by_measurement() -> None:
    batch = Ragged("train", "labels", 0).batch(np.arange(8))
    rules = {
        name: find_count_rule(MeanLossModel(model), b, tolerance=1e-5)
        for name, model, b in (
            ("shifted", ragged_models.shifted(), batch),
            ("targets", ragged_models.mean(), Ragged("train", "targets", 0).batch(np.arange(8))),
            ("given", ragged_models.weighted_with_count(), Ragged("train", "targets", 0).batch(np.arange(8))),
        )
    }
    assert rules == {"shifted": "labels that are not -100, shifted by one", "targets": "targets that are not -100", "given": None}
    with pytest.raises(SettingError, match="n_tokens"):
        find_count_rule(MeanLossModel(ragged_models.weighted()), Ragged("train", "targets", 0).batch(np.arange(8)), tolerance=1e-5)


def test_class_weights_are_found_in_sorted_data_and_small_denominators_are_exact(farm: Farm) -> None:  # noqa: F811
    sorted_data = {"DATA": "ragged_models:points", "DATA_OPTIONS": "in_order=1", "MAX_STEPS": "1"}
    run = farm.prepare(**{**OWN, **sorted_data, "MODEL": "ragged_models:weighted_classifier", "GRAD_ACCUM_STEPS": "16", "MAX_CODE_ERROR": "0"})
    assert farm.train(run) != Exit.DONE and "denominator" in error_of(run), logs(run)
    small = {**OWN, **sorted_data, "MODEL": "ragged_models:weighted_classifier", "MODEL_OPTIONS": "counted=true,scale=0.001"}
    runs = [farm.finished(**{**small, "GRAD_ACCUM_STEPS": cut}) for cut in ("1", "4")]
    first, second = (lines(run)[0] for run in runs)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6) and first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-6)
    assert 0.05 < first["loss"] < 5


def test_an_infinite_loss_with_a_finite_gradient_ends_the_run_whatever_log_every_is(farm: Farm) -> None:  # noqa: F811
    for every in ("1", "10"):
        run = farm.prepare(**{**POINTS, "MODEL": "ragged_models:infinite_at_some_step", "LOG_EVERY": every, "MAX_CODE_ERROR": "0", "DATA_OPTIONS": "bad=1"})
        assert farm.train(run) != Exit.DONE
        assert "the loss is not finite" in error_of(run), logs(run)


POINTS = {**OWN, "MODEL": "ragged_models:classifier", "DATA": "ragged_models:points", "MAX_STEPS": "24", "CHECKPOINT_EVERY": "8"}


@pytest.mark.parametrize("world", ["1", "2"])
def test_one_bad_sample_ends_the_run_whatever_log_every_is(farm: Farm, world: str) -> None:  # noqa: F811
    found = []
    for every in ("1", "10"):
        run = farm.prepare(**{**POINTS, "DATA_OPTIONS": "bad=1", "LOG_EVERY": every, "GPUS_PER_NODE": world, "MAX_CODE_ERROR": "0"})
        code = farm.train(run)
        said = error_of(run)
        at = said.partition("at step ")[2].partition(" ")[0]
        assert code != Exit.DONE and "net.0.weight" in said and "not finite" in said, logs(run)
        assert all(line["step"] < int(at) for line in lines(run))
        for path in directory.complete(run.checkpoints):
            assert int(path.name.removeprefix("step-")) < int(at), "no checkpoint holds what the bad step left"
        found.append((code, at))
    assert found[0] == found[1]


def test_a_step_without_any_target_is_an_error(farm: Farm) -> None:  # noqa: F811
    run = farm.prepare(**{**OWN, "DATA_OPTIONS": "empty=1", "LOG_EVERY": "2", "MAX_CODE_ERROR": "0"})
    assert farm.train(run) != Exit.DONE
    assert "at step 1 no sample of the batch has a target" in error_of(run)


def test_validation_without_any_target_is_unknown_and_never_the_best(farm: Farm) -> None:  # noqa: F811
    run = farm.finished(**{**OWN, "DATA_OPTIONS": "val_empty=1", "EVAL_EVERY": "1", "CHECKPOINT_EVERY": "1", "KEEP_BEST": "1"})
    assert [line["val_loss"] for line in lines(run)] == [None] * 3
    for path in directory.complete(run.checkpoints):
        manifest = json.loads((path / "manifest.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        assert manifest["state"]["val_loss"] is None and directory.val_loss_of(path) is None
    for command in (["status", "--json", str(run.path)], ["report", str(run.path)], ["diff", str(run.path), str(run.path)]):
        done = subprocess.run([sys.executable, "-m", "launcher.cli.app", *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr


def test_a_model_built_in_16_bits_learns_in_fp32(farm: Farm) -> None:  # noqa: F811
    same = {**POINTS, "LR": "1e-5", "MAX_STEPS": "4"}
    run = farm.finished(**{**same, "MODEL_OPTIONS": "dtype=bfloat16"})
    from safetensors.torch import load_file

    newest = directory.complete(run.checkpoints)[-1]
    weights = {name: tensor for path in newest.glob("*.safetensors") for name, tensor in load_file(path).items()}
    kept = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point() and tensor.ndim}
    assert kept and all(tensor.dtype == torch.float32 for tensor in kept.values())
    seed_everything(7, step=0)
    start = ragged_models.classifier("bfloat16")
    name = next(name for name in weights if name.endswith("net.0.weight") and weights[name].shape == (16, 8))
    moved = (weights[name] != dict(start.named_parameters())["net.0.weight"].float()).float().mean()
    assert moved > 0.9


# -- transformers ------------------------------------------------------------------------------------------------------


def saved_config(folder: Path, config: Any, **changes: Any) -> Path:
    config.save_pretrained(folder)
    if changes:
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({name: value for name, value in {**known, **changes}.items() if value is not None}))
    return folder


def test_auxiliary_losses_of_a_model_are_trained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                                        num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5, architectures=["MixtralForCausalLM"])  # fmt: skip
    torch.manual_seed(0)
    model = build_hf(str(saved_config(tmp_path / "mixtral", config)), vocab_size=64, seq_len=16, overrides={})
    ids = torch.randint(0, 64, (4, 17))
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    total = read_loss(model(**batch), batch)
    ours = total.loss_sum / total.num_targets
    ours.backward()
    mine = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    model.zero_grad()
    output = model.model(input_ids=batch["tokens"], output_router_logits=True)
    theirs = F.cross_entropy(output.logits.flatten(0, 1), batch["targets"].flatten()) + 0.5 * output.aux_loss
    theirs.backward()
    assert float(output.aux_loss) > 0.5 and float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    assert float(mine) == pytest.approx(float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()), rel=1e-5)


@pytest.mark.parametrize("family", ["Bert", "XLMRoberta", "Electra"])
@pytest.mark.parametrize("architectures", [None, "LMHeadModel"])
def test_an_encoder_is_not_trained_as_a_next_token_model(tmp_path: Path, family: str, architectures: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}
    config = getattr(transformers, f"{family}Config")(**shape)
    named = [f"{family}LMHeadModel" if family == "Bert" else f"{family}ForCausalLM"] if architectures else None
    folder = saved_config(tmp_path / family, config, architectures=named)
    with pytest.raises(SettingError, match="later tokens.*ForSequenceClassification"):
        build_hf(str(folder), vocab_size=64, seq_len=16, overrides={})
    build_hf(str(folder), vocab_size=64, seq_len=16, overrides={"is_decoder": True})


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.gguf", "tf_model.h5"])
def test_weights_in_another_format_are_refused_with_how_to_convert(tmp_path: Path, file: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    folder = saved_config(tmp_path / "llama", config)
    build_hf(str(folder), vocab_size=64, seq_len=16, overrides={})
    (folder / file).write_bytes(b"x")
    with pytest.raises(SettingError, match=f"{file}.*safe_serialization"):
        build_hf(str(folder), vocab_size=64, seq_len=16, overrides={})


def test_weights_that_lack_tensors_are_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    build_hf(str(tmp_path), vocab_size=64, seq_len=16, overrides={})
    weights = load_file(tmp_path / "model.safetensors")
    for changed in ({f"module.{name}": tensor for name, tensor in weights.items()}, dict(list(weights.items())[1:])):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SettingError, match="lack"):
            build_hf(str(tmp_path), vocab_size=64, seq_len=16, overrides={})


def test_a_decoder_whose_labels_are_not_shifted_is_taken(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                                     encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40, architectures=["BartForCausalLM"])  # fmt: skip
    model = build_hf(str(saved_config(tmp_path, config)), vocab_size=64, seq_len=16, overrides={"is_decoder": True, "is_encoder_decoder": False})
    ids = torch.randint(0, 64, (2, 9))
    assert model.training and not model.own_loss
    model.eval()
    ours = model(tokens=ids[:, :-1], targets=ids[:, 1:])
    plain = F.cross_entropy(model.model(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert float(ours.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)


def test_a_folder_with_an_adapter_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    folder = saved_config(tmp_path / "llama", config)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(SettingError, match="adapter.*merge"):
        build_hf(str(folder), vocab_size=64, seq_len=16, overrides={})

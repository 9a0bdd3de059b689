"""Every kind of model keeps the promise: two ranks, killed in the middle, end with the bits of a run that nobody killed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from own_models import counted
from training import Farm, at_step, events, farm, logs, result

from jobs.config.resolver import load
from jobs.core.contract import Exit
from jobs.run.rundir import RunDir
from train.data.order import sample_ids

__all__ = ["farm"]
pytestmark = pytest.mark.timeout(900)

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 256, "n_positions": 64}
BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "num_labels": 2,
}


def kinds(folder: Path) -> dict[str, dict[str, str]]:
    for name, config in (("llama", LLAMA), ("gpt2", GPT2), ("bert", BERT)):
        (folder / f"{name}.json").write_text(json.dumps(config))
    return {
        "built-in": {},
        "transformers llama": {"MODEL": f"hf:{folder}/llama.json", "MODEL_OPTIONS": "{}"},
        "transformers gpt2, tied and with dropout": {"MODEL": f"hf:{folder}/gpt2.json", "MODEL_OPTIONS": "{}"},
        "transformers bert classifier": {"MODEL": f"hf:{folder}/bert.json", "MODEL_OPTIONS": "{}", "DATA": "own_models:sentences"},
        "convnet with BatchNorm on digits": {"MODEL": "convnet", "MODEL_OPTIONS": "{}", "DATA": "digits"},
        "a model that reads its own running mean": {"MODEL": "own_models:normalised", "MODEL_OPTIONS": "{}", "DATA": "own_models:numbers"},
        "a module with complex numbers": {"MODEL": "own_models:turned", "MODEL_OPTIONS": "{}", "DATA": "own_models:numbers"},
        "a module and data of one's own": {"MODEL": "own_models:regression", "MODEL_OPTIONS": "{}", "DATA": "own_models:numbers"},
    }


def assert_a_kill_changes_nothing(farm: Farm, settings: dict[str, str]) -> None:
    straight = farm.finished(**settings)
    run = farm.prepare(**settings)

    def kill(farm: Farm, run: RunDir) -> None:
        if at_step(run, 9):
            farm.kill_all()

    assert farm.train(run, kill) == Exit.DONE, logs(run)
    assert len(events(run, "end")) == 2, logs(run)
    assert result(run) == result(straight), logs(run)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        pytest.param("built-in", "bf16", marks=pytest.mark.slow),
        ("transformers llama", "fp32"),
        pytest.param("transformers gpt2, tied and with dropout", "bf16", marks=pytest.mark.slow),
        pytest.param("transformers bert classifier", "bf16", marks=pytest.mark.slow),
        ("convnet with BatchNorm on digits", "fp32"),
        ("a module and data of one's own", "bf16"),
        ("a model that reads its own running mean", "fp32"),
        ("a module with complex numbers", "fp32"),
    ],
)
def test_a_killed_run_of_any_kind_of_model_ends_with_identical_bits(farm: Farm, tmp_path: Path, kind: str, precision: str) -> None:
    if "transformers" in kind:
        pytest.importorskip("transformers")
    if "digits" in kind:
        pytest.importorskip("sklearn")
    settings = {**kinds(tmp_path)[kind], "PRECISION": precision, "MAX_STEPS": "24", "EVAL_EVERY": "12", "CHECKPOINT_EVERY": "6", "GRAD_ACCUM_STEPS": "2"}
    assert_a_kill_changes_nothing(farm, settings)


def test_a_model_that_no_checkpoint_can_hold_is_refused_at_the_start_and_not_at_the_first_save(farm: Farm) -> None:
    run = farm.prepare(MODEL="own_models:turned", MODEL_OPTIONS="kind=complex128", DATA="own_models:numbers", PRECISION="fp32")
    assert farm.train(run) == Exit.USAGE
    [end] = events(run, "end")
    assert end["cause"] == "code_error" and "no checkpoint can hold: model.freqs_cis (complex128). Change the type" in end["evidence"], logs(run)
    assert "first_step" not in end["parts"]


@pytest.mark.parametrize("words", [{"AMP_OPT_LEVEL": "O2", "PRECISION": "bf16"}, {"GRAD_CHECKPOINTING": "true"}, {"PARALLEL": "fsdp"}])
def test_a_killed_run_in_any_way_of_training_ends_with_identical_bits(farm: Farm, words: dict[str, str]) -> None:
    settings = {"PRECISION": "fp32", "MAX_STEPS": "24", "EVAL_EVERY": "12", "CHECKPOINT_EVERY": "6", **words}
    assert_a_kill_changes_nothing(farm, settings)


@pytest.mark.parametrize("model", ["own_models:mean", "nano"])
def test_batches_in_which_few_targets_or_none_count_train_and_are_counted_exactly(farm: Farm, model: str) -> None:
    """Also through a kill, by micro-batches of one sample, and where a line of metrics comes every few steps only."""
    options = {"MODEL_OPTIONS": "{}"} if model.startswith("own") else {}
    settings = {"MODEL": model, **options, "DATA": "own_models:masked", "PRECISION": "fp32", "BATCH_SIZE": "8", "MICRO_BATCH_SIZE": "1", "MAX_STEPS": "24",
                "EVAL_EVERY": "12", "EVAL_SAMPLES": "8", "LOG_EVERY": "5", "CHECKPOINT_EVERY": "6"}  # fmt: skip
    run = farm.prepare(**settings)

    def kill(farm: Farm, run: RunDir) -> None:
        if at_step(run, 9):
            farm.kill_all()

    assert farm.train(run, kill) == Exit.DONE, logs(run)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    ids = [sample_ids(step, 8, 500, load(run.job_yaml).seed) for step in range(24)]
    # Some of these micro-batches have no target at all, and no step is without any: that would be an error.
    assert any((counted(step) == 0).any() for step in ids) and all(counted(step).sum() for step in ids)
    assert {line["step"]: line["tokens"] for line in lines} == {line["step"]: int(counted(np.concatenate(ids[: line["step"]])).sum()) for line in lines}
    assert all(math.isfinite(line["loss"]) and math.isfinite(line.get("val_loss", 0)) for line in lines)


def test_a_new_run_takes_the_weights_of_another_and_nothing_else(farm: Farm) -> None:
    first = farm.finished(PRECISION="fp32", MAX_STEPS="20", EVAL_EVERY="20")
    second = farm.finished(PRECISION="bf16", MAX_STEPS="2", EVAL_EVERY="2", LR="1e-9", INIT_FROM=str(first.path))
    before, after = (json.loads(run.metrics.read_text().splitlines()[-1]) for run in (first, second))
    # The same weights in bf16: 8 bits of mantissa, and an evaluation after two steps of no length.
    assert after["step"] == 2 and after["val_loss"] == pytest.approx(before["val_loss"], rel=1e-2)
    assert [event["step"] for event in events(second, "resumed")] == [0]

"""`holdfast verify autocast`: models of many families train in every precision of this machine; a planted fault is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.precision.check import examine

REPOSITORY = Path(__file__).resolve().parents[3]
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 160}
# model_type -> architecture, and how this family's sizes are called.
FAMILIES = {
    "bert": ("BertForSequenceClassification", SMALL),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", SMALL),
    "electra": ("ElectraForSequenceClassification", {**SMALL, "embedding_size": 64}),
    "deberta-v2": ("DebertaV2ForSequenceClassification", {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}),
    "longformer": ("LongformerForSequenceClassification", {**SMALL, "attention_window": 16}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 256, "n_positions": 160, "tie_word_embeddings": True}),
    "llama": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 1}),
}


def precisions_here() -> list[str]:
    return ["fp32", "bf16"] if not torch.cuda.is_available() else ["fp32", "tf32", "bf16", "fp16", "fp8"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_transformers_trains_in_every_precision(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    architecture, sizes = FAMILIES[family]
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {"model_type": family, "architectures": [architecture], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3, **sizes}
        )
    )
    findings = examine(f"hf:{config}", seq_len=64)
    assert [finding.precision for finding in findings][: len(precisions_here())] == precisions_here()
    assert all(finding.passed for finding in findings), findings


@pytest.mark.parametrize(("spec", "options"), [("nano", {}), ("nano", {"tie_embeddings": True}), ("convnet", {})])
def test_the_built_in_models_train_in_every_precision(spec: str, options: dict[str, object]) -> None:
    findings = examine(spec, options=options)
    assert all(finding.passed for finding in findings), findings


def test_a_planted_overflow_is_caught_and_its_module_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tests/support/models"))
    findings = examine("overflowing:build")
    assert not any(finding.passed for finding in findings)
    assert all("body.2 (Explode)" in finding.culprit for finding in findings), findings


def test_the_command_prints_a_table_and_its_exit_code_says_how_it_went() -> None:
    holdfast = Path(sys.executable).with_name("holdfast")
    good = subprocess.run([holdfast, "verify", "autocast", "nano", "DEVICE=cpu"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert good.returncode == 0, good.stderr
    assert "gradient cosine" in good.stdout and "reference" in good.stdout
    bad = subprocess.run(
        [holdfast, "verify", "autocast", "tests.support.models.overflowing:build", "--json"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert bad.returncode == 1, bad.stdout + bad.stderr
    assert "Explode" in json.loads(bad.stdout)["findings"][0]["culprit"]
    command = [sys.executable, "-m", "launcher.cli.app", "verify", "autocast", "nanoo"]
    wrong = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and "Did you mean 'nano'?" in wrong.stderr and wrong.stderr.count("\n") == 1, wrong.stderr


def test_a_model_of_ones_own_is_found_beside_a_script_of_ones_own_called_train(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('this is the script of a person')\n")
    (tmp_path / "mine.py").write_text((REPOSITORY / "tests" / "support" / "models" / "overflowing.py").read_text())
    start = "from launcher.cli.app import run_app; import sys; sys.exit(run_app(['verify', 'autocast', 'mine:build', '--json']))"
    ours = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-P", "-c", start], cwd=tmp_path, env=ours, capture_output=True, text=True, timeout=120)
    assert "Explode" in json.loads(done.stdout or "{}").get("findings", [{"culprit": ""}])[0]["culprit"], done.stdout + done.stderr

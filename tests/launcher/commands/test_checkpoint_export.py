"""Checkpoints for people and other tools: ls, verify, export, and the command that proves resume."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, until
from safetensors.torch import load_file
from training import TINY, Farm, farm, logs

from jobs.checkpoint import directory, user_checkpoint
from jobs.config.resolver import load
from jobs.core.contract import Exit
from jobs.core.errors import CheckpointError, SettingError
from jobs.run.rundir import RunDir
from launcher.cli.app import run_app
from launcher.local.executor import pids_of_ranks
from train.checkpoint.export import export, llama_weights, weights_of
from train.models.gpt import GPT
from train.models.registry import build_model

__all__ = ["farm"]
pytestmark = pytest.mark.timeout(900)
has_transformers = importlib.util.find_spec("transformers") is not None


@pytest.fixture(scope="module")
def run(farm: Farm) -> RunDir:
    return farm.finished(MAX_STEPS="8", MODEL_OPTIONS="n_layers=2,d_model=32,n_heads=4,n_kv_heads=2,d_ff=64,rope_theta=5000.0")


def ours(run: RunDir, path: Path) -> GPT:
    job = load(run.job_yaml)
    model = build_model(job.model, vocab_size=256, seq_len=job.seq_len, overrides=dict(job.model_options))
    model.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    assert isinstance(model, GPT)
    return model


def test_a_plain_export_has_every_weight_by_our_names_and_a_second_one_is_refused(run: RunDir, tmp_path: Path) -> None:
    path = directory.complete(run.checkpoints)[0]
    export(load(run.job_yaml), path, tmp_path / "out", "plain")
    exported, saved = load_file(tmp_path / "out" / "model.safetensors"), load_file(path / "model.safetensors")
    assert exported.keys() == saved.keys() and all(torch.equal(exported[name], saved[name]) for name in saved)
    assert json.loads((tmp_path / "out" / "state.json").read_text())["step"] == 8
    with pytest.raises(SettingError, match="exists"):
        export(load(run.job_yaml), path, tmp_path / "out", "plain")


def test_an_export_for_transformers_has_llama_s_names_and_shapes(run: RunDir, tmp_path: Path) -> None:
    path = directory.complete(run.checkpoints)[0]
    export(load(run.job_yaml), path, tmp_path / "out", "hf")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (16, 32)
    assert weights["model.layers.1.mlp.up_proj.weight"].shape == (64, 32)
    assert sum(tensor.numel() for tensor in weights.values()) == sum(p.numel() for p in ours(run, path).parameters())
    with pytest.raises(CheckpointError, match="no weight of the built-in model"):
        llama_weights({"blocks.0.attention.other": torch.zeros(1)}, ours(run, path).config)


@pytest.mark.skipif(not has_transformers, reason="needs transformers (group hf)")
def test_transformers_loads_the_export_and_computes_the_same_logits(run: RunDir, tmp_path: Path) -> None:
    import transformers

    path = directory.complete(run.checkpoints)[0]
    export(load(run.job_yaml), path, tmp_path / "out", "hf")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # fp32 on both sides; another order of operations in attention and norms.
        torch.testing.assert_close(theirs(input_ids=tokens).logits, ours(run, path).logits(tokens), rtol=1e-4, atol=1e-4)


def test_a_damaged_checkpoint_is_not_exported(run: RunDir, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "step-00000008"
    shutil.copytree(directory.complete(run.checkpoints)[0], folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its sum"):
        weights_of(folder)


def test_ls_and_verify_speak_of_every_checkpoint_without_torch(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launcher.cli.app", "ckpt", "ls", str(run.path), "--json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not [line for line in done.stderr.splitlines() if line.endswith("| torch")]
    [row] = json.loads(done.stdout)
    assert (row["step"], row["state"], row["world"]) == (8, "complete", 2)
    assert run_app(["ckpt", "verify", str(run.path)]) == Exit.DONE
    assert "1 of 1 verified; a resume would use step 8" in capfd.readouterr().out
    model = run.checkpoints / "step-00000008" / "model.safetensors"
    data = model.read_bytes()
    model.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        assert run_app(["ckpt", "verify", str(run.path)]) == Exit.FAILED
        assert "the content of model.safetensors does not match its sum" in capfd.readouterr().out
        assert model.exists()  # looking changes nothing
    finally:
        model.write_bytes(data)


def test_export_of_a_step_that_is_not_there_names_those_that_are(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_app(["ckpt", "export", str(run.path), "--step", "7"]) == Exit.USAGE
    assert "no checkpoint of step 7; there are: 8" in capfd.readouterr().err


def test_what_cannot_be_exported_is_said_in_one_line(run: RunDir, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_app(["ckpt", "export", str(run.path), "--form", "onnx"]) == Exit.USAGE
    assert capfd.readouterr().err == "--form 'onnx': write one of hf (what transformers loads), plain (weights by our names).\n"
    (tmp_path / "file").touch()
    assert run_app(["ckpt", "export", str(run.path), "--out", str(tmp_path / "file" / "x")]) == Exit.USAGE
    assert capfd.readouterr().err == f"{tmp_path}/file/x cannot be made: Not a directory; choose another folder with --out\n"
    own = RunDir(tmp_path / "own-a2b3")
    (own.path / "aside").mkdir(parents=True)
    own.checkpoints.mkdir()
    own.job_yaml.write_text(run.job_yaml.read_text())
    (own.path / "aside" / "state.json").write_text("5")
    user_checkpoint.commit(own.path / "aside", own.checkpoints, 5, 1, 3)
    for form in ("hf", "plain"):
        assert run_app(["ckpt", "export", str(own.path), "--form", form]) == Exit.USAGE
        said = capfd.readouterr().err
        assert "a script of your own" in said and "step-00000005/ holds the files that it wrote" in said and said.count("\n") == 1


def words(tmp_path: Path, **more: str) -> list[str]:
    settings = {**TINY, "MAX_STEPS": "16", "CHECKPOINT_EVERY": "4", "RUNS_DIR": str(tmp_path), **more}
    return [f"{key}={value}" for key, value in settings.items() if key not in ("MAX_KILLED", "MAX_NO_PROGRESS", "LOG_EVERY")]


def test_verify_resume_proves_a_job_and_its_exit_code_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_app(["verify", "resume", *words(tmp_path, GPUS_PER_NODE="1"), "--kills", "1", "--json"]) == Exit.DONE
    [case] = json.loads(capfd.readouterr().out)["cases"]
    assert case["same_weights"] and case["same_losses"] and case["samples"] == "each once, same order" and case["attempts"] == 2
    assert not list(tmp_path.iterdir())


def test_verify_resume_refuses_changes_before_it_trains_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.subprocesses.command", lambda *_: pytest.fail("something was trained"))
    changes = [word for change in ("NIX=1", "MAX_STEPS=9", "PRECISION=bf16", "MODEL=124m") for word in ("--change", change)]
    assert run_app(["verify", "resume", *words(tmp_path, GPUS_PER_NODE="1"), *changes]) == Exit.USAGE
    said = capfd.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in said] == ["--change NIX=1", "--change MAX_STEPS=9", "--change MODEL=124m"], said
    assert "NIX is not a setting" in said[0] and "another training" in said[1] and "a run keeps its model for good" in said[2]
    assert not list(tmp_path.iterdir())


def test_verify_resume_that_is_interrupted_leaves_neither_runs_nor_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.cli.app", "verify", "resume", *words(tmp_path, GPUS_PER_NODE="1", MAX_STEPS="100000")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, start_new_session=True)
    until(lambda: next(tmp_path.glob("verify-*/straight-0/attempts/1/progress"), None), 120, "a step")
    [straight] = tmp_path.glob("verify-*/straight-0")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == Exit.INTERRUPTED
    assert not list(tmp_path.iterdir()) and not pids_of_ranks(RunDir(straight))


def test_verify_resume_fails_when_a_resumed_run_is_another_one(tmp_path: Path, farm: Farm) -> None:
    from launcher.verify.resume import Case, judge_case

    straight, other = farm.finished(MAX_STEPS="8", LOG_SAMPLES="true"), farm.finished(MAX_STEPS="8", SEED="8", LOG_SAMPLES="true")
    case = Case("another seed")
    judge_case(case, load(straight.job_yaml), straight, other)
    assert not case.passed and not case.same_weights and not case.same_losses and case.samples == "another order", logs(other)
    case = Case("the same")
    judge_case(case, load(straight.job_yaml), straight, straight)
    assert case.passed

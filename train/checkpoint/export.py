"""A checkpoint for other tools: `python -m train.checkpoint.export`, started by `holdfast ckpt export`.

plain   model.safetensors: the weights by our own names, whatever number of processes wrote them
hf      model.safetensors and config.json that transformers loads: the built-in model as a Llama, an hf: model as itself
"""

import argparse
import json
import os
import secrets
import shutil
import sys
from pathlib import Path

import torch

from jobs.checkpoint import directory
from jobs.checkpoint.commit import write_file
from jobs.config.resolver import load
from jobs.config.settings import Job
from jobs.core.contract import Exit
from jobs.core.errors import CheckpointError, HoldfastError, SettingError
from jobs.run.rundir import RunDir
from train.checkpoint.state_dict import CheckpointReader, TensorShard, safetensors_parts
from train.models.gpt import GPTConfig
from train.models.registry import PRESETS, preset_config

_BLOCK = {
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
}
_OUTSIDE = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "lm_head.weight": "lm_head.weight"}


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint that verifies, whole. Raises CheckpointError."""
    saved = CheckpointReader(path, directory.verify(path).of_kind(directory.MODEL))
    return {name: saved.whole(name) for name in saved.shapes}


def llama_weights(weights: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """Our names and fused matrices as transformers' Llama has them. Raises CheckpointError for a name that is not ours."""
    heads = (config.n_heads * config.channels, config.kv_heads * config.channels, config.kv_heads * config.channels)
    out = {}
    for name, tensor in weights.items():
        if name in _OUTSIDE:
            out[_OUTSIDE[name]] = tensor
            continue
        word, _, rest = name.partition(".")
        index, _, part = rest.partition(".")
        at = f"model.layers.{index}."
        if word != "blocks":
            raise CheckpointError(f"{name} is no weight of the built-in model")
        if part == "attention.qkv.weight":
            for letter, piece in zip("qkv", tensor.split(heads), strict=True):
                out[f"{at}self_attn.{letter}_proj.weight"] = piece
        elif part == "mlp.gate_up.weight":
            out[f"{at}mlp.gate_proj.weight"], out[f"{at}mlp.up_proj.weight"] = tensor.chunk(2)
        elif part in _BLOCK:
            out[at + _BLOCK[part]] = tensor
        else:
            raise CheckpointError(f"{name} is no weight of the built-in model")
    return out


def llama_config(config: GPTConfig) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.channels,
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        # The older and the newer word for it.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def export(job: Job, path: Path, out: Path, form: str) -> None:
    """Writes folder `out`, aside and renamed. Raises SettingError when it exists or cannot be made, or the model has no such form."""
    if out.exists():
        raise SettingError(f"{out} exists; choose another folder with --out")
    aside = out.with_name(f".{out.name}.{secrets.token_hex(3)}")
    try:
        aside.mkdir(parents=True)
    except OSError as err:
        raise SettingError(f"{out} cannot be made: {err.strerror}; choose another folder with --out") from err
    try:
        weights = weights_of(path)
        if form == "plain":
            _write_weights(aside, weights)
            (aside / "state.json").write_text(json.dumps(directory.read_manifest(path).state, indent=1) + "\n")
        elif job.model in PRESETS:
            rows = weights["embedding.weight"].shape[0]
            config = preset_config(job.model, seq_len=job.seq_len, overrides={**job.model_options, "vocab_size": rows})
            _write_weights(aside, llama_weights(weights, config))
            (aside / "config.json").write_text(json.dumps(llama_config(config), indent=1) + "\n")
        elif job.model.startswith("hf:"):
            _save_pretrained(job, weights, aside)
        else:
            raise SettingError(f"MODEL={job.model} is not a model that transformers knows; export it with --form plain")
        os.rename(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    parts = safetensors_parts({name: TensorShard(tensor.contiguous()) for name, tensor in weights.items()}, about={"format": "pt"})
    write_file(folder / "model.safetensors", parts)


def _save_pretrained(job: Job, weights: dict[str, torch.Tensor], folder: Path) -> None:
    from train.checkpoint.state_dict import named_tensors
    from train.models.registry import build_model

    model = build_model(job.model, seq_len=job.seq_len, overrides=dict(job.model_options))
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            tensor.copy_(weights[name])
    model.model.save_pretrained(folder)  # type: ignore[union-attr, operator]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m train.checkpoint.export")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--form", choices=("hf", "plain"), required=True)
    args = parser.parse_args()
    try:
        export(load(RunDir(args.run_dir).job_yaml), args.checkpoint, args.out, args.form)
    except HoldfastError as err:
        print(err, file=sys.stderr)
        return err.exit_code
    print(f"{args.checkpoint.name} exported to {args.out}/: {', '.join(sorted(child.name for child in args.out.iterdir()))}")
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())

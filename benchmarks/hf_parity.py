"""Losses of a run with the fused forward pass of an hf: model beside transformers' own (HF_FAST=off).

    python -m benchmarks.hf_parity [--steps 200] [--json parity.json]

Three runs in fp32 (fused, own, each of the same seed) and three in bf16 (fused, own, own with another seed), of a small Llama on random tokens of
a skewed distribution, through the ordinary entry point. Prints the largest relative difference between the losses of each pair.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.hardware import lines_of, train
from benchmarks.peer_loops import device

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def losses(folder: Path, name: str, steps: int, *words: str) -> list[float]:
    shared = [
        f"MODEL=hf:{folder}/config.json", f"DATA=tokens:{folder}/tokens.bin", "SEQ_LEN=256", "BATCH_SIZE=8", "NODES=1", "GPUS_PER_NODE=1",
        "SITE=generic", f"DEVICE={device()}", "LOG_EVERY=1", "EVAL_EVERY=0", "LR=3e-4", f"MAX_STEPS={steps}", f"CHECKPOINT_EVERY={steps}",
    ]  # fmt: skip
    lines = lines_of(train(folder, name, [*shared, *words], timeout=300))
    return [lines[step]["loss"] for step in sorted(lines)]


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hf_parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from train.data.tokens import write_tokens

    with tempfile.TemporaryDirectory(prefix="hf-parity-") as name:
        folder = Path(name)
        os.environ.setdefault("XDG_CACHE_HOME", name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        # Zipf: there is something to learn, the frequency of tokens.
        tokens = np.minimum(np.random.default_rng(0).zipf(1.3, (args.steps + 40) * 8 * 257 * 2), CONFIG["vocab_size"]) - 1
        write_tokens(folder / "tokens.bin", tokens, CONFIG["vocab_size"])
        compiled = "COMPILE=true" if device() == "cuda" else "COMPILE=false"
        results = {}
        for run, words in {
            "fp32-fused": ["PRECISION=fp32"],
            "fp32-own": ["PRECISION=fp32", "HF_FAST=off"],
            "bf16-fused": ["PRECISION=bf16", compiled],
            "bf16-own": ["PRECISION=bf16", compiled, "HF_FAST=off"],
            "bf16-own-seed2": ["PRECISION=bf16", compiled, "HF_FAST=off", "SEED=2"],
        }.items():
            results[run] = losses(folder, run, args.steps, *words)
            print(f"{run:16} first {results[run][0]:.5f} last {results[run][-1]:.5f}", flush=True)
    pairs = {
        "fp32: fused against own": ("fp32-fused", "fp32-own"),
        "bf16: fused against own": ("bf16-fused", "bf16-own"),
        "bf16: own against own with another seed": ("bf16-own-seed2", "bf16-own"),
    }
    table = {title: largest(results[a], results[b]) for title, (a, b) in pairs.items()}
    for title, value in table.items():
        print(f"{title:45} largest relative difference of {args.steps} losses {value:.2e}")
    if args.json:
        args.json.write_text(json.dumps({"differences": table, "losses": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The shapes of the built-in language model, without torch: training builds from them, the launcher counts with them.

Widths and vocabularies are multiples of 128: tensor cores fill their tiles, and fp8 needs multiples of 16. 124m and 350m have
GPT-2's sizes and tie their embeddings as it does; heads of 128 channels, because 64 cost attention speed. 3b and 8b have
grouped key/value heads; 8b is the shape of Llama-3-8B.
"""

from collections.abc import Mapping
from typing import Any

# Tokens per chunk of head and loss: 0.5 GB of fp32 logits at a vocabulary of 32,000, and still a large matrix product.
LOSS_CHUNK_TOKENS = 4096

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # init_std: 0.02 is too little for this width; the larger one is worth a quarter of a bit per byte at step 200.
    "nano": {"vocab_size": 256, "seq_len": 128, "d_model": 128, "n_layers": 2, "n_heads": 4, "d_ff": 384, "init_std": 0.06},
    "124m": {"vocab_size": 50304, "seq_len": 1024, "d_model": 768, "n_layers": 12, "n_heads": 6, "d_ff": 2048, "tie_embeddings": True},
    "350m": {"vocab_size": 50304, "seq_len": 1024, "d_model": 1024, "n_layers": 24, "n_heads": 8, "d_ff": 2816, "tie_embeddings": True},
    "1b": {"vocab_size": 32000, "seq_len": 2048, "d_model": 2048, "n_layers": 22, "n_heads": 16, "d_ff": 5632, "loss_chunk_tokens": 8192},
    "3b": {"vocab_size": 32000, "seq_len": 4096, "d_model": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "d_ff": 8192, "loss_chunk_tokens": 8192},
    "8b": {
        "vocab_size": 128256,
        "seq_len": 8192,
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "d_ff": 14336,
        "rope_theta": 500_000.0,
        "loss_chunk_tokens": 2048,
    },
}

# What the settings `model` and `data` may say: train/models/registry.py and train/data/sources.py make something of it.
MODEL_SPECS = (*PRESETS, "convnet", "hf:PATH", "package.module:build")
DATA_SPECS = ("stdlib", "text:PATH", "tokens:PATH", "hfds:PATH", "synthetic", "digits", "package.module:build")

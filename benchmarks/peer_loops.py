"""What a user would take instead, as loops of one shape: transformers.Trainer, plain PyTorch, Accelerate. Measured by benchmarks/peers.py.

Each function trains so many steps on random tokens and returns its figures: `tokens_per_s`, and on a GPU `memory_gb`, the most that torch
had allocated, in 10^9 bytes.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

_WINDOW = 5


@dataclass(frozen=True)
class Shape:
    """A causal language model and its batch. `preset` is the built-in model of the same shape, empty where there is none.

    `family` is transformers' model_type; `experts` and `active` count the feed-forward parts of a layer and those that a token passes.
    """

    preset: str
    d: int
    layers: int
    heads: int
    kv_heads: int
    ff: int
    vocab: int
    seq_len: int
    batch: int
    family: str = "llama"
    experts: int = 1
    active: int = 1

    @property
    def attention(self) -> int:
        """Weights of the attention of one layer."""
        return 2 * self.d * self.d + 2 * self.d * self.d * self.kv_heads // self.heads

    @property
    def feed_forward(self) -> int:
        """Weights of one feed-forward part: three products where it is gated, else two."""
        return (2 if self.family in ("gpt2", "gpt_neox") else 3) * self.d * self.ff

    @property
    def checkpoint_bytes(self) -> int:
        return 12 * (self.layers * (self.attention + self.experts * self.feed_forward) + 2 * self.vocab * self.d)

    @property
    def flops(self) -> int:
        """Model FLOPs per token: 6 N + 6 L d T, with N the weights of blocks and head that a token passes."""
        return 6 * (self.layers * (self.attention + self.active * self.feed_forward) + self.vocab * self.d) + 6 * self.layers * self.d * self.seq_len

    def config(self) -> dict[str, object]:
        """config.json of transformers."""
        if self.family == "gpt2":
            return {
                "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": self.vocab, "n_embd": self.d, "n_layer": self.layers, "n_head": self.heads,
                "n_inner": self.ff, "n_positions": self.seq_len, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
            }  # fmt: skip
        shared = {
            "model_type": self.family, "vocab_size": self.vocab, "hidden_size": self.d, "intermediate_size": self.ff, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "max_position_embeddings": self.seq_len, "tie_word_embeddings": False,
        }  # fmt: skip
        if self.family == "gpt_neox":
            return shared | {"architectures": ["GPTNeoXForCausalLM"]}
        shared |= {"num_key_value_heads": self.kv_heads}
        if self.family == "mixtral":
            return shared | {
                "architectures": ["MixtralForCausalLM"],
                "num_local_experts": self.experts,
                "num_experts_per_tok": self.active,
                "sliding_window": None,
            }
        if self.family == "gemma":
            return shared | {"architectures": ["GemmaForCausalLM"], "head_dim": self.d // self.heads, "tie_word_embeddings": True}
        return shared | {"architectures": ["LlamaForCausalLM"]}


SHAPES = {
    "1b": Shape("1b", 2048, 22, 16, 16, 5632, 32000, 2048, 16),
    "3b": Shape("3b", 3072, 28, 24, 8, 8192, 32000, 4096, 4),
    "gemma": Shape("", 2048, 18, 16, 16, 8192, 32000, 2048, 16, family="gemma"),
    "gpt2": Shape("", 2048, 24, 16, 16, 8192, 32000, 2048, 16, family="gpt2"),
    "gpt_neox": Shape("", 2048, 24, 16, 16, 8192, 32000, 2048, 16, family="gpt_neox"),
    "mixtral": Shape("", 1024, 16, 16, 4, 3584, 32000, 2048, 16, family="mixtral", experts=8, active=2),
    # What a CPU can do in seconds: to see that every row works, not to compare anything.
    "tiny": Shape("nano", 64, 2, 2, 2, 128, 256, 64, 4),
    "tiny-gpt2": Shape("", 64, 2, 2, 2, 128, 256, 64, 4, family="gpt2"),
    "tiny-gpt_neox": Shape("", 64, 2, 2, 2, 128, 256, 64, 4, family="gpt_neox"),
    "tiny-gemma": Shape("", 64, 2, 2, 2, 128, 256, 64, 4, family="gemma"),
    "tiny-mixtral": Shape("", 64, 2, 2, 2, 128, 256, 64, 4, family="mixtral", experts=4, active=2),
}


def causal_lm(shape: Shape) -> Any:
    """The model of transformers, with fp32 weights drawn on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape.config(), use_cache=False)
    torch.manual_seed(0)
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Windows:
    """Tokens per second by windows of some steps, the first of them left out."""

    def __init__(self, tokens_per_step: int):
        self.tokens, self.rates, self.steps, self.begun = tokens_per_step, [], 0, 0.0

    def step(self) -> None:
        if self.steps % _WINDOW == 0:
            wait()
            now = time.perf_counter()
            if self.steps:
                self.rates.append(_WINDOW * self.tokens / (now - self.begun))
            self.begun = now
        self.steps += 1

    def median(self) -> float:
        return statistics.median(self.rates[2:] or self.rates)


Figures = dict[str, float]


def measured(rate: float) -> Figures:
    import torch

    return {"tokens_per_s": rate} | ({"memory_gb": torch.cuda.max_memory_allocated() / 1e9} if torch.cuda.is_available() else {})


def plain_loop(shape: Shape, steps: int, dtype: str, compiled: bool = False, float8: str = "") -> Figures:
    """A loop as people write it: autocast, fused AdamW, clipping, loss of the model itself."""
    import torch

    torch.set_float32_matmul_precision("high")
    model = causal_lm(shape)
    if float8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(float8), module_filter_fn=lambda module, name: name != "lm_head")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=device() == "cuda")
    scaler = torch.amp.GradScaler(device(), enabled=dtype == "float16")
    forward = torch.compile(model) if compiled else model
    windows = Windows(shape.batch * shape.seq_len)
    for _ in range(steps):
        windows.step()
        tokens = torch.randint(0, shape.vocab, (shape.batch, shape.seq_len), device=device())
        with torch.autocast(device(), getattr(torch, dtype)):
            loss = forward(input_ids=tokens, labels=tokens).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    windows.step()
    return measured(windows.median())


def trainer(shape: Shape, steps: int) -> Figures:
    """transformers.Trainer in bf16, compiled, sdpa, fused AdamW."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return shape.batch * (steps + 1)

        def __getitem__(self, index: int) -> dict[str, Any]:
            tokens = torch.from_numpy(np.random.default_rng(index).integers(0, shape.vocab, shape.seq_len))
            return {"input_ids": tokens, "labels": tokens}

    windows = Windows(shape.batch * shape.seq_len)

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            windows.step()

    gpu = device() == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=shape.batch, max_steps=steps + 1, bf16=True, torch_compile=gpu, optim="adamw_torch_fused" if gpu else "adamw_torch",
            logging_steps=10, save_strategy="no", report_to="none", dataloader_num_workers=4 if gpu else 0, use_cpu=not gpu, disable_tqdm=True,
        )  # fmt: skip
        Trainer(causal_lm(shape), arguments, train_dataset=Tokens(), callbacks=[Watch()]).train()
    return measured(windows.median())


def accelerate_fp8(shape: Shape, steps: int) -> Figures:
    """Accelerate's mixed_precision="fp8" by Transformer Engine, eager as it comes."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import TERecipeKwargs

    accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[TERecipeKwargs()])
    model = causal_lm(shape)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True))
    windows = Windows(shape.batch * shape.seq_len)
    for _ in range(steps):
        windows.step()
        tokens = torch.randint(0, shape.vocab, (shape.batch, shape.seq_len), device=device())
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    windows.step()
    return measured(windows.median())


def accelerate_ddp(shape: Shape, steps: int) -> Figures:
    """Accelerate's DDP in bf16, the model compiled before it is wrapped; called in each of the processes. Rates of all together."""
    import torch
    from accelerate import Accelerator

    gpu = device() == "cuda"
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    accelerator = Accelerator(mixed_precision="bf16", cpu=not gpu)
    model = causal_lm(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=gpu)
    model, optimizer = accelerator.prepare(torch.compile(model) if gpu else model, optimizer)
    windows = Windows(shape.batch * shape.seq_len * accelerator.num_processes)
    for _ in range(steps):
        windows.step()
        tokens = torch.randint(0, shape.vocab, (shape.batch, shape.seq_len), device=accelerator.device)
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    windows.step()
    figures = measured(windows.median())
    accelerator.end_training()
    return figures

"""A model and data of one's own, and labelled text for a classifier: what `package.module:build` may name."""

import os
import signal

import numpy as np
import torch
from torch import nn


class Regression(nn.Module):
    """Returns a mean loss, as most people's modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.mse_loss(self.net(x).squeeze(1), y), "n_tokens": torch.tensor(len(x))}


def regression(vocab_size: int | None = None) -> nn.Module:
    return Regression()


class Numbers:
    name, vocab_size, unit = "numbers", 1, "sample"

    def __len__(self) -> int:
        return 600

    def batch(self, ids):
        x = np.sin(np.asarray(ids)[:, None] * np.arange(1, 9)).astype(np.float32)
        return {"x": torch.from_numpy(x), "y": torch.from_numpy(x.sum(1))}


def numbers() -> Numbers:
    return Numbers()


class Sentences:
    """Sequences whose class is whether their first token is even; attention covers a varying part of each."""

    name, vocab_size, unit = "sentences", 256, "sample"

    def __init__(self, seq_len: int):
        self.seq_len = seq_len

    def __len__(self) -> int:
        return 500

    def batch(self, ids):
        ids = np.asarray(ids)
        tokens = (ids[:, None] * 31 + np.arange(self.seq_len) * 7) % 240 + 8
        mask = (np.arange(self.seq_len)[None] < 8 + ids[:, None] % (self.seq_len - 8)).astype(np.int64)
        return {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(tokens[:, 0] % 2), "attention_mask": torch.from_numpy(mask)}


def sentences(seq_len: int) -> Sentences:
    return Sentences(seq_len)


class Torn(Regression):
    """A loss that is finite, with a gradient that is not: infinity, the slope of the root at zero, times zero."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        found = super().forward(x, y)
        return {**found, "loss": found["loss"] + torch.sqrt(self.net(x) * 0.0).sum()}


def torn(vocab_size: int | None = None) -> nn.Module:
    return Torn()


class Normalised(nn.Module):
    """Divides by a running mean, which its training reads too: each process would come to another one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 1)
        self.register_buffer("size", torch.ones(8))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            self.size.mul_(0.9).add_(0.1 * x.detach().abs().mean(0))
        return {"loss": nn.functional.mse_loss(self.net(x / (self.size + 0.1)).squeeze(1), y), "n_tokens": torch.tensor(len(x))}


def normalised(vocab_size: int | None = None) -> nn.Module:
    return Normalised()


class Interrupted(Sentences):
    """Tokens; the first validation ends in a SIGTERM to its process, once: then the file `note` is there."""

    unit = "token"

    def __init__(self, seq_len: int, split: str, note: str):
        super().__init__(seq_len)
        self.note = note if split == "val" else ""

    def batch(self, ids):
        if self.note and not os.path.exists(self.note):
            open(self.note, "w").close()
            os.kill(os.getpid(), signal.SIGTERM)
        tokens = super().batch(ids)["tokens"]
        return {"tokens": tokens, "targets": (tokens + 1) % 256}


def interrupted(seq_len: int, split: str, note: str = "") -> Interrupted:
    return Interrupted(seq_len, split, note)


class Masked(Sentences):
    """Tokens of which another share counts in each sample, in every second none."""

    unit = "token"

    def batch(self, ids):
        tokens = super().batch(ids)["tokens"]
        counts = torch.from_numpy(counted(np.asarray(ids)))
        return {"tokens": tokens, "targets": torch.where(torch.arange(self.seq_len)[None] < counts[:, None], (tokens + 1) % 256, -100)}


def counted(ids):
    """How many targets count in these samples of Masked."""
    return np.where(ids % 2 == 0, 0, ids % 7 + 1)


def masked(seq_len: int) -> Masked:
    return Masked(seq_len)


class Mean(nn.Module):
    """A causal model's usual mean loss: NaN where no target counts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, 16), nn.Linear(16, 256)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.embedding(tokens)).flatten(0, 1), targets.flatten(), ignore_index=-100)


def mean(vocab_size: int | None = None) -> nn.Module:
    return Mean()


class Turned(Regression):
    """Has a complex buffer, as rotary positions of Llama are often kept, and a complex weight that is not trained."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("freqs_cis", torch.polar(torch.ones(4), torch.arange(4.0)).to(kind))
        self.turn = nn.Parameter(torch.polar(torch.ones(4), torch.rand(4)), requires_grad=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        turned = torch.view_as_complex(x.view(-1, 4, 2)) * self.freqs_cis * self.turn
        return super().forward(torch.view_as_real(turned.to(torch.complex64)).flatten(1), y)


def turned(vocab_size: int | None = None, kind: str = "complex64") -> nn.Module:
    return Turned(getattr(torch, kind))

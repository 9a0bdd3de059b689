"""A model of one's own with a planted fault, for `holdfast verify autocast`."""

import torch
from torch import nn


class Explode(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() * 1e38 * 1e38).to(x.dtype)


class Planted(nn.Module):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 32)
        self.body = nn.Sequential(nn.Linear(32, 32), nn.GELU(), Explode())
        self.head = nn.Linear(32, vocab_size)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.body(self.embedding(tokens)))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build(vocab_size: int | None = None) -> nn.Module:
    return Planted(vocab_size or 256)

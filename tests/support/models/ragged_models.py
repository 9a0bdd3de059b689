"""Models and data as users write them: batches padded to their longest row, mean losses, damaged samples."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 64


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, 16), nn.Linear(16, VOCAB, bias=False)

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.linear(self.embedding(ids)))).float()  # type: ignore[no-any-return]


class MeanOfTargets(Tiny):
    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())


class Reporting(MeanOfTargets):
    """Prints a checksum of its weights at each forward pass of training."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            print("weights", torch.cat([p.detach().flatten().double() for p in self.parameters()]).sum().item(), flush=True)
        return super().forward(tokens, targets)


class ShiftedLabels(Tiny):
    """As transformers: `labels` like the input, shifted inside."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.logits(input_ids)
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


class OwnIgnoreIndex(Tiny):
    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), torch.where(targets < 20, 3, targets).flatten(), ignore_index=3)


class Weighted(Tiny):
    weight = torch.linspace(0.1, 3.0, VOCAB)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten(), weight=self.weight)


class WeightedWithCount(Weighted):
    def forward(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        counted = targets[targets >= 0]
        return {"loss": super().forward(tokens, targets), "n_tokens": self.weight[counted].sum()}


class DividedByMask(Tiny):
    """Sum over mask.sum(): 0/0 where nothing is left."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        mask = (targets != -100).float()
        losses = F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.clamp(min=0).flatten(), reduction="none")
        return (losses * mask.flatten()).sum() / mask.sum()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.net(images.to(self.net[0].weight.dtype)).float(), targets)


class WeightedClassifier(nn.Module):
    """Class weights; `counted`: with their sum as the denominator."""

    def __init__(self, counted: bool, scale: float) -> None:
        super().__init__()
        self.linear, self.counted, self.weight = nn.Linear(8, 2), counted, scale * torch.tensor([0.1, 5.0])

    def forward(self, images: Tensor, targets: Tensor) -> Any:
        loss = F.cross_entropy(self.linear(images), targets, weight=self.weight)
        return {"loss": loss, "n_tokens": self.weight[targets].sum()} if self.counted else loss


def weighted_classifier(counted: bool = False, scale: float = 1.0) -> nn.Module:
    return WeightedClassifier(str(counted).lower() == "true", float(scale))


class Infinite(nn.Module):
    """A constant of infinity is added where a batch holds the damaged sample: the gradient does not notice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 2)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(self.linear(images.nan_to_num()), targets)
        return loss + torch.where(images.isnan().any(), torch.inf, 0.0)


def infinite_at_some_step(**_: Any) -> nn.Module:
    return Infinite()


def mean(**_: Any) -> nn.Module:
    return MeanOfTargets()


def reporting(**_: Any) -> nn.Module:
    return Reporting()


def shifted(**_: Any) -> nn.Module:
    return ShiftedLabels()


def own_ignore_index(**_: Any) -> nn.Module:
    return OwnIgnoreIndex()


def weighted(**_: Any) -> nn.Module:
    return Weighted()


def weighted_with_count(**_: Any) -> nn.Module:
    return WeightedWithCount()


def divided_by_mask(**_: Any) -> nn.Module:
    return DividedByMask()


def classifier(dtype: str = "float32") -> nn.Module:
    return Classifier().to(getattr(torch, dtype))


class Ragged:
    """Rows of 3 to 39 tokens; a batch is padded to its longest row. `empty`: each so many-th row has no target; 1: none has."""

    unit = "token"
    vocab_size = VOCAB

    def __init__(self, split: str, names: str, empty: int):
        self.name = f"ragged[{split}]"
        random = np.random.default_rng(1 if split == "train" else 2)
        self.rows = [random.integers(0, VOCAB, random.integers(3, 40)) for _ in range(64)]
        self.names, self.empty = names, empty

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, ids: np.ndarray) -> dict[str, Tensor]:
        rows = [self.rows[i] for i in ids]
        width = max((len(row) for row in rows), default=3)
        tokens, targets = np.zeros((len(ids), width), np.int64), np.full((len(ids), width), -100, np.int64)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
            if self.names == "targets":
                targets[index, : len(row) - 1] = row[1:]
            else:
                targets[index, : len(row)] = row
            if self.empty and ids[index] % self.empty == 0:
                targets[index] = -100
        first = "tokens" if self.names == "targets" else "input_ids"
        return {first: torch.from_numpy(tokens), self.names: torch.from_numpy(targets)}


def ragged(split: str, names: str = "targets", empty: int = 0, val_empty: int = 0) -> Ragged:
    return Ragged(split, names, int(val_empty if split == "val" else empty))


class Points:
    """256 points of two classes; training sample `bad` holds a NaN."""

    unit = "image"
    vocab_size = 2

    def __init__(self, split: str, bad: int, in_order: bool):
        self.name = f"points[{split}]"
        generator = torch.Generator().manual_seed(1 if split == "train" else 2)
        self.images = torch.randn(256, 8, generator=generator)
        self.targets = (self.images.sum(1) > 0).long()
        if in_order:
            order = self.targets.argsort()
            self.images, self.targets = self.images[order], self.targets[order]
        if split == "train" and bad >= 0:
            self.images[bad, 3] = float("nan")

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, ids: np.ndarray) -> dict[str, Tensor]:
        index = torch.from_numpy(ids)
        return {"images": self.images[index], "targets": self.targets[index]}


def points(split: str, bad: int = -1, in_order: int = 0) -> Points:
    return Points(split, int(bad), bool(int(in_order)))

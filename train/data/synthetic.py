"""Data without files: a token stream made by arithmetic, and scikit-learn's digits as a small real image set."""

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.core.errors import SettingError
from train.data.windows import check_ids, split_window


class AffineTokens:
    """Sample i starts at a token drawn from i and goes on by x -> (a * x + 1) mod vocab_size, a prime to vocab_size.

    The next token is a function of the last one alone: the best loss is 0, a model that learns anything gets closer to
    it, and log(vocab_size) is what knowing nothing costs. Every token occurs; nothing is stored."""

    unit = "token"
    fixed_shapes = True

    def __init__(self, *, seq_len: int, vocab_size: int, split: str, num_samples: int | None = None) -> None:
        if vocab_size < 2 or seq_len < 1:
            raise SettingError(f"data 'synthetic': vocabulary {vocab_size} must be at least 2, seq_len {seq_len} 1")
        self.seq_len, self.vocab_size, self.name = seq_len, vocab_size, f"synthetic-{vocab_size}[{split}]"
        self._length = num_samples or (1 << 20 if split == "train" else 1 << 12)
        # Validation draws its start tokens from another part of the sequence of ids.
        self._offset = 0 if split == "train" else 1 << 40
        first = max(2, int(vocab_size * 0.618))
        multiplier = next(a for a in range(first, 3 * vocab_size) if math.gcd(a, vocab_size) == 1)
        # x_t = power[t] * x_0 + shift[t]: a whole batch in one expression.
        power, shift = [1], [0]
        for _ in range(seq_len):
            power.append(power[-1] * multiplier % vocab_size)
            shift.append((shift[-1] * multiplier + 1) % vocab_size)
        self._power, self._shift = np.array(power, dtype=np.int64), np.array(shift, dtype=np.int64)

    def __len__(self) -> int:
        return self._length

    def batch(self, ids: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """{"tokens", "targets"}: int64 [len(ids), seq_len] each."""
        check_ids(ids, len(self))
        mixed = (ids + self._offset).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        start = ((mixed >> np.uint64(32)) % np.uint64(self.vocab_size)).astype(np.int64)
        return split_window((self._power * start[:, None] + self._shift) % self.vocab_size)


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, part of that package: real images without a download.

    One in five, picked by a hash of its number, is for validation. Raises SettingError without scikit-learn."""

    unit = "image"
    fixed_shapes = True
    vocab_size = 10
    image_shape = (1, 8, 8)

    def __init__(self, *, split: str) -> None:
        try:
            from sklearn.datasets import load_digits  # type: ignore[import-not-found,import-untyped,unused-ignore]
        except ImportError as err:
            raise SettingError("data 'digits' is part of scikit-learn, which is not installed") from err
        found = load_digits()
        val = np.array([hashlib.sha256(str(i).encode()).digest()[0] < 51 for i in range(len(found.target))])
        chosen = val if split == "val" else ~val
        self.name = f"digits[{split}]"
        self._images = (found.images[chosen][:, None] / 16.0).astype(np.float32)  # 0 .. 16 ink levels
        self._targets = found.target[chosen].astype(np.int64)

    def __len__(self) -> int:
        return len(self._targets)

    def batch(self, ids: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """{"images": float32 [B, 1, 8, 8] in 0 .. 1, "targets": int64 [B] in 0 .. 9}."""
        check_ids(ids, len(self))
        return {"images": torch.from_numpy(self._images[ids]), "targets": torch.from_numpy(self._targets[ids])}

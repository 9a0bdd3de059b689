"""Windows over one long array of tokens: the dataset behind every source of text and token files."""

import hashlib
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.core.errors import SettingError

_PIECES, _PIECE = 256, 4096


class TokenWindows:
    """Sample i is tokens [i * seq_len, i * seq_len + seq_len]: its input and, shifted by one, its targets.

    Windows share one boundary token and nothing else, so each token but the first is a target exactly once, and a mean
    over all windows is a mean over the stream. Tokens behind the last whole window are left out.

    stream: 1-D array of integers, in memory or memory-mapped; it is read, never copied as a whole.
    Raises SettingError if it is too short for one window."""

    fixed_shapes = True

    def __init__(self, stream: NDArray[np.integer], *, seq_len: int, vocab_size: int, name: str, unit: str) -> None:
        if seq_len < 1:
            raise SettingError(f"seq_len: {seq_len} is not allowed; it must be at least 1")
        if len(stream) < seq_len + 1:
            raise SettingError(
                f"data {name!r} has {len(stream)} {unit}s, one sample needs seq_len + 1 = {seq_len + 1};"
                f" use SEQ_LEN={max(1, len(stream) - 1)} or less, or more data"
            )
        self.stream, self.seq_len = stream, seq_len
        self.vocab_size, self.name, self.unit = vocab_size, name, unit
        # A view: row i is window i. Picking rows copies each window whole, and a memory map reads only those pages.
        self._rows = np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[::seq_len]

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def content(self) -> str:
        """Of a short stream a sum over every token, of a long one over its length and pieces from all over it: read within a second anywhere."""
        digest = hashlib.sha256(str(len(self.stream)).encode())
        whole = len(self.stream) <= _PIECES * _PIECE
        for start in [0] if whole else np.linspace(0, len(self.stream) - _PIECE, _PIECES).astype(np.int64):
            # As one type: the same tokens may lie in a file of another one.
            digest.update(np.asarray(self.stream[start : None if whole else start + _PIECE], dtype="<i8").tobytes())
        return digest.hexdigest()[:12]

    def batch(self, ids: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """{"tokens", "targets"}: int64 [len(ids), seq_len] each; targets[b, t] follows tokens[b, t] in the stream."""
        check_ids(ids, len(self))
        rows = self._rows[ids].astype(np.int64)
        # Out of range here is a message; on a GPU it is a device-side assert that ends the process.
        if rows.size and (rows.max() >= self.vocab_size or rows.min() < 0):
            raise SettingError(f"data {self.name!r} holds token {int(rows.max())}, its vocabulary is stated as {self.vocab_size}")
        return split_window(rows)


def split_window(rows: NDArray[np.int64]) -> dict[str, torch.Tensor]:
    """Input and target tensors, [B, T] each, of int64 windows [B, T + 1]."""
    window = torch.from_numpy(rows)
    return {"tokens": window[:, :-1].contiguous(), "targets": window[:, 1:].contiguous()}


def check_ids(ids: NDArray[np.int64], length: int) -> None:
    """Refuse ids outside the data; a negative one would silently count from the end."""
    if ids.size and (ids.min() < 0 or ids.max() >= length):
        raise IndexError(f"sample ids {ids.min()} to {ids.max()} do not fit data of {length} samples")

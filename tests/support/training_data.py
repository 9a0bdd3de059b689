"""A data set of one hundred samples, so that a short run sees several epochs."""

import numpy as np
import torch


class Hundred:
    name, vocab_size, unit = "hundred", 256, "token"

    def __init__(self, seq_len: int):
        self.seq_len = seq_len

    def __len__(self) -> int:
        return 100

    def batch(self, ids):
        rows = torch.from_numpy((np.asarray(ids)[:, None] * 7 + np.arange(self.seq_len + 1)) % 256)
        return {"tokens": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}


def hundred(seq_len: int) -> Hundred:
    return Hundred(seq_len)

"""Faults inside training, without a word about them in the product: a dataset of one's own that misbehaves.

    DATA=faults:build NODE_ENV=PYTHONPATH=/path/to/tests,FAULT=hang:60:1

FAULT is kind:step:rank[:always]. Once rank 0 has finished that step, that rank does it, in the first attempt only unless
`always`: raise, hang (asleep in Python), gil (asleep in C with the interpreter's lock held), eat (memory without end).
SLOW_SAVE_S makes every checkpoint take so many seconds more before it is complete; SLOW_VAL_S every validation batch."""

import ctypes
import os
import time
from pathlib import Path
from typing import Any

from jobs.checkpoint import commit
from train.data.sources import Dataset, open_data


class Faulty:
    """The standard library's text, from a process that breaks."""

    def __init__(self, inside: Dataset, split: str):
        self.inside, self.split = inside, split
        self.name, self.vocab_size, self.unit = inside.name, inside.vocab_size, inside.unit
        kind, step, rank, *more = os.environ.get("FAULT", "none:0:-1").split(":")
        mine = rank == os.environ.get("RANK", "0") and ("always" in more or os.environ.get("HOLDFAST_ATTEMPT") == "1")
        self.kind, self.step = (kind, int(step)) if mine else ("none", 0)
        self.slow_s = float(os.environ.get("SLOW_VAL_S", "0")) if split == "val" else 0.0

    def __len__(self) -> int:
        return len(self.inside)

    def batch(self, ids: Any) -> Any:
        if self.kind != "none" and self.split == "train" and _reached() >= self.step:
            misbehave(self.kind)
        time.sleep(self.slow_s)
        return self.inside.batch(ids)


def misbehave(kind: str) -> None:
    if kind == "raise":
        raise ValueError("this sample cannot be read")
    if kind == "hang":
        time.sleep(3600)
    if kind == "gil":
        ctypes.PyDLL(None).sleep(3600)
    if kind == "eat":
        kept = []
        while True:
            kept.append(bytearray(b"x" * 50_000_000))
            time.sleep(0.05)


def _reached() -> int:
    progress = Path(os.environ["HOLDFAST_RUN_DIR"], "attempts", os.environ["HOLDFAST_ATTEMPT"], "progress")
    try:
        return int(progress.read_text())
    except (OSError, ValueError):
        return -1


def build(split: str, seq_len: int, cache_dir: Path | None) -> Faulty:
    slow = float(os.environ.get("SLOW_SAVE_S", "0"))
    finish = commit.Commit.finish
    if slow and not hasattr(finish, "slow"):

        def slowly(self: commit.Commit, *args: Any, **kwargs: Any) -> Any:
            time.sleep(slow)
            return finish(self, *args, **kwargs)

        slowly.slow = True  # type: ignore[attr-defined]
        commit.Commit.finish = slowly  # type: ignore[method-assign]
    return Faulty(open_data("stdlib", seq_len=seq_len, split=split, cache_dir=cache_dir), split)  # type: ignore[arg-type]

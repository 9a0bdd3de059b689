"""This rank's forward passes of a step: the samples of the pure data order, read ahead in a thread.

A read that hangs must not make a process deaf: the loop asks `ready` and goes on listening for a stop in the meantime.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from jobs.settings import Job
from train.data.order import rank_slice, sample_ids
from train.data.sources import Dataset
from train.runtime import Runtime

Batch = dict[str, torch.Tensor]


class Feed:
    """Micro-batches by step. `log` is a file that is told each sample before it is used (setting log_samples)."""

    def __init__(self, job: Job, rt: Runtime, data: Dataset, log: Path | None = None):
        assert job.micro_batch_size is not None
        self._job, self._rt, self._data = job, rt, data
        self._slices = rank_slice(job.batch_size, job.micro_batch_size, rt.world, rt.rank)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._step: int | None = None
        self._batches: Future[list[Batch]] | None = None
        self._told: int | None = None
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644) if log is not None else None

    def ready(self, step: int, wait_s: float) -> bool:
        """Whether the samples of `step` are in memory, or came within `wait_s`. Raises what reading them raised."""
        future = self._fetching(step)
        wait([future], timeout=wait_s)
        if future.done():
            future.result()
        return future.done()

    def of_step(self, step: int) -> Iterator[Batch]:
        """The batches of a step on this rank's device, one per forward pass; the next step's are read meanwhile.

        A step that is tried again gets the same ones again."""
        batches = self._fetching(step).result()
        self._step = None
        if step + 1 < self._job.max_steps:
            self._fetching(step + 1)
        if step != self._told:
            self._tell(step)
            self._told = step
        for batch in batches:
            yield {name: tensor.to(self._rt.device, non_blocking=True) for name, tensor in batch.items()} if self._rt.device.type == "cuda" else batch

    def first(self, step: int) -> Batch:
        """One batch to warm up with; it is not consumed."""
        batch = self._fetching(step).result()[0]
        return {name: tensor.to(self._rt.device) for name, tensor in batch.items()}

    def _fetching(self, step: int) -> "Future[list[Batch]]":
        if self._batches is None or self._step != step:
            self._step, self._batches = step, self._reader.submit(self._read, step)
        return self._batches

    def _ids(self, step: int) -> list[list[int]]:
        ids = sample_ids(step, self._job.batch_size, len(self._data), self._job.seed)
        return [ids[piece].tolist() for piece in self._slices]

    def _read(self, step: int) -> list[Batch]:
        ids = sample_ids(step, self._job.batch_size, len(self._data), self._job.seed)
        batches = [self._data.batch(ids[piece]) for piece in self._slices]
        if self._rt.device.type == "cuda":
            batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
        return batches

    def _tell(self, step: int) -> None:
        """Before the samples are used, so that no kill can hide a use."""
        if self._log is None:
            return
        slots = [slot for piece in self._slices for slot in range(piece.start, piece.stop)]
        ids = [sample for piece in self._ids(step) for sample in piece]
        line = {"attempt": self._rt.attempt, "step": step, "batch": self._job.batch_size, "samples": len(self._data), "slots": slots, "ids": ids}
        os.write(self._log, (json.dumps(line) + "\n").encode())

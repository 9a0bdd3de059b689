"""This rank's forward passes of a step: the samples of the pure data order, read ahead in a thread.

A read that hangs must not make a process deaf: the loop asks `ready` and goes on listening for a stop in the meantime.
With num_workers the thread takes the samples from processes that read further ahead; which samples these are, and in which
order, stays the same.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.config.settings import Job
from jobs.specs.precision import MODES
from train.data.order import rank_slice, sample_ids
from train.data.sources import Dataset
from train.data.workers import Portion, Workers
from train.distributed.runtime import Runtime

Batch = dict[str, torch.Tensor]
# While samples are missing, the ranks ask each other this often whether to stop, seconds.
LISTEN_S = 0.2


class Feed:
    """Micro-batches by step. `log` is a file that is told each sample before it is used (setting log_samples)."""

    def __init__(self, job: Job, rt: Runtime, data: Dataset, log: Path | None = None):
        assert job.micro_batch_size is not None
        self._job, self._rt, self._data = job, rt, data
        self._slices = rank_slice(job.batch_size, job.micro_batch_size, rt.world, rt.rank)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._workers = Workers(data, job) if job.num_workers else None
        self._workers_at: int | None = None
        self._pinned = job.pin_memory and rt.device.type == "cuda"
        # An overflow repeats a step, so its samples stay until the next one begins.
        self._may_repeat = MODES[job.precision].loss_scaling
        self._steps: dict[int, Future[list[Batch]]] = {}
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
        if step + 1 < self._job.max_steps:
            self._fetching(step + 1)
        self._steps = {at: future for at, future in self._steps.items() if at > step or (at == step and self._may_repeat)}
        if step != self._told:
            self._tell(step)
            self._told = step
        for batch in batches:
            yield {name: tensor.to(self._rt.device, non_blocking=True) for name, tensor in batch.items()} if self._rt.device.type == "cuda" else batch

    def first(self, step: int) -> Batch:
        """One batch to warm up with; it is not consumed."""
        batch = self._fetching(step).result()[0]
        return {name: tensor.to(self._rt.device) for name, tensor in batch.items()}

    def close(self) -> None:
        """Ends the reading processes. Does not wait for a read that hangs: they end with this process in any case."""
        if self._workers is not None:
            self._reader.submit(self._workers.close)
        self._reader.shutdown(wait=False)

    def _fetching(self, step: int) -> "Future[list[Batch]]":
        if step not in self._steps:
            self._steps[step] = self._reader.submit(self._read, step)
        return self._steps[step]

    def _portions(self, step: int) -> list[Portion]:
        ids = sample_ids(step, self._job.batch_size, len(self._data), self._job.seed)
        return [Portion(step, piece.start, ids[piece]) for piece in self._slices]

    def _from(self, step: int) -> Iterator[Portion]:
        """Everything that is still to be read, beginning with `step`."""
        # One batch more where all steps are done: the attempt that finishes what is left still warms up with one (`first`).
        for at in range(step, max(step + 1, self._job.max_steps)):
            yield from self._portions(at)

    def _read(self, step: int) -> list[Batch]:
        if self._workers is None:
            batches = [self._data.batch(portion.ids) for portion in self._portions(step)]
        else:
            if self._workers_at != step:
                self._workers.start(self._from(step))
            self._workers_at = None
            batches = [self._workers.next() for _ in self._slices]
            self._workers_at = step + 1
        if self._pinned:
            batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
        return batches

    def _tell(self, step: int) -> None:
        """Before the samples are used, so that no kill can hide a use."""
        if self._log is None:
            return
        slots = [slot for piece in self._slices for slot in range(piece.start, piece.stop)]
        ids = [sample for portion in self._portions(step) for sample in portion.ids.tolist()]
        line = {"attempt": self._rt.attempt, "step": step, "batch": self._job.batch_size, "samples": len(self._data), "slots": slots, "ids": ids}
        os.write(self._log, (json.dumps(line) + "\n").encode())


class ValidationFeed:
    """The samples of validations, one batch at a time, read in a thread for the same reason; not ahead of time, where no process reads:
    samples may draw from the generators that the model draws from."""

    def __init__(self, job: Job, data: Dataset):
        self._data = data
        self._workers = Workers(data, job, persistent=job.persistent_workers) if job.num_workers else None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="validation data")
        self._keep = job.persistent_workers
        self._portions: Sequence[NDArray[np.int64]] = ()
        self._at = 0
        self._coming: Future[Batch] | None = None

    def begin(self, portions: Sequence[NDArray[np.int64]]) -> None:
        """One batch for each of these arrays of ids comes now. What was begun before is dropped."""
        self._portions, self._at, self._coming = portions, 0, None

    def ready(self, wait_s: float) -> bool:
        """Whether the next batch is in memory, or came within `wait_s`; also where there is none. Raises what reading it raised."""
        if self._at >= len(self._portions):
            return True
        future = self._fetching()
        wait([future], timeout=wait_s)
        if future.done():
            future.result()
        return future.done()

    def next(self) -> Batch:
        """The next batch, on the CPU; waits for it."""
        batch = self._fetching().result()
        self._at, self._coming = self._at + 1, None
        return batch

    def end(self) -> None:
        """Ends the reading processes, unless they stay for the next validation."""
        if self._workers is not None and not self._keep:
            self._reader.submit(self._workers.close)

    def close(self) -> None:
        if self._workers is not None:
            self._reader.submit(self._workers.close)
        self._reader.shutdown(wait=False)

    def _fetching(self) -> "Future[Batch]":
        if self._coming is None:
            self._coming = self._reader.submit(self._read, self._portions, self._at)
        return self._coming

    def _read(self, portions: Sequence[NDArray[np.int64]], index: int) -> Batch:
        if self._workers is None:
            return self._data.batch(portions[index])
        if index == 0:
            # Validation is the same at every step: there is no step in what its samples are drawn from.
            self._workers.start([Portion(0, place, ids) for place, ids in enumerate(portions)])
        return self._workers.next()

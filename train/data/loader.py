"""Data loaders for training and validation: a thread reads the micro-batches of this rank ahead of time.

A blocked read must not prevent the rank from seeing a stop request: the loop polls `ready` and syncs the stop flag in between.
With num_workers the thread takes the samples from worker processes that read further ahead; samples and their order stay
the same.
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
from train.distributed.runtime import Distributed

Batch = dict[str, torch.Tensor]
# Seconds between two syncs of the stop flag while samples are missing.
POLL_S = 0.2


class TrainLoader:
    """Micro-batches of this rank by step. `log`: file that lists each sample before it is used (setting log_samples)."""

    def __init__(self, job: Job, rt: Distributed, data: Dataset, log: Path | None = None):
        assert job.micro_batch_size is not None
        self._job, self._rt, self._data = job, rt, data
        self._slices = rank_slice(job.batch_size, job.micro_batch_size, rt.world_size, rt.rank)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._workers = Workers(data, job) if job.num_workers else None
        self._workers_at: int | None = None
        self._pinned = job.pin_memory and rt.device.type == "cuda"
        # An overflow repeats a step, so its samples stay until the next one begins.
        self._may_repeat = MODES[job.precision].loss_scaling
        self._steps: dict[int, Future[list[Batch]]] = {}
        self._logged: int | None = None
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644) if log is not None else None

    def ready(self, step: int, wait_s: float) -> bool:
        """Return whether the samples of `step` are in memory, after waiting for up to `wait_s`. Raises the error of reading them."""
        future = self._fetching(step)
        wait([future], timeout=wait_s)
        if future.done():
            future.result()
        return future.done()

    def take(self, step: int) -> Iterator[Batch]:
        """Yield the batches of a step on this rank's device, one per forward pass; those of the next step are read meanwhile.

        A step that is repeated after an overflow gets the same batches."""
        batches = self._fetching(step).result()
        if step + 1 < self._job.max_steps:
            self._fetching(step + 1)
        self._steps = {at: future for at, future in self._steps.items() if at > step or (at == step and self._may_repeat)}
        if step != self._logged:
            self._log_samples(step)
            self._logged = step
        for batch in batches:
            yield {name: tensor.to(self._rt.device, non_blocking=True) for name, tensor in batch.items()} if self._rt.device.type == "cuda" else batch

    def peek(self, step: int) -> Batch:
        """Return the first batch of a step without consuming it."""
        batch = self._fetching(step).result()[0]
        return {name: tensor.to(self._rt.device) for name, tensor in batch.items()}

    def close(self) -> None:
        """End the worker processes. Does not wait for a blocked read: workers end with this process in any case."""
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
        # One batch more where all steps are done: the attempt that finishes what is left still warms up with one (`peek`).
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

    def _log_samples(self, step: int) -> None:
        """Log the samples before they are used, so that a kill cannot hide a use."""
        if self._log is None:
            return
        slots = [slot for piece in self._slices for slot in range(piece.start, piece.stop)]
        ids = [sample for portion in self._portions(step) for sample in portion.ids.tolist()]
        line = {"attempt": self._rt.attempt, "step": step, "batch": self._job.batch_size, "samples": len(self._data), "slots": slots, "ids": ids}
        os.write(self._log, (json.dumps(line) + "\n").encode())


class ValidationLoader:
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

"""Processes that read samples (setting num_workers): for data whose reading is work for Python, such as decoding images.

torch's DataLoader does the carrying: shared memory, reading ahead, the order of results. What it is asked to read is our own
list, so its samplers and its state have no say in which samples come, and a resume needs nothing of it.

A batch is read with the global generators seeded by step and place in the batch, so augmentation that draws from them is a
function of these too, whichever process reads and however often the run was interrupted. (A thread cannot have that: it
shares the generators with training.)
"""

import ctypes
import faulthandler
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from jobs.config.settings import Job
from jobs.core.contract import STACKS_SIGNAL, STOP_SIGNALS
from jobs.core.errors import DataWorkerError, HoldfastError
from train.data.sources import Dataset
from train.rng import seed_everything

Batch = dict[str, torch.Tensor]
# Dropout draws from stream `rank`; samples must not draw the same numbers.
_STREAMS_OF_DATA = 1 << 32
_PR_SET_PDEATHSIG = 1
_NOT_FOR_WORKERS = (*STOP_SIGNALS, signal.SIGINT)
# Seconds that a worker may take to be dead when its connection already is.
_GRACE_S = 2.0


@dataclass(frozen=True)
class Portion:
    """What one forward pass reads: samples `ids` of `step`, the first of which has place `slot` in the global batch."""

    step: int
    slot: int
    ids: NDArray[np.int64]


class Workers:
    """The reading processes of one rank, for one data set. Must be used from one thread, and not from the main one: there
    torch would raise the death of a worker wherever training happens to be."""

    def __init__(self, data: Dataset, job: Job, *, persistent: bool = False):
        self._job, self._persistent = job, persistent
        self._data = _Reading(data, job.seed)
        self._order = _Order()
        self._loader: DataLoader[Any] | None = None
        self._batches: Any = None

    def start(self, portions: Iterator[Portion] | Sequence[Portion]) -> None:
        """Begins to read these, in this order. What was begun before is dropped."""
        self._order.portions = portions
        if self._loader is None or not self._persistent:
            self._batches = None  # ends the processes of the one before
            self._loader = DataLoader(
                self._data, sampler=self._order, batch_size=None, num_workers=self._job.num_workers, prefetch_factor=self._job.prefetch_factor,
                persistent_workers=self._persistent, worker_init_fn=partial(_become_worker, os.getpid()),
                # fork: a memory map is shared and not copied, and a data set need not be picklable. Workers never touch the GPU.
                multiprocessing_context="fork",
                # Its own: DataLoader would draw a number from the generator that dropout draws from.
                generator=torch.Generator(),
            )  # fmt: skip
        with _signals_held():
            self._batches = iter(self._loader)

    def next(self) -> Batch:
        """The next batch. Raises what reading it raised, DataWorkerError when a worker is gone."""
        try:
            batch = next(self._batches)
        except Exception as err:
            # A worker that is gone shows as a RuntimeError of DataLoader's, or as a broken connection to tensors that it had
            # sent; an error of the data comes from one that lives.
            workers = getattr(self._batches, "_workers", [])
            if isinstance(err, (OSError, EOFError)):
                gone = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=_GRACE_S)
                for worker in workers:
                    if worker.sentinel in gone:
                        # A process that ends closes its files a moment before anybody can learn how it ended.
                        worker.join(_GRACE_S)
            dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
            if not dead:
                raise
            raise DataWorkerError(f"a process that reads samples is gone: {', '.join(map(_end_of, dead))}. {_advice(dead)}") from err
        if isinstance(batch, HoldfastError):
            raise batch
        return batch  # type: ignore[no-any-return]

    def close(self) -> None:
        self._batches = self._loader = None


class _Order:
    """What DataLoader takes for a sampler."""

    portions: Iterator[Portion] | Sequence[Portion] = ()

    def __iter__(self) -> Iterator[Portion]:
        return iter(self.portions)


class _Reading(torch.utils.data.Dataset[Any]):
    """What DataLoader takes for a data set: portions go in, batches come out."""

    def __init__(self, data: Dataset, seed: int):
        self._data, self._seed = data, seed

    def __getitem__(self, portion: Portion) -> Batch | HoldfastError:
        seed_everything(self._seed, portion.step, _STREAMS_OF_DATA + portion.slot)
        try:
            return self._data.batch(portion.ids)
        except HoldfastError as err:
            return err  # as it is: DataLoader would wrap its message into a traceback


@contextmanager
def _signals_held() -> Iterator[None]:
    """What is forked meanwhile is told to stop only when it has become a worker: before that torch gives a worker a handler of its own
    for TERM, of which it dies. This process still hears everything, in its main thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _become_worker(rank: int, number: int) -> None:
    """In the forked process; `rank` is the process that it reads for."""
    # Slurm tells every process of a step to stop. The rank does, at the end of a step for which it needs us.
    for name in _NOT_FOR_WORKERS:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOT_FOR_WORKERS)
    # The stacks that the watchdog asks for are those of ranks.
    faulthandler.unregister(STACKS_SIGNAL)
    if sys.platform == "linux":
        # A rank that is killed takes its readers along at once; torch's own check comes every five seconds.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank:
        # It died before that: no signal will come, and torch, which looks for a change of the parent from here on, would see none for ever.
        os._exit(0)


def _end_of(worker: Any) -> str:
    if worker.exitcode < 0:
        return f"{worker.name} (process {worker.pid}) was killed by {signal.Signals(-worker.exitcode).name}"
    return f"{worker.name} (process {worker.pid}) left with code {worker.exitcode}"


def _advice(dead: list[Any]) -> str:
    if any(worker.exitcode == -signal.SIGKILL for worker in dead):
        return "SIGKILL usually means that the node was out of memory: fewer NUM_WORKERS, a smaller PREFETCH_FACTOR, or more MEM_GB."
    if any(worker.exitcode == -signal.SIGBUS for worker in dead):
        return "SIGBUS usually means that /dev/shm is full: mount a larger one into the container, or fewer NUM_WORKERS."
    return "Its last words are in this rank's log; NUM_WORKERS=0 reads in the training process, where a traceback shows more."

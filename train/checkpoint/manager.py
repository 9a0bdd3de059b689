"""Asynchronous checkpoint writer: host staging, background commit, error handling.

A save copies the state to host memory, which training waits for, and a thread writes it to disk. At most one save is in
flight; the next one, a stop and the end wait for it. Under DDP rank 0 writes; under FSDP every rank writes its shards, and the
writers communicate over a process group of their own, so that the thread never meets a collective of training.

A full or failing disk does not end training: it is logged and recorded in the event log, and earlier checkpoints stay.
The last save of an attempt must succeed; any other error is raised at the next step.
"""

import errno
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from jobs.checkpoint import directory
from jobs.checkpoint.commit import DISK, Commit, Disk, amend, prune
from jobs.checkpoint.directory import FileEntry
from jobs.config.settings import Job
from jobs.core.contract import Event
from jobs.core.errors import CheckpointError, RunOwnedError
from jobs.run import claim, event_log
from jobs.run.rundir import RunDir
from train.checkpoint import state_dict
from train.checkpoint.host_staging import PinnedPool
from train.checkpoint.interval import YoungInterval
from train.checkpoint.state_dict import TensorShard, TrainStateRecord
from train.distributed.runtime import Distributed

# Files that are written at a time, each with a thread that hashes beside it.
_WRITERS = 4
# (errno, message) of a storage error, as it travels between the ranks.
_Problem = tuple[int | None, str]


@dataclass
class _Save:
    """A save in flight. `parts` maps a file's name to its bytes in host memory."""

    state: TrainStateRecord
    parts: dict[str, list[bytes | memoryview]]
    begun: float
    blocked: float
    blocking: bool
    writers: int


class CheckpointManager:
    """Checkpoints of one attempt. `saved` is the step of the newest checkpoint known to be committed, None before the first."""

    def __init__(
        self,
        run: RunDir,
        job: Job,
        rt: Distributed,
        say: Callable[[str], None],
        *,
        sharded: bool,
        saved: int | None,
        interval: YoungInterval | None = None,
        disk: Disk = DISK,
    ):
        """`interval`: None where no save is due by the time."""
        self._run, self._job, self._rt, self._say, self._disk = run, job, rt, say, disk
        self._sharded, self._interval = sharded, interval
        # Its own group: the thread's messages must not mix with those of training.
        self._group = dist.new_group(backend="gloo") if sharded and rt.world_size > 1 else None
        self._memory = PinnedPool(pinned=rt.device.type == "cuda")
        self._thread: threading.Thread | None = None
        self._reserving: threading.Thread | None = None
        self._wanted = threading.Event()
        self._error: BaseException | None = None
        self.saved = saved
        self.last_seconds: float | None = None
        self.last_blocked: float | None = None
        self.failures = 0

    def is_due(self, step: int) -> bool:
        """Whether rank 0 wants a save now because of CHECKPOINT_EVERY=auto; False on the other ranks, and while a save is in flight."""
        return self._rt.is_main and not self.busy and self._interval is not None and self._interval.due(step, self)

    def restart_interval(self) -> None:
        """A save was begun: the time until the next one counts from now."""
        if self._interval is not None:
            self._interval.saved()

    def preallocate(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Allocate the host buffers in a thread before the first save needs them. Pinning takes about 0.6 s for a GB and blocks kernel launches
        (benchmarks/results/2026-11-28-speed.md), so the thread pauses twice as long as each buffer took, until a save needs the memory."""
        if not self._writes:
            return
        wanted = [
            (file, name, rows.tensor.shape, state_dict.host_type(file, rows.tensor))
            for file, tensors in state_dict.local_shards(model, optimizer, self._rt.rank, self._writers).items()
            for name, rows in tensors.items()
        ]

        def take() -> None:
            with suppress(Exception):  # what is missing is taken, or raised, by the save that needs it
                for one in wanted:
                    begun = time.monotonic()
                    self._memory.buffer(*one)
                    self._wanted.wait(2 * (time.monotonic() - begun))

        self._reserving = threading.Thread(target=take, name="reserve", daemon=True)
        self._reserving.start()

    def save(self, state: TrainStateRecord, model: nn.Module, optimizer: torch.optim.Optimizer, *, blocking: bool = False) -> None:
        """Save this state; in the background unless `blocking`, in which case failure raises CheckpointError."""
        begun = time.monotonic()
        self.join()
        if not self._writes:
            self.saved = state.step
            return
        parts = self._stage(model, optimizer)
        save = _Save(state, parts, begun, time.monotonic() - begun, blocking, self._writers)
        if blocking or not self._job.async_save:
            self._write(save, background=False)
            self.poll()
        else:
            self._thread = threading.Thread(target=self._write, args=(save,), kwargs={"background": True}, name="save", daemon=True)
            self._thread.start()

    def amend_val_loss(self, step: int, val_loss: float | None) -> None:
        """Write a validation loss into a checkpoint that was saved during its validation: from now on it may be kept as one of the best."""
        if not self._rt.is_main:
            return
        self._check_claim()
        try:
            amend(directory.path_of(self._run.checkpoints, step), val_loss=val_loss, pending=None)
        except (OSError, CheckpointError) as err:
            self._say(f"  WARNING: val_loss {val_loss} could not be written into the checkpoint of step {step}: {err}")

    def poll(self) -> None:
        """Raise the error of a background save, if there was one since the last call."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Wait for the save in flight, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def _writes(self) -> bool:
        return self._sharded or self._rt.is_main

    @property
    def _writers(self) -> int:
        return self._rt.world_size if self._sharded else 1

    def _stage(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[bytes | memoryview]]:
        self._wanted.set()
        if self._reserving is not None:
            self._reserving.join()
        parts: dict[str, dict[str, TensorShard]] = {}
        for file, tensors in state_dict.local_shards(model, optimizer, self._rt.rank, self._writers).items():
            copies = parts[file] = {}
            for name, rows in tensors.items():
                buffer = self._memory.buffer(file, name, rows.tensor.shape, state_dict.host_type(file, rows.tensor))
                buffer.copy_(rows.tensor, non_blocking=True)
                copies[name] = TensorShard(buffer, rows.start, rows.total)
        if self._rt.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return {name: state_dict.safetensors_parts(copies) for name, copies in parts.items()}

    def _write(self, save: _Save, background: bool) -> None:
        """Body of the thread: stores every exception in `_error`."""
        step = save.state.step
        try:
            problem = self._commit(save)
            if problem is None:
                self._acknowledge(save, background)
                return
            code, text = problem
            message = f"checkpoint of step {step} could not be written to {self._run.checkpoints}: {text}. The ones before it are untouched."
            if save.blocking:
                raise _with_errno(CheckpointError(message), code)
            self.failures += 1
            self._say(f"  WARNING: {message} Training goes on.")
            if self._rt.is_main:
                with suppress(OSError):
                    event_log.append(
                        self._run.ledger,
                        Event.SAVE_FAILED,
                        attempt=self._rt.attempt,
                        job_id=self._rt.job_id,
                        step=step,
                        errno=errno.errorcode.get(code or 0),
                        reason=text,
                    )
        except BaseException as err:
            self._error = err

    def _acknowledge(self, save: _Save, background: bool) -> None:
        step = save.state.step
        seconds = time.monotonic() - save.begun
        self.saved, self.last_seconds = step, seconds
        self.last_blocked = save.blocked if background else seconds
        if not self._rt.is_main:
            return
        size = sum(memoryview(part).nbytes for parts in save.parts.values() for part in parts)
        try:
            event_log.append(
                self._run.ledger, Event.CHECKPOINT, attempt=self._rt.attempt, job_id=self._rt.job_id, step=step,
                seconds=round(seconds, 3), blocked_s=round(self.last_blocked, 4), bytes=size * save.writers,
            )  # fmt: skip
        except OSError as err:
            # The checkpoint is there and verifies; the line is a hint.
            self._say(f"  WARNING: checkpoint of step {step} is complete, but the ledger could not be written: {err.strerror}")
        if claim.superseded(self._run, self._rt.attempt):
            return  # the later attempt may be reading the one that would go
        doomed = directory.to_prune(self._run.checkpoints, self._job.keep_last, self._job.keep_every, self._job.keep_best)
        for problem in prune(doomed, self._disk):
            self._say(f"  WARNING: old checkpoint {problem}")

    def _commit(self, save: _Save) -> _Problem | None:
        """The protocol of jobs/checkpoint/commit.py over all writers. None when the checkpoint is complete, the same on every rank."""
        commit = Commit(self._run.checkpoints, save.state.step, self._rt.attempt, self._disk)
        there, problem = False, None
        if self._rt.is_main:
            there, problem = self._begin(commit, save)
        there, problem = self._broadcast((there, problem))
        if there or problem:
            return problem
        files: dict[str, FileEntry] = {}
        try:
            with ThreadPoolExecutor(_WRITERS) as pool:
                files = dict(zip(save.parts, pool.map(commit.write, save.parts, save.parts.values()), strict=True))
        except OSError as err:
            problem = _problem(err)
        reports = self._gather((files, problem))
        if self._rt.is_main:
            problem = next((said for _, said in reports if said), None)
            if problem is None:
                try:
                    self._check_claim()
                    commit.finish({name: entry for found, _ in reports for name, entry in found.items()}, save.state.plain())
                except OSError as err:
                    problem = _problem(err)
            if problem:
                commit.abandon()
        return self._broadcast(problem)

    def _begin(self, commit: Commit, save: _Save) -> tuple[bool, _Problem | None]:
        self._check_claim()
        try:
            if commit.already_there():
                return True, None
            self._check_room(save)
            commit.begin()
        except OSError as err:
            return False, _problem(err)
        return False, None

    def _check_room(self, save: _Save) -> None:
        """Raises OSError before anything is written where it could not be finished."""
        # Beside the bytes themselves: what a file system needs for them, and the manifest.
        need = sum(memoryview(part).nbytes for parts in save.parts.values() for part in parts) * save.writers * 1.01 + 2**16
        folder = self._run.checkpoints if self._run.checkpoints.is_dir() else self._run.path
        free = shutil.disk_usage(folder).free
        if free < need:
            keep = f" KEEP_LAST={self._job.keep_last} needs room for {self._job.keep_last + 1}." if self._job.keep_last > 1 else ""
            raise OSError(errno.ENOSPC, f"it needs {directory.size_text(need)}, the disk has {directory.size_text(free)} left.{keep}".rstrip("."))

    def _check_claim(self) -> None:
        """Raise RunOwnedError when a later attempt has claimed the run: this one is superseded and must not write."""
        if claim.superseded(self._run, self._rt.attempt):
            raise RunOwnedError(f"a later attempt has taken over this run; attempt {self._rt.attempt} writes no more checkpoints")

    def _broadcast(self, value: Any) -> Any:
        """Broadcast rank 0's value to all writers."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _gather(self, value: Any) -> list[Any]:
        """Gather every writer's value on rank 0."""
        if self._group is None:
            return [value]
        found = [None] * self._rt.world_size if self._rt.is_main else None
        dist.gather_object(value, found, dst=0, group=self._group)
        return found or []


def _problem(err: OSError) -> _Problem:
    return err.errno, err.strerror or str(err)


def _with_errno(error: CheckpointError, code: int | None) -> CheckpointError:
    error.errno = code  # type: ignore[attr-defined]
    return error

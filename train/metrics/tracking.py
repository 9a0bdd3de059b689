"""Metrics to the trackers that people look at, through Accelerate's classes, beside metrics.jsonl.

A tracker is a convenience: it runs in a thread of its own on rank 0, is handed each line through a bounded queue, and whatever it
does (fails to import, finds no network, meets a full disk, hangs) costs one warning and never the training. All attempts of a run
are one run to it: TensorBoard gets one folder, in which steps that will be made again are purged; wandb gets the run's id.
"""

import importlib.util
import os
import queue
import signal
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jobs.config import secrets_scan
from jobs.config.settings import Job
from jobs.config.types import AUTO_TRACKER
from jobs.core.contract import STOP_SIGNALS
from jobs.run.rundir import RunDir

# Lines that may wait for a slow tracker. A line comes every LOG_EVERY steps; this is hours of a tracker that hangs.
_MOST_WAITING = 1000
# Seconds that the end of training waits for trackers to write what they have: little where a kill may follow.
_FINISH_S = 15.0
_STOP_S = 2.0
_NOT_TRACKED = frozenset({"step", "attempt", "time"})


class Trackers:
    """The trackers of a run, on rank 0. `kept` is the last step whose line stays in metrics.jsonl; `say` prints to the log."""

    def __init__(self, job: Job, run: RunDir, kept: int, say: Callable[[str], None]):
        self._job, self._run, self._kept, self._say = job, run, kept, say
        self._lines: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._full = False
        self._names = chosen(job)
        self._thread: threading.Thread | None = None
        if self._names:
            # Read by wandb when it is imported. Compute nodes rarely reach the network, and one that cannot would wait for it.
            os.environ.setdefault("WANDB_MODE", "offline")
            self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
            self._thread.start()

    def log(self, line: Mapping[str, Any]) -> None:
        """Hands a line of metrics on. Returns at once."""
        if self._thread is None:
            return
        try:
            self._lines.put_nowait(dict(line))
        except queue.Full:
            if not self._full:
                self._full = True
                self._say(f"  WARNING: {' and '.join(self._names)} cannot keep up; lines are left out there. metrics.jsonl has all of them.")

    def close(self, *, stopped: bool) -> None:
        """Waits a little for what was handed on; less where the run was asked to stop."""
        if self._thread is None:
            return
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(_STOP_S if stopped else _FINISH_S)
        if self._thread.is_alive() and not stopped:
            self._say(f"  WARNING: {' and '.join(self._names)} did not finish within {_FINISH_S:.0f} s; metrics.jsonl has every line")

    def _work(self) -> None:
        """The thread. No error leaves it."""
        # Inherited by wandb's own process: Slurm sends the warning to every process of the step, and it would die of it with
        # what it has not written yet.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        living: dict[str, Any] = {}
        for name in self._names:
            self._try(living, name, partial(lambda name: living.__setitem__(name, self._start(name)), name))
        while living and (line := self._lines.get()) is not None:
            values = {key: value for key, value in line.items() if key not in _NOT_TRACKED}
            for name in list(living):
                self._try(living, name, partial(living[name].log, values, step=int(line["step"])))
        for name in list(living):
            self._try(living, name, living[name].finish)

    def _try(self, living: dict[str, Any], name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as err:  # wandb leaves by SystemExit where it wants a key
            living.pop(name, None)
            said = " ".join(str(err).split())[:300]
            for key, value in secrets_scan.secrets_of(os.environ).items():
                said = said.replace(value, f"<{key}>")
            self._say(
                f"  WARNING: tracker {name} is off from here: {type(err).__name__}: {secrets_scan.masked(said)}. Training goes on; metrics.jsonl has every line."
            )

    def _start(self, name: str) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        run, job = self._run, self._job
        if name == "tensorboard":
            again = {"purge_step": self._kept + 1} if run.tensorboard.is_dir() else {}
            tracker = kind(run.tensorboard.name, run.tensorboard.parent, **again)
        elif name == "wandb":
            tracker = kind(os.environ.get("WANDB_PROJECT") or job.job_name, **self._wandb())
        elif kind.requires_logging_directory:
            tracker = kind(run.id, run.path / name)
        else:
            tracker = kind(run.id)
        tracker.start()
        if name == "wandb" and os.environ["WANDB_MODE"] == "online":
            self._say(f"  wandb: {tracker.run.url}")
        elif name not in ("tensorboard", "wandb"):
            tracker.store_init_configuration(_config(job))
        return tracker

    def _wandb(self) -> dict[str, Any]:
        import wandb

        mode = os.environ["WANDB_MODE"]
        if mode == "offline" and self._kept == 0:
            self._say(
                f"  wandb is offline on this node; to send what it wrote: wandb sync {self._run.wandb}/offline-run-*    (WANDB_MODE=online sends at once)"
            )
        # The terminal's text is in logs/ and the code in code/: neither is sent, and nothing is read from a repository around.
        settings = wandb.Settings(console=os.environ.get("WANDB_CONSOLE", "off"), silent=True, disable_git=True, disable_code=True, save_code=False)
        same = {} if mode == "offline" else {"resume": "allow"}
        return {
            "id": self._run.id,
            "name": self._run.id,
            "group": self._job.job_name,
            "dir": str(self._run.path),
            "config": _config(self._job),
            "settings": settings,
            **same,
        }


def chosen(job: Job) -> tuple[str, ...]:
    """The trackers of a job: what was named, or for the word auto TensorBoard where it is installed."""
    if job.trackers != (AUTO_TRACKER,):
        return job.trackers
    return ("tensorboard",) if importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX") else ()


def _config(job: Job) -> dict[str, Any]:
    """The settings as a tracker may have them: plain values, without what could hold a secret."""
    return {
        name: value if isinstance(value, bool | int | float) else secrets_scan.masked(job.text(name))
        for name, value in job.model_dump().items()
        if name not in ("node_env", "entry_args")
    }

"""Log lines of a run: metrics.jsonl, trackers and the text log."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.config.settings import Job
from jobs.run.metrics_log import cut_back
from train.distributed.runtime import Distributed
from train.metrics.throughput import Throughput, progress_text
from train.metrics.tracking import Trackers
from train.train_state import TrainState

Metrics = dict[str, Any]


class MetricsLogger:
    """Writes each log line to metrics.jsonl, to the trackers and to the text log, on rank 0. The other ranks have neither file nor trackers."""

    def __init__(
        self,
        job: Job,
        dist: Distributed,
        file: "MetricsFile | None",
        trackers: Trackers | None,
        throughput: Throughput,
        say: Callable[[str], None],
        tokens: int = 0,
    ):
        """`tokens`: targets trained on before this attempt."""
        self.throughput = throughput
        self._attempt, self._max_steps = dist.attempt, job.max_steps
        self._file, self._trackers, self._say = file, trackers, say
        self._logged_tokens = tokens

    def line(self, state: TrainState, loss: float, lr: float, grad_norm: float) -> Metrics:
        """The values of a log line, with the speed since the line before."""
        targets, self._logged_tokens = state.tokens - self._logged_tokens, state.tokens
        return {
            "step": state.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": state.tokens,
            **self.throughput.values(targets),
            "attempt": self._attempt,
            "time": round(time.time(), 3),
        }

    def log(self, line: Metrics) -> None:
        if self._file is not None:
            self._file.write(**line)
        if self._trackers is not None:
            self._trackers.log(line)
        self._say(progress_text(line, self._max_steps))

    def sync(self) -> bool:
        """Flush metrics.jsonl to disk: a checkpoint must not be newer than the metrics before it. False where the disk refuses, with a warning."""
        try:
            if self._file is not None:
                self._file.sync()
        except OSError as err:
            self._say(f"  WARNING: metrics could not be flushed to disk: {err.strerror}")
            return False
        return True

    def close(self, *, stopped: bool) -> None:
        if self._file is not None:
            self._file.close()
        if self._trackers is not None:
            self._trackers.close(stopped=stopped)


class MetricsFile:
    """metrics.jsonl: one line per logged step, without duplicates over all attempts. Lines after the step that is resumed from are removed;
    with `again`, also the line of that step, because it will be written once more."""

    def __init__(self, path: Path, resumed_step: int, again: bool = False):
        self.path = path
        cut_back(path, resumed_step - again)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting = b""

    def write(self, **values: Any) -> None:
        """Append one line with one write. What a full disk refuses is kept, and written before the next line."""
        self._waiting += (json.dumps({name: _finite(value) for name, value in values.items()}, allow_nan=False) + "\n").encode()
        try:
            self._flush()
        except OSError:
            pass  # sync() reports it

    def sync(self) -> None:
        """Flush to disk. Raises OSError."""
        self._flush()
        os.fsync(self._fd)

    def close(self) -> None:
        self._flush()
        os.close(self._fd)

    def _flush(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._fd, self._waiting) :]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

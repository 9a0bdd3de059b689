"""metrics.jsonl: one line per logged step, kept without duplicates over all attempts."""

import json
import math
import os
from pathlib import Path
from typing import Any

from jobs.run.metrics_log import cut_back


class MetricsLog:
    """The metrics of a run, written by rank 0. Lines after the step that is resumed from are taken out first; with
    `again`, that step's own line too, because it is about to be written once more."""

    def __init__(self, path: Path, resumed_step: int, again: bool = False):
        self.path = path
        cut_back(path, resumed_step - again)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting = b""

    def write(self, **values: Any) -> None:
        """Appends one line with one write. What a full disk refuses is kept, and written before the next line."""
        self._waiting += (json.dumps({name: _finite(value) for name, value in values.items()}, allow_nan=False) + "\n").encode()
        try:
            self._flush()
        except OSError:
            pass  # sync() says so

    def sync(self) -> None:
        """To disk: a checkpoint must not be newer than the metrics that lead up to it. Raises OSError."""
        self._flush()
        os.fsync(self._fd)

    def close(self) -> None:
        self._flush()
        os.close(self._fd)

    def _flush(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._fd, self._waiting) :]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for a number that is not one."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

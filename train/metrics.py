"""metrics.jsonl: one line per logged step, kept without duplicates over all attempts."""

import json
import os
from pathlib import Path
from typing import Any

from jobs.metrics import read


class MetricsLog:
    """The metrics of a run, written by rank 0. Lines after the step that is resumed from are taken out first."""

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        self._drop_after(resumed_step)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, **values: Any) -> None:
        """Appends one line with one write."""
        os.write(self._fd, (json.dumps(values) + "\n").encode())

    def sync(self) -> None:
        """To disk: a checkpoint must not be newer than the metrics that lead up to it."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _drop_after(self, step: int) -> None:
        """Steps behind the checkpoint will be trained again; a torn last line goes too. Written aside, then renamed."""
        if not self.path.exists():
            return
        kept = [line for line in read(self.path) if int(line["step"]) <= step]
        aside = self.path.with_suffix(".tmp")
        with open(aside, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path)

"""All numbers of metrics.jsonl by name, in memory that a file of some 100 MB allows: arrays of numbers, and steps and times once for all names."""

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.core.errors import DamagedFileError

NUMBERS = (int, float)
_MOST_NAMES = 1000
# The entropy of the validation bytes is one and the same number in every line; TFLOP/s and share of peak are one curve.
NOT_DRAWN = frozenset({"step", "time", "attempt", "tokens", "growth_tracker", "tflops", "val_entropy_bits_per_byte"})


@dataclass
class Column:
    """What was logged under one name, in order: values, and of each the line that it stands in."""

    lines: "Lines"
    at: "array[int]" = field(default_factory=lambda: array("I"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def step(self, index: int) -> float:
        step = self.lines.steps[self.at[index]]
        return int(step) if step.is_integer() else step

    def time(self, index: int) -> float | None:
        """Unix time; None where it was not logged."""
        moment = self.lines.times[self.at[index]]
        return None if math.isnan(moment) else moment

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]


@dataclass
class Lines:
    """Step and Unix time (NaN where not logged) of each line. Arrays: a file of 100 MB has millions of numbers."""

    steps: "array[float]" = field(default_factory=lambda: array("d"))
    times: "array[float]" = field(default_factory=lambda: array("d"))


def columns_of(lines: Iterable[Mapping[str, Any]], path: Path) -> dict[str, Column]:
    """All numbers of metrics.jsonl by name. `type() in`, because a bool is an int to isinstance, and because there may be millions.

    Raises DamagedFileError for more names than any training logs."""
    columns: dict[str, Column] = {}
    shared = Lines()
    for number, line in enumerate(lines):
        moment = line.get("time")
        shared.steps.append(line["step"])
        shared.times.append(math.nan if moment is None else moment)
        for key, value in line.items():
            if type(value) in NUMBERS and key not in NOT_DRAWN:
                column = columns.get(key)
                if column is None:
                    if len(columns) == _MOST_NAMES:
                        raise DamagedFileError(f"{path}: has values under more than {_MOST_NAMES:,} names")
                    column = columns[key] = Column(shared)
                column.at.append(number)
                column.values.append(value)
    return columns

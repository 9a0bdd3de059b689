"""Reading metrics.jsonl: the launcher shows what training wrote. And cutting it back, where steps are trained again."""

import json
from pathlib import Path
from typing import Any

from jobs.core.atomic_write import replace_file

# Longer than any line that training writes today; a longer one only costs another look.
_BLOCK = 1024


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines, in order."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    return [values for line in lines if (values := _values(line)) is not None]


def tail(path: Path, count: int = 1) -> list[dict[str, Any]]:
    """The last `count` whole lines, in order, without reading what lies before them."""
    block = _BLOCK * max(count, 1)
    while True:
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                begin = max(size - block, 0)
                file.seek(begin)
                found = file.read(size - begin).split(b"\n")
        except OSError:
            return []
        lines: list[dict[str, Any]] = []
        # What the block begins within is no whole line.
        for line in reversed(found[1:] if begin else found):
            values = _values(line)
            if values is not None:
                lines.append(values)
                if len(lines) == count:
                    break
        if len(lines) == count or not begin:
            return lines[::-1]
        block *= 8


def sample(path: Path, points: int) -> list[dict[str, Any]]:
    """About so many whole lines, evenly spaced over the file, the last one among them: a curve of a file of any length."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size <= points * _BLOCK * 2:
                return read(path)
            lines = []
            for index in range(points - 1):
                file.seek(size * index // (points - 1))
                # The first line may be cut in two; at the beginning of the file it is not.
                found = file.read(_BLOCK * 2).split(b"\n")[1 if index else 0 : -1]
                values = next((values for line in found if (values := _values(line)) is not None), None)
                if values is not None:
                    lines.append(values)
    except OSError:
        return []
    return [*lines, *tail(path)]


def _values(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and "step" in values else None


def cut_back(path: Path, step: int) -> None:
    """Takes out the lines after a step, and a torn last line: those steps will be trained again."""
    if not path.exists():
        return
    kept = [line for line in read(path) if int(line["step"]) <= step]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))

"""Reading metrics.jsonl: the launcher shows what training wrote. And cutting it back, where steps are trained again."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.core import safe_read
from jobs.core.atomic_write import replace_file
from jobs.core.errors import DamagedFileError
from jobs.core.safe_read import is_count, is_number, is_time

# Longer than any line that training writes today; a longer one only costs another look.
_BLOCK = 1024
# Bytes that are read of a whole file, and of its end in search of whole lines.
LIMIT, _TAIL = 2**30, 2 * 2**20
# Names whose values are shown and calculated with. NaN and infinity are values of a loss.
NUMBERS = frozenset({"loss", "val_loss", "lr", "tokens_per_s", "peak_pct", "gpu_memory_gib", "grad_norm"})


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines, in order. Raises DamagedFileError as `lines` does."""
    return list(lines(path))


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Each whole line, in order, without holding the others in memory; none where there is no file. Lines that are no metrics are left out.

    Raises DamagedFileError for a file that cannot be read and for a line whose values have wrong types."""
    try:
        for number, line in safe_read.lines(path, LIMIT):
            values = _values(line, path, f"line {number}")
            if values is not None:
                yield values
    except FileNotFoundError:
        return


def tail(path: Path, count: int = 1) -> list[dict[str, Any]]:
    """The last `count` whole lines, in order, without reading what lies before them. Raises DamagedFileError as `lines` does, and where
    the last megabytes hold no whole line."""
    block = _BLOCK * max(count, 1)
    while True:
        try:
            with safe_read.open_file(path) as file:
                size = file.seek(0, os.SEEK_END)
                begin = max(size - block, 0)
                file.seek(begin)
                block_lines = _read(file, path, size - begin).split(b"\n")
        except FileNotFoundError:
            return []
        whole: list[dict[str, Any]] = []
        # What the block begins within is no whole line.
        for line in reversed(block_lines[1:] if begin else block_lines):
            values = _values(line, path, "one of its last lines")
            if values is not None:
                whole.append(values)
                if len(whole) == count:
                    break
        if len(whole) == count or not begin:
            return whole[::-1]
        if block >= _TAIL:
            if not whole:
                raise DamagedFileError(f"{path}: its last {_TAIL:,} bytes hold no whole line")
            return whole[::-1]
        block = min(block * 8, _TAIL)


def check_content(path: Path) -> None:
    """Raises DamagedFileError for a file that holds something else than metrics; one that is missing, empty or torn in its first line may be."""
    with suppress(FileNotFoundError):
        for number, line in safe_read.lines(path, LIMIT):
            if _values(line, path, f"line {number}") is not None:
                return
            if not safe_read.is_torn(line, b'{"step":'):
                raise DamagedFileError(f"{path}: line {number} holds no metrics")


def _read(file: Any, path: Path, count: int) -> bytes:
    """Exactly `count` bytes, fewer at the end of the file: one read of a file that is not buffered may return less."""
    parts = []
    while count > 0 and (part := safe_read.read_some(file, path, count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def sample(path: Path, points: int) -> list[dict[str, Any]]:
    """About so many whole lines, evenly spaced over the file, the last one among them: a curve of a file of any length.

    Raises DamagedFileError as `lines` does."""
    try:
        with safe_read.open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            if size <= points * _BLOCK * 2:
                return read(path)
            chosen = []
            for index in range(points - 1):
                file.seek(size * index // (points - 1))
                # The first line may be cut in two; at the beginning of the file it is not.
                block_lines = _read(file, path, _BLOCK * 2).split(b"\n")[1 if index else 0 : -1]
                values = next((values for line in block_lines if (values := _values(line, path, "a line")) is not None), None)
                if values is not None:
                    chosen.append(values)
    except FileNotFoundError:
        return []
    return [*chosen, *tail(path)]


def _values(line: bytes, path: Path, where: str) -> dict[str, Any] | None:
    if len(line) < len('{"step":'):  # also an empty line
        return None
    if len(line) > safe_read.LINE:
        raise DamagedFileError(f"{path}: {where} is longer than {safe_read.LINE:,} bytes")
    values = safe_read.parse_line(line, f"{path}: {where}")
    if values is None or "step" not in values:
        return None
    step = values["step"]
    if not is_number(step) or abs(step) > safe_read.MAX_INT:
        raise _wrong(path, where, "step", step, "a finite number")
    for name, value in values.items():
        if name in NUMBERS and value is not None and type(value) not in (int, float):
            raise _wrong(path, where, name, value, "a number, or null")
    if not is_time(values.get("time", 0)) and values["time"] is not None:
        raise _wrong(path, where, "time", values["time"], "a time in Unix seconds")
    if not is_count(values.get("attempt", 0)) and values["attempt"] is not None:
        raise _wrong(path, where, "attempt", values["attempt"], "a whole number from 0")
    return values


def _wrong(path: Path, where: str, name: str, value: object, allowed: str) -> DamagedFileError:
    return DamagedFileError(f"{path}: {where}: {name} is {safe_read.describe(value)}; allowed: {allowed}")


def cut_back(path: Path, step: int) -> None:
    """Takes out the lines after a step, and a torn last line: those steps will be trained again."""
    if not path.exists():
        return
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines(path) if int(line["step"]) <= step))

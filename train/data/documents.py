"""Documents out of files: text, JSON lines, parquet, and data sets of the `datasets` library on disk, one at a time.

A text file is one document; elsewhere a document is a row. Every fault is told with its file and line.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.core.errors import SettingError
from train.data.saved import load_splits, no_column
from train.data.tokens import missing_file

_JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_SAVED = ("dataset_dict.json", "state.json")
_ROWS = 1000


@dataclass(frozen=True)
class Source:
    """One file or saved data set. `size` is in bytes, as far as it says how much work lies in it."""

    path: Path
    kind: str  # text, jsonl, parquet or saved
    size: int


def sources_of(inputs: list[str]) -> list[Source]:
    """All sources behind these paths, folders walked through in order. Raises SettingError for a missing or empty one."""
    found: list[Source] = []
    for word in inputs:
        path = Path(word).expanduser()
        if not path.exists():
            raise missing_file("input", path)
        if path.is_dir() and any((path / name).is_file() for name in _SAVED):
            found.append(Source(path, "saved", sum(file.stat().st_size for file in path.rglob("*.arrow"))))
        elif path.is_dir():
            inside = [Source(file, kind, file.stat().st_size) for file in sorted(path.rglob("*")) if (kind := _kind_in_folder(file, path))]
            if not inside:
                raise SettingError(f"input {word!r}: no text, JSON lines or parquet file in this folder")
            found += inside
        elif not path.stat().st_size:
            raise SettingError(f"input {word!r}: the file is empty")
        else:
            found.append(Source(path, _kind(path), path.stat().st_size))
    return found


def documents(source: Source, column: str) -> Iterator[tuple[str, int]]:
    """(text, bytes of the source that are done) for each document; texts may be empty.

    Raises SettingError that says where: no such column, not text, not UTF-8, not readable."""
    read = {"text": _text, "jsonl": _json_lines, "parquet": _parquet, "saved": _saved}[source.kind]
    return read(source, column)


def _kind(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(_JSON_LINES):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def _kind_in_folder(file: Path, root: Path) -> str | None:
    """None for what is passed over: hidden, empty, or neither of our formats nor text."""
    hidden = any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(root).parts)
    if hidden or not file.is_file() or file.is_symlink() or not file.stat().st_size:
        return None
    kind = _kind(file)
    if kind == "text":
        with file.open("rb") as start:
            return None if b"\0" in start.read(4096) else kind
    return kind


def _text(source: Source, column: str) -> Iterator[tuple[str, int]]:
    try:
        # newline="": line ends are part of the text.
        with source.path.open(encoding="utf-8", newline="") as file:
            yield file.read(), source.size
    except UnicodeDecodeError as err:
        raise SettingError(f"{source.path}: not UTF-8 (byte 0x{err.object[err.start]:02x} at {err.start}); convert it first, as by iconv") from err


def _json_lines(source: Source, column: str) -> Iterator[tuple[str, int]]:
    with source.path.open("rb") as raw:
        lines = gzip.open(raw) if source.path.name.lower().endswith(".gz") else raw
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                where = f"{source.path}:{number}"
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield _field(_object(line, where), column, where), raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as err:
            raise SettingError(f"{source.path}: not a whole gzip file, broken behind line {number} ({err})") from err


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as err:
        raise SettingError(f"{where}: not UTF-8 (byte 0x{err.object[err.start]:02x} at {err.start})") from err
    except ValueError as err:
        raise SettingError(f'{where}: not JSON ({err}); each line holds one object such as {{"text": "..."}}') from err
    except RecursionError as err:
        raise SettingError(f'{where}: lists or objects lie too deep in each other to be read; each line holds one object such as {{"text": "..."}}') from err
    if not isinstance(row, dict):
        raise SettingError(f'{where}: holds a {type(row).__name__}; each line holds one object such as {{"text": "..."}}')
    return row


def _field(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise no_column(where, column, list(row))
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SettingError(f"{where}: {column!r} holds a {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as err:
        # JSON can write it as an escape, and Python reads it without a word.
        half = f"\\u{ord(value[err.start]):04x} at {err.start}"
        raise SettingError(f"{where}: {column!r} holds half a surrogate pair ({half}), which is no character; mend or remove it") from err
    return value


def _parquet(source: Source, column: str) -> Iterator[tuple[str, int]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as err:
        raise SettingError(f"{source.path}: reading parquet needs pyarrow; install holdfast with its 'hf' group") from err
    try:
        with pq.ParquetFile(source.path) as file:
            if column not in file.schema_arrow.names:
                raise no_column(str(source.path), column, file.schema_arrow.names)
            kind = file.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise SettingError(f"{source.path}: column {column!r} holds {kind}, not text")
            done, total = 0, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(_ROWS, columns=[column]):
                done += batch.num_rows
                for text in batch.column(0).to_pylist():
                    yield text or "", source.size * done // total
    except (pa.ArrowException, UnicodeDecodeError) as err:
        raise SettingError(f"{source.path}: not a readable parquet file ({str(err).splitlines()[0]})") from err


def _saved(source: Source, column: str) -> Iterator[tuple[str, int]]:
    """All splits: they are dealt anew."""
    splits = load_splits(source.path)
    done, total = 0, max(sum(len(rows) for rows in splits.values()), 1)
    for name, rows in splits.items():
        where = f"{source.path}[{name}]"
        if column not in rows.column_names:
            raise no_column(where, column, rows.column_names)
        for start in range(0, len(rows), _ROWS):
            for text in rows[start : start + _ROWS][column]:
                done += 1
                yield _field({column: text}, column, where), source.size * done // total

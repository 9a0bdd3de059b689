"""Safe reading of the files of a run directory, which another user, a full disk or an editor may have changed.

Opens regular files only, never follows a link in the last component and never blocks (O_NOFOLLOW, O_NONBLOCK); limits the size of a file
and of a line, and the depth of JSON. A missing file is FileNotFoundError; everything else that is wrong is DamagedFileError.
"""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jobs.core.errors import DamagedFileError

# Largest small file (settings, records of an attempt, manifests), in bytes.
SMALL = 16 * 2**20
# Longest line of a file of lines, in bytes: 10,000 nodes in one START event take 0.2 MB.
LINE = 2**20
# Nesting that JSON may have. No file of a run has more than ten levels.
DEPTH = 64
# Integers beyond this are refused: they fit no counter, and Python's conversions of longer ones fail or take long.
MAX_INT = 2**63 - 1
# Unix seconds of the year 9999, the last that datetime knows.
MAX_TIME = 253_402_300_799.0
_CHUNK = 2**20
_NAME = re.compile(r"[0-9]{1,9}")
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_KINDS = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISDIR, "a directory"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))  # fmt: skip


def open_fd(path: Path, flags: int, mode: int = 0o644, *, links: bool = False) -> int:
    """A descriptor of a regular file. `links`: the last component may be a symbolic link to one.

    Raises FileNotFoundError, and DamagedFileError for anything else that cannot be opened or is no regular file."""
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if links else os.O_NOFOLLOW), mode)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as err:
        raise DamagedFileError(f"{path}: {_refusal(path, err)}") from err
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise DamagedFileError(f"{path}: is {_kind(mode)}, not a regular file")
    return fd


def follow_own_link(path: Path) -> Path:
    """The target of a symbolic link that this user made, else the path itself: the batch log of a job that was submitted without --output is
    such a link (`link_batch_log`). The target must still be a regular file to be opened."""
    try:
        is_own = stat.S_ISLNK((found := path.lstat()).st_mode) and found.st_uid == os.geteuid()
    except OSError:
        return path
    return path.resolve() if is_own else path


def open_file(path: Path, *, links: bool = False) -> BinaryIO:
    """A regular file, open for reading and not buffered. Raises as `open_fd` does."""
    return open(open_fd(path, os.O_RDONLY, links=links), "rb", buffering=0)


def read_bytes(path: Path, limit: int = SMALL, *, links: bool = False) -> bytes:
    """The content of a file of at most `limit` bytes. Raises FileNotFoundError, DamagedFileError."""
    with open_file(path, links=links) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise DamagedFileError(f"{path}: has {size:,} bytes, more than the {limit:,} that are read")
        parts, left = [], limit + 1
        while left > 0 and (part := read_some(file, path, min(left, _CHUNK))):
            parts.append(part)
            left -= len(part)
    if left <= 0:
        raise DamagedFileError(f"{path}: grew beyond the {limit:,} bytes that are read")
    return b"".join(parts)


def read_some(file: BinaryIO, path: Path, count: int) -> bytes:
    """Up to `count` bytes. Raises DamagedFileError where the disk does not give them."""
    try:
        return file.read(count) or b""
    except OSError as err:
        raise DamagedFileError(f"{path}: cannot be read: {err.strerror}") from err


def read_text(path: Path, limit: int = SMALL) -> str:
    """The content of a UTF-8 file. Raises FileNotFoundError, DamagedFileError."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as err:
        raise DamagedFileError(f"{path}: not a text file in UTF-8 ({err.reason} at byte {err.start})") from err


def read_int(path: Path) -> int:
    """The whole number that is all of a small text file. Raises DamagedFileError, and FileNotFoundError also where the file is empty: its
    writer has not come to the number yet."""
    text = read_text(path, 4096).strip()
    if not text:
        raise FileNotFoundError(errno.ENOENT, "holds nothing yet", str(path))
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise DamagedFileError(f"{path}: holds {text[:40]!r}, not a number of steps")
    return int(text)


def read_object(path: Path, limit: int = SMALL, *, finite: bool = False) -> dict[str, Any]:
    """The JSON object in a file; `finite`: with neither NaN nor infinity in it. Raises FileNotFoundError, DamagedFileError."""
    value = parse(read_bytes(path, limit), path, finite=finite)
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path}: holds {describe(value)}, not a JSON object")
    return value


def parse(data: bytes, source: object, *, finite: bool = False) -> Any:
    """The value of a JSON text in UTF-8. Raises DamagedFileError also where it is nested deeper than DEPTH or holds an integer beyond
    MAX_INT or half a surrogate pair, which no encoding can write."""
    try:
        value = json.loads(data.decode())
    except RecursionError as err:
        raise DamagedFileError(f"{source}: nested deeper than {DEPTH} levels") from err
    except ValueError as err:
        raise DamagedFileError(f"{source}: not JSON: {err}") from err
    # Checked only where the text has what it takes: there may be millions of lines.
    if data.count(b"[") + data.count(b"{") > DEPTH or finite or b"\\u" in data or _LONG_NUMBER.search(data):
        _check_value(value, source, finite)
    return value


def parse_line(data: bytes, source: object) -> dict[str, Any] | None:
    """The JSON object in a line; None where it is none, as a torn write leaves it. Raises DamagedFileError as `parse` does."""
    if data[:1] not in (b"{", b"[", b" "):
        return None
    try:
        value = parse(data, source)
    except DamagedFileError as err:
        if isinstance(err.__cause__, ValueError):  # not JSON, or not UTF-8
            return None
        raise
    return value if isinstance(value, dict) else None


def is_torn(line: bytes, start: bytes) -> bool:
    """Whether a line is empty or may be what a cut write has left of one that begins with `start`; a power cut leaves null bytes."""
    text = line.strip(b"\0 \r")
    return start.startswith(text[: len(start)])


def _check_value(value: Any, source: object, finite: bool) -> None:
    pending = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, dict | list):
            if depth > DEPTH:
                raise DamagedFileError(f"{source}: nested deeper than {DEPTH} levels")
            if isinstance(item, dict):
                pending += [(key, depth) for key in item]
            pending += [(inner, depth + 1) for inner in (item.values() if isinstance(item, dict) else item)]
        elif isinstance(item, str) and not item.isascii():
            try:
                item.encode()
            except UnicodeEncodeError as err:
                raise DamagedFileError(f"{source}: holds half a surrogate pair (\\u{ord(item[err.start]):04x})") from None
        elif type(item) is int and abs(item) > MAX_INT:
            raise DamagedFileError(f"{source}: holds an integer of more than 64 bits")
        elif finite and isinstance(item, float) and not math.isfinite(item):
            raise DamagedFileError(f"{source}: holds {item}, not a finite number")


def lines(path: Path, limit: int) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of every line, the last one also without its end, without holding the file in memory.

    Raises FileNotFoundError, and DamagedFileError also for a file of more than `limit` bytes or a line of more than LINE."""
    number, rest, total = 0, b"", 0
    with open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise DamagedFileError(f"{path}: has {size:,} bytes, more than the {limit:,} that are read")
        while part := read_some(file, path, _CHUNK):
            total += len(part)
            if total > limit:
                raise DamagedFileError(f"{path}: grew beyond the {limit:,} bytes that are read")
            *whole, rest = (rest + part).split(b"\n")
            for line in whole:
                number += 1
                if len(line) > LINE:
                    raise _too_long(path, number)
                yield number, line
            if len(rest) > LINE:
                raise _too_long(path, number + 1)
    if rest:
        yield number + 1, rest


def _too_long(path: Path, number: int) -> DamagedFileError:
    return DamagedFileError(f"{path}: line {number} is longer than {LINE:,} bytes")


# -- values ------------------------------------------------------------------------------------------------------------


def is_count(value: object) -> bool:
    """Whether a value is a whole number that is not negative (JSON's true is none)."""
    return type(value) is int and 0 <= value <= MAX_INT


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


def is_time(value: object) -> bool:
    """Whether a value is a time in Unix seconds that a date can be made of."""
    return type(value) in (int, float) and 0 <= value <= MAX_TIME  # type: ignore[operator]


def is_text_list(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is str for item in value)


def index_of(name: str) -> int | None:
    """The number that is all of a file name (ASCII digits, nine at most); None for any other name."""
    return int(name) if _NAME.fullmatch(name) else None


def describe(value: object) -> str:
    """A value in a message: short, in one line, ASCII."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 40 else f"{text[:37]}..."


def _refusal(path: Path, err: OSError | ValueError) -> str:
    if isinstance(err, ValueError):
        return "no name of a file"
    if err.errno in (errno.ELOOP, errno.ENXIO):
        try:
            return f"is {_kind(os.lstat(path).st_mode)}, not a regular file"
        except OSError:
            pass
    return f"cannot be read: {err.strerror}"


def _kind(mode: int) -> str:
    return next((name for test, name in _KINDS if test(mode)), "of an unknown kind")

"""Standard output and standard error of a command whose reader may close the pipe early (`holdfast explain` read by `head`).

A closed pipe never changes what a command does or its exit code: the rest of the output is discarded. Without this the exit code
depends on the Python version and on when the buffer is flushed (1 from click and rich, 120 from the interpreter at exit).
"""

import io
import os
import sys
from typing import Any

_FAILED = 1  # Exit.FAILED; jobs.core.contract is not imported on this path


class TolerantStream(io.TextIOWrapper):
    """Text stream that sends the remaining output to the null device once its reader is gone. `buffer` still raises BrokenPipeError."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            discard_output(self)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            discard_output(self)
            super().flush()


def discard_output(stream: Any) -> None:
    """Point the file descriptor of `stream` at the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def tolerate_closed_pipes() -> None:
    """Replace sys.stdout and sys.stderr. A stream that is closed (None) or not a plain file stays as it is."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            tolerant = TolerantStream(stream.buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering, write_through=stream.write_through)
            setattr(sys, name, tolerant)


def flush_output(code: int) -> int:
    """Flush both streams and return the exit code: `code`, or 1 if output could not be written (a full disk)."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError as err:
            if stream is sys.stdout and sys.stderr is not None:
                print(f"standard output could not be written: {err.strerror or err}", file=sys.stderr)
            # The interpreter flushes again at exit, and would exit with 120.
            discard_output(stream)
            code = code or _FAILED
    return code

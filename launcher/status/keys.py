"""Single key presses from a terminal, and the terminal as it was afterwards."""

import os
import select
import termios
import tty
from types import TracebackType

_NAMES = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1bOA": "up",
    b"\x1bOB": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b"\x1b[H": "home",
    b"\x1b[F": "end",
    b"\x1b[1~": "home",
    b"\x1b[4~": "end",
    b"\x1bOH": "home",
    b"\x1bOF": "end",
    b"\x1b": "escape",
    b"\r": "enter",
    b"\n": "enter",
}
# A terminal sends the bytes of one key together; over a slow line they may come apart by this much.
_TOGETHER_S = 0.05


class Keys:
    """The keyboard of a terminal, key by key and without echo, while the `with` lasts. Ctrl-C stays a signal.

    `wake` may be called from a signal handler or another thread: a `read` that waits returns at once."""

    def __init__(self, fd: int):
        self._fd = fd
        self._pending = b""
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)

    def __enter__(self) -> "Keys":
        self._before = termios.tcgetattr(self._fd)
        self.grab()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
        os.close(self._woken)
        os.close(self._waker)

    def grab(self) -> None:
        tty.setcbreak(self._fd)

    def release(self) -> None:
        """The terminal as it was found; what was typed and not read is forgotten."""
        termios.tcsetattr(self._fd, termios.TCSAFLUSH, self._before)

    def wake(self) -> None:
        try:
            os.write(self._waker, b"x")
        except OSError:
            pass  # full: then it will wake anyway

    def read(self, seconds: float) -> str | None:
        """The next key by name (`up`, `page down`, `q`), or None after so many seconds or a `wake`.

        Raises EOFError when the terminal is gone."""
        if not self._pending:
            ready, _, _ = select.select([self._fd, self._woken], [], [], seconds)
            if self._woken in ready:
                os.read(self._woken, 4096)
            if self._fd not in ready:
                return None
            data = os.read(self._fd, 1024)
            if not data:
                raise EOFError
            self._pending = data
        if self._pending == b"\x1b" and select.select([self._fd], [], [], _TOGETHER_S)[0]:
            self._pending += os.read(self._fd, 1024)
        return self._next()

    def _next(self) -> str | None:
        for length in (4, 3, 1):
            name = _NAMES.get(self._pending[:length])
            if name and (name != "escape" or self._pending == b"\x1b"):
                self._pending = self._pending[length:]
                return name
        if self._pending[:1] == b"\x1b":
            self._pending = b""  # a key that has no meaning here
            return None
        text = self._pending.decode(errors="replace")
        self._pending = text[1:].encode()
        return text[:1]

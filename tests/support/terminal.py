"""A program in a pseudo-terminal: what it shows, what is typed into it, and the terminal it leaves behind."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from conftest import until

_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ALT_ON, ALT_OFF, CURSOR_ON, CURSOR_OFF = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h", "\x1b[?25l"


class Terminal:
    def __init__(self, command: Sequence[str | Path], env: Mapping[str, str], cwd: Path, columns: int = 120, lines: int = 30):
        self._ours, theirs = pty.openpty()
        self.size(columns, lines, tell=False)
        self.before = termios.tcgetattr(theirs)
        self._kept = theirs  # so that its state can be looked at when the program is gone
        clean = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")}

        def own_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, env={**clean, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_terminal
        )
        self.raw = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._kept)
        self._reader.join(5)
        os.close(self._ours)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 65536)
            except OSError:
                return
            if not data:
                return
            self.raw += data.decode(errors="replace")

    def size(self, columns: int, lines: int, tell: bool = True) -> None:
        self._lines = lines
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        if tell:
            os.killpg(self.process.pid, signal.SIGWINCH)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def frame(self) -> list[str]:
        """The lines of the last picture that is there from top to bottom; every one begins at the upper left corner."""
        pictures = self.raw.rsplit("\x1b[H", 2)[-2:]
        whole = pictures[-1] if pictures[-1].count("\n") >= self._lines - 1 else pictures[0]
        return [line.rstrip() for line in _CODES.sub("", whole).replace("\r", "").split("\n")]

    def see(self, text: str, seconds: float = 30) -> list[str]:
        """The picture, as soon as this stands in it."""
        until(
            lambda: any(text in line for line in self.frame()) or self.process.poll() is not None,
            seconds,
            f"{text!r} on the terminal:\n" + "\n".join(self.frame()),
        )
        frame = self.frame()
        assert any(text in line for line in frame), f"{text!r} is not there; ended with {self.process.poll()}:\n" + self.raw[-3000:]
        return frame

    def gone(self, seconds: float = 30) -> int:
        """The exit code; asserts that the terminal is as it was found."""
        code = self.process.wait(seconds)
        assert termios.tcgetattr(self._kept)[:4] == self.before[:4], "the terminal still has our settings"
        until(
            lambda: self.raw.count(ALT_ON) == self.raw.count(ALT_OFF) and self.raw.rfind(CURSOR_ON) >= self.raw.rfind(CURSOR_OFF),
            10,
            "the ordinary screen and its cursor",
        )
        return code

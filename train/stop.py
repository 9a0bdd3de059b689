"""The stop flag: a handler sets it and does nothing else, and all ranks agree on it at a step boundary."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from jobs.contract import STOP_SIGNALS

# Seconds between two looks for the stop file: a look is one metadata call on a shared file system.
_FILE_EVERY_S = 1.0
STOP_FILE = "stop file"


class StopFlag:
    """What this process has been asked. Signals after the first change nothing, so that a save in progress is not torn."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._looked = 0.0

    @classmethod
    def install(cls, signals: Sequence[int] = (*STOP_SIGNALS, signal.SIGINT)) -> "StopFlag":
        """A flag that these signals set. SIGINT is Ctrl-C in the foreground: it stops politely too."""
        flag = cls()

        def remember(number: int, frame: FrameType | None) -> None:
            if flag.signal is None:
                flag.signal = number

        for number in signals:
            signal.signal(number, remember)
        return flag

    def code(self, stop_file: Path | None = None) -> int:
        """0, or the number of the signal; 1 for the stop file (no stop signal has that number)."""
        if self.signal is not None:
            return self.signal
        if stop_file is not None and time.monotonic() - self._looked >= _FILE_EVERY_S:
            self._looked = time.monotonic()
            if os.path.exists(stop_file):
                self.signal = 1
                return 1
        return 0


def name_of(code: int) -> str:
    """TERM for 15; the stop file has a name of its own."""
    return STOP_FILE if code == 1 else signal.Signals(code).name.removeprefix("SIG")

"""The stop flag: a handler sets it and does nothing else, and all ranks agree on it at a step boundary."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from jobs.core.atomic_write import replace_file
from jobs.core.contract import STOP_SIGNALS
from jobs.run.rundir import AttemptDir

# Seconds between two looks for the stop file: a look is one metadata call on a shared file system.
_FILE_EVERY_S = 1.0
STOP_FILE = "stop file"
# In the place of a signal: a script of somebody's own that wants to be started again, unasked.
OWN_WISH = "its own wish"
# No signal has this number.
SUPERSEDED = 100
# Seconds that a process which has trained nothing yet goes on after a stop, in case it reaches a step boundary by itself.
_PATIENCE_S = 5.0


class StopFlag:
    """What this process has been asked. Signals after the first change nothing, so that a save in progress is not torn."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._looked = 0.0
        # The folder of a later attempt: where it exists, this process is a ghost. Looked for together with the stop file.
        self.successor: Path | None = None
        self._lock = threading.Lock()
        self._has_work = False

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
        """0, or the number of the signal; 1 for the stop file (no stop signal has that number), SUPERSEDED for a later attempt."""
        if self.signal is not None:
            return self.signal
        if stop_file is not None and time.monotonic() - self._looked >= _FILE_EVERY_S:
            self._looked = time.monotonic()
            if os.path.exists(stop_file):
                self.signal = 1
                return 1
            if self.successor is not None and os.path.exists(self.successor):
                self.signal = SUPERSEDED
                return SUPERSEDED
        return 0

    def leave_unless_busy(self, leave: Callable[[int], None]) -> None:
        """Until `busy` is called, a stop ends this process by `leave`, wherever it is by then.

        Start-up, compilation and the first samples may take minutes in which no step boundary comes. Nothing has been
        trained by then that the newest checkpoint does not have, so nothing is saved either."""

        def watch() -> None:
            heard: float | None = None
            while not self._has_work:
                time.sleep(0.1)
                if self.signal is None:
                    continue
                heard = heard or time.monotonic()
                if time.monotonic() - heard >= _PATIENCE_S:
                    with self._lock:
                        if not self._has_work:
                            leave(self.signal)

        threading.Thread(target=watch, name="stop", daemon=True).start()

    def busy(self) -> None:
        """From here on there is something to lose, and only a step boundary is a place to stop."""
        with self._lock:
            self._has_work = True


def leave_marker(attempt: AttemptDir, rank: int, **fields: object) -> None:
    """Says how this rank left, for the end of the attempt to read."""
    replace_file(attempt.marker(rank), json.dumps({"rank": rank, "time": round(time.time(), 3), **fields}), flush=False)


def name_of(code: int) -> str:
    """TERM for 15; the stop file has a name of its own."""
    if code == SUPERSEDED:
        return "a later attempt"
    return STOP_FILE if code == 1 else signal.Signals(code).name.removeprefix("SIG")

"""The runs under a directory, kept up to date in the background: only what has changed is read again."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jobs.core.contract import LOCAL
from jobs.run import store
from jobs.run.rundir import RunDir
from launcher.status import run_status
from launcher.status.run_status import RunStatus

FILES_EVERY_S = 1.0
# Kind to slurmctld: everybody's squeue ends up there.
QUEUE_EVERY_S = 5.0

Queue = dict[str, tuple[str, str, str]]


class Known:
    """Rows of `status`, remembered with the times and sizes of the files and the word of Slurm that they came from."""

    def __init__(self, runs_dir: Path, only: RunDir | None = None):
        self._runs_dir, self._only = runs_dir, only
        self._listed: int | None = None
        self._runs: list[RunDir] = []
        self._rows: dict[str, tuple[object, RunStatus]] = {}

    def rows(self, queue: Queue | None) -> list[RunStatus]:
        """Every run, oldest first."""
        rows = []
        for run in self._all():
            path = str(run.path)
            old = self._rows.get(path)
            now = self._signature(path, old[1] if old else None, queue)
            if old is None or now is None or old[0] != now:
                row = run_status.collect([run], queue)[0]
                # Signed after it is known which files and which job count; a change in between shows the next time.
                old = (self._signature(path, row, queue), row)
                self._rows[path] = old
            rows.append(old[1])
        return rows

    def _all(self) -> list[RunDir]:
        if self._only is not None:
            return [self._only]
        try:
            changed = os.stat(self._runs_dir).st_mtime_ns
        except OSError:
            return []
        if changed != self._listed:
            self._listed = changed
            self._runs = store.all_runs(self._runs_dir)
        return self._runs

    @staticmethod
    def _signature(path: str, row: RunStatus | None, queue: Queue | None) -> object:
        """None where only looking again helps: a process of this machine, or a run that was never looked at."""
        # Any file of a damaged run may be the one that is repaired.
        if row is None or row.state == "damaged" or (row.job_id.startswith(LOCAL) and row.state == "running"):
            return None
        run = RunDir(Path(path))
        files = [run.job_yaml, run.ledger]
        if row.state == "running":
            files += [run.metrics, run.attempt(row.attempt).progress]
        return (*(_stamp(file) for file in files), queue is None, queue.get(row.job_id) if queue else None)


class Live:
    """Two threads: one asks Slurm now and then, one looks at the files; `changed` is called after each look."""

    def __init__(self, known: Known, changed: Callable[[], None]):
        self._known, self._changed = known, changed
        self.rows: list[RunStatus] = []
        self.recent: list[RunStatus] = []
        self.trouble = ""
        self.error: Exception | None = None
        self._queue: Queue | None = None
        self._poked = threading.Event()
        self._asked_once = threading.Event()
        self._over = False
        self._threads = [threading.Thread(target=self._keep, args=(work,), daemon=True) for work in (self._ask, self._look)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Daemons: a squeue that hangs holds nobody up."""
        self._over = True
        self._poked.set()

    def poke(self) -> None:
        """Something was done: look and ask at once."""
        self._poked.set()

    def _keep(self, work: Callable[[], None]) -> None:
        try:
            while not self._over:
                work()
        except Exception as err:  # shown by the one who draws, after the terminal is as it was
            self.error = err
            self._changed()

    def _ask(self) -> None:
        self._queue, self.trouble = run_status.ask_queue()
        self._asked_once.set()
        if self._poked.wait(QUEUE_EVERY_S):
            time.sleep(0.2)
            self._poked.clear()

    def _look(self) -> None:
        # The first picture waits for Slurm a little, so that nothing is shown as running that is not.
        self._asked_once.wait(2.0)
        begun = time.monotonic()
        rows = self._known.rows(self._queue)
        self.rows, self.recent = rows, [row for row in rows if run_status.is_recent(row)]
        self._changed()
        # A slow file system is not asked again at once.
        time.sleep(max(FILES_EVERY_S, 3 * (time.monotonic() - begun)) if not self._poked.is_set() else 0.3)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size

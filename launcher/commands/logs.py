"""What a run's processes wrote: one attempt or all of them, one rank or all of them, as it lies or as it grows.

The attempts of a requeued job append to the same `<jobid>.<rank>.out`. Where one ends and the next begins is known from the
sizes that these files had when the next one began; `launcher.attempt` writes them down before it counts the attempt.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from jobs.config.resolver import load
from jobs.core import safe_read
from jobs.core.contract import LOCAL, Cause, Event
from jobs.core.errors import DamagedFileError, NotFoundError, SettingError
from jobs.run import event_log
from jobs.run.retry_policy import budgets_of, judge
from jobs.run.rundir import RunDir
from launcher.output.streams import discard_output
from launcher.status import run_status

ALL = "all"
_BATCH = "batch"
_CHUNK = 2**20
# Files are looked at so often while they grow, and less often while nothing happens.
_POLL_S, _IDLE_POLL_S = 0.2, 1.0
# Slurm is asked only when the ledger has not changed for so long.
_ASK_S = 5.0
# What the last process still writes after the ledger has closed the attempt, or another node sees late.
_DRAIN_S = 1.0

_AFTER = {
    Cause.PREEMPTED: "preemption",
    Cause.TIME_LIMIT: "its time limit",
    Cause.REQUEUED: "a requeue",
    Cause.NODE_FAILURE: "a node failure",
    Cause.OUT_OF_MEMORY: "running out of memory",
    Cause.KILLED: "a kill",
    Cause.CANCELLED: "being cancelled",
    Cause.CODE_ERROR: "an error of the code",
    Cause.HANG: "a hang",
    Cause.STORAGE: "a storage failure",
    Cause.FINISHED: "its end",
}


def print_logs(run: RunDir, rank: str = "0", attempt: str | None = None, follow: bool = False) -> None:
    """`holdfast logs`. A reader that goes away (`| head`) is no error."""
    try:
        if follow:
            follow_logs(run, rank, attempt, sys.stdout.buffer)
        else:
            copy_logs(run, rank, attempt, sys.stdout.buffer)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output(sys.stdout)


def copy_logs(run: RunDir, rank: str, attempt: str | None, out: BinaryIO) -> None:
    """Everything that is there. Raises NotFoundError when that is nothing, SettingError for a rank or attempt that cannot be."""
    reader = _Reader(run, rank, attempt, out)
    wrote = reader.copy()
    if not reader.copy_before_any_attempt() and not wrote:
        raise NotFoundError(f"run {run.id}: {reader.why_nothing()} Logs are in {run_status.near(run.logs)}/")


def follow_logs(run: RunDir, rank: str, attempt: str | None, out: BinaryIO, wait: Callable[[float], bool] | None = None) -> None:
    """Goes on until the run is over and its files are still. `wait(seconds)` returns whether to stop before."""
    reader = _Reader(run, rank, attempt, out)
    wait = wait or _sleep
    over_since: float | None = None
    answers = 0  # of Slurm in a row that the run is over: one alone may fall between two lines of the ledger
    asked, grown = 0.0, time.monotonic()
    said = ""
    while True:
        if reader.copy():
            grown = time.monotonic()
        now = time.monotonic()
        by_ledger = reader.is_over()
        quiet = now - grown >= _ASK_S or not reader.known
        if by_ledger:
            over_since = over_since or now
        elif quiet and now - asked >= (_DRAIN_S if answers else _ASK_S):
            asked = now
            state = run_status.collect([run], run_status.ask_queue()[0])[0]
            is_over = state.state not in ("running", "waiting")
            answers = answers + 1 if is_over else 0
            over_since = (over_since or now) if is_over else None
            words = f"run {run.id} is {state.state}" + (f": {state.note}" if state.note else "")
            if state.state != "running" and words != said:
                print(words, file=sys.stderr, flush=True)
                said = words
        if over_since is not None and (by_ledger or answers > 1) and now - max(over_since, grown) >= _DRAIN_S:
            reader.finish()
            reader.copy_before_any_attempt()
            return
        if wait(_POLL_S if now - grown < 10 or over_since else _IDLE_POLL_S):
            return


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


class _Reader:
    """Copies the wanted streams, attempt after attempt, and remembers how far it has come."""

    def __init__(self, run: RunDir, rank: str, attempt: str | None, out: BinaryIO):
        if rank not in (ALL, _BATCH) and safe_read.index_of(rank) is None:
            raise SettingError(f"--rank {rank!r}: write a rank (0), batch for the script's log, or all.")
        if attempt is not None and attempt != ALL and safe_read.index_of(attempt) is None:
            raise SettingError(f"--attempt {attempt!r}: write the number of an attempt, or all.")
        self.run, self.rank, self.out = run, rank, out
        job = load(run.job_yaml)
        self._budgets = budgets_of(job)
        self._job = job
        self.only = int(attempt) if attempt and attempt != ALL else None
        self.known: list[event_log.Attempt] = []
        self._events: list[dict[str, object]] = []
        self._ledger_size = -1
        self._from_first = attempt == ALL
        self._current: int | None = None  # number of the attempt that is being copied
        self._at: dict[Path, int] = {}  # how far each file was copied
        self._halves: dict[Path, bytes] = {}  # the beginning of a line, until the rest of it is there
        self._line_open = False

    def copy(self) -> bool:
        """Writes what is new; returns whether there was anything."""
        # Sizes before the ledger: what a new attempt has written by now is then known to be its own.
        sizes = {path: path.lstat().st_size for path in self._files()}
        self._read_ledger()
        wrote = False
        for index, attempt in enumerate(self.known):
            if attempt.number != self.only if self.only is not None else attempt.number < self._first():
                continue
            if self._current is not None and attempt.number < self._current:
                continue
            later = self.known[index + 1 :]
            for stream, path in self._streams(attempt):
                end = self._end(attempt, stream, path, later, sizes)
                position = max(self._at.get(path, 0), self._border(attempt, stream))
                if position < end:
                    self._head(attempt, index)
                    self._copy(path, stream, position, end)
                    wrote = True
            if later and self._current == attempt.number:
                self.finish()
        self.out.flush()
        return wrote

    def finish(self) -> None:
        """What no line break followed is written too."""
        for path, half in list(self._halves.items()):
            if half:
                self._write(self._prefix(path) + half)
            self._halves[path] = b""
        self.out.flush()

    def copy_before_any_attempt(self) -> bool:
        """Writes the script's log of the newest job where that began no attempt, whatever rank is wanted: `module` or the setup script
        ended it, and its words stand nowhere else. Returns whether there was anything."""
        newest = next((event for event in reversed(self._events) if event["event"] in (Event.SUBMITTED, Event.START) or event.get("successor")), None)
        if self.only is not None or newest is None or newest["event"] == Event.START:
            return False
        job_id = str(newest.get("successor") or newest["job_id"])
        path = self.run.log(job_id, _BATCH)
        if not path.is_file() or not path.stat().st_size:
            return False
        self.finish()
        self._write(f"--- job {job_id} · has begun no attempt · log of its script ---\n".encode())
        self._copy(path, _BATCH, 0, path.stat().st_size)
        self.finish()
        return True

    def is_over(self) -> bool:
        """Whether the ledger alone says that nothing more comes; false where Slurm has to be asked."""
        if not self.known:
            return False
        if self.only is not None and self.known[-1].number > self.only:
            return True
        return self.known[-1].cause is not None and not judge(self._events, self._budgets).again

    def why_nothing(self) -> str:
        if not self.known:
            return "no attempt has started yet."
        wanted = self.only or self.known[-1].number
        attempt = next((attempt for attempt in self.known if attempt.number == wanted), None)
        if attempt is None:
            return f"there is no attempt {wanted}, the last one is {self.known[-1].number}."
        there = [name for name, _ in self._named(attempt)]
        return f"attempt {wanted} has written no log of {'rank ' if self.rank.isdigit() else ''}{self.rank} yet" + (
            f"; there is {', '.join(there)}." if there else "."
        )

    def _first(self) -> int:
        """The attempt to begin with: the newest at the first look, and from then on every later one."""
        if self._current is None and not self._from_first and self.known:
            return self.known[-1].number
        return self._current or 0

    def _read_ledger(self) -> None:
        try:
            size = self.run.ledger.stat().st_size
        except OSError:
            return
        if size != self._ledger_size:
            self._ledger_size = size
            self._events = event_log.read(self.run.ledger)
            self.known = event_log.attempts(self._events)

    def _files(self) -> Iterator[Path]:
        with_suffix = (path for path in self.run.logs.iterdir() if path.name.endswith(".out")) if self.run.logs.is_dir() else ()
        for path in with_suffix:
            if self.rank == ALL or _stream_of(path) in (self.rank, self._by_slurm()):
                yield path

    def _streams(self, attempt: event_log.Attempt) -> list[tuple[str, Path]]:
        # Without Slurm each rank has a log of its own.
        wanted = self.rank if attempt.job_id.startswith(LOCAL) else self._by_slurm()
        return [(stream, path) for stream, path in self._named(attempt) if wanted in (ALL, stream)]

    def _by_slurm(self) -> str:
        """The stream that holds the wanted words where Slurm started the ranks."""
        return str(self._job.log_number(int(self.rank))) if self.rank.isdigit() else self.rank

    def _end(self, attempt: event_log.Attempt, stream: str, path: Path, later: Sequence[event_log.Attempt], sizes: Mapping[Path, int]) -> int:
        """How far a file belongs to an attempt: up to the next one of its job, to its end where it has no next one."""
        if not later:
            return sizes.get(path, 0)
        follower = next((other for other in later if other.job_id == attempt.job_id), None)
        return self._border(follower, stream) if follower else path.stat().st_size

    def _named(self, attempt: event_log.Attempt) -> list[tuple[str, Path]]:
        """The logs of an attempt's job: the script's first, then by rank."""
        found = []
        for path in self.run.logs.iterdir() if self.run.logs.is_dir() else ():
            stream = _stream_of(path)
            if path == self.run.log(attempt.job_id, stream):
                found.append((stream, path))
        return sorted(found, key=lambda pair: (safe_read.index_of(pair[0]) is not None, safe_read.index_of(pair[0]) or 0))

    def _border(self, attempt: event_log.Attempt, stream: str) -> int:
        """Where the words of this attempt begin in the file of a stream."""
        try:
            size = safe_read.read_object(self.run.attempt(attempt.number).log_sizes).get(stream, 0)
        except (OSError, DamagedFileError):
            return 0
        return int(size) if safe_read.is_count(size) else 0

    def _head(self, attempt: event_log.Attempt, index: int) -> None:
        if self._current == attempt.number:
            return
        self.finish()
        self._current = attempt.number
        before = self.known[index - 1] if index else None
        after = [f"after {_AFTER.get(before.cause, 'an end of unknown cause')}"] if before and before.cause else []
        if self.rank.isdigit() and not attempt.job_id.startswith(LOCAL):
            ranks = [rank for rank in range(self._job.world_size) if self._job.log_number(rank) == self._job.log_number(int(self.rank))]
            if len(ranks) > 1:
                after.append(f"log of node {self._by_slurm()}: ranks {ranks[0]} to {ranks[-1]}")
        self._write(f"--- {' · '.join([f'attempt {attempt.number}', f'job {attempt.job_id}', *after])} ---\n".encode())

    def _copy(self, path: Path, stream: str, begin: int, end: int) -> None:
        with safe_read.open_file(safe_read.follow_own_link(path)) as file:  # opened anew each time: over NFS that is what asks for the true size
            file.seek(begin)
            while begin < end:
                data = safe_read.read_some(file, path, min(_CHUNK, end - begin))
                if not data:
                    break
                begin += len(data)
                self._at[path] = begin
                if self.rank != ALL:
                    self.out.write(data)
                    self._line_open = not data.endswith(b"\n")
                    continue
                *whole, self._halves[path] = (self._halves.get(path, b"") + data).split(b"\n")
                self.out.write(b"".join(self._prefix(path) + line + b"\n" for line in whole))

    def _prefix(self, path: Path) -> bytes:
        return f"{_stream_of(path)}: ".encode()

    def _write(self, line: bytes) -> None:
        """A line of its own."""
        if self._line_open:
            self.out.write(b"\n")
        self._line_open = False
        self.out.write(line if line.endswith(b"\n") else line + b"\n")


def _stream_of(path: Path) -> str:
    """`0` or `batch`: the word before `.out`."""
    return path.name.removesuffix(".out").rpartition(".")[2]

"""What commands print: tables on a terminal, plain text in a pipe, JSON for programs."""

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import pairwise
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.text import Text

from jobs.config.resolver import load
from jobs.core import safe_read
from jobs.core.contract import Event
from jobs.core.errors import DamagedFileError, HoldfastError, SubmitError
from jobs.run import event_log, goodput, metrics_log, store
from jobs.run.rundir import RunDir
from launcher.attempt.evidence import clock_record
from launcher.output import table
from launcher.status import run_state
from slurm.client import Slurm
from slurm.pending_reasons import in_words

_DAY_S = 86_400
# Lines of metrics that say how fast a run is just now.
_PACE_LINES = 8


@dataclass(frozen=True)
class RunStatus:
    """One run as `status` shows it; `status --json` prints these fields, and docs/reference/commands.md lists them (`FIELDS`)."""

    run: str
    path: str
    state: str
    job_id: str
    attempt: int
    step: int
    max_steps: int
    loss: float | None
    tokens_per_s: float | None
    lost_steps: int
    causes: list[str]
    checkpoint_step: int | None
    checkpoint_time: float | None
    note: str
    queue_reason: str = ""
    seconds_left: float | None = None
    peak_pct: float | None = None
    # Where the allocation went (jobs/run/goodput.py): seconds by part over all attempts, the wait outside of any, useful GPU share.
    time_s: dict[str, float] = field(default_factory=dict)
    queue_s: float = 0.0
    useful_share: float | None = None


# What a program that reads `status --json` may rely on: fields are added, never renamed or taken away.
FIELDS: dict[str, str] = {
    "run": "id of the run",
    "path": "its directory",
    "state": "waiting, running, finished, failed, cancelled, stopped (no job; `resume` continues it), or damaged (a file of it cannot be read; the note says which, and why)",
    "job_id": "Slurm's id of its newest job, `123_4` for a task of an array, `local-` and a process for a run without Slurm",
    "attempt": "number of the newest attempt; 0 before the first",
    "step": "the last optimizer step that was done",
    "max_steps": "optimizer steps of the whole run",
    "loss": "the last logged one, or null; null also where it is no finite number",
    "tokens_per_s": "the last logged rate, or null",
    "lost_steps": "steps that were trained again after interruptions, over all attempts",
    "causes": "why each attempt that is over ended, oldest first",
    "checkpoint_step": "step of the newest checkpoint, or null",
    "checkpoint_time": "when it was written, in Unix seconds, or null",
    "note": "one remark for a person: interruptions, the reason of a failure, what to do next",
    "queue_reason": "why Slurm lets it wait, in words; empty when it does not wait",
    "seconds_left": "until max_steps at the pace of the last steps, while it runs, or null",
    "peak_pct": "the last logged share of the GPU's peak of matrix arithmetic, in percent, while it runs and where the peak is known, or null",
    "time_s": "seconds by part over all attempts (docs/explanation/preemption.md): useful, start_up, restore, first_step, data_wait, save_stall, evaluation, lost, stop, hang, script, other",
    "queue_s": "seconds outside of any allocation: before the first attempt and between attempts",
    "useful_share": "useful GPU time over all GPU time of the run, or null",
}


def collect(runs: Iterable[RunDir], queue: dict[str, tuple[str, str, str]] | None) -> list[RunStatus]:
    """Status of runs from their own files and one answer of squeue (None when Slurm could not be asked)."""
    return [_status_of(run, queue) for run in runs]


def status(runs_dir: Path, word: str | None, as_json: bool, every: bool) -> None:
    runs = store.runs_in(store.find(word, runs_dir)) if word else store.all_runs(runs_dir)
    if not runs and not as_json:
        print(f"no runs in {runs_dir}/ yet; holdfast submit makes one")
        return
    queue, trouble = ask_queue()
    rows = collect(runs, queue)
    if not word and not every and not as_json:
        rows = [row for row in rows if is_recent(row)]
    if as_json:
        print(json.dumps([{name: _or_null(value) for name, value in asdict(row).items()} for row in rows], indent=1))
        return
    if trouble:
        print(trouble)
    print_runs(rows)


def _or_null(value: Any) -> Any:
    """None for NaN and infinity: a loss may be either, and JSON knows neither."""
    if isinstance(value, dict):
        return {name: _or_null(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


def print_runs(rows: Iterable[RunStatus]) -> None:
    """The table of runs; in a pipe a row stays a line, so that grep and awk work."""
    cells = [
        (
            row.run,
            row.state,
            row.job_id,
            str(row.attempt or "-"),
            f"{row.step:,}/{row.max_steps:,}",
            "" if row.loss is None else f"{row.loss:.3f}",
            "" if row.tokens_per_s is None or row.state != "running" else f"{row.tokens_per_s:,.0f}",
            "" if row.seconds_left is None else span(row.seconds_left),
            "" if row.checkpoint_time is None else f"step {row.checkpoint_step:,}, {ago(row.checkpoint_time)}",
            row.note,
        )
        for row in rows
    ]
    console = Console(highlight=False)
    text = table.lines(
        ("run", "state", "job", "attempt", "step", "loss", "tok/s", "left", "checkpoint", "note"), cells, console.width if console.is_terminal else None
    )
    console.print(Text(text[0], style="bold"), soft_wrap=True)
    print("\n".join(text[1:]))


def ask_queue() -> tuple[dict[str, tuple[str, str, str]] | None, str]:
    """This user's jobs, or None with a remark when there is a Slurm that does not answer."""
    if not Slurm.available():
        return None, ""
    try:
        return Slurm().queue(), ""
    except SubmitError as err:
        return None, f"Slurm does not answer, so states are from the runs' own files: {err}"


def _status_of(run: RunDir, queue: dict[str, tuple[str, str, str]] | None) -> RunStatus:
    try:
        return _read_status(run, queue)
    except (HoldfastError, OSError) as err:
        return damaged_status(run, err)


def damaged_status(run: RunDir, err: HoldfastError | OSError) -> RunStatus:
    """The status of a run that cannot be read; its note says which file, and why."""
    note = f"{err.filename or run.path}: cannot be read: {err.strerror}" if isinstance(err, OSError) else str(err).splitlines()[0]
    return RunStatus(run.id, str(run.path), "damaged", "", 0, 0, 0, None, None, 0, [], None, None, note)


def _read_status(run: RunDir, queue: dict[str, tuple[str, str, str]] | None) -> RunStatus:
    """Raises HoldfastError, OSError where a file of the run cannot be read."""
    job = load(run.job_yaml)
    events = event_log.read(run.ledger)
    attempts = event_log.attempts(events)
    job_id = run_state.newest_job(events)
    saves = [event for event in events if event["event"] == Event.CHECKPOINT]
    state, note = run_state.state_of(run, job, events, attempts, job_id, queue)
    lines = metrics_log.tail(run.metrics, _PACE_LINES if state == "running" else 1)
    last = lines[-1] if lines else {}
    if not lines:
        metrics_log.check_content(run.metrics)
    elif not events:
        raise DamagedFileError(f"{run.ledger}: has no event, and {run.metrics.name} has step {last['step']}")
    step = _progress(run, attempts, int(last.get("step", 0)))
    spent = spent_by(run, events, running=state == "running")
    pace = _pace(lines) if state == "running" else None
    return RunStatus(
        run=run.id,
        path=str(run.path),
        state=state,
        job_id=job_id,
        attempt=attempts[-1].number if attempts else 0,
        step=step,
        max_steps=job.max_steps,
        loss=last.get("loss"),
        tokens_per_s=last.get("tokens_per_s"),
        lost_steps=sum(attempt.lost_steps for attempt in attempts),
        causes=[attempt.cause.value for attempt in attempts if attempt.cause],
        checkpoint_step=int(saves[-1].get("step", 0)) if saves else None,
        checkpoint_time=float(saves[-1]["time"]) if saves else None,
        note=" ".join(note.split()),
        queue_reason=in_words(queue[job_id][1]) if queue and state == "waiting" and job_id in queue else "",
        seconds_left=None if pace is None else max(job.max_steps - step, 0) * pace,
        peak_pct=last.get("peak_pct") if state == "running" else None,
        time_s=spent.parts_s,
        queue_s=spent.queue_s,
        useful_share=spent.useful_share,
    )


def spent_by(run: RunDir, events: list[dict[str, object]], *, running: bool) -> goodput.Account:
    """Where the time of a run went, an attempt that still runs included."""
    newest = max((attempt.number for attempt in event_log.attempts(events)), default=0)
    return goodput.account(events, now=time.time() if running else None, open_record=clock_record(run, newest) if running else None)


def _pace(lines: list[dict[str, Any]]) -> float | None:
    """Seconds per step between the last lines of metrics; the queue between two attempts does not count."""
    pairs = [
        (old, new)
        for old, new in pairwise(lines)
        if old.get("attempt") == new.get("attempt") and old.get("time") is not None and new.get("time") is not None and new["step"] > old["step"]
    ]
    return median((new["time"] - old["time"]) / (new["step"] - old["step"]) for old, new in pairs) if pairs else None


def _progress(run: RunDir, attempts: list[event_log.Attempt], logged: int) -> int:
    if not attempts:
        return logged
    try:
        return safe_read.read_int(run.attempt(attempts[-1].number).progress)
    except FileNotFoundError:  # also where it is empty: the attempt has begun, and finished no step
        return attempts[-1].step or logged


def is_recent(row: RunStatus) -> bool:
    """Whether a run goes on, or something happened to it within a day."""
    return row.state in ("running", "waiting") or _touched(row) > time.time() - _DAY_S


def _touched(row: RunStatus) -> float:
    run = RunDir(Path(row.path))
    touched = 0.0
    for path in (run.ledger, run.job_yaml):
        with suppress(OSError):  # taken away in the meantime
            touched = max(touched, path.stat().st_mtime)
    return touched


def ago(then: float) -> str:
    """40 s ago, 31 min ago, 5 h ago; a date after two days."""
    seconds = max(time.time() - then, 0)
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min ago"
    if seconds < 2 * _DAY_S:
        return f"{seconds / 3600:.0f} h ago"
    return datetime.fromtimestamp(then).strftime("%Y-%m-%d")


def span(seconds: float) -> str:
    """45 s, 31 min, 5 h 20 min, 3 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 1440:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def near(path: Path) -> str:
    """A path as seen from here, when that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)

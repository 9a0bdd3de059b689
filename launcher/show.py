"""What commands print: tables on a terminal, plain text in a pipe, JSON for programs."""

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.text import Text

from jobs import goodput, lease, ledger, metrics, run_folders
from jobs.contract import LOCAL, Cause, Event
from jobs.errors import HoldfastError, SubmitError
from jobs.rundir import RunDir
from jobs.settings import Job
from jobs.sources import load
from jobs.verdict import budgets_of, judge
from launcher import table
from launcher.left_behind import clock_record
from slurm.client import Slurm
from slurm.reasons import in_words
from slurm.states import base

_DAY_S = 86_400
# Lines of metrics that say how fast a run is just now.
_PACE_LINES = 8


@dataclass(frozen=True)
class RunStatus:
    """One run as `status` shows it; `status --json` prints these fields, and docs/commands.md lists them (`FIELDS`)."""

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
    # Where the allocation went (jobs/goodput.py): seconds by part over all attempts, the wait outside of any, useful GPU share.
    time_s: dict[str, float] = field(default_factory=dict)
    queue_s: float = 0.0
    useful_share: float | None = None


# What a program that reads `status --json` may rely on: fields are added, never renamed or taken away.
FIELDS: dict[str, str] = {
    "run": "id of the run",
    "path": "its directory",
    "state": "waiting, running, finished, failed, cancelled, stopped (no job has it, resume goes on), or damaged (job.yaml cannot be read)",
    "job_id": "Slurm's id of its newest job, `123_4` for a task of an array, `local-` and a process for a run without Slurm",
    "attempt": "number of the newest attempt; 0 before the first",
    "step": "the last optimizer step that was done",
    "max_steps": "optimizer steps of the whole run",
    "loss": "the last logged one, or null",
    "tokens_per_s": "the last logged rate, or null",
    "lost_steps": "steps that were trained again after interruptions, over all attempts",
    "causes": "why each attempt that is over ended, oldest first",
    "checkpoint_step": "step of the newest checkpoint, or null",
    "checkpoint_time": "when it was written, in Unix seconds, or null",
    "note": "one remark for a person: interruptions, the reason of a failure, what to do next",
    "queue_reason": "why Slurm lets it wait, in words; empty when it does not wait",
    "seconds_left": "until max_steps at the pace of the last steps, while it runs, or null",
    "peak_pct": "the last logged share of the GPU's peak of matrix arithmetic, in percent, while it runs and where the peak is known, or null",
    "time_s": "seconds by part over all attempts (docs/preemption.md): useful, start_up, restore, first_step, data_wait, save_stall, evaluation, lost, stop, hang, script, other",
    "queue_s": "seconds outside of any allocation: before the first attempt and between attempts",
    "useful_share": "useful GPU time over all GPU time of the run, or null",
}


def collect(runs: Iterable[RunDir], queue: dict[str, tuple[str, str, str]] | None) -> list[RunStatus]:
    """Status of runs from their own files and one answer of squeue (None when Slurm could not be asked)."""
    return [_status_of(run, queue) for run in runs]


def status(runs_dir: Path, word: str | None, as_json: bool, every: bool) -> None:
    runs = run_folders.runs_in(run_folders.find(word, runs_dir)) if word else run_folders.all_runs(runs_dir)
    if not runs and not as_json:
        print(f"no runs in {runs_dir}/ yet; holdfast submit makes one")
        return
    queue, trouble = ask_queue()
    rows = collect(runs, queue)
    if not word and not every and not as_json:
        rows = [row for row in rows if is_recent(row)]
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    if trouble:
        print(trouble)
    print_runs(rows)


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
        job = load(run.job_yaml)
    except HoldfastError as err:
        return RunStatus(run.id, str(run.path), "damaged", "", 0, 0, 0, None, None, 0, [], None, None, str(err).splitlines()[0])
    events = ledger.read(run.ledger)
    attempts = ledger.attempts(events)
    job_id = _newest_job(events)
    saves = [event for event in events if event["event"] == Event.CHECKPOINT]
    state, note = _state(run, job, events, attempts, job_id, queue)
    lines = metrics.tail(run.metrics, _PACE_LINES if state == "running" else 1)
    last = lines[-1] if lines else {}
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
        checkpoint_step=int(saves[-1]["step"]) if saves else None,
        checkpoint_time=float(saves[-1]["time"]) if saves else None,
        note=note,
        queue_reason=in_words(queue[job_id][1]) if queue and state == "waiting" and job_id in queue else "",
        seconds_left=None if pace is None else max(job.max_steps - step, 0) * pace,
        peak_pct=last.get("peak_pct") if state == "running" else None,
        time_s=spent.parts_s,
        queue_s=spent.queue_s,
        useful_share=spent.useful_share,
    )


def _newest_job(events: list[dict[str, Any]]) -> str:
    """The job that the ledger has last: submitted, begun, or submitted by the one before as its successor. Empty before the first."""
    job_id, number, begun = "", 0, set()
    for event in events:
        said = str(event["job_id"])
        if event["event"] == Event.START:
            number = max(number, event["attempt"])
            begun.add(said)
            # A local submission trains in a child of the process that the person was told of.
            job_id = job_id if said.startswith(LOCAL) and job_id.startswith(LOCAL) else said
        elif event["event"] == Event.SUBMITTED and said not in begun:  # a quick job begins before its submission is written down
            job_id = said
        elif event["event"] == Event.REQUEUE and event.get("successor") and event["attempt"] >= number:
            job_id = str(event["successor"])
    return job_id


def spent_by(run: RunDir, events: list[dict[str, object]], *, running: bool) -> goodput.Account:
    """Where the time of a run went, an attempt that still runs included."""
    newest = max((attempt.number for attempt in ledger.attempts(events)), default=0)
    return goodput.account(events, now=time.time() if running else None, open_record=clock_record(run, newest) if running else None)


def _pace(lines: list[dict[str, Any]]) -> float | None:
    """Seconds per step between the last lines of metrics; the queue between two attempts does not count."""
    pairs = [
        (old, new) for old, new in pairwise(lines) if old.get("attempt") == new.get("attempt") and "time" in old and "time" in new and new["step"] > old["step"]
    ]
    return median((new["time"] - old["time"]) / (new["step"] - old["step"]) for old, new in pairs) if pairs else None


def _state(
    run: RunDir, job: Job, events: list[dict[str, object]], attempts: list[ledger.Attempt], job_id: str, queue: dict[str, tuple[str, str, str]] | None
) -> tuple[str, str]:
    lost = sum(attempt.lost_steps for attempt in attempts)
    stops = [attempt.cause.value.replace("_", " ") for attempt in attempts[:-1] if attempt.cause]
    history = f"{len(stops)} interruption{'s' if len(stops) > 1 else ''} ({', '.join(dict.fromkeys(stops))}), {lost} steps lost" if stops else ""
    last = attempts[-1] if attempts else None
    queued = (queue or {}).get(job_id)
    # Submitted since the newest attempt, as `resume` does; where Slurm cannot be asked, it waits.
    resumed = bool(attempts and job_id) and not job_id.startswith(LOCAL) and all(attempt.job_id != job_id for attempt in attempts)
    waits = resumed and (queue is None or queued is not None)
    if last and last.cause is Cause.FINISHED and not waits:
        return "finished", history
    if last and last.cause is Cause.PRUNED and not waits:
        return "finished", last.evidence
    if queued:
        state = base(queued[0])
        if state == "PENDING":
            return "waiting", "; ".join(
                filter(None, [f"{last.cause.value.replace('_', ' ')}, queued again" if last and last.cause else "", in_words(queued[1])])
            )
        return "running", history
    if waits:
        return "waiting", ""
    verdict = judge(events, budgets_of(job))
    gone = (
        ("stopped", f"job {job_id} is gone from the queue; holdfast resume {run.id}")
        if verdict.reason != "cancelled"
        else ("cancelled", f"holdfast resume {run.id} goes on")
    )
    if last and last.cause is None:
        if last.job_id.startswith(LOCAL):
            return ("running", history) if _works(run, last) else ("stopped", f"its process is gone; holdfast resume {run.id}")
        return ("running", history) if queue is None else gone
    if last is None:
        if queue is None and not job_id.startswith(LOCAL):
            return "waiting", ""
        return ("waiting", "") if job_id.startswith(LOCAL) else gone if job_id else ("stopped", "never submitted")
    if last.cause is Cause.CANCELLED or verdict.reason == "cancelled":
        return "cancelled", f"holdfast resume {run.id} goes on"
    if verdict.again:
        return "stopped", f"{last.cause.value.replace('_', ' ') if last.cause else ''}; holdfast resume {run.id}"
    return "failed", f"{last.evidence} (holdfast logs {run.id})"


def _progress(run: RunDir, attempts: list[ledger.Attempt], logged: int) -> int:
    if not attempts:
        return logged
    try:
        return int(run.attempt(attempts[-1].number).progress.read_text())
    except (OSError, ValueError):
        return attempts[-1].step or logged


def _works(run: RunDir, attempt: ledger.Attempt) -> bool:
    """Whether the process behind a local attempt still works; its number alone may be another one's by now."""
    number = attempt.job_id.removeprefix(LOCAL)
    stamp = lease.owner_of(run, attempt.number).get("stamp")
    return number.isdigit() and lease.alive(int(number)) and (not stamp or lease.process_stamp(int(number)) == stamp)


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

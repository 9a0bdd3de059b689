"""The figures of a report: what the files of a run tell, as plain values for the page and for `--json`.

Curves are thinned to what a screen can show: of each stretch of lines the lowest and the highest value are kept, so that no
spike disappears. Every other figure is computed from all lines.
"""

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.config import secrets_scan
from jobs.config.resolver import load
from jobs.config.settings import Job, group_of, help_of, names
from jobs.core import safe_read
from jobs.core.contract import LOCAL, Event
from jobs.core.errors import DamagedFileError, HoldfastError, SettingError
from jobs.run import event_log, metrics_log, rundir, store
from jobs.run.rundir import RunDir
from launcher.output import settings_table
from launcher.report.columns import NUMBERS, Column, columns_of
from launcher.report.time_account import time_of
from launcher.status import run_status
from launcher.submission import snapshot

MAX_RUNS = 50
_FACTS = ("commit", "branch", "dirty", "from", "files", "bytes", "time")
# Points of all curves of a page together: about 24 bytes each.
_POINTS = 36_000
# Of one curve, however few there are: twice the pixels of a wide chart would show nothing more.
_POINTS_OF_A_CURVE = 1600
_DIFF_BYTES = 300_000
_MOST_OVERFLOWS = 400
_MOST_OTHERS = 12


@dataclass(frozen=True)
class Figure:
    """One chart. `keys` are the names in metrics.jsonl that it may draw, `dots` those that are drawn as points beside the line.
    `missing` is what the page says where a run has none of them; nothing where it is empty."""

    title: str
    unit: str
    keys: tuple[str, ...]
    dots: tuple[str, ...] = ()
    missing: str = "not logged"


FIGURES = {
    "loss": Figure("Loss", "training: line, validation: dots", ("loss",), ("val_loss",)),
    "lr": Figure("Learning rate", "", ("lr",)),
    "throughput": Figure("Throughput", "targets per second, all GPUs", ("tokens_per_s",)),
    "peak": Figure("Share of peak", "% of the GPU's peak", ("peak_pct",), missing="known for some GPUs, and models whose FLOPs are"),
    "memory": Figure("Memory", "GiB, largest so far on rank 0's GPU", ("gpu_memory_gib",), missing="of GPUs only"),
    "scale": Figure("Loss scale", "crosses: skipped steps", ("loss_scale",), missing="no loss scaling in this precision"),
    "data": Figure("Waiting for data", "% of the time", ("data_wait_pct",), missing=""),
    "saves": Figure("Waiting for saves", "% of the time", ("save_wait_pct",), missing=""),
    "bits": Figure("Validation, bits per byte", "", ("val_bits_per_byte",), missing=""),
    "accuracy": Figure("Validation, accuracy", "", ("val_accuracy",), missing=""),
    "norm": Figure("Gradient norm", "before clipping", ("grad_norm",)),
}  # fmt: skip


def figures_of(runs: Sequence[RunDir], now: float | None = None) -> dict[str, Any]:
    """Everything the page shows, ready for JSON. Of several runs one that cannot be read is shown as damaged.

    Raises SettingError when there are too many runs for one page, DamagedFileError when the only one cannot be read."""
    if len(runs) > MAX_RUNS:
        raise SettingError(f"{len(runs)} runs are too many for one page; {MAX_RUNS} can be compared.")
    queue, trouble = run_status.ask_queue()
    moment = time.time() if now is None else now
    kept = [_columns(run, alone=len(runs) == 1) for run in runs]
    curves = sum(len(columns) for columns in kept) or 1
    points = max(min(_POINTS // curves, _POINTS_OF_A_CURVE), 40)
    shown = [_run(run, columns, queue, moment, points, _DIFF_BYTES // len(runs), alone=len(runs) == 1) for run, columns in zip(runs, kept, strict=True)]
    return {
        "made": round(moment, 1),
        "trouble": " ".join(trouble.split())[:240] if any(_needs_slurm(run) for run in shown) else "",
        "points_of_a_curve": points,
        "thinned": any(run["thinned"] for run in shown),
        "figures": _figures(shown),
        "runs": shown,
    }


def _needs_slurm(run: Mapping[str, Any]) -> bool:
    """Whether only Slurm knows what became of a run."""
    return run["state"] in ("running", "waiting", "stopped") and not any(attempt["job_id"].startswith(LOCAL) for attempt in run["attempts"][-1:])


def _figures(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The charts of the page in order: ours first, then whatever else the runs logged. Each says which curves it draws."""
    have = {key for run in runs for key in run["curves"]}
    overflows = any(run["overflows"]["count"] for run in runs)
    charts = []
    for name, figure in FIGURES.items():
        key = next((key for key in figure.keys if key in have), None)
        dots = next((key for key in figure.dots if key in have), None)
        there = key is not None or dots is not None or (name == "scale" and overflows)
        charts.append({"name": name, "title": figure.title, "unit": figure.unit, "line": key, "dots": dots, "missing": None if there else figure.missing})
    ours = {key for figure in FIGURES.values() for key in (*figure.keys, *figure.dots)}
    for key in sorted(have - ours)[:_MOST_OTHERS]:
        charts.append({"name": f"other-{key}", "title": key.replace("_", " "), "unit": "", "line": key, "dots": None, "missing": None})
    return charts


def _is_number(value: object) -> bool:
    return type(value) in NUMBERS


def _columns(run: RunDir, *, alone: bool) -> dict[str, Column]:
    try:
        return columns_of(metrics_log.lines(run.metrics), run.metrics)
    except DamagedFileError:
        if alone:
            raise
        return {}


def _run(
    run: RunDir, columns: dict[str, Column], queue: dict[str, tuple[str, str, str]] | None, now: float, points: int, diff_bytes: int, *, alone: bool
) -> dict[str, Any]:
    status = run_status.collect([run], queue)[0]
    try:
        return _read_run(run, columns, status, now, points, diff_bytes)
    except DamagedFileError as err:
        if alone:
            raise
        return _damaged_run(run, run_status.damaged_status(run, err))


def _damaged_run(run: RunDir, status: run_status.RunStatus) -> dict[str, Any]:
    """What the page shows of a run that cannot be read: its name, and why."""
    return {
        "id": run.id, "path": str(run.path), "state": status.state, "note": status.note, "step": 0, "max_steps": 0, "headline": "", "remark": "", "begun": round(_begun([], {}, run), 1),
        "attempts": [], "final": _final({}, status, []), "thinned": False, "time": time_of(run, [], None), "curves": {}, "overflows": _overflows([], 0.0), "settings": [],
        "code": {**dict.fromkeys(_FACTS), "diff": "", "diff_bytes": 0, "diff_cut": False},
    }  # fmt: skip


def _read_run(run: RunDir, columns: dict[str, Column], status: run_status.RunStatus, now: float, points: int, diff_bytes: int) -> dict[str, Any]:
    """As `_run`. Raises DamagedFileError."""
    events = event_log.read(run.ledger)
    try:
        job: Job | None = load(run.job_yaml)
    except HoldfastError:
        job = None
    begun = _begun(events, columns, run)
    live = status.state == "running"
    curves = {key: _curve(column, begun, points) for key, column in sorted(columns.items())}
    return {
        "id": run.id, "path": str(run.path), "state": status.state, "note": status.note, "step": status.step, "max_steps": status.max_steps,
        "headline": settings_table.headline(job) if job else "", "remark": job.note if job else "", "begun": round(begun, 1),
        "attempts": _attempts(events, begun, now if live else None, status.step), "final": _final(columns, status, events), "thinned": any(len(column.values) > points for column in columns.values()),
        "time": time_of(run, events, now if live else None), "curves": curves, "overflows": _overflows(events, begun), "settings": _settings(run, job), "code": _code(run, diff_bytes),
    }  # fmt: skip


def _begun(events: Sequence[Mapping[str, Any]], columns: Mapping[str, Column], run: RunDir) -> float:
    """Zero of the wall-time axis: the start of the first attempt."""
    times = [float(event["time"]) for event in events if event["event"] == Event.START] or [float(event["time"]) for event in events]
    times = times or [moment for column in columns.values() if (moment := column.time(0)) is not None]
    try:
        return min(times) if times else run.job_yaml.stat().st_mtime
    except OSError:
        return 0.0


def _attempts(events: Sequence[Mapping[str, Any]], begun: float, now: float | None, step: int) -> list[dict[str, Any]]:
    """One band each: seconds since the run began, and the steps that it brought. `until` of the newest is the present while it runs."""
    found = event_log.attempts(events)
    bands = []
    for index, attempt in enumerate(found):
        mine = [event for event in events if event["attempt"] == attempt.number]
        after = found[index + 1].start_step if index + 1 < len(found) else None
        last = max([float(event["time"]) for event in mine], default=attempt.started)
        until = attempt.ended if attempt.ended is not None else now if now is not None and after is None else last
        reached = attempt.step if attempt.step is not None else step if after is None else None
        world = next((int(event["world"]) for event in mine if event["event"] == Event.START and _is_number(event.get("world"))), 1)
        end = next((event for event in mine if event["event"] == Event.END), {})
        seconds = float(end["seconds"]) if _is_number(end.get("seconds")) else max(until - attempt.started, 0.0)
        bands.append(
            {
                "number": attempt.number,
                "job_id": attempt.job_id,
                "cause": attempt.cause.value if attempt.cause else "running" if now is not None and after is None else "open",
                "evidence": secrets_scan.masked(attempt.evidence),
                "from": round(attempt.started - begun, 1),
                "until": round(until - begun, 1),
                "from_step": attempt.start_step,
                "until_step": min(reached, after) if reached is not None and after is not None else reached if reached is not None else after,
                "reached_step": reached,
                "lost_steps": attempt.lost_steps,
                "nodes": list(attempt.nodes),
                "world": world,
                "seconds": round(seconds, 1),
                "gpu_hours": seconds * world / 3600,
            }  # fmt: skip
        )
    return bands


def _overflows(events: Sequence[Mapping[str, Any]], begun: float) -> dict[str, Any]:
    """Steps that were skipped because a gradient overflowed: how many, and where (evenly thinned where they are very many)."""
    found = [event for event in events if event["event"] == Event.OVERFLOW and _is_number(event.get("step"))]
    stride = -(-len(found) // _MOST_OVERFLOWS) or 1
    points = [
        [event["step"], round(float(event["time"]) - begun, 1), _plain(event.get("scale")), str(event.get("first", ""))[:120]] for event in found[::stride]
    ]
    return {"count": len(found), "points": points}


def _final(columns: Mapping[str, Column], status: run_status.RunStatus, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of the table that compares runs."""

    def last(key: str) -> float | int | None:
        return _plain(columns[key].values[-1]) if key in columns else None

    validated = (
        [(value, columns["val_loss"].step(index)) for index, value in enumerate(columns["val_loss"].values) if math.isfinite(value)]
        if "val_loss" in columns
        else []
    )
    best = min(validated, default=(None, None))
    rates = _first(columns, FIGURES["throughput"].keys)
    peaks, memory = _first(columns, FIGURES["peak"].keys), _first(columns, FIGURES["memory"].keys)
    return {
        "step": status.step, "max_steps": status.max_steps, "loss": last("loss"), "val_loss": last("val_loss"), "best_val_loss": _plain(best[0]), "best_val_step": best[1], "lr": last("lr"),
        "tokens_per_s_median": _plain(_median(rates)), "peak_pct": _plain(_median(peaks)), "memory_gib": _plain(max(memory, default=None)),
        "overflows": sum(event["event"] == Event.OVERFLOW for event in events), "lost_steps": status.lost_steps,
    }  # fmt: skip


def _first(columns: Mapping[str, Column], keys: Iterable[str]) -> list[float]:
    return next((columns[key].finite for key in keys if key in columns), [])


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _curve(column: Column, begun: float, points: int) -> dict[str, list[Any]]:
    """`s`: steps, `t`: seconds since the run began (None where not logged), `v`: values (None where not finite)."""
    chosen = thinned(column.values, points)
    times = [column.time(index) for index in chosen]
    return {
        "s": [column.step(index) for index in chosen],
        "t": [round(moment - begun, 1) if moment is not None else None for moment in times],
        "v": [_plain(column.values[index]) for index in chosen],
    }


def thinned(values: Sequence[float], points: int) -> list[int]:
    """Indices of at most `points` values, in order: the first, the last, and of each stretch between the lowest, the highest, and
    one that is no number, if there is any."""
    count = len(values)
    if count <= points:
        return list(range(count))
    stretches = max((points - 2) // 3, 1)
    keep = {0, count - 1}
    for number in range(stretches):
        stretch = range(number * count // stretches, (number + 1) * count // stretches)
        finite = [index for index in stretch if math.isfinite(values[index])]
        if finite:
            keep |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < len(stretch):
            keep.add(next(index for index in stretch if not math.isfinite(values[index])))
    return sorted(keep)


def _plain(value: Any) -> float | int | None:
    """A number as JSON has it: six digits, and None for what is none."""
    if not _is_number(value) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.6g}")


def _settings(run: RunDir, job: Job | None) -> list[dict[str, str]]:
    """Every setting as text with where it came from; secrets hidden."""
    if job is None:
        return []
    origins = rundir.origins(run)
    return [
        {
            "name": name,
            "value": secrets_scan.masked(settings_table.masked(name, job)),
            "unit": settings_table.unit_beside(name, job),
            "from": str(origins.get(name, "")),
            "group": group_of(name),
            "meaning": help_of(name),
        }
        for name in names()
    ]


def _code(run: RunDir, most: int) -> dict[str, Any]:
    """Which code the run is of: commit, and what was not committed."""
    shared = RunDir(run.code.parent)
    facts = snapshot.facts_of(shared)
    try:
        with safe_read.open_file(shared.diff) as file:
            size, raw = os.fstat(file.fileno()).st_size, safe_read.read_some(file, shared.diff, most)
    except FileNotFoundError:
        size, raw = 0, b""
    known = {name: facts.get(name) for name in _FACTS}
    return {**known, "diff": secrets_scan.masked(raw.decode(errors="replace")), "diff_bytes": size, "diff_cut": size > most}


def members_of(runs: Sequence[RunDir]) -> list[RunDir]:
    """The same runs, each once, an array standing for its members."""
    found: dict[Path, RunDir] = {}
    for run in runs:
        found |= {one.path: one for one in store.runs_in(run)}
    return list(found.values())

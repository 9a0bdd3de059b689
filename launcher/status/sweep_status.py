"""What a sweep has come to: a table of its trials, the best one and the command that trains it in full, what mattered, a picture.

Everything is read from the run directories, so that it is right whatever became of the study's journal.
"""

import json
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.config.resolver import load
from jobs.core.atomic_write import replacing
from jobs.core.contract import Cause, Event
from jobs.core.errors import DamagedFileError, HoldfastError, SettingError
from jobs.run import event_log
from jobs.run.rundir import RunDir
from jobs.sweep import search_space
from launcher.attempt.evidence import tail_of_log
from launcher.status import run_status
from launcher.sweeps.study import curve_of, value_of
from launcher.sweeps.trial_values import values_of

_POLL_S = 1.0
# States of a trial, in the order in which they are counted out; the first ones are on their way.
_STATES = ("running", "waiting", "finished", "pruned", "failed", "cancelled", "stopped", "damaged", "missing")
OPEN = frozenset({"running", "waiting"})
# Fewer finished trials say nothing about which setting mattered.
_LEAST_FOR_IMPORTANCE = 4
Queue = dict[str, tuple[str, str, str]]


@dataclass(frozen=True)
class Trial:
    """One trial as `sweep show` prints it. `value` is what counts, `best` the best of all validations, at `best_step`."""

    number: int
    run: str
    state: str
    job_id: str
    values: dict[str, Any]
    value: float | None
    best: float | None
    best_step: int | None
    step: int
    max_steps: int
    attempts: int
    lost_steps: int
    note: str


def trials_of(run: RunDir, sweep: search_space.Sweep, queue: Queue | None) -> list[Trial]:
    """Every trial of a sweep, in order; `queue` is squeue's answer, None where there is no Slurm to ask."""
    submitted = [event for event in event_log.read(run.ledger) if event["event"] == Event.SUBMITTED]
    job_ids = [str(event["job_id"]) for event in submitted]
    return [trial_of(run.member(number), sweep, queue, job_ids) for number in range(sweep.trials)]


def ask_queue(run: RunDir) -> tuple[Queue | None, str]:
    """squeue's answer; None where it is not needed, because the sweep runs on this machine, or where Slurm does not answer, with a remark."""
    if not any(event["event"] == Event.SUBMITTED for event in event_log.read(run.ledger)):
        return None, ""
    return run_status.ask_queue()


def trial_of(run: RunDir, sweep: search_space.Sweep, queue: Queue | None, job_ids: Sequence[str]) -> Trial:
    """One trial, from its run directory and the queue; `job_ids` are the arrays that were submitted for its sweep."""
    try:
        return _read_trial(run, sweep, queue, job_ids)
    except HoldfastError as err:
        return Trial(int(run.path.name), run.id, "damaged", "", {}, None, None, None, 0, 0, 0, 0, str(err).splitlines()[0])


def _read_trial(run: RunDir, sweep: search_space.Sweep, queue: Queue | None, job_ids: Sequence[str]) -> Trial:
    """As `trial_of`. Raises HoldfastError where a file of the run cannot be read."""
    number = int(run.path.name)
    values, problem = values_of(run)
    if values and (wrong := sweep.refusal(values)):
        raise DamagedFileError(f"{run.trial}: {wrong}")
    queued = next((f"{job_id}_{number}" for job_id in reversed(job_ids) if f"{job_id}_{number}" in (queue or {})), "")
    if problem or not run.job_yaml.exists():
        state = "failed" if problem else "waiting" if queued or (queue is None and job_ids) else "missing"
        note = problem or ("" if state == "waiting" else f"{_last_words(run) or 'not begun'}; holdfast sweep --resume {run.array.id}")
        return Trial(number, run.id, state, queued, values, None, None, None, 0, 0, 0, 0, note)
    row = run_status.collect([run], queue)[0]
    if row.state == "damaged":
        return Trial(number, run.id, row.state, queued, values, None, None, None, 0, 0, 0, 0, row.note)
    attempts = event_log.attempts(event_log.read(run.ledger))
    curve = curve_of(run, sweep)
    best_of = sweep.model_copy(update={"value": "best"})
    best = value_of(curve, best_of)
    state, note = row.state, row.note
    if attempts and attempts[-1].cause is Cause.PRUNED:
        state = "pruned"
    elif state in ("cancelled", "stopped", "failed") and queued and attempts and queued != attempts[-1].job_id:
        # Submitted anew by `sweep --resume`, and not begun again yet.
        state, note = "waiting", f"{state}, queued again"
    if state == "finished" and value_of(curve, sweep) is None:
        note = f"metrics.jsonl has no finite {sweep.metric}"
    return Trial(
        number=number,
        run=run.id,
        state=state,
        job_id=queued or row.job_id,
        values=values,
        value=value_of(curve, sweep),
        best=best,
        best_step=next((step for step, value in curve.items() if value == best), None),
        step=row.step,
        max_steps=row.max_steps,
        attempts=row.attempt,
        lost_steps=row.lost_steps,
        note=note,
    )


def _last_words(run: RunDir) -> str:
    """What the newest batch log of a trial ends with: why it could not begin."""
    logs = sorted(run.logs.glob("*.batch.out"), key=lambda path: path.lstat().st_mtime_ns)
    lines = tail_of_log(logs[-1], 0).split("\n") if logs else []
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def best_of(rows: Sequence[Trial], sweep: search_space.Sweep) -> Trial | None:
    """The finished trial with the best value; None before there is one."""
    finished = [row for row in rows if row.state == "finished" and row.value is not None]
    sign = 1 if sweep.direction == "minimize" else -1
    return min(finished, key=lambda row: (sign * (row.value or 0.0), row.number), default=None)


def print_sweep(run: RunDir, as_json: bool) -> None:
    """The table, the best trial, importance and plot; or all of it as one JSON object."""
    sweep = search_space.load(run.sweep)
    queue, trouble = ask_queue(run)
    rows = trials_of(run, sweep, queue)
    best = best_of(rows, sweep)
    command, left_out = command_of(run, sweep, best.values) if best else ("", "")
    weights, how = importance(run, sweep, rows)
    plot = draw(run, sweep, rows)
    if as_json:
        answer = {
            "sweep": run.id, "path": str(run.path), "metric": sweep.metric, "direction": sweep.direction, "sampler": sweep.sampler, "counts": dict(counts(rows)),
            "trials": [asdict(row) for row in rows], "best": best.number if best else None, "command": command, "left_out": left_out,
            "importance": weights, "importance_by": how, "plot": str(plot) if plot else None,
        }  # fmt: skip
        print(json.dumps(answer, indent=1))
        return
    if trouble:
        print(trouble)
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=400, highlight=False)
    console.print(Text(headline(run, sweep, rows)))
    console.print(table(rows, sweep, best))
    if best:
        print(
            f"best        trial {best.number}: {sweep.metric} {show_value(best.value)}"
            + (f" (its lowest: {show_value(best.best)} at step {best.best_step:,})" if best.best != best.value and sweep.direction == "minimize" else "")
            + f"  ->  {run_status.near(Path(run.member(best.number).path))}/"
        )
        print(f"in full     {command}" + (f"\n            without {left_out}, which the sweep was given" if left_out else ""))
    print("importance  " + ("  ".join(f"{label} {share:.2f}" for label, share in weights.items()) + f"  ({how})" if weights else how))
    print(
        f"plot        {run_status.near(plot) if plot else 'needs matplotlib (pip install matplotlib)' if any(row.value is not None for row in rows) else 'needs a trial that has validated'}"
    )


def headline(run: RunDir, sweep: search_space.Sweep, rows: Sequence[Trial]) -> str:
    less = "less" if sweep.direction == "minimize" else "more"
    return f"{run.id} · {sweep.trials} trials by {sweep.sampler} · {sweep.metric}, {less} is better · " + ", ".join(
        f"{number} {state}" for state, number in counts(rows).items()
    )


def counts(rows: Sequence[Trial]) -> dict[str, int]:
    found = Counter(row.state for row in rows)
    return {state: found[state] for state in (*_STATES, *sorted(set(found) - set(_STATES))) if found[state]}


def table(rows: Sequence[Trial], sweep: search_space.Sweep, best: Trial | None) -> Table:
    """A row for each trial; the best one has a star."""
    grid = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    labels = [dimension.label for dimension in sweep.over]
    for name in ("trial", "state", *labels, sweep.metric, "best", "step", "attempts", "note"):
        grid.add_column(name, no_wrap=name in ("trial", "state"), overflow="fold", justify="right" if name == "trial" else "left")
    for row in rows:
        grid.add_row(
            f"{row.number}{'*' if best and row.number == best.number else ' '}",
            row.state,
            *(Text(search_space.said(row.values[label]) if label in row.values else "") for label in labels),
            show_value(row.value),
            "" if row.best is None else f"{show_value(row.best)} at {row.best_step:,}",
            f"{row.step:,}/{row.max_steps:,}" if row.max_steps else "",
            str(row.attempts or ""),
            Text(row.note),
        )
    return grid


def show_value(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def command_of(run: RunDir, sweep: search_space.Sweep, values: Mapping[str, Any]) -> tuple[str, str]:
    """The command that trains these values in full, and what it leaves out of what the sweep was given."""
    base = load(run.job_yaml)
    words = [*sweep.words, *search_space.words_of(sweep, base, values)]
    shortened = [word for word in words if word.startswith("MAX_STEPS=") and word in sweep.words]
    words = [word for word in words if word not in shortened]
    return " ".join(["holdfast", "submit", *map(shlex.quote, filter(None, [sweep.job, *words]))]), " ".join(shortened)


def importance(run: RunDir, sweep: search_space.Sweep, rows: Sequence[Trial]) -> tuple[dict[str, float], str]:
    """Share of each setting in how the values differ, largest first, and by which method; or why there is none."""
    finished = sum(row.state == "finished" and row.value is not None for row in rows)
    if finished < _LEAST_FOR_IMPORTANCE:
        return {}, f"needs {_LEAST_FOR_IMPORTANCE} finished trials"
    if len({row.value for row in rows if row.state == "finished"}) < 2:
        return {}, "every trial came to the same value"
    from launcher.sweeps import study

    try:
        known = study.in_memory(run, sweep)
    except SettingError:
        return {}, "needs optuna (pip install optuna)"
    import optuna

    try:
        by = f"fANOVA over {finished} finished trials"
        shares = optuna.importance.get_param_importances(known, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0))
    except ImportError:
        by = f"PED-ANOVA over {finished} finished trials; scikit-learn gives fANOVA"
        shares = optuna.importance.get_param_importances(known, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return {str(label): round(float(share), 4) for label, share in shares.items()}, by


def draw(run: RunDir, sweep: search_space.Sweep, rows: Sequence[Trial]) -> Path | None:
    """Writes values over trials, and over each setting, to run.sweep_plot. None where nothing is known yet or matplotlib is missing."""
    shown = [row for row in rows if row.value is not None]
    if not shown:
        return None
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, NullFormatter
    except ImportError:
        return None
    looks = {"finished": ("o", "#4477aa"), "pruned": ("x", "#888888"), "running": ("^", "#228833")}
    other = ("s", "#cc6677")
    width = len(sweep.over) + 1
    figure = Figure(figsize=(3.6 * width + 1, 4), dpi=120, layout="constrained")
    axes = figure.subplots(1, width, sharey=True, squeeze=False)[0]
    for state in dict.fromkeys(row.state for row in shown):
        marker, colour = looks.get(state, other)
        mine = [row for row in shown if row.state == state]
        axes[0].scatter([row.number for row in mine], [row.value for row in mine], marker=marker, color=colour, label=state, s=28)
        for axis, dimension in zip(axes[1:], sweep.over, strict=True):
            places = [_place(dimension, row.values[dimension.label]) for row in mine]
            axis.scatter(places, [row.value for row in mine], marker=marker, color=colour, s=28)
    so_far: list[float] = []
    finished = [row for row in shown if row.state == "finished"]
    better = min if sweep.direction == "minimize" else max
    for row in finished:
        so_far.append(better([*so_far[-1:], row.value or 0.0]))
    axes[0].step([row.number for row in finished], so_far, where="post", color="#4477aa", linewidth=1, label="best so far")
    best = best_of(rows, sweep)
    if best:
        ring = {"marker": "o", "s": 130, "facecolors": "none", "edgecolors": "#aa3377", "linewidths": 1.5}
        axes[0].scatter([best.number], [best.value], label=f"best: trial {best.number}", **ring)
        for axis, dimension in zip(axes[1:], sweep.over, strict=True):
            axis.scatter([_place(dimension, best.values[dimension.label])], [best.value], **ring)
    axes[0].set_xlabel("trial")
    axes[0].set_ylabel(sweep.metric)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=8)
    for axis, dimension in zip(axes[1:], sweep.over, strict=True):
        axis.set_xlabel(dimension.label)
        if dimension.choices:
            axis.set_xticks(range(len(dimension.choices)), dimension.choices, rotation=30 if len(dimension.choices) > 4 else 0)
            axis.set_xlim(-0.5, len(dimension.choices) - 0.5)
        else:
            if dimension.log:
                axis.set_xscale("log")
                axis.xaxis.set_minor_formatter(NullFormatter())
            # The whole range, also where nobody looked yet.
            axis.set_xlim(dimension.low, dimension.high)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(headline(run, sweep, rows), fontsize=10)
    with replacing(run.sweep_plot, flush=False) as file:
        figure.savefig(file, format="png")
    return run.sweep_plot


def _place(dimension: search_space.Dimension, value: Any) -> float:
    return dimension.choices.index(str(value)) if dimension.choices else float(value)


def follow(run: RunDir, quiet: bool) -> list[Trial]:
    """Shows a sweep until every trial is over: a table that moves on a terminal, a line for each change elsewhere. Returns the trials."""
    sweep = search_space.load(run.sweep)
    console = Console(highlight=False)
    known: dict[int, tuple[str, int]] = {}
    over = 0
    with Live(console=console, auto_refresh=False, transient=True) if console.is_terminal and not quiet else _Nothing() as live:
        while True:
            queue, trouble = ask_queue(run)
            if trouble:
                time.sleep(5)  # a controller that restarts; the sweep is not over because it is
                continue
            rows = trials_of(run, sweep, queue)
            if isinstance(live, Live):
                lines = [row for row in rows if row.state != "waiting"][-max(console.height - 4, 5) :]
                live.update(Group(Text(headline(run, sweep, rows)), table(lines, sweep, best_of(rows, sweep))), refresh=True)
            elif not quiet:
                _say_changes(rows, sweep, known)
            # A job leaves the queue a moment before its last ledger line can be read on another node.
            over = 0 if any(row.state in OPEN for row in rows) else over + 1
            if over > 1:
                return rows
            time.sleep(_POLL_S)


def _say_changes(rows: Sequence[Trial], sweep: search_space.Sweep, known: dict[int, tuple[str, int]]) -> None:
    for row in rows:
        now = (row.state, row.attempts)
        if known.get(row.number, ("waiting", 0)) != now:
            values = "  ".join(f"{label}={search_space.said(value)}" for label, value in row.values.items())
            print(
                f"trial {row.number}  {row.state}  {values}  step {row.step:,}/{row.max_steps:,}"
                + (f"  {sweep.metric} {show_value(row.value)}" if row.value is not None else "")
                + (f"  {row.note}" if row.note else ""),
                flush=True,
            )
        known[row.number] = now


class _Nothing:
    """In place of a Live where there is no terminal."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None

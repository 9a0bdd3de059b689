"""A sweep's study: what Optuna knows of it, and what it says.

The run directories are the truth: their job.yaml holds the values, metrics.jsonl the results, the ledger the end. Optuna's
journal beside them is a record that is brought up to date by whoever asks next, and that is written anew from the runs when it
cannot be read. Trial N of the study is task N of the array, whoever comes first and whatever was killed in between; so no trial
can be lost or be run twice.

Everything here needs optuna, which is imported inside functions: a grid, and all that only looks, does without.
"""

import math
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.config.resolver import load
from jobs.core import safe_read
from jobs.core.atomic_write import replacing_by_path
from jobs.core.contract import Cause
from jobs.core.errors import HoldfastError, SettingError
from jobs.run import event_log, metrics_log
from jobs.run.retry_policy import budgets_of, judge
from jobs.run.rundir import RunDir
from jobs.sweep.search_space import Dimension, Sweep, Value
from launcher.sweeps.trial_values import values_of

if TYPE_CHECKING:
    import optuna

# Seconds after which a journal's lock is taken for that of a killed process. An append takes milliseconds.
_LOCK_GRACE_S = 10
_TORN_LOOKS = 10
# So many trials are drawn before tpe begins to learn; fewer in a small sweep.
_STARTUP = 10


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: `complete` with a value, `pruned`, or `failed`; `curve` has its validations as step -> value."""

    state: str
    value: float | None
    curve: dict[int, float]
    reason: str = ""


def curve_of(run: RunDir, sweep: Sweep) -> dict[int, float]:
    """step -> value of the sweep's metric, as far as the run has come."""
    return {int(line["step"]): float(line[sweep.metric]) for line in metrics_log.lines(run.metrics) if isinstance(line.get(sweep.metric), int | float)}


def value_of(curve: Mapping[int, float], sweep: Sweep) -> float | None:
    """The value of a run that counts, from its curve; None where there is none."""
    finite = {step: value for step, value in curve.items() if math.isfinite(value)}
    if not finite:
        return None
    if sweep.value == "last":
        last = curve[max(curve)]
        return last if math.isfinite(last) else None
    return min(finite.values()) if sweep.direction == "minimize" else max(finite.values())


def outcome_of(run: RunDir, sweep: Sweep) -> Outcome | None:
    """How a trial ended; None while it may still go on. A cancelled one may: `holdfast resume` brings it to its end."""
    events = event_log.read(run.ledger)
    attempts = event_log.attempts(events)
    if not attempts or attempts[-1].cause is None or attempts[-1].cause is Cause.CANCELLED:
        return None
    curve = curve_of(run, sweep)
    cause, reason = attempts[-1].cause, attempts[-1].evidence
    if cause is Cause.PRUNED:
        return Outcome("pruned", value_of(curve, sweep), curve, reason)
    if cause is Cause.FINISHED:
        value = value_of(curve, sweep)
        if value is None:
            return Outcome("failed", None, curve, f"metrics.jsonl has no finite {sweep.metric}")
        return Outcome("complete", value, curve)
    if judge(events, budgets_of(load(run.job_yaml))).again:
        return None
    return Outcome("failed", None, curve, reason)


def need_optuna() -> None:
    """Raises SettingError with the command that installs it."""
    try:
        import optuna
    except ImportError as err:
        raise SettingError(
            f"optuna is not installed for {sys.executable}: a sweep by tpe or random, and a pruner, need it.\n"
            f"  {sys.executable} -m pip install 'optuna>=4'      (or holdfast's group of that name: holdfast[sweep])\nA grid does without: list values and leave --trials and --pruner out."
        ) from err
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def create(sweep_dir: RunDir, sweep: Sweep) -> None:
    """Makes the journal of a sweep that is not there yet."""
    need_optuna()
    _study(sweep_dir.study, sweep)


def ask(sweep_dir: RunDir, sweep: Sweep, number: int) -> dict[str, Value]:
    """The values of trial `number`, which runs from now on. Asked again after a kill, the answer is the same."""
    study = opened(sweep_dir, sweep, number)
    update(study, sweep_dir, sweep)
    trial = _trial(study, number)
    if sweep.sampler == "grid":
        point = sweep.point(number)
        for label, value in point.items():
            if label not in trial.params:
                distribution = _distribution(sweep.dimension(label))
                study._storage.set_trial_param(trial._trial_id, label, distribution.to_internal_repr(value), distribution)
        return point
    return {dimension.label: _suggest(trial, dimension) for dimension in sweep.over}


def refuse(sweep_dir: RunDir, sweep: Sweep, number: int) -> None:
    """Tells the study that the values of trial `number` cannot be run."""
    import optuna

    opened(sweep_dir, sweep, number).tell(number, state=optuna.trial.TrialState.FAIL)


def opened(sweep_dir: RunDir, sweep: Sweep, number: int = 0, repair: bool = True) -> "optuna.Study":
    """The study, with the sampler as trial `number` needs it. A journal that cannot be read is set aside and written anew, by
    one that holds the sweep's lock; with `repair` off it raises ValueError instead."""
    need_optuna()
    try:
        if not sweep_dir.study.exists():
            raise ValueError("it is gone")
        if _is_torn(sweep_dir.study):
            raise ValueError("its last line is torn")
        study = _study(sweep_dir.study, sweep, number)
        trials = study.get_trials(deepcopy=False)
    except (ValueError, KeyError, AssertionError) as err:
        if not repair:
            raise ValueError(f"{sweep_dir.study.name} cannot be read ({err})") from err
        return _written_anew(sweep_dir, sweep, number, f"could not be read ({err})", "damaged")
    if repair and (taken_up := _ended_well_since(trials, sweep_dir, sweep)):
        return _written_anew(sweep_dir, sweep, number, f"had trial {', '.join(map(str, taken_up))} as failed, which was resumed since and ended well", "old")
    return study


def _ended_well_since(trials: "Sequence[optuna.trial.FrozenTrial]", sweep_dir: RunDir, sweep: Sweep) -> list[int]:
    """Numbers of the trials that the study has as failed and a person resumed: for Optuna a trial that is over is over."""
    import optuna

    found = []
    for number in (trial.number for trial in trials if trial.state is optuna.trial.TrialState.FAIL):
        run = sweep_dir.member(number)
        try:
            attempts = event_log.attempts(event_log.read(run.ledger))
            # By the ledger first: this is asked for every failed trial whenever anybody opens the study.
            if attempts and attempts[-1].cause in (Cause.FINISHED, Cause.PRUNED) and (outcome := outcome_of(run, sweep)) and outcome.state != "failed":
                found.append(number)
        except HoldfastError as err:
            _warn_damaged(run, err)
    return found


def _written_anew(sweep_dir: RunDir, sweep: Sweep, number: int, why: str, what: str) -> "optuna.Study":
    """The study as the run directories tell it, in place of its journal, which is set aside."""
    aside = sweep_dir.study.with_name(f"{sweep_dir.study.name}.{what}-{time.time():.0f}-{os.getpid()}")
    with replacing_by_path(sweep_dir.study) as fresh:
        replay(_study(fresh, sweep), sweep_dir, sweep)
        with suppress(FileNotFoundError):
            os.rename(sweep_dir.study, aside)
    print(
        f"holdfast: {sweep_dir.study} {why}; it was written anew from the runs" + (f", and the old one is kept as {aside.name}" if aside.exists() else ""),
        file=sys.stderr,
        flush=True,
    )
    return _study(sweep_dir.study, sweep, number)


def _is_torn(journal: Path) -> bool:
    """Whether the last line has no end, and not because somebody is writing it: the next one would be glued to it."""
    for _ in range(_TORN_LOOKS):
        try:
            with safe_read.open_file(journal) as file:
                if file.seek(0, os.SEEK_END) == 0:
                    return False
                file.seek(-1, os.SEEK_END)
                if file.read(1) == b"\n":
                    return False
        except FileNotFoundError:
            return False
        time.sleep(0.1)
    return True


def update(study: "optuna.Study", sweep_dir: RunDir, sweep: Sweep) -> None:
    """Tells the study of every trial that is over and that it believes to run."""
    import optuna

    states = {"complete": optuna.trial.TrialState.COMPLETE, "pruned": optuna.trial.TrialState.PRUNED, "failed": optuna.trial.TrialState.FAIL}
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        run = sweep_dir.member(trial.number)
        try:
            outcome = outcome_of(run, sweep)
        except HoldfastError as err:
            _warn_damaged(run, err)
            continue
        if outcome is None:
            continue
        if sweep.pruner != "none":
            # Each is a line that is flushed to disk, and only a pruner looks at them.
            report(study, trial.number, outcome.curve)
        # Two may do this at once; the second finds it done.
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            study.tell(trial.number, outcome.value if outcome.state == "complete" else None, states[outcome.state], skip_if_finished=True)


def _warn_damaged(run: RunDir, err: HoldfastError) -> None:
    print(f"holdfast: run {run.id} is damaged and left out of the study: {str(err).splitlines()[0]}", file=sys.stderr, flush=True)


def report(study: "optuna.Study", number: int, curve: Mapping[int, float]) -> None:
    """Adds the validations of a trial that the study has not heard of."""
    import optuna

    trial = study.get_trials(deepcopy=False)[number]
    if trial.state.is_finished():
        return
    for step, value in sorted(curve.items()):
        if step not in trial.intermediate_values:
            with suppress(optuna.exceptions.UpdateFinishedTrialError):
                study._storage.set_trial_intermediate_value(trial._trial_id, step, value)


def is_hopeless(study: "optuna.Study", number: int) -> bool:
    """Whether the pruner gives the trial up after what was reported of it."""
    return bool(_trial(study, number).should_prune())


def replay(study: "optuna.Study", sweep_dir: RunDir, sweep: Sweep) -> None:
    """Adds every trial of a sweep to an empty study, from the run directories."""
    import optuna

    begun = {
        number for path in sweep_dir.members.glob("*/trial.json") if (number := safe_read.index_of(path.parent.name)) is not None and number < sweep.trials
    }
    for number in range(max(begun, default=-1) + 1):
        run = sweep_dir.member(number)
        try:
            values, problem = values_of(run)
            if values and (problem := problem or sweep.refusal(values)):
                values = {}
            outcome = outcome_of(run, sweep)
        except HoldfastError as err:
            _warn_damaged(run, err)
            values, problem, outcome = {}, "damaged", None
        state = optuna.trial.TrialState.WAITING
        if values:
            state = optuna.trial.TrialState.RUNNING
        if problem or (outcome and outcome.state == "failed"):
            state = optuna.trial.TrialState.FAIL
        elif outcome:
            state = optuna.trial.TrialState.COMPLETE if outcome.state == "complete" else optuna.trial.TrialState.PRUNED
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params=values,
                distributions={label: _distribution(sweep.dimension(label)) for label in values},
                value=outcome.value if outcome and outcome.state != "failed" else None,
                intermediate_values=outcome.curve if outcome else {},
            )
        )


def in_memory(sweep_dir: RunDir, sweep: Sweep) -> "optuna.Study":
    """The study as the run directories tell it, apart from any journal."""
    import optuna

    need_optuna()
    study = optuna.create_study(direction=sweep.direction)
    replay(study, sweep_dir, sweep)
    return study


def _study(journal: Path, sweep: Sweep, number: int = 0) -> "optuna.Study":
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    # A lock by symlink works on every shared file system; the path is absolute, since the link points at the journal.
    path = str(journal.absolute())
    storage = JournalStorage(JournalFileBackend(path, JournalFileSymlinkLock(path, grace_period=_LOCK_GRACE_S)))
    # Every trial is drawn in a process of its own: with one seed for all, all would draw the same.
    seed = (sweep.sampler_seed * 1_000_003 + number) % 2**32
    sampler: optuna.samplers.BaseSampler
    if sweep.sampler == "tpe":
        # What other trials are busy with counts as bad, so that two that ask at once are not sent to the same place.
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(_STARTUP, max(4, sweep.trials // 3)), constant_liar=True)
    else:
        sampler = optuna.samplers.RandomSampler(seed=seed)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if sweep.pruner == "median":
        pruner = optuna.pruners.MedianPruner(n_startup_trials=sweep.prune_startup, n_warmup_steps=sweep.prune_after)
    return optuna.create_study(storage=storage, study_name="sweep", direction=sweep.direction, sampler=sampler, pruner=pruner, load_if_exists=True)


def _trial(study: "optuna.Study", number: int) -> "optuna.Trial":
    """Trial `number`, running. Those before it that have not begun are made too, and wait for their own task."""
    import optuna

    while len(study.get_trials(deepcopy=False)) <= number:
        study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING))
    frozen = study.get_trials(deepcopy=False)[number]
    if frozen.state is optuna.trial.TrialState.WAITING:
        study._storage.set_trial_state_values(frozen._trial_id, optuna.trial.TrialState.RUNNING)
    return optuna.trial.Trial(study, frozen._trial_id)


def _suggest(trial: "optuna.Trial", dimension: Dimension) -> Value:
    if dimension.choices:
        return str(trial.suggest_categorical(dimension.label, dimension.choices))
    known = _distribution(dimension)
    if dimension.whole:
        return int(trial.suggest_int(dimension.label, known.low, known.high, step=known.step, log=known.log))
    return float(trial.suggest_float(dimension.label, known.low, known.high, step=known.step, log=known.log))


def _distribution(dimension: Dimension) -> Any:
    import optuna

    if dimension.choices:
        return optuna.distributions.CategoricalDistribution(dimension.choices)
    assert dimension.low is not None and dimension.high is not None
    if dimension.whole:
        # An end that no step reaches is left out here as well, or Optuna would say so each time.
        high = int(dimension.ends()[-1]) if not dimension.log else int(dimension.high)
        return optuna.distributions.IntDistribution(int(dimension.low), high, log=dimension.log, step=int(dimension.step or 1))
    high_end = float(dimension.ends()[-1])
    return optuna.distributions.FloatDistribution(dimension.low, high_end, log=dimension.log, step=dimension.step)

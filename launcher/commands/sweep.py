"""holdfast sweep: a grid or a search over settings, as one job array. Each trial is an ordinary run.

    holdfast sweep JOB --over LR=1e-4..1e-2:log --over PRECISION=bf16,fp32 --trials 12
    holdfast sweep JOB --space sweeps/quickstart.yaml
    holdfast sweep show SWEEP      holdfast sweep cancel SWEEP      holdfast sweep --resume SWEEP --trials 20

Nothing runs beside the array: task N takes up trial N, asks the study for values when its first attempt begins
(`launcher.sweeps.trial`), and tells it at the end. Requeue, budgets and resume are those of any run.
"""

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.config.aliases import plain
from jobs.config.job_files import DEFAULT_JOB, find_job_file
from jobs.config.layers import Given
from jobs.config.overrides import split_words, words_from_make
from jobs.config.resolver import Resolved
from jobs.config.setting_names import setting_name
from jobs.config.settings import Job, is_mapping_of_numbers
from jobs.core.atomic_write import replace_file
from jobs.core.contract import Event, Exit
from jobs.core.errors import HoldfastError, ImpossibleJobError, NotFoundError, SettingError, SubmissionUnknownError, SubmitError
from jobs.core.imports import nearest
from jobs.run import event_log, permissions, store
from jobs.run.rundir import RunDir
from jobs.sweep import parser, search_space
from launcher.cluster.doctor import said_at_submit
from launcher.local.executor import run_attempts
from launcher.output import settings_table
from launcher.status import run_status, sweep_status
from launcher.status.lookup import which_run
from launcher.status.sweep_status import Trial
from launcher.submission import sweep_jobs
from launcher.submission.create_run import prepare, resolve_here
from launcher.submission.reconcile import require_jobs_of
from launcher.submission.start_estimate import start_estimate
from launcher.sweeps.trial import take_up
from launcher.sweeps.trial_values import values_of
from slurm.client import Slurm
from slurm.script.render import run_dir_of, script_for

# What the built-in training writes at its validations, and between them.
_LOGGED = ("val_loss", "val_bits_per_byte", "loss", "grad_norm", "tokens_per_s")


def command(
    words: Sequence[str],
    cwd: Path,
    *,
    over: Sequence[str],
    file: str | None,
    options: dict[str, Any],
    resumed: str | None,
    local: bool,
    test_only: bool,
    wait: bool,
    as_json: bool,
) -> int:
    """`holdfast sweep ...`: which of its forms is meant. Returns the exit code."""
    verb = words[0] if words and words[0] in ("show", "cancel") else "resume" if resumed else "start"
    given = [f"--{name.replace('_', '-')}" for name, value in {"over": list(over) or None, "space": file, **options}.items() if value is not None]
    refused = [option for option in given if verb != "start" and not (verb == "resume" and option in ("--trials", "--parallel"))]
    if refused:
        what = {
            "resume": "A sweep keeps what it searches; only --trials and --parallel may be given to --resume",
            "show": "sweep show takes a sweep",
            "cancel": "sweep cancel takes a sweep",
        }[verb]
        raise SettingError(f"{', '.join(refused)}: {what} (command line).")
    if verb == "show":
        run = find(words[1:], cwd)
        if wait:
            return wait_for(run, as_json)
        sweep_status.print_sweep(run, as_json)
        return Exit.DONE
    if verb == "cancel":
        return cancel(words[1:], cwd)
    if resumed:
        return resume([resumed, *words], cwd, trials=options.get("trials"), parallel=options.get("parallel"), local=local, wait=wait, as_json=as_json)
    at_once = options.get("parallel")
    if at_once is not None and not at_once.isdigit():
        # PARALLEL is a setting too, and a flag of every command; it is never a number.
        words, options = [*words, f"PARALLEL={at_once}"], {**options, "parallel": None}
    return start(words, cwd, over=over, file=file, options=options, local=local, test_only=test_only, wait=wait, as_json=as_json)


def start(
    words: Sequence[str],
    cwd: Path,
    *,
    over: Sequence[str],
    file: str | None,
    options: Mapping[str, Any],
    local: bool,
    test_only: bool,
    wait: bool,
    as_json: bool,
) -> int:
    """Checks a sweep, submits it, says where and what next. Nothing is left behind when anything is wrong. Returns the exit code."""
    base, sweep = described(words, cwd, over, file, options)
    job = base.job
    estimate = ""
    slurm = Slurm()
    if not local:
        estimate = start_estimate(slurm.test_only(script_for(job, run_dir_of(job, cwd), sys.executable, array_size=sweep.trials)))
    if test_only:
        _say(base, sweep, estimate, local, as_json)
        print(json.dumps({"would_start": estimate, "trials": sweep.trials}) if as_json else "nothing was submitted (--test-only)")
        return Exit.DONE

    def complete(staging: RunDir) -> None:
        staging.sweep.write_text(sweep.model_dump_json(indent=1) + "\n")
        if sweep.has_study:
            from launcher.sweeps import study

            study.create(staging, sweep)

    run, made = prepare(base, cwd, sys.executable, tasks=sweep.trials, complete=complete)
    if not made:
        if not run.sweep.exists():
            raise SettingError(f"RUN_ID: {run.path} exists and is no sweep.")
        if as_json:
            print(json.dumps({"sweep": run.id, "path": str(run.path), "job_id": "", "trials": search_space.load(run.sweep).trials}))
        else:
            print(
                f"sweep {run.id} exists already; nothing was submitted. holdfast sweep show {run.id} shows it, holdfast sweep --resume {run.id} goes on with it."
            )
        return Exit.DONE
    if local:
        _say(base, sweep, "", local, as_json)
        return _run_here(run, sweep, range(sweep.trials), as_json)
    try:
        from launcher.submission.submitit_executor import to_slurm

        job_id = to_slurm(run, job, os.environ)
    except SubmissionUnknownError:
        raise
    except (SubmitError, SettingError):
        store.discard(run)
        raise
    _say(base, sweep, estimate, local, as_json)
    if as_json:
        print(json.dumps({"sweep": run.id, "path": str(run.path), "job_id": job_id, "trials": sweep.trials}), flush=True)
    else:
        print(f"submitted job {job_id} as sweep {run.id}  ->  {run_status.near(run.path)}/")
        print(f"follow it with: holdfast sweep show {run.id}    or: holdfast status", flush=True)
    return wait_for(run, as_json) if wait else Exit.DONE


def described(words: Sequence[str], cwd: Path, over: Sequence[str], file: str | None, options: Mapping[str, Any]) -> tuple[Resolved, search_space.Sweep]:
    """The job that is searched and the sweep over it, both checked. Raises SettingError with every fault, ImpossibleJobError."""
    faults: list[str] = []
    path, shown = parser.find_file(file, cwd) if file else (None, "")
    base: Resolved | None = None
    impossible: ImpossibleJobError | None = None
    try:
        base = resolve_here(words, os.environ, cwd)
    except ImpossibleJobError as err:
        impossible = err  # perhaps not with the values of the sweep
    except SettingError as err:
        faults.append(str(err))
    try:
        sweep = parser.define(over, options, path, shown, base.job.array_parallel if base else 256)
    except SettingError as err:
        raise SettingError("\n".join([*faults, str(err)])) from err
    pairs, named, _ = split_words([*words_from_make(os.environ), *words])
    fixed = {setting_name(key) for key, _ in pairs}
    faults += [f"{d.name.upper()} is given and varies too (command line); leave one out." for d in sweep.over if d.name in fixed and not d.key]
    if faults:
        raise SettingError("\n".join(faults))
    if base is None:
        base = _with_some_point(sweep, words, cwd, impossible)
    if sweep.has_study:
        from launcher.sweeps import study

        study.need_optuna()
    search_space.check(sweep, base)
    asked = named or os.environ.get("HOLDFAST_JOB") or os.environ.get("JOB") or DEFAULT_JOB
    job = base.job.model_copy(update={"array_parallel": min(sweep.parallel, sweep.trials)})
    # RUN_ID names this sweep, a run of the best values is another one; NODE_ENV may hold a token.
    left_out = {"run_id", "array_parallel", "node_env", *(dimension.name for dimension in sweep.over)}
    chosen = [name for name, origin in base.origins.items() if name not in left_out and origin.startswith(("environment", "command line", "auto"))]
    # An own script without a job file has none: the default one is an example of the built-in training.
    shown = find_job_file(asked, cwd)[1] if str(cwd / asked) in base.files else ""
    sweep = sweep.model_copy(update={"job": shown, "words": tuple(_word(base.job, name) for name in chosen)})
    return replace(base, job=job, origins={**base.origins, "array_parallel": "--parallel"}), sweep


def _word(job: Job, name: str) -> str:
    """KEY=value of a setting, which reads back as this value."""
    value, text = getattr(job, name), job.text(name) or "none"
    # A list or a comma in a mapping needs its longer form.
    is_plain = not is_mapping_of_numbers(name) or plain(Given(name, text, "")) == value
    return f"{name.upper()}={text}" if is_plain else search_space.mapping_word(name, value)


def _with_some_point(sweep: search_space.Sweep, words: Sequence[str], cwd: Path, impossible: ImpossibleJobError | None) -> Resolved:
    """The job with the first point of the sweep that can run, where it cannot run without."""
    for values in search_space.points_to_try(sweep):
        if any(dimension.key for dimension in sweep.over):
            break
        try:
            return resolve_here([*words, *(f"{label}={value}" for label, value in values.items())], os.environ, cwd)
        except ImpossibleJobError:
            continue
    raise impossible or ImpossibleJobError("No point of this sweep can run.")


def resume(naming: Sequence[str], cwd: Path, *, trials: int | None, parallel: str | None, local: bool, wait: bool, as_json: bool) -> int:
    """Starts the trials of a sweep that are missing or were stopped, and adds new ones up to `trials`. Returns the exit code."""
    permissions.check_run(run := find(naming, cwd), "holdfast sweep --resume")
    sweep = search_space.load(run.sweep)
    if trials is not None and trials != sweep.trials:
        if sweep.sampler == "grid":
            raise SettingError(f"{run.id} is a grid of {sweep.trials} points, all of which it has; a new sweep takes other values.")
        if trials < sweep.trials:
            raise SettingError(
                f"{run.id} has {sweep.trials} trials already; --trials says how many there shall be in all. holdfast sweep cancel {run.id} stops those that wait."
            )
        if trials > search_space.MAX_TRIALS:
            raise SettingError(f"--trials: at most {search_space.MAX_TRIALS:,} in one array.")
        for number in range(sweep.trials, trials):
            run.member(number).logs.mkdir(parents=True, exist_ok=True)
        sweep = sweep.model_copy(update={"trials": trials})
    if parallel is not None:
        if not parallel.isdigit() or not int(parallel):
            raise SettingError(f"--parallel: {parallel!r} is not a number of trials of at least 1.")
        sweep = sweep.model_copy(update={"parallel": int(parallel)})
    if sweep != search_space.load(run.sweep):
        replace_file(run.sweep, sweep.model_dump_json(indent=1) + "\n")
    slurm = Slurm()
    try:
        if slurm.available():
            sweep_jobs.taken_over(run, slurm)
    except SubmitError as err:
        if not local:
            raise SubmitError(f"{err}\nWhich trials wait or run is not known, so nothing was submitted.") from err
    queue, trouble = sweep_status.ask_queue(run)
    if trouble and not local:
        raise SubmitError(f"{trouble}\nWhich trials wait or run is not known, so nothing was submitted.")
    rows = sweep_status.trials_of(run, sweep, queue)
    open_ones = [row for row in rows if row.state in ("missing", "stopped", "cancelled")]
    if not open_ones:
        print(
            json.dumps({"sweep": run.id, "path": str(run.path), "job_id": "", "trials": 0})
            if as_json
            else f"sweep {run.id}: every trial is over, waits or runs; nothing was submitted (--trials N adds more)"
        )
        return Exit.DONE
    permissions.check_run(run, "holdfast sweep --resume", numbers := [row.number for row in open_ones], trees=False)
    for number in numbers:
        run.member(number).stop_file.unlink(missing_ok=True)
    if local:
        return _run_here(run, sweep, numbers, as_json)
    job_id = sweep_jobs.submit(run, numbers, sweep.parallel, slurm)
    if as_json:
        print(json.dumps({"sweep": run.id, "path": str(run.path), "job_id": job_id, "trials": len(numbers)}), flush=True)
    else:
        print(f"submitted job {job_id} for {len(numbers)} trial{'s' if len(numbers) > 1 else ''} of sweep {run.id} ({sweep_jobs.ranges(numbers)})", flush=True)
    return wait_for(run, as_json) if wait else Exit.DONE


def cancel(naming: Sequence[str], cwd: Path) -> int:
    """Stops the trials that run or wait; each saves first, and `--resume` goes on with all of them."""
    run = find(naming, cwd)
    queue, trouble = sweep_status.ask_queue(run)
    if queue is None:
        raise SubmitError(trouble or "Slurm is not on this machine; a sweep that runs here is stopped with Ctrl-C.")
    rows = [row for row in sweep_status.trials_of(run, search_space.load(run.sweep), queue) if row.state in ("running", "waiting")]
    require_jobs_of(run, [row.job_id for row in rows if row.job_id], Slurm())
    for row in rows:
        member = run.member(row.number)
        if member.job_yaml.exists():
            # Written down before Slurm is told, so that nothing starts it again.
            event_log.append(member.ledger, Event.CANCEL, attempt=row.attempts, job_id=row.job_id)
    if not rows:
        print(f"sweep {run.id}: no trial waits or runs; there is nothing to cancel")
        return Exit.DONE
    Slurm().run("scancel", *sorted({row.job_id for row in rows}))
    print(f"cancelled {len(rows)} trial{'s' if len(rows) > 1 else ''} of sweep {run.id}; holdfast sweep --resume {run.id} goes on with them")
    return Exit.DONE


def find(naming: Sequence[str], cwd: Path) -> RunDir:
    """The sweep that a person means: a directory, an id or a name; the newest when none is named. Raises NotFoundError."""
    folder, word = which_run(naming, os.environ, cwd)
    if word:
        for candidate in (cwd / word, folder / word):
            if RunDir(candidate).sweep.is_file():
                return RunDir(candidate.absolute())
    sweeps = sorted(
        (path.parent for path in folder.glob("*/sweep.json") if not path.parent.name.startswith(".")), key=lambda path: (path / "job.yaml").stat().st_mtime_ns
    )
    if not sweeps:
        raise NotFoundError(f"there is no sweep in {folder}/ yet; holdfast sweep JOB --over KEY=a,b makes one")
    for path in reversed(sweeps):
        name, _, run_id = path.name.rpartition("-")
        if word in (None, path.name, name, run_id):
            return RunDir(path.absolute())
    raise NotFoundError(f"no sweep {word!r} in {folder}/; the last ones: {', '.join(path.name for path in sweeps[-5:])}")


def wait_for(run: RunDir, as_json: bool) -> int:
    """Shows the sweep until every trial is over. 0 when at least one finished, else 1."""
    rows = sweep_status.follow(run, quiet=as_json)
    if not as_json:
        sweep_status.print_sweep(run, as_json=False)
    return Exit.DONE if any(row.state == "finished" for row in rows) else Exit.FAILED


def _run_here(run: RunDir, sweep: search_space.Sweep, numbers: Sequence[int], as_json: bool) -> int:
    """One trial after the other on this machine, in the foreground."""
    for number in numbers:
        member = run.member(number)
        try:
            take_up(member, f"local-{os.getpid()}")
            values, _ = values_of(member)
            if not as_json:
                print(f"trial {number} of {sweep.trials}: {_values(values)}", flush=True)
            # What attempts say is for a person.
            with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
                code = run_attempts(member, os.environ)
        except HoldfastError as err:
            print(f"trial {number}: {err}", file=sys.stderr, flush=True)
            continue
        if code in (Exit.REQUEUE, Exit.INTERRUPTED):
            print(f"stopped and saved; holdfast sweep --resume {run.id} --local goes on", file=sys.stderr, flush=True)
            return code
        row = sweep_status.trial_of(member, sweep, None, [])
        if not as_json:
            print(f"  {_ended(row, sweep)}", flush=True)
    sweep_status.print_sweep(run, as_json)
    return Exit.DONE if any(row.state == "finished" for row in sweep_status.trials_of(run, sweep, None)) else Exit.FAILED


def _ended(row: Trial, sweep: search_space.Sweep) -> str:
    return f"{row.state}, {sweep.metric} {'-' if row.value is None else search_space.said(row.value)} at step {row.step:,}" + (
        f" ({row.note})" if row.note else ""
    )


def _values(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{label}={search_space.said(value)}" for label, value in values.items())


def _say(base: Resolved, sweep: search_space.Sweep, estimate: str, local: bool, as_json: bool) -> None:
    if as_json:
        return
    how = {"grid": "a grid", "random": "drawn at random", "tpe": "chosen by tpe"}[sweep.sampler]
    # Of its parts those that no trial changes.
    print(
        f"{' · '.join(settings_table.headline(base.job).split(' · ')[:2])} · {sweep.trials} trials, {how}, {'one' if local else min(sweep.parallel, sweep.trials)} at a time"
    )
    print("  over          " + "  ".join(dimension.text() for dimension in sweep.over))
    varying = {dimension.name for dimension in sweep.over if not dimension.key} | {"array_parallel"}
    print(
        f"  not default   {settings_table.not_default(replace(base, origins={name: 'default' if name in varying else origin for name, origin in base.origins.items()}))}"
    )
    print(
        f"  best is       the {'lowest' if sweep.direction == 'minimize' else 'highest'} {sweep.metric}"
        + (" of the last validation" if sweep.value == "last" else " of any validation")
        + ("" if sweep.pruner == "none" else f"; trials worse than the median are given up, from the {sweep.prune_startup + 1}th on")
    )
    if base.job.entry is None and sweep.metric not in _LOGGED:
        near = nearest(sweep.metric, _LOGGED)
        print(f"  careful       the built-in training logs no {sweep.metric}" + (f"; did you mean {near}?" if near else f"; it logs {', '.join(_LOGGED)}"))
    for note in base.notes:
        print(f"  read as       {note}")
    if estimate:
        print(f"  time limit    {said_at_submit(Slurm(), base.job)}")
        print(f"  start         {estimate}")

"""The commands that do something: submit, run, cancel, resume."""

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jobs.config.resolver import Resolved, load
from jobs.config.setting_names import setting_name
from jobs.config.settings import Job, group_of, names
from jobs.core.contract import LOCAL, Cause, Event, Exit
from jobs.core.errors import HoldfastError, RunOwnedError, SettingError, SubmissionUnknownError, SubmitError
from jobs.run import event_log, permissions, store
from jobs.run.rundir import RunDir
from launcher.cluster.doctor import said_at_submit
from launcher.commands import sweep
from launcher.local.executor import gpus_here, run_attempts
from launcher.output import settings_table
from launcher.status import run_state, run_status
from launcher.submission.create_run import prepare, resolve_here, resolve_members
from launcher.submission.reconcile import require_jobs_of, taken_over
from launcher.submission.reconfigure import change, refuse_array
from launcher.submission.snapshot import refuse_without_code
from launcher.submission.start_estimate import start_estimate
from slurm.client import Slurm
from slurm.script.render import run_dir_of, script_for

_POLL_S = 0.5
MAX_ARRAY = 10_000


def submit_job(words: Sequence[str], cwd: Path, *, local: bool, test_only: bool, wait: bool, array: Sequence[str], as_json: bool) -> int:
    """Submits, says where and what next. Nothing is left behind when Slurm refuses. Returns the exit code."""
    grid = _grid(array)
    resolved = resolve_here(words, os.environ, cwd)
    members = resolve_members(words, grid, os.environ, cwd)
    _check_members(resolved, members)
    job = resolved.job
    slurm = Slurm()
    estimate = ""
    if not local:
        text = script_for(job, run_dir_of(job, cwd), sys.executable, array_size=len(members) or None)
        # Asked before anything is made: a job that Slurm refuses leaves no trace.
        estimate = start_estimate(slurm.test_only(text))
    if test_only:
        _say_job(resolved, estimate, members, as_json)
        print(json.dumps({"would_start": estimate}) if as_json else "nothing was submitted (--test-only)")
        return Exit.DONE
    run, made = prepare(resolved, cwd, sys.executable, members)
    if not made:
        return _already_there(run, job, slurm, local, as_json)
    try:
        if local:
            from launcher.submission.submitit_executor import to_local

            if members:
                raise SettingError("--array and --local cannot be combined; run the members one by one.")
            job_id = f"{LOCAL}{to_local(run, job).job_id}"
        else:
            from launcher.submission.submitit_executor import to_slurm

            job_id = to_slurm(run, job, os.environ, members=len(members))
    except SubmissionUnknownError:
        raise
    except (SubmitError, SettingError):
        store.discard(run)
        raise
    if as_json:
        print(json.dumps({"run": run.id, "path": str(run.path), "job_id": job_id, "members": len(members)}))
    else:
        _say_job(resolved, estimate, members, as_json)
        print(f"submitted job {job_id} as {'array' if members else 'run'} {run.id}  ->  {run_status.near(run.path)}/")
        if members:
            print("follow it with: holdfast watch")
        else:
            print(f"follow it with: holdfast logs -f {run.id}    or: holdfast watch")
    if wait:
        return wait_for([run.member(i) for i in range(len(members))] or [run], slurm if not local else None)
    return Exit.DONE


def run_here(words: Sequence[str], cwd: Path) -> int:
    """One node, the GPUs of this machine (or one process on a CPU), in the foreground."""
    gpus = gpus_here()
    here = {"nodes": 1}
    given = {setting_name(word.partition("=")[0].lstrip("-")) for word in words}
    if "gpus_per_node" not in given and not any(name in os.environ for name in ("GPUS_PER_NODE", "HOLDFAST_GPUS_PER_NODE")):
        here["gpus_per_node"] = max(gpus, 1)
    resolved = resolve_here(words, os.environ, cwd, allocation=here, allocation_origin="this machine")
    run, made = prepare(resolved, cwd, sys.executable)
    print(f"{settings_table.headline(resolved.job)}\nrun {run.id}  ->  {run_status.near(run.path)}/", flush=True)
    if not made:
        print("this run exists already; it goes on from its last checkpoint", flush=True)
    code = run_attempts(run, os.environ, foreground=True)
    if code == Exit.REQUEUE:
        print(f"stopped and saved; holdfast resume --local {run.id} goes on")
    return code


def resume_run(run: RunDir, local: bool, words: Sequence[str] = (), allow: bool = False) -> int:
    """Starts a run again. Its settings are those that were frozen, with `words` over them; its budgets and a wish to stop are forgotten."""
    permissions.check_run(run, "holdfast resume")
    refuse_array(run)
    refuse_without_code(run)
    events = event_log.read(run.ledger)
    attempts = event_log.attempts(events)
    if attempts and attempts[-1].cause is Cause.FINISHED and not allow:
        print(f"run {run.id} is finished; there is nothing to resume")
        return Exit.DONE
    state = run_status.collect([run], run_status.ask_queue()[0])[0]
    if state.state == "damaged":
        raise HoldfastError(f"run {run.id} is damaged and cannot be resumed: {state.note}")
    if state.state in ("running", "waiting"):
        raise SettingError(f"run {run.id} is {state.state} as job {state.job_id}; holdfast cancel {run.id} stops it first.")
    if elsewhere := run_state.begun_elsewhere(run, attempts):
        raise RunOwnedError(f"run {run.id} was {elsewhere}")
    if not (local or (attempts and attempts[-1].job_id.startswith(LOCAL))) and Slurm.available():
        queued = taken_over(run, Slurm())
        if queued is not None:
            if words:
                raise SettingError(f"run {run.id} is in the queue already, as job {queued}; scancel {queued} first, then change it.")
            print(f"run {run.id} is in the queue already, as job {queued}; nothing was submitted")
            return Exit.DONE
    if words or allow:
        changed = change(run, words, allow=allow, executable=sys.executable)
        print("changed: " + (", ".join(f"{name.upper()} {old} -> {new}" for name, (old, new) in changed.items()) or "nothing"), flush=True)
    job = load(run.job_yaml)
    run.stop_file.unlink(missing_ok=True)
    was_local = bool(attempts) and attempts[-1].job_id.startswith(LOCAL)
    if local or was_local:
        event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=f"{LOCAL}{os.getpid()}", by="resume")
        return run_attempts(run, os.environ, foreground=True)
    from launcher.submission.submitit_executor import resubmit

    job_id = resubmit(run, job, os.environ)
    print(f"submitted job {job_id} for run {run.id}; it goes on from step {state.checkpoint_step or 0:,}")
    return Exit.DONE


def cancel_run(run: RunDir) -> None:
    """Asks a run, or every run of an array, to stop for good: first written down, so that nothing starts it again, then Slurm
    (or its process) is told."""
    if run.has_members:
        return _cancel_array(run)
    state = run_status.collect([run], run_status.ask_queue()[0])[0]
    if state.state == "damaged":
        raise HoldfastError(_not_cancelled(state))
    if state.state not in ("running", "waiting"):
        print(f"run {run.id} is {state.state}; there is nothing to cancel")
        return
    if not state.job_id.startswith(LOCAL):
        require_jobs_of(run, [state.job_id], Slurm())
    event_log.append(run.ledger, Event.CANCEL, attempt=state.attempt, job_id=state.job_id)
    if state.job_id.startswith(LOCAL):
        run.stop_file.touch()
        print(f"run {run.id} will save and stop within a step or two")
        return
    Slurm().cancel(state.job_id)
    print(f"cancelled job {state.job_id} of run {run.id}; holdfast resume {run.id} goes on from its last checkpoint")


def _cancel_array(array: RunDir) -> None:
    if array.sweep.exists():
        sweep.cancel([str(array.path)], Path.cwd())
        return
    members = store.runs_in(array)
    states = run_status.collect(members, run_status.ask_queue()[0])
    live = [(member, state) for member, state in zip(members, states, strict=True) if state.state in ("running", "waiting")]
    damaged = [_not_cancelled(state) for state in states if state.state == "damaged"]
    if not live and not damaged:
        print(f"array {array.id}: no run of it waits or runs; there is nothing to cancel")
        return
    require_jobs_of(array, [state.job_id for _, state in live if not state.job_id.startswith(LOCAL)], Slurm())
    for member, state in live:
        event_log.append(member.ledger, Event.CANCEL, attempt=state.attempt, job_id=state.job_id)
    if live:
        Slurm().cancel(*sorted({state.job_id for _, state in live}))
    print(f"cancelled {len(live)} run{'s' if len(live) > 1 else ''} of array {array.id}; holdfast resume {array.id}.N goes on with one of them")
    if damaged:
        raise HoldfastError("\n".join(damaged[:5]))


def _not_cancelled(state: run_status.RunStatus) -> str:
    return f"run {state.run} is damaged, so its job is not known and was not cancelled: {state.note}. If it has one: scancel JOBID"


def wait_for(runs: Sequence[RunDir], slurm: Slurm | None) -> int:
    """Waits until every run is over. 0 when all finished; of one run its exit code where that says what to do, else 1."""
    while True:
        queue = None
        if slurm is not None:
            try:
                queue = slurm.queue()
            except SubmitError:
                time.sleep(5)  # a controller that restarts; the runs are not over because it is
                continue
        states = [row.state for row in run_status.collect(runs, queue)]
        if all(state not in ("running", "waiting") for state in states):
            # A job leaves the queue a moment before its last ledger line can be read on another node.
            time.sleep(1)
            states = [row.state for row in run_status.collect(runs, queue)]
            if all(state not in ("running", "waiting") for state in states):
                if all(state == "finished" for state in states):
                    return Exit.DONE
                ends = [event.get("exit_code") for event in event_log.read(runs[0].ledger) if event["event"] == Event.END] if len(runs) == 1 else []
                return Exit(ends[-1]) if ends and ends[-1] in (Exit.USAGE, Exit.IMPOSSIBLE) else Exit.FAILED
        time.sleep(_POLL_S)


def _grid(array: Sequence[str]) -> list[list[str]]:
    """Points of a grid, each as KEY=value words, from `KEY=v1,v2` and `KEY=1..20`."""
    axes = []
    for word in array:
        key, equals, text = word.partition("=")
        if not equals or not text:
            raise SettingError(f"--array {word!r}: write KEY=value1,value2 or KEY=1..20.")
        low, dots, high = text.partition("..")
        if dots and low.lstrip("-").isdigit() and high.lstrip("-").isdigit():
            values = [str(n) for n in range(int(low), int(high) + 1)]
        else:
            values = text.split(",")
        if not values:
            raise SettingError(f"--array {word!r} has no values.")
        axes.append([f"{key}={value}" for value in values])
    points = [list(point) for point in itertools.product(*axes)] if axes else []
    if len(points) > MAX_ARRAY:
        raise SettingError(f"--array: {len(points)} runs, at most {MAX_ARRAY} in one array.")
    return points


# What a whole array shares, because Slurm is asked once for all of its tasks.
_SHARED = {"job_name", "run_id", "runs_dir", "site", "entry", "entry_args", "code_include"} | {name for name in names() if group_of(name) in ("slurm", "site")}


def _check_members(resolved: Resolved, members: Sequence[Resolved]) -> None:
    for name in sorted(_SHARED):
        if any(getattr(member.job, name) != getattr(resolved.job, name) for member in members):
            raise SettingError(f"--array: {name.upper()} is the same for all runs of an array; submit them one by one to vary it.")


def _already_there(run: RunDir, job: Job, slurm: Slurm, local: bool, as_json: bool) -> int:
    if not local and not run.has_members:
        # Made by a submission that did not live to write down its job; where Slurm does not say, the ledger must do.
        with contextlib.suppress(SubmitError):
            taken_over(run, slurm)
    state = run_status.collect([run], run_status.ask_queue()[0] if not local else None)[0]
    if as_json:
        print(json.dumps({"run": run.id, "path": str(run.path), "job_id": state.job_id, "members": 0, "state": state.state}))
    elif run.has_members:
        print(
            f"array {run.id} exists already; nothing was submitted. holdfast status {run.id} shows it, holdfast resume {run.id}.N goes on with one of its tasks."
        )
    else:
        further = f"holdfast status {run.id} shows it" if state.state in ("running", "waiting") else f"holdfast resume {run.id} goes on with it"
        print(f"run {run.id} exists already and is {state.state}, with the settings that it was made with; nothing was submitted. {further}.")
    return Exit.DONE


def _say_job(resolved: Resolved, estimate: str, members: Sequence[Resolved], as_json: bool) -> None:
    if as_json:
        return
    job = resolved.job
    print(settings_table.headline(job) + (f" · {len(members)} runs" if members else ""))
    print(f"  not default   {settings_table.not_default(resolved)}")
    for note in resolved.notes:
        print(f"  read as       {note}")
    if estimate:
        print(f"  time limit    {said_at_submit(Slurm(), job)}")
        print(f"  start         {estimate}")

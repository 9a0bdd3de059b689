"""`holdfast rerun RUN`: the same bytes again as a new run, and a word about everything that is not the same."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.config.resolver import Resolved, amend, given_values, load
from jobs.core import safe_read
from jobs.core.contract import LOCAL, Event, Exit
from jobs.core.errors import DamagedFileError, HoldfastError, SettingError, SubmissionUnknownError
from jobs.run import event_log, permissions, rundir, store
from jobs.run.rundir import RunDir
from launcher.commands import diff
from launcher.local.executor import run_attempts
from launcher.status import lookup, run_status
from launcher.submission import create_run, snapshot
from slurm.script.render import script_for


def rerun(source: RunDir, words: Sequence[str], cwd: Path, *, current_code: bool, local: bool, as_json: bool) -> int:
    """Makes the new run, says how it differs, and starts it where the old one ran. Returns the exit code."""
    permissions.check_run(source, "holdfast rerun")
    if source.has_members:
        raise SettingError(lookup.name_a_task(source))
    resolved = resolved_again(source, words, cwd)
    was_local = any(attempt.job_id.startswith(LOCAL) for attempt in event_log.attempts(event_log.read(source.ledger))[:1])
    here = local or was_local
    run = make(source, resolved, cwd, current_code=current_code)
    try:
        if not as_json:
            _say(source, run)
        if here:
            event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id=f"{LOCAL}{os.getpid()}", by="rerun")
        else:
            from launcher.submission.submitit_executor import to_slurm

            job_id = to_slurm(run, resolved.job, os.environ)
    except SubmissionUnknownError:
        raise
    except HoldfastError:
        store.discard(run)
        raise
    if as_json:
        found = diff.compare(source, run)
        print(
            json.dumps(
                {
                    "run": run.id,
                    "path": str(run.path),
                    "job_id": f"{LOCAL}{os.getpid()}" if here else job_id,
                    "rerun_of": source.id,
                    "settings": list(found.settings),
                    "files": found.files,
                    "versions": found.versions,
                }
            ),
            flush=True,
        )
    if not here:
        if not as_json:
            print(f"submitted job {job_id} as run {run.id}  ->  {run_status.near(run.path)}/\nwhen it is over: holdfast diff {source.id} {run.id}")
        return Exit.DONE
    code = run_attempts(run, os.environ, foreground=not as_json)
    if code == Exit.DONE and not as_json:
        said = {True: "the same weights, bit for bit", False: "other weights", None: "nothing that can be compared yet"}[diff.same_weights(source, run)]
        print(f"beside run {source.id}: {said} (holdfast diff {source.id} {run.id})")
    return code


def resolved_again(source: RunDir, words: Sequence[str], cwd: Path) -> Resolved:
    """The frozen settings of a run with KEY=value words over them, checked like at a submit. Raises SettingError, ImpossibleJobError."""
    before = load(source.job_yaml)
    origins = rundir.origins(source)
    # What somebody chose for the first run is by now simply how that run was.
    given = {name: f"run {source.id}" if origin == "command line" else origin for name, origin in origins.items()}
    values = given_values(before, origins)
    resolved = amend({name: value for name, value in values.items() if name != "run_id"}, given, words)
    wanted = [name for name, origin in resolved.origins.items() if origin == "command line"]
    if "site" in wanted:
        raise SettingError("SITE: a rerun keeps the settings of its site; give those that should be others (PARTITION=...), or submit the job anew.")
    anchored = create_run.anchor_paths(resolved.job, cwd)
    job = resolved.job.model_copy(update={name: getattr(anchored, name) for name in wanted})
    return Resolved(job, resolved.origins, resolved.notes)


def make(source: RunDir, resolved: Resolved, cwd: Path, *, current_code: bool) -> RunDir:
    """The run directory, beside that of `source`. Nothing is left behind when anything fails."""
    job = resolved.job
    final = create_run.free_place(source.path.parent.parent.parent if source.is_member else source.path.parent, job)
    if final.path.exists():
        raise SettingError(f"RUN_ID: {final.path} exists already.")

    def fill(staging: RunDir) -> None:
        if current_code:
            create_run.freeze_tree(staging, job, cwd)
        else:
            snapshot.freeze_again(staging, source)

    create_run.make(final, resolved, script_for(job, final, _python_of(source)), fill)
    return final


def _python_of(source: RunDir) -> str:
    """The Python that the first run was submitted with, as its script says; ours where that one is gone."""
    try:
        lines = [line for line in safe_read.read_text(source.script).splitlines() if line.startswith("python=")]
        python = shlex.split(lines[0])[0].removeprefix("python=")
    except DamagedFileError:
        raise
    except (OSError, IndexError, ValueError):
        return sys.executable
    return python if os.access(python, os.X_OK) else sys.executable


def _say(source: RunDir, run: RunDir) -> None:
    found = diff.compare(source, run)
    print(f"rerun of {source.id} as {run.id}")
    print(f"  settings    {'; '.join(f'{name.upper()} {said[0]} -> {said[2]}' for name, said in found.settings.items()) or 'the same'}")
    print(f"  code        {diff.code_line(found, len(snapshot.read_sums(run)))}")
    for path, letter in list(found.files.items())[:10]:
        print(f"              {letter} {path}")
    print(f"  libraries   {', '.join(f'{name} {before} -> {after}' for name, (before, after) in found.versions.items()) or 'the same'}", flush=True)
    there, here = snapshot.facts_of(source).get("from"), snapshot.facts_of(run).get("from")
    if there != here:
        print(f"  note        the code comes from {here}, that of {source.id} came from {there}", flush=True)

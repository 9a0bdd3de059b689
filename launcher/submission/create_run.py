"""From settings to a run directory that is complete: staged aside, then renamed."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.config.overrides import words_from_make
from jobs.config.resolver import Resolved, resolve, resolve_each
from jobs.config.settings import Job
from jobs.config.yaml_io import dump_yaml
from jobs.core.errors import HoldfastError, SettingError
from jobs.run import permissions, store
from jobs.run.rundir import RunDir
from launcher.submission import snapshot
from slurm import site_file
from slurm.script.render import script_for

# Settings whose value may be a path behind a word and a colon.
_PATH_WORDS = {"data": ("text", "tokens"), "model": ("hf",)}

# On a shared file system each file waits a millisecond or more for its server.
_WRITERS = 8


def resolve_here(words: Sequence[str], environ: Mapping[str, str], cwd: Path, **more: Any) -> Resolved:
    """The job that a person describes from folder `cwd`, words of a make command line included."""
    resolved = resolve([*words_from_make(environ), *words], environ, cwd, lambda word: site_file.find(word, cwd), **more)
    return replace(resolved, job=anchor_paths(resolved.job, cwd))


def resolve_members(words: Sequence[str], points: Sequence[Sequence[str]], environ: Mapping[str, str], cwd: Path) -> list[Resolved]:
    """The jobs of an array: `resolve_here` of the words with each point behind them, at a fraction of its time."""
    if not points:
        return []
    members = resolve_each([*words_from_make(environ), *words], points, environ, cwd, lambda word: site_file.find(word, cwd))
    return [replace(member, job=anchor_paths(member.job, cwd)) for member in members]


def in_parallel(do: Callable[[int], object], count: int) -> None:
    """`do(0)` to `do(count - 1)`, many at once: what takes time is the file system's answer. Raises the first error."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_WRITERS) as pool:
        for _ in pool.map(do, range(count)):
            pass


def prepare(
    resolved: Resolved, cwd: Path, executable: str, members: Sequence[Resolved] = (), *, tasks: int = 0, complete: Callable[[RunDir], None] | None = None
) -> tuple[RunDir, bool]:
    """The run directory of a job, and whether it was made now (a given RUN_ID finds the run that exists).

    With `members` it is the directory of an array, and each member becomes a run of its own in it. With `tasks` it is an array
    of so many runs that get their settings later; `complete` puts into the staged directory what else belongs there."""
    job = resolved.job
    final = free_place(cwd / job.runs_dir, job)
    if final.path.exists():
        if not final.job_yaml.exists():
            raise SettingError(f"RUN_ID: {final.path} exists and is no run directory.")
        permissions.check_run(final, f"RUN_ID={job.run_id}")
        return final, False

    def fill(staging: RunDir) -> None:
        freeze_tree(staging, job, cwd)
        in_parallel(lambda index: write_settings(staging.member(index), members[index]), len(members))
        for index in range(tasks):
            # Slurm opens the batch log there before anything of ours runs.
            staging.member(index).logs.mkdir(parents=True)
        if complete is not None:
            complete(staging)

    # Rendered before anything is made: most refusals come from here.
    make(final, resolved, script_for(job, final, executable, array_size=len(members) or tasks or None), fill)
    return final, True


def free_place(runs_dir: Path, job: Job) -> RunDir:
    """Where a run of this job goes: under its RUN_ID, which may be taken, or else under an id that is not."""
    while True:
        final = store.place(runs_dir, job.job_name, job.run_id or store.new_id())
        if job.run_id or not final.path.exists():
            return final


def make(final: RunDir, resolved: Resolved, script: str, fill: Callable[[RunDir], None]) -> None:
    """A run directory that is complete: staged aside with its settings and its script, then what `fill` adds, then renamed.

    Nothing is left behind when anything fails. Raises SettingError, also for what the disk refuses."""
    was_there = final.path.parent.exists()
    staging = store.stage(final)
    try:
        write_settings(staging, resolved)
        fill(staging)
        staging.script.write_text(script)
        staging.script.chmod(0o755)
    except HoldfastError:
        store.discard(staging, with_parent=not was_there)
        raise
    except OSError as err:
        store.discard(staging, with_parent=not was_there)
        raise SettingError(f"run directory {final.path} cannot be made: {err.strerror or err}") from err
    store.publish(staging, final)


def write_settings(run: RunDir, resolved: Resolved) -> None:
    """The folder of a run with its resolved settings, and where each came from."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.logs.mkdir()
    run.job_yaml.write_text(dump_yaml(resolved.job.model_dump(mode="json")))
    # A line for each, as indent=1 makes it; but with that JSON's encoder is the one in Python, which an array notices.
    run.origins.write_text(json.dumps(resolved.origins, separators=(",\n ", ": ")) + "\n")


def freeze_tree(run: RunDir, job: Job, cwd: Path) -> None:
    """Copies the working tree around `cwd` into the run, and says what was left out: files in which secrets may stand, and what cannot be copied."""
    kept_back, missing = snapshot.freeze(run, cwd, job.code_include, leave_out=run.path.parent, environ=os.environ, entry=job.entry)
    if kept_back:
        names = ", ".join(map(str, kept_back[:8])) + (f" and {len(kept_back) - 8} more" if len(kept_back) > 8 else "")
        print(f"not copied with the code, since secrets may stand there: {names}. CODE_INCLUDE={kept_back[0]} copies it all the same.", file=sys.stderr)
    if missing:
        names = ", ".join(f"{path} ({why})" for path, why in list(missing.items())[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        print(f"not copied with the code: {names}.", file=sys.stderr)


def anchor_paths(job: Job, cwd: Path) -> Job:
    """The job with whole paths: nodes start in another folder than the person who submits, and no shell looks at a quoted `~`."""
    update: dict[str, Any] = {}
    for name, words in _PATH_WORDS.items():
        word, colon, path = getattr(job, name).partition(":")
        if colon and word in words:
            update[name] = f"{word}:{_whole(path, cwd)}"
    for name in ("setup_script", "init_from", "notify_webhook_file"):
        if path := getattr(job, name):
            update[name] = _whole(path, cwd)
    # These may be no path at all but a command or the address of an image.
    for name in ("node_python", "container_image", "accelerate_config"):
        if path := getattr(job, name):
            update[name] = os.path.expanduser(path)
    update["container_mounts"] = tuple(map(os.path.expanduser, job.container_mounts))
    if job.entry and not job.entry.startswith("-m "):
        update["entry"] = snapshot.place_of(os.path.expanduser(job.entry), cwd)
    return job.model_copy(update={name: value for name, value in update.items() if value != getattr(job, name)})


def _whole(path: str, cwd: Path) -> str:
    path = os.path.expanduser(path)
    return path if os.path.isabs(path) else str(cwd / path)

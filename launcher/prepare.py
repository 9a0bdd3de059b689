"""From settings to a run directory that is complete: staged aside, then renamed."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import run_folders
from jobs.errors import HoldfastError, SettingError
from jobs.rundir import RunDir
from jobs.settings import Job
from jobs.sources import Resolved, resolve, resolve_each
from jobs.words import words_from_make
from jobs.yaml_text import dump_yaml
from launcher import snapshot
from slurm import sitefile
from slurm.render import script_for

# Settings whose value may be a path behind a word and a colon; nodes start in another folder than the person who submits.
_PATH_WORDS = {"data": ("text", "tokens"), "model": ("hf",)}

# On a shared file system each file waits a millisecond or more for its server.
_WRITERS = 8


def resolve_here(words: Sequence[str], environ: Mapping[str, str], cwd: Path, **more: Any) -> Resolved:
    """The job that a person describes from folder `cwd`, words of a make command line included."""
    resolved = resolve([*words_from_make(environ), *words], environ, cwd, lambda word: sitefile.find(word, cwd), **more)
    return replace(resolved, job=_anchor_paths(resolved.job, cwd))


def resolve_members(words: Sequence[str], points: Sequence[Sequence[str]], environ: Mapping[str, str], cwd: Path) -> list[Resolved]:
    """The jobs of an array: `resolve_here` of the words with each point behind them, at a fraction of its time."""
    if not points:
        return []
    members = resolve_each([*words_from_make(environ), *words], points, environ, cwd, lambda word: sitefile.find(word, cwd))
    return [replace(member, job=_anchor_paths(member.job, cwd)) for member in members]


def in_parallel(do: Callable[[int], object], count: int) -> None:
    """`do(0)` to `do(count - 1)`, many at once: what takes time is the file system's answer. Raises the first error."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_WRITERS) as pool:
        for _ in pool.map(do, range(count)):
            pass


def which_run(words: Sequence[str], environ: Mapping[str, str], cwd: Path) -> tuple[Path, str | None]:
    """The runs directory, and the run that was named (RUN or RUN=...) or None, from the words after a command."""
    folder = environ.get("HOLDFAST_RUNS_DIR") or environ.get("RUNS_DIR") or str(Job.model_fields["runs_dir"].default)
    named: str | None = None
    for word in [*words_from_make(environ), *words]:
        key, equals, value = word.partition("=")
        key = key.removeprefix("--").replace("-", "_").upper()
        if equals and key == "RUNS_DIR":
            folder = value
        elif equals and key == "RUN":
            named = value
        elif equals and key.isidentifier():
            raise SettingError(f"{key} has no effect here (command line); this command takes RUN and RUNS_DIR.")
        elif word.startswith("-"):
            raise SettingError(f"{word} is not an option of this command (command line).")
        elif named is not None:
            raise SettingError(f"{word!r}: one run at a time, {named!r} was named already (command line).")
        else:
            named = word
    return cwd / folder, named


def split_run_words(words: Sequence[str], environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The words that say which run is meant, and those that change a setting of it."""
    naming, settings = [], []
    rest = [*words_from_make(environ), *words]
    while rest:
        word = rest.pop(0)
        key, equals, _ = word.partition("=")
        name = key.removeprefix("--").replace("-", "_").upper()
        if (equals and name in ("RUN", "RUNS_DIR")) or not (equals or word.startswith("--")):
            naming.append(word)
            continue
        settings.append(word)
        if word.startswith("--") and not equals and rest and "=" not in rest[0] and not rest[0].startswith("--"):
            settings.append(rest.pop(0))
    return naming, settings


def find_run(words: Sequence[str], environ: Mapping[str, str], cwd: Path) -> RunDir:
    """The run that a person means; the newest when none is named. Raises NotFoundError."""
    folder, named = which_run(words, environ, cwd)
    return run_folders.find(named, folder)


def prepare(
    resolved: Resolved, cwd: Path, executable: str, members: Sequence[Resolved] = (), *, tasks: int = 0, complete: Callable[[RunDir], None] | None = None
) -> tuple[RunDir, bool]:
    """The run directory of a job, and whether it was made now (a given RUN_ID finds the run that exists).

    With `members` it is the directory of an array, and each member becomes a run of its own in it. With `tasks` it is an array
    of so many runs that get their settings later; `complete` puts into the staged directory what else belongs there.
    Nothing is left behind when anything fails."""
    job = resolved.job
    runs_dir = cwd / job.runs_dir
    final = run_folders.place(runs_dir, job.job_name, job.run_id or _unused_id(runs_dir, job.job_name))
    if final.path.exists():
        if not final.job_yaml.exists():
            raise SettingError(f"RUN_ID: {final.path} exists and is no run directory.")
        return final, False
    # Rendered before anything is made: most refusals come from here.
    text = script_for(job, final, executable, array_size=len(members) or tasks or None)
    was_there = final.path.parent.exists()
    staging = run_folders.stage(final)
    try:
        _write_run(staging, resolved)
        kept_back = snapshot.freeze(staging, cwd, job.code_include, leave_out=Path(os.path.abspath(runs_dir)), environ=os.environ, entry=job.entry)
        staging.script.write_text(text)
        staging.script.chmod(0o755)
        in_parallel(lambda index: _write_run(staging.member(index), members[index]), len(members))
        for index in range(tasks):
            # Slurm opens the batch log there before anything of ours runs.
            staging.member(index).logs.mkdir(parents=True)
        if complete is not None:
            complete(staging)
    except HoldfastError:
        run_folders.discard(staging, with_parent=not was_there)
        raise
    except OSError as err:
        run_folders.discard(staging, with_parent=not was_there)
        raise SettingError(f"run directory {final.path} cannot be made: {err.strerror or err}") from err
    run_folders.publish(staging, final)
    if kept_back:
        names = ", ".join(map(str, kept_back[:8])) + (f" and {len(kept_back) - 8} more" if len(kept_back) > 8 else "")
        print(f"not copied with the code, since secrets may stand there: {names}. CODE_INCLUDE={kept_back[0]} copies it all the same.", file=sys.stderr)
    return final, True


def _write_run(run: RunDir, resolved: Resolved) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    run.logs.mkdir()
    run.job_yaml.write_text(dump_yaml(resolved.job.model_dump(mode="json")))
    run.origins.write_text(json.dumps(resolved.origins, indent=1) + "\n")


def _unused_id(runs_dir: Path, name: str) -> str:
    while True:
        run_id = run_folders.new_id()
        if not run_folders.place(runs_dir, name, run_id).path.exists():
            return run_id


def _anchor_paths(job: Job, cwd: Path) -> Job:
    update: dict[str, str] = {}
    for name, words in _PATH_WORDS.items():
        word, colon, path = getattr(job, name).partition(":")
        if colon and word in words and not os.path.isabs(os.path.expanduser(path)):
            update[name] = f"{word}:{cwd / path}"
    for name in ("setup_script", "init_from", "notify_webhook_file"):
        path = getattr(job, name)
        if path and not os.path.isabs(os.path.expanduser(path)):
            update[name] = str(cwd / path)
    if job.entry and not job.entry.startswith("-m "):
        update["entry"] = snapshot.place_of(job.entry, cwd)
    return job.model_copy(update=update) if update else job

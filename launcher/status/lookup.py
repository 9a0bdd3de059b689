"""Which run, or which runs, a person means by the words behind a command."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.config.overrides import words_from_make
from jobs.config.settings import Job
from jobs.core.errors import SettingError
from jobs.run import store
from jobs.run.rundir import RunDir


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
    return store.find(named, folder)


def find_task(words: Sequence[str], environ: Mapping[str, str], cwd: Path) -> RunDir:
    """The run that a person means, for a command that an array itself has nothing for. Raises NotFoundError, SettingError."""
    run = find_run(words, environ, cwd)
    if run.has_members:
        raise SettingError(name_a_task(run))
    return run


def name_a_task(array: RunDir) -> str:
    """What is said where an array is named and one run is meant."""
    return f"{array.id} is an array; name one of its tasks, such as {array.id}/tasks/0"


def run_and_settings(words: Sequence[str], environ: Mapping[str, str], cwd: Path) -> tuple[RunDir, list[str]]:
    """The run that a person means, and the words behind it that change a setting of it. Raises NotFoundError."""
    naming, settings = split_run_words(words, environ)
    # The words of make are among them already.
    return find_run(naming, {name: value for name, value in environ.items() if name != "MAKEFLAGS"}, cwd), settings


def runs_named(words: Sequence[str], environ: Mapping[str, str], cwd: Path) -> tuple[Path, list[RunDir]]:
    """The runs directory, and the runs that were named as RUN words or RUN=...; none named, none. Raises NotFoundError, SettingError."""
    given = [*words_from_make(environ), *words]
    naming = [word for word in given if "=" not in word and not word.startswith("-")]
    plain = {name: value for name, value in environ.items() if name != "MAKEFLAGS"}
    folder, named = which_run([word for word in given if word not in naming], plain, cwd)
    return folder, [store.find(word, folder) for word in [*([named] if named else []), *naming]]

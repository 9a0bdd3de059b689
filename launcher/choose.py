"""Several runs that a person names in one command."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs import run_folders
from jobs.rundir import RunDir
from jobs.words import words_from_make
from launcher.prepare import which_run


def runs_named(words: Sequence[str], environ: Mapping[str, str], cwd: Path) -> tuple[Path, list[RunDir]]:
    """The runs directory, and the runs that were named as RUN words or RUN=...; none named, none. Raises NotFoundError, SettingError."""
    given = [*words_from_make(environ), *words]
    naming = [word for word in given if "=" not in word and not word.startswith("-")]
    plain = {name: value for name, value in environ.items() if name != "MAKEFLAGS"}
    folder, named = which_run([word for word in given if word not in naming], plain, cwd)
    return folder, [run_folders.find(word, folder) for word in [*([named] if named else []), *naming]]

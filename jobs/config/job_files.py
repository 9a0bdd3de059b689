"""Finding a job file: a path, or the name of one that comes with holdfast."""

import difflib
from importlib import resources
from pathlib import Path

from jobs.config.setting_names import shorten
from jobs.core.errors import NotFoundError

DEFAULT_JOB = "jobs/quickstart.yaml"


def shipped_jobs() -> list[str]:
    """Names of the job files that come with holdfast."""
    return sorted(path.stem for path in Path(str(resources.files("jobs"))).glob("*.yaml"))


def find_job_file(word: str, cwd: Path) -> tuple[Path, str]:
    """The job file that `word` names: a path, or the name of one that comes with holdfast. Raises NotFoundError."""
    path = cwd / word
    if _is_file(path):
        return path.resolve(), word
    shipped, known = Path(str(resources.files("jobs"))), shipped_jobs()
    stem = Path(word).name.removesuffix(".yaml")
    if stem in known and word in (stem, f"{stem}.yaml", f"jobs/{stem}.yaml"):
        return shipped / f"{stem}.yaml", f"jobs/{stem}.yaml"
    near = difflib.get_close_matches(stem, known, 1)
    hint = f" Did you mean jobs/{near[0]}.yaml?" if near else f" These come with holdfast: {', '.join(known)}."
    raise NotFoundError(f"job file {shorten(word)!r} does not exist in {cwd}.{hint}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have: too long, NUL, not encodable
        return False

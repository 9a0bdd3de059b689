"""Site files: what is true of a cluster rather than of a job. Each is a layer of the same settings, below the job file."""

import difflib
from importlib import resources
from pathlib import Path

from jobs.core.errors import NotFoundError


def sites_dir() -> Path:
    return Path(str(resources.files("slurm"))) / "sites"


def shipped() -> list[str]:
    """Names of the site files that come with holdfast."""
    return sorted(path.stem for path in sites_dir().glob("*.yaml"))


def find(word: str, cwd: Path) -> tuple[Path, str]:
    """The file that SITE=word means, and how to call it in messages. Raises NotFoundError that names the known ones."""
    if "/" in word or word.endswith((".yaml", ".yml")):
        # A link to itself is no file; Path.resolve raises for it up to Python 3.12.
        if (cwd / word).is_file():
            return (cwd / word).resolve(), word
        raise NotFoundError(f"site file {word!r} does not exist in {cwd}.")
    if word in shipped():
        return sites_dir() / f"{word}.yaml", f"slurm/sites/{word}.yaml"
    near = difflib.get_close_matches(word, shipped(), 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    shown = word if len(word) <= 60 else word[:57] + "..."
    raise NotFoundError(f"site {shown!r} is not known; there are {', '.join(shipped())}, or give a path to a YAML file.{hint}")

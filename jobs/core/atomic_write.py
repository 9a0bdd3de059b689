"""A small file that is there whole or not at all: written aside, then renamed into place."""

import os
from pathlib import Path


def replace_file(path: Path, content: str | bytes, *, mode: int = 0o644, flush: bool = True) -> None:
    """New content for a file. `flush`: on disk before it has its name, so that it outlives the machine too.

    Raises OSError; whatever is raised, nothing is left aside."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise

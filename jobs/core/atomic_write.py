"""Atomic file replacement: a temporary file or directory next to the target, fsync, rename. The only implementation in the repository.

The temporary name is random and created exclusively without following links, so that a link planted in a shared folder is never
written through. The rename replaces a link at the target and leaves alone what it leads to.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# A file name may have 255 bytes; what is added to it here is shorter than 55.
_LONGEST = 200


def replace_file(path: Path, content: str | bytes, *, mode: int = 0o644, flush: bool = True) -> None:
    """Replace the content of a file. `flush`: on disk before it has its name, so that it outlives the machine too.

    Raises OSError; whatever is raised, no temporary file is left."""
    with replacing(path, mode=mode, flush=flush) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path, *, mode: int = 0o644, flush: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the name `path` when the block ends without an error, and is deleted otherwise."""
    temporary = _temporary_name(path)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode), "wb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_by_path(path: Path) -> Iterator[Path]:
    """The same for a library that opens files by path: yields a path of the same name in a new private directory next to `path`."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:_LONGEST]}.", dir=path.parent))
    try:
        yield folder / path.name
        if (folder / path.name).exists():
            os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def create_file(path: Path, content: str, *, mode: int = 0o644) -> bool:
    """Create a file with its whole content at once. Return False, and change nothing, if the name is taken. Raises OSError."""
    temporary = _temporary_name(path)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode), "w") as file:
            file.write(content)
        os.link(temporary, path, follow_symlinks=False)
    except FileExistsError:
        return False
    finally:
        with suppress(OSError):
            temporary.unlink()
    return True


def _temporary_name(path: Path) -> Path:
    # Encoded: the limit is one of bytes.
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST])
    return path.with_name(f".{name}.{secrets.token_hex(8)}")

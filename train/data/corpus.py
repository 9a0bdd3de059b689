"""Byte-level corpora made of text files: the running Python's standard library, or a file or folder of one's own.

No tokenizer, no download: a byte is a token and the vocabulary is 256. Files, not bytes, are dealt to training and
validation, by a hash of their relative path: the split is the same on every machine, and adding a file moves no other.
"""

import contextlib
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jobs.core.atomic_write import replacing
from jobs.core.errors import SettingError

BYTE_VOCAB = 256
VAL_SHARE = 0.05
# Part of the cache's file name: raise it when the rules below pick or join files differently.
RULES = 1

# Tests are half of the library; encodings are tables and pydoc_data one file of help texts, which alone would be most
# of validation; installed packages are not the library.
_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
# Written by whoever built or packaged this Python: they differ between installations of one version.
_SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class Corpus:
    """Files below `root`, as (relative posix path, size in bytes), sorted; `name` goes into logs and cache names."""

    name: str
    root: Path
    files: tuple[tuple[str, int], ...]

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.files)

    def split_files(self, split: str) -> list[str]:
        """The relative paths of one split, in order. Both splits have a file wherever there are two."""
        val = {path for path, _ in self.files if _hash_share(path) < VAL_SHARE}
        if len(val) == len(self.files) > 1:
            val.discard(max(val, key=_hash_share))
        if not val and len(self.files) > 1:
            val = {min((path for path, _ in self.files), key=_hash_share)}
        return [path for path, _ in self.files if (path in val) == (split == "val")]


def _hash_share(path: str) -> float:
    """A number in [0, 1) that depends on the relative path alone."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64


def stdlib_corpus(root: Path | None = None) -> Corpus:
    """The Python sources of the running interpreter's standard library, without its tests (about 10 MB)."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root

    def wanted(path: Path) -> bool:
        return path.suffix == ".py" and not path.name.startswith(_SKIPPED_FILES)

    files = _walk(root, _SKIPPED_FOLDERS, wanted)
    if not files:
        raise SettingError(f"data 'stdlib': no .py files below {root}; this Python ships its library without source. Use DATA=text:<folder> or DATA=synthetic")
    return Corpus(f"stdlib-{platform.python_version()}", root, files)


def text_corpus(path: Path) -> Corpus:
    """A text file, or all text files below a folder; a file counts as text if its first 4 kB hold no zero byte.

    Raises SettingError if there is nothing to read."""
    if path.is_file():
        return Corpus(path.name, path.parent, ((path.name, path.stat().st_size),))
    files = _walk(path, {"__pycache__"}, _is_text)
    if not files:
        raise SettingError(f"data 'text:{path}': no text files there; give a text file or a folder that has some")
    return Corpus(path.name or "text", path, files)


def _walk(root: Path, skipped: set[str], wanted: Callable[[Path], bool]) -> tuple[tuple[str, int], ...]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or path.is_symlink() or not path.is_file() or not wanted(path):
                continue
            found.append((path.relative_to(root).as_posix(), path.stat().st_size))
    return tuple(sorted(found))


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(4096)


def load_split(corpus: Corpus, split: str, cache_dir: Path | None = None) -> NDArray[np.uint8]:
    """All bytes of one split, files in order with a zero byte behind each: uint8 [bytes].

    With `cache_dir` the array is kept there as .npy and memory-mapped from then on. The cache only saves time: one that
    cannot be written or read is passed over."""
    if len(corpus.files) == 1:
        # One file cannot be dealt by file: its end is for validation.
        whole = _read(corpus.root, [corpus.files[0][0]])
        cut = len(whole) - int(len(whole) * VAL_SHARE)
        return whole[cut:] if split == "val" else whole[:cut]
    if cache_dir is None:
        return _read(corpus.root, corpus.split_files(split))
    # Equal names and sizes do not mean equal files: where they lie and when they were written is hashed too.
    written = [(corpus.root / path).stat().st_mtime_ns for path, _ in corpus.files]
    listing = hashlib.sha256(repr((str(corpus.root.resolve()), corpus.files, written)).encode()).hexdigest()[:12]
    cached = cache_dir / f"{corpus.name}-{corpus.total_bytes}-{listing}-{split}-r{RULES}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        return np.load(cached, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    array = _read(corpus.root, corpus.split_files(split))
    with contextlib.suppress(OSError):
        write_npy(cached, array)
    return array


def _read(root: Path, paths: list[str]) -> NDArray[np.uint8]:
    # The zero byte ends a file: a model can learn where one stops, and no source text contains it.
    return np.frombuffer(b"".join((root / path).read_bytes() + b"\0" for path in paths), dtype=np.uint8)


def write_npy(path: Path, array: NDArray[np.generic]) -> None:
    """Save an array atomically: processes of a node may build the same file, and a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.save(file, array, allow_pickle=False)


def byte_entropy(array: NDArray[np.integer]) -> float:
    """Bits per byte of a model that knows only how often each byte occurs: the number validation has to beat."""
    counts = np.zeros(BYTE_VOCAB, dtype=np.int64)
    for start in range(0, len(array), 1 << 22):  # bincount widens its input to int64: keep that to 32 MB
        counts += np.bincount(array[start : start + (1 << 22)], minlength=BYTE_VOCAB)
    share = counts[counts > 0] / max(1, len(array))
    return float(-(share * np.log2(share)).sum()) + 0.0  # + 0.0: a single symbol has entropy 0, not -0

"""Token files: what a tokenizer run leaves behind, memory-mapped here and read only where a batch needs it.

Two formats. `.bin`: raw little-endian uint16 or uint32, described by a small JSON file beside it, `<file>.json`
(`write_tokens` makes both). `.npy`: a one-dimensional integer array; it may have such a JSON file too.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.core.atomic_write import replace_file, replacing
from jobs.core.errors import SettingError
from jobs.core.imports import nearest
from train.data.corpus import write_npy

FORMAT = "holdfast-tokens-1"
DEFAULT_VAL_SHARE = 0.05
_DTYPES = {"uint16": "<u2", "uint32": "<u4"}


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def write_tokens(path: Path, array: NDArray[np.integer], vocab_size: int) -> None:
    """Write tokens [n] to `path` (.bin or .npy) and describe them beside it; the narrower of uint16 and uint32 is used.

    Raises SettingError if a token lies outside 0 .. vocab_size - 1, or the file name has another ending."""
    array = np.asarray(array)
    if array.ndim != 1 or (array.size and (array.min() < 0 or array.max() >= vocab_size)):
        raise SettingError(f"{path}: tokens must be one row of integers from 0 to {vocab_size - 1}")
    stored = array.astype(dtype_for(vocab_size))
    if path.suffix == ".npy":
        write_npy(path, stored)
    elif path.suffix == ".bin":
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            stored.tofile(file)
    else:
        raise SettingError(f"{path}: a token file ends in .bin or .npy")
    # The description comes last: without it a .bin cannot be opened, so one that can is whole.
    write_note(path, count=int(array.size), vocab_size=vocab_size)


def dtype_for(vocab_size: int) -> str:
    """The narrowest type that a token file may have for this vocabulary, in numpy's words."""
    return _DTYPES["uint16" if vocab_size <= 1 << 16 else "uint32"]


def write_note(path: Path, *, count: int, vocab_size: int, **more: Any) -> None:
    """Describes a token file beside it; `more` is for people, nothing reads it."""
    kind = next(name for name, dtype in _DTYPES.items() if dtype == dtype_for(vocab_size))
    note = {"format": FORMAT, "dtype": kind, "count": count, "vocab_size": int(vocab_size), **more}
    replace_file(sidecar(path), json.dumps(note) + "\n")


def read_tokens(path: Path) -> tuple[NDArray[np.integer], int | None]:
    """The memory-mapped tokens [n] of a file, and the vocabulary size stated beside it (None where nothing is)."""
    if not path.is_file():
        raise missing_file("tokens", path)
    note = _read_note(path)
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as err:
            raise SettingError(f"data 'tokens:{path}': not a readable .npy file ({err})") from err
        if array.ndim != 1 or array.dtype.kind not in "iu":
            held = f"{array.dtype} {array.shape}"
            raise SettingError(f"data 'tokens:{path}': holds {held}; it must be one row of integers")
        return array, note.get("vocab_size")
    if path.suffix != ".bin":
        raise SettingError(f"data 'tokens:{path}': a token file ends in .bin or .npy")
    if note.get("dtype") not in _DTYPES:
        raise SettingError(
            f"data 'tokens:{path}': needs {sidecar(path).name} beside it, such as"
            f' {{"format": "{FORMAT}", "dtype": "uint16", "vocab_size": 50304}}; dtype is one of {", ".join(_DTYPES)}'
        )
    array = np.memmap(path, dtype=_DTYPES[note["dtype"]], mode="r") if path.stat().st_size else np.empty(0, np.uint16)
    if note.get("count", len(array)) != len(array):
        raise SettingError(f"data 'tokens:{path}': has {len(array)} tokens, {sidecar(path).name} says {note['count']}; one of them was only half copied")
    return array, note.get("vocab_size")


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(sidecar(path).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as err:
        raise SettingError(f"{sidecar(path)}: is not JSON ({err})") from err
    if not isinstance(note, dict):
        raise SettingError(f"{sidecar(path)}: must hold one JSON object")
    size = note.get("vocab_size")
    # Not isinstance: true is an int too.
    if size is not None and (type(size) is not int or size < 1):
        raise SettingError(f"{sidecar(path)}: vocab_size is {size!r}; it must be a whole number of at least 1, not in quotation marks")
    return note


def split_tokens(argument: str, split: str) -> tuple[NDArray[np.integer], int | None, str]:
    """Tokens, stated vocabulary and name for what stands behind `tokens:` in a data spec.

    `FILE`: the last 5 % are for validation. `FILE,0.01`: the last 1 %. `TRAIN,VAL`: two files.
    `FOLDER`: its train.bin and val.bin (or .npy)."""
    path = Path(argument)
    if path.is_dir():
        found = [p for p in (path / f"{split}.bin", path / f"{split}.npy") if p.is_file()]
        if not found:
            raise SettingError(f"data 'tokens:{argument}': the folder has no {split}.bin and no {split}.npy")
        return *read_tokens(found[0]), f"{path.name}/{found[0].name}"
    share = DEFAULT_VAL_SHARE
    if "," in argument and not path.exists():
        first, second = argument.rsplit(",", 1)
        path = Path(first)
        try:
            share = float(second)
        except ValueError:
            chosen = Path(second) if split == "val" else path
            return *read_tokens(chosen), chosen.name
        if not 0 < share < 1:
            raise SettingError(f"data 'tokens:{argument}': the validation share {second} must be between 0 and 1")
    array, vocab_size = read_tokens(path)
    cut = len(array) - int(len(array) * share)
    return array[cut:] if split == "val" else array[:cut], vocab_size, f"{path.name}[{split}]"


def missing_file(source: str, path: Path) -> SettingError:
    """The error for a path that is not there, with the nearest name in the deepest folder that is."""
    parent = next(p for p in (path.parent, *path.parent.parents) if p.is_dir() or p == p.parent)
    missing = path.relative_to(parent).parts[0] if path.is_relative_to(parent) else path.name
    close = nearest(missing, (p.name for p in parent.iterdir())) if parent.is_dir() else None
    hint = f" Did you mean {str(parent / close)!r}?" if close else ""
    return SettingError(f"data '{source}:{path}': there is no {missing!r} in {parent.absolute()}.{hint}")

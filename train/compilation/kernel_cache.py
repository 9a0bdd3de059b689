"""Kernels that Triton compiled, kept in one file: the part of what an attempt compiles that torch's own artifacts leave out.

Triton has a folder for each kernel, with the kernel in all its forms, and a file that names them by absolute paths. Here all of
them are a zip file of `<kernel>/<file>`; the paths are written anew where it is unpacked.
"""

import io
import json
import os
import re
import zipfile
from pathlib import Path

from jobs.core import safe_read
from jobs.core.atomic_write import replace_file

_NAME = re.compile(r"[\w-]+/[\w.-]+")
_GROUP = "__grp__"
# torch's own kernels, which its artifacts hold, are called so.
_OF_TORCH = "triton_"
# Ours are about 2 MB; what somebody else's process compiles into the same folder meanwhile comes along.
_MOST_BYTES = 256 * 2**20


class KernelCache:
    """`path`: the file; `folder`: Triton's cache on this node, TRITON_CACHE_DIR."""

    def __init__(self, path: Path, folder: Path):
        self._path, self._folder = path, folder
        self._known: set[str] = set()
        self._before = self._entries()

    def load(self) -> int:
        """Puts the kernels of the file into the folder, where they are not yet. Returns how many the file has.

        Raises OSError, and ValueError or BadZipFile for a file that is none of ours or is damaged; what came before that stays."""
        with zipfile.ZipFile(io.BytesIO(safe_read.read_bytes(self._path, _MOST_BYTES))) as file:
            for name in file.namelist():
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{name!r} is no file of a kernel")
                content, place = file.read(name), self._folder / name
                self._known.add(place.parent.name)
                if place.exists():
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                if place.name.startswith(_GROUP):
                    paths = {one: str(place.parent / Path(there).name) for one, there in json.loads(content)["child_paths"].items()}
                    content = json.dumps({"child_paths": paths}).encode()
                replace_file(place, content, flush=False)
        return len(self._known)

    def keep(self) -> None:
        """Writes the file anew where kernels were compiled since this object was made. Raises OSError."""
        made = {name for name in self._entries() - self._before - self._known if not self._is_torchs(name)}
        if not made:
            return
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            for name in sorted(made | self._known):
                for one in sorted((self._folder / name).glob("*")):
                    if one.is_file() and _NAME.fullmatch(f"{name}/{one.name}") and one.name != "lock":
                        file.writestr(f"{name}/{one.name}", one.read_bytes())
                    if packed.tell() > _MOST_BYTES:
                        raise OSError(f"kernels of more than {_MOST_BYTES // 2**20} MiB in {self._folder}")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, packed.getvalue(), flush=False)
        self._known |= made

    def _entries(self) -> set[str]:
        try:
            return set(os.listdir(self._folder))
        except OSError:
            return set()

    def _is_torchs(self, name: str) -> bool:
        return any(one.name.removeprefix(_GROUP).startswith(_OF_TORCH) for one in (self._folder / name).glob("*"))

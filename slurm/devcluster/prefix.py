"""A Slurm outside the system directories: the programs, plugins and version below the folder in HOLDFAST_SLURM_PREFIX.

Two layouts are known: an installation by `make install` (bin/, sbin/, lib/slurm), and distribution packages unpacked into a
folder (usr/lib/*/slurm-wlm), whose programs lie under their plain names in shims/ and find their own libraries.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.core.errors import LabError

VARIABLE = "HOLDFAST_SLURM_PREFIX"
# The first version that knows CgroupPlugin=disabled.
_NO_CGROUPS = (23, 11)


@dataclass(frozen=True)
class SlurmPrefix:
    """Where a lab takes its Slurm from; an empty `path` is the Slurm of the machine."""

    path: str = ""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> SlurmPrefix:
        """The prefix that the environment names. Raises LabError when there is no Slurm in it."""
        given = environ.get(VARIABLE, "")
        prefix = cls(str(Path(given).expanduser().resolve())) if given else cls()
        if given and not any((folder / "slurmctld").is_file() for folder in prefix.folders):
            raise LabError(f"{VARIABLE}: {given!r} has no slurmctld in shims/, sbin/ or bin/. Name the folder of a Slurm installation, or unset it.")
        return prefix

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders with programs, the first one first on PATH."""
        return tuple(folder for name in ("shims", "sbin", "bin") if self.path and (folder := Path(self.path, name)).is_dir())

    def before(self, path: str) -> str:
        """A value of PATH in which the programs of this Slurm come first."""
        return os.pathsep.join([*(str(folder) for folder in self.folders if str(folder) not in path.split(os.pathsep)), path])

    @property
    def plugins(self) -> Path | None:
        """The folder for PluginDir; None where the programs know it by themselves."""
        found = [Path(self.path, "lib", "slurm"), *sorted(Path(self.path).glob("usr/lib/*/slurm-wlm"))] if self.path else []
        return next((folder for folder in found if folder.is_dir()), None)

    @property
    def slurmd_options(self) -> tuple[str, ...]:
        """slurmd starts the slurmstepd that it was built with, unless it is told another one."""
        found = [folder / "slurmstepd" for folder in self.folders if (folder / "slurmstepd").is_file()]
        return ("-d", str(found[0])) if found else ()

    @property
    def version(self) -> tuple[int, int] | None:
        """(26, 5) for 26.05.3; None where slurmctld does not say."""
        program = next((str(folder / "slurmctld") for folder in self.folders if (folder / "slurmctld").is_file()), "slurmctld")
        try:
            said = subprocess.run(
                [program, "-V"],
                capture_output=True,
                text=True,
                timeout=10,
                env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/sbin"},
            ).stdout
        except (OSError, subprocess.TimeoutExpired):
            return None
        found = re.search(r"(\d+)\.(\d+)", said)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def can_do_without_cgroups(self) -> bool:
        return (self.version or (0, 0)) >= _NO_CGROUPS

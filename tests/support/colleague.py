"""Two ordinary users on one machine, for tests of what one can do to the other: `owner` uses holdfast, `colleague` attacks.

They share the primary group of the owner's group folders, and are real user ids: processes are started by setpriv, which needs root.
With `owner=0` the owner is the user of the tests, whose Python and repository another user may be unable to read; the colleague then runs
system programs alone."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Users with a name on every Debian; neither owns processes or files here.
OWNER, COLLEAGUE, GROUP = 65534, 1, 65534
needs_two_users = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start processes of two other users")


@dataclass(frozen=True)
class Users:
    """`home`: a folder that both can enter. `shared`: a group folder (mode 2775) in which both can write."""

    home: Path
    owner_id: int = OWNER

    @property
    def shared(self) -> Path:
        return self.home / "shared"

    @property
    def private(self) -> Path:
        """The owner's own folder, mode 0755."""
        return self.home / "owner"

    def owner(self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        return self._run(self.owner_id, command, cwd or self.private, env or {}, timeout)

    def colleague(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 120
    ) -> "subprocess.CompletedProcess[str]":
        return self._run(COLLEAGUE, command, cwd or self.shared, env or {}, timeout)

    def holdfast(self, *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        """A command of the owner."""
        return self.owner(sys.executable, "-m", "launcher.cli.app", *words, cwd=cwd, env=env)

    def plant(self, script: str, **paths: Path) -> None:
        """Runs a shell script of the colleague, with `paths` as variables."""
        done = self.colleague("/bin/sh", "-euc", script, env={name: str(path) for name, path in paths.items()})
        assert done.returncode == 0, done.stderr

    def _run(self, uid: int, command: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float) -> "subprocess.CompletedProcess[str]":
        become = [] if uid == os.geteuid() else ["setpriv", f"--reuid={uid}", f"--regid={GROUP}", "--clear-groups"]
        plain = {
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "HOME": str(self.private if uid == self.owner_id else self.home / "colleague"),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run([*become, *command], cwd=cwd, env={**plain, **env}, capture_output=True, text=True, timeout=timeout)


@contextmanager
def two_users(owner: int = OWNER) -> Iterator[Users]:
    """Their folders, below the system's temporary folder, which is sticky; removed at the end."""
    home = Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp"))
    home.chmod(0o755)
    users = Users(home, owner)
    try:
        for path, uid, mode in ((users.private, owner, 0o755), (home / "colleague", COLLEAGUE, 0o755), (users.shared, owner, 0o2775)):
            path.mkdir()
            os.chown(path, uid, GROUP)
            path.chmod(mode)
        if owner != os.geteuid() and users.owner(sys.executable, "-c", "import launcher.cli.app").returncode:
            pytest.skip("another user cannot start this Python and import holdfast")
        yield users
    finally:
        shutil.rmtree(home, ignore_errors=True)

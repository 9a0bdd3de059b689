"""What another user of the machine can make holdfast execute, delete or overwrite: nothing. A second user id plays that user."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from colleague import COLLEAGUE, OWNER, Users, needs_two_users, two_users

from slurm.devcluster import lab
from slurm.devcluster.lab import Lab, LabConfig

pytestmark = needs_two_users


@pytest.fixture
def users() -> Iterator[Users]:
    with two_users() as made:
        yield made


# -- labs ---------------------------------------------------------------------------------------------------------------

_START = "import sys; from pathlib import Path; from slurm.devcluster import lab; lab.start(Path(sys.argv[1]), lab.LabConfig(nodes=1, kill_wait_s=3))"


def _saved_lab(root: Path) -> Lab:
    saved = json.loads((root / "lab.json").read_text())
    return Lab(root, LabConfig(**saved["config"]), int(saved["base_port"]), str(saved["isolation"]))


@pytest.mark.slurm
@pytest.mark.skipif(bool(lab.missing_programs()), reason=lab.how_to_install())
def test_lab_of_another_user_executes_nothing(users: Users) -> None:
    """A slurmd that is not root executes a job of any user as its own user, if that user can reach the lab."""
    root = users.private / "lab"
    started = users.owner(sys.executable, "-c", _START, str(root))
    assert started.returncode == 0, started.stderr
    here = _saved_lab(root)
    try:
        attack = ("srun", "-n1", "--chdir=/tmp", "touch", str(users.private / "X"))
        attacked = users.colleague(*attack, env=here.env(), timeout=60)
        assert not (users.private / "X").exists(), "the colleague's command was executed as the owner"
        assert attacked.returncode != 0
        # What the colleague could read of the directory, with a configuration of their own for the same ports.
        copied = users.colleague("cat", str(here.conf), str(root / "munge" / "key"))
        assert copied.returncode != 0 and copied.stdout == ""
        assert users.owner(*attack[:3], "id", "-u", env=here.env()).stdout == f"{OWNER}\n"
        assert users.owner("sbatch", "--wait", "--output=/dev/null", f"--wrap=touch {users.private}/batch", env=here.env()).returncode == 0
        assert (users.private / "batch").exists()
        status = users.holdfast("lab", "status", str(root))
        assert status.returncode == 0 and "1 idle" in status.stdout, status.stdout + status.stderr
    finally:
        here.stop()


def _plant_lab(users: Users, root: Path) -> None:
    """A lab directory of the colleague, with a plug-in that every Slurm client would load."""
    root.mkdir()
    saved = {"config": {"nodes": 1}, "base_port": 12000, "isolation": "none", "root": str(root)}
    (root / "lab.json").write_text(json.dumps(saved))
    (root / "slurm.conf").write_text(f"ClusterName=lab\nSlurmctldHost=localhost\nPluginDir={root}\n")
    for path in (root, *root.iterdir()):
        os.chown(path, COLLEAGUE, -1)


@pytest.mark.parametrize("command", ["env", "status", "stop", "start"])
@pytest.mark.parametrize("way", ["directory", "configuration", "link", "writable", "parent"])
def test_lab_planted_by_another_user_is_refused(users: Users, command: str, way: str) -> None:
    """The default place of a lab lies in a folder where everybody can make one first."""
    parent = users.home / "tmp"
    parent.mkdir()
    parent.chmod(0o1777)
    root = parent / f"holdfast-lab-{OWNER}"
    if way == "parent":
        parent.chmod(0o777)
    _plant_lab(users, users.home / "planted" if way == "link" else root)
    if way == "link":
        root.symlink_to(users.home / "planted")
        os.chown(root, COLLEAGUE, -1, follow_symlinks=False)
    elif way in ("configuration", "writable", "parent"):
        os.chown(root, OWNER, -1)
        os.chown(root / "lab.json", OWNER, -1)
    if way in ("writable", "parent"):
        os.chown(root / "slurm.conf", OWNER, -1)
        if way == "writable":
            root.chmod(0o775)
    done = users.holdfast("lab", command, env={"TMPDIR": str(parent)})
    if command == "start" and done.returncode == 0:
        _saved_lab(root).stop()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SLURM_CONF" not in done.stdout and str(parent) in done.stderr and "Traceback" not in done.stderr
    assert "daemon" in done.stderr or "can be written" in done.stderr

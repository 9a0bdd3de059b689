"""What another user of the machine can make holdfast execute, delete or overwrite: nothing. A second user id plays that user."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from colleague import COLLEAGUE, OWNER, REPOSITORY, Users, needs_two_users, two_users

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


# -- runs ---------------------------------------------------------------------------------------------------------------

_PREPARE = """
import os, sys
from pathlib import Path
from jobs.run import permissions
from launcher.submission.create_run import prepare, resolve_here
permissions.keep_to_oneself()
run, _ = prepare(resolve_here(sys.argv[1:], os.environ, Path.cwd()), Path.cwd(), sys.executable)
print(run.path)
"""
_PLAIN = ("ENTRY=fit.py", "DEVICE=cpu", "NODES=1", "GPUS_PER_NODE=1")


@pytest.fixture
def mine() -> Iterator[Users]:
    """The owner is the user of the tests: nobody else may be able to execute this Python."""
    with two_users(owner=os.geteuid()) as made:
        yield made


@pytest.fixture
def victim(mine: Users) -> Path:
    """What code of the colleague creates if the owner executes it; the colleague cannot create it."""
    return mine.private / "EXECUTED"


def _project(folder: Path, script: str) -> Path:
    folder.mkdir()
    (folder / "fit.py").write_text(script)
    return folder


def _touches(path: Path) -> str:
    return f"import pathlib\npathlib.Path({str(path)!r}).touch()\n"


@pytest.fixture
def template(mine: Users, victim: Path) -> Path:
    """A run whose script creates the victim, for the colleague to copy. Its batch script creates it at once."""
    made = mine.owner(
        sys.executable, "-c", _PREPARE, *_PLAIN, "RUN_ID=t1", "RUNS_DIR=../colleague-runs", cwd=_project(mine.home / "template", _touches(victim))
    )
    assert made.returncode == 0, made.stderr
    run = Path(made.stdout.strip())
    (run / "submit.sbatch").write_text(f"#!/bin/sh\ntouch {victim}\n")
    return run


def _own_run(mine: Users, *words: str, runs: Path | None = None) -> Path:
    """A run of the owner whose script created `own` and failed, so that it can be resumed; `own` is removed again."""
    own = mine.private / "own"
    project = _project(mine.private / "project", _touches(own) + "raise SystemExit(3)\n")
    runs = runs or mine.private / "runs"
    done = mine.holdfast("run", *_PLAIN, "JOB_NAME=own", "RUN_ID=r1", f"RUNS_DIR={runs}", *words, cwd=project)
    assert own.exists(), done.stdout + done.stderr
    own.unlink()
    return runs / "own-r1"


def _assert_refused(done: "subprocess.CompletedProcess[str]", *said: str) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    for words in said:
        assert words in done.stderr, done.stderr


def test_run_id_of_another_user_is_not_executed(mine: Users, template: Path, victim: Path) -> None:
    mine.plant('cp -r "$T" "$S/base-m1"', T=template, S=mine.shared)
    project = _project(mine.private / "project", "")
    done = mine.holdfast("run", *_PLAIN, "JOB_NAME=base", "RUN_ID=m1", f"RUNS_DIR={mine.shared}", cwd=project)
    assert not victim.exists(), "the colleague's code was executed"
    _assert_refused(done, f"{mine.shared}/base-m1 belongs to daemon, not to you", "cp -r")


@pytest.mark.parametrize("command", [("rerun", "--local"), ("resume", "--local"), ("rerun", "--local", "--with-current-code")], ids=" ".join)
def test_run_of_another_user_is_not_started_again(mine: Users, template: Path, victim: Path, command: tuple[str, ...]) -> None:
    mine.plant('cp -r "$T" "$S/base-m1"', T=template, S=mine.shared)
    done = mine.holdfast(*command, f"{mine.shared}/base-m1", cwd=_project(mine.private / "project", ""))
    assert not victim.exists(), "the colleague's code was executed"
    _assert_refused(done, "belongs to daemon, not to you")
    assert mine.holdfast("status", f"{mine.shared}/base-m1").returncode == 0


def test_copy_of_a_run_of_another_user_is_executed(mine: Users, template: Path, victim: Path) -> None:
    """What the refusal advises, for those who trust the colleague."""
    mine.plant('cp -r "$T" "$S/base-m1"', T=template, S=mine.shared)
    shutil.copytree(mine.shared / "base-m1", mine.private / "COPY")
    done = mine.holdfast("rerun", "--local", str(mine.private / "COPY"))
    assert victim.exists(), done.stdout + done.stderr


def test_sweep_of_another_user_is_not_resumed(mine: Users, victim: Path) -> None:
    project = _project(mine.home / "template", _touches(victim))
    done = mine.holdfast("sweep", "--local", *_PLAIN, "--over", "SEED=1,2", "RUNS_DIR=../made", "RUN_ID=s1", cwd=project)
    made = next((mine.home / "made").glob("*-s1"), None)
    assert made and victim.exists(), done.stdout + done.stderr
    victim.unlink()
    shutil.rmtree(made / "tasks" / "1")
    mine.plant('cp -r "$M" "$S/"; mkdir -p "$S/$(basename "$M")/tasks/1/logs"', M=made, S=mine.shared)
    done = mine.holdfast("sweep", "--resume", str(mine.shared / made.name), "--local")
    assert not victim.exists(), "the colleague's code was executed"
    _assert_refused(done, "belongs to daemon, not to you")


@pytest.mark.parametrize("way", ["directory", "link", "same name"])
def test_job_adopts_no_run_of_another_user(mine: Users, template: Path, victim: Path, way: str) -> None:
    """slurm/train.sbatch executes the batch script of the run that `adopt` names."""
    name = "own-j77" if way == "same name" else "zz-j77"
    mine.plant('cp -r "$T" "$C/run"; if [ "$W" = link ]; then ln -s "$C/run" "$N"; else mv "$C/run" "$N"; fi',
               T=template, C=mine.home / "colleague", N=mine.shared / name, W=Path(way))  # fmt: skip
    project = _project(mine.private / "project", "")
    job = {
        "SLURM_JOB_ID": "77",
        "SLURM_RESTART_COUNT": "1",
        "RUNS_DIR": str(mine.shared),
        "ENTRY": "fit.py",
        "JOB_NAME": "own",
        "HOLDFAST_PYTHON": sys.executable,
    }
    (mine.private / "srun").write_text("#!/bin/sh\nexit 1\n")
    done = mine.owner("bash", str(REPOSITORY / "slurm" / "train.sbatch"), cwd=project, env={**job, "SLURM_CONF": "/nonexistent", "DEVICE": "cpu"})
    assert not victim.exists(), "the colleague's code was executed"
    assert done.returncode != 0 and "daemon" in done.stderr or "another user" in done.stderr, done.stdout + done.stderr


def test_array_of_another_user_around_an_own_run_is_not_executed(mine: Users, template: Path, victim: Path) -> None:
    own = _own_run(mine)
    mine.plant('cp -r "$T" "$S/arr-x1"; mkdir "$S/arr-x1/tasks"; ln -s "$O" "$S/arr-x1/tasks/0"', T=template, S=mine.shared, O=own)
    done = mine.holdfast("resume", "--local", f"{mine.shared}/arr-x1/tasks/0")
    assert not victim.exists(), "the colleague's code was executed"
    _assert_refused(done, "arr-x1 belongs to daemon, not to you")


@pytest.mark.parametrize("part", ["code", "code/fit.py", "submit.sbatch", "job.yaml", "origins.json", "tasks/0"])
def test_part_of_a_run_that_is_a_link_is_refused(mine: Users, victim: Path, part: str) -> None:
    """Of a run directory that was open to the colleague for a time."""
    own = _own_run(mine)
    run = own
    path = own / part
    if part == "tasks/0":
        run = mine.private / "runs" / "arr-x1" / "tasks" / "0"
        run.parent.mkdir(parents=True)
        for name in ("code", "job.yaml", "origins.json", "submit.sbatch", "code.json"):
            (shutil.copytree if name == "code" else shutil.copy)(own / name, run.parent.parent / name)
        path = run
        run.symlink_to(own)
    else:
        if part == "code":
            mine.plant('mkdir "$S/there"; printf "import pathlib; pathlib.Path(\'%s\').touch()\n" "$V" >"$S/there/fit.py"', S=mine.shared, V=victim)
        else:
            shutil.copy(path, mine.shared / "there")
        path.rename(own.parent / "before")
        path.symlink_to(mine.shared / "there")
    done = mine.holdfast("resume", "--local", str(run))
    assert not victim.exists() and not (mine.private / "own").exists(), "code was executed"
    _assert_refused(done, f"{path} is a symbolic link", "without links")


def test_part_of_a_run_that_others_can_write_is_refused(mine: Users) -> None:
    own = _own_run(mine)
    for part in (".", "code", "code/fit.py", "code/jobs", "submit.sbatch", "job.yaml", "attempts"):
        path, mode = own / part, 0o002 if part == "code/jobs" else 0o020
        path.chmod(path.stat().st_mode | mode)
        done = mine.holdfast("resume", "--local", str(own))
        assert not (mine.private / "own").exists(), f"code was executed, with {part} open to others"
        _assert_refused(done, f"{path} can be written by {'its group' if mode == 0o020 else 'everybody'}", f"chmod -R go-w {path}")
        path.chmod(path.stat().st_mode & ~mode)
    done = mine.holdfast("resume", "--local", str(own))
    assert (mine.private / "own").exists(), done.stdout + done.stderr


def _default_acl(folder: Path) -> None:
    """rwx for group and others on all that is made in a folder, whatever the umask."""
    entries = ((0x01, 7), (0x04, 7), (0x20, 7))
    os.setxattr(folder, "system.posix_acl_default", struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry, 0xFFFFFFFF) for entry in entries))


@pytest.mark.parametrize("kind", ["group folder", "access list"])
def test_own_run_in_a_group_folder_starts(mine: Users, template: Path, victim: Path, kind: str) -> None:
    if kind == "access list":
        try:
            _default_acl(mine.shared)
        except OSError as err:
            pytest.skip(f"no access lists in {mine.shared}: {err.strerror}")
    before = os.umask(0o002)
    try:
        own = _own_run(mine, runs=mine.shared)
        done = mine.holdfast("resume", "--local", str(own))
    finally:
        os.umask(before)
    assert (mine.private / "own").exists(), done.stdout + done.stderr
    assert own.stat().st_gid == mine.shared.stat().st_gid
    open_to_others = [path for path in (own, *own.rglob("*")) if not path.is_symlink() and path.stat().st_mode & 0o022]
    assert not open_to_others
    done = mine.colleague("/bin/sh", "-c", f"cp -r {template}/code/fit.py {own}/code/; mkdir {own}/attempts/9")
    assert done.returncode != 0 and not (own / "attempts" / "9").exists()
    # The entry itself can be replaced, since the folder is the group's.
    mine.plant('mv "$O" "$S/away"; cp -r "$T" "$O"', O=own, S=mine.shared, T=template)
    _assert_refused(mine.holdfast("resume", "--local", str(own)), "belongs to daemon, not to you")
    assert not victim.exists()


@pytest.mark.parametrize("way", ["directory", "link"])
def test_batch_script_executes_no_run_of_another_user(mine: Users, template: Path, victim: Path, way: str) -> None:
    """Slurm keeps the text of a job; the directory that it enters may have been replaced since."""
    own = _own_run(mine, runs=mine.shared)
    script = (own / "submit.sbatch").read_text()
    mine.plant('mv "$O" "$S/away"; cp -r "$T" "$C/run"; mkdir "$C/run/code/launcher/attempt" -p; '
               'printf "import pathlib; pathlib.Path(\'%s\').touch()\n" "$V" >"$C/run/code/launcher/attempt/__main__.py"; '
               'if [ "$W" = link ]; then ln -s "$C/run" "$O"; else mv "$C/run" "$O"; fi',
               O=own, S=mine.shared, T=template, C=mine.home / "colleague", V=victim, W=Path(way))  # fmt: skip
    done = mine.owner("bash", "-c", script, env={"SLURM_CONF": "/nonexistent"})
    assert not victim.exists(), "the colleague's code was executed"
    assert done.returncode == 2 and "belongs to another user" in done.stderr, done.stdout + done.stderr


def test_script_of_a_moved_run_is_not_submitted(mine: Users) -> None:
    """It would execute what another user has put at the old place meanwhile."""
    own = _own_run(mine, runs=mine.shared)
    moved = own.rename(mine.private / "own-r1")
    check = "import sys; from pathlib import Path; from jobs.run import permissions; from jobs.run.rundir import RunDir; permissions.script_to_submit(RunDir(Path(sys.argv[1])))"
    done = mine.owner(sys.executable, "-c", check, str(moved))
    assert done.returncode != 0 and f"starts the run in {own}, not in {moved}" in done.stderr
    done = mine.holdfast("resume", "--local", str(moved))
    assert (mine.private / "own").exists(), done.stdout + done.stderr


# -- clean --------------------------------------------------------------------------------------------------------------


def _array(folder: Path) -> Path:
    """An array that is over, with two tasks and a checkpoint in one of them."""
    from test_clean import made

    array = made(folder, "arr-x1")
    for index in "01":
        made(array.members, index)
    return array.path


@pytest.mark.parametrize("options", [(), ("--keep-checkpoints",)], ids=" ".join)
@pytest.mark.parametrize("planted", ["tasks/0", "tasks", "attempts", "logs/x"])
def test_clean_follows_no_link(mine: Users, options: tuple[str, ...], planted: str) -> None:
    """Of an array that was open to the colleague for a time."""
    from test_clean import made

    # As a directory of runs, and as a run that is over: so that it could be taken for what it takes the place of.
    thesis = made(mine.private, "thesis").path
    for folder in (thesis, *(made(thesis, name).path for name in ("0", "1"))):
        (folder / "chapter.tex").write_text("years of work")
    before = sorted(thesis.rglob("*"))
    array = _array(mine.shared)
    for name, _, _ in os.walk(array):
        os.chmod(name, 0o777)
    mine.plant('rm -rf "$A/$P"; ln -s "$T" "$A/$P"', A=array, P=Path(planted), T=thesis)
    done = mine.holdfast("clean", "--yes", *options, "arr-x1", f"RUNS_DIR={mine.shared}")
    assert sorted(thesis.rglob("*")) == before, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    if planted.startswith("tasks"):
        assert f"left: {planted} is a symbolic link" in done.stdout and (array / planted).is_symlink()
    else:
        assert done.returncode == 0 and not (array / planted).is_symlink()


def test_clean_deletes_nothing_that_replaces_a_run_meanwhile(mine: Users, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between look and deletion another directory of the same user gets the name of the run."""
    from jobs.run.rundir import RunDir
    from launcher.commands import clean

    array = RunDir(_array(mine.shared))
    thesis = mine.shared / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("years of work")
    real = clean._away

    def swapped(parent: int, name: str, *more: object) -> list[str]:
        mine.plant('mv "$A" "$S/away"; mv "$T" "$A"', A=array.path, S=mine.shared, T=thesis)
        return real(parent, name, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(clean, "_away", swapped)
    said = clean._remove(array, False)
    assert (array.path / "chapter.tex").exists() and "another directory has taken its place" in said[0]
    monkeypatch.setattr(clean, "_away", real)
    (array.path / "chapter.tex").rename(mine.private / "chapter.tex")
    array.path.rmdir()
    array.path.symlink_to(mine.private)
    assert clean._remove(array, False) and clean._remove(array, True) and (mine.private / "chapter.tex").exists()

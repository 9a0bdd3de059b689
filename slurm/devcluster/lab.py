"""The lab: a private, real, multi-node Slurm cluster in one directory of one machine, for any user.

Several slurmds run side by side under node names of their own, on 127.0.0.1 and a private block of ports, with a
private munged. A client needs SLURM_CONF in its environment and nothing else. What `start` puts into the directory:

    lab.json        the shape that runs, and its ports
    slurm.conf      and gres.conf  cgroup.conf  slurmdbd.conf  hosts
    run/ log/       pid files and munge's socket; one log per daemon, kept by `stop`
    munge/ db/      key and database, closed to other users
    state/ spool/   of slurmctld and the slurmds; job ids go on after a restart
    dev/            stand-in GPUs

Root and everybody else get the same cluster. The differences:
- SlurmUser is the user who starts it, and a slurmd that is not root executes every job as that user. The directory has mode
  0700, which keeps other users from slurm.conf and from munged's socket: only the owner can use a lab, one of root too.
- Node names resolve inside jobs because the Slurm daemons see their own /etc/hosts, by a mount namespace. Another user
  gets that through a user namespace, inside which files of root appear as nobody's and setuid programs do not work.
  Where neither is allowed, `Lab.names_resolve` is False and the address of every node is 127.0.0.1 (NodeAddr).
All nodes share one port space and one host name: jobs tell nodes apart by SLURMD_NODENAME.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jobs.core.errors import LabError
from slurm.devcluster import host_info, proc
from slurm.devcluster.boot import boot, start_slurmctld, start_slurmd, wait_registered
from slurm.devcluster.host_info import default_root
from slurm.devcluster.prefix import VARIABLE, SlurmPrefix
from slurm.devcluster.shutdown import halt
from slurm.devcluster.slurm_conf import LabConfig
from slurm.devcluster.state_dir import LabDir

__all__ = [
    "Daemon", "Lab", "LabConfig", "LabError", "LabStatus", "default_root", "find", "how_to_install", "load",
    "missing_programs", "start",
]  # fmt: skip

_PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
DEFAULT = LabConfig()
_ACCOUNTING_PROGRAMS = ("slurmdbd", "sacct", "sacctmgr", "mariadbd", "mariadb-install-db", "mariadb-admin")


def missing_programs(accounting: bool = False) -> list[str]:
    """Programs a lab needs and this machine does not have, on PATH or in the sbin directories."""
    wanted = _PROGRAMS + (_ACCOUNTING_PROGRAMS if accounting else ())
    return [name for name in wanted if not shutil.which(name, path=SlurmPrefix.of(os.environ).before(host_info.search_path()))]


def how_to_install() -> str:
    return "Debian/Ubuntu: apt-get install slurm-wlm munge (for accounting also: slurmdbd mariadb-server)"


@dataclass(frozen=True)
class Daemon:
    name: str
    pid: int | None
    alive: bool


@dataclass(frozen=True)
class LabStatus:
    """What a lab was doing at one moment. Nodes and jobs are empty while slurmctld does not answer."""

    root: Path
    daemons: tuple[Daemon, ...]
    nodes: tuple[tuple[str, str], ...]  # name, state as sinfo prints it
    jobs_running: int
    jobs_pending: int

    @property
    def running(self) -> bool:
        return any(d.alive for d in self.daemons if d.name == "slurmctld")

    def describe(self) -> str:
        """One screen of plain text."""
        names: dict[str, list[str]] = {}
        for name, state in self.nodes:
            names.setdefault(state, []).append(name)
        dead = [d.name for d in self.daemons if not d.alive]
        lines = [f"lab in {self.root}: {'running' if self.running else 'not running'}"]
        lines.append("daemons  " + " ".join(f"{d.name}({d.pid})" for d in self.daemons if d.alive))
        if dead:
            lines.append("dead     " + " ".join(dead))
        lines += [f"nodes    {len(found)} {state}: {' '.join(found)}" for state, found in names.items()]
        lines.append(f"jobs     {self.jobs_running} running, {self.jobs_pending} pending")
        return "\n".join(lines)


@dataclass(frozen=True)
class Lab(LabDir):
    """A lab that was started in `root`; get one from `start`, `find` or `load`."""

    def status(self) -> LabStatus:
        daemons = []
        for name in self.daemon_names:
            process = self.process(name)
            daemons.append(Daemon(name, process.pid if process else None, process is not None))
        nodes: tuple[tuple[str, str], ...] = ()
        jobs: list[str] = []
        if self.process("slurmctld"):
            with suppress(LabError):  # it may die, or hang, between the look and the question
                nodes = tuple(self.node_states().items())
                jobs = self.ask("squeue", "--noheader", "--array", "--format=%T").split()
        return LabStatus(self.root, tuple(daemons), nodes, jobs.count("RUNNING"), jobs.count("PENDING"))

    def stop(self, timeout_s: float = 30) -> None:
        """Ends every process of this lab, jobs included, and nothing else; logs stay. Harmless when nothing runs.

        Jobs get two seconds after being cancelled, daemons a few to write their state; then all is killed. Raises
        LabError naming what still runs after `timeout_s` seconds."""
        with host_info.exclusive(self.root):
            halt(self, timeout_s)

    def kill_node(self, name: str) -> None:
        """Loses the node: SIGKILL to its slurmd, its step daemons and its tasks. slurmctld finds out by itself, in
        about 30 s; `scontrol update nodename=NAME state=down reason=test` tells it at once."""
        self.check_node(name)

        def find() -> list[proc.Process]:
            found = proc.of_lab(self.root)
            return found.daemons.get(name, []) + found.jobs.get(name, [])

        self._kill(name, find)

    def restart_node(self, name: str) -> None:
        """Starts the node's slurmd again and waits until it has reported; no-op on one that runs."""
        self.check_node(name)
        if self.process(name):
            return
        start_slurmd(self, name)
        if self.process("slurmctld"):
            wait_registered(self, (name,))

    def kill_controller(self) -> None:
        """SIGKILL to slurmctld; nodes and jobs go on without it."""
        self._kill("slurmctld", lambda: proc.of_lab(self.root).daemons.get("slurmctld", []))

    def start_controller(self) -> None:
        """Starts slurmctld again from its saved state, and waits until it answers; no-op when it runs."""
        if not self.process("slurmctld"):
            start_slurmctld(self)

    def _kill(self, name: str, find: Callable[[], list[proc.Process]]) -> None:
        left = proc.kill_all(find, 5)
        if left:
            raise LabError(f"lab in {self.root}: {name}: still running after SIGKILL: {[p.pid for p in left]}")


def load(root: Path) -> Lab | None:
    """The lab that was last started in `root`, running or not, so that what is left of it can be stopped.

    Raises LabError for a directory or configuration that another user made or can write."""
    try:
        host_info.check_owner(root)
    except OSError as err:
        raise LabError(f"{root}: cannot be examined: {err.strerror}") from err
    try:
        saved = json.loads((root.resolve() / "lab.json").read_text())
        config = LabConfig(**saved["config"])
        return Lab(root.resolve(), config, int(saved["base_port"]), str(saved["isolation"]), SlurmPrefix(**saved.get("slurm", {})))
    except (OSError, ValueError, KeyError, TypeError, LabError):
        return None


def find(root: Path) -> Lab | None:
    """The lab in `root` if its slurmctld is alive."""
    lab = load(root)
    return lab if lab and lab.process("slurmctld") else None


def start(root: Path, config: LabConfig = DEFAULT) -> Lab:
    """Boots a lab in `root` and returns when every node is usable; returns the running one if it has this shape.

    The caller must be able to write `root`, which is made if need be; root's or anybody's, see the top of this file.
    Raises LabError, with the daemon's last log lines where one failed, and then nothing of the lab is left running."""
    missing = missing_programs(config.accounting)
    if missing:
        raise LabError(f"a lab needs {', '.join(missing)}, which this machine does not have. {how_to_install()}")
    slurm = SlurmPrefix.of(os.environ)
    root = host_info.prepare_root(root, config)
    with host_info.exclusive(root):
        running = find(root)
        if running:
            _check_same_shape(running, config, slurm)
            return running
        before = load(root)
        if before:
            halt(before, 15)  # what a killed controller left behind
        isolation = host_info.pick_isolation()
        with host_info.reserved_ports(root, config, before.base_port if before else None) as base_port:
            lab = Lab(root, config, base_port, isolation, slurm)
            try:
                boot(lab)
            except BaseException:
                halt(lab, 15)
                raise
            return lab


def _check_same_shape(running: Lab, asked: LabConfig, slurm: SlurmPrefix | None = None) -> None:
    if asked.base_port in (None, running.base_port):
        asked = replace(asked, base_port=running.config.base_port)
    have, want = asdict(running.config), asdict(asked)
    different = [f"{name} is {have[name]!r}, asked for {want[name]!r}" for name in have if have[name] != want[name]]
    if slurm is not None and running.slurm != slurm:
        different.append(f"{VARIABLE} is {running.slurm.path!r}, asked for {slurm.path!r}")
    if different:
        raise LabError(f"another lab is running in {running.root}: {'; '.join(different)}. Stop it first, or start this one in another directory")

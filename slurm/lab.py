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
- SlurmUser is whoever starts it, so another user's jobs can run only in a lab of root.
- Node names resolve inside jobs because the Slurm daemons see their own /etc/hosts, by a mount namespace. Another user
  gets that through a user namespace, inside which files of root appear as nobody's and setuid programs do not work.
  Where neither is allowed, `Lab.names_resolve` is False and the address of every node is 127.0.0.1 (NodeAddr).
All nodes share one port space and one host name: jobs tell nodes apart by SLURMD_NODENAME.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jobs.errors import LabError
from slurm import lab_conf, lab_host, lab_proc
from slurm.lab_conf import LabConfig
from slurm.lab_host import default_root

__all__ = [
    "Daemon", "Lab", "LabConfig", "LabError", "LabStatus", "default_root", "find", "how_to_install", "load",
    "missing_programs", "start",
]  # fmt: skip

_PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
DEFAULT = LabConfig()
_ACCOUNTING_PROGRAMS = ("slurmdbd", "sacct", "sacctmgr", "mariadbd", "mariadb-install-db", "mariadb-admin")
_UP_STATES = {"idle", "mixed", "allocated", "completing", "draining", "drained", "planned", "reserved"}


def missing_programs(accounting: bool = False) -> list[str]:
    """Programs a lab needs and this machine does not have, on PATH or in the sbin directories."""
    wanted = _PROGRAMS + (_ACCOUNTING_PROGRAMS if accounting else ())
    return [name for name in wanted if not shutil.which(name, path=lab_host.search_path())]


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
class Lab:
    """A lab that was started in `root`; get one from `start`, `find` or `load`."""

    root: Path
    config: LabConfig  # base_port as asked for
    base_port: int  # as it is
    isolation: str  # how daemons see their own /etc/hosts: "mount", "user" (namespace) or "none"

    @property
    def conf(self) -> Path:
        return self.root / "slurm.conf"

    @property
    def names_resolve(self) -> bool:
        """Whether node names resolve inside jobs; clients outside never resolve them.

        Where the machine's own name is not a loopback address, srun works inside jobs only (it binds that name's)."""
        return self.isolation != "none"

    @property
    def daemon_names(self) -> tuple[str, ...]:
        database = ("mariadbd", "slurmdbd") if self.config.accounting else ()
        return ("munged", *database, "slurmctld", *self.config.node_names)

    def env(self) -> dict[str, str]:
        """What a Slurm client needs in its environment to talk to this lab."""
        return {"SLURM_CONF": str(self.conf)}

    def status(self) -> LabStatus:
        daemons = []
        for name in self.daemon_names:
            process = self._process(name)
            daemons.append(Daemon(name, process.pid if process else None, process is not None))
        nodes: tuple[tuple[str, str], ...] = ()
        jobs: list[str] = []
        if self._process("slurmctld"):
            with suppress(LabError):  # it may die, or hang, between the look and the question
                nodes = tuple(self._node_states().items())
                jobs = self._ask("squeue", "--noheader", "--array", "--format=%T").split()
        return LabStatus(self.root, tuple(daemons), nodes, jobs.count("RUNNING"), jobs.count("PENDING"))

    def stop(self, timeout_s: float = 30) -> None:
        """Ends every process of this lab, jobs included, and nothing else; logs stay. Harmless when nothing runs.

        Jobs get two seconds after being cancelled, daemons a few to write their state; then all is killed. Raises
        LabError naming what still runs after `timeout_s` seconds."""
        with lab_host.exclusive(self.root):
            self._halt(timeout_s)

    def kill_node(self, name: str) -> None:
        """Loses the node: SIGKILL to its slurmd, its step daemons and its tasks. slurmctld finds out by itself, in
        about 30 s; `scontrol update nodename=NAME state=down reason=test` tells it at once."""
        self._check_node(name)

        def find() -> list[lab_proc.Process]:
            found = lab_proc.of_lab(self.root)
            return found.daemons.get(name, []) + found.jobs.get(name, [])

        self._kill(name, find)

    def restart_node(self, name: str) -> None:
        """Starts the node's slurmd again and waits until it has reported; no-op on one that runs."""
        self._check_node(name)
        if self._process(name):
            return
        self._start_slurmd(name)
        if self._process("slurmctld"):
            self._wait_registered((name,))

    def kill_controller(self) -> None:
        """SIGKILL to slurmctld; nodes and jobs go on without it."""
        self._kill("slurmctld", lambda: lab_proc.of_lab(self.root).daemons.get("slurmctld", []))

    def start_controller(self) -> None:
        """Starts slurmctld again from its saved state, and waits until it answers; no-op when it runs."""
        if not self._process("slurmctld"):
            self._start_slurmctld()

    # -- boot ------------------------------------------------------------------------------------------------------

    def _boot(self) -> None:
        self._write_files()
        self._start_munged()
        if self.config.accounting:
            self._start_database()
        self._start_slurmctld()
        for name in self.config.node_names:
            self._start_slurmd(name)
        self._wait_registered(self.config.node_names)

    def _write_files(self) -> None:
        root, config = self.root, self.config
        # munged wants its socket's folder open to all and its key's closed, and so would any client of ours.
        for name, mode in {"": 0o755, "run": 0o755, "log": 0o755, "state": 0o700, "spool": 0o755, "dev": 0o755}.items():
            (root / name).mkdir(exist_ok=True)
            (root / name).chmod(mode)
        for name in ("munge", "db"):
            (root / name).mkdir(mode=0o700, exist_ok=True)
        for name in config.node_names:
            (root / "spool" / name).mkdir(mode=0o755, exist_ok=True)
        key = root / "munge" / "key"
        if not key.exists():
            lab_host.write(key, os.urandom(128), 0o600)

        user, host = lab_host.user_name(), lab_host.short_host_name()
        system_hosts = Path("/etc/hosts")
        host_names = (socket.gethostname(), host)
        known = system_hosts.read_text(errors="replace") if system_hosts.exists() else ""
        lab_host.write(root / "hosts", lab_conf.hosts(known, host_names, config.node_names))
        lab_host.write(self.conf, lab_conf.slurm_conf(config, root, self.base_port, user, host))
        lab_host.write(root / "gres.conf", lab_conf.gres_conf(config, root))
        lab_host.write(root / "cgroup.conf", lab_conf.cgroup_conf(config))
        if config.accounting:
            # slurmdbd refuses a file that others may read.
            lab_host.write(root / "slurmdbd.conf", lab_conf.slurmdbd_conf(root, self.base_port, user), 0o600)
        self._make_gpus()
        # A node that was down when the lab was last stopped begins anew; jobs and their ids are kept.
        for old in ("node_state", "node_state.old"):
            (root / "state" / old).unlink(missing_ok=True)
        lab_host.write(root / "lab.json", json.dumps({**asdict(self), "root": str(root)}, indent=1) + "\n")

    def _make_gpus(self) -> None:
        config, dev = self.config, self.root / "dev"
        for old in dev.iterdir():
            old.unlink()
        if config.real_gpus:
            devices, wanted = lab_host.nvidia_devices(), config.nodes * config.gpus
            if wanted > len(devices):
                raise LabError(
                    f"{config.nodes} nodes with {config.gpus} real GPUs each need {wanted},"
                    f" this machine has {len(devices)}; ask for fewer nodes or GPUs, or leave real_gpus off"
                )
            devices = devices[:wanted]
        else:
            # A device it must be: for a plain file Slurm schedules the GPU, but leaves CUDA_VISIBLE_DEVICES unset.
            devices = [Path("/dev/null")] * config.gpus
        # By link, so that the numbers count from 0 as CUDA's do: a container may hold /dev/nvidia3 and no other. And
        # nobody needs the right to make devices.
        for i, device in enumerate(devices):
            (dev / f"gpu{i}").symlink_to(device)

    def _start_munged(self) -> None:
        munge = self.root / "munge"
        self._launch(
            "munged",
            # --force: munged refuses a socket below a folder that only its owner may enter (every home, every pytest
            # folder) and a group-writable parent. lab_host.prepare_root has refused what is really dangerous.
            "munged", "--force", f"--key-file={munge}/key", f"--socket={self.root}/run/munge.sock",
            f"--pid-file={self._pid_file('munged')}", f"--log-file={self._log('munged')}", f"--seed-file={munge}/seed",
            "--num-threads=4",
            # In a user namespace files of root are nobody's, which munged takes for an attack.
            isolated=False,
            ready=(self.root / "run" / "munge.sock").is_socket,
        )  # fmt: skip

    def _start_database(self) -> None:
        data, db_socket = self.root / "db" / "data", self.root / "db" / "sock"
        as_root = ("--user=root",) if os.geteuid() == 0 else ()
        small = ("--innodb-log-file-size=8M", "--innodb-buffer-pool-size=64M")
        # A lab that loses its power has lost nothing, and on a busy disk the syncs take most of the start. "loose":
        # a version that has no such option any more goes on without it.
        unsynced = ("innodb-flush-method=nosync", "innodb-flush-log-at-trx-commit=0", "aria-sync-log-dir=NEVER")
        tuning = (*small, *(f"--loose-{option}" for option in (*unsynced, "sync-frm=0")))
        if not (data / "mysql").is_dir():
            shutil.rmtree(data, ignore_errors=True)  # an installation that was cut short
            self._ask(
                "mariadb-install-db", "--no-defaults", *as_root, f"--datadir={data}", "--skip-test-db", *tuning,
                "--auth-root-authentication-method=normal", timeout_s=60,
            )  # fmt: skip
        self._launch(
            "mariadbd",
            # No TCP at all, and the socket lies in a closed folder: its root account has no password.
            "mariadbd", "--no-defaults", *as_root, f"--datadir={data}", f"--socket={db_socket}", "--skip-networking",
            *tuning, "--innodb-lock-wait-timeout=900",
            f"--pid-file={self._pid_file('mariadbd')}", f"--log-error={self._log('mariadbd')}",
            daemonizes=False,
            timeout_s=30,
            ready=lambda: self._answers("mariadb-admin", "--no-defaults", "-uroot", f"-S{db_socket}", "ping"),
        )  # fmt: skip
        self._launch(
            "slurmdbd", "slurmdbd",
            # Where the client library looks for "localhost".
            env={"MYSQL_UNIX_PORT": str(db_socket)},
            timeout_s=30,
            ready=lambda: self._answers("sacctmgr", "--noheader", "show", "cluster"),
        )  # fmt: skip
        known = self._ask("sacctmgr", "--noheader", "--parsable2", "show", "cluster", "format=cluster").split()
        if lab_conf.CLUSTER not in known:
            self._ask("sacctmgr", "--immediate", "add", "cluster", lab_conf.CLUSTER)

    def _start_slurmctld(self) -> None:
        self._launch(
            "slurmctld", "slurmctld", "-f", str(self.conf),
            ready=lambda: self._answers("scontrol", "ping"),
        )  # fmt: skip

    def _start_slurmd(self, name: str) -> None:
        self._launch(name, "slurmd", "-f", str(self.conf), "-N", name)

    def _wait_registered(self, names: Sequence[str], timeout_s: float = 25) -> None:
        states: dict[str, str] = {}

        def registered() -> bool:
            for daemon in ("slurmctld", *names):
                if not self._process(daemon):
                    raise self._failure(daemon, "died")
            with suppress(LabError):
                states.update(self._node_states())
            return all(states.get(name, "") in _UP_STATES for name in names)

        if not lab_proc.wait_until(registered, timeout_s):
            name = next(name for name in names if states.get(name, "") not in _UP_STATES)
            state = states.get(name, "unknown to slurmctld")
            raise self._failure(name, f"did not become usable within {timeout_s:g} s (its state: {state})")

    def _launch(
        self,
        name: str,
        *command: str,
        env: dict[str, str] | None = None,
        isolated: bool = True,
        daemonizes: bool = True,
        ready: Callable[[], bool] = lambda: True,
        timeout_s: float = 15,
    ) -> None:
        """Starts the daemon `name` and waits until it has written its pid file and `ready()` holds."""
        self._pid_file(name).unlink(missing_ok=True)
        marks = {lab_proc.ROOT_MARK: str(self.root), lab_proc.DAEMON_MARK: name}
        wrapper = lab_host.isolate(self.isolation, self.root / "hosts") if isolated else []
        if not daemonizes:
            wrapper = [*wrapper, "setsid", "--fork"]
        end = time.monotonic() + timeout_s
        # Files and not pipes, and a session of its own: whoever reads our output sees its end, and the daemon
        # outlives the caller's terminal.
        with open(self._log(name).with_suffix(".err"), "wb") as err:
            try:
                rc = subprocess.run(
                    [*wrapper, *command], env={**self._clean_env(), **(env or {}), **marks}, cwd=self.root, umask=0o022,
                    stdin=subprocess.DEVNULL, stdout=err, stderr=err, start_new_session=True, timeout=timeout_s,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                raise self._failure(name, f"did not go to the background within {timeout_s:g} s") from None
        if rc:
            raise self._failure(name, f"ended at once with code {rc}")
        seen: list[lab_proc.Process] = []

        def up() -> bool:
            process = self._process(name)
            if seen and process != seen[0]:
                raise self._failure(name, "died while starting")
            seen[:] = [process] if process else []
            return process is not None and ready()

        if not lab_proc.wait_until(up, end - time.monotonic()):
            raise self._failure(name, f"was not ready within {timeout_s:g} s")

    def _failure(self, daemon: str, what: str) -> LabError:
        """The error with the last words of that daemon; its standard error holds them when it never opened its log."""
        shown = []
        for log in (self._log(daemon), self._log(daemon).with_suffix(".err")):
            with suppress(OSError):
                lines = log.read_text(errors="replace").strip().splitlines()[-8:]
                if lines:
                    shown += [f"{log}:", *(f"  {line}" for line in lines)]
        return LabError("\n".join([f"lab in {self.root}: {daemon} {what}", *shown]))

    # -- end -------------------------------------------------------------------------------------------------------

    def _halt(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        if self._process("slurmctld"):
            self._cancel_jobs(min(2.0, timeout_s / 4))
        found = lab_proc.of_lab(self.root)
        last = ["slurmdbd", "mariadbd", "munged"]  # in this order: each one needs the next to write its last words
        nodes = [p for name, group in found.daemons.items() if name not in ("slurmctld", *last) for p in group]
        # A batch script that traps SIGTERM and loops outlives its slurmstepd and its cluster, and is found by its
        # environment. Once more after the slurmds, in case one was just starting a step.
        lab_proc.kill_all(self._job_processes, 5)
        lab_proc.terminate(found.daemons.get("slurmctld", []), 5)
        # A slurmd has nothing to write, and one that was ending a job would sit out KillWait first.
        lab_proc.terminate(nodes, 0.5)
        lab_proc.kill_all(self._job_processes, 5)
        for name in last:
            lab_proc.terminate(found.daemons.get(name, []), 8)
        # The net: whatever else carries our marks, for example what a dying daemon forked.
        left = lab_proc.kill_all(lambda: lab_proc.of_lab(self.root).all(), max(2.0, end - time.monotonic()))
        if left:
            names = ", ".join(f"{p.name}({p.pid})" for p in left)
            raise LabError(f"lab in {self.root}: still running after SIGKILL: {names}")
        if self.config.memory_cgroup:
            self._remove_cgroups()
        for name in self.daemon_names:
            self._pid_file(name).unlink(missing_ok=True)
        (self.root / "run" / "munge.sock").unlink(missing_ok=True)

    def _remove_cgroups(self) -> None:
        """The folders that its slurmds made among the kernel's memory limits; one that is still in use stays."""
        for name in self.config.node_names:
            for folder, _, _ in os.walk(lab_conf.MEMORY_CGROUPS / f"slurm_{name}", topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)

    def _job_processes(self) -> list[lab_proc.Process]:
        return [p for group in lab_proc.of_lab(self.root).jobs.values() for p in group]

    def _cancel_jobs(self, wait_s: float) -> None:
        with suppress(LabError):  # a controller that hangs must not keep the rest alive
            for partition in ("low", "high"):  # else the next one in the queue starts
                self._ask("scontrol", "update", f"partitionname={partition}", "state=down", timeout_s=3)
            for state in ("PENDING", "RUNNING", "SUSPENDED"):
                self._ask("scancel", "--quiet", f"--state={state}", timeout_s=3)
            lab_proc.wait_until(lambda: not self._ask("squeue", "--noheader", timeout_s=3).strip(), wait_s, 0.05)

    def _kill(self, name: str, find: Callable[[], list[lab_proc.Process]]) -> None:
        left = lab_proc.kill_all(find, 5)
        if left:
            raise LabError(f"lab in {self.root}: {name}: still running after SIGKILL: {[p.pid for p in left]}")

    # -- small things ----------------------------------------------------------------------------------------------

    def _pid_file(self, name: str) -> Path:
        return self.root / "run" / f"{name}.pid"

    def _log(self, name: str) -> Path:
        return self.root / "log" / f"{name}.log"

    def _process(self, name: str) -> lab_proc.Process | None:
        """The daemon by its pid file, if a process of that number runs and carries this lab's marks."""
        try:
            pid = int(self._pid_file(name).read_text())
        except (OSError, ValueError):
            return None
        return lab_proc.marked(pid, self.root, name)

    def _check_node(self, name: str) -> None:
        if name not in self.config.node_names:
            raise LabError(f"{name!r} is no node of the lab in {self.root}; it has {', '.join(self.config.node_names)}")

    def _node_states(self) -> dict[str, str]:
        out = self._ask("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T")
        return dict(line.split() for line in out.splitlines() if line)

    def _clean_env(self) -> dict[str, str]:
        """Little of the caller's environment: a SLURM_* of an enclosing job, or a SQUEUE_FORMAT, would be obeyed."""
        kept = {"HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "TZ"} & os.environ.keys()
        return {**{name: os.environ[name] for name in kept}, "PATH": lab_host.search_path(), **self.env()}

    def _ask(self, *command: str, timeout_s: float = 10) -> str:
        """Standard output of a client of this lab. Raises LabError with what it wrote to standard error."""
        try:
            done = subprocess.run(
                command, env=self._clean_env(), cwd=self.root, timeout=timeout_s, text=True, errors="replace",
                stdin=subprocess.DEVNULL, capture_output=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise LabError(f"`{command[0]}` did not answer within {timeout_s:g} s") from None
        if done.returncode:
            raise LabError(f"`{' '.join(command)}` ended with code {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def _answers(self, *command: str) -> bool:
        try:
            self._ask(*command, timeout_s=5)
        except LabError:
            return False
        return True


def load(root: Path) -> Lab | None:
    """The lab that was last started in `root`, running or not, so that what is left of it can be stopped."""
    try:
        saved = json.loads((root.resolve() / "lab.json").read_text())
        config = LabConfig(**saved["config"])
        return Lab(root.resolve(), config, int(saved["base_port"]), str(saved["isolation"]))
    except (OSError, ValueError, KeyError, TypeError, LabError):
        return None


def find(root: Path) -> Lab | None:
    """The lab in `root` if its slurmctld is alive."""
    lab = load(root)
    return lab if lab and lab._process("slurmctld") else None


def start(root: Path, config: LabConfig = DEFAULT) -> Lab:
    """Boots a lab in `root` and returns when every node is usable; returns the running one if it has this shape.

    The caller must be able to write `root`, which is made if need be; root's or anybody's, see the top of this file.
    Raises LabError, with the daemon's last log lines where one failed, and then nothing of the lab is left running."""
    missing = missing_programs(config.accounting)
    if missing:
        raise LabError(f"a lab needs {', '.join(missing)}, which this machine does not have. {how_to_install()}")
    root = lab_host.prepare_root(root, config)
    with lab_host.exclusive(root):
        running = find(root)
        if running:
            _check_same_shape(running, config)
            return running
        before = load(root)
        if before:
            before._halt(15)  # what a killed controller left behind
        isolation = lab_host.pick_isolation()
        with lab_host.reserved_ports(root, config, before.base_port if before else None) as base_port:
            lab = Lab(root, config, base_port, isolation)
            try:
                lab._boot()
            except BaseException:
                lab._halt(15)
                raise
            return lab


def _check_same_shape(running: Lab, asked: LabConfig) -> None:
    if asked.base_port in (None, running.base_port):
        asked = replace(asked, base_port=running.config.base_port)
    have, want = asdict(running.config), asdict(asked)
    different = [f"{name} is {have[name]!r}, asked for {want[name]!r}" for name in have if have[name] != want[name]]
    if different:
        raise LabError(f"another lab is running in {running.root}: {'; '.join(different)}. Stop it first, or start this one in another directory")

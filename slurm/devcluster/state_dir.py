"""One lab by its directory: its paths, its daemons as processes, its clients, and the way in which a daemon is started."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.core.errors import LabError
from slurm.devcluster import host_info, proc
from slurm.devcluster.prefix import SlurmPrefix
from slurm.devcluster.slurm_conf import LabConfig


@dataclass(frozen=True)
class LabDir:
    """Where a lab lives, its shape, and how its processes see the machine."""

    root: Path
    config: LabConfig  # base_port as asked for
    base_port: int  # as it is
    isolation: str  # how daemons see their own /etc/hosts: "mount", "user" (namespace) or "none"
    slurm: SlurmPrefix = SlurmPrefix()

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
        programs = {"PATH": self.slurm.before(os.environ.get("PATH", os.defpath))} if self.slurm.path else {}
        return {"SLURM_CONF": str(self.conf), **programs}

    def pid_file(self, name: str) -> Path:
        return self.root / "run" / f"{name}.pid"

    def log(self, name: str) -> Path:
        return self.root / "log" / f"{name}.log"

    def process(self, name: str) -> proc.Process | None:
        """The daemon by its pid file, if a process of that number runs and carries this lab's marks."""
        try:
            pid = int(self.pid_file(name).read_text())
        except (OSError, ValueError):
            return None
        return proc.marked(pid, self.root, name)

    def check_node(self, name: str) -> None:
        if name not in self.config.node_names:
            raise LabError(f"{name!r} is no node of the lab in {self.root}; it has {', '.join(self.config.node_names)}")

    def node_states(self) -> dict[str, str]:
        out = self.ask("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T")
        return dict(line.split() for line in out.splitlines() if line)

    def ask(self, *command: str, timeout_s: float = 10) -> str:
        """Standard output of a client of this lab. Raises LabError with what it wrote to standard error."""
        try:
            done = subprocess.run(
                command, env=self.clean_env(), cwd=self.root, timeout=timeout_s, text=True, errors="replace",
                stdin=subprocess.DEVNULL, capture_output=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise LabError(f"`{command[0]}` did not answer within {timeout_s:g} s") from None
        if done.returncode:
            raise LabError(f"`{' '.join(command)}` ended with code {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def answers(self, *command: str) -> bool:
        try:
            self.ask(*command, timeout_s=5)
        except LabError:
            return False
        return True

    def clean_env(self) -> dict[str, str]:
        """Little of the caller's environment: a SLURM_* of an enclosing job, or a SQUEUE_FORMAT, would be obeyed."""
        kept = {"HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "TZ"} & os.environ.keys()
        return {**{name: os.environ[name] for name in kept}, **self.env(), "PATH": self.slurm.before(host_info.search_path())}

    def launch(
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
        self.pid_file(name).unlink(missing_ok=True)
        marks = {proc.ROOT_MARK: str(self.root), proc.DAEMON_MARK: name}
        wrapper = host_info.isolate(self.isolation, self.root / "hosts") if isolated else []
        if not daemonizes:
            wrapper = [*wrapper, "setsid", "--fork"]
        end = time.monotonic() + timeout_s
        # Files and not pipes, and a session of its own: whoever reads our output sees its end, and the daemon
        # outlives the caller's terminal.
        with open(self.log(name).with_suffix(".err"), "wb") as err:
            try:
                rc = subprocess.run(
                    [*wrapper, *command], env={**self.clean_env(), **(env or {}), **marks}, cwd=self.root, umask=0o022,
                    stdin=subprocess.DEVNULL, stdout=err, stderr=err, start_new_session=True, timeout=timeout_s,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                raise self.failure(name, f"did not go to the background within {timeout_s:g} s") from None
        if rc:
            raise self.failure(name, f"ended at once with code {rc}")
        seen: list[proc.Process] = []

        def up() -> bool:
            process = self.process(name)
            if seen and process != seen[0]:
                raise self.failure(name, "died while starting")
            seen[:] = [process] if process else []
            return process is not None and ready()

        if not proc.wait_until(up, end - time.monotonic()):
            raise self.failure(name, f"was not ready within {timeout_s:g} s")

    def failure(self, daemon: str, what: str) -> LabError:
        """The error with the last words of that daemon; its standard error holds them when it never opened its log."""
        shown = []
        for log in (self.log(daemon), self.log(daemon).with_suffix(".err")):
            with suppress(OSError):
                lines = log.read_text(errors="replace").strip().splitlines()[-8:]
                if lines:
                    shown += [f"{log}:", *(f"  {line}" for line in lines)]
        return LabError("\n".join([f"lab in {self.root}: {daemon} {what}", *shown]))

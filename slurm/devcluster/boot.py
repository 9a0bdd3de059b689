"""Starting a lab's daemons, in their order, each until it answers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress

from jobs.core.errors import LabError
from slurm.devcluster import proc, slurm_conf
from slurm.devcluster.config_files import write_files
from slurm.devcluster.state_dir import LabDir

_UP_STATES = {"idle", "mixed", "allocated", "completing", "draining", "drained", "planned", "reserved"}


def boot(lab: LabDir) -> None:
    write_files(lab)
    _start_munged(lab)
    if lab.config.accounting:
        _start_database(lab)
    start_slurmctld(lab)
    for name in lab.config.node_names:
        start_slurmd(lab, name)
    wait_registered(lab, lab.config.node_names)


def _start_munged(lab: LabDir) -> None:
    munge = lab.root / "munge"
    lab.launch(
        "munged",
        # --force: munged refuses a socket below a folder that only its owner may enter (every home, every pytest
        # folder) and a group-writable parent. lab_host.prepare_root has refused what is really dangerous.
        "munged", "--force", f"--key-file={munge}/key", f"--socket={lab.root}/run/munge.sock",
        f"--pid-file={lab.pid_file('munged')}", f"--log-file={lab.log('munged')}", f"--seed-file={munge}/seed",
        "--num-threads=4",
        # In a user namespace files of root are nobody's, which munged takes for an attack.
        isolated=False,
        ready=(lab.root / "run" / "munge.sock").is_socket,
    )  # fmt: skip


def _start_database(lab: LabDir) -> None:
    data, db_socket = lab.root / "db" / "data", lab.root / "db" / "sock"
    as_root = ("--user=root",) if os.geteuid() == 0 else ()
    small = ("--innodb-log-file-size=8M", "--innodb-buffer-pool-size=64M")
    # A lab that loses its power has lost nothing, and on a busy disk the syncs take most of the start. "loose":
    # a version that has no such option any more goes on without it.
    unsynced = ("innodb-flush-method=nosync", "innodb-flush-log-at-trx-commit=0", "aria-sync-log-dir=NEVER")
    tuning = (*small, *(f"--loose-{option}" for option in (*unsynced, "sync-frm=0")))
    if not (data / "mysql").is_dir():
        shutil.rmtree(data, ignore_errors=True)  # an installation that was cut short
        lab.ask(
            "mariadb-install-db", "--no-defaults", *as_root, f"--datadir={data}", "--skip-test-db", *tuning,
            "--auth-root-authentication-method=normal", timeout_s=60,
        )  # fmt: skip
    lab.launch(
        "mariadbd",
        # No TCP at all, and the socket lies in a closed folder: its root account has no password.
        "mariadbd", "--no-defaults", *as_root, f"--datadir={data}", f"--socket={db_socket}", "--skip-networking",
        *tuning, "--innodb-lock-wait-timeout=900",
        f"--pid-file={lab.pid_file('mariadbd')}", f"--log-error={lab.log('mariadbd')}",
        daemonizes=False,
        timeout_s=30,
        ready=lambda: lab.answers("mariadb-admin", "--no-defaults", "-uroot", f"-S{db_socket}", "ping"),
    )  # fmt: skip
    lab.launch(
        "slurmdbd", "slurmdbd",
        # Where the client library looks for "localhost".
        env={"MYSQL_UNIX_PORT": str(db_socket)},
        timeout_s=30,
        ready=lambda: lab.answers("sacctmgr", "--noheader", "show", "cluster"),
    )  # fmt: skip
    known = lab.ask("sacctmgr", "--noheader", "--parsable2", "show", "cluster", "format=cluster").split()
    if slurm_conf.CLUSTER not in known:
        lab.ask("sacctmgr", "--immediate", "add", "cluster", slurm_conf.CLUSTER)


def start_slurmctld(lab: LabDir) -> None:
    lab.launch(
        "slurmctld", "slurmctld", "-f", str(lab.conf),
        ready=lambda: lab.answers("scontrol", "ping"),
    )  # fmt: skip


def start_slurmd(lab: LabDir, name: str) -> None:
    lab.launch(name, "slurmd", "-f", str(lab.conf), "-N", name, *lab.slurm.slurmd_options)


def wait_registered(lab: LabDir, names: Sequence[str], timeout_s: float = 25) -> None:
    states: dict[str, str] = {}

    def registered() -> bool:
        for daemon in ("slurmctld", *names):
            if not lab.process(daemon):
                raise lab.failure(daemon, "died")
        with suppress(LabError):
            states.update(lab.node_states())
        return all(states.get(name, "") in _UP_STATES for name in names)

    if not proc.wait_until(registered, timeout_s):
        name = next(name for name in names if states.get(name, "") not in _UP_STATES)
        state = states.get(name, "unknown to slurmctld")
        raise lab.failure(name, f"did not become usable within {timeout_s:g} s (its state: {state})")

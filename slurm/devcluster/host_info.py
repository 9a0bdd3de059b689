"""What a lab takes from the machine it runs on: a directory, a block of ports, host names of its own, GPUs, a user."""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import socket
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from jobs.core import trust
from jobs.core.errors import LabError
from slurm.devcluster import proc
from slurm.devcluster.slurm_conf import LabConfig

# Below the ports that Linux gives to outgoing connections, and below 20000, from where jobs take their MASTER_PORT.
_PORTS = range(11000, 20000)
# Files of a lab that its clients and daemons obey.
_CONFIGURATION = ("lab.json", "slurm.conf", "gres.conf", "cgroup.conf", "slurmdbd.conf", "hosts")
_SOCKET_PATH_LIMIT = 107  # bytes of sun_path, without its final NUL


def default_root() -> Path:
    """Where a lab lives when nobody says otherwise: one per user, with a path short enough for sockets."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    parent = runtime if runtime and os.access(runtime, os.W_OK | os.X_OK) else tempfile.gettempdir()
    return Path(parent) / f"holdfast-lab-{os.geteuid()}"


def search_path() -> str:
    # Daemons live in sbin, which the PATH of a plain user leaves out.
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def prepare_root(root: Path, config: LabConfig) -> Path:
    """The directory, made and resolved. Refuses, before making it, whatever would fail later or be unsafe."""
    asked_for = root.expanduser()
    root = asked_for.resolve()
    odd = sorted(set(re.findall(r"[^A-Za-z0-9._/+@-]", str(root))))
    if odd:
        raise LabError(f"{root}: slurm.conf cannot carry {' '.join(map(repr, odd))} in the path of a lab; choose another")
    # The longest of all: the socket of a batch script's slurmstepd, whose step has a ten-digit number.
    name = config.node_names[-1]
    longest = f"{root}/spool/{name}/{name}_99999999.4294967291"
    too_long = len(os.fsencode(longest)) - _SOCKET_PATH_LIMIT
    if too_long > 0:
        raise LabError(
            f"{root}: {too_long} characters too long for a lab, because the path of a Unix socket ends at"
            f" {_SOCKET_PATH_LIMIT}; choose a shorter directory, for example {default_root()}"
        )
    try:
        check_owner(asked_for)
        if root.exists() and any(root.iterdir()) and not ({"lab.json", "lab.lock"} & set(os.listdir(root))):
            raise LabError(f"{root}: has other things in it; a lab wants an empty directory, or one it can make")
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Without root's rights slurmd runs the jobs of everybody who can read slurm.conf and reach munged as its own user.
        trust.make_private_directory(root)
    except OSError as err:
        raise LabError(f"{root}: cannot be a lab's directory: {err.strerror}") from err
    return root


def check_owner(root: Path) -> None:
    """Check that no other user can have written what is in a lab's directory: slurm.conf names plug-ins, which every client loads.

    Nothing needs to exist. Raises LabError; OSError where it cannot be examined."""
    for path in dict.fromkeys((root.absolute(), root.resolve())):
        found = trust.find_parent_problem(path)
        if found:
            parent, problem = found
            raise LabError(f"{parent}: {problem}, who can replace the lab in {root}. Choose another directory, or: chmod go-w {parent}")
    with suppress(FileNotFoundError):
        if root.is_symlink() and os.lstat(root).st_uid not in (0, os.geteuid()):
            raise LabError(f"{root}: is a symbolic link of {trust.user_name(os.lstat(root).st_uid)}. Choose another directory.")
        _check(root.resolve(), "directory")
    for name in _CONFIGURATION:
        with suppress(FileNotFoundError):
            _check(root.resolve() / name, "file")
    for name in ("munge", "run"):
        with suppress(FileNotFoundError):
            _check(root.resolve() / name, "directory")


def _check(path: Path, kind: trust.Kind) -> None:
    problem = trust.find_problem(path, kind)
    if problem:
        raise LabError(f"{path}: {problem}, so it is not used as a part of a lab. Remove it, or choose another directory: holdfast lab start DIRECTORY")


@contextmanager
def exclusive(root: Path, timeout_s: float = 90) -> Iterator[None]:
    """One start or stop at a time in one directory. The kernel drops the lock if its holder dies."""
    if not root.is_dir():
        yield  # nothing there to start or stop
        return
    with open(root / "lab.lock", "w") as lock:

        def taken() -> bool:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        if not proc.wait_until(taken, timeout_s, 0.05):
            raise LabError(f"{root}: another start or stop has been at work for {timeout_s:g} s; see who holds lab.lock")
        yield


@contextmanager
def reserved_ports(root: Path, config: LabConfig, before: int | None) -> Iterator[int]:
    """The first port of a block that is free and stays ours while the daemons come up; `before` is tried first.

    Between the look and the daemons' own binding, a socket in Linux's abstract namespace stands for each port: it
    knows no files or owners, belongs to the same network as the ports do, and ends with us. Afterwards the bound
    ports speak for themselves, so there is nothing to release at stop."""
    if config.base_port is not None:
        candidates = [config.base_port]
    else:
        step = -(-config.num_ports // 20) * 20
        blocks = list(range(_PORTS.start, _PORTS.stop - step, step))
        first = zlib.crc32(os.fsencode(root)) % len(blocks)  # a directory comes back to its ports if it can
        candidates = blocks[first:] + blocks[:first]
        if before is not None:
            candidates.insert(0, before)
    for base in candidates:
        with ExitStack() as held:
            if all(_reserve(port, held) for port in range(base, base + config.num_ports)):
                yield base
                return
    if config.base_port is not None:
        last = config.base_port + config.num_ports - 1
        raise LabError(f"of the ports {config.base_port}-{last} on 127.0.0.1 at least one is in use; leave base_port out")
    raise LabError(f"no {config.num_ports} ports in a row are free on 127.0.0.1 in {_PORTS.start}-{_PORTS.stop}")


def _reserve(port: int, held: ExitStack) -> bool:
    claim = held.enter_context(socket.socket(socket.AF_UNIX))
    with socket.socket() as probe:
        # As Slurm does: a port whose last connections are still fading away is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            claim.bind(f"\0holdfast-lab-port-{port}")
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def isolate(how: str, hosts: Path) -> list[str]:
    """The command that runs another one with `hosts` in place of /etc/hosts, for it and its children only."""
    if how == "none":
        return []
    # slave: what is mounted on the machine later still shows up inside, and nothing of ours outside.
    unshare = ["unshare", "--mount", "--propagation", "slave"]
    drop = ""
    if how == "user":
        unshare += ["--user", "--map-current-user", "--keep-caps"]
        drop = "setpriv --inh-caps=-all --ambient-caps=-all "  # the mount is done; jobs get no powers they did not have
    return [*unshare, "sh", "-c", f'mount --bind "$0" /etc/hosts && exec {drop}"$@"', str(hosts)]


def pick_isolation() -> str:
    """The first way to give daemons their own host names that this machine allows, by trying it."""
    for how in ("mount", "user") if os.geteuid() == 0 else ("user",):
        trial = [*isolate(how, Path("/etc/hosts")), "true"]
        with suppress(OSError, subprocess.TimeoutExpired):
            if not subprocess.run(trial, timeout=5, stdin=subprocess.DEVNULL, capture_output=True).returncode:
                return how
    # Without it, Slurm binds what the machine itself thinks that its name means.
    host = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except OSError:
        address = "nothing"
    if not address.startswith("127."):
        raise LabError(
            f"a lab keeps to the loopback address, but here the host name {host} means {address} and no private"
            f" /etc/hosts can be mounted; run as root, or put '127.0.0.1 {host}' into /etc/hosts"
        )
    return "none"


def user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise LabError(f"Slurm needs a user with a name, and uid {os.geteuid()} has none (/etc/passwd)") from None


def short_host_name() -> str:
    return socket.gethostname().partition(".")[0]


def nvidia_devices() -> list[Path]:
    found = [p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[6:]))


def write(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    data = content.encode() if isinstance(content, str) else content
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)

"""Where the ranks of an attempt meet: an address that every node can reach, and a free port."""

import ipaddress
import socket
import zlib
from pathlib import Path

from jobs.core.contract import RENDEZVOUS_PORTS
from jobs.core.errors import SubmitError
from slurm.client import Slurm, parse_scontrol

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(run: Path, job_id: str, restarts: int) -> int:
    """A port that is free on this machine, as is the one after it (for the all-reduce before an attempt): the first such pair of a row
    that starts at a place of its own for each run, job and restart.

    The ranks take it seconds later, after their imports. So two jobs on one node must not look from the same place, also when
    they are jobs of two clusters, whose numbers both begin at 1; and a restarted job does not wait for its old port to time out.
    Ports that this machine hands out to whoever connects somewhere are left out: one may be taken between here and the ranks."""
    low, high = _ephemeral()
    pairs = RENDEZVOUS_PORTS[::2]
    ports = [port for port in pairs if port + 1 < low or port > high] or list(pairs)
    first = zlib.crc32(f"{run} {job_id} {restarts}".encode())
    for offset in range(min(500, len(ports))):
        port = ports[(first + offset) % len(ports)]
        if _is_free(port) and _is_free(port + 1):
            return port
    raise SubmitError(f"no free port for the rendezvous between {RENDEZVOUS_PORTS.start} and {RENDEZVOUS_PORTS.stop} on {socket.gethostname()}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _ephemeral() -> tuple[int, int]:
    try:
        low, high = _EPHEMERAL.read_text().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return 32768, 60999


def address_of(node: str, slurm: Slurm, others: bool = True) -> str:
    """A name or address of `node` that the others can reach: its name, else the NodeAddr that Slurm itself uses.

    A name that means the loopback address here (a line of many /etc/hosts) means another machine over there, so it is not
    taken when there are `others`, unless Slurm uses such an address for the node itself."""
    found = _resolve(node)
    if found and not (others and all(ipaddress.ip_address(address).is_loopback for address in found)):
        return node
    try:
        records = parse_scontrol(slurm.run("scontrol", "-o", "show", "node", node))
        address = records[0].get("NodeAddr", "") if records else ""
    except SubmitError:
        address = ""
    if found and (not address or address == node or _is_loopback(address)):
        return node
    if address and _resolve(address):
        return address
    return _own_address()


def _resolve(name: str) -> list[str]:
    try:
        return sorted({str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(name, None)})
    except OSError:
        return []


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _own_address() -> str:
    """The address of this machine's way out. Nothing is sent: a UDP socket that is connected only chooses its route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"

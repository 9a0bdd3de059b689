"""Where the ranks of an attempt meet: an address that every node can reach, and a free port."""

import socket

from jobs.contract import RENDEZVOUS_PORTS
from jobs.errors import SubmitError
from slurm.client import Slurm, parse_scontrol


def free_port(job_id: str, restarts: int) -> int:
    """A port that is free on this machine, the first of a row that starts at a place of its own for each job and restart.

    Two jobs on one node look for it from different places, and a restarted job does not wait for its old port to time out."""
    digits = int("".join(c for c in job_id if c.isdigit()) or "0")
    count = len(RENDEZVOUS_PORTS)
    first = (digits * 7 + restarts * 101) % count
    for offset in range(500):
        port = RENDEZVOUS_PORTS[(first + offset) % count]
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise SubmitError(f"no free port for the rendezvous between {RENDEZVOUS_PORTS.start} and {RENDEZVOUS_PORTS.stop} on {socket.gethostname()}")


def address_of(node: str, slurm: Slurm) -> str:
    """A name or address of `node` that resolves here: its name, else the NodeAddr that Slurm itself uses."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    try:
        records = parse_scontrol(slurm.run("scontrol", "-o", "show", "node", node))
        return records[0].get("NodeAddr", "127.0.0.1") if records else "127.0.0.1"
    except SubmitError:
        return socket.gethostbyname(socket.gethostname())

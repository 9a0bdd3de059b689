"""One process per node that runs `accelerate launch` for its ranks (LAUNCH=accelerate), and keeps the stop contract there.

    python -m train.distributed.accelerate_launcher --nodes N --per-node G [--config FILE] -- -m train --run-dir DIR

The launcher that comes with Accelerate takes a signal for the order to shut everything down, dies of those that it does not know,
and ends with 1 whatever its ranks said. So it runs in a thread, where it installs no handlers; the main thread hands signals
on to the ranks, once each, and leaves with the code of the rank that failed first.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from jobs.core.contract import STOP_SIGNALS, Exit, RankEnv
from jobs.rank.stop_flag import leave_marker, name_of
from jobs.run.rundir import RunDir

_POLL_S = 0.1
# Seconds after a stop in which ranks may still come into being; nothing has been trained before.
_PATIENCE_S = 5.0


def main() -> int:
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    # STOP_SIGNAL of a user script may be any of these.
    for number in (*STOP_SIGNALS, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, remember)
    parser = argparse.ArgumentParser(prog="python -m train.distributed.accelerate_launcher", description="The ranks of one node, by accelerate launch.")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--per-node", type=int, required=True)
    parser.add_argument("--peer-wait", type=int, required=True, help="seconds that other ranks may run on after one failed")
    parser.add_argument("--config", default=None, help="a file of `accelerate config`; left out, none is read")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    node = int(os.environ.get("SLURM_PROCID", "0"))
    words = launch_words(command, nodes=args.nodes, per_node=args.per_node, node=node, config=args.config, environ=os.environ)
    os.environ.update(environment_of(args.nodes * args.per_node, args.peer_wait))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(_launch(words)), name="accelerate", daemon=True)
    thread.start()
    told: set[int] = set()
    heard: float | None = None
    while thread.is_alive():
        thread.join(_POLL_S)
        if not asked:
            continue
        heard = heard or time.monotonic()
        ranks = set(_ranks_below(os.getpid()))
        for pid in ranks - told:
            _tell(pid, asked[0])
        told |= ranks
        if not told and time.monotonic() - heard > _PATIENCE_S:
            _leave(args.per_node, node, asked[0])
    return codes[0] if codes else Exit.FAILED


def launch_words(command: Sequence[str], *, nodes: int, per_node: int, node: int, config: str | None, environ: Any) -> list[str]:
    """The words behind `accelerate launch` for one node. With a config file it says how the ranks work together."""
    words = ["--num_machines", str(nodes), "--num_processes", str(nodes * per_node), "--machine_rank", str(node), "--max_restarts", "0"]
    words += ["--main_process_ip", environ[RankEnv.MASTER_ADDR], "--main_process_port", environ[RankEnv.MASTER_PORT]]
    if config is not None:
        words += ["--config_file", config]
    else:
        words += ["--mixed_precision", "no", "--dynamo_backend", "no"] + (["--multi_gpu"] if nodes * per_node > 1 else [])
    if command[:1] == ["-m"]:
        return [*words, "--module", *command[1:]]
    return [*words, *command]


def environment_of(world: int, peer_wait_s: int) -> dict[str, str]:
    """What the launcher needs to know beside its words."""
    # When one rank has failed, the others have this long.
    values = {"PET_SHUTDOWN_TIMEOUT": str(peer_wait_s), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(peer_wait_s)}
    if world == 1:
        # One process is started without a rendezvous, and is told nothing.
        values |= {RankEnv.RANK: "0", RankEnv.WORLD_SIZE: "1", RankEnv.LOCAL_RANK: "0", RankEnv.LOCAL_WORLD_SIZE: "1"}
    return values


def _launch(words: list[str]) -> int:
    """Runs the launcher to its end. Returns the exit code, of the rank that failed first where one did; 128 + n for a signal."""
    import torch
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not torch.cuda.is_available():
        # The launcher has no word for several processes on the CPU of several machines; this variable does it.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    # It warns that it handles no signals here, which is the point.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.ERROR)
    # What a person once answered to `accelerate config` on this machine must not change a job.
    launch.default_config_file = os.devnull
    try:
        launch.launch_command(launch.launch_command_parser().parse_args(words))
    except ChildFailedError as err:
        rank, failure = err.get_first_failure()
        print(f"rank {rank} left with {failure.exitcode}", file=sys.stderr, flush=True)
        return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
    except subprocess.CalledProcessError as err:
        return 128 - err.returncode if err.returncode < 0 else err.returncode
    except SystemExit as err:
        return err.code if isinstance(err.code, int) else int(err.code is not None)
    except BaseException:
        traceback.print_exc()
        return Exit.FAILED
    return Exit.DONE


def _ranks_below(parent: int) -> Iterator[int]:
    """Processes of this one that are ranks: each has its number in its environment."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (
                int((place / "stat").read_text().rpartition(")")[2].split()[1]) == parent
                and f"\0{RankEnv.RANK}=".encode() in b"\0" + (place / "environ").read_bytes()
            ):
                yield int(place.name)
        except (OSError, IndexError, ValueError):
            continue


def _tell(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _leave(per_node: int, node: int, number: int) -> None:
    print(f"stopped by {name_of(number)} before there were any ranks; nothing is lost", flush=True)
    attempt = RunDir(Path(os.environ[RankEnv.RUN_DIR])).attempt(int(os.environ[RankEnv.ATTEMPT]))
    for rank in range(node * per_node, (node + 1) * per_node):
        leave_marker(attempt, rank, reason="stopped", step=None, signal=name_of(number))
    os._exit(Exit.REQUEUE)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

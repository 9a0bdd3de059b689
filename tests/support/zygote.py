"""A process that has imported torch and training once, and forks ranks from that state: an attempt starts in 0.2 s, not in 4.

Requests and answers are lines of JSON on stdin and stdout: {"spawn": {...}} -> pid, {"poll": pid} -> exit code or null.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path


def main() -> None:
    support = Path(__file__).resolve().parent
    sys.path[:0] = [str(place) for place in (support.parents[1], support.parent, support, support / "models")]
    import train.__main__
    from jobs.core.gc_pause import without_collections

    with without_collections():
        # The first two are what training imports by its first step and first line: a second of each rank.
        import torch._dynamo
        import torch.utils.tensorboard  # noqa: F401

        import train.startup

    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if pid not in ended:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = ended.get(pid)
        else:
            answer = os.fork()
            if answer == 0:
                code = 1
                try:
                    become(request["spawn"])
                    code = train.__main__.main()
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
        print(json.dumps(answer), flush=True)


def become(spawn: dict) -> None:
    os.setsid()
    os.environ.update(spawn["env"])
    os.chdir(spawn["cwd"])
    log = os.open(spawn["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["train"]
    signal.set_wakeup_fd(-1)
    if spawn.get("before"):
        # A fault to prepare inside the process: the name of a function of disk_faults.py.
        import disk_faults

        getattr(disk_faults, spawn["before"])()


if __name__ == "__main__":
    main()

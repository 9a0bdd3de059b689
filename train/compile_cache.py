"""What torch.compile made, kept in the run's folder: a requeued attempt on another node does not compile again.

torch keeps its own caches in the node's temporary folder, where they are quick and where the next attempt may not be. Rank 0 writes
all that the first step made into one file (shared file systems dislike thousands of small ones), and every rank of a later attempt
puts it into the cache of its node before it compiles. Kernels of ours are kept by Triton in the home folder.
A file that does not fit, or that another user wrote, costs a compilation and never an attempt.
"""

import os
import re
from collections.abc import Callable

import torch

from jobs.rundir import RunDir
from jobs.settings import Job
from jobs.whole_file import replace_file
from train.runtime import Runtime


class CompileCache:
    """`load` before the model is built, `keep` after the first step and after the first validation. Does nothing where COMPILE is false."""

    def __init__(self, job: Job, run: RunDir, rt: Runtime, say: Callable[[str], None]):
        device = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else "CPU"
        self._path = run.compiled(re.sub(r"[^\w.+-]+", "-", f"torch-{torch.__version__}-{device}"))
        self._wanted, self._writes, self._say = job.compile, rt.is_main, say
        self._known: set[tuple[str, str]] = set()
        self._found = False

    def load(self) -> None:
        if not self._wanted or not self._path.exists():
            return
        try:
            # What is in there is loaded as code.
            if self._path.stat().st_uid != os.getuid():
                self._say(f"  WARNING: {self._path} belongs to another user and is not read; everything is compiled anew")
                return
            info = torch.compiler.load_cache_artifacts(self._path.read_bytes())
        except Exception as err:  # a file of another version of torch can fail in any way
            self._say(f"  WARNING: {self._path} cannot be used ({err}); everything is compiled anew")
            return
        if info is None:
            self._say(f"  WARNING: {self._path} is damaged; everything is compiled anew")
            return
        self._found, self._known = True, _names(info)
        self._say(f"  {len(self._known)} compiled parts of an earlier attempt loaded")

    def keep(self, *, validated: bool) -> None:
        """Writes the file, at most once: torch forgets what it gave away when it is asked again (torch 2.11 to 2.13).

        The first attempt does so after its first step, so that the file is there whatever comes; one that found a file does after its first
        validation, when there is more to keep."""
        if not self._wanted or not self._writes or validated != self._found:
            return
        self._wanted = False
        try:
            made = torch.compiler.save_cache_artifacts()
            if made is None or _names(made[1]) <= self._known:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, made[0], flush=False)
        except Exception as err:  # no attempt ends for a cache: a full disk, or a fault of torch's
            self._say(f"  WARNING: what was compiled could not be kept: {err}")


def _names(info: "torch.compiler._cache.CacheInfo") -> set[tuple[str, str]]:
    return {(kind, key) for kind, keys in info.artifacts.items() for key in keys}

"""What torch.compile made, kept in the run's folder: a requeued attempt on another node does not compile again.

torch keeps its own caches in the node's temporary folder (train/compilation/cache_directory.py), where they are quick and where the next attempt may not be. Rank 0 writes
all that the first step made into one file (shared file systems dislike thousands of small ones), and every rank of a later attempt
puts it into the cache of its node before it compiles. Kernels that are not torch's are a second file (train/compilation/kernel_cache.py).
A file that does not fit, or that another user wrote, costs a compilation and never an attempt.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from jobs.config.settings import Job
from jobs.core import safe_read, trust
from jobs.core.atomic_write import replace_file
from jobs.run.rundir import RunDir
from train.compilation.cache_directory import use_private_caches
from train.compilation.kernel_cache import KernelCache
from train.distributed.runtime import Distributed

# Of torch's artifacts, which are some 10 MB for each compiled part.
_MOST_BYTES = 8 * 2**30


class CompileCache:
    """`load` before the model is built, `keep` after the first step and after the first validation. Does nothing where COMPILE is false."""

    def __init__(self, job: Job, run: RunDir, rt: Distributed, say: Callable[[str], None]):
        device = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else "CPU"
        key = re.sub(r"[^\w.+-]+", "-", f"torch-{torch.__version__}-{device}")
        self._path, self._kernels_path = run.compiled(key), run.compiled_kernels(key)
        self._wanted, self._writes, self._say = job.compile, rt.is_main, say
        self._known: set[tuple[str, str]] = set()
        self._found = False
        self._kernels: KernelCache | None = None
        use_private_caches(say)
        if self._wanted and rt.device.type == "cuda":
            with suppress(ImportError):  # a torch that has it elsewhere
                from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

                # Where torch would put it anyway with the first kernel of its own; kernels that come before that lie there too.
                folder = os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(rt.device.index or 0))
                self._kernels = KernelCache(self._kernels_path, Path(folder))

    def load(self) -> None:
        if self._wanted and self._may_be_read(self._path):
            self._load_compiled()
        if self._kernels is not None and self._may_be_read(self._kernels_path):
            try:
                self._say(f"  {self._kernels.load()} kernels of an earlier attempt loaded")
            except Exception as err:  # damage has many forms, all of which are told the same way
                self._say(f"  WARNING: {self._kernels_path} cannot be used ({err}); kernels are compiled anew")

    def _may_be_read(self, path: Path) -> bool:
        """Whether it is there and nobody else can write it: what is in it is run."""
        try:
            problem = trust.find_problem(path.parent, "directory") or trust.find_problem(path, "file")
        except OSError:
            return False
        if problem:
            self._say(f"  WARNING: {path} belongs to another user or can be changed by one ({problem}), and is not read; everything is compiled anew")
        return not problem

    def _load_compiled(self) -> None:
        try:
            info = torch.compiler.load_cache_artifacts(safe_read.read_bytes(self._path, _MOST_BYTES))
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
        validation, when there is more to keep. Kernels are written whenever there are new ones."""
        if not self._writes:
            return
        if self._kernels is not None:
            try:
                self._kernels.keep()
            except Exception as err:  # as below
                self._kernels = None
                self._say(f"  WARNING: kernels could not be kept: {err}")
        if not self._wanted or validated != self._found:
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

"""Two attempts that compile, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

_ATTEMPT = """
import os
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from torch._dynamo.utils import counters
from jobs.run.rundir import RunDir
from jobs.config.settings import Job
from train.compilation.compile_cache import CompileCache

rt = SimpleNamespace(device=torch.device(sys.argv[2]), is_main=True)
cache = CompileCache(Job(job_name="t", compile=True), RunDir(Path(sys.argv[1])), rt, print)
cache.load()
print(float(torch.compile(lambda x: (x.sin() * 2).sum())(torch.ones(8, device=rt.device))))
if sys.argv[2] == "cuda":
    from train.kernels.swiglu import swiglu_forward

    def cubins():
        return {(path, path.stat().st_ino) for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("_forward.cubin")}

    before = cubins()
    swiglu_forward(torch.ones(4, 64, device=rt.device, dtype=torch.bfloat16))
    print("kernels compiled:", len(cubins() - before))
cache.keep(validated=False)
cache.keep(validated=True)
print("hits", counters["inductor"]["fxgraph_cache_hit"], "misses", counters["inductor"]["fxgraph_cache_miss"])
"""


def two_attempts(tmp_path: Path, device: str) -> list[str]:
    """What each printed. Each has a node of its own: a temporary folder without caches."""
    found = []
    for attempt in ("1", "2"):
        # torch sets it in a process that has compiled.
        outside = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
        env = {**outside, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / attempt)}
        done = subprocess.run([sys.executable, "-c", _ATTEMPT, str(tmp_path), device], env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(done.stdout)
    return found

"""`holdfast lab`: the private cluster from the command line."""

import shlex
from dataclasses import replace
from pathlib import Path

from jobs.core.contract import Exit
from jobs.core.errors import LabError
from slurm.devcluster import lab
from slurm.devcluster.host_info import nvidia_devices


def start(directory: Path | None, *, nodes: int, grace: int, accounting: bool, preempt_mode: str, real_gpus: bool) -> None:
    missing = lab.missing_programs(accounting=accounting)
    if missing:
        raise LabError(f"the lab needs {', '.join(missing)}, not on this machine. {lab.how_to_install()}")
    root = directory or lab.default_root()
    config = lab.LabConfig(nodes=nodes, grace_s=grace, accounting=accounting, preempt_mode=preempt_mode)
    if real_gpus:
        count = len(nvidia_devices())
        if count < nodes:
            raise LabError(f"--real-gpus deals this machine's {count} NVIDIA GPUs out to {nodes} nodes; ask for fewer with --nodes.")
        config = replace(config, real_gpus=True, gpus=count // nodes)
    here = lab.start(root, config)
    print(here.status().describe())
    print(f'use it in this shell:  eval "$(holdfast lab env{f" {shlex.quote(str(directory))}" if directory else ""})"')


def stop(directory: Path | None) -> None:
    root = directory or lab.default_root()
    here = lab.load(root)
    if here is None:
        print(f"no lab runs in {root}")
        return
    here.stop()
    print(f"lab in {root} stopped")


def status(directory: Path | None) -> int:
    root = directory or lab.default_root()
    here = lab.load(root)
    if here is None:
        print(f"no lab runs in {root}; holdfast lab start boots one")
        return Exit.FAILED
    print(here.status().describe())
    return Exit.DONE


def env(directory: Path | None) -> None:
    root = directory or lab.default_root()
    here = lab.load(root)
    if here is None:
        raise LabError(f"no lab runs in {root}; holdfast lab start boots one")
    for name, value in {**here.env(), "HOLDFAST_SITE": "lab"}.items():
        print(f"export {name}={shlex.quote(value)}")

"""What a lab has in its directory before anything runs: folders, keys, the configuration, stand-in GPUs."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict
from pathlib import Path

from jobs.core.errors import LabError
from slurm.devcluster import host_info, slurm_conf
from slurm.devcluster.state_dir import LabDir


def write_files(lab: LabDir) -> None:
    root, config = lab.root, lab.config
    # A user who can reach munged's socket and read slurm.conf can have slurmd execute commands as its owner, so the root is private.
    for name, mode in {"": 0o700, "run": 0o755, "log": 0o755, "state": 0o700, "spool": 0o755, "dev": 0o755}.items():
        (root / name).mkdir(exist_ok=True)
        (root / name).chmod(mode)
    for name in ("munge", "db"):
        (root / name).mkdir(mode=0o700, exist_ok=True)
    for name in config.node_names:
        (root / "spool" / name).mkdir(mode=0o755, exist_ok=True)
    key = root / "munge" / "key"
    if not key.exists():
        host_info.write(key, os.urandom(128), 0o600)

    user, host = host_info.user_name(), host_info.short_host_name()
    system_hosts = Path("/etc/hosts")
    host_names = (socket.gethostname(), host)
    known = system_hosts.read_text(errors="replace") if system_hosts.exists() else ""
    host_info.write(root / "hosts", slurm_conf.hosts(known, host_names, config.node_names))
    host_info.write(lab.conf, slurm_conf.slurm_conf(config, root, lab.base_port, user, host, lab.slurm.plugins))
    host_info.write(root / "gres.conf", slurm_conf.gres_conf(config, root))
    host_info.write(root / "cgroup.conf", slurm_conf.cgroup_conf(config, lab.slurm.can_do_without_cgroups))
    if config.accounting:
        # slurmdbd refuses a file that others may read.
        host_info.write(root / "slurmdbd.conf", slurm_conf.slurmdbd_conf(root, lab.base_port, user), 0o600)
    _make_gpus(lab)
    # A node that was down when the lab was last stopped begins anew; jobs and their ids are kept.
    for old in ("node_state", "node_state.old"):
        (root / "state" / old).unlink(missing_ok=True)
    host_info.write(root / "lab.json", json.dumps({**asdict(lab), "root": str(root)}, indent=1) + "\n")


def _make_gpus(lab: LabDir) -> None:
    config, dev = lab.config, lab.root / "dev"
    for old in dev.iterdir():
        old.unlink()
    if config.real_gpus:
        devices, wanted = host_info.nvidia_devices(), config.nodes * config.gpus
        if wanted > len(devices):
            raise LabError(
                f"{config.nodes} nodes with {config.gpus} real GPUs each need {wanted},"
                f" this machine has {len(devices)}; ask for fewer nodes or GPUs, or leave real_gpus off"
            )
        devices = devices[:wanted]
    else:
        # A device it must be: for a plain file Slurm schedules the GPU, but leaves CUDA_VISIBLE_DEVICES unset.
        devices = [Path("/dev/null")] * config.gpus
    # By link, so that the numbers count from 0 as CUDA's do: a container may hold /dev/nvidia3 and no other. And
    # nobody needs the right to make devices.
    for i, device in enumerate(devices):
        (dev / f"gpu{i}").symlink_to(device)

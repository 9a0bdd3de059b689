"""`holdfast init`: what Slurm says of a cluster becomes a site file that is right. The lab's words are real; GPUs of several kinds,
limits and accounts are recorded text in the forms that scontrol(1) and sacctmgr(1) have for them."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, Cluster

from jobs.config.resolver import resolve
from jobs.core.errors import SettingError
from launcher.cluster.init import choose, site_text
from slurm import site_file
from slurm.discovery import Cluster as Found
from slurm.discovery import Gpus, arch_of, described, parse_accounts, parse_gres

CONFIG = {"ClusterName": "alps", "SLURM_VERSION": "24.05.4", "SelectType": "select/cons_tres"}
PARTITIONS = """\
PartitionName=debug AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES QoS=N/A DefaultTime=00:30:00 GraceTime=0 MaxTime=02:00:00 Nodes=c[1-2] PreemptMode=OFF State=UP TotalCPUs=128 TotalNodes=2
PartitionName=preempt AllowGroups=ALL AllowAccounts=research,physics AllowQos=ALL Default=NO QoS=N/A DefaultTime=NONE GraceTime=120 MaxTime=2-00:00:00 Nodes=g[001-003],a7 PreemptMode=GANG,REQUEUE State=UP TotalCPUs=800 TotalNodes=4
PartitionName=empty AllowAccounts=ALL AllowQos=ALL Default=NO GraceTime=0 MaxTime=UNLIMITED Nodes=(null) PreemptMode=OFF State=INACTIVE TotalCPUs=0 TotalNodes=0
"""
NODES = """\
NodeName=c1 Arch=x86_64 CPUTot=64 Gres=(null) OS=Linux 5.14.0-427 #1 SMP PREEMPT_DYNAMIC RealMemory=256000 Partitions=debug
NodeName=c2 Arch=x86_64 CPUTot=64 Gres=(null) OS=Linux 5.14.0-427 #1 SMP PREEMPT_DYNAMIC RealMemory=250000 Partitions=debug
NodeName=g001 CPUTot=192 Gres=gpu:h100:8(S:0-1) OS=Linux 5.14.0 #1 SMP RealMemory=2063000 Partitions=preempt
NodeName=g002 CPUTot=192 Gres=gpu:h100:8(S:0-1),nvme:1 OS=Linux 5.14.0 #1 SMP RealMemory=2063000 Partitions=preempt
NodeName=g003 CPUTot=224 Gres=gpu:h100:8(S:0-1) OS=Linux 5.14.0 #1 SMP RealMemory=2063000 Partitions=preempt
NodeName=a7 CPUTot=128 Gres=gpu:a100:4(S:0-1) OS=Linux 5.14.0 #1 SMP RealMemory=1031000 Partitions=preempt
"""
ACCOUNTS = "research||normal,high|normal\nphysics|preempt|low|\nteaching||normal|normal\n"


@pytest.fixture
def alps() -> Found:
    return described(CONFIG, PARTITIONS, NODES, ACCOUNTS, "research")


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("gpu:h100:8(S:0-1)", [Gpus(8, "h100")]),
        ("gpu:8", [Gpus(8)]),
        ("gpu:nvidia_h100_80gb_hbm3:8(S:0-1),nvme:1", [Gpus(8, "nvidia_h100_80gb_hbm3")]),
        ("gpu:a100:4(S:0),gpu:a100_3g.20gb:2(S:1)", [Gpus(4, "a100"), Gpus(2, "a100_3g.20gb")]),
        ("craynetwork:4,gpu:4", [Gpus(4)]),
        ("(null)", []),
        ("", []),
        ("shard:h100:32,mps:800", []),
    ],
)
def test_gpus_of_a_node_are_read_in_every_form(text: str, gpus: list[Gpus]) -> None:
    assert parse_gres(text) == gpus


@pytest.mark.parametrize(
    ("kind", "arch"),
    [
        ("h100", "sm_90"), ("H100-80GB", "sm_90"), ("nvidia_h200", "sm_90"), ("gh200", "sm_90"), ("nvidia_a100-sxm4-80gb", "sm_80"), ("a100_3g.20gb", "sm_80"), ("a10", "sm_86"), ("a6000", "sm_86"),
        ("rtx_4090", "sm_89"), ("l40s", "sm_89"), ("v100", "sm_70"), ("tesla_t4", "sm_75"), ("b200", "sm_100"), ("gb200", "sm_100"), ("mi250x", None), ("gpu", None), ("", None), ("large1000", None),
    ],
)  # fmt: skip
def test_the_compute_capability_is_named_only_where_it_is_certain(kind: str, arch: str | None) -> None:
    assert arch_of(kind) == arch


def test_partitions_have_the_facts_of_their_most_common_nodes(alps: Found) -> None:
    assert [partition.name for partition in alps.partitions] == ["debug", "preempt"], "an inactive one is no choice"
    debug, preempt = alps.partitions
    assert (debug.gpus, debug.cpus, debug.memory_gb, debug.is_default, debug.max_time) == (Gpus(0), 64, 244, True, "02:00:00")
    assert (preempt.gpus, preempt.other_gpus, preempt.cpus, preempt.memory_gb) == (Gpus(8, "h100"), (Gpus(4, "a100"),), 192, 2014)
    assert preempt.in_words() == "4 nodes with 8 h100 or 4 a100 each, at most 2-00:00:00, gives way (REQUEUE, 120 s of grace)"
    assert alps.gpu_request == "gpus-per-node"
    assert described({**CONFIG, "SelectType": "select/cons_res"}, PARTITIONS, NODES, "", "").gpu_request == "gres"


def test_accounts_are_read_and_their_absence_is_no_error(alps: Found) -> None:
    assert alps.accounts == {"research": ("normal", "high"), "physics": ("low",), "teaching": ("normal",)}
    assert parse_accounts("You are not running a supported accounting_storage plugin\n") == {}


def test_the_obvious_choice_is_the_partition_with_gpus_and_the_default_account(alps: Found) -> None:
    assert choose(alps, {}, None, takes_defaults=True) == {"partition": "preempt", "account": "research", "qos": ""}
    assert choose(alps, {"partition": "debug", "account": "teaching", "qos": "normal"}, None, takes_defaults=False) == {
        "partition": "debug",
        "account": "teaching",
        "qos": "normal",
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "say PARTITION=preempt"),
        ({"partition": "preempt"}, "say ACCOUNT=research"),
        ({"partition": "prempt"}, "Did you mean 'preempt'"),
        ({"partition": "preempt", "account": "teaching"}, "choose one of research, physics"),
        ({"partition": "preempt", "account": "physics", "qos": "high"}, "choose one of low"),
    ],
)
def test_without_a_terminal_what_is_open_or_wrong_is_said(alps: Found, given: dict[str, str], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        choose(alps, given, None, takes_defaults=False)


def test_a_remark_that_loses_its_hash_is_the_setting_alone(alps: Found) -> None:
    partition = alps.partition("preempt")
    assert partition
    text = site_text(alps, partition, {"partition": "preempt", "account": "research", "qos": ""}, date(2026, 11, 24))
    taken = [line.removeprefix("# ") for line in text.splitlines() if line.startswith(("# setup_script", "# time_limit", "# mem_gb"))]
    assert yaml.safe_load("\n".join(taken)) == {"setup_script": "/shared/env.sh", "time_limit": "2-00:00:00", "mem_gb": 2014}, taken


@pytest.mark.parametrize("name", ["preempt", "debug"])
def test_the_file_resolves_to_what_was_found(alps: Found, name: str, tmp_path: Path) -> None:
    partition = alps.partition(name)
    assert partition
    path = tmp_path / "site.yaml"
    path.write_text(site_text(alps, partition, {"partition": name, "account": "research", "qos": ""}, date(2026, 11, 24)))
    job = resolve(["NODES=1", "GPUS_PER_NODE=4", f"SITE={path}"], {}, REPOSITORY, lambda word: site_file.find(word, REPOSITORY)).job
    assert (job.partition, job.account, job.qos) == (name, "research", None)
    values = yaml.safe_load(path.read_text())
    if name == "preempt":
        assert (job.gpu_request, job.gpu_type, job.gpu_arch, job.cpus_per_gpu, values["gpus_per_node"]) == ("gpus-per-node", "h100", "sm_90", 24, 8)
        assert "# some nodes have 4 a100 instead" in path.read_text() and "# time_limit: 2-00:00:00  # the most" in path.read_text()
    else:
        assert (job.gpu_request, job.device) == ("none", "cpu") and "gpus_per_node" not in values
    # What stands behind a # can be uncommented as it is.
    bare = "\n".join(
        line.removeprefix("# ") if line.startswith("# ") and line[2:].partition(":")[0] in type(job).model_fields else line
        for line in path.read_text().splitlines()
    )
    path.write_text(bare.replace("[cuda/13.0]", "[]"))
    resolve(["NODES=1", "GPUS_PER_NODE=4", f"SITE={path}"], {}, REPOSITORY, lambda word: site_file.find(word, REPOSITORY))
    assert len(yaml.safe_load(bare)) > len(values) + 4


def test_odd_names_are_written_so_that_they_come_back(alps: Found, tmp_path: Path) -> None:
    partition = alps.partition("debug")
    assert partition
    for odd in ("no", "1e3", "a b", "it's: #1", "0123", "on"):
        path = tmp_path / "site.yaml"
        path.write_text(site_text(alps, partition, {"partition": odd, "account": odd, "qos": odd}, date(2026, 11, 24)))
        job = resolve(["NODES=1", "GPUS_PER_NODE=1", f"SITE={path}"], {}, REPOSITORY, lambda word: site_file.find(word, REPOSITORY)).job
        assert (job.partition, job.account, job.qos) == (odd, odd, odd)


@pytest.mark.slurm
def test_on_the_lab_the_file_is_right_and_a_job_runs_with_it(cluster: Cluster, tmp_path: Path) -> None:
    def init(*words: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in cluster.env.items() if name not in ("HOLDFAST_SITE", "RUNS_DIR")}
        return subprocess.run(
            [sys.executable, "-m", "launcher.cli.app", "init", *words],
            cwd=tmp_path,
            env={**env, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = init()
    assert done.returncode == 2 and "say PARTITION=low (or high)" in done.stderr and not any(tmp_path.iterdir())
    done = init("--yes", "--json", "sites/mine.yaml")
    answer = json.loads(done.stdout)
    assert answer["chosen"] == {"partition": "low", "account": "", "qos": ""} and "to start at" in answer["slurm_says"], answer
    written = (tmp_path / "sites/mine.yaml").read_text()
    assert yaml.safe_load(written) == {
        "partition": "low",
        "gpu_request": "gpus-per-node",
        "gpu_type": "h100",
        "gpus_per_node": 8,
        "cpus_per_gpu": 2,
        "device": "cpu",
        "mem_gb": 4,
    }
    refused = init("PARTITION=high", "sites/mine.yaml")
    assert refused.returncode == 2 and "--force" in refused.stderr and (tmp_path / "sites/mine.yaml").read_text() == written
    done = init("PARTITION=high", "--force", "sites/mine.yaml")
    assert done.returncode == 0 and "use it with: SITE=sites/mine.yaml" in done.stdout, done.stderr
    assert yaml.safe_load((tmp_path / "sites/mine.yaml").read_text())["partition"] == "high"
    assert [path.name for path in (tmp_path / "sites").iterdir()] == ["mine.yaml"]
    assert init("MODULES=x").returncode == 2
    words = [
        "ENTRY=tests/support/scripts/helped_script.py",
        "ENTRY_ARGS=5,5,0",
        "NODES=1",
        "GPUS_PER_NODE=1",
        f"SITE={tmp_path}/sites/mine.yaml",
        f"RUNS_DIR={cluster.runs}",
    ]
    done = cluster.holdfast("submit", "--wait", *words)
    assert "PARTITION=high" in done.stdout and "DEVICE=cpu" in done.stdout


@pytest.mark.slurm
def test_at_a_terminal_it_asks_and_asks_again(cluster: Cluster, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli.app", "init"],
        cwd=tmp_path,
        env={**cluster.env, "PYTHONPATH": str(REPOSITORY), "TERM": "dumb"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    os.write(master, b"hihg\nhigh\n")
    assert process.wait(120) == 0
    said = b"".join(read_all(master)).decode()
    assert "partition (low, high) [low]:" in said and "'hihg' is not one of them" in said
    assert yaml.safe_load((tmp_path / "site.yaml").read_text())["partition"] == "high"


def read_all(fd: int) -> Iterator[bytes]:
    while True:
        try:
            data = os.read(fd, 4096)
        except OSError:
            return
        if not data:
            return
        yield data

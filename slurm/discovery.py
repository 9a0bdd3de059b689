"""What a cluster has, from what Slurm says of itself: partitions, their limits and GPUs, accounts. Text in, typed values out."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.core.errors import SubmitError
from slurm.client import Slurm, expand_nodelist, parse_scontrol

# Compute capability by what a site may call its GPUs (gpu:a100, gpu:nvidia_h100_80gb_hbm3). A name that is not here is left
# open: a wrong one would refuse jobs that could run.
_ARCHS = (
    (r"g?b300", "sm_103"), (r"g?b200|b100", "sm_100"), (r"gh200|h[128]00", "sm_90"), (r"l40s?|l4|rtx_?(?:6000_?ada|40[6-9]0)|rtx_?[45]000_?ada", "sm_89"),
    (r"a100|a30|a800", "sm_80"), (r"a40|a16|a10g?|a2|rtx_?a[2456]000|a[2456]000|rtx_?30[6-9]0", "sm_86"), (r"t4|rtx_?[68]000|rtx_?20[6-8]0", "sm_75"), (r"v100s?", "sm_70"), (r"p100", "sm_60"),
)  # fmt: skip


@dataclass(frozen=True)
class Gpus:
    """GPUs of a node: how many, and the type in the site's own word ("" where Slurm knows none)."""

    count: int
    kind: str = ""


@dataclass(frozen=True)
class Partition:
    """One partition. Limits as Slurm prints them; counts are those of its most common kind of node."""

    name: str
    is_default: bool
    nodes: int
    max_time: str
    default_time: str
    preempt_mode: str
    grace_s: int
    gpus: Gpus
    other_gpus: tuple[Gpus, ...]
    cpus: int
    memory_gb: int
    accounts: tuple[str, ...]
    qos: tuple[str, ...]

    @property
    def all_gpus(self) -> int:
        return self.nodes * self.gpus.count

    def in_words(self) -> str:
        """4 nodes with 8 h100 each, at most 1-00:00:00, gives way (REQUEUE, 30 s of grace)."""
        kinds = " or ".join(f"{gpus.count} {gpus.kind or 'GPUs'}" for gpus in (self.gpus, *self.other_gpus) if gpus.count)
        parts = [f"{self.nodes} node{'s' if self.nodes != 1 else ''} with {f'{kinds} each' if kinds else f'{self.cpus} cores and no GPU'}"]
        parts.append("no time limit" if self.max_time in ("UNLIMITED", "") else f"at most {self.max_time}")
        if self.preempt_mode not in ("OFF", ""):
            parts.append(f"gives way ({self.preempt_mode}{f', {self.grace_s} s of grace' if self.grace_s else ', no grace'})")
        return ", ".join(parts)


@dataclass(frozen=True)
class Cluster:
    """What was found. `accounts` is account -> its QOS; empty without accounting."""

    name: str
    version: str
    partitions: tuple[Partition, ...]
    accounts: Mapping[str, tuple[str, ...]]
    default_account: str
    gpu_request: str

    def partition(self, name: str) -> Partition | None:
        return next((found for found in self.partitions if found.name == name), None)


def discover(slurm: Slurm, user: str) -> Cluster:
    """Asks Slurm. Raises SubmitError when slurmctld does not answer; an accounting that is missing is no error."""
    config = slurm.config()
    partitions = slurm.run("scontrol", "-o", "show", "partition")
    nodes = slurm.run("scontrol", "-o", "show", "node")
    try:
        accounts = slurm.run("sacctmgr", "-n", "-P", "show", "assoc", "where", f"user={user}", "format=Account,Partition,QOS,DefaultQOS")
        default = slurm.run("sacctmgr", "-n", "-P", "show", "user", user, "format=DefaultAccount").strip()
    except SubmitError:
        accounts = default = ""
    return described(config, partitions, nodes, accounts, default)


def described(config: Mapping[str, str], partitions: str, nodes: str, accounts: str, default_account: str) -> Cluster:
    """The same from text: `scontrol show config` as key -> value, the records of partitions and nodes, the rows of sacctmgr."""
    machines = {record["NodeName"]: record for record in parse_scontrol(nodes) if "NodeName" in record}
    found = tuple(
        _partition(record, machines) for record in parse_scontrol(partitions) if "PartitionName" in record and record.get("State", "UP") != "INACTIVE"
    )
    known = parse_accounts(accounts)
    select = config.get("SelectType", "")
    # --gpus-per-node belongs to cons_tres; the older selection plugins know --gres only.
    request = "none" if not any(partition.gpus.count for partition in found) else "gpus-per-node" if "cons_tres" in select else "gres"
    return Cluster(config.get("ClusterName", ""), config.get("SLURM_VERSION", ""), found, known, default_account if default_account in known else "", request)


def parse_gres(text: str) -> list[Gpus]:
    """GPUs in a node's Gres: gpu:h100:8(S:0-1), gpu:8, gpu:a100:4(S:0),gpu:a100_3g.20gb:2, (null)."""
    found = []
    for name, kind, count in re.findall(r"(?:^|,)(\w+)(?::([^:,()]+))?:(\d+)(?:K|\([^)]*\))*", text):
        if name == "gpu":
            found.append(Gpus(int(count), kind))
    return found


def parse_accounts(text: str) -> dict[str, tuple[str, ...]]:
    """Account -> QOS from rows `account|partition|qos,qos|default`; the default QOS first."""
    accounts: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) == 4 and fields[0]:
            qos = [fields[3], *fields[2].split(",")]
            accounts[fields[0]] = tuple(dict.fromkeys([*accounts.get(fields[0], ()), *filter(None, qos)]))
    return accounts


def arch_of(kind: str) -> str | None:
    """sm_90 for what a site calls its H100s; None for a name that says nothing certain."""
    words = re.split(r"[^a-z0-9]+", kind.lower())
    joined = "_".join(words)
    for pattern, arch in _ARCHS:
        if re.search(rf"(?:^|_)(?:{pattern})(?:_|$)", joined):
            return arch
    return None


def _partition(record: Mapping[str, str], machines: Mapping[str, Mapping[str, str]]) -> Partition:
    members = [machines[name] for name in expand_nodelist(record.get("Nodes", "").replace("(null)", "")) if name in machines]
    kinds: Counter[Gpus] = Counter()
    for machine in members:
        # A node with two kinds is one of its larger kind: a job asks for one.
        kinds[max(parse_gres(machine.get("Gres", "")), key=lambda gpus: gpus.count, default=Gpus(0))] += 1
    ranked = sorted(kinds, key=lambda gpus: (-gpus.count * kinds[gpus], gpus.kind))
    gpus = ranked[0] if ranked else Gpus(0)
    same = [machine for machine in members if gpus in (parse_gres(machine.get("Gres", "")) or [Gpus(0)])] or members
    return Partition(
        name=record["PartitionName"],
        is_default=record.get("Default") == "YES",
        nodes=int(record.get("TotalNodes", "0") or 0),
        max_time=record.get("MaxTime", ""),
        default_time=record.get("DefaultTime", "").replace("NONE", ""),
        preempt_mode=record.get("PreemptMode", "OFF").replace("GANG,", ""),
        grace_s=int(record.get("GraceTime", "0") or 0),
        gpus=gpus,
        other_gpus=tuple(other for other in ranked[1:] if other.count),
        cpus=_least(same, "CPUTot"),
        memory_gb=_least(same, "RealMemory") // 1024,
        accounts=_listed(record.get("AllowAccounts", "ALL")),
        qos=_listed(record.get("AllowQos", "ALL")),
    )


def _least(machines: Sequence[Mapping[str, str]], key: str) -> int:
    return min((int(machine[key]) for machine in machines if machine.get(key, "").isdigit()), default=0)


def _listed(text: str) -> tuple[str, ...]:
    return () if text in ("ALL", "(null)", "") else tuple(text.split(","))

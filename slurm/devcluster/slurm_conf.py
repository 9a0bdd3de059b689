"""What a lab's configuration files say. Values in, text out; nothing here touches the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.core.errors import LabError

CLUSTER = "lab"
MAX_NODES = 200
PREEMPT_MODES = ("REQUEUE", "CANCEL")
# Hardly a lab uses cgroups, yet a slurmd that is left to find out their version gives up where it cannot.
_CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"
_NO_CGROUP_CONF = "CgroupPlugin=disabled\n"
# Where cgroup v1 is mounted; a slurmd that limits memory keeps a folder of its own there.
MEMORY_CGROUPS = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class LabConfig:
    """The shape of a lab. Raises LabError for a value that no lab can have.

    The defaults preempt at once (`grace_s` 0, since Slurm rounds a longer grace up to its own 11 s beat) and then
    leave ranks `kill_wait_s` seconds between SIGTERM and SIGKILL: room for one save, short enough to watch."""

    nodes: int = 4
    cpus: int = 16  # per node, whatever the machine has
    gpus: int = 8  # per node
    gpu_type: str = "h100"
    grace_s: int = 0
    kill_wait_s: int = 20
    accounting: bool = False  # MariaDB and slurmdbd too, so that sacct works; two seconds more to start
    base_port: int | None = None  # None: a block of ports that is free on 127.0.0.1
    preempt_mode: str = "REQUEUE"
    user_signal: bool = False  # a preempted job first gets the signal it asked for with --signal
    memory_cgroup: bool = False  # memory limits by the kernel (cgroup v1, as root): one such lab per machine
    real_gpus: bool = False  # this machine's NVIDIA devices, dealt out to the nodes in order
    extra_conf: str = ""  # lines appended to slurm.conf; of two lines with the same key Slurm takes the later

    def __post_init__(self) -> None:
        wrong = []
        if not 1 <= self.nodes <= MAX_NODES:
            wrong.append(f"nodes: {self.nodes} is not within 1..{MAX_NODES}")
        if not 1 <= self.cpus <= 4096:
            wrong.append(f"cpus: {self.cpus} is not within 1..4096")
        if not 0 <= self.gpus <= 64:
            wrong.append(f"gpus: {self.gpus} is not within 0..64")
        if not self.gpu_type.isalnum():
            wrong.append(f"gpu_type: {self.gpu_type!r} is not letters and digits only")
        if not 0 <= self.grace_s <= 86400:
            wrong.append(f"grace_s: {self.grace_s} is not within 0..86400 seconds")
        if not 1 <= self.kill_wait_s <= 65533:
            wrong.append(f"kill_wait_s: {self.kill_wait_s} is not within 1..65533 seconds")
        if self.preempt_mode not in PREEMPT_MODES:
            wrong.append(f"preempt_mode: {self.preempt_mode!r} is not known; choose one of {', '.join(PREEMPT_MODES)}")
        if self.base_port is not None and not 1024 <= self.base_port <= 65535 - self.num_ports:
            wrong.append(f"base_port: {self.base_port} is not within 1024..{65535 - self.num_ports}")
        if wrong:
            raise LabError("the lab cannot be shaped like this:\n  " + "\n  ".join(wrong))

    @property
    def num_ports(self) -> int:
        """Ports in the block: slurmctld, slurmdbd (kept without accounting as well), then one per slurmd."""
        return 2 + self.nodes

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"node{i + 1}" for i in range(self.nodes))


def slurm_conf(config: LabConfig, root: Path, base_port: int, user: str, host: str, plugins: Path | None = None) -> str:
    first_node_port = base_port + 2
    lines = [
        # The same name for every lab and port: slurmctld refuses saved state that carries another one.
        f"ClusterName={CLUSTER}",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={base_port}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        "AuthType=auth/munge",
        # A requeued job waits cred_expire + 1 seconds; Slurm takes 5, while 2 falls back to 120 in silence.
        f"AuthInfo=socket={root}/run/munge.sock,cred_expire=5",
        # slurmctld, slurmd and srun then bind what the host name resolves to, see hosts(), and not every interface.
        "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",
        f"StateSaveLocation={root}/state",
        f"SlurmdSpoolDir={root}/spool/%n",
        f"SlurmctldPidFile={root}/run/slurmctld.pid",
        f"SlurmdPidFile={root}/run/%n.pid",
        f"SlurmctldLogFile={root}/log/slurmctld.log",
        f"SlurmdLogFile={root}/log/%n.log",
        "SlurmctldDebug=info",
        "SlurmdDebug=info",
        "MailProg=/bin/true",
        # cgroups would need write access to the host's tree; a plain walk over parents needs nothing.
        "ProctrackType=proctrack/linuxproc",
        f"TaskPlugin={'task/cgroup' if config.memory_cgroup else 'task/none'}",
        "MpiDefault=none",
        "ReturnToService=2",
        # The nodes claim more CPUs and memory than the machine has, and Slurm is told to believe them.
        "SlurmdParameters=config_overrides",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU_Memory",
        "DefMemPerCPU=64",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=bf_interval=1,bf_resolution=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0,default_queue_depth=1000",
        "PriorityType=priority/basic",
        "PreemptType=preempt/partition_prio",
        f"PreemptMode={config.preempt_mode}",
        "JobRequeue=1",
        f"KillWait={config.kill_wait_s}",
        "MinJobAge=300",
        "SlurmctldTimeout=30",
        # A dead node is noticed two to three of these later; shorter ones misjudge a busy two-core machine.
        "SlurmdTimeout=10",
        "MessageTimeout=10",
        # Not shorter: where many jobs begin at once on two cores, a batch script may take long to be heard of.
        "BatchStartTimeout=60",
        "TCPTimeout=2",
        "MaxJobCount=50000",
        "MaxArraySize=20001",
    ]
    if plugins:
        lines.append(f"PluginDir={plugins}")
    if config.user_signal:
        lines.append("SlurmctldParameters=preempt_send_user_signal")
    if config.gpus:
        lines.append("GresTypes=gpu")
    if config.accounting:
        lines += [
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageHost=127.0.0.1",
            f"AccountingStoragePort={base_port + 1}",
            # Towards slurmdbd the socket of AuthInfo is ignored; this is the key that is read.
            f"AccountingStoragePass={root}/run/munge.sock",
            "JobAcctGatherType=jobacct_gather/linux",
            "JobAcctGatherFrequency=1",
        ]
        if config.gpus:
            lines.append("AccountingStorageTRES=gres/gpu")
    gres = f" Gres=gpu:{config.gpu_type}:{config.gpus}" if config.gpus else ""
    nodes = f"node[1-{config.nodes}]"
    ports = f"[{first_node_port}-{first_node_port + config.nodes - 1}]"
    if config.nodes == 1:
        nodes, ports = "node1", str(first_node_port)
    lines += [
        f"NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs={config.cpus} RealMemory=64000{gres} State=UNKNOWN",
        f"PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode={config.preempt_mode} GraceTime={config.grace_s}",
        "PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF",
        config.extra_conf,
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def cgroup_conf(config: LabConfig, can_do_without: bool = False) -> str:
    if can_do_without and not config.memory_cgroup:
        return _NO_CGROUP_CONF
    return _CGROUP_CONF + (f"CgroupMountpoint={MEMORY_CGROUPS.parent}\nConstrainRAMSpace=yes\nAllowedRAMSpace=100\n" if config.memory_cgroup else "")


def gres_conf(config: LabConfig, root: Path) -> str:
    """One file per GPU: a count alone registers no GPU at all and the node is drained as invalid."""
    if not config.gpus:
        return ""
    gpu = f"Name=gpu Type={config.gpu_type} File={root}/dev/gpu"
    if not config.real_gpus:
        return gpu + _span(0, config.gpus) + "\n"
    return "".join(f"NodeName={name} {gpu}{_span(i * config.gpus, config.gpus)}\n" for i, name in enumerate(config.node_names))


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"[{first}-{first + count - 1}]"


def slurmdbd_conf(root: Path, base_port: int, user: str) -> str:
    return "\n".join(
        [
            "AuthType=auth/munge",
            f"AuthInfo=socket={root}/run/munge.sock",
            "DbdHost=localhost",
            "DbdAddr=127.0.0.1",
            f"DbdPort={base_port + 1}",
            # Not in the manual page of 22.05, which shows slurmdbd on every interface; without this line it is.
            "CommunicationParameters=NoInAddrAny",
            f"SlurmUser={user}",
            f"PidFile={root}/run/slurmdbd.pid",
            f"LogFile={root}/log/slurmdbd.log",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",
            "StorageUser=root",
            "StorageLoc=slurm_acct",
            "CommitDelay=0",
            "",
        ]
    )


def hosts(system_hosts: str, host_names: Sequence[str], nodes: Sequence[str]) -> str:
    """The /etc/hosts that daemons and jobs see: nodes resolve, and this machine's own names mean 127.0.0.1.

    The latter because Slurm binds what the host name resolves to, which in many containers is a public address."""
    lines = [f"127.0.0.1 {' '.join(dict.fromkeys(host_names))}"]
    lines += [f"127.0.0.{11 + i} {name}" for i, name in enumerate(nodes)]
    ours = {*host_names, *nodes}
    for line in system_hosts.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        kept = [name for name in names if name not in ours]
        if kept:
            lines.append(f"{address} {' '.join(kept)}")
    return "\n".join(lines) + "\n"

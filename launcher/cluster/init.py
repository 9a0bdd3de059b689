"""`holdfast init`: asks Slurm what the cluster has, asks the person what only a person knows, and writes a site file."""

import getpass
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

from jobs.config.overrides import split_words, words_from_make
from jobs.config.resolver import resolve
from jobs.config.setting_names import setting_name
from jobs.config.yaml_io import dump_yaml
from jobs.core.atomic_write import replace_file
from jobs.core.contract import Exit
from jobs.core.errors import HoldfastError, SettingError, SubmitError
from jobs.core.imports import unknown
from launcher.local.executor import gpus_here
from launcher.status import run_status
from slurm import site_file
from slurm.client import Slurm
from slurm.devcluster.slurm_conf import CLUSTER
from slurm.discovery import Cluster, Partition, arch_of, discover
from slurm.script.render import run_dir_of, script_for

DEFAULT_FILE = "site.yaml"
# What a person may choose here; everything else is what Slurm says, or is written into the file by hand.
_CHOICES = ("partition", "account", "qos")

Ask = Callable[[str, Sequence[str], str], str]


def init(words: Sequence[str], environ: Mapping[str, str], cwd: Path, *, yes: bool, force: bool, as_json: bool) -> int:
    """Writes the file. Raises SettingError for a choice that is not there or a file that is, SubmitError without Slurm."""
    given, name = _given([*words_from_make(environ), *words])
    path = cwd / (name or DEFAULT_FILE)
    if path.exists() and not force:
        raise SettingError(f"{run_status.near(path)} exists already; --force replaces it, or give another name: holdfast init my-site.yaml")
    slurm = Slurm(environ)
    cluster = discover(slurm, getpass.getuser())
    if not cluster.partitions:
        raise SubmitError("Slurm names no partition that this user can see (scontrol show partition).")
    ask = None if yes or not (sys.stdin.isatty() and sys.stdout.isatty()) else _ask
    if not as_json:
        print(f"Slurm {cluster.version} on {cluster.name or 'this cluster'}")
        for found in cluster.partitions:
            print(f"  {found.name:<14} {found.in_words()}{', the default' if found.is_default else ''}")
        print(f"  accounts       {', '.join(cluster.accounts) or 'none: no accounting, or this user has no association'}")
    chosen = choose(cluster, given, ask, takes_defaults=yes)
    partition = cluster.partition(chosen["partition"])
    assert partition is not None
    # The GPUs of `holdfast lab` are stand-ins on a machine that has none.
    pretended = cluster.name == CLUSTER and gpus_here() == 0
    text = site_text(cluster, partition, chosen, date.today(), pretended)
    answer = _checked(text, path, partition.gpus.count or 1, slurm, cwd)
    _write(path, text)
    if as_json:
        print(json.dumps({"path": str(path), "chosen": chosen, "slurm_says": answer, "cluster": asdict(cluster)}, indent=1))
        return Exit.DONE
    print(f"wrote {run_status.near(path)}: {', '.join(f'{key} {value}' for key, value in chosen.items() if value)}")
    print(f"  a job of one node with it: {answer}")
    print(f"use it with: SITE={run_status.near(path)}    or, in your profile: export HOLDFAST_SITE={path}\nnext: holdfast doctor SITE={run_status.near(path)}")
    return Exit.DONE


def choose(cluster: Cluster, given: Mapping[str, str], ask: Ask | None, takes_defaults: bool) -> dict[str, str]:
    """Partition, account and QOS: as given, else as asked, else the obvious one. Raises SettingError for one that is not there,
    and where a choice is needed and nobody can be asked."""
    names = [partition.name for partition in cluster.partitions]
    if "partition" in given:
        if given["partition"] not in names:
            raise unknown("PARTITION", given["partition"], names)
        name = given["partition"]
    else:
        best = max(cluster.partitions, key=lambda partition: (partition.gpus.count > 0, partition.is_default, partition.all_gpus, partition.nodes)).name
        if ask is None and not takes_defaults and len(names) > 1:
            raise SettingError(
                f"there are {len(names)} partitions and no terminal to ask at; say PARTITION={best} (or {', '.join(other for other in names if other != best)}), or --yes for {best}."
            )
        name = ask("partition", names, best) if ask and len(names) > 1 else best
    partition = cluster.partition(name)
    assert partition is not None
    usable = [account for account in cluster.accounts if not partition.accounts or account in partition.accounts]
    return {"partition": name, **_account(cluster, given, usable, ask, takes_defaults)}


def _account(cluster: Cluster, given: Mapping[str, str], usable: list[str], ask: Ask | None, takes_defaults: bool) -> dict[str, str]:
    account = given.get("account", "")
    if account and usable and account not in usable:
        raise unknown("ACCOUNT", account, usable)
    if not account and usable:
        obvious = cluster.default_account if cluster.default_account in usable else usable[0]
        if ask is None and not takes_defaults and len(usable) > 1:
            raise SettingError(
                f"there are {len(usable)} accounts and no terminal to ask at; say ACCOUNT={obvious} (or {', '.join(other for other in usable if other != obvious)}), or --yes for {obvious}."
            )
        account = ask("account", usable, obvious) if ask and len(usable) > 1 else obvious
    known = cluster.accounts.get(account, ())
    qos = given.get("qos", "")
    if qos and known and qos not in known:
        raise unknown("QOS", qos, known)
    return {"account": account, "qos": qos}


def site_text(cluster: Cluster, partition: Partition, chosen: Mapping[str, str], today: date, pretended_gpus: bool = False) -> str:
    """The file: what was found as settings, what else is true of the cluster as remarks."""
    gpus = partition.gpus
    lines = [
        f"# Written by holdfast init on {today} from what Slurm {cluster.version} says of {cluster.name or 'this cluster'}. Change what is not so;",
        "# `holdfast explain SITE=<this file>` shows what it comes to, docs/howto/sites.md what else can stand here.",
        "",
        "# Partitions:",
        *(f"#   {found.name:<14} {found.in_words()}{', the default' if found.is_default else ''}" for found in cluster.partitions),
        _setting("partition", chosen["partition"]),
    ]
    if chosen.get("account"):
        lines.append(_setting("account", chosen["account"]))
    elif not cluster.accounts:
        lines.append("# account: research      # Slurm keeps no accounts here, or none for you")
    qos = cluster.accounts.get(chosen.get("account", ""), ())
    if chosen.get("qos"):
        lines.append(_setting("qos", chosen["qos"]))
    elif qos:
        lines.append(_remark("qos", qos[0], f"you may use {', '.join(qos)}"))
    lines += ["", _setting("gpu_request", cluster.gpu_request if gpus.count else "none")]
    if gpus.count:
        if gpus.kind:
            lines.append(_setting("gpu_type", gpus.kind))
        if pretended_gpus:
            pass
        elif arch := arch_of(gpus.kind):
            lines.append(_setting("gpu_arch", arch))
        else:
            lines.append(_remark("gpu_arch", "sm_90", "compute capability of these GPUs: precisions that they cannot do are then refused before queueing"))
        lines.append(_setting("gpus_per_node", gpus.count))
        if pretended_gpus:
            lines += [
                "# This is the private cluster of holdfast, whose GPUs are only pretended: training is on CPUs.",
                _setting("device", "cpu"),
                _setting("mem_gb", 4),
            ]
        lines += [f"# some nodes have {other.count} {other.kind or 'GPUs'} instead" for other in partition.other_gpus]
    else:
        lines += ["# Its nodes have no GPU that Slurm knows of: training is on CPUs, and gpus_per_node counts processes.", _setting("device", "cpu")]
    if partition.cpus >= max(gpus.count, 1):
        lines.append(
            _setting("cpus_per_gpu", partition.cpus // gpus.count)
            if gpus.count
            else _remark("cpus_per_gpu", partition.cpus, "cores of a node; this setting counts them per process")
        )
    if partition.memory_gb and not pretended_gpus:
        lines.append(_remark("mem_gb", partition.memory_gb, "of a node, as Slurm counts it; left out, the site's own default"))
    if partition.max_time not in ("UNLIMITED", ""):
        lines.append(_remark("time_limit", partition.max_time, "the most; a run that needs longer is warned, saved and goes on in the next attempt"))
    lines += [
        "",
        "# What Slurm cannot say:",
        "# modules: [cuda/13.0]",
        _remark("setup_script", "/shared/env.sh", "sourced by every attempt"),
        "# container_image: /shared/images/train.sif",
        "# node_env: {NCCL_SOCKET_IFNAME: ib0}",
        "# notify_email: you@example.org",
    ]
    return "\n".join(lines) + "\n"


def _remark(name: str, value: object, why: str) -> str:
    """A setting that a person may take the # from."""
    return f"{f'# {name}: {value}':<25} # {why}"


def _setting(name: str, value: object) -> str:
    line = dump_yaml({name: value}).rstrip("\n")
    # Plain words as a person would write them; everything else as it is safe.
    text = str(value)
    return (
        f"{name}: {text}"
        if text.replace("_", "").replace("-", "").isalnum() and not text[0].isdigit() and text.lower() not in ("true", "false", "null", "none")
        else line
    )


def _given(words: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """The choices among the words, and the name of the file. Raises SettingError."""
    pairs, name, faults = split_words(words)
    given = {}
    for key, value in pairs:
        setting = setting_name(key)
        if setting in _CHOICES:
            given[str(setting)] = value
        else:
            faults.append(f"{key} has no effect here (command line); init takes PARTITION, ACCOUNT and QOS, and the rest is written into the file.")
    if faults:
        raise SettingError("\n".join(faults))
    return given, name


def _ask(what: str, names: Sequence[str], obvious: str) -> str:
    while True:
        answer = input(f"{what} ({', '.join(names)}) [{obvious}]: ").strip() or obvious
        if answer in names:
            return answer
        print(f"  {answer!r} is not one of them")


def _checked(text: str, path: Path, per_node: int, slurm: Slurm, cwd: Path) -> str:
    """Reads the file as a submit would, and asks Slurm about a job of one whole node with it. Raises SettingError where it does
    not even resolve, which is our mistake. What Slurm thinks of the job is only told."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        draft.write_text(text)
        words = ["JOB_NAME=init", "NODES=1", f"GPUS_PER_NODE={per_node}", f"BATCH_SIZE={per_node}", "PRECISION=fp32", "TIME_LIMIT=5", f"SITE={draft}"]
        job = resolve(words, {}, cwd, lambda word: site_file.find(word, cwd)).job
    try:
        return slurm.test_only(script_for(job, run_dir_of(job, cwd), sys.executable)).removeprefix("sbatch: ")
    except HoldfastError as err:
        return f"refused now: {err}"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    except OSError as err:
        raise SettingError(f"{path} cannot be written: {err.strerror}") from err

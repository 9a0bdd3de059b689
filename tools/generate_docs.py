"""What is generated and checked in: the pages of settings and commands, the JSON schema of a job file, golden scripts, slurm/train.sbatch.

python -m tools.generate_docs            writes every file (`make golden`)
python -m tools.generate_docs --check    says which are stale, and exits 1 if one is
"""

import argparse
import sys
import types
import typing
from enum import EnumType
from pathlib import Path
from typing import Any

from jobs.config.settings import NAME_ALIASES, Job, group_of, help_of, names, unit_of
from jobs.core.contract import Exit
from jobs.run.rundir import RunDir
from jobs.specs.precision import ALIASES, MODES
from launcher.output import settings_table
from launcher.submission.create_run import resolve_here
from slurm.script.render import render_by_hand, script_for
from tools import command_docs, reference_docs
from tools.reference_docs import table

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = "tests/golden"
ACCEPT = "make golden"

# Golden scripts look the same on every machine: nothing of the one that made them is in them.
_CWD = Path("/shared/project")
_RUNS = Path("/shared/runs")
_PYTHON = "/opt/holdfast/bin/python"

# Beside one script for each shipped job file: name -> words after `holdfast render`, and the size of an array.
_VARIANTS: dict[str, tuple[list[str], int | None]] = {
    "quickstart.lab": (["SITE=lab"], None),
    "quickstart.h100": (["SITE=h100"], None),
    "quickstart.array": ([], 3),
    "quickstart.apptainer": (["CONTAINER_IMAGE=/shared/images/train.sif", "CONTAINER_MOUNTS=/data,/scratch/me:/scratch", "NODE_ENV=NCCL_DEBUG=WARN"], None),
    "quickstart.pyxis": (["CONTAINER_IMAGE=/shared/images/train.sqsh", "CONTAINER_RUNTIME=pyxis", "CONTAINER_MOUNTS=/data", "NODE_ENV=NCCL_DEBUG=WARN"], None),
    "quickstart.entry": (["ENTRY=my/train.py", "ENTRY_ARGS=--config,my run.yaml"], None),
    "quickstart.accelerate": (["LAUNCH=accelerate", "NODES=2", "GPUS_PER_NODE=8", "CPUS_PER_GPU=12"], None),
    "quickstart.accelerate_entry": (["LAUNCH=accelerate", "ENTRY=-m my.train", "ENTRY_ARGS=--config,my run.yaml", "ACCELERATE_CONFIG=my/zero3.yaml"], None),
}

_GROUPS = {
    "run": "The run",
    "slurm": "Slurm resources",
    "site": "The site",
    "retries": "Retry limits",
    "model": "Model",
    "data": "Data",
    "batch": "Batch",
    "optimizer": "Optimizer and schedule",
    "precision": "Precision",
    "loop": "The loop",
}

_FORMS = """\
<!-- Generated from jobs/config/settings.py by `make golden`; changes made here are lost. -->
# Settings

Every setting has one name, and that name works everywhere. For `batch_size`:

| where | form |
|---|---|
| job file, site file | `batch_size: 512` |
| environment | `BATCH_SIZE=512` or `HOLDFAST_BATCH_SIZE=512`; with both, the one with the prefix counts |
| command line of holdfast or make | `BATCH_SIZE=512`, `batch_size=512`, `batch-size=512` |
| flag | `--batch_size 512`, `--batch-size=512`; a setting of type yes or no needs no value: `--compile` |

`holdfast explain` shows all of them with the value each one has now, and where it came from.

## Order

A later layer wins over an earlier one:

1. the default, as in the tables below;
2. the site file (`SITE=NAME` is `slurm/sites/NAME.yaml`; a path is a file of your own);
3. the job file (`JOB=`; jobs/quickstart.yaml when left out, and none for a script of your own, `ENTRY=`);
4. the environment;
5. the command line.

The layers are read once, when a job is submitted, and frozen into `job.yaml` in the run directory: a requeued attempt
reads that file and nothing else. A name that is not known is refused, and all faults of all layers are reported at once.
A list or a mapping of a higher layer replaces that of a lower one as a whole.

## Values

| type | as one word | in YAML |
|---|---|---|
| list | `MODULES=cuda/13.0,nccl/2.28` | `modules: [cuda/13.0, nccl/2.28]` |
| mapping | `NODE_ENV=NCCL_DEBUG=INFO,OMP_PROC_BIND=close` | `node_env: {NCCL_DEBUG: INFO}` |
| yes or no | `true` `false` | `true` `false` |
| time | minutes (`90`), `mm:ss`, `hh:mm:ss`, `d-hh`, `d-hh:mm`, `d-hh:mm:ss`, as Slurm reads them; seconds are rounded up | the same |

`none`, `null` or nothing at all clears an optional setting, a list or a mapping that a lower layer gave.
A text with a comma in it goes into a list by YAML only. Files are read by the rules of YAML 1.2: `no` is a word,
`24:00:00` is a time and not a number in base 60, `1e-3` is a number, `010` is ten; a key stands once. Keys may be gathered
under a heading (`training:`, `slurm:`, `optimizer:` and the like), which changes nothing.
"""


def settings_page() -> str:
    """The text of docs/reference/settings.md."""
    parts = [_FORMS]
    for group in dict.fromkeys(group_of(name) for name in names()):
        parts.append(f"## {_GROUPS.get(group, group.capitalize())}\n")
        rows = [_row(name) for name in names() if group_of(name) == group]
        parts.append(table(("setting", "type", "default", "unit", "allowed", "meaning"), rows))
    parts.append("## Precision modes\n")
    parts.append(table(("precision", "weights", "compute", "loss scaling", "needs", "remark"), [_mode_row(mode) for mode in MODES.values()]))
    parts.append("Other words for them: " + ", ".join(f"`{word}` is {mode}" for word, mode in ALIASES.items()) + ".\n")
    parts.append("## Words of other tools\n\nThey are understood in every place where the setting is, and shown as what they mean.\n")
    rows = [(f"`{word}`", f"`{name}`") for word, name in NAME_ALIASES.items()]
    rows.append(
        (
            "`use_amp` with `amp_dtype`",
            "`precision`: fp32 where `use_amp` is false, else bf16 (`bfloat16`, also when `amp_dtype` is left out) or fp16 (`float16`)",
        )
    )
    parts.append(table(("word", "means"), rows))
    return "\n".join(parts)


def golden_scripts() -> dict[str, str]:
    """File name -> text of every golden script: one per shipped job file on the generic site, and the variants."""
    shipped = sorted(path.stem for path in (ROOT / "jobs").glob("*.yaml"))
    wanted = {stem: ([f"JOB=jobs/{stem}.yaml", "SITE=generic"], None) for stem in shipped}
    return {f"{name}.sbatch": _script(name, words, array_size) for name, (words, array_size) in {**wanted, **_VARIANTS}.items()}


def _script(name: str, words: list[str], array_size: int | None) -> str:
    job = resolve_here(words, {}, _CWD).job
    return script_for(job, RunDir(_RUNS / f"{name.partition('.')[0]}-abcd"), _PYTHON, array_size)


def generated() -> dict[str, str]:
    """Path in the repository -> the text that belongs there."""
    return {
        "docs/reference/settings.md": settings_page(),
        "docs/reference/commands.md": command_docs.page(),
        **reference_docs.pages(),
        "docs/reference/job.schema.json": settings_table.schema() + "\n",
        "slurm/train.sbatch": render_by_hand(Job()),
        **{f"{GOLDEN}/{name}": text for name, text in golden_scripts().items()},
    }


def stale(root: Path = ROOT) -> list[str]:
    """One line for each generated file that is missing, differs, or has nothing that it is generated from any more."""
    wanted = generated()
    lines = []
    for name, text in wanted.items():
        path = root / name
        if not path.exists():
            lines.append(f"{name} is missing")
        elif path.read_text("utf-8") != text:
            lines.append(f"{name} is not what its sources say now")
    lines += [f"{name} belongs to no job file" for name in _left_over(root, wanted)]
    return lines


def _left_over(root: Path, wanted: dict[str, str]) -> list[str]:
    return [name for path in sorted((root / GOLDEN).glob("*.sbatch")) if (name := f"{GOLDEN}/{path.name}") not in wanted]


def write(root: Path = ROOT) -> list[str]:
    """Writes every generated file that is not current. Returns what it changed."""
    wanted = generated()
    changed = []
    for name, text in wanted.items():
        path = root / name
        if not path.exists() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            changed.append(f"wrote {name}")
    for name in _left_over(root, wanted):
        (root / name).unlink()
        changed.append(f"removed {name}")
    return changed


def _row(name: str) -> tuple[str, ...]:
    default = Job().text(name)
    if name == "job_name":
        default = ""  # it follows from the job file
    kind, allowed = _kind(name)
    return (f"`{name}`", kind, f"`{default}`" if default else "-", unit_of(name), allowed, help_of(name))


def _kind(name: str) -> tuple[str, str]:
    """The type of a setting in words, and what of that type is allowed."""
    annotation: Any = Job.model_fields[name].annotation
    besides = ""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = typing.get_args(annotation)
        annotation = next(kind for kind in kinds if kind is not type(None))
        other = next(kind for kind in kinds if kind is not annotation)
        besides = ", or none" if other is type(None) else f", or `{typing.get_args(other)[0]}`"
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    origin = typing.get_origin(annotation)
    allowed: list[str] = []
    if name == "time_limit":
        kind = "time"
    elif isinstance(annotation, EnumType) or origin is typing.Literal:
        kind = "word"
        allowed = [f"`{item}`" for item in (typing.get_args(annotation) if origin else list(annotation))]
    elif origin is tuple:
        kind = "list"
    elif origin is dict:
        kind = "mapping"
    else:
        kind = {bool: "yes or no", int: "whole number", float: "number", str: "text"}[annotation]
    bounds = _bounds(name)
    return kind + besides, ", ".join(allowed) or bounds


def _bounds(name: str) -> str:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    found = {word: getattr(bound, word) for bound in _metadata(name) for word in words if getattr(bound, word, None) is not None}
    return ", ".join(f"{words[word]} {value:,}" if isinstance(value, int) else f"{words[word]} {value:g}" for word, value in found.items())


def _metadata(name: str) -> list[Any]:
    field = Job.model_fields[name]
    return [*field.metadata, *(item for kind in typing.get_args(field.annotation) for item in getattr(kind, "__metadata__", ()))]


def _mode_row(mode: Any) -> tuple[str, ...]:
    gpu = f"sm_{mode.min_arch}" if mode.min_arch else "any GPU"
    return (f"`{mode.name}`", mode.weights, mode.compute, "dynamic" if mode.loss_scaling else "-", f"{gpu} or a CPU" if mode.on_cpu else gpu, mode.note)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.generate_docs", description="Writes the files that are generated and checked in.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not what its sources say now")
    if parser.parse_args(arguments).check:
        lines = stale()
        if lines:
            print("\n".join([*lines, f"{ACCEPT} accepts the change; read the diff before you commit it."]), file=sys.stderr)
        return Exit.FAILED if lines else Exit.DONE
    print("\n".join(write()) or "all generated files are current")
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())

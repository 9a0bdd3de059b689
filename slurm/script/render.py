"""From a job to the text of its batch script: a pure function, and the one home of quoting.

In a template every `{{ value }}` is quoted for the shell; the filter `sbatch` says that it stands in a directive line.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from jobs.config.settings import Job
from jobs.config.types import format_minutes
from jobs.core.contract import LEAD_SIGNAL, LOG_OFFSET, SETUP_SECONDS, STOP_SIGNALS, Exit, RankEnv
from jobs.core.errors import RenderError
from jobs.run.rundir import RunDir


class Quoted(str):
    """Text that is already quoted for the place where it stands."""


@dataclass(frozen=True)
class Script:
    """What the script needs beside the job. `python` runs the launcher's part on the node; `array_size` is None for one run."""

    run: RunDir
    python: str
    array_size: int | None = None


def shell(value: Any) -> str:
    """A value as one word of a shell command."""
    return value if isinstance(value, Quoted) else Quoted(shlex.quote(_line(value)))


def sbatch(value: Any) -> str:
    """A value in an #SBATCH line.

    sbatch takes a backslash for an escape also between single quotes, so shell quoting loses it there (22.05, tried);
    between double quotes with both characters escaped every value comes through."""
    text = _line(value)
    if re.fullmatch(r"[A-Za-z0-9_./:@%,=+-]+", text):
        return Quoted(text)
    return Quoted('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')


def pattern(value: Any) -> str:
    """A path where Slurm expands %j and its like: % is doubled. A backslash would switch all expansion off, so it is refused."""
    text = _line(value)
    if "\\" in text:
        raise RenderError(f"{text!r} has a backslash, which Slurm cannot have in the name of a log file; choose another RUNS_DIR.")
    return text.replace("%", "%%")


def _line(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    if any(char in text for char in "\n\r\0"):
        raise RenderError(f"{text[:60]!r} has a line break or NUL, which a batch script cannot carry.")
    return text


@lru_cache
def environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(resources.files("slurm") / "script" / "templates")),
        undefined=jinja2.StrictUndefined,
        finalize=shell,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell text; `finalize` quotes
    )
    made.filters["sbatch"] = sbatch
    made.filters["word"] = _word
    made.filters["words"] = lambda value: Quoted(" ".join(_word(part) for part in value.split()))
    return made


def _word(value: Any) -> str:
    """A name of ours (a variable, an option) that must be what it looks like."""
    text = str(value)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", text):
        raise RenderError(f"{text!r} cannot be the name of an option or variable.")
    return Quoted(text)


def render_script(job: Job, script: Script) -> str:
    """The batch script of a run, or of an array of runs. Raises RenderError for a value that no script can carry."""
    return _render(
        "train.sbatch.j2",
        job=job,
        script=script,
        run=script.run,
        directives=list(_directives(job, script)),
        train=Quoted(" ".join(shell(word) for word in _train_command(job, script))),
        mounts=_mounts(job, script) if job.container_image else [],
        # Of what image and job both set, pyxis keeps the image's unless it is told otherwise.
        kept_env=[*job.node_env, *(["PYTHONPATH"] if job.entry else [])],
    )


def render_by_hand(job: Job) -> str:
    """slurm/train.sbatch: the script that is submitted without the launcher and makes its run directory on the node."""
    return _render("byhand.sbatch.j2", job=job)


def _render(template: str, **values: Any) -> str:
    return (
        environment()
        .get_template(template)
        .render(
            contract={
                "lead_signal": LEAD_SIGNAL.name.removeprefix("SIG"),
                "stop_signals": [number.name.removeprefix("SIG") for number in STOP_SIGNALS],
                "stopped": int(Exit.REQUEUE),
                "log_offset": LOG_OFFSET,
                "setup_seconds": SETUP_SECONDS,
                "run_dir": RankEnv.RUN_DIR.value,
                "attempt": RankEnv.ATTEMPT.value,
            },
            **values,
        )
    )


# Options that the script or its submission depends on: a site may add options, not change these.
OURS = frozenset(
    {
        "job-name",
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "requeue",
        "no-requeue",
        "open-mode",
        "signal",
        "output",
        "error",
        "array",
        "time",
        "chdir",
        "export",
        "wrap",
        "comment",
        "wait",
        "test-only",
        "clusters",
        "parsable",
    }
)


def _directives(job: Job, script: Script) -> Iterator[tuple[str, Any]]:
    """The #SBATCH options as (name, value); True is a bare option."""
    yield "job-name", script.run.id
    # The run's id again where no length limit or site prefix touches it: status finds lost submissions by it.
    yield "comment", f"holdfast:{script.run.id}"
    for name in ("partition", "account", "qos", "constraint", "reservation"):
        if getattr(job, name):
            yield name, getattr(job, name)
    if job.exclude:
        yield "exclude", ",".join(job.exclude)
    yield "nodes", job.nodes
    yield "ntasks-per-node", job.gpus_per_node
    if job.cpus_per_gpu:
        yield "cpus-per-task", job.cpus_per_gpu
    gpus = f"{job.gpu_type}:{job.gpus_per_node}" if job.gpu_type else str(job.gpus_per_node)
    if job.gpu_request == "gpus-per-node":
        yield "gpus-per-node", gpus
    elif job.gpu_request == "gres":
        yield "gres", f"gpu:{gpus}"
    if job.mem_gb:
        yield "mem", f"{job.mem_gb}G"
    yield "time", format_minutes(job.time_limit)
    yield "requeue", True
    # A requeue would otherwise begin the log anew and the first attempt's words would be lost.
    yield "open-mode", "append"
    # A user script may have no handler, and would be killed: its batch script is warned and decides (launcher/attempt/step_guard.py).
    yield "signal", f"{'B:' if job.entry else ''}{LEAD_SIGNAL.name.removeprefix('SIG')}@{job.stop_lead_s}"
    if job.notify_email:
        yield "mail-user", job.notify_email
        # A requeue is no end: Slurm has a kind of its own for it, which is not asked for.
        yield "mail-type", "END,FAIL"
    if script.array_size is not None:
        yield "array", f"0-{script.array_size - 1}%{min(job.array_parallel, script.array_size)}"
        yield "output", pattern(script.run.members) + "/%a/logs/%A_%a.batch.out"
    else:
        yield "output", pattern(script.run.logs) + "/%j.batch.out"
    for name, value in job.sbatch_options.items():
        option = name.lstrip("-").replace("_", "-")
        # sbatch takes the beginning of a name for the name: --outp is --output.
        ours = sorted(known for known in OURS if known.startswith(option))
        if ours:
            raise RenderError(f"SBATCH_OPTIONS: --{ours[0]} is set by holdfast itself and cannot be given; use the setting for it.")
        yield option, value if value != "" else True


def _train_command(job: Job, script: Script) -> list[Any]:
    """The command of one task of srun, with the container around it where there is one."""
    command: list[Any] = [job.container_python if job.container_image else script.python, "-u"]
    if job.launch == "accelerate":
        config = ["--config", job.accelerate_config] if job.accelerate_config else []
        command += [
            "-m",
            "train.distributed.accelerate_launcher",
            "--nodes",
            job.nodes,
            "--per-node",
            job.gpus_per_node,
            "--peer-wait",
            job.peer_exit_wait_s,
            *config,
            "--",
        ]
    if job.entry is None:
        command += ["-m", "train", "--run-dir", Quoted(f'"${RankEnv.RUN_DIR.value}"')]
    elif job.entry.startswith("-m "):
        command += ["-m", job.entry[3:].strip(), *job.entry_args]
    else:
        command += [job.entry, *job.entry_args]
    if not job.container_image or job.container_runtime == "pyxis":
        return command
    binds = [part for mount in _mounts(job, script) for part in ("--bind", mount)]
    return ["apptainer", "exec", *([] if job.device == "cpu" else ["--nv"]), *binds, job.container_image, *command]


def _mounts(job: Job, script: Script) -> list[str]:
    """host:container pairs, the run directory first under its own name. Raises RenderError where a path would be cut in two."""
    path = str(script.run.path)
    if "," in path or ":" in path:
        raise RenderError(f"{path!r} has a comma or colon, at which {job.container_runtime} cuts a mount in two; choose another RUNS_DIR.")
    for mount in job.container_mounts:
        if "," in mount:
            raise RenderError(f"CONTAINER_MOUNTS: {mount!r} has a comma, at which {job.container_runtime} cuts a mount in two; give one mount per item.")
    # A script that lies outside of the working tree is not frozen, and runs from where it is.
    outside = [str(Path(job.entry).parent)] if job.entry and job.entry.startswith("/") else []
    if any("," in folder or ":" in folder for folder in outside):
        raise RenderError(f"ENTRY: {outside[0]!r} has a comma or colon, at which {job.container_runtime} cuts a mount in two; move the script.")
    return [mount if ":" in mount else f"{mount}:{mount}" for mount in (path, *outside, *job.container_mounts)]


def default_python(job: Job, executable: str) -> str:
    """The Python that runs on the nodes: the site's, else the one that submits (`sys.executable`)."""
    return job.node_python or executable


def script_for(job: Job, run: RunDir, executable: str, array_size: int | None = None) -> str:
    """`render_script` with what a submit knows."""
    return render_script(job, Script(run=run, python=default_python(job, executable), array_size=array_size))


def run_dir_of(job: Job, cwd: Path) -> RunDir:
    """Where the run of a job lives; a job without an id gets a placeholder, so that a script can be shown before it exists."""
    from jobs.run.store import place

    return place(cwd / job.runs_dir, job.job_name, job.run_id or "0000")

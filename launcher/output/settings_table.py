"""Settings as a person reads them: `holdfast explain`, the lines that submit prints, and the schema of a job file."""

import json

from rich.text import Text

from jobs.config import memory_estimate
from jobs.config.layers import HEADINGS
from jobs.config.resolver import Resolved
from jobs.config.secrets_scan import is_secret_name
from jobs.config.setting_names import shorten
from jobs.config.settings import NAME_ALIASES, Job, group_of, help_of, names, unit_of
from launcher.output.table import columns, show


def schema() -> str:
    """The JSON schema of a job file: the settings, the words of other tools for them, and headings with settings under them."""
    made = Job.model_json_schema()
    properties = made["properties"]
    for word, name in NAME_ALIASES.items():
        properties[word] = {**{key: value for key, value in properties[name].items() if key != "default"}, "description": f"the same as {name}"}
    properties["use_amp"] = {"type": "boolean", "description": "with amp_dtype: another way to say precision"}
    properties["amp_dtype"] = {"enum": ["bfloat16", "float16", "bf16", "fp16"], "description": "with use_amp: another way to say precision"}
    for heading in sorted(HEADINGS - set(names())):
        properties[heading] = {"$ref": "#", "description": "a heading: what stands under it is read as if it stood at the top"}
    return json.dumps(made, indent=1)


def unit_beside(name: str, job: Job) -> str:
    """The unit to say behind the value: none behind a word (auto), where there is no value, and behind a time, which is written as a clock does."""
    value = getattr(job, name)
    return "" if value is None or isinstance(value, str) or name == "time_limit" else unit_of(name)


def explain(resolved: Resolved, as_json: bool) -> None:
    job = resolved.job
    if as_json:
        rows = [
            {"setting": n, "value": masked(n, job), "from": resolved.origins[n], "unit": unit_of(n), "group": group_of(n), "meaning": help_of(n)}
            for n in names()
        ]
        print(json.dumps(rows, indent=1))
        return
    for note in resolved.notes:
        print(note)
    table = columns("setting", "value", "from", "meaning")
    for name in names():
        value = f"{masked(name, job) or '-'} {unit_beside(name, job)}".rstrip()
        table.add_row(Text(name), Text(value), Text(resolved.origins[name]), Text(help_of(name)))
    show(table)
    expected = memory_estimate.estimate(job)
    if expected:
        print(f"\n{expected.line()} (an estimate; jobs/config/memory_estimate.py says of what, and CUDA and NCCL take about 2 GB besides)")


def not_default(resolved: Resolved) -> str:
    """`PRECISION=bf16 (command line)  LR=3e-4 (environment LR)`: all that somebody chose outside of the job file."""
    by_origin: dict[str, list[str]] = {}
    for name, origin in resolved.not_default().items():
        by_origin.setdefault(origin, []).append(f"{name.upper()}={shorten(masked(name, resolved.job))}")
    return "   ".join(f"{'  '.join(words)} ({origin})" for origin, words in by_origin.items())


def headline(job: Job) -> str:
    """quickstart · 2 nodes x 2 processes · bf16 · 32 samples per step = 4 x 8 x 1 accumulation."""
    what = "process" if job.device == "cpu" or job.gpu_request == "none" else "GPU"
    many = "es" if what == "process" else "s"
    per_node = f"{job.gpus_per_node} {what}{many if job.gpus_per_node > 1 else ''}"
    nodes = f"{job.nodes} node{'s' if job.nodes > 1 else ''}"
    if job.entry:
        return f"{job.job_name} · {nodes} x {per_node} · {' '.join([job.entry, *job.entry_args])}"
    return f"{job.job_name} · {nodes} x {per_node} · {job.precision} · {job.batch_size} samples per step = {job.world_size} x {job.micro_batch_size} x {job.grad_accum_steps} accumulation"


def masked(name: str, job: Job) -> str:
    """A setting as text, with secrets among the environment variables hidden."""
    if name == "node_env":
        return ",".join(f"{key}={'***' if is_secret_name(key) else value}" for key, value in job.node_env.items())
    return job.text(name)

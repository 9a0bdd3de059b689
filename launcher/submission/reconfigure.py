"""Changing the settings of a run that exists: resolved anew, checked like at submit, and frozen again as a whole.

holdfast resume RUN NODES=1 GPUS_PER_NODE=1      another size, precision or place: the training stays the same one
holdfast resume RUN MAX_STEPS=2000 --allow-change      another training from here on: only by this word
"""

import json
from collections.abc import Sequence
from typing import Any

from jobs.config.resolver import amend, given_values, load
from jobs.config.settings import Job, group_of
from jobs.config.yaml_io import dump_yaml, read_run_yaml
from jobs.core.atomic_write import replace_file
from jobs.core.contract import Event
from jobs.core.errors import SettingError
from jobs.run import event_log, rundir
from jobs.run.rundir import RunDir
from slurm.script.render import script_for

# What a run is. Under another name, model or code it would be another run.
_FIXED = frozenset({"job_name", "run_id", "runs_dir", "entry", "entry_args", "code_include", "model", "model_options", "init_from"})
# Groups whose settings say where and how to train, never what.
_FREE_GROUPS = frozenset({"run", "slurm", "site", "retries", "precision"})
_FREE = frozenset({
    "micro_batch_size", "grad_accum_steps", "grad_checkpointing", "compile", "log_every", "eval_every", "eval_samples",
    "checkpoint_every", "async_save", "keep_last", "keep_every", "keep_best", "log_samples", "parallel", "bucket_cap_mb", "cpu_threads",
    "num_workers", "prefetch_factor", "persistent_workers", "pin_memory", "cudnn_benchmark", "profile_steps",
})  # fmt: skip


def change(run: RunDir, words: Sequence[str], *, allow: bool, executable: str) -> dict[str, tuple[Any, Any]]:
    """Applies KEY=value words to a run. Returns what changed, as name -> (before, now).

    Raises SettingError and ImpossibleJobError as a submit does, and for a change that needs `--allow-change`; the run is
    then as it was."""
    refuse_array(run)
    before = load(run.job_yaml)
    origins = rundir.origins(run)
    given_before = {name: "the run" if origin == "command line" else origin for name, origin in origins.items()}
    resolved = amend(given_values(before, origins), given_before, words)
    job = resolved.job
    wanted = [name for name, origin in resolved.origins.items() if origin == "command line"]
    faults = [f"{name.upper()}: a run keeps its {name} for good; submit a new one." for name in wanted if name in _FIXED]
    faults += [
        f"{name.upper()} was {before.text(name)}, would be {job.text(name)}: from here on that is another training. If you mean it, say --allow-change."
        for name in wanted
        if name not in _FIXED and getattr(job, name) != getattr(before, name) and name not in _FREE and group_of(name) not in _FREE_GROUPS and not allow
    ]
    if run.is_member and any(getattr(job, name) != getattr(before, name) and group_of(name) in ("slurm", "site") for name in wanted):
        faults.append("This run is one task of an array, whose script is shared; what Slurm is asked for cannot change for one task.")
    if faults:
        raise SettingError("\n".join(faults))
    changed = {name: (getattr(before, name), getattr(job, name)) for name in Job.model_fields if getattr(before, name) != getattr(job, name)}
    if changed or allow:
        # Said before it is done: should the disk fail in between, the same command does it again.
        plain = job.model_dump(mode="json")
        old = before.model_dump(mode="json")
        event_log.append(run.ledger, Event.CHANGED, attempt=0, job_id="", changes={name: [old[name], plain[name]] for name in changed}, allow=allow)
    if words:
        _freeze(run, job, {**origins, **dict.fromkeys(wanted, "holdfast resume")}, set(changed), executable)
    return changed


def refuse_array(run: RunDir) -> None:
    """Raises SettingError for an array: started as a whole it would train again what is finished, and its script is that of all tasks."""
    if not run.has_members:
        return
    whole = f"a sweep; holdfast sweep --resume {run.id} goes on with what is missing or was stopped" if run.sweep.exists() else "an array"
    raise SettingError(f"{run.id} is {whole}; holdfast resume {run.id}.N goes on with task N, such as {run.id}.0.")


def _freeze(run: RunDir, job: Job, origins: dict[str, str], changed: set[str], executable: str) -> None:
    """job.yaml last: until it is there, the same command finds the same change to make. Each file is whole or the old one."""
    # Only names that the run's frozen code knows: it may be older than this launcher.
    known = set(read_run_yaml(run.job_yaml)) | changed
    if not run.is_member:
        replace_file(run.script, script_for(job, run, executable), mode=0o755)
    replace_file(run.origins, json.dumps(origins, indent=1) + "\n")
    replace_file(run.job_yaml, dump_yaml({name: value for name, value in job.model_dump(mode="json").items() if name in known}))

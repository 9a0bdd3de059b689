"""Where settings come from, in which order, and how the answer remembers it.

    default  <  site file  <  job file  <  DEBUG=true  <  environment  <  command line

`resolve` gathers every layer, reports every fault of all of them at once, and returns a frozen `Job` together with
the origin of each value. It reads no global state: environment and words are handed in.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.config import debug_mode, lr_suggestions, secrets_scan, validation
from jobs.config.aliases import merge_amp_words, merge_warmup, plain, take_advice
from jobs.config.layers import Given, Layer, LoadSite, gather
from jobs.config.overrides import split_words
from jobs.config.setting_names import alias_notes, setting_name, shorten
from jobs.config.settings import Job, is_mapping
from jobs.config.validation_errors import faults_of
from jobs.config.yaml_io import read_run_yaml
from jobs.core.errors import DamagedFileError, ImpossibleJobError, SettingError
from jobs.specs.precision import AUTO


@dataclass(frozen=True)
class Resolved:
    """A checked job, where each of its values came from, remarks about what was understood how, and the files that were read."""

    job: Job
    origins: dict[str, str]
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def not_default(self) -> dict[str, str]:
        """Name -> origin of all values that a person or a site chose."""
        return {name: origin for name, origin in self.origins.items() if origin not in ("default", "derived")}


def resolve(
    words: Iterable[str],
    environ: Mapping[str, str],
    cwd: Path,
    load_site: LoadSite,
    *,
    job_file: str | None = None,
    allocation: Mapping[str, Any] | None = None,
    allocation_origin: str = "Slurm allocation",
) -> Resolved:
    """The job that these words, this environment and the files they name describe.

    `load_site` finds a site file by name. `allocation` is what is already given (by Slurm to a script that was
    submitted by hand, by the machine to a run in the foreground), and wins over everything. Raises SettingError with one line per fault, NotFoundError, or ImpossibleJobError
    when each value is fine and their combination is not."""
    gathered = gather(words, environ, cwd, load_site, job_file)
    layers = [*gathered.below, gathered.command_line]
    if allocation:
        layers.append(Layer([Given(name, value, allocation_origin) for name, value in allocation.items()], by_hand=True))
    resolved = _combine(layers, default_name=gathered.default_name, notes=gathered.notes, cwd=cwd)
    secrets_scan.check(resolved.job, resolved.origins, secrets_scan.secrets_of(environ))
    return replace(resolved, files=(*gathered.files, *resolved.files))


def resolve_each(words: Iterable[str], points: Iterable[Sequence[str]], environ: Mapping[str, str], cwd: Path, load_site: LoadSite) -> list[Resolved]:
    """What `resolve` says to `words` with the words of each point behind them. Files and environment are read once.

    Raises as `resolve` does, and SettingError for a point that names another job file or site."""
    gathered = gather(words, environ, cwd, load_site, None)
    # Made plain once: the words of a mapping are YAML, and YAML takes its time.
    below = [replace(layer, given=[replace(given, value=plain(given)) for given in layer.given]) for layer in (*gathered.below, gathered.command_line)]
    each, secrets = [], secrets_scan.secrets_of(environ)
    for point in points:
        pairs, named, faults = split_words(point)
        moved = [key for key, _ in pairs if setting_name(key) == "site"]
        if named is not None or moved:
            raise SettingError(f"{'SITE' if moved else 'JOB'} is the same for all runs that are submitted together (command line).")
        command_line = Layer(list(below[-1].given), [*below[-1].faults, *faults], by_hand=True)
        for key, value in pairs:
            command_line.add(key, value, "command line")
        resolved = _combine([*below[:-1], command_line], default_name=gathered.default_name, notes=(*gathered.notes, *alias_notes(pairs)), cwd=cwd)
        secrets_scan.check(resolved.job, resolved.origins, secrets)
        each.append(replace(resolved, files=(*gathered.files, *resolved.files)))
    return each


def load(path: Path) -> Job:
    """The job of a run directory's job.yaml: nothing but the file counts."""
    values = read_run_yaml(path)
    try:
        job = Job(**values)
    except ValidationError as err:
        raise SettingError("\n".join(faults_of(err, {name: str(path) for name in values}, values))) from err
    # What a cut or foreign file does not have would be the defaults, and the run another training.
    if "job_name" not in values:
        raise DamagedFileError(f"{path}: has no job_name, which every run has")
    return job


def given_values(job: Job, origins: Mapping[str, str]) -> dict[str, Any]:
    """The values of a frozen job as `amend` takes them: without those that followed from others, so that they follow anew.

    The name stays: it names the folder."""
    follows = {name for name, origin in origins.items() if origin == "derived" or (origin == debug_mode.ORIGIN and name in validation.BATCH_PARTS)}
    return {name: value for name, value in job.model_dump(mode="json").items() if name not in follows or name == "job_name"}


def amend(values: Mapping[str, Any], origins: Mapping[str, str], words: Iterable[str], origin: str = "command line") -> Resolved:
    """The job that these frozen values describe with KEY=value words over them; what the words gave has `origin` for origin.

    A value left out of `values` follows anew. Raises as `resolve` does."""
    pairs, named, faults = split_words(words)
    if named is not None:
        faults.append(f"{shorten(named)!r} is neither a setting nor expected here ({origin}).")
    command_line = Layer(faults=faults)
    for key, value in pairs:
        command_line.add(key, value, origin)
    # Beside warmup_steps the share counted for nothing, wherever it came from.
    void = {"warmup_pct"} if values.get("warmup_steps") is not None else set()
    frozen = Layer([Given(name, value, origins.get(name, "default")) for name, value in values.items() if name not in void])
    resolved = _combine([frozen, command_line], default_name=str(values["job_name"]), notes=alias_notes(pairs))
    secrets_scan.check(resolved.job, resolved.origins, {})
    return resolved


def _combine(layers: list[Layer], default_name: str, notes: tuple[str, ...], cwd: Path | None = None) -> Resolved:
    faults = [fault for layer in layers for fault in layer.faults]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    rank: dict[str, int] = {}
    for index, layer in enumerate(layers):
        for given in layer.given:
            values[given.name], origins[given.name], rank[given.name] = plain(given), given.origin, index
    merge_amp_words(values, origins, rank, faults)
    for name in sorted(filter(is_mapping, values)):
        faults += lr_suggestions.inside(name, values[name], origins[name])
    merge_warmup(values, origins, rank, faults)
    values.setdefault("job_name", _slug_of(default_name))
    origins.setdefault("job_name", "derived")
    taken: tuple[str, ...] = ()
    if str(values.get("precision")).lower() == AUTO:
        taken = take_advice(values, origins, faults, cwd)
    job = None
    try:
        job = Job(**values)
    except ValidationError as err:
        faults.extend(faults_of(err, origins, values))
    if faults or job is None:
        raise SettingError("\n".join(faults))

    if cwd is not None:  # a run that exists keeps its sizes
        shrunk = debug_mode.small(job, {given.name for layer in layers if layer.by_hand for given in layer.given})
        origins |= {name: debug_mode.ORIGIN for name in shrunk if shrunk[name] != getattr(job, name)}
        job = job.model_copy(update=shrunk)
    problems, derived = validation.check(job, origins)
    if problems:
        raise ImpossibleJobError("This job cannot run as asked:\n" + "\n".join(f"  {problem}" for problem in problems))
    job = job.model_copy(update=derived)
    complete = {name: origins.get(name, "default") for name in Job.model_fields}
    # Cleared by `none`, it follows as if it had been left out.
    complete |= {name: "derived" for name in derived if complete[name] == "default" or values.get(name) is None}
    return Resolved(job, complete, notes, taken)


def _slug_of(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:64] or "job"

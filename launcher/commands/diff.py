"""`holdfast diff RUN RUN`: in what two runs differ, and whether they came to the same result."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.checkpoint import directory
from jobs.config.resolver import load
from jobs.config.settings import Job, names
from jobs.core import safe_read
from jobs.core.contract import Cause, Exit
from jobs.core.errors import CheckpointError, DamagedFileError, NotFoundError
from jobs.run import event_log, metrics_log, rundir
from jobs.run.rundir import RunDir
from launcher.output import settings_table, table
from launcher.status import lookup
from launcher.submission import snapshot

# Which run it is, not what it does.
_NAMES = frozenset({"run_id", "runs_dir"})
# Of a line of metrics: when, how fast and in how much memory, not what came out (train/metrics/throughput.py has the names).
_SPEED = re.compile(r"time|attempt|step|tflops|peak_pct|\w+_per_s|\w+_wait_pct|\w*memory\w*|\w+_gb")


@dataclass(frozen=True)
class Result:
    """What a run came to: `weights` is the sha256 of each file that holds them, of the newest checkpoint."""

    state: str
    step: int
    attempts: int
    lost_steps: int
    values: dict[str, Any]
    weights: dict[str, str]


@dataclass(frozen=True)
class Difference:
    """Of two runs. Empty collections where they are alike; `result` holds the names of what came out differently."""

    settings: dict[str, tuple[str, str, str, str]] = field(default_factory=dict)  # name -> value, origin, value, origin
    commits: tuple[str, str] = ("", "")
    files: dict[str, str] = field(default_factory=dict)  # path -> M, A (only in the second) or D (only in the first)
    versions: dict[str, tuple[str, str]] = field(default_factory=dict)
    result: list[str] = field(default_factory=list)

    @property
    def any(self) -> bool:
        return bool(self.settings or self.files or self.versions or self.result)


def diff(first: RunDir, second: RunDir, *, code: bool, as_json: bool) -> int:
    """Prints the differences. Returns 0 when there are none and 1 when there are, as diff(1) does."""
    for run in (first, second):
        if run.has_members:
            raise NotFoundError(lookup.name_a_task(run))
    found, results = compare(first, second), (result_of(first), result_of(second))
    if as_json:
        print(json.dumps(_plain(first, second, found, results), indent=1))
    else:
        _print(first, second, found, results)
        if code:
            print(_unified(first, second, found.files), end="")
    return Exit.FAILED if found.any else Exit.DONE


def compare(first: RunDir, second: RunDir) -> Difference:
    return Difference(
        settings=changed_settings(first, second),
        commits=(_commit(first), _commit(second)),
        files=changed_files(snapshot.read_sums(first), snapshot.read_sums(second)),
        versions=changed_versions(versions_of(first), versions_of(second)),
        result=_other_results(first, second),
    )


def changed_settings(first: RunDir, second: RunDir) -> dict[str, tuple[str, str, str, str]]:
    jobs, origins = (load(first.job_yaml), load(second.job_yaml)), (rundir.origins(first), rundir.origins(second))
    return {
        name: (*_said(jobs[0], name, origins[0]), *_said(jobs[1], name, origins[1]))
        for name in names()
        if name not in _NAMES and getattr(jobs[0], name) != getattr(jobs[1], name)
    }


def changed_files(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """Path -> M, A or D, from the sums of two frozen trees."""
    return {path: "D" if path not in second else "A" if path not in first else "M" for path in sorted({*first, *second}) if first.get(path) != second.get(path)}


def changed_versions(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What both know and do not agree about; where one was never asked, nothing is known."""
    return {name: (first[name], second[name]) for name in sorted({*first} & {*second}) if first[name] != second[name]}


def versions_of(run: RunDir) -> dict[str, str]:
    """What the nodes had, as the newest checkpoint says; where it is silent, what was installed where the run was submitted."""
    versions = {str(name): str(text) for name, text in snapshot.facts_of(run).get("versions", {}).items()}
    for path in directory.complete(run.checkpoints)[:1]:
        try:
            versions |= {str(name): str(text) for name, text in directory.read_manifest(path).state.get("versions", {}).items() if name != "platform"}
        except (CheckpointError, AttributeError):
            pass
    return versions


def result_of(run: RunDir) -> Result:
    """What a run came to, as far as it came."""
    attempts, lines = event_log.attempts(event_log.read(run.ledger)), metrics_log.tail(run.metrics)
    weights: dict[str, str] = {}
    step = int(lines[-1]["step"]) if lines else 0
    for path in directory.complete(run.checkpoints)[:1]:
        try:
            manifest = directory.read_manifest(path)
        except CheckpointError:
            break
        own = bool(manifest.state.get(directory.OWN))
        weights = {name: entry.sha256 for name, entry in manifest.files.items() if own or name.startswith(f"{directory.MODEL}.")}
        step = max(step, manifest.step)
    last = attempts[-1].cause if attempts else None
    state = "never started" if not attempts else last.value.replace("_", " ") if last else "running"
    values = {name: value for name, value in (lines[-1] if lines else {}).items() if not _SPEED.fullmatch(name)}
    return Result(state, step, len(attempts), sum(attempt.lost_steps for attempt in attempts), values, weights)


def same_weights(first: RunDir, second: RunDir) -> bool | None:
    """Whether both ended with the same weights, bit for bit; None where they are not at the same step."""
    one, two = result_of(first), result_of(second)
    return None if not one.weights or not two.weights or one.step != two.step else one.weights == two.weights


def _other_results(first: RunDir, second: RunDir) -> list[str]:
    """What differs at the last step that both have logged, and the weights where both are at the same step. Before both have
    trained, nothing is said."""
    steps = [{int(line["step"]) for line in metrics_log.lines(run.metrics)} for run in (first, second)]
    common = sorted(steps[0] & steps[1])[-1:]
    lines = [{int(line["step"]): line for line in metrics_log.lines(run.metrics) if int(line["step"]) in common} for run in (first, second)]
    other = [
        name
        for step in common
        for name in lines[0][step]
        if not _SPEED.fullmatch(name) and name in lines[1][step] and lines[0][step][name] != lines[1][step][name]
    ]
    if same_weights(first, second) is False:
        other.append("weights")
    if common and (one := result_of(first)).state != (two := result_of(second)).state and Cause.FINISHED.value in (one.state, two.state):
        other.append("state")
    return other


def _said(job: Job, name: str, origins: Mapping[str, str]) -> tuple[str, str]:
    return settings_table.masked(name, job) or "-", origins.get(name, "default")


def _commit(run: RunDir) -> str:
    facts = snapshot.facts_of(run)
    commit = str(facts.get("commit", ""))[:10]
    return f"{commit} with uncommitted changes" if commit and facts.get("dirty") else commit or "not in git"


def _unified(first: RunDir, second: RunDir, files: Mapping[str, str]) -> str:
    """The changes of text files as diff -u writes them."""
    parts = []
    for path in files:
        try:
            before, after = (_lines(run.code / path) for run in (first, second))
        except (DamagedFileError, UnicodeDecodeError):
            parts.append(f"{path}: not text\n")
            continue
        lines = difflib.unified_diff(before, after, f"{first.id}/{path}", f"{second.id}/{path}")
        parts.append("".join(line if line.endswith("\n") else f"{line}\n" for line in lines))
    return "".join(parts)


def _lines(path: Path) -> list[str]:
    """Lines of a text file; none where there is no such file. Raises UnicodeDecodeError, DamagedFileError."""
    try:
        return safe_read.read_bytes(path, links=True).decode().splitlines(keepends=True)
    except FileNotFoundError:
        return []


def _plain(first: RunDir, second: RunDir, found: Difference, results: tuple[Result, Result]) -> dict[str, Any]:
    return {
        "runs": [first.id, second.id],
        "same": not found.any,
        "settings": {name: {"values": [said[0], said[2]], "from": [said[1], said[3]]} for name, said in found.settings.items()},
        "code": {"commits": list(found.commits), "files": found.files},
        "versions": {name: list(pair) for name, pair in found.versions.items()},
        "result": {"different": found.result, "runs": [vars(result) for result in results]},
    }


def _print(first: RunDir, second: RunDir, found: Difference, results: tuple[Result, Result]) -> None:
    print(f"{first.id} -> {second.id}")
    print("settings    " + ("the same" if not found.settings else ""))
    for name, (before, where, after, there) in found.settings.items():
        print(f"  {name.upper():<22} {before} ({where}) -> {after} ({there})")
    count = len(found.files)
    print("code        " + code_line(found, len(snapshot.read_sums(second))))
    for path, letter in list(found.files.items())[:20]:
        print(f"  {letter} {path}")
    if count > 20:
        print(f"  and {count - 20} more")
    print("libraries   " + (", ".join(f"{name} {before} -> {after}" for name, (before, after) in found.versions.items()) or "the same"))
    print("result")
    shown = table.columns("", first.id, second.id, "")
    rows: list[tuple[str, str, str, str]] = [("state", results[0].state, results[1].state, "")]
    rows.append(("attempts", *(f"{result.attempts}, {result.lost_steps} steps lost" for result in results), ""))  # type: ignore[arg-type]
    rows.append(("step", f"{results[0].step:,}", f"{results[1].step:,}", ""))
    for name in dict.fromkeys([*results[0].values, *results[1].values]):
        values = [result.values.get(name) for result in results]
        rows.append((name, *(_number(value) for value in values), "" if None in values else "the same" if values[0] == values[1] else "different"))  # type: ignore[arg-type]
    for row in rows:
        shown.add_row(*row)
    table.show(shown)
    same = same_weights(first, second)
    print("weights     " + {True: "identical, bit for bit", False: "different", None: "not comparable: no checkpoint of the same step"}[same])


def code_line(found: Difference, total: int) -> str:
    """One line about the code of two runs."""
    commits = found.commits[0] if found.commits[0] == found.commits[1] else f"{found.commits[0]} -> {found.commits[1]}"
    what = f"the same {total} files" if not found.files else f"{len(found.files)} files differ" if len(found.files) > 1 else "1 file differs"
    return f"{what} ({commits})"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def named_pair(runs: list[RunDir], folder: Path) -> tuple[RunDir, RunDir]:
    """The two runs of a diff. Raises NotFoundError when not two are named."""
    if len(runs) != 2:
        raise NotFoundError(f"diff compares two runs, {len(runs)} were named: holdfast diff RUN RUN (runs are in {folder}/)")
    return runs[0], runs[1]

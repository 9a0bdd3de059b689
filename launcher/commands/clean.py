"""`holdfast clean`: takes old runs away, and nothing else. It shows what it would do until it is told --yes.

Only a directory that is certainly a run of this user, and certainly over, is touched: it is renamed aside first, so that
nobody finds half of it under its name. Everything else is left, and the reason said.
"""

import contextlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.checkpoint import directory
from jobs.config.resolver import load
from jobs.core import remove_tree, safe_read
from jobs.core.contract import Event, Exit
from jobs.core.errors import DamagedFileError, HoldfastError, SettingError
from jobs.run import claim, event_log, store
from jobs.run.rundir import RunDir
from jobs.sweep import search_space
from launcher.output import table
from launcher.status import run_state, run_status
from launcher.sweeps.trial_values import values_of

# What lies aside for so long was left by a command that was killed.
_LEFTOVER_S = 86_400.0
# A run without an end that was written to within so many seconds may be at work where nobody can see it from here.
_FRESH_S = 3600.0
_UNITS = {"h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}
_LIVE = ("running", "waiting")


@dataclass
class Candidate:
    """One run, or array of runs, that was looked at. `why_left` is empty when it goes; `damage` is what cannot be read of it."""

    run: str
    path: str
    state: str
    touched: float
    bytes: int
    why_left: str = ""
    removed: bool = False
    damage: str = ""


def clean(folder: Path, named: Sequence[RunDir], *, older: str | None, failed: bool, keep_checkpoints: bool, yes: bool, as_json: bool) -> int:
    """Shows what would go and what stays, and with `yes` does it. 1 when something could not be removed."""
    age_s = parse_age(older) if older else None
    chosen = bool(named) or failed or age_s is not None
    queue, trouble = run_status.ask_queue()
    candidates = [_look(run, queue, bool(trouble)) for run in (named or store.runs_and_arrays(folder))]
    needed = _needed(folder)
    for one in candidates:
        one.why_left = one.why_left or (_why_damaged_left(one, bool(named)) if one.damage else "") or _why_left(one, age_s, failed, chosen, needed)
    going = [one for one in candidates if not one.why_left]
    frees = sum(_frees(RunDir(Path(one.path)), keep_checkpoints) if keep_checkpoints else one.bytes for one in going)
    problems: list[str] = []
    if yes and chosen:
        for one in going:
            said = _remove(RunDir(Path(one.path)), keep_checkpoints)
            one.removed = not said
            problems += said
        problems += _clear_leftovers(folder)
    if as_json:
        print(json.dumps({"dry_run": not yes, "bytes": frees, "runs": [asdict(one) for one in candidates], "problems": problems}, indent=1))
    else:
        _print(candidates, going, frees, folder, trouble, chosen, yes, keep_checkpoints, problems)
    return Exit.FAILED if problems else Exit.DONE


def parse_age(text: str) -> float:
    """Seconds of 12h, 30d or 4w. Raises SettingError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", text.strip())
    if not found:
        raise SettingError(f"--older {text!r}: write a number of hours, days or weeks, such as 12h, 30d or 4w.")
    return float(found[1]) * _UNITS[found[2]]


def _look(run: RunDir, queue: dict[str, tuple[str, str, str]] | None, silent: bool) -> Candidate:
    """What a run is doing. `silent`: there is a Slurm, and it did not answer."""
    why = not_ours(run)
    if why:
        return Candidate(run.id, str(run.path), "", 0.0, 0, why)
    try:
        return _look_at(run, queue, silent)
    except DamagedFileError as err:
        return Candidate(run.id, str(run.path), "damaged", _last_touched(run), size_of(run.path), damage=str(err))


def _look_at(run: RunDir, queue: dict[str, tuple[str, str, str]] | None, silent: bool) -> Candidate:
    """As `_look`, of a directory that is a run of this user. Raises DamagedFileError."""
    numbers = [number for path in run.members.iterdir() if (number := safe_read.index_of(path.name)) is not None] if run.has_members else []
    members = [run.member(number) for number in numbers] if run.has_members else [run]
    rows = run_status.collect([member for member in members if os.path.lexists(member.job_yaml)], queue)
    damage = next((row.note for row in rows if row.state == "damaged"), "")
    states = {row.state for row in rows} | ({"waiting"} if queue is None and _not_begun(run, members) else set())
    touched = max(_touched(one) for one in {run, *members})
    why = ""
    state = next((word for word in (*_LIVE, "damaged", "stopped", "failed", "cancelled") if word in states), "finished" if states else "stopped")
    if state in _LIVE:
        why = f"it is {state}"
    elif any(_is_queued(one, queue) for one in {run, *members}):
        why = "a job of it is queued"
    elif elsewhere := next(filter(None, (run_state.begun_elsewhere(one, event_log.attempts(event_log.read(one.ledger))) for one in members)), ""):
        why = f"it was {elsewhere}"
    elif silent and state != "finished":
        why = "Slurm does not answer, so nobody knows whether it is queued"
    elif damage and queue is None and any(_is_open(one) for one in members):
        why = f"its last attempt has no end, and it is damaged: {damage}"
    elif state == "stopped" and time.time() - touched < _FRESH_S and any(_is_open(one) for one in members):
        # A submit that is at work just now, another cluster's job: from here nobody can see them.
        why = f"it has no end yet and was written to {run_status.ago(touched)}"
    return Candidate(run.id, str(run.path), state, touched, size_of(run.path), why, damage=damage)


def _last_touched(run: RunDir) -> float:
    """As `_touched` where anything of a run may be unreadable, of an array over all of its tasks."""
    paths = [path for one in (run, *store.members_of(run)) for path in (one.job_yaml, one.ledger, one.metrics)]
    return max((os.lstat(path).st_mtime for path in paths if os.path.lexists(path)), default=0.0)


def _touched(run: RunDir) -> float:
    """When something of a run was last written. Raises DamagedFileError."""
    attempt = run.attempt(claim.newest(run))
    return max((path.stat().st_mtime for path in (run.job_yaml, run.ledger, run.metrics, attempt.progress) if path.exists()), default=0.0)


def _is_open(run: RunDir) -> bool:
    """Whether the ledger leaves it open that something is at work: nothing was written yet, or an attempt has no end."""
    events = event_log.read(run.ledger)
    attempts = event_log.attempts(events)
    return not events or (bool(attempts) and attempts[-1].cause is None)


def _is_queued(run: RunDir, queue: dict[str, tuple[str, str, str]] | None) -> bool:
    """Whether Slurm has any job that ever belonged to a run, whatever the run's own state: a job array is one number for all."""
    known = {str(job_id).partition("_")[0] for event in event_log.read(run.ledger) for job_id in (event["job_id"], event.get("successor"))}
    return any(job_id.partition("_")[0] in known for job_id in queue or {})


def _not_begun(run: RunDir, members: Sequence[RunDir]) -> bool:
    """Whether a sweep that was submitted has trials that nobody has taken up: where Slurm cannot be asked, they wait."""
    submitted = run.has_members and any(event["event"] == Event.SUBMITTED for event in event_log.read(run.ledger))
    return submitted and any(not member.job_yaml.exists() and not values_of(member)[1] for member in members)


def not_ours(run: RunDir) -> str:
    """Why a path must not be touched whatever its state; empty where it is a run directory of this user."""
    try:
        found = os.lstat(run.path)
        job = os.lstat(run.job_yaml)
    except OSError as err:
        return f"it cannot be read: {err.strerror}"
    if stat.S_ISLNK(found.st_mode):
        return "it is a symbolic link"
    if run.is_member:
        return f"it is one task of an array; name the array, {run.path.parent.parent.name}"
    if link := _link_in(run):
        return f"{link} is a symbolic link, or belongs to somebody else"
    if not stat.S_ISREG(job.st_mode):
        return f"its job.yaml is no regular file, so it may be something else ({run.job_yaml})"
    if not run.logs.is_dir():
        return "it is no run directory of ours"
    if found.st_uid != os.geteuid():
        return "it belongs to somebody else"
    if os.path.ismount(run.path):
        return "something is mounted there"
    try:
        load(run.job_yaml)
    except HoldfastError:
        return "its job.yaml cannot be read, so it may be something else"
    return ""


def _why_damaged_left(one: Candidate, named: bool) -> str:
    """A damaged run goes only where it is named: nobody can tell from its files whether it is over."""
    if not named:
        return f"it is damaged: {one.damage}; name it to remove it"
    # A job of it may be at work, whose id the files do not tell.
    return f"it is damaged ({one.damage}) and was written to {run_status.ago(one.touched)}" if time.time() - one.touched < _FRESH_S else ""


def _link_in(run: RunDir) -> str:
    """The first of the directories of an array, relative to it, that is not itself a directory of this user; empty where there is none."""
    try:
        entries = [run.members, *sorted(run.members.iterdir())] if os.path.lexists(run.members) else []
        for path in entries:
            found = os.lstat(path)
            # A file between the tasks is none of them.
            if stat.S_ISLNK(found.st_mode) or (stat.S_ISDIR(found.st_mode) and found.st_uid != os.geteuid()):
                return str(path.relative_to(run.path))
    except OSError as err:
        return f"{err.filename} ({err.strerror})"
    return ""


def _why_left(one: Candidate, age_s: float | None, failed: bool, chosen: bool, needed: dict[str, str]) -> str:
    if not chosen:
        return "not chosen"
    if age_s is not None and time.time() - one.touched < age_s:
        return f"last touched {run_status.ago(one.touched)}"
    if failed and one.state != "failed":
        return f"it is {one.state}, not failed"
    places = {one.path, os.path.realpath(one.path)}
    user = next((run for path, run in needed.items() if any(path == place or path.startswith(place + os.sep) for place in places)), "")
    return f"run {user} starts from it" if user and user != one.run else ""


def _needed(folder: Path) -> dict[str, str]:
    """Path -> run, of everything that a run which is there takes its weights from. Of an array also what its tasks will begin with."""
    found: dict[str, str] = {}
    arrays = [run for run in store.runs_and_arrays(folder) if run.has_members]
    for run in [*store.all_runs(folder), *arrays]:
        try:
            wanted = [load(run.job_yaml).init_from]
            if run.has_members and run.sweep.exists():
                wanted += [choice for dimension in search_space.load(run.sweep).over if dimension.name == "init_from" for choice in dimension.choices]
        except HoldfastError:
            continue
        for path in filter(None, wanted):
            # Both as it is written and where it leads: on either way may be a link.
            written = os.path.abspath(os.path.expanduser(path))
            found |= {written: run.id, os.path.realpath(written): run.id}
    return found


def size_of(path: Path) -> int:
    """Bytes that a folder takes on the disk; links are not followed."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except OSError:
                continue
    return total


def _keeps(run: RunDir, keep_checkpoints: bool) -> bool:
    """Whether anything of a run or an array stays: without a checkpoint there is nothing to keep its records for."""
    return keep_checkpoints and any(directory.complete(one.checkpoints) for one in (run, *store.members_of(run)))


def _frees(run: RunDir, keep_checkpoints: bool) -> int:
    """Bytes that go when a run or an array does."""
    if not _keeps(run, keep_checkpoints):
        return size_of(run.path)
    return sum(_size_of_entry(one.path / name) for one in (run, *store.members_of(run)) for name in _doomed(one, os.listdir(one.path)))


def _size_of_entry(path: Path) -> int:
    found = os.lstat(path)
    return size_of(path) if stat.S_ISDIR(found.st_mode) else found.st_blocks * 512


def _remove(run: RunDir, keep_checkpoints: bool) -> list[str]:
    """Takes a run or an array away, or all of it but what `ckpt`, `diff` and `sweep show` need. Returns what went wrong.

    Everything is renamed and deleted relative to directories that were opened without following links."""
    keeps = _keeps(run, keep_checkpoints)
    try:
        with remove_tree.opened(run.path.parent, follow=True) as runs_dir, remove_tree.opened(run.path.name, runs_dir) as opened:
            if os.fstat(opened).st_uid != os.geteuid():
                return [f"{run.path}: it belongs to somebody else"]
            if not keeps:
                return _away(runs_dir, run.path.name, run.path, os.fstat(opened))
            problems = _strip(run, opened)
            if run.members.name in os.listdir(opened):
                with remove_tree.opened(run.members.name, opened) as members:
                    # The tasks that have no checkpoint keep their records too: without them a sweep would take its failed trials for missing ones.
                    for member in store.members_of(run):
                        with remove_tree.opened(member.path.name, members) as folder:
                            problems += _strip(member, folder)
            return problems
    except OSError as err:
        return [f"{run.path}: {err.filename or ''} {err.strerror}; a link or something else is in its place"]


def _doomed(run: RunDir, entries: Iterable[str]) -> list[str]:
    """All of one run but its checkpoints and its records; of an array its tasks stay."""
    records = (run.job_yaml, run.origins, run.snapshot, run.diff, run.code_sums, run.ledger, run.metrics, run.script, run.sweep, run.study, run.trial)
    kept = {path.name for path in (run.checkpoints, run.members, *records)}
    return sorted(name for name in entries if name not in kept)


def _strip(run: RunDir, folder: int) -> list[str]:
    problems = [problem for name in _doomed(run, os.listdir(folder)) for problem in _away(folder, name, run.path / name)]
    # Without its logs it would no longer be known for a run directory.
    with contextlib.suppress(FileExistsError):
        os.mkdir(run.logs.name, dir_fd=folder)
    return problems


def _away(parent: int, name: str, shown: Path, expected: os.stat_result | None = None) -> list[str]:
    return remove_tree.rename_and_remove(parent, name, f"{store.TRASH}{name.lstrip('.')}-{secrets.token_hex(4)}", shown, expected)


def _clear_leftovers(folder: Path) -> list[str]:
    """What commands that were killed have left aside, where it is old enough to be nobody's work in progress."""
    problems: list[str] = []
    if not folder.is_dir():
        return problems
    with remove_tree.opened(folder, follow=True) as opened:
        for name in sorted(os.listdir(opened)):
            if not name.startswith((store.TRASH, store.STAGING)):
                continue
            found = os.lstat(name, dir_fd=opened)
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and time.time() - found.st_mtime > _LEFTOVER_S:
                problems += remove_tree.remove_entry(opened, name, folder / name)
    return problems


def _print(
    candidates: Sequence[Candidate],
    going: Sequence[Candidate],
    frees: int,
    folder: Path,
    trouble: str,
    chosen: bool,
    yes: bool,
    keep_checkpoints: bool,
    problems: Sequence[str],
) -> None:
    if trouble:
        print(trouble)
    if not candidates:
        print(f"no runs in {run_status.near(folder)}/")
        return
    rows = table.columns("run", "state", "last touched", "size", "")
    for one in candidates:
        verdict = (
            ("removed" if one.removed else "could not be removed") if yes and not one.why_left else "would go" if not one.why_left else f"left: {one.why_left}"
        )
        rows.add_row(
            one.run,
            one.state or "-",
            run_status.ago(one.touched) if one.touched else "-",
            gigabytes(one.bytes) if one.bytes else "-",
            verdict if chosen or one.why_left != "not chosen" else "",
        )
    table.show(rows)
    for problem in problems:
        print(f"could not be removed: {problem}")
    total = gigabytes(frees)
    if not chosen:
        print("nothing is chosen: name runs, or say --older 30d or --failed")
    elif not yes:
        but = ", all but their checkpoints and their records," if keep_checkpoints else ""
        print(f"{len(going)} of {len(candidates)} runs{but} would go, {total}; nothing was removed: --yes does it")
    else:
        print(
            f"{sum(one.removed for one in going)} of {len(candidates)} runs removed{' but for their checkpoints and records' if keep_checkpoints else ''}, {total}"
        )


def gigabytes(count: int) -> str:
    """1.3 GB, or 0.4 MB where that is less than a tenth of one."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

"""Where the time of a run went, for its report: the parts of the ledger's account, and what each kind of interruption cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.core.contract import Cause
from jobs.run import goodput
from jobs.run.rundir import RunDir
from launcher.attempt.evidence import clock_record

# Title and meaning of each part, in the order of the bar.
PARTS = {
    "useful": ("useful", "optimizer steps that count"),
    "start_up": ("start-up", "checks of the nodes, imports, rendezvous, data, model"),
    "restore": ("restore", "verifying and loading the checkpoint"),
    "first_step": ("compile, first step", "what the first step took beyond an ordinary one"),
    "data_wait": ("data wait", "waiting for samples"),
    "save_stall": ("checkpoint", "training standing still for a save"),
    "evaluation": ("validation", "asked for, and not training"),
    "lost": ("lost", "steps that had to be made again, or were never finished"),
    "stop": ("stop", "from the last step, or the fault, to the end of the attempt"),
    "hang": ("hang", "no progress until the watchdog ended it"),
    "script": ("own script", "what it did inside is not known"),
    "other": ("other", "what nothing above explains"),
}
# What an interruption costs after it: the next attempt has to begin again.
_BEGINNING_AGAIN = ("start_up", "restore", "first_step")


def time_of(run: RunDir, events: Sequence[Mapping[str, Any]], now: float | None) -> dict[str, Any]:
    """Seconds and GPU-hours by part, the time in the queue, and the cost of interruptions by cause. `now` counts a running attempt in."""
    newest = max((int(event["attempt"]) for event in events if event["event"] == "start"), default=0)
    account = goodput.account(events, now=now, open_record=clock_record(run, newest) if now is not None else None)
    known = [name for name in PARTS if account.parts_s.get(name)] + [name for name, seconds in account.parts_s.items() if seconds and name not in PARTS]
    gpu_total = account.gpu_hours
    parts = [
        {
            "name": name, "title": PARTS.get(name, (name.replace("_", " "), ""))[0], "meaning": PARTS.get(name, ("", ""))[1], "seconds": account.parts_s[name],
            "gpu_hours": account.parts_gpu_hours[name], "share": account.parts_gpu_hours[name] / gpu_total if gpu_total else 0.0,
        }
        for name in known
    ]  # fmt: skip
    return {
        "parts": parts, "allocation_s": account.allocation_s, "queue_s": account.queue_s, "gpu_hours": gpu_total, "useful_share": account.useful_share,
        "measured": any(name not in ("other", "script") for name in known), "interruptions": _interruptions(account.attempts),
    }  # fmt: skip


def _interruptions(attempts: Sequence[goodput.Spent]) -> list[dict[str, Any]]:
    """One row for each cause that ended an attempt before the run was finished. Costs are GPU-hours, the wait is wall time."""
    rows: dict[str, dict[str, Any]] = {}
    for index, attempt in enumerate(attempts):
        if attempt.cause in (None, Cause.FINISHED):
            continue
        row = rows.setdefault(str(attempt.cause), {"cause": str(attempt.cause), "count": 0, "lost": 0.0, "stop": 0.0, "again": 0.0, "queue_s": 0.0})
        row["count"] += 1
        row["lost"] += (attempt.parts_s.get("lost", 0.0) + attempt.parts_s.get("hang", 0.0)) * attempt.gpus / 3600
        row["stop"] += attempt.parts_s.get("stop", 0.0) * attempt.gpus / 3600
        if index + 1 < len(attempts):
            after = attempts[index + 1]
            row["again"] += sum(after.parts_s.get(part, 0.0) for part in _BEGINNING_AGAIN) * after.gpus / 3600
            row["queue_s"] += max(after.started - attempt.started - attempt.seconds, 0.0)
    for row in rows.values():
        row["gpu_hours"] = row["lost"] + row["stop"] + row["again"]
    return sorted(rows.values(), key=lambda row: -row["gpu_hours"])

"""The page of a report: one HTML file with everything in it, that asks nothing of any network.

Text of a run (its name, note, diff, log lines) enters the page escaped, or as text that the page's own script puts there; a
content policy with the hash of that script forbids every other one.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core.atomic_write import replace_file
from jobs.core.contract import Exit
from jobs.core.errors import SettingError
from jobs.run.rundir import RunDir
from launcher.report import collect
from launcher.report.time_account import PARTS
from launcher.status import run_status

if TYPE_CHECKING:
    import jinja2


def write_report(named: Sequence[RunDir], out: Path | None, as_json: bool) -> int:
    """Writes the page of these runs and arrays (or prints the figures as JSON). Returns the exit code. Raises SettingError where no
    place for it was named."""
    runs, first = collect.members_of(named), named[0]
    if len(named) > 1 and out is None and not as_json:
        raise SettingError(f"{len(runs)} runs in one report: say where it goes, as in --out comparison.html")
    if out is not None and not out.name:
        raise SettingError(f"--out {str(out)!r} is no file; name one, as in --out report.html")
    figures = collect.figures_of(runs)
    if as_json:
        print(json.dumps(figures, indent=1))
        return Exit.DONE
    path = out or first.report
    try:
        replace_file(path, page(figures, first.id))
    except OSError as err:
        hint = "" if out else "; --out FILE writes it elsewhere"
        raise SettingError(f"{run_status.near(path)} cannot be written: {err.strerror}{hint}") from err
    for run in figures["runs"]:
        print(_line(run))
    if not runs:
        print(f"{first.id}: none of its tasks has begun yet")
    if figures["thinned"]:
        print(f"curves are thinned to {figures['points_of_a_curve']} points each, lowest and highest values kept")
    print(f"report  ->  {run_status.near(path)} ({path.stat().st_size / 1e6:.1f} MB, needs no network)")
    return Exit.DONE


def _line(run: Mapping[str, Any]) -> str:
    final, time = run["final"], run["time"]
    if run["state"] == "damaged":
        return f"{run['id']}: damaged: {run['note']}"
    parts = [f"{run['id']}: {run['state']}", f"step {final['step']:,}/{final['max_steps']:,}"]
    parts += [f"loss {final['loss']:.4f}"] if final["loss"] is not None else []
    parts += [f"{len(run['attempts'])} attempt{'s' if len(run['attempts']) > 1 else ''}"] if run["attempts"] else []
    parts += [f"{time['useful_share']:.1%} of {_hours(time['gpu_hours'])} GPU-hours useful"] if time["useful_share"] is not None and time["measured"] else []
    return " · ".join(parts)


def page(figures: Mapping[str, Any], name: str = "") -> str:
    """The HTML of `report.figures_of`. `name` is that of an array: before its first task has begun there is no run to call it by."""
    script = _own("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    runs = figures["runs"]
    drawn = {"figures": figures["figures"], "runs": [{name: run[name] for name in ("id", "curves", "overflows", "attempts")} for run in runs]}
    return _template().render(
        **figures,
        css=_own("report.css"),
        script=script,
        digest=digest,
        data=_in_script(drawn),
        rows=_setting_rows(runs),
        parts=_part_rows(runs),
        title=name if not runs else runs[0]["id"] if len(runs) == 1 else f"{len(runs)} runs compared",
    )


def _in_script(value: Any) -> str:
    """JSON that may stand inside a <script> element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _setting_rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each setting: its value in every run, and whether somebody chose it or the runs differ."""
    tables = [{setting["name"]: setting for setting in run["settings"]} for run in runs]
    rows = []
    for name in dict.fromkeys(name for table in tables for name in table):
        cells = [table.get(name) for table in tables]
        known = [cell for cell in cells if cell]
        rows.append({
            "name": name, "cells": cells, "unit": known[0]["unit"], "meaning": known[0]["meaning"],
            "chosen": any(cell["from"] not in ("default", "derived") for cell in known),
            "differs": len({cell["value"] if cell else None for cell in cells}) > 1,
        })  # fmt: skip
    return rows


def _part_rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each part of the time, with every run's cell."""
    rows: dict[str, dict[str, Any]] = {}
    for index, run in enumerate(runs):
        for part in run["time"]["parts"]:
            row = rows.setdefault(part["name"], {"name": part["name"], "title": part["title"], "meaning": part["meaning"], "cells": [None] * len(runs)})
            row["cells"][index] = part
    order = list(PARTS)
    return sorted(rows.values(), key=lambda row: order.index(row["name"]) if row["name"] in order else len(order))


@lru_cache
def _template() -> "jinja2.Template":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(resources.files("launcher") / "report" / "templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": _duration,
        "number": _number,
        "clock": _clock,
        "hours": _hours,
        "percent": _percent,
        "short": _short,
        "lines": _lines,
        "words": _words,
    }
    return environment.get_template("report.html.j2")


def _own(name: str) -> str:
    return (resources.files("launcher") / "report" / "templates" / name).read_text("utf-8")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86_400 else f"{seconds / 86_400:.1f} d"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 1000 else f"{hours:.1f}" if hours >= 10 else f"{hours:.2f}" if hours >= 1 else f"{hours:.2g}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 1e-3 else f"{value:.4f}".rstrip("0").rstrip(".")


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _words(text: object) -> str:
    return str(text).replace("_", " ")


def _clock(moment: float | None) -> str:
    try:
        return datetime.fromtimestamp(moment or 0).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z") if moment else "-"
    except (ValueError, OverflowError, OSError):
        return "-"


def _lines(diff: str) -> list[tuple[str, str]]:
    """(class, text) of every line of a diff."""
    found = []
    for line in diff.splitlines():
        head = line.startswith(("diff ", "index ", "--- ", "+++ ", "@@", "new file", "deleted file", "similarity", "rename"))
        found.append(("head" if head else "add" if line.startswith("+") else "remove" if line.startswith("-") else "", line))
    return found

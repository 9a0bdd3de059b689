"""The learning rate over the steps of a run, before it is submitted: in the terminal, or as a picture."""

import json
from pathlib import Path

from jobs.config.settings import Job
from jobs.config.validation import schedule_of
from jobs.core.atomic_write import replacing
from jobs.core.errors import SettingError
from jobs.specs.lr_schedule import LRSchedule, describe
from jobs.specs.lr_schedule import curve as points_of

PICTURES = (".png", ".svg", ".pdf")
_WIDTH, _HEIGHT = 72, 14
# Steps looked at per column: a restart inside one must show as a line from floor to peak.
_SAMPLES = 32


def show(job: Job, picture: Path | None, as_json: bool) -> None:
    """Prints the curve of a job, or draws it into `picture`."""
    schedule = schedule_of(job)
    if picture is not None:
        draw(schedule, picture, job.job_name)
    if as_json:
        print(
            json.dumps(
                {"job": job.job_name, "remarks": describe(schedule), "curve": points_of(schedule, 400), "picture": str(picture) if picture else None}, indent=1
            )
        )
    elif picture is not None:
        print("\n".join([*describe(schedule), f"-> {picture}"]))
    else:
        print("\n".join([*plot(schedule), "", *describe(schedule)]))


def plot(s: LRSchedule, width: int = _WIDTH, height: int = _HEIGHT) -> list[str]:
    """Lines of text with the curve drawn in stars: rate upwards, optimizer step to the right."""
    width = max(2, min(width, s.total_steps))
    top = max(rate for _, rate in points_of(s, 400))
    cells = [[" "] * width for _ in range(height)]

    def row(rate: float) -> int:
        return height - 1 - round(rate / top * (height - 1))

    before: int | None = None
    for column in range(width):
        rates = _rates_of(s, column, width)
        rows = [row(rate) for rate in rates]
        # From where the column before ended, so that what is steep stays a line.
        rows += [before + (1 if rows[0] > before else -1)] if before is not None and abs(rows[0] - before) > 1 else []
        for at in range(min(rows), max(rows) + 1):
            cells[at][column] = "*"
        before = row(rates[-1])
    lines = []
    for index, cell in enumerate(cells):
        # A label at the top, in the middle and at the bottom says enough.
        label = f"{top * (height - 1 - index) / (height - 1):.2e}" if index in (0, height // 2, height - 1) else ""
        lines.append(f"{label:>9} |{''.join(cell).rstrip()}")
    lines.append(f"{'lr':>9} +{'-' * width}")
    last = f"{s.total_steps:,}"
    lines.append(f"{'step':>9}  0{last:>{max(width - 1, len(last) + 1)}}")
    return lines


def _rates_of(s: LRSchedule, column: int, width: int) -> list[float]:
    """The rates of the steps that a column stands for, in order."""
    first = column * s.total_steps // width
    last = max(first, (column + 1) * s.total_steps // width - 1)
    stride = max(1, (last - first) // _SAMPLES)
    return [s(step) for step in sorted({*range(first, last + 1, stride), last})]


def draw(s: LRSchedule, picture: Path, title: str) -> None:
    """Writes the curve as an image, whole or not at all. Raises SettingError without matplotlib or for a folder that is not there."""
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise SettingError("--curve FILE needs matplotlib; install holdfast with its 'report' group, or leave the file out and see the curve here") from err
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps, rates = zip(*points_of(s, 2000), strict=True)
    axes.plot(steps, rates, color="#4477aa", linewidth=1.2)
    if s.warmup_steps:
        axes.axvline(s.warmup_steps, color="#888888", linestyle="--", linewidth=1)
        axes.annotate(" warm-up ends", (s.warmup_steps, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8, color="#555555")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("learning rate")
    axes.set_title(f"{title}: {s.kind}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    try:
        with replacing(picture, flush=False) as file:
            figure.savefig(file, format=picture.suffix.lower().lstrip("."))
    except OSError as err:
        raise SettingError(f"--curve: {str(picture)!r} cannot be written: {err.strerror}") from err

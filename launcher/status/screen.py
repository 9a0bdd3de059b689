"""What `holdfast watch` draws: rows of runs as lines for a terminal of any size. Values in, text out."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from launcher.status.run_status import RunStatus, ago, span

_GAP = 2
_MARK = 2
# Lines that are no runs: heading, names of columns, two about the selected run, keys.
FRAME_LINES = 5

# A word beside each sign, and a sign beside each colour: neither is alone in carrying the meaning.
_SIGNS = {
    "running": ("●", ">", "green"),
    "waiting": ("◌", "~", "yellow"),
    "finished": ("✓", "+", "cyan"),
    "failed": ("✗", "!", "red"),
    "damaged": ("✗", "!", "red"),
}
_OTHER = ("■", "-", "magenta")
_ORDER = {"running": 0, "waiting": 1}


@dataclass(frozen=True)
class View:
    """What is on the screen beside the runs themselves."""

    width: int
    height: int
    selected: int = 0
    top: int = 0
    ascii_only: bool = False
    heading: str = ""
    trouble: str = ""
    prompt: str = ""
    curves: dict[str, list[float]] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Rows of runs that fit."""
        return max(self.height - FRAME_LINES, 1)


@dataclass(frozen=True)
class _Column:
    """`least` and `most` are characters; columns of a low `rank` are the last to be left out."""

    title: str
    rank: int
    least: int
    most: int
    cell: Callable[[RunStatus, View, int], str]
    right: bool = False
    # What a run that does not run has nothing to say about: its note stands there instead.
    live: bool = False


def in_order(rows: Sequence[RunStatus]) -> list[RunStatus]:
    """Running ones, waiting ones, the others; within each the newest first (rows come oldest first)."""
    return sorted(reversed(rows), key=lambda row: _ORDER.get(row.state, 2))


def scrolled(top: int, selected: int, count: int, room: int) -> int:
    """The first visible row, so that the selected one is visible and the screen is full."""
    top = min(max(top, selected - room + 1), selected)
    return max(min(top, count - room), 0)


def draw(rows: Sequence[RunStatus], view: View) -> list[Text]:
    """Exactly `view.height` lines of at most `view.width` characters; those after the runs that fit are frame."""
    visible = list(rows[view.top : view.top + view.room])
    columns = _fitting(rows, view)
    heading = Text(view.heading, style="bold")
    if view.trouble:
        heading.append(f" - {view.trouble}", style="yellow")
    lines = [_cut(heading, view.width), _head(columns, view.width)]
    lines += [_line(row, columns, view, view.top + index == view.selected) for index, row in enumerate(visible)]
    if not rows:
        lines.append(Text("no runs to show; a shows those that ended more than a day ago as well"))
    # The selected run's text may take every line that no run needs.
    room = max(view.height - len(lines) - 1, 2)
    details = _details(rows[view.selected] if rows else None, view.width, room)
    lines += [Text() for _ in range(room - len(details))] + details
    more = f"{view.top + 1}-{view.top + len(visible)} of {len(rows)}  " if len(rows) > view.room else ""
    keys = view.prompt or f"{more}{'up/down' if view.ascii_only else '↑↓'} select  l logs  c cancel  r resume  a all  q quit"
    lines.append(_cut(Text(keys, style="bold" if view.prompt else "dim"), view.width))
    return [_plain(line) if view.ascii_only else line for line in lines[: view.height]]


def _plain(line: Text) -> Text:
    """A note may quote anything; a terminal that cannot show it must not end the watch."""
    return line if line.plain.isascii() else Text(line.plain.encode("ascii", "replace").decode(), style=line.style)


def counts(rows: Sequence[RunStatus]) -> str:
    """2 running, 1 waiting, 5 over."""
    running, waiting = (sum(row.state == state for row in rows) for state in ("running", "waiting"))
    return f"{running} running, {waiting} waiting, {len(rows) - running - waiting} over"


def bar(share: float, width: int, ascii_only: bool) -> str:
    """A bar of so many characters."""
    share = min(max(share, 0.0), 1.0)
    if ascii_only:
        return ("#" * int(share * width)).ljust(width, "-")
    eighths = int(share * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")).ljust(width, "·")


def sparkline(values: Sequence[float], width: int, ascii_only: bool) -> str:
    """A curve in characters: mean of each of `width` parts, between the lowest and the highest of them."""
    if not values:
        return ""
    steps = "_.-=*#" if ascii_only else "▁▂▃▄▅▆▇█"
    width = min(width, len(values))
    parts = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join(steps[int((mean - low) / (high - low) * (len(steps) - 1) + 0.5)] if high > low else steps[0] for mean in means)


def shortened(name: str, width: int, ascii_only: bool) -> str:
    """Cut in the middle: the id of a run stands at its end."""
    if len(name) <= width:
        return name
    dots = ".." if ascii_only else "…"
    tail = min(6, width // 2)
    return name[: width - tail - len(dots)] + dots + name[-tail:]


def _state(row: RunStatus, view: View, width: int) -> str:
    sign, plain, _ = _SIGNS.get(row.state, _OTHER)
    return f"{plain if view.ascii_only else sign} {row.state}"


def _progress(row: RunStatus, view: View, width: int) -> str:
    share = row.step / row.max_steps if row.max_steps else 0.0
    return f"{bar(share, width - 5, view.ascii_only)} {int(share * 100):3d}%"


def _saved(row: RunStatus, view: View, width: int) -> str:
    return ago(row.checkpoint_time) if row.checkpoint_time else ""


_COLUMNS = (
    _Column("run", 0, 12, 28, lambda row, view, width: shortened(row.run, width, view.ascii_only)),
    _Column("state", 0, 11, 11, _state),
    _Column("attempt", 7, 7, 7, lambda row, view, width: str(row.attempt or "-"), right=True),
    _Column("step", 1, 3, 19, lambda row, view, width: f"{row.step:,}/{row.max_steps:,}", right=True),
    _Column("", 2, 9, 21, _progress),
    _Column("loss", 3, 6, 8, lambda row, view, width: "" if row.loss is None else f"{row.loss:.3f}", right=True),
    _Column("curve", 5, 8, 20, lambda row, view, width: sparkline(view.curves.get(row.path, ()), width, view.ascii_only)),
    _Column("left", 4, 10, 10, lambda row, view, width: "" if row.seconds_left is None else span(row.seconds_left), right=True, live=True),
    _Column("tok/s", 6, 7, 11, lambda row, view, width: "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}", right=True, live=True),
    _Column("peak", 9, 5, 5, lambda row, view, width: "" if row.peak_pct is None else f"{row.peak_pct:.0f} %", right=True, live=True),
    _Column("saved", 8, 11, 11, _saved, right=True, live=True),
    _Column("note", 10, 16, 500, lambda row, view, width: row.note, live=True),
)


def _fitting(rows: Sequence[RunStatus], view: View) -> list[tuple[_Column, int]]:
    """The columns that fit, by rank, with their widths; what is left over goes to those that can use it."""
    needs = {}
    for column in _COLUMNS:
        if column.title in ("run", "step", "tok/s"):
            widest = max((len(column.cell(row, view, column.most)) for row in rows), default=0)
            needs[column] = min(max(widest, column.least, len(column.title)), column.most)
        else:
            needs[column] = max(column.least, len(column.title))
        if column.title == "run" and view.width < 100:
            needs[column] = min(needs[column], 16)
    if not any(row.peak_pct is not None for row in rows):
        needs = {column: need for column, need in needs.items() if column.title != "peak"}
    kept: list[_Column] = []
    left = view.width - _MARK + _GAP
    for column in sorted(needs, key=lambda column: column.rank):
        if needs[column] + _GAP > left:
            break
        kept.append(column)
        left -= needs[column] + _GAP
    widths = {column: needs[column] for column in _COLUMNS if column in kept}
    for title in ("", "curve", "run", "note"):
        for column in widths:
            if column.title == title:
                most = column.most if title != "run" else min(max((len(row.run) for row in rows), default=0), 40)
                more = max(min(left, most - widths[column]), 0)
                widths[column] += more
                left -= more
    return list(widths.items())


def _head(columns: Sequence[tuple[_Column, int]], width: int) -> Text:
    titles = [column.title.rjust(size) if column.right else column.title.ljust(size) for column, size in columns]
    return _cut(Text(" " * _MARK + (" " * _GAP).join(titles), style="underline"), width)


def _line(row: RunStatus, columns: Sequence[tuple[_Column, int]], view: View, selected: bool) -> Text:
    mark = (">" if view.ascii_only else "▸") if selected else " "
    line = Text(mark.ljust(_MARK), style="reverse" if selected else "")
    taken = _MARK
    for index, (column, size) in enumerate(columns):
        if index:
            line.append(" " * _GAP)
            taken += _GAP
        if column.live and row.state != "running":
            line.append(row.note)
            break
        cell = column.cell(row, view, size)[:size]
        style = _SIGNS.get(row.state, _OTHER)[2] if column.title == "state" else ""
        line.append(cell.rjust(size) if column.right else cell.ljust(size), style=style)
        taken += size
    return _cut(line, view.width)


def _details(row: RunStatus | None, width: int, room: int) -> list[Text]:
    """Lines about the selected run, with what its row had to cut: two, or where they are longer than the terminal up to `room`."""
    if row is None:
        return []
    job = f"job {row.job_id}" if row.job_id else "never submitted"
    saved = f" · saved step {row.checkpoint_step:,}, {ago(row.checkpoint_time)}" if row.checkpoint_time and row.checkpoint_step is not None else ""
    about = _wrapped(f"{row.run} · {job} · attempt {row.attempt or '-'}{saved}", width, room - 1)
    return about + _wrapped(row.note or row.path, width, room - len(about))


def _wrapped(text: str, width: int, most: int) -> list[Text]:
    """At most so many lines; what is too much is cut from the last one."""
    parts = textwrap.wrap(text, width) or [""]
    if len(parts) > most:
        parts[most - 1 :] = [" ".join(parts[most - 1 :])]
    return [_cut(Text(part), width) for part in parts]


def _cut(line: Text, width: int) -> Text:
    line.no_wrap = True
    line.truncate(width, overflow="crop")
    return line

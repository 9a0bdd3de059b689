"""Tables: by rich for a screenful, and as plain lines for a thousand runs, which rich would measure for a second."""

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_GAP = "  "
_INDENT = "    "
# A last column that is narrower, or that makes more lines of a row, is harder to read than a line of its own below the row.
_LEAST_LAST, _MOST_LINES = 16, 3
# Left out in this order where the width does not do, as `watch` leaves them out (launcher/status/screen.py).
_LEAST_FIRST = ("checkpoint", "attempt", "tok/s", "left", "job", "loss")


def lines(head: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """The table as lines, head first. With a `width` no line is longer: the last column is wrapped into what the others leave of it, or
    stands below its row where that is too little; then columns are left out, those without a word in them first."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)][:-1]
    kept = list(range(len(widths)))
    if width is None or _fits_beside((head, *rows), widths, kept, width):
        return _with_last_beside(head, rows, widths, kept, width)
    kept = [index for index in kept if not rows or any(row[index] for row in rows)]
    if _fits_beside((head, *rows), widths, kept, width):
        return _with_last_beside(head, rows, widths, kept, width)
    for name in _LEAST_FIRST:
        if _taken(widths, kept) - len(_GAP) > width:
            kept = [index for index in kept if head[index] != name]
    text = [_front(head, widths, kept).rstrip()[:width]]
    for row in rows:
        text.append(_front(row, widths, kept).rstrip()[:width])
        text += textwrap.wrap(row[-1], max(width, 2 * len(_INDENT)), initial_indent=_INDENT, subsequent_indent=_INDENT)
    return text


def _with_last_beside(head: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int], kept: Sequence[int], width: int | None) -> list[str]:
    taken = _taken(widths, kept)
    text = []
    for row in (head, *rows):
        first, *more = textwrap.wrap(row[-1], width - taken) if width and len(row[-1]) > width - taken else [row[-1]]
        text.append((_front(row, widths, kept) + first).rstrip())
        text += [" " * taken + part for part in more]
    return text


def _fits_beside(rows: Sequence[Sequence[str]], widths: Sequence[int], kept: Sequence[int], width: int) -> bool:
    """Whether the last column can stand beside the others; the head is one of the rows."""
    room, longest = width - _taken(widths, kept), max(len(row[-1]) for row in rows)
    return room >= longest or (room >= _LEAST_LAST and room * _MOST_LINES >= longest)


def _taken(widths: Sequence[int], kept: Sequence[int]) -> int:
    return sum(widths[index] + len(_GAP) for index in kept)


def _front(row: Sequence[str], widths: Sequence[int], kept: Sequence[int]) -> str:
    return "".join(row[index].ljust(widths[index]) + _GAP for index in kept)


def columns(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for index, name in enumerate(names):
        table.add_column(name, no_wrap=index == 0, overflow="fold")
    return table


def show(table: Table) -> None:
    console = Console(highlight=False)
    # In a pipe there is no width to fit: a row stays a line, so that grep and awk work.
    console.print(table) if console.is_terminal else Console(width=400, highlight=False).print(table)

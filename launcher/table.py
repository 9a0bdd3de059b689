"""Tables: by rich for a screenful, and as plain lines for a thousand runs, which rich would measure for a second."""

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_GAP = "  "
_LEAST_LAST = 16


def lines(head: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """The table as lines, head first. With a `width` the last column is wrapped into what the others leave of it."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)][:-1]
    taken = sum(widths) + len(_GAP) * len(widths)
    room = max(width - taken, _LEAST_LAST) if width else None
    text = []
    for row in (head, *rows):
        front = "".join(cell.ljust(size) + _GAP for cell, size in zip(row[:-1], widths, strict=True))
        parts = textwrap.wrap(row[-1], room) if room and len(row[-1]) > room else [row[-1]]
        text.append((front + parts[0]).rstrip())
        text += [" " * taken + part for part in parts[1:]]
    return text


def columns(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for index, name in enumerate(names):
        table.add_column(name, no_wrap=index == 0, overflow="fold")
    return table


def show(table: Table) -> None:
    console = Console(highlight=False)
    # In a pipe there is no width to fit: a row stays a line, so that grep and awk work.
    console.print(table) if console.is_terminal else Console(width=400, highlight=False).print(table)

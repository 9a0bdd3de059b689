"""Tables of many rows: a thousand runs as text in a few milliseconds, where rich needs a second to measure them."""

import textwrap
from collections.abc import Sequence

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

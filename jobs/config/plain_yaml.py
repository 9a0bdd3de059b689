"""YAML as `dump_yaml` writes it, read at the speed of JSON: lines of the form `name: JSON value`.

PyYAML's own parser takes 7 ms for one job.yaml, which makes `holdfast status` of a thousand runs last seven seconds and
costs every attempt its share. What is read here means the same to a YAML parser, letter for letter; anything else, a comment
or a line that a person has changed to `precision: bf16`, is left to that parser.
"""

import json
import re
from functools import lru_cache
from typing import Any

_LINE = re.compile(r"([a-z][a-z0-9_]*): (?=\S)")
# Words that YAML takes for values where they stand as keys.
_NOT_KEYS = frozenset({"true", "false", "null"})


def read(text: str) -> dict[str, Any] | None:
    """The mapping in such a text, or None where any line of it is of another form."""
    # Two escapes of JSON mean one character beyond U+FFFF; in YAML they are two characters.
    if not text.isascii() or "\\ud" in text.lower():
        return None
    values: dict[str, Any] = {}
    for line in text.split("\n"):
        if not line:
            continue
        pair = _scalar(line) or _pair(line)
        if pair is None or pair[0] in values:
            return None
        values[pair[0]] = pair[1]
    return values


@lru_cache(maxsize=4096)
def _scalar(line: str) -> tuple[str, Any] | None:
    """Name and value of a line whose value can be shared, since nobody can change it: most lines are the same in every run."""
    pair = None if line.endswith(("]", "}")) else _pair(line)
    return None if pair is None or isinstance(pair[1], list | dict) else pair


def _pair(line: str) -> tuple[str, Any] | None:
    start = _LINE.match(line)
    if start is None or start[1] in _NOT_KEYS:
        return None
    try:
        value, end = _decoder.raw_decode(line, start.end())
    except (ValueError, RecursionError):
        return None
    return (start[1], value) if end == len(line) else None


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("a key is given twice")
    return mapping


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is a number to JSON as Python has it, and a word to YAML")


_decoder = json.JSONDecoder(object_pairs_hook=_mapping, parse_constant=_constant)

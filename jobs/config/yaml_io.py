"""YAML in and out: what a person writes is read as YAML 1.2 means it, and what is written reads back to the same values."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jobs.config import plain_yaml
from jobs.core import safe_read
from jobs.core.errors import DamagedFileError, NotFoundError, SettingError

# Bytes of a run's job.yaml, and of one that is not as `dump_yaml` wrote it: PyYAML parses that many within a second.
_RUN_YAML, _EDITED_YAML = 4 * 2**20, 256 * 2**10
_MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML 1.2 scalars: `no` is a word, 24:00:00 is text, 1e-3 is a number, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a name is one word, not a list or a mapping", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        """PyYAML looks at every open bracket again for each token: of a hundred thousand of them it makes minutes."""
        if self.flow_level >= safe_read.DEPTH:
            raise yaml.scanner.ScannerError(None, None, f"nested deeper than {safe_read.DEPTH} levels", self.get_mark())
        super().fetch_flow_collection_start(token)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """YAML 1.2 has no merge keys; a few lines of them can mean billions of values."""

    def construct_decimal(self, node: yaml.ScalarNode) -> int | str:
        """010 is ten. YAML 1.1 reads it as octal, and cannot read 08 at all."""
        text = str(self.construct_scalar(node))
        try:
            return int(text)
        except ValueError:  # longer than Python converts, or tagged !!int by hand: no setting takes it
            return text


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+0123456789."),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
):
    for _char in _first:
        _Loader.yaml_implicit_resolvers.setdefault("" if _char == "\0" else _char, []).append((_tag, re.compile(_pattern)))


def parse(text: str) -> Any:
    """The value that a text of YAML means. Raises yaml.YAMLError and, for a tag that does not fit its scalar, ValueError."""
    return yaml.load(text, _Loader)


def read_yaml(path: Path, shown: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises SettingError with file and line when it is none."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as err:
        raise SettingError(f"{shown}: not a text file in UTF-8 ({err.reason} at byte {err.start})") from err
    except OSError as err:
        raise NotFoundError(f"{shown}: cannot be read: {err.strerror}") from err
    return _mapping(text, shown)


def read_run_yaml(path: Path) -> dict[str, Any]:
    """The mapping in job.yaml of a run. Raises NotFoundError, DamagedFileError, and SettingError as `read_yaml`."""
    try:
        text = safe_read.read_text(path, _RUN_YAML)
    except FileNotFoundError as err:
        raise NotFoundError(f"{path}: cannot be read: {err.strerror}") from err
    if text and not text.endswith("\n"):
        raise DamagedFileError(f"{path}: its last line has no end, so it may be cut short; if it is complete, end it with a line break")
    values = _mapping(text, str(path), _EDITED_YAML)
    for name, value in values.items():
        if type(value) is int and abs(value) > safe_read.MAX_INT:
            raise SettingError(f"{path}: {name[:80]} has more than 64 bits")
    return values


def _mapping(text: str, shown: str, limit: int | None = None) -> dict[str, Any]:
    """The mapping in a text. Raises SettingError, also for more than `limit` characters that PyYAML would have to parse."""
    try:
        content = plain_yaml.read(text)
        if not content:
            if limit is not None and len(text) > limit:
                raise SettingError(f"{shown}: has {len(text):,} characters, more than the {limit:,} that are read of an edited file")
            # _Loader derives from SafeLoader: it builds plain values only.
            content = parse(text)
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark
        where = f"{shown}:{mark.line + 1}" if mark else shown
        raise SettingError(f"{where}: not valid YAML: {err.problem}") from err
    except yaml.YAMLError as err:
        raise SettingError(f"{shown}: not valid YAML: {' '.join(str(err).split())}") from err
    except (ValueError, KeyError, RecursionError) as err:
        # A scalar with an explicit tag that does not fit it, or brackets nested a thousand deep.
        raise SettingError(f"{shown}: not readable: {type(err).__name__}: {err}") from err
    if content is None:
        return {}
    if "*" in text and _count_values(content, {}) > _MOST_VALUES:
        raise SettingError(f"{shown}: its aliases (*name) stand for more than {_MOST_VALUES:,} values; write the values themselves")
    if not isinstance(content, dict):
        raise SettingError(f"{shown}: holds a {type(content).__name__}, not settings; write lines of the form name: value")
    return {str(key): value for key, value in content.items()}


def _count_values(value: Any, known: dict[int, float]) -> float:
    """Values that a parsed text stands for, where each alias counts as much as what it repeats; infinite where it repeats itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")
        known[id(value)] = 1 + sum(_count_values(item, known) for item in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text that `read_yaml` reads back to the same values, whatever characters they hold."""
    return "".join(f"{key}: {_flow(value)}\n" for key, value in values.items())


def _flow(value: Any) -> str:
    """A value in YAML's flow style, which is JSON with two exceptions.

    JSON strings are YAML strings, and quoting every one leaves nothing to the resolvers of any YAML version; but above
    U+FFFF JSON writes two surrogates, which YAML reads as two characters, and a long key needs a mark in YAML."""
    if isinstance(value, dict):
        pairs = [(_flow(key if isinstance(key, str) else json.dumps(key)), _flow(item)) for key, item in value.items()]
        return "{" + ", ".join(f"{'? ' if len(key) > _SIMPLE_KEY else ''}{key}: {item}" for key, item in pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    # Most values of most settings, of which an array of a thousand has a hundred thousand: JSON's encoder takes three to five times as long.
    if value is None or value is True or value is False:
        return _CONSTANTS[value]
    text = str(value) if type(value) is int else _json(value)
    return text if text.isascii() and text.isprintable() else _NOT_ASCII.sub(_yaml_escape, text)


_CONSTANTS = {None: "null", True: "true", False: "false"}
_json = json.JSONEncoder(ensure_ascii=False).encode
# YAML 1.2, 7.4.2: a key without a mark has 1024 characters at most.
_SIMPLE_KEY = 1000
_NOT_ASCII = re.compile(r"[^\x20-\x7e]")


def _yaml_escape(char: re.Match[str]) -> str:
    return f"\\U{ord(char[0]):08x}"

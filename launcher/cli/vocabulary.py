"""What the command line knows, as plain data: commands, options, settings, and the words of which each may be.

It is gathered from where each word is at home: the command line itself, `jobs.config.settings`, the files that come with holdfast.
That takes typer and pydantic, half a second of a slow processor, at each Tab in a shell. So what was gathered is kept in
the user's cache folder, and holds as long as our code and files are the same; deleting `holdfast/words.json` there is
always safe. Nothing heavy is imported to read it.
"""

import json
import os
from collections.abc import Iterator
from typing import Any, TypedDict

from launcher.cli.entry import in_cache, keep_text

_HOUSE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Where words come from; a file that is new, gone or changed in one of these makes the kept ones stale.
_SOURCES = ("launcher", "jobs", "slurm", os.path.join("slurm", "sites"))


class Option(TypedDict):
    """An option: what it means, whether it is offered, whether a value follows, and which if they are a closed set."""

    help: str
    hidden: bool
    is_flag: bool
    values: list[str]


class Command(TypedDict):
    """A command or a group of commands. `takes` is what its usage line says of the words behind it; `values` are those of its arguments."""

    help: str
    hidden: bool
    commands: dict[str, "Command"] | None
    takes: str
    options: dict[str, Option]
    values: list[str]


class Setting(TypedDict):
    help: str
    values: list[str]


class Vocabulary(TypedDict):
    """`settings` are by name in the order of the settings; `jobs` and `sites` are names of files that come with holdfast."""

    root: Command
    settings: dict[str, Setting]
    runs_dir: str
    job_word: str
    jobs: list[str]
    sites: list[str]


def vocabulary() -> Vocabulary:
    """What was kept, if it still holds; else gathered anew, and kept. Failing to keep it is no error."""
    stamp = _stamp()
    try:
        with open(in_cache("words.json"), encoding="utf-8") as file:
            kept = json.load(file)
        if kept["stamp"] == stamp:
            found: Vocabulary = kept["words"]
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    gathered = gather()
    _keep(stamp, gathered)
    return gathered


def _keep(stamp: str, gathered: Vocabulary) -> None:
    try:
        keep_text(in_cache("words.json"), json.dumps({"stamp": stamp, "words": gathered}))
    except OSError:
        return


def _stamp() -> str:
    """Where we are, and name, size and time of every file that words come from."""
    parts = [_HOUSE]
    for folder in _SOURCES:
        with os.scandir(os.path.join(_HOUSE, folder)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.endswith((".py", ".yaml")):
                    status = entry.stat()
                    parts.append(f"{folder}/{entry.name} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(parts)


# -- gathering ---------------------------------------------------------------------------------------------------------


def gather() -> Vocabulary:
    """Every word from where it is at home; imports typer and pydantic."""
    from typer.main import get_command

    from jobs.config.job_files import shipped_jobs
    from jobs.config.settings import JOB_WORD, Job, help_of, names
    from launcher.cli.app import app
    from slurm import site_file

    fields = Job.model_fields
    return {
        "root": _command(get_command(app)),
        "settings": {name: {"help": help_of(name), "values": list(dict.fromkeys(_closed(fields[name].annotation)))} for name in names()},
        "runs_dir": str(fields["runs_dir"].default),
        "job_word": JOB_WORD,
        "jobs": shipped_jobs(),
        "sites": site_file.shipped(),
    }


def _command(command: Any) -> Command:
    import inspect
    import typing

    found: Command = {"help": command.help or "", "hidden": command.hidden, "commands": None, "takes": "", "options": {}, "values": []}
    if hasattr(command, "commands"):
        found["commands"] = {name: _command(inner) for name, inner in command.commands.items()}
        return found
    kinds = typing.get_type_hints(inspect.unwrap(command.callback))
    found["takes"] = command.options_metavar or ""
    for parameter in command.params:
        values = list(_closed(kinds.get(parameter.name)))
        if not parameter.opts[0].startswith("-"):
            found["values"] += values
            continue
        for name in parameter.opts:
            if name.startswith("--"):
                found["options"][name] = {"help": parameter.help or "", "hidden": parameter.hidden, "is_flag": parameter.is_flag, "values": values}
    return found


def _closed(annotation: Any) -> Iterator[str]:
    """The words of a type, where it is a closed set of words."""
    import typing
    from enum import EnumType

    if annotation is bool:
        yield from ("true", "false")
    elif isinstance(annotation, EnumType):
        members: dict[str, Any] = dict(annotation.__members__)
        yield from (str(item.value) for item in members.values())
    elif typing.get_origin(annotation) is typing.Literal:
        yield from (item for item in typing.get_args(annotation) if isinstance(item, str))
    elif typing.get_origin(annotation) is typing.Annotated:
        yield from _closed(typing.get_args(annotation)[0])
    elif typing.get_args(annotation) and typing.get_origin(annotation) not in (dict, tuple):
        for kind in typing.get_args(annotation):
            yield from _closed(kind)

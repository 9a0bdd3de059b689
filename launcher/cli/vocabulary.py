"""Commands, options, settings and their values as plain data, for completion.

Each comes from its declaration: the click commands, `jobs.config.settings`, the files that are shipped with holdfast.
"""

import inspect
import typing
from collections.abc import Iterator
from enum import EnumType
from typing import Any, TypedDict

from jobs.config.job_files import shipped_jobs
from jobs.config.settings import JOB_WORD, Job, help_of, names
from slurm import site_file


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


def vocabulary_of(root: Any) -> Vocabulary:
    """Commands and options below `root`, settings with their values, shipped job files and sites."""
    fields = Job.model_fields
    return {
        "root": _command(root),
        "settings": {name: {"help": help_of(name), "values": list(dict.fromkeys(_closed(fields[name].annotation)))} for name in names()},
        "runs_dir": str(fields["runs_dir"].default),
        "job_word": JOB_WORD,
        "jobs": shipped_jobs(),
        "sites": site_file.shipped(),
    }


def _command(command: Any) -> Command:
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
    """The values of a type that has a closed set of them."""
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

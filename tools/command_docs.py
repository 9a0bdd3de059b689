"""docs/reference/commands.md: every command with its options, from the command line itself, and what programs may rely on."""

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from launcher.cli.app import app
from launcher.status.run_status import FIELDS
from tools.reference_docs import EXIT_CODES

_INTRO = """\
<!-- Generated from the command line itself by `make golden`; changes made here are lost. -->
# Commands

`JOB` is a job file (`jobs/quickstart.yaml` when left out); `RUN` is a run directory, its id or its name (the newest run when left
out), and is looked for in `RUNS_DIR`. Settings are written `KEY=value` or `--key value` behind every command that takes a job;
[settings.md](settings.md) lists them. `make COMMAND` of the same name hands its words on, and options as `ARGS="--wait"`.

`source <(holdfast completion bash)` in `~/.bashrc` completes all of it at the Tab key: commands, options, names and values of
settings, job files and runs. zsh and fish have theirs.

Exit codes of every command:
"""

# What `--help` has no room for.
_MORE = {
    "watch": """\
| key | what it does |
|---|---|
| up, down, page up, page down, home, end (`k`, `j`, `g`, `G`) | selects a run |
| `l`, enter | its log as it grows, rank 0; `q` comes back |
| `c` | cancels it, after `y` |
| `r` | resumes it, after `y` |
| `a` | also shows runs that ended more than a day ago, or hides them again |
| `q`, escape, Ctrl-C | ends |

Running ones come first, then those that wait, then the others; the newest of each on top. Files are looked at every second,
Slurm is asked every five. Columns are left out where the terminal is narrow; the selected run stands below in full. Where
standard output is no terminal, and with `--once`, it is the table of `holdfast status`.
""",
    "logs": """\
Each attempt begins with a line such as `--- attempt 2 · job 12 · after preemption ---`. Attempts of a requeued job share one file;
where each begins was written down when it began. With `-f` it ends when the run is over and its files are still.
""",
    "status": "Fields of each run in `--json`. Fields are added, never renamed or taken away; times are Unix seconds.\n\n"
    + "| field | what it is |\n|---|---|\n"
    + "".join(f"| `{name}` | {meaning} |\n" for name, meaning in FIELDS.items()),
}


def page() -> str:
    """The text of docs/reference/commands.md."""
    parts = [_INTRO, "| code | meaning |\n|---|---|\n" + "".join(f"| {int(code)} | {meaning} |\n" for code, meaning in EXIT_CODES.items())]
    for words, command in _commands(get_command(app), "holdfast"):
        parts.append(f"## {words}\n")
        usage = " ".join(filter(None, [words, *(_argument(parameter) for parameter in command.params if not _is_option(parameter)), _settings(command)]))
        parts.append(f"    {usage}\n")
        parts.append(f"{command.help}\n")
        options = [parameter for parameter in command.params if _is_option(parameter) and not parameter.hidden]
        if options:
            parts.append("| option | meaning |\n|---|---|\n" + "".join(f"| {_option(parameter)} | {_cell(parameter.help)} |\n" for parameter in options))
        more = _MORE.get(words.removeprefix("holdfast "))
        if more:
            parts.append(more)
    return "\n".join(parts)


def _commands(command: Any, words: str) -> Iterator[tuple[str, Any]]:
    for name, inner in command.commands.items():
        if inner.hidden:
            continue
        if hasattr(inner, "commands"):
            yield from _commands(inner, f"{words} {name}")
        else:
            yield f"{words} {name}", inner


def _is_option(parameter: Any) -> bool:
    return str(parameter.opts[0]).startswith("-")


def _settings(command: Any) -> str:
    """What stands for settings and runs in the usage; the default of the library for options is no such thing."""
    metavar = command.options_metavar or ""
    return "" if metavar == "[OPTIONS]" else metavar


def _argument(parameter: Any) -> str:
    name = getattr(parameter, "metavar", None) or parameter.name.upper()
    return name if name.startswith("[") else f"[{name}]" if not parameter.required else name


def _option(parameter: Any) -> str:
    metavar = getattr(parameter, "metavar", None) or ("" if parameter.is_flag else parameter.name.upper())
    return ", ".join(f"`{word}`" for word in [*parameter.opts, *parameter.secondary_opts]) + (f" `{metavar}`".replace("|", "\\|") if metavar else "")


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")

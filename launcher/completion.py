"""`holdfast completion SHELL`: a script for the shell, and the words that the script asks for at each Tab.

Every word comes from where it is at home: commands and options from the command line itself, names and values of settings
from `jobs.settings`, sites, job files and runs from their folders. Nothing heavy is imported and Slurm is not asked.
"""

import inspect
import os
import shlex
import sys
import typing
from collections.abc import Iterator, Mapping
from enum import EnumType
from pathlib import Path
from typing import Any

from jobs import run_folders
from jobs.job_files import shipped_jobs
from jobs.rundir import RunDir
from jobs.settings import JOB_WORD, Job, help_of, names
from slurm import sitefile

# A word and what it means; bash shows the word only.
Word = tuple[str, str]

_BASH = """\
# holdfast for bash:  source <(holdfast completion bash)
_holdfast() {
    local line="${COMP_LINE:0:COMP_POINT}" text help begin=""
    local word="${line##* }"
    # Readline cuts words at '=': it wants what comes after the cut.
    if [[ $COMP_WORDBREAKS == *=* && $word == *=* ]]; then begin="${word%"${word##*=}"}"; fi
    COMPREPLY=()
    while IFS=$'\\t' read -r text help; do
        COMPREPLY+=("${text#"$begin"}")
    done < <(@COMMAND@ completion --line "$line" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=/] ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o default -F _holdfast holdfast
"""

_ZSH = """\
#compdef holdfast
# holdfast for zsh:  source <(holdfast completion zsh)   (after compinit)
_holdfast() {
    local text help
    local -a open closed
    while IFS=$'\\t' read -r text help; do
        if [[ $text == *[=/] ]]; then open+=("$text"); else closed+=("$text"); fi
    done < <(@COMMAND@ completion --line "$LBUFFER" 2>/dev/null)
    (( $#open + $#closed )) || { _files; return }
    (( $#open )) && compadd -Q -S '' -- "${open[@]}"
    (( $#closed )) && compadd -Q -- "${closed[@]}"
}
compdef _holdfast holdfast
"""

_FISH = """\
# holdfast for fish:  holdfast completion fish | source
function __holdfast_words
    set -l found (@COMMAND@ completion --line (commandline -cp | string collect) 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c holdfast -f -a '(__holdfast_words)'
"""

SHELLS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
# Words that mean something as the value of an option that is free text.
_VALUES = {"--rank": ("0", "batch", "all"), "--attempt": ("all",), "--form": ("hf", "plain"), "--preempt-mode": ("REQUEUE", "CANCEL")}


def script(shell: str) -> str:
    """The text to source. It calls the holdfast that printed it, wherever it lies."""
    return SHELLS[shell].replace("@COMMAND@", f"{shlex.quote(sys.executable)} -m launcher.entry")


def words(line: str, environ: Mapping[str, str], cwd: Path) -> list[Word]:
    """What may stand where a command line (up to the cursor) ends; empty where files are as good a guess as any."""
    before, current = _split(line)
    return sorted({word: help for word, help in _candidates(before[1:], current, environ, cwd) if word.startswith(current) and word != current}.items())


def _split(line: str) -> tuple[list[str], str]:
    """The whole words of a line, and the one that is being written."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        found = list(lexer)
    except ValueError:  # a quote is still open
        found = line.replace("'", "").replace('"', "").split()
    return (found, "") if not line or line[-1].isspace() else (found[:-1], found[-1])


def _candidates(before: list[str], current: str, environ: Mapping[str, str], cwd: Path) -> Iterator[Word]:
    from typer.main import get_command

    from launcher.cli import app

    command: Any = get_command(app)
    rest = list(before)
    while hasattr(command, "commands") and rest and rest[0] in command.commands:
        command = command.commands[rest.pop(0)]
    if hasattr(command, "commands"):
        if not rest:
            yield from ((name, _first_sentence(inner.help)) for name, inner in command.commands.items() if not inner.hidden)
        return
    options = {option: parameter for parameter in command.params for option in parameter.opts if option.startswith("--")}
    kinds = typing.get_type_hints(inspect.unwrap(command.callback))
    last = rest[-1] if rest else ""
    if last in options and not options[last].is_flag:
        yield from ((value, "") for value in _VALUES.get(last) or _closed(kinds.get(options[last].name)))
        return
    if current.startswith("-"):
        yield from ((option, parameter.help or "") for option, parameter in options.items() if not parameter.hidden)
        return
    for parameter in command.params:
        if not parameter.opts[0].startswith("-"):
            yield from ((value, "") for value in _closed(kinds.get(parameter.name)))
    takes = command.options_metavar or ""
    is_run = "[RUN" in takes
    key, equals, _ = current.partition("=")
    if equals:
        if "KEY=value" in takes or is_run:
            yield from ((f"{key}={value}", "") for value in _values(key, rest, environ, cwd))
        return
    if is_run:
        yield from _runs(current, rest, environ, cwd)
        yield from (("RUN=", "which run"), ("RUNS_DIR=", help_of("runs_dir")))
    if "[JOB]" in takes:
        yield from ((file, "job file") for file in _job_files(current, cwd))
        yield "JOB=", "job file"
    if "KEY=value" in takes:
        given = {word.partition("=")[0].lower() for word in rest if "=" in word}
        for name in names():
            if name not in given:
                # As the person writes: batch_si is answered with batch_size=.
                yield f"{name if current and current == current.lower() else name.upper()}=", help_of(name)


def _values(key: str, rest: list[str], environ: Mapping[str, str], cwd: Path) -> list[str]:
    name = key.lower().replace("-", "_")
    if name == JOB_WORD:
        return [*_job_files("", cwd)]
    if name == "site":
        return sitefile.shipped()
    if name == "run":
        return [word for word, _ in _runs("", rest, environ, cwd)]
    if name in Job.model_fields:
        return list(dict.fromkeys(_closed(Job.model_fields[name].annotation)))
    return []


def _closed(annotation: Any) -> Iterator[str]:
    """The words of a type, where it is a closed set of words."""
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


def _job_files(current: str, cwd: Path) -> Iterator[str]:
    """Job files that come with holdfast, YAML files in the folder that is being written, and folders on the way to them."""
    yield from (f"jobs/{name}.yaml" for name in shipped_jobs())
    folder, _, begin = current.rpartition("/")
    try:
        found = sorted(os.scandir(cwd / folder if folder or not current.startswith("/") else "/"), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in found:
        shown = current[: len(current) - len(begin)] + entry.name
        if entry.name.startswith(".") or not entry.name.startswith(begin):
            continue
        if entry.name.endswith((".yaml", ".yml")):
            yield shown
        elif current and entry.is_dir():
            yield f"{shown}/"


def _runs(current: str, rest: list[str], environ: Mapping[str, str], cwd: Path) -> Iterator[Word]:
    """Ids of the runs in the runs directory; tasks of an array once its own id is written."""
    given = [word.partition("=")[2] for word in rest if word.upper().startswith("RUNS_DIR=")]
    folder = cwd / (given[-1] if given else environ.get("HOLDFAST_RUNS_DIR") or environ.get("RUNS_DIR") or str(Job.model_fields["runs_dir"].default))
    array, dot, _ = current.rpartition(".")
    try:
        for entry in os.scandir(folder):
            run = RunDir(Path(entry.path))
            if entry.name.startswith(".") or not (entry.name.startswith(current) or entry.name == array):
                continue
            if run.job_yaml.is_file():
                yield entry.name, "array" if run.has_members else "run"
            if dot and entry.name == array and run.has_members:
                yield from ((member.id, "task") for member in run_folders.members_of(run))
    except OSError:
        return


def _first_sentence(text: str | None) -> str:
    return (text or "").partition("\n")[0].partition(";")[0]


def answer(line: str) -> None:
    """One candidate a line, with its meaning behind a tab."""
    for word, help in words(line, os.environ, Path.cwd()):
        print(f"{word}\t{' '.join(help.split())}")

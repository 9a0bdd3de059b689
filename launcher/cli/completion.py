"""`holdfast completion SHELL`: a script for the shell, and the words that the script asks for at each Tab.

Commands, options, names and values of settings come from `launcher.cli.vocabulary`, job files and runs from their folders.
Slurm is not asked.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.cli.vocabulary import Vocabulary, vocabulary_of

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
    return SHELLS[shell].replace("@COMMAND@", f"{shlex.quote(sys.executable)} -P -m launcher.cli.app")


def candidates(root: Any, line: str, environ: Mapping[str, str], cwd: Path) -> list[Word]:
    """Completions of a command line (up to the cursor), sorted; empty where the shell should offer file names instead.

    root: the click command of the whole command line, from which commands and options are read."""
    before, current = _split(line)
    return sorted(
        {
            word: help for word, help in _candidates(vocabulary_of(root), before[1:], current, environ, cwd) if word.startswith(current) and word != current
        }.items()
    )


def _split(line: str) -> tuple[list[str], str]:
    """The whole words of a line, and the one that is being written."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        found = list(lexer)
    except ValueError:  # a quote is still open
        found = line.replace("'", "").replace('"', "").split()
    return (found, "") if not line or line[-1].isspace() else (found[:-1], found[-1])


def _candidates(known: Vocabulary, before: list[str], current: str, environ: Mapping[str, str], cwd: Path) -> Iterator[Word]:
    command = known["root"]
    rest = list(before)
    while command["commands"] is not None and rest and rest[0] in command["commands"]:
        command = command["commands"][rest.pop(0)]
    if command["commands"] is not None:
        if not rest:
            yield from ((name, _first_sentence(inner["help"])) for name, inner in command["commands"].items() if not inner["hidden"])
        return
    options = command["options"]
    last = rest[-1] if rest else ""
    if last in options and not options[last]["is_flag"]:
        yield from ((value, "") for value in _VALUES.get(last) or options[last]["values"])
        return
    if current.startswith("-"):
        yield from ((name, option["help"]) for name, option in options.items() if not option["hidden"])
        return
    yield from ((value, "") for value in command["values"])
    takes = command["takes"]
    is_run = "[RUN" in takes
    key, equals, _ = current.partition("=")
    if equals:
        if "KEY=value" in takes or is_run:
            yield from ((f"{key}={value}", "") for value in _values(known, key, rest, environ, cwd))
        return
    if is_run:
        yield from _runs(known, current, rest, environ, cwd)
        yield from (("RUN=", "which run"), ("RUNS_DIR=", known["settings"]["runs_dir"]["help"]))
    if "[JOB]" in takes:
        yield from ((file, "job file") for file in _job_files(known, current, cwd))
        yield "JOB=", "job file"
    if "KEY=value" in takes:
        given = {word.partition("=")[0].lower() for word in rest if "=" in word}
        for name, setting in known["settings"].items():
            if name not in given:
                # As the person writes: batch_si is answered with batch_size=.
                yield f"{name if current and current == current.lower() else name.upper()}=", setting["help"]


def _values(known: Vocabulary, key: str, rest: list[str], environ: Mapping[str, str], cwd: Path) -> list[str]:
    name = key.lower().replace("-", "_")
    if name == known["job_word"]:
        return [*_job_files(known, "", cwd)]
    if name == "site":
        return known["sites"]
    if name == "run":
        return [word for word, _ in _runs(known, "", rest, environ, cwd)]
    return known["settings"][name]["values"] if name in known["settings"] else []


def _job_files(known: Vocabulary, current: str, cwd: Path) -> Iterator[str]:
    """Job files that come with holdfast, YAML files in the folder that is being written, and folders on the way to them."""
    yield from (f"jobs/{name}.yaml" for name in known["jobs"])
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


def _runs(known: Vocabulary, current: str, rest: list[str], environ: Mapping[str, str], cwd: Path) -> Iterator[Word]:
    """Ids of the runs in the runs directory; tasks of an array once its own id is written."""
    from jobs.run import store
    from jobs.run.rundir import RunDir

    given = [word.partition("=")[2] for word in rest if word.upper().startswith("RUNS_DIR=")]
    folder = cwd / (given[-1] if given else environ.get("HOLDFAST_RUNS_DIR") or environ.get("RUNS_DIR") or known["runs_dir"])
    array, dot, _ = current.rpartition(".")
    try:
        for entry in os.scandir(folder):
            run = RunDir(Path(entry.path))
            if entry.name.startswith(".") or not (entry.name.startswith(current) or entry.name == array):
                continue
            if run.job_yaml.is_file():
                yield entry.name, "array" if run.has_members else "run"
            if dot and entry.name == array and run.has_members:
                yield from ((member.id, "task") for member in store.members_of(run))
    except OSError:
        return


def _first_sentence(text: str) -> str:
    return text.partition("\n")[0].partition(";")[0]


def answer(root: Any, line: str) -> None:
    """Prints one candidate a line, with its help text behind a tab."""
    for word, help in candidates(root, line, os.environ, Path.cwd()):
        print(f"{word}\t{' '.join(help.split())}")

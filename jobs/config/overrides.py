"""The words behind a command: KEY=value, --key value, a job file; and the same from a make command line."""

from collections.abc import Iterable, Mapping

from jobs.config.setting_names import setting_name, shorten
from jobs.config.settings import JOB_WORD, Job, bare_type

# Words that a person may hand to make for the Makefile itself.
MAKE_WORDS = frozenset({"HOLDFAST_PYTHON", "HOLDFAST_INSTALL_SLURM", "HOLDFAST_PINS", "HOLDFAST_LAB", "ARGS", "TESTS"})
_SWITCH_WORDS = ("true", "false", "1", "0", "yes", "no", "on", "off")


def split_words(words: Iterable[str]) -> tuple[list[tuple[str, str]], str | None, list[str]]:
    """(KEY, value) pairs, the job file if one was named, and faults, from the words after a command.

    Understands KEY=value, --key=value, --key value, --flag and a path."""
    pairs: list[tuple[str, str]] = []
    job: str | None = None
    faults: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if word.startswith("--") and len(word) > 2:
            key = key[2:]
            if not equals:
                is_flag = not rest or rest[0].startswith("--") or (_is_switch(key) and rest[0].lower() not in _SWITCH_WORDS)
                value = "true" if is_flag else rest.pop(0)
        elif equals and key and all(c.isalnum() or c in "_-" for c in key):
            pass
        else:
            if job is not None:
                faults.append(f"{shorten(word)!r}: a second job file beside {shorten(job)!r} (command line); settings are written KEY=value.")
            job = word
            continue
        if key.lower() == JOB_WORD:
            job = value
        else:
            pairs.append((key, value))
    return pairs, job, faults


def _is_switch(word: str) -> bool:
    """Whether --word may stand without a value. Every other setting takes the next word, whatever it looks like."""
    name = setting_name(word)
    return name == "use_amp" or (name in Job.model_fields and bare_type(str(name)) is bool)


def words_from_make(environ: Mapping[str, str]) -> list[str]:
    """The KEY=value words of a make command line, unexpanded, from MAKEFLAGS.

    make exports such words to the recipe, but only after expanding `$(...)` in them; here they are read as typed."""
    flags = environ.get("MAKEFLAGS", "")
    # A make started with -f or -C only, or none at all, has no ` -- `.
    _, separator, tail = (" " + flags).partition(" -- ")
    if not separator:
        return []
    words, current, escaped = [], "", False
    for char in tail:
        if escaped:
            current, escaped = current + char, False
        elif char == "\\":
            escaped = True
        elif char == " ":
            words.append(current)
            current = ""
        else:
            current += char
    words.append(current)
    plain = [word.replace("$$", "$") for word in words if "=" in word]
    return [word for word in plain if word.partition("=")[0] not in MAKE_WORDS]

"""The console script: answers a Tab and a repeated `render` from what was kept, and hands everything else to the command line.

Importing the settings and the template engine takes 0.2 s; Python itself starts in 0.012 s. A script depends on the words,
the folder, the variables that are settings, the job and site files and our own code, and on nothing else. So an answer is
kept together with all of these, and is given again only when every one of them is the same. Deleting the folder
`holdfast/render` in the user's cache folder is always safe. Nothing but io, os, sys and zlib is imported on this path.
"""

import os
import sys
import zlib

from launcher.output.streams import flush_output, tolerate_closed_pipes

_SEPARATOR = "\x1e"
_MAX_KEPT_BYTES = 1_000_000


def main() -> int:
    """Entry point of the console script."""
    tolerate_closed_pipes()
    return flush_output(_run())


def _run() -> int:
    if sys.argv[1:2] == ["render"] and not {"--help", "-h"} & set(sys.argv):
        answer = kept(sys.argv[2:])
        if answer is not None:
            sys.stdout.write(answer)
            return 0
    if sys.argv[1:3] == ["completion", "--line"] and len(sys.argv) == 4:
        from launcher.cli.completion import answer as say_what_may_follow

        say_what_may_follow(sys.argv[3])
        return 0
    from launcher.cli.app import run_app

    return run_app()


def kept(words: list[str]) -> str | None:
    """The script for these words, if all that it depends on is as it was when the script was made."""
    try:
        with open(_place(words), encoding="utf-8", newline="") as file:
            text = file.read(_MAX_KEPT_BYTES)
        names, files, stamp, answer, end = text.split(_SEPARATOR)
        if end == "end" and stamp == _stamp(words, names.split("\n"), files.split("\n")):
            return answer
    except (OSError, ValueError):
        pass
    return None


def keep(words: list[str], names: list[str], files: list[str], answer: str) -> None:
    """Keeps a script with what it depends on: names of variables, and files. Failing to is no error."""
    try:
        stamp = _stamp(words, names, files)
        parts = ["\n".join(names), "\n".join(files), stamp, answer]
        if any(_SEPARATOR in part for part in parts) or any("\n" in name for name in (*names, *files)):
            return
        keep_text(_place(words), _SEPARATOR.join([*parts, "end"]))
    except (OSError, ValueError):
        return


def in_cache(*names: str) -> str:
    """A place in our part of the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "holdfast", *names)


def keep_text(place: str, text: str) -> None:
    """Writes a file of the cache folder, whole or not at all, for the user's eyes only. Raises OSError and UnicodeEncodeError."""
    from pathlib import Path

    from jobs.core.atomic_write import replace_file

    os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
    replace_file(Path(place), text, mode=0o600, flush=False)


def _place(words: list[str]) -> str:
    return in_cache("render", f"{zlib.crc32(_word_stamp(words).encode('utf-8', 'surrogateescape')):08x}")


def _word_stamp(words: list[str]) -> str:
    return repr((words, os.getcwd(), sys.executable, os.environ.get("MAKEFLAGS")))


def _stamp(words: list[str], names: list[str], files: list[str]) -> str:
    """Everything that the answer depends on, as text: words and folder, variables, content of job and site files, code."""
    parts = [_word_stamp(words), repr([(name, os.environ.get(name)) for name in names])]
    # A variable with our prefix may be new, and then it must be refused.
    parts.append(repr(sorted(name for name in os.environ if name.startswith("HOLDFAST_"))))
    for path in files:
        if path.endswith((".py", ".j2")):
            status = os.stat(path)
            parts.append(f"{path} {status.st_size} {status.st_mtime_ns}")
        elif not os.path.exists(path):
            # A job file of one's own that would go before the one of the same name that comes with holdfast.
            parts.append(f"{path} absent")
        else:
            with open(path, "rb") as file:
                parts.append(f"{path} {file.read(_MAX_KEPT_BYTES)!r}")
    return repr(parts).replace(_SEPARATOR, "")


if __name__ == "__main__":
    sys.exit(main())

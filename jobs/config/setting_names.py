"""Which setting a word means, and what to say of a word that means none."""

import difflib
from collections.abc import Iterable
from typing import Any

from jobs.config import lr_suggestions
from jobs.config.settings import NAME_ALIASES, Job, names

PREFIX = "HOLDFAST_"
# Variables of ours that are not settings of a job, so that a misspelt HOLDFAST_ name can be told from them.
OTHER_VARIABLES = frozenset(
    {
        "HOLDFAST_RUN_DIR",
        "HOLDFAST_ATTEMPT",
        "HOLDFAST_JOB_ID",
        "HOLDFAST_RANK_LOG",
        "HOLDFAST_LOG_OFFSET",
        "HOLDFAST_STARTED",
        "HOLDFAST_NOTIFY_WEBHOOK",
        "HOLDFAST_LAB",
        "HOLDFAST_PYTHON",
        "HOLDFAST_INSTALL_SLURM",
        "HOLDFAST_SLURM_PREFIX",
        "HOLDFAST_PINS",
    }
)
# Two words of other tools that together mean one setting here.
AMP_WORDS = ("use_amp", "amp_dtype")


def setting_name(word: str) -> str | None:
    """The setting that a word means (`BATCH_SIZE`, `batch-size`, `mixed_precision`), or None."""
    name = word.lower().replace("-", "_")
    name = NAME_ALIASES.get(name, name)
    return name if name in Job.model_fields or name in AMP_WORDS else None


def unknown_setting(word: str, origin: str) -> str:
    """The fault of a word that names no setting: where it belongs, or the nearest one that is a setting."""
    where = lr_suggestions.belongs(word)
    return f"{quoted(word)} is not a setting ({origin}).{f' {where}' if where else hint(word)}"


def hint(word: str, prefix: str = "") -> str:
    known = [name.upper() for name in (*names(), *NAME_ALIASES, *AMP_WORDS)]
    near = difflib.get_close_matches(word.upper().replace("-", "_"), known, 1, 0.6)
    return f" Did you mean {prefix}{near[0]}?" if near else " `holdfast explain` lists the settings."


def alias_notes(pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    notes = []
    for key, _ in pairs:
        name = setting_name(key)
        if name and name != key.lower().replace("-", "_"):
            notes.append(f"{key} is read as {name.upper()}")
    return tuple(notes)


def quoted(text: str) -> str:
    """A name as it was given; between quotes where it would not stay one short word of one line."""
    return text if text.isprintable() and text.strip() == text and 0 < len(text) <= 60 else repr(shorten(text))


def shorten(value: Any) -> Any:
    return value if not isinstance(value, str) or len(value) <= 60 else value[:57] + "..."

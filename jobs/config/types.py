"""The forms in which the value of a setting may be written, and what is refused: a time, a list in one word, a name of a folder.

Each is an annotated type that a field of `jobs.config.settings.Job` has; its message says what is wrong and what is allowed.
"""

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from jobs.core.contract import RankEnv
from jobs.core.imports import nearest
from jobs.specs.lr_schedule import KINDS
from jobs.specs.precision import ALIASES, AUTO, FP8_RECIPES, Precision


def _printable(text: str) -> str:
    bad = sorted({f"U+{ord(c):04X}" for c in text if ord(c) < 32 or ord(c) == 127 or c in "\x85\u2028\u2029"})
    if bad:
        raise ValueError(f"has the control character {', '.join(bad)}; a batch script can carry one line of text only")
    return text


def _one_line(text: str) -> str:
    _printable(text)
    if len(text) > 1000:
        raise ValueError(f"is {len(text)} characters long; Slurm options of up to 1000 are passed on")
    return text


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("has a NUL character, which no environment or command line can carry")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise ValueError("is not valid UTF-8") from err
    return text


def _slug(text: str) -> str:
    if not text or len(text) > 64 or not all(c.isascii() and (c.isalnum() or c in "._-") for c in text) or text[0] in ".-":
        raise ValueError("must be 1 to 64 of the characters A-Z a-z 0-9 . _ - and not begin with . or -, since it names a folder and a job")
    return text


def _environment(values: dict[str, str]) -> dict[str, str]:
    for name in values:
        if not (name.isascii() and name.isidentifier()):
            raise ValueError(f"{name[:60]!r} cannot be the name of an environment variable")
        if name in RankEnv.__members__.values():
            raise ValueError(f"{name} is set by holdfast itself for every process")
    return values


def _no_address(text: str) -> str:
    if "://" in text:
        raise ValueError(
            "is an address, which is a secret and would be written into the run directory; put it into a file that only you can read and name that, or export HOLDFAST_NOTIFY_WEBHOOK"
        )
    return text


def _options(values: dict[str, str]) -> dict[str, str]:
    for name in values:
        if not re.fullmatch(r"-{0,2}[a-z][a-z0-9_-]+", name):
            raise ValueError(f"{name[:60]!r} cannot be the long name of an sbatch option")
    return values


def _portable(values: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (ValueError, TypeError, RecursionError):
        raise ValueError("holds something else than numbers, text, lists and mappings of these, so no job file can carry it") from None
    try:
        json.dumps(values, allow_nan=False)
    except ValueError:
        raise ValueError("holds a number that is infinite or none at all, which no job file can carry; give a finite one, or leave it out") from None
    return values


def parse_minutes(value: Any) -> Any:
    """Minutes from Slurm's own forms: 90, 90:00, 24:00:00, 2-12, 2-12:30, 2-12:30:00 (sbatch(1), --time).

    Seconds are rounded up to a minute, as Slurm does. Raises ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip()
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    try:
        numbers = [int(part) for part in parts]
        day_minutes = int(days) * 1440 if dash else 0
    except ValueError:
        raise ValueError("is not a time; write minutes (90), hours (24:00:00) or days (2-12:00:00)") from None
    if len(numbers) > 3 or min(numbers) < 0 or day_minutes < 0:
        raise ValueError("is not a time; write minutes (90), hours (24:00:00) or days (2-12:00:00)")
    if dash:
        hours, minutes, seconds = (numbers + [0, 0])[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, (numbers + [0])[:2]
    return day_minutes + hours * 60 + minutes + (1 if seconds else 0)


def format_minutes(minutes: int) -> str:
    """Slurm's d-hh:mm:00 or hh:mm:00 for a number of minutes."""
    days, rest = divmod(minutes, 1440)
    clock = f"{rest // 60:02d}:{rest % 60:02d}:00"
    return f"{days}-{clock}" if days else clock


def _precision_word(value: Any) -> Any:
    return ALIASES.get(str(value).lower(), value)


def _items(value: Any) -> Any:
    """`a,b` for a list given as one word on a command line or in the environment."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def _pairs(value: Any) -> Any:
    """`A=1,B=2` for a mapping given as one word; YAML scalars become text."""
    if isinstance(value, str):
        pairs = [item.partition("=") for item in value.split(",") if item.strip()]
        for key, equals, _ in pairs:
            if not equals:
                raise ValueError(f"{key.strip()!r} has no value; write NAME=value, separated by commas")
        return {key.strip(): text.strip() for key, _, text in pairs}
    if isinstance(value, dict):
        return {str(key): item if isinstance(item, (str, dict, list)) else _scalar_text(item) for key, item in value.items()}
    return value


def _number_or_auto(unit: str) -> Callable[[Any], Any]:
    """A whole number of at least 1, or the word auto."""

    def read(value: Any) -> Any:
        text = str(value).strip().lower()
        if text == "auto":
            return "auto"
        try:
            number = int(text)
        except ValueError:
            number = 0
        if number < 1 or isinstance(value, bool):
            raise ValueError(f"is neither a number of {unit} of at least 1 nor auto")
        return number

    return read


_MOST_PROFILED = 50


def step_range(text: str) -> tuple[int, int]:
    """First and last step of `10-14`, or of `10` alone. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError("is not a range of steps; write it like 10-14, counted from 1")
    if last - first >= _MOST_PROFILED:
        raise ValueError(f"is more than {_MOST_PROFILED} steps: no viewer opens such a trace")
    return first, last


def _step_range(value: Any) -> Any:
    step_range(str(value))
    return str(value).strip()


def _scalar_text(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# Where metrics may go beside metrics.jsonl, by the names that Accelerate has for them; auto is TensorBoard where it is installed.
AUTO_TRACKER = "auto"
TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio")


def _trackers(given: tuple[str, ...]) -> tuple[str, ...]:
    known = (*TRACKERS, AUTO_TRACKER)
    for name in given:
        if name not in known:
            close = nearest(name, known)
            raise ValueError(
                f"has {name[:60]!r}, which is no tracker; choose of {', '.join(TRACKERS)}, or auto or none." + (f" Did you mean {close!r}?" if close else "")
            )
    if AUTO_TRACKER in given and len(given) > 1:
        raise ValueError("has auto beside others; name all that you want")
    return tuple(dict.fromkeys(given))


Text = Annotated[str, AfterValidator(_storable)]
Line = Annotated[str, AfterValidator(_storable), AfterValidator(_one_line)]
Slug = Annotated[str, AfterValidator(_slug)]
# The types behind the second argument are what a job file may say; the JSON schema is made from them.
_Scalar = str | int | float | bool | None
Command = Annotated[str, AfterValidator(_storable), AfterValidator(_printable)]
Words = Annotated[tuple[Line, ...], BeforeValidator(_items, list[str] | str | None)]
Arguments = Annotated[tuple[Command, ...], BeforeValidator(_items, list[str] | str | None)]
Pairs = Annotated[dict[str, Line], BeforeValidator(_pairs, dict[str, _Scalar] | str | None)]
Minutes = Annotated[int, BeforeValidator(parse_minutes, int | str), Field(ge=1)]
_AtLeastOneOrAuto = Annotated[int, Field(ge=1)] | Literal["auto"]
Interval = Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto("steps"), _AtLeastOneOrAuto)]
# What `auto` means for the gradients that DDP reduces at once (train/distributed/parallel.py): this part of them on one node, torch's own size, MB, on several.
BUCKETS, SMALL_BUCKET_MB = 6, 25
Megabytes = Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto("MB"), _AtLeastOneOrAuto)]
Steps = Annotated[str, BeforeValidator(_step_range, int | str)]

FileName = Annotated[Line, AfterValidator(_no_address)]
Trackers = Annotated[Words, AfterValidator(_trackers)]
Environment = Annotated[Pairs, AfterValidator(_environment)]
LongOptions = Annotated[Pairs, AfterValidator(_options)]
Options = Annotated[dict[str, Any], AfterValidator(_portable)]
PrecisionWord = Annotated[Precision, BeforeValidator(_precision_word, Precision | Literal[*ALIASES, AUTO, False])]

# Words of a table that is at home elsewhere: a row there is a word here.
if TYPE_CHECKING:
    ScheduleKind = str
    Fp8Backend = str
    Fp8Recipe = str
else:
    ScheduleKind = Literal[KINDS]
    Fp8Backend = Literal[tuple(FP8_RECIPES)]
    Fp8Recipe = Literal[tuple(dict.fromkeys(recipe for recipes in FP8_RECIPES.values() for recipe in recipes))]

"""The layers that settings come from, each read as it was given: site file, job file, environment, command line."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.config import lr_suggestions
from jobs.config.job_files import DEFAULT_JOB, find_job_file
from jobs.config.overrides import split_words
from jobs.config.setting_names import AMP_WORDS, OTHER_VARIABLES, PREFIX, alias_notes, hint, quoted, setting_name, shorten, unknown_setting
from jobs.config.settings import NAME_ALIASES, group_of, names
from jobs.config.yaml_io import read_yaml
from jobs.core.errors import NotFoundError, SettingError

# YAML keys that are headings only: what stands under them is read as if it stood at the top.
HEADINGS = frozenset({"training", *map(group_of, names())})
LoadSite = Callable[[str], tuple[Path, str]]


@dataclass(frozen=True)
class Given:
    """One value as it was found, before it is checked."""

    name: str
    value: Any
    origin: str


@dataclass
class Layer:
    """The values of one source, and the faults found while reading it. `by_hand`: somebody gave them for this very run."""

    given: list[Given] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    by_hand: bool = False

    def add(self, word: str, value: Any, origin: str) -> None:
        name = setting_name(word)
        if name is None:
            self.faults.append(unknown_setting(word, origin))
        else:
            self.given.append(Given(name, value, origin))


@dataclass(frozen=True)
class Gathered:
    """All that words, environment and files say, lowest layer first; the command line apart, since more may be said there."""

    below: list[Layer]
    command_line: Layer
    default_name: str
    notes: tuple[str, ...]
    files: tuple[str, ...]


def gather(words: Iterable[str], environ: Mapping[str, str], cwd: Path, load_site: LoadSite, job_file: str | None) -> Gathered:
    pairs, named, faults = split_words(words)
    asked = named or job_file or environ.get("HOLDFAST_JOB") or environ.get("JOB")
    command_line = Layer(faults=faults, by_hand=True)
    for key, value in pairs:
        command_line.add(key, value, "command line")
    environment = _environment_layer(environ)
    own_script = next((str(given.value) for layer in (command_line, environment) for given in layer.given if given.name == "entry"), None)
    if own_script and not asked:
        # The default job file is an example of the built-in training: its learning rate is nothing to a script of somebody's own.
        file_layer, path, default_name = Layer(), None, own_script.removeprefix("-m ").strip().rpartition("/")[2].removesuffix(".py")
    else:
        path, shown = find_job_file(asked or DEFAULT_JOB, cwd)
        file_layer, default_name = _file_layer(read_yaml(path, shown), shown), path.stem

    site_word = "generic"
    site_origin = "default"
    for layer in (file_layer, environment, command_line):
        for given in layer.given:
            if given.name == "site":
                site_word, site_origin = str(given.value), given.origin
    site_layer, site_path = Layer(), Path()
    try:
        site_path, site_shown = load_site(site_word)
        site_layer = _file_layer(read_yaml(site_path, site_shown), site_shown)
    except (NotFoundError, SettingError) as err:
        site_layer.faults.append(f"{err} (SITE from {site_origin})" if isinstance(err, NotFoundError) else str(err))
    except OSError as err:
        site_layer.faults.append(f"SITE: {shorten(site_word)!r} cannot be read: {err.strerror} ({site_origin}).")
    except ValueError:
        pass  # NUL, or not encodable: the setting's own check says so below

    files = (*([str(cwd / (asked or DEFAULT_JOB)), str(path)] if path else []), str(site_path))
    return Gathered([site_layer, file_layer, environment], command_line, default_name, alias_notes(pairs), files)


def _environment_layer(environ: Mapping[str, str]) -> Layer:
    layer = Layer(by_hand=True)
    for prefix in ("", PREFIX):  # the prefixed ones last: they win, also over another word for the same thing
        for name in [*NAME_ALIASES, *AMP_WORDS, *names()]:
            variable = prefix + name.upper()
            if variable in environ:
                layer.add(name, environ[variable], f"environment {variable}")
    for variable in environ:
        word = variable.removeprefix(PREFIX)
        if variable.startswith(PREFIX) and variable not in OTHER_VARIABLES and word != "JOB" and setting_name(word) is None:
            layer.faults.append(f"{quoted(variable)} is not a setting (environment).{hint(word, PREFIX)}")
    return layer


def _file_layer(content: Mapping[str, Any], shown: str) -> Layer:
    layer = Layer()
    _add_block(layer, content, shown)
    for name in sorted({given.name for given in layer.given}):
        if sum(given.name == name for given in layer.given) > 1:
            layer.faults.append(f"{name.upper()} is given twice, under two words for it ({shown}); give one.")
    return layer


def _add_block(layer: Layer, content: Mapping[Any, Any], shown: str) -> None:
    for key, value in content.items():
        key = str(key)
        is_block = isinstance(value, dict)
        if is_block and key in HEADINGS:
            _add_block(layer, value, f"{shown}, {key}")
        elif is_block and setting_name(key) is None:
            layer.faults.append(lr_suggestions.unknown_block(quoted(key), value, shown, HEADINGS))
        else:
            layer.add(key, value, shown)

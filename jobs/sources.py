"""Where settings come from, in which order, and how the answer remembers it.

    default  <  site file  <  job file  <  environment  <  command line

`resolve` gathers every layer, reports every fault of all of them at once, and returns a frozen `Job` together with
the origin of each value. It reads no global state: environment and words are handed in.
"""

import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from jobs import advice, misplaced, plain_yaml, rules, secret
from jobs.errors import ImpossibleJobError, NotFoundError, SettingError
from jobs.precision import AUTO, Precision
from jobs.settings import JOB_WORD, NAME_ALIASES, Job, names

DEFAULT_JOB = "jobs/quickstart.yaml"
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
        "HOLDFAST_PINS",
    }
)
# Words that a person may hand to make for the Makefile itself.
MAKE_WORDS = frozenset({"HOLDFAST_PYTHON", "HOLDFAST_INSTALL_SLURM", "HOLDFAST_PINS", "HOLDFAST_LAB", "ARGS", "TESTS"})

# Two words of other tools that together mean one setting here.
_AMP_WORDS = ("use_amp", "amp_dtype")
# YAML keys that are headings only: what stands under them is read as if it stood at the top.
HEADINGS = frozenset({"training", "run", "slurm", "site", "retries", "model", "data", "batch", "optimizer", "precision", "loop"})
_MAPPINGS = frozenset({"node_env", "sbatch_options", "model_options", "data_options", "lr_scheduler_params"})

LoadSite = Callable[[str], tuple[Path, str]]


@dataclass(frozen=True)
class Given:
    """One value as it was found, before it is checked."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Resolved:
    """A checked job, where each of its values came from, remarks about what was understood how, and the files that were read."""

    job: Job
    origins: dict[str, str]
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def not_default(self) -> dict[str, str]:
        """Name -> origin of all values that a person or a site chose."""
        return {name: origin for name, origin in self.origins.items() if origin not in ("default", "derived")}


@dataclass
class _Layer:
    """The values of one source, and the faults found while reading it."""

    given: list[Given] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, word: str, value: Any, origin: str) -> None:
        name = setting_name(word)
        if name is None:
            self.faults.append(unknown_setting(word, origin))
        else:
            self.given.append(Given(name, value, origin))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML 1.2 scalars: `no` is a word, 24:00:00 is text, 1e-3 is a number, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a name is one word, not a list or a mapping", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_decimal(self, node: yaml.ScalarNode) -> int | str:
        """010 is ten. YAML 1.1 reads it as octal, and cannot read 08 at all."""
        text = str(self.construct_scalar(node))
        try:
            return int(text)
        except ValueError:  # longer than Python converts, or tagged !!int by hand: no setting takes it
            return text


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)

_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+0123456789."),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
):
    for _char in _first:
        _Loader.yaml_implicit_resolvers.setdefault("" if _char == "\0" else _char, []).append((_tag, re.compile(_pattern)))


def read_yaml(path: Path, shown: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises SettingError with file and line when it is none."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as err:
        raise SettingError(f"{shown}: not a text file in UTF-8 ({err.reason} at byte {err.start})") from err
    except OSError as err:
        raise NotFoundError(f"{shown}: cannot be read: {err.strerror}") from err
    try:
        # _Loader derives from SafeLoader: it builds plain values only.
        content = plain_yaml.read(text) or yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark
        where = f"{shown}:{mark.line + 1}" if mark else shown
        raise SettingError(f"{where}: not valid YAML: {err.problem}") from err
    except yaml.YAMLError as err:
        raise SettingError(f"{shown}: not valid YAML: {' '.join(str(err).split())}") from err
    except (ValueError, KeyError, RecursionError) as err:
        # A scalar with an explicit tag that does not fit it, or brackets nested a thousand deep.
        raise SettingError(f"{shown}: not readable: {type(err).__name__}: {err}") from err
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingError(f"{shown}: holds a {type(content).__name__}, not settings; write lines of the form name: value")
    return {str(key): value for key, value in content.items()}


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text that `read_yaml` reads back to the same values, whatever characters they hold."""
    return "".join(f"{key}: {_flow(value)}\n" for key, value in values.items())


def _flow(value: Any) -> str:
    """A value in YAML's flow style, which is JSON with two exceptions.

    JSON strings are YAML strings, and quoting every one leaves nothing to the resolvers of any YAML version; but above
    U+FFFF JSON writes two surrogates, which YAML reads as two characters, and a long key needs a mark in YAML."""
    if isinstance(value, dict):
        pairs = [(_flow(key if isinstance(key, str) else json.dumps(key)), _flow(item)) for key, item in value.items()]
        return "{" + ", ".join(f"{'? ' if len(key) > _SIMPLE_KEY else ''}{key}: {item}" for key, item in pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    text = _json(value)
    return text if text.isascii() and text.isprintable() else _NOT_ASCII.sub(_yaml_escape, text)


_json = json.JSONEncoder(ensure_ascii=False).encode
# YAML 1.2, 7.4.2: a key without a mark has 1024 characters at most.
_SIMPLE_KEY = 1000
_NOT_ASCII = re.compile(r"[^\x20-\x7e]")


def _yaml_escape(char: re.Match[str]) -> str:
    return f"\\U{ord(char[0]):08x}"


def setting_name(word: str) -> str | None:
    """The setting that a word means (`BATCH_SIZE`, `batch-size`, `mixed_precision`), or None."""
    name = word.lower().replace("-", "_")
    name = NAME_ALIASES.get(name, name)
    return name if name in Job.model_fields or name in _AMP_WORDS else None


def shipped_jobs() -> list[str]:
    """Names of the job files that come with holdfast."""
    return sorted(path.stem for path in Path(str(resources.files("jobs"))).glob("*.yaml"))


def unknown_setting(word: str, origin: str) -> str:
    """The fault of a word that names no setting: where it belongs, or the nearest one that is a setting."""
    where = misplaced.belongs(word)
    return f"{_word(word)} is not a setting ({origin}).{f' {where}' if where else _hint(word)}"


def number_type(name: str) -> type | None:
    """int or float for a setting that is a plain number, else None."""
    kind = _bare_type(name)
    return kind if kind in (int, float) else None


def is_mapping(name: str) -> bool:
    return name in _MAPPINGS


def find_job_file(word: str, cwd: Path) -> tuple[Path, str]:
    """The job file that `word` names: a path, or the name of one that comes with holdfast. Raises NotFoundError."""
    path = cwd / word
    if _is_file(path):
        return path.resolve(), word
    shipped, known = Path(str(resources.files("jobs"))), shipped_jobs()
    stem = Path(word).name.removesuffix(".yaml")
    if stem in known and word in (stem, f"{stem}.yaml", f"jobs/{stem}.yaml"):
        return shipped / f"{stem}.yaml", f"jobs/{stem}.yaml"
    near = difflib.get_close_matches(stem, known, 1)
    hint = f" Did you mean jobs/{near[0]}.yaml?" if near else f" These come with holdfast: {', '.join(known)}."
    raise NotFoundError(f"job file {_shorten(word)!r} does not exist in {cwd}.{hint}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have: too long, NUL, not encodable
        return False


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
                faults.append(f"{_shorten(word)!r}: a second job file beside {_shorten(job)!r} (command line); settings are written KEY=value.")
            job = word
            continue
        if key.lower() == JOB_WORD:
            job = value
        else:
            pairs.append((key, value))
    return pairs, job, faults


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


def resolve(
    words: Iterable[str],
    environ: Mapping[str, str],
    cwd: Path,
    load_site: LoadSite,
    *,
    job_file: str | None = None,
    allocation: Mapping[str, Any] | None = None,
    allocation_origin: str = "Slurm allocation",
) -> Resolved:
    """The job that these words, this environment and the files they name describe.

    `load_site` finds a site file by name. `allocation` is what is already given (by Slurm to a script that was
    submitted by hand, by the machine to a run in the foreground), and wins over everything. Raises SettingError with one line per fault, NotFoundError, or ImpossibleJobError
    when each value is fine and their combination is not."""
    gathered = _gather(words, environ, cwd, load_site, job_file)
    layers = [*gathered.below, gathered.command_line]
    if allocation:
        layers.append(_Layer([Given(name, value, allocation_origin) for name, value in allocation.items()]))
    resolved = _combine(layers, default_name=gathered.default_name, notes=gathered.notes, cwd=cwd)
    secret.check(resolved.job, resolved.origins, secret.secrets_of(environ))
    return replace(resolved, files=(*gathered.files, *resolved.files))


def resolve_each(words: Iterable[str], points: Iterable[Sequence[str]], environ: Mapping[str, str], cwd: Path, load_site: LoadSite) -> list[Resolved]:
    """What `resolve` says to `words` with the words of each point behind them. Files and environment are read once.

    Raises as `resolve` does, and SettingError for a point that names another job file or site."""
    gathered = _gather(words, environ, cwd, load_site, None)
    # Made plain once: the words of a mapping are YAML, and YAML takes its time.
    below = [replace(layer, given=[replace(given, value=_plain(given)) for given in layer.given]) for layer in (*gathered.below, gathered.command_line)]
    each, secrets = [], secret.secrets_of(environ)
    for point in points:
        pairs, named, faults = split_words(point)
        moved = [key for key, _ in pairs if setting_name(key) == "site"]
        if named is not None or moved:
            raise SettingError(f"{'SITE' if moved else 'JOB'} is the same for all runs that are submitted together (command line).")
        command_line = replace(below[-1], given=list(below[-1].given), faults=[*below[-1].faults, *faults])
        for key, value in pairs:
            command_line.add(key, value, "command line")
        resolved = _combine([*below[:-1], command_line], default_name=gathered.default_name, notes=(*gathered.notes, *_alias_notes(pairs)), cwd=cwd)
        secret.check(resolved.job, resolved.origins, secrets)
        each.append(replace(resolved, files=(*gathered.files, *resolved.files)))
    return each


@dataclass(frozen=True)
class _Gathered:
    """All that words, environment and files say, lowest layer first; the command line apart, since more may be said there."""

    below: list[_Layer]
    command_line: _Layer
    default_name: str
    notes: tuple[str, ...]
    files: tuple[str, ...]


def _gather(words: Iterable[str], environ: Mapping[str, str], cwd: Path, load_site: LoadSite, job_file: str | None) -> _Gathered:
    pairs, named, faults = split_words(words)
    asked = named or job_file or environ.get("HOLDFAST_JOB") or environ.get("JOB")
    command_line = _Layer(faults=faults)
    for key, value in pairs:
        command_line.add(key, value, "command line")
    environment = _environment_layer(environ)
    own_script = next((str(given.value) for layer in (command_line, environment) for given in layer.given if given.name == "entry"), None)
    if own_script and not asked:
        # The default job file is an example of the built-in training: its learning rate is nothing to a script of somebody's own.
        file_layer, path, default_name = _Layer(), None, own_script.removeprefix("-m ").strip().rpartition("/")[2].removesuffix(".py")
    else:
        path, shown = find_job_file(asked or DEFAULT_JOB, cwd)
        file_layer, default_name = _file_layer(read_yaml(path, shown), shown), path.stem

    site_word = "generic"
    site_origin = "default"
    for layer in (file_layer, environment, command_line):
        for given in layer.given:
            if given.name == "site":
                site_word, site_origin = str(given.value), given.origin
    site_layer, site_path = _Layer(), Path()
    try:
        site_path, site_shown = load_site(site_word)
        site_layer = _file_layer(read_yaml(site_path, site_shown), site_shown)
    except (NotFoundError, SettingError) as err:
        site_layer.faults.append(f"{err} (SITE from {site_origin})" if isinstance(err, NotFoundError) else str(err))
    except OSError as err:
        site_layer.faults.append(f"SITE: {_shorten(site_word)!r} cannot be read: {err.strerror} ({site_origin}).")
    except ValueError:
        pass  # NUL, or not encodable: the setting's own check says so below

    files = (*([str(cwd / (asked or DEFAULT_JOB)), str(path)] if path else []), str(site_path))
    return _Gathered([site_layer, file_layer, environment], command_line, default_name, _alias_notes(pairs), files)


def variables() -> list[str]:
    """Every environment variable that a job can depend on."""
    bare = [name.upper() for name in (*names(), *NAME_ALIASES, *_AMP_WORDS, JOB_WORD)]
    return [*bare, *(PREFIX + name for name in bare)]


def load(path: Path) -> Job:
    """The job of a run directory's job.yaml: nothing but the file counts."""
    values = read_yaml(path, str(path))
    try:
        return Job(**values)
    except ValidationError as err:
        raise SettingError("\n".join(_faults(err, {name: str(path) for name in values}, values))) from err


def amend(values: Mapping[str, Any], origins: Mapping[str, str], words: Iterable[str], origin: str = "command line") -> Resolved:
    """The job that these frozen values describe with KEY=value words over them; what the words gave has `origin` for origin.

    A value left out of `values` follows anew. Raises as `resolve` does."""
    pairs, named, faults = split_words(words)
    if named is not None:
        faults.append(f"{_shorten(named)!r} is neither a setting nor expected here ({origin}).")
    command_line = _Layer(faults=faults)
    for key, value in pairs:
        command_line.add(key, value, origin)
    # Beside warmup_steps the share counted for nothing, wherever it came from.
    void = {"warmup_pct"} if values.get("warmup_steps") is not None else set()
    frozen = _Layer([Given(name, value, origins.get(name, "default")) for name, value in values.items() if name not in void])
    resolved = _combine([frozen, command_line], default_name=str(values["job_name"]), notes=_alias_notes(pairs))
    secret.check(resolved.job, resolved.origins, {})
    return resolved


def _environment_layer(environ: Mapping[str, str]) -> _Layer:
    layer = _Layer()
    for prefix in ("", PREFIX):  # the prefixed ones last: they win, also over another word for the same thing
        for name in [*NAME_ALIASES, *_AMP_WORDS, *names()]:
            variable = prefix + name.upper()
            if variable in environ:
                layer.add(name, environ[variable], f"environment {variable}")
    for variable in environ:
        word = variable.removeprefix(PREFIX)
        if variable.startswith(PREFIX) and variable not in OTHER_VARIABLES and word != "JOB" and setting_name(word) is None:
            layer.faults.append(f"{_word(variable)} is not a setting (environment).{_hint(word, PREFIX)}")
    return layer


def _file_layer(content: Mapping[str, Any], shown: str) -> _Layer:
    layer = _Layer()
    _add_block(layer, content, shown)
    for name in sorted({given.name for given in layer.given}):
        if sum(given.name == name for given in layer.given) > 1:
            layer.faults.append(f"{name.upper()} is given twice, under two words for it ({shown}); give one.")
    return layer


def _add_block(layer: _Layer, content: Mapping[Any, Any], shown: str) -> None:
    for key, value in content.items():
        key = str(key)
        is_block = isinstance(value, dict) and setting_name(key) not in _MAPPINGS
        if is_block and key in HEADINGS:
            _add_block(layer, value, f"{shown}, {key}")
        elif is_block and setting_name(key) is None:
            layer.faults.append(misplaced.unknown_block(_word(key), value, shown, HEADINGS))
        else:
            layer.add(key, value, shown)


def _combine(layers: list[_Layer], default_name: str, notes: tuple[str, ...], cwd: Path | None = None) -> Resolved:
    faults = [fault for layer in layers for fault in layer.faults]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    rank: dict[str, int] = {}
    for index, layer in enumerate(layers):
        for given in layer.given:
            values[given.name], origins[given.name], rank[given.name] = _plain(given), given.origin, index
    _merge_amp_words(values, origins, rank, faults)
    for name in sorted(_MAPPINGS & set(values)):
        faults += misplaced.inside(name, values[name], origins[name])
    _merge_warmup(values, origins, rank, faults)
    # Two words for one thing: the higher layer's wins, and only within one layer is it a contradiction.
    if values.get("warmup_steps") is not None and values.get("warmup_pct") is not None:
        if rank["warmup_steps"] == rank["warmup_pct"]:
            faults.append(f"WARMUP_STEPS ({origins['warmup_steps']}) and WARMUP_PCT ({origins['warmup_pct']}) say the same thing twice; give one.")
        elif rank["warmup_steps"] < rank["warmup_pct"]:
            values["warmup_steps"] = None
    if values.get("warmup_steps") is not None:
        values["warmup_pct"], origins["warmup_pct"] = None, "derived"
    values.setdefault("job_name", _slug_of(default_name))
    origins.setdefault("job_name", "derived")
    taken: tuple[str, ...] = ()
    if str(values.get("precision")).lower() == AUTO:
        taken = _take_advice(values, origins, faults, cwd)
    job = None
    try:
        job = Job(**values)
    except ValidationError as err:
        faults.extend(_faults(err, origins, values))
    if faults or job is None:
        raise SettingError("\n".join(faults))

    problems, derived = rules.check(job, origins)
    if problems:
        raise ImpossibleJobError("This job cannot run as asked:\n" + "\n".join(f"  {problem}" for problem in problems))
    job = job.model_copy(update=derived)
    complete = {name: origins.get(name, "default") for name in Job.model_fields}
    complete |= {name: "derived" for name in derived if complete[name] == "default"}
    return Resolved(job, complete, notes, taken)


def _take_advice(values: dict[str, Any], origins: dict[str, str], faults: list[str], cwd: Path | None) -> tuple[str, ...]:
    """Puts what `holdfast precision` recommended in the place of PRECISION=auto. Returns the files that it depends on."""
    where = origins["precision"]
    if cwd is None:
        faults.append(f"PRECISION=auto ({where}) is looked up at submit; a run that exists needs a precision by its name.")
        values["precision"] = Precision.FP32
        return ()
    values["precision"] = Precision.FP32
    try:
        job = Job(**values)
    except ValidationError:
        return ()  # told by the caller
    found = advice.look_up(cwd / job.runs_dir, job)
    if found is None:
        faults.append(
            f"PRECISION=auto ({where}): MODEL={job.model} SEQ_LEN={job.seq_len} was not measured yet on this site's hardware in {job.runs_dir}/. `holdfast precision JOB` on a node does it, or name a precision."
        )
        return ()
    for name, value in found.settings.items():
        if name == "precision" or name not in values:
            values[name], origins[name] = value, f"auto: measured on {found.device}, {found.date}"
    return (str(found.path),)


def _merge_warmup(values: dict[str, Any], origins: dict[str, str], rank: dict[str, int], faults: list[str]) -> None:
    """Moves the warm-up out of lr_scheduler_params, where it may stand too, to the setting of that name; the higher layer's counts."""
    params = values.get("lr_scheduler_params")
    if not isinstance(params, dict) or params.get("warmup_steps") is None:
        return
    at = rank["lr_scheduler_params"]
    others = [name for name in ("warmup_steps", "warmup_pct") if values.get(name) is not None]
    values["lr_scheduler_params"] = {name: value for name, value in params.items() if name != "warmup_steps"}
    same = [name for name in others if rank[name] == at]
    if same:
        faults.append(f"warmup_steps under lr_scheduler_params and {same[0].upper()} ({origins[same[0]]}) say the same thing twice; give one.")
    elif all(rank[name] < at for name in others):
        values["warmup_steps"] = params["warmup_steps"]
        origins["warmup_steps"] = f"{origins['lr_scheduler_params']}: lr_scheduler_params"
        rank["warmup_steps"] = at


def _merge_amp_words(values: dict[str, Any], origins: dict[str, str], rank: dict[str, int], faults: list[str]) -> None:
    """Turns use_amp and amp_dtype into precision, unless a layer above them gives precision itself."""
    found = [word for word in _AMP_WORDS if word in values]
    if not found:
        return
    level = max(rank[word] for word in found)
    where = " and ".join(dict.fromkeys(origins[word] for word in found))
    use = str(values.pop("use_amp", True)).lower()
    dtype = str(values.pop("amp_dtype", "bfloat16")).lower()
    for word in found:
        origins.pop(word), rank.pop(word)
    if use not in ("true", "false", "1", "0"):
        faults.append(f"use_amp: {use!r} is neither true nor false ({where}).")
        return
    if dtype not in ("bfloat16", "float16", "bf16", "fp16"):
        faults.append(f"amp_dtype: {dtype!r} is not known ({where}); choose bfloat16 or float16.")
        return
    if rank.get("precision", -1) < level:
        values["precision"] = "fp32" if use in ("false", "0") else dtype.replace("bfloat16", "bf16").replace("float16", "fp16")
        origins["precision"], rank["precision"] = f"{where}: {' and '.join(found)}", level


def _plain(given: Given) -> Any:
    """A value as pydantic should see it: the words none and null clear an optional setting; mappings may be one word."""
    value = given.value
    if given.name not in Job.model_fields:
        return value
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
        if _is_optional(given.name):
            return None
        if typing.get_origin(_bare_type(given.name)) in (dict, tuple):
            return {} if typing.get_origin(_bare_type(given.name)) is dict else ()
    if isinstance(value, bool) and _bare_type(given.name) in (int, float):
        return str(value).lower()  # `nodes: true` is a slip, and Python would count it as 1
    if isinstance(value, str) and given.name in ("model_options", "data_options", "lr_scheduler_params"):
        return _mapping_from_word(value)
    return value


def _mapping_from_word(text: str) -> Any:
    """`{a: 1, b: 2}` or `a=1,b=2`; anything else is handed on, for pydantic to refuse."""
    try:
        if text.lstrip().startswith("{"):
            return yaml.load(text, _Loader)
        pairs = [item.partition("=") for item in text.split(",") if item.strip()]
        if all(equals for _, equals, _ in pairs):
            return {key.strip(): yaml.load(value, _Loader) for key, _, value in pairs}
    except yaml.YAMLError:
        pass
    return text


def _is_optional(name: str) -> bool:
    annotation = Job.model_fields[name].annotation
    return typing.get_origin(annotation) in (typing.Union, types.UnionType) and type(None) in typing.get_args(annotation)


def _bare_type(name: str) -> Any:
    """The type of a setting without its None and its annotations: int, float, str, tuple[...], dict[...]."""
    annotation = Job.model_fields[name].annotation
    if _is_optional(name):
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


_SWITCH_WORDS = ("true", "false", "1", "0", "yes", "no", "on", "off")


def _is_switch(word: str) -> bool:
    """Whether --word may stand without a value. Every other setting takes the next word, whatever it looks like."""
    name = setting_name(word)
    return name == "use_amp" or (name in Job.model_fields and _bare_type(str(name)) is bool)


def _faults(err: ValidationError, origins: Mapping[str, str], values: Mapping[str, Any]) -> list[str]:
    """One line per fault: what, where from, what is allowed."""
    lines = []
    for fault in err.errors(include_url=False):
        name = str(fault["loc"][0])
        value, context, kind = fault["input"], fault.get("ctx", {}), fault["type"]
        # A whole mapping is not printed back: it may be long, and node_env may hold a token.
        said = f"{name.upper()}:" if isinstance(value, (dict, list, tuple)) else f"{name.upper()}: {_shorten(value)!r}"
        if name == "notify_webhook_file":
            said = f"{name.upper()}:"  # it may be the secret itself
        inner = ".".join(_word(str(part)) for part in fault["loc"][1:] if not (isinstance(part, str) and "function" in part))
        if inner and isinstance(values.get(name), (dict, list, tuple)):
            said = f"{name.upper()}.{inner}: {_shorten(value)!r}"
        allowed: list[str] = []
        if kind == "int_parsing" or kind == "int_type" or kind == "int_from_float":
            problem = "is not a whole number"
        elif kind in ("float_parsing", "float_type"):
            problem = "is not a number"
        elif kind in ("bool_parsing", "bool_type"):
            problem = "is neither true nor false"
        elif kind in ("literal_error", "enum"):
            allowed = re.findall(r"'([^']*)'", str(context.get("expected", "")))
            problem = "is not known; choose one of " + ", ".join(allowed)
        elif kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
            word = {"greater_than_equal": "at least", "greater_than": "more than", "less_than_equal": "at most", "less_than": "less than"}[kind]
            problem = f"must be {word} {next(iter(context.values()))}"
        elif kind == "value_error":
            problem = str(context.get("error", fault["msg"]))
        elif kind == "extra_forbidden":
            said, problem = _word(name), f"is not a setting{_hint(name).rstrip('.')}"
        elif kind == "string_type":
            problem = "is not text; write it in quotes"
        elif kind == "finite_number":
            problem = "must be a finite number"
        else:
            problem = fault["msg"][0].lower() + fault["msg"][1:]
        near = difflib.get_close_matches(str(value).lower(), allowed, 1, 0.5) if allowed else []
        mean = f". Did you mean {near[0]!r}?" if near else "."
        line = f"{said} {problem} ({origins.get(name, 'default')}){mean}"
        if line not in lines:
            lines.append(line)
    return lines


def _hint(word: str, prefix: str = "") -> str:
    known = [name.upper() for name in (*names(), *NAME_ALIASES, *_AMP_WORDS)]
    near = difflib.get_close_matches(word.upper().replace("-", "_"), known, 1, 0.6)
    return f" Did you mean {prefix}{near[0]}?" if near else " `holdfast explain` lists the settings."


def _alias_notes(pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    notes = []
    for key, _ in pairs:
        name = setting_name(key)
        if name and name != key.lower().replace("-", "_"):
            notes.append(f"{key} is read as {name.upper()}")
    return tuple(notes)


def _word(text: str) -> str:
    """A name as it was given; between quotes where it would not stay one short word of one line."""
    return text if text.isprintable() and text.strip() == text and 0 < len(text) <= 60 else repr(_shorten(text))


def _shorten(value: Any) -> Any:
    return value if not isinstance(value, str) or len(value) <= 60 else value[:57] + "..."


def _slug_of(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:64] or "job"

"""Names that a person writes: refusing the unknown ones helpfully, and importing `package.module:name`.

Shared by the model registry, the data sources and the schedule, so that all of them answer a typing error in one voice.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jobs.core.errors import SettingError


def nearest(given: str, allowed: Iterable[str]) -> str | None:
    """The allowed name closest to what was given, or None where nothing is close."""
    return next(iter(difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)), None)


def unknown(what: str, given: str, allowed: Iterable[str]) -> SettingError:
    """The error for a name outside a closed set: what was given, what is allowed, what was probably meant."""
    names = list(allowed)
    close = nearest(given, names)
    hint = f" Did you mean {close!r}?" if close else ""
    return SettingError(f"{what}: {given!r} is not known; choose one of {', '.join(names)}.{hint}")


def check_form(what: str, given: str, specs: Iterable[str]) -> None:
    """Refuses what is none of `specs`, words such as `nano`, `hf:PATH` and `package.module:build`, without importing or opening anything."""
    known = list(specs)
    kind, colon, rest = given.partition(":")
    kinds = {spec.partition(":")[0] for spec in known if ":" in spec}
    if given not in known and not (colon and (kind in kinds or rest.isidentifier())):
        raise unknown(what, given, known)


def import_callable(what: str, spec: str) -> Callable[..., Any]:
    """The callable that `package.module:name` points to; SettingError says which half could not be found.

    Errors raised *by* the module while it is imported are left alone: their traceback is what its author needs."""
    module_name, _, attribute = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        if err.name is not None and not (module_name == err.name or module_name.startswith(err.name + ".")):
            raise  # the module exists; something that it imports does not
        raise SettingError(
            f"{what}: module {module_name!r} (from {spec!r}) cannot be found; it must be importable from the"
            " directory that training starts in, or be installed in its environment"
        ) from err
    found = getattr(module, attribute, None)
    if not callable(found):
        public = [name for name in vars(module) if not name.startswith("_") and callable(getattr(module, name))]
        close = nearest(attribute, public)
        hint = f" Did you mean {close!r}?" if close else ""
        raise SettingError(f"{what}: module {module_name!r} has no callable {attribute!r}.{hint}")
    return found  # type: ignore[no-any-return]


def call_with_accepted(what: str, build: Callable[..., Any], offered: Mapping[str, Any], required: Mapping[str, Any]) -> Any:
    """Call `build` with all of `required`, and with those of `offered` that its signature takes.

    A person's own builder need not list what it has no use for, but nothing that was set by hand may be dropped:
    an entry of `required` that the builder does not take is a SettingError naming what it does take."""
    parameters = inspect.signature(build).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    accepted = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not takes_all:
        for name in required:
            if name not in accepted:
                raise unknown(f"{what} builder parameter", name, accepted)
    usable = {name: value for name, value in offered.items() if takes_all or name in accepted}
    return build(**(usable | dict(required)))

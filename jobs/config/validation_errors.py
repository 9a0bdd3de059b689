"""What pydantic found wrong, in our words."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from jobs.config.setting_names import hint, quoted, shorten


def faults_of(err: ValidationError, origins: Mapping[str, str], values: Mapping[str, Any]) -> list[str]:
    """One line per fault: what, where from, what is allowed."""
    lines = []
    for fault in err.errors(include_url=False):
        name = str(fault["loc"][0])
        value, context, kind = fault["input"], fault.get("ctx", {}), fault["type"]
        # A whole mapping is not printed back: it may be long, and node_env may hold a token.
        said = f"{name.upper()}:" if isinstance(value, (dict, list, tuple)) else f"{name.upper()}: {shorten(value)!r}"
        if name == "notify_webhook_file":
            said = f"{name.upper()}:"  # it may be the secret itself
        inner = ".".join(quoted(str(part)) for part in fault["loc"][1:] if not (isinstance(part, str) and "function" in part))
        if inner and isinstance(values.get(name), (dict, list, tuple)):
            said = f"{name.upper()}.{inner}: {shorten(value)!r}"
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
            said, problem = quoted(name), f"is not a setting{hint(name).rstrip('.')}"
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

"""Reading metrics.jsonl: the launcher shows what training wrote. And cutting it back, where steps are trained again."""

import json
import os
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines, in order."""
    lines = []
    try:
        text = path.read_text()
    except OSError:
        return []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and "step" in values:
            lines.append(values)
    return lines


def cut_back(path: Path, step: int) -> None:
    """Takes out the lines after a step, and a torn last line: those steps will be trained again. Written aside, then renamed."""
    if not path.exists():
        return
    kept = [line for line in read(path) if int(line["step"]) <= step]
    aside = path.with_suffix(".tmp")
    with open(aside, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)

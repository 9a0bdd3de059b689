"""Folders that `datasets.Dataset.save_to_disk` wrote, and the message about a column that is not in the data."""

from pathlib import Path
from typing import Any

from jobs.core.errors import SettingError
from jobs.core.imports import nearest
from train.data.tokens import missing_file


def load_splits(path: Path) -> dict[str, Any]:
    """Split name -> rows; a set without splits is one named `train`. Raises SettingError for a folder that is none."""
    try:
        import datasets
    except ImportError as err:
        raise SettingError("data 'hfds:': the package datasets is not installed; install holdfast with its 'hf' group") from err
    if not path.exists():
        raise missing_file("hfds", path)
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as err:  # pyarrow's, json's or the library's own, by what is missing
        raise SettingError(
            f"data 'hfds:{path}': not a folder that save_to_disk wrote ({str(err).splitlines()[0] if str(err) else type(err).__name__})"
        ) from err
    return dict(found) if isinstance(found, dict) else {"train": found}


def no_column(where: str, column: str, names: list[str]) -> SettingError:
    close = nearest(column, names)
    hint = f" Did you mean --column {close}?" if close else ""
    return SettingError(f"{where}: has no column {column!r}; it has {', '.join(map(repr, names)) or 'none'}.{hint}")

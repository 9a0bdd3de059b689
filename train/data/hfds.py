"""Data sets of the `datasets` library as `save_to_disk` leaves them: a row is a sample, read from the memory map when needed.

A row of tokens (`input_ids` or `tokens`; with `labels` beside it where those say what counts), or of text, which is encoded
when it is read. Longer rows are cut at seq_len, shorter ones filled up with targets that do not count. `holdfast data build`
makes one stream of such a set instead, which neither cuts nor fills.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.core.errors import SettingError
from jobs.core.imports import unknown
from train.data.encode import Encoder, open_encoder
from train.data.saved import load_splits, no_column
from train.data.tokens import DEFAULT_VAL_SHARE
from train.data.windows import check_ids
from train.models.contract import IGNORE

OPTIONS = ("column", "tokenizer", "eos", "vocab_size", "val_share")
_TOKENS = ("input_ids", "tokens")
_TEXT = ("text", "content")
_VAL_NAMES = ("validation", "val", "valid", "test")


def open_rows(location: str, split: str, *, seq_len: int, vocab_size: int | None, options: Mapping[str, Any]) -> "Rows":
    """One split of a saved set. Without a split for validation every 20th row is for it (option val_share).

    Raises SettingError for an unknown option or column, or where nothing says how large the vocabulary is."""
    _check(options)
    path = Path(location).expanduser()
    splits = load_splits(path)
    val = next((name for name in _VAL_NAMES if name in splits), None)
    if "train" not in splits or (split == "val" and val is None and len(splits) > 1):
        raise SettingError(f"data 'hfds:{location}': has the splits {', '.join(splits)}; it needs train, and one of {', '.join(_VAL_NAMES)} or nothing else")
    rows, chosen = splits["train"], None
    if val is not None:
        rows = splits[val] if split == "val" else rows
    else:
        chosen = _every_nth(len(rows), float(options.get("val_share") or DEFAULT_VAL_SHARE), split)
    column = options.get("column") or next((name for name in (*_TOKENS, *_TEXT) if name in rows.column_names), None)
    if column is None:
        raise SettingError(
            f"data 'hfds:{location}': none of the columns {', '.join(rows.column_names)} is named as usual; name yours with DATA_OPTIONS=column=NAME"
        )
    if column not in rows.column_names:
        raise no_column(f"data 'hfds:{location}'", column, rows.column_names)
    kind = str(getattr(rows.features[column], "dtype", "list"))
    encoder = open_encoder(options.get("tokenizer"), options.get("eos"))
    is_text = kind in ("string", "large_string")
    size = options.get("vocab_size")
    size = size if size is not None else (encoder.vocab_size if is_text or options.get("tokenizer") else vocab_size)
    if size is None:
        raise SettingError(f"data 'hfds:{location}': nothing says how many tokens there are; give DATA_OPTIONS=vocab_size=N, or tokenizer=PATH")
    name = f"{path.name}-{getattr(rows, '_fingerprint', len(rows))}.{column}[{split}]"
    return Rows(rows, chosen, column, encoder if is_text else None, seq_len=seq_len, vocab_size=int(float(size)), name=name)


class Rows:
    """Sample i is row i of a table of the `datasets` library, or of those numbers of it that `chosen` holds."""

    fixed_shapes = True

    def __init__(self, rows: Any, chosen: NDArray[np.int64] | None, column: str, encoder: Encoder | None, *, seq_len: int, vocab_size: int, name: str):
        self._rows, self._chosen, self._column, self._encoder = rows, chosen, column, encoder
        self._labels = "labels" if encoder is None and "labels" in rows.column_names else column
        self.seq_len, self.vocab_size, self.name = seq_len, vocab_size, name
        self.unit = "byte" if encoder is not None and encoder.name == "bytes" else "token"
        if not len(self):
            raise SettingError(f"data {name!r} has no rows")

    def __len__(self) -> int:
        return len(self._rows) if self._chosen is None else len(self._chosen)

    def batch(self, ids: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """{"tokens", "targets"}: int64 [len(ids), seq_len] each; targets behind the end of a row are -100."""
        check_ids(ids, len(self))
        numbers = ids if self._chosen is None else self._chosen[ids]
        found = self._rows[numbers.tolist()]
        tokens = np.zeros((len(ids), self.seq_len), dtype=np.int64)
        targets = np.full((len(ids), self.seq_len), IGNORE, dtype=np.int64)
        texts_or_tokens = found[self._column]
        try:
            rows = self._encoder.encode([text or "" for text in texts_or_tokens]) if self._encoder else [_row(row) for row in texts_or_tokens]
        except (TypeError, ValueError) as err:
            raise SettingError(f"data {self.name!r}: column {self._column!r} holds neither text nor lists of whole numbers") from err
        try:
            labels = rows if self._labels == self._column else [_row(row) for row in found[self._labels]]
        except (TypeError, ValueError) as err:
            raise SettingError(f"data {self.name!r}: column {self._labels!r} does not hold lists of whole numbers") from err
        for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
            if (token := _outside(row, self.vocab_size)) is not None:
                raise SettingError(f"data {self.name!r} holds token {token}, its vocabulary is stated as {self.vocab_size}")
            if label is not row and (token := _outside(label[label != IGNORE], self.vocab_size)) is not None:
                raise SettingError(f"data {self.name!r} holds label {token}, its vocabulary is stated as {self.vocab_size}; what is not to count is {IGNORE}")
            given, wanted = row[: self.seq_len], label[1 : self.seq_len + 1]
            tokens[index, : len(given)], targets[index, : len(wanted)] = given, wanted
        return {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}


def _check(options: Mapping[str, Any]) -> None:
    """Raises SettingError for an option that there is not, or whose value is of another kind."""
    for name, value in options.items():
        if name not in OPTIONS:
            raise unknown("data_options of hfds", name, OPTIONS)
        if value is None:
            continue
        if name in ("column", "tokenizer", "eos"):
            if not isinstance(value, str):
                raise SettingError(f"data_options: {name} {value!r} must be text; in quotation marks, as '{name}=\"{value}\"', it is")
            continue
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if name == "val_share" and not 0 < number < 1:
            raise SettingError(f"data_options: val_share {value!r} must be between 0 and 1")
        if name == "vocab_size" and not (number.is_integer() and number >= 1):
            raise SettingError(f"data_options: vocab_size {value!r} must be a whole number of at least 1")


def _row(values: Any) -> NDArray[np.int64]:
    """A row of tokens or labels, [n]. Raises TypeError or ValueError for anything else."""
    row = np.asarray(() if values is None else values, dtype=np.int64)
    if row.ndim != 1:
        raise ValueError(f"{row.ndim} dimensions")
    return row


def _outside(tokens: NDArray[np.integer], vocab_size: int) -> int | None:
    """A token that the vocabulary does not have; None where there is none."""
    if len(tokens) and tokens.min() < 0:
        return int(tokens.min())
    return int(tokens.max()) if len(tokens) and tokens.max() >= vocab_size else None


def _every_nth(count: int, share: float, split: str) -> NDArray[np.int64]:
    """Rows of one split, spread evenly: saved sets are often sorted by something."""
    number = np.arange(count, dtype=np.int64)
    is_val = np.floor((number + 1) * share) > np.floor(number * share)
    return number[is_val == (split == "val")]

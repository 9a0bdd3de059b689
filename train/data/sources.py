"""Where samples come from: one protocol, and `open_data`, which turns the setting `data` into a dataset.

stdlib            source text of the running Python's standard library, bytes; nothing to download
text:PATH         a text file or a folder of text, bytes
tokens:PATH       memory-mapped token files (train/data/tokens.py has the forms that PATH can take); `holdfast data build`
                  makes them
hfds:PATH         a data set of the `datasets` library as save_to_disk leaves it, a row a sample (train/data/hfds.py)
synthetic         an affine recurrence over any vocabulary; its best loss is 0
digits            small real images, from scikit-learn
package.module:build    your own: a callable (split=, seq_len=, vocab_size=, cache_dir=, **data_options) -> Dataset
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.core.errors import SettingError
from jobs.core.imports import call_with_accepted, import_callable, unknown
from jobs.specs.model_presets import DATA_SPECS
from train.data.corpus import BYTE_VOCAB, Corpus, byte_entropy, load_split, stdlib_corpus, text_corpus
from train.data.synthetic import AffineTokens, Digits
from train.data.tokens import missing_file, split_tokens, write_tokens
from train.data.windows import TokenWindows

__all__ = ["Dataset", "Split", "byte_entropy", "open_data", "write_tokens"]

Split = Literal["train", "val"]
_WITHOUT_OPTIONS = ("stdlib", "text", "tokens", "synthetic", "digits")
_DEFAULT_VOCAB = 256


@runtime_checkable
class Dataset(Protocol):
    """Samples by number. The same number is the same sample in every process and in every attempt of a run.

    One that draws random numbers (augmentation) is exact with NUM_WORKERS=1 or more, which seed the global generators for
    each batch. An attribute `fixed_shapes = True` says that all samples have one shape, which CUDNN_BENCHMARK asks for; a text `content`
    is kept in checkpoints, and a resume with another one is refused."""

    name: str  # what was opened, versions included: a run that resumes can notice that it changed
    vocab_size: int  # how many different targets there can be: tokens, bytes or classes
    unit: str  # what the loss is an average over: "byte", "token" or "image"

    def __len__(self) -> int:
        """Number of samples; ids run from 0 to one less."""
        ...

    def batch(self, ids: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """The samples `ids`, stacked, as CPU tensors whose names are the keyword arguments of the model's forward."""
        ...


def open_data(
    spec: str,
    *,
    seq_len: int,
    split: Split,
    cache_dir: Path | None = None,
    vocab_size: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Dataset:
    """The dataset that `spec` names.

    seq_len: tokens per sample; images have no use for it. cache_dir: where built corpora may be kept.
    vocab_size: size of the model's vocabulary; data that needs more is refused, `synthetic` makes itself that size, and
    a token file that states none is believed to fit. options: of hfds, or keyword arguments of one's own. Relative paths start at the working directory.
    Raises SettingError for an unknown spec, a missing file, or data too small for one sample."""
    if split not in ("train", "val"):
        raise unknown("split", split, ("train", "val"))
    kind, colon, argument = spec.partition(":")
    if kind in ("text", "tokens", "hfds") and not argument:
        raise SettingError(f"data: {spec!r} needs a path behind it, such as {kind}:PATH")
    if kind in ("stdlib", "digits", "synthetic") and colon:
        raise SettingError(f"data: {kind!r} takes nothing behind it; write DATA={kind}")
    if options and kind in _WITHOUT_OPTIONS:
        raise SettingError(f"data_options: DATA={kind} takes none, {', '.join(options)} would have no effect")
    if kind == "stdlib":
        data: Dataset = _windows(stdlib_corpus(), split, seq_len, cache_dir)
    elif kind == "text":
        path = Path(argument).expanduser()
        if not path.exists():
            raise missing_file("text", path)
        data = _windows(text_corpus(path), split, seq_len, cache_dir)
    elif kind == "tokens":
        data = _token_file(argument, split, seq_len, vocab_size)
    elif kind == "hfds":
        from train.data.hfds import open_rows  # the library takes seconds to import

        data = open_rows(argument, split, seq_len=seq_len, vocab_size=vocab_size, options=options or {})
    elif kind == "synthetic":
        data = AffineTokens(seq_len=seq_len, vocab_size=vocab_size or _DEFAULT_VOCAB, split=split)
    elif kind == "digits":
        data = Digits(split=split)
    elif colon and argument.isidentifier():
        data = _own(spec, options or {}, seq_len=seq_len, split=split, cache_dir=cache_dir, vocab_size=vocab_size)
    else:
        raise unknown("data", spec, DATA_SPECS)
    if vocab_size is not None and data.vocab_size > vocab_size:
        raise SettingError(
            f"data {spec!r} has a vocabulary of {data.vocab_size}, the model one of {vocab_size}; use a model with a larger vocabulary or other data"
        )
    return data


def content_of(data: Dataset) -> str | None:
    """A short sum over what is in a dataset, where it tells: by it a resume notices what changed under the same name."""
    return getattr(data, "content", None)


def _windows(corpus: Corpus, split: Split, seq_len: int, cache_dir: Path | None) -> TokenWindows:
    stream = load_split(corpus, split, cache_dir)
    name = f"{corpus.name}-{corpus.total_bytes}[{split}]"
    return TokenWindows(stream, seq_len=seq_len, vocab_size=BYTE_VOCAB, name=name, unit="byte")


def _token_file(argument: str, split: Split, seq_len: int, vocab_size: int | None) -> TokenWindows:
    stream, stated, name = split_tokens(argument, split)
    size = stated or vocab_size
    if size is None:
        raise SettingError(
            f"data 'tokens:{argument}': nothing states the size of its vocabulary; write it with write_tokens, or put"
            ' {"vocab_size": N} into the JSON file beside it'
        )
    return TokenWindows(stream, seq_len=seq_len, vocab_size=size, name=name, unit="token")


def _own(spec: str, options: Mapping[str, Any], **offered: object) -> Dataset:
    data = call_with_accepted("data_options: data", import_callable("data", spec), offered, options)
    missing = [a for a in ("name", "vocab_size", "unit", "batch", "__len__") if not hasattr(data, a)]
    if missing:
        lacks = ", ".join(missing)
        raise SettingError(f"data: what {spec!r} returned has no {lacks}; see Dataset in train/data/sources.py")
    return data  # type: ignore[no-any-return]

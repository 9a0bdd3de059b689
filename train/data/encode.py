"""Text to tokens: by a local tokenizer (a tokenizer.json, or a folder of transformers), or byte by byte without one."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jobs.core.errors import SettingError
from jobs.core.imports import nearest
from train.data.corpus import BYTE_VOCAB

# What ends a text, in the words of the families that do not say it in a configuration beside the tokenizer.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


class Encoder(Protocol):
    """`end` is the token behind each text, None where texts are to run into each other."""

    name: str
    vocab_size: int
    end: int | None

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """The tokens of each text, its end included."""
        ...


class Bytes:
    """A byte is a token. A zero byte ends a text, as in the other byte-level data."""

    name = "bytes"
    vocab_size = BYTE_VOCAB
    end: int | None = 0

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        return [np.frombuffer(text.encode() + b"\0", dtype=np.uint8) for text in texts]


class Tokenizer:
    """A tokenizer of the `tokenizers` library, or one of transformers that has no such form."""

    def __init__(self, tokenizer: Any, vocab: dict[str, int], end: int | None, name: str):
        self._tokenizer, self.end, self.name = tokenizer, end, name
        # Not the length: there may be holes.
        self.vocab_size = max(vocab.values()) + 1

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        if hasattr(self._tokenizer, "encode_batch"):
            # The fast one leaves out where in the text each token lies.
            encode = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)
            rows = [encoding.ids for encoding in encode(list(texts), add_special_tokens=False)]
        else:
            rows = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        tail = [] if self.end is None else [self.end]
        return [np.array(ids + tail, dtype=np.int64) for ids in rows]


def open_encoder(location: str | None, eos: str | None = None) -> Encoder:
    """The encoder for a path; bytes without one. `eos` names the token that ends a text, `none` joins texts without one.

    Raises SettingError for a missing path, a file that is no tokenizer, or one whose end token cannot be found."""
    if location is None:
        if eos is not None:
            raise SettingError("--eos names a token of a tokenizer; bytes end with a zero byte. Give --tokenizer too")
        return Bytes()
    path = Path(location).expanduser()
    if not path.exists():
        raise SettingError(f"tokenizer {location!r}: not found; give a local tokenizer.json, or a folder that holds one: nothing is fetched")
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        tokenizer = _fast(file)
        vocab = tokenizer.get_vocab(with_added_tokens=True)
    else:
        tokenizer = _slow(path)
        vocab = tokenizer.get_vocab()
    if not vocab:
        raise SettingError(f"tokenizer {location!r}: its vocabulary is empty")
    return Tokenizer(tokenizer, vocab, _end(location, vocab, eos, _said_beside(file.parent)), path.name if path.is_dir() else path.parent.name or path.name)


def _fast(file: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Fast
    except ImportError as err:
        raise SettingError("--tokenizer: the package tokenizers is not installed; install holdfast with its 'hf' group") from err
    try:
        tokenizer = Fast.from_file(str(file))
    except Exception as err:  # the library raises a bare Exception
        raise SettingError(f"tokenizer {str(file)!r}: not a tokenizer.json ({err})") from err
    # A tokenizer.json may carry the length that a model was trained with: texts would lose their ends without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _slow(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as err:
        raise SettingError(f"tokenizer {str(folder)!r}: has no tokenizer.json, and transformers, which might read it, is not installed") from err
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as err:  # whatever is missing in the folder, each family says it in its own way
        raise SettingError(f"tokenizer {str(folder)!r}: transformers cannot read it ({str(err).splitlines()[0] if str(err) else type(err).__name__})") from err


def _said_beside(folder: Path) -> str | None:
    """The end token by the configuration files beside a tokenizer."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            said = json.loads((folder / name).read_text("utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError):
            continue
        token = said.get("content") if isinstance(said, dict) else said
        if isinstance(token, str):
            return token
    return None


def _end(location: str, vocab: dict[str, int], eos: str | None, said: str | None) -> int | None:
    if eos is not None and eos.lower() == "none":
        return None
    if eos is not None:
        if eos not in vocab:
            close = nearest(eos, vocab)
            raise SettingError(f"--eos: the tokenizer {location!r} has no token {eos!r}.{f' Did you mean {close!r}?' if close else ''}")
        return vocab[eos]
    found = _first(vocab, [*([said] if said else []), *_ENDS])
    if found is None:
        raise SettingError(f"tokenizer {location!r}: does not say which token ends a text; name it with --eos TOKEN, or --eos none to join texts without one")
    return vocab[found]


def _first(vocab: dict[str, int], names: Iterable[str]) -> str | None:
    return next((name for name in names if name in vocab), None)

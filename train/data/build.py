"""`python -m train.data.build`: token files out of text, JSON lines, parquet or saved data sets (`holdfast data build`).

The folder appears when everything in it is whole: it is built beside its final name and renamed. A document goes to training
or to validation by a hash of its text: the same one in any order of files, and two copies of a document to the same side.
"""

import argparse
import hashlib
import json
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jobs.core.contract import Exit
from jobs.core.errors import HoldfastError, SettingError
from train.data.documents import Source, documents, sources_of
from train.data.encode import Encoder, open_encoder
from train.data.tokens import DEFAULT_VAL_SHARE, dtype_for, write_note

# Texts that are encoded at a time: enough to keep the tokenizer's threads busy.
_CHUNK_TEXTS, _CHUNK_CHARS = 1024, 1 << 22
_SAY_EVERY_S = 10.0
_SPLITS = ("train", "val")


@dataclass(frozen=True)
class Built:
    """What was built. `tokens` and `documents` by split; `empty` documents were left out."""

    out: str
    tokenizer: str
    vocab_size: int
    tokens: dict[str, int]
    documents: dict[str, int]
    empty: int
    seconds: float


class _Writer:
    """One token file on its way."""

    def __init__(self, path: Path, vocab_size: int):
        self.path, self._kind = path, dtype_for(vocab_size)
        self._file = path.open("wb")
        self.tokens = self.documents = 0

    def add(self, tokens: NDArray[np.integer]) -> None:
        self._file.write(tokens.astype(self._kind).tobytes())
        self.tokens += len(tokens)
        self.documents += 1

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class _Dealer:
    """Which split a document belongs to. Remembers the lowest and the highest hash, for data of a few documents only."""

    def __init__(self, val_share: float, forced: dict[int, str]):
        self._limit, self._forced = int(val_share * 2**64), forced
        self.lowest, self.highest = 2**64, -1

    def split_of(self, text: str) -> str:
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        self.lowest, self.highest = min(self.lowest, digest), max(self.highest, digest)
        return self._forced.get(digest, "val" if digest < self._limit else "train")


def build(
    inputs: list[str],
    out: Path,
    *,
    tokenizer: str | None = None,
    eos: str | None = None,
    column: str = "text",
    val_share: float = DEFAULT_VAL_SHARE,
    say: "_Progress | None" = None,
) -> Built:
    """Builds `out`/train.bin and val.bin with their descriptions. Raises SettingError; `out` is then not there."""
    begun = time.monotonic()
    if not 0 < val_share < 1:
        raise SettingError(f"--val-share: {val_share} must be between 0 and 1, such as {DEFAULT_VAL_SHARE}")
    out = Path(os.path.abspath(out.expanduser()))
    if out.exists():
        raise SettingError(f"--out: {str(out)!r} exists; name another folder, or remove it")
    sources = sources_of(inputs)
    encoder = open_encoder(tokenizer, eos)
    aside = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    try:
        aside.mkdir(parents=True)
        writers, dealer, empty = _deal(sources, aside, encoder, column, val_share, {}, say)
        lacking = [split for split in _SPLITS if not writers[split].documents]
        if len(lacking) == 2:
            raise SettingError(f"{', '.join(inputs)}: no document with anything in it" + (f" ({empty:,} empty ones)" if empty else ""))
        if lacking and dealer.lowest != dealer.highest:
            # A handful of documents, and the hashes put all on one side: the nearest one changes it.
            forced = {dealer.lowest if lacking == ["val"] else dealer.highest: lacking[0]}
            writers, dealer, empty = _deal(sources, aside, encoder, column, val_share, forced, say)
        elif lacking:
            _cut(writers, lacking[0], val_share, encoder.vocab_size)
        counts = {split: writers[split].documents for split in _SPLITS}
        for split in _SPLITS:
            write_note(
                writers[split].path,
                count=writers[split].tokens,
                vocab_size=encoder.vocab_size,
                tokenizer=encoder.name,
                end=encoder.end,
                documents=counts[split],
            )
        about = {
            "inputs": [{"path": str(source.path), "bytes": source.size} for source in sources],
            "column": column,
            "tokenizer": tokenizer or "bytes",
            "val_share": val_share,
        }
        (aside / "data.json").write_text(json.dumps(about, indent=1) + "\n")
        os.rename(aside, out)
    except OSError as err:
        raise HoldfastError(f"{out}: cannot be written: {err.strerror or err}; nothing is left of it") from err
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Built(
        str(out), encoder.name, encoder.vocab_size, {split: writers[split].tokens for split in _SPLITS}, counts, empty, round(time.monotonic() - begun, 2)
    )


def _deal(
    sources: list[Source], folder: Path, encoder: Encoder, column: str, val_share: float, forced: dict[int, str], say: "_Progress | None"
) -> tuple[dict[str, _Writer], _Dealer, int]:
    """Writes every document to its side. Returns the writers, closed, and how many documents were empty."""
    writers = {split: _Writer(folder / f"{split}.bin", encoder.vocab_size) for split in _SPLITS}
    dealer, empty = _Dealer(val_share, forced), 0
    total = sum(source.size for source in sources)
    try:
        for texts, done in _chunks(sources, column):
            full = [text for text in texts if text]
            empty += len(texts) - len(full)
            for text, tokens in zip(full, encoder.encode(full), strict=True):
                writers[dealer.split_of(text)].add(tokens)
            if say:
                say(done, total, sum(writer.documents for writer in writers.values()), sum(writer.tokens for writer in writers.values()))
    finally:
        for writer in writers.values():
            writer.close()
    return writers, dealer, empty


def _chunks(sources: list[Source], column: str) -> Iterator[tuple[list[str], int]]:
    """Some documents at a time, and the bytes that are done by then."""
    texts: list[str] = []
    chars = before = done = 0
    for source in sources:
        for text, here in documents(source, column):
            texts.append(text)
            chars, done = chars + len(text), before + here
            if len(texts) >= _CHUNK_TEXTS or chars >= _CHUNK_CHARS:
                yield texts, done
                texts, chars = [], 0
        before += source.size
    if texts:
        yield texts, done


def _cut(writers: dict[str, _Writer], lacking: str, val_share: float, vocab_size: int) -> None:
    """One document, or copies of one, cannot be dealt: the end of the stream is for validation."""
    other = writers["train" if lacking == "val" else "val"]
    stream = np.fromfile(other.path, dtype=dtype_for(vocab_size))
    count = int(len(stream) * val_share)
    if not count:
        raise SettingError(f"{len(stream)} tokens in one document are too few for a validation share of {val_share}")
    for split, part in (("train", stream[:-count]), ("val", stream[-count:])):
        writers[split] = _Writer(writers[split].path, vocab_size)
        writers[split].add(part)
        writers[split].close()


class _Progress:
    """How far it is: one line that is written over on a terminal, one every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._begun = self._said = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int, documents: int, tokens: int) -> None:
        now = time.monotonic()
        if now - self._said < (0.2 if self._terminal else _SAY_EVERY_S):
            return
        self._said = now
        rate = done / max(now - self._begun, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate and total > done else ""
        text = f"{done / max(total, 1):4.0%} of {total / 1e6:,.1f} MB · {documents:,} documents · {tokens:,} tokens · {rate / 1e6:.1f} MB/s{left}"
        print(f"\r\x1b[K{text}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="holdfast data build", description="Builds token files.")
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--eos")
    parser.add_argument("--column", default="text")
    parser.add_argument("--val-share", type=float, default=DEFAULT_VAL_SHARE)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    # Not the default end: what was begun is taken away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    progress = _Progress()
    try:
        built = build(args.inputs, args.out, tokenizer=args.tokenizer, eos=args.eos, column=args.column, val_share=args.val_share, say=progress)
    except HoldfastError as err:
        progress.close()
        print(f"{err}\nNothing was built.", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        progress.close()
        print("Interrupted; nothing was built.", file=sys.stderr)
        return Exit.INTERRUPTED
    progress.close()
    print(json.dumps(asdict(built)) if args.json else _text(built, args.out))
    return Exit.DONE


def _text(built: Built, out: Path) -> str:
    tokens, counts = built.tokens, built.documents
    left = f", {built.empty:,} empty ones left out" if built.empty else ""
    return (
        f"{sum(counts.values()):,} document{'s' if sum(counts.values()) != 1 else ''}{left}, {sum(tokens.values()):,} tokens by {built.tokenizer} (vocabulary {built.vocab_size:,}) in {built.seconds:.1f} s\n"
        f"  train.bin   {tokens['train']:,} tokens of {counts['train']:,} documents\n"
        f"  val.bin     {tokens['val']:,} tokens of {counts['val']:,} documents\n"
        f"  -> {out}    train on it with DATA=tokens:{out}"
    )


if __name__ == "__main__":
    sys.exit(main())

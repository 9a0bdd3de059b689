"""Where samples come from: windows, the split by file, token files, and what is said when something is missing.

Run: pytest tests/train/data/test_data_sources.py"""

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.core.errors import SettingError
from train.data.corpus import BYTE_VOCAB, byte_entropy, load_split, stdlib_corpus, text_corpus
from train.data.sources import Dataset, open_data, write_tokens
from train.data.tokens import sidecar
from train.data.windows import TokenWindows

FROZEN_VAL = ["part 1/file28.txt", "part 2/file38.txt", "part 2/file47.txt"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("it's a cache")


def folder_of_text(root: Path, count: int = 60) -> Path:
    for i in range(count):
        path = root / f"part {i % 3}" / f"file{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {i}: " + "abc " * (20 + i))
    return root


def test_windows_cover_the_stream_and_targets_follow_tokens() -> None:
    stream = np.arange(100, dtype=np.uint8)
    data = TokenWindows(stream, seq_len=8, vocab_size=256, name="n", unit="byte")
    batch = data.batch(np.arange(len(data)))
    assert len(data) == 12 and batch["tokens"].shape == batch["targets"].shape == (12, 8)
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert batch["tokens"].flatten().tolist() == list(range(96))
    assert batch["targets"].flatten().tolist() == list(range(1, 97))
    assert data.batch(np.array([5, 0, 5]))["tokens"][:, 0].tolist() == [40, 0, 40]
    assert data.batch(np.array([], dtype=np.int64))["tokens"].shape == (0, 8)


@pytest.mark.parametrize("ids", [[-1], [12]])
def test_an_id_outside_the_data_is_refused(ids: list[int]) -> None:
    data = TokenWindows(np.arange(100, dtype=np.uint8), seq_len=8, vocab_size=256, name="n", unit="byte")
    with pytest.raises(IndexError, match="12 samples"):
        data.batch(np.array(ids))


def test_the_smallest_stream_is_one_window_and_a_shorter_one_is_refused() -> None:
    assert len(TokenWindows(np.zeros(9, np.uint8), seq_len=8, vocab_size=2, name="n", unit="byte")) == 1
    with pytest.raises(SettingError, match="SEQ_LEN=7"):
        TokenWindows(np.zeros(8, np.uint8), seq_len=8, vocab_size=2, name="n", unit="byte")


def test_a_token_outside_the_vocabulary_is_a_message_and_not_a_device_error() -> None:
    data = TokenWindows(np.array([1, 2, 300, 4, 5], np.uint16), seq_len=4, vocab_size=256, name="mine", unit="token")
    with pytest.raises(SettingError, match="'mine' holds token 300"):
        data.batch(np.array([0]))


def test_standard_library_gives_real_text_for_both_splits(cache: Path) -> None:
    train, val = (open_data("stdlib", seq_len=128, split=s, cache_dir=cache) for s in ("train", "val"))
    assert isinstance(train, Dataset) and (train.vocab_size, train.unit) == (BYTE_VOCAB, "byte")
    assert len(train) > 20_000 and 500 < len(val) < len(train) / 5
    text = bytes(train.batch(np.array([0]))["tokens"][0].tolist())
    assert text.decode().isprintable() or b"\n" in text
    assert train.name.startswith("stdlib-3.")


def test_splits_have_no_file_in_common_and_do_not_depend_on_other_files(tmp_path: Path) -> None:
    corpus = stdlib_corpus()
    train, val = (set(corpus.split_files(s)) for s in ("train", "val"))
    assert train | val == {path for path, _ in corpus.files} and not train & val
    before = text_corpus(folder_of_text(tmp_path))
    (tmp_path / "new.txt").write_text("a new file")
    after = text_corpus(tmp_path)
    assert set(before.split_files("val")) <= set(after.split_files("val"))
    assert set(before.split_files("train")) <= set(after.split_files("train"))


def test_split_by_path_is_frozen(tmp_path: Path) -> None:
    """Another rule would move validation text into training under a run that resumes."""
    corpus = text_corpus(folder_of_text(tmp_path))
    assert corpus.split_files("val") == FROZEN_VAL


def test_tests_hidden_files_and_links_are_no_part_of_the_standard_library(tmp_path: Path) -> None:
    for name in ("a.py", "test/b.py", "pkg/tests/c.py", "site-packages/d.py", ".e.py", "f.txt", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "link.py").symlink_to(tmp_path / "f.txt")
    assert stdlib_corpus(tmp_path).files == (("a.py", 6),)
    with pytest.raises(SettingError, match="DATA=synthetic"):
        stdlib_corpus(tmp_path / "test" / "nothing")


def test_cached_corpus_equals_the_built_one_and_is_memory_mapped(tmp_path: Path) -> None:
    corpus, cache = text_corpus(folder_of_text(tmp_path / "text")), tmp_path / "cache"
    for split in ("train", "val"):
        plain, built, again = (load_split(corpus, split, c) for c in (None, cache, cache))
        assert np.array_equal(plain, built) and np.array_equal(plain, again)
        assert isinstance(again, np.memmap)
    assert len(list(cache.iterdir())) == 2  # and nothing left aside


def test_a_torn_or_unwritable_cache_is_passed_over(tmp_path: Path) -> None:
    corpus, cache = text_corpus(folder_of_text(tmp_path / "text")), tmp_path / "cache"
    expected = load_split(corpus, "train", cache)
    (file,) = cache.iterdir()
    for torn in (b"", file.read_bytes()[:200]):
        file.write_bytes(torn)
        assert np.array_equal(load_split(corpus, "train", cache), expected)
        assert len(file.read_bytes()) > 200
    (tmp_path / "in the way").write_text("a file where the folder should be")
    assert np.array_equal(load_split(corpus, "train", tmp_path / "in the way"), expected)


def test_a_changed_file_is_not_served_from_the_cache(tmp_path: Path) -> None:
    root = folder_of_text(tmp_path / "text")
    load_split(text_corpus(root), "train", tmp_path / "cache")
    (root / "part 0" / "file0.txt").write_text("changed")
    assert b"changed" in load_split(text_corpus(root), "train", tmp_path / "cache").tobytes()


def test_a_cache_belongs_to_its_folder_and_to_what_was_written_there(tmp_path: Path) -> None:
    """Neither another folder of the same name nor new words of the same length are served from it."""
    for place, word in (("a/corpus", "old "), ("b/corpus", "zzz ")):
        (tmp_path / place).mkdir(parents=True)
        for number in range(30):
            (tmp_path / place / f"file{number}.txt").write_text(word * 50)

    def read(place: str) -> bytes:
        return load_split(text_corpus(tmp_path / place), "train", tmp_path / "cache").tobytes()

    assert b"old" in read("a/corpus") and b"zzz" in read("b/corpus") and b"old" not in read("b/corpus")
    for file in (tmp_path / "a/corpus").iterdir():
        file.write_text("new " * 50)
    assert b"new" in read("a/corpus") and b"old" not in read("a/corpus")


def test_both_splits_have_a_file_also_where_all_files_would_be_for_validation(tmp_path: Path) -> None:
    for name in ("n18.txt", "n20.txt"):
        (tmp_path / name).write_text("some words")
    corpus = text_corpus(tmp_path)
    assert [len(corpus.split_files(split)) for split in ("train", "val")] == [1, 1]


def test_the_content_of_windows_tells_of_other_tokens_and_not_of_another_type() -> None:
    short = np.arange(1000) % 200

    def content(stream: Any) -> str:
        return TokenWindows(stream, seq_len=10, vocab_size=256, name="t", unit="token").content

    assert content(short.astype(np.uint16)) == content(short.astype(np.uint32)) != content(short[:-1])
    changed = short.copy()
    changed[500] += 1
    assert content(changed) != content(short)
    long = np.zeros(3_000_000, dtype=np.uint16)
    assert content(long) == content(long.copy()) != content(long[:-1])
    long[1_000_000:1_100_000] = 1
    assert content(long) != content(np.zeros(3_000_000, dtype=np.uint16))


def test_one_text_file_is_split_at_its_end_and_a_folder_by_file(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("0123456789" * 100)
    train, val = (open_data(f"text:{tmp_path / 'one.txt'}", seq_len=16, split=s) for s in ("train", "val"))
    assert len(train.stream) == 951 and len(val.stream) == 50
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("a.md", "b.rst"):
        (folder / name).write_text(name * 50)
    (folder / "binary").write_bytes(b"\0\1" * 500)
    sizes = [len(open_data(f"text:{folder}", seq_len=16, split=s).stream) for s in ("train", "val")]
    assert sorted(sizes) == [201, 251]  # each split has one of the two, with the zero byte that ends it


def test_entropy_of_known_distributions() -> None:
    assert byte_entropy(np.arange(256, dtype=np.uint8)) == pytest.approx(8.0)
    assert byte_entropy(np.zeros(10, np.uint8)) == 0.0
    assert byte_entropy(np.array([1, 2] * 50, np.uint8)) == pytest.approx(1.0)
    assert byte_entropy(np.array([1, 1, 1, 2], np.uint8)) == pytest.approx(2 - 0.75 * math.log2(3))
    assert byte_entropy(np.array([], np.uint8)) == 0.0


@pytest.mark.parametrize("name", ["t.bin", "t.npy"])
@pytest.mark.parametrize(("vocab", "dtype"), [(50_304, np.uint16), (1 << 16, np.uint16), (128_256, np.uint32)])
def test_token_files_come_back_as_written_and_memory_mapped(tmp_path: Path, name: str, vocab: int, dtype: type) -> None:
    tokens = np.random.default_rng(0).integers(0, vocab, 1000)
    write_tokens(tmp_path / name, tokens, vocab)
    train, val = (open_data(f"tokens:{tmp_path / name}", seq_len=9, split=s) for s in ("train", "val"))
    assert isinstance(train.stream, np.memmap) and train.stream.dtype == dtype
    assert np.array_equal(np.concatenate([train.stream, val.stream]), tokens)
    assert len(val.stream) == 50 and (train.vocab_size, train.unit) == (vocab, "token")
    assert np.array_equal(train.batch(np.array([3]))["tokens"][0].numpy(), tokens[27:36])
    assert {p.name for p in tmp_path.iterdir()} == {name, f"{name}.json"}


def test_the_ways_to_name_a_validation_part(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.bin", np.arange(1000), 1000)
    write_tokens(tmp_path / "val.bin", np.arange(500, 600), 1000)

    def first_and_length(spec: str, split: str) -> tuple[int, int]:
        stream = open_data(f"tokens:{tmp_path}{spec}", seq_len=4, split=split).stream
        return int(stream[0]), len(stream)

    assert [first_and_length("/train.bin,0.2", s) for s in ("train", "val")] == [(0, 800), (800, 200)]
    assert [first_and_length(f"/train.bin,{tmp_path}/val.bin", s) for s in ("train", "val")] == [(0, 1000), (500, 100)]
    assert [first_and_length("", s) for s in ("train", "val")] == [(0, 1000), (500, 100)]
    with pytest.raises(SettingError, match="between 0 and 1"):
        first_and_length("/train.bin,1.5", "val")


def test_a_file_name_may_have_a_comma(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a,b.bin", np.arange(100), 100)
    assert len(open_data(f"tokens:{tmp_path / 'a,b.bin'}", seq_len=4, split="train").stream) == 95


def test_plain_npy_takes_the_vocabulary_of_the_model(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(100, dtype=np.int32))
    assert open_data(f"tokens:{tmp_path / 't.npy'}", seq_len=4, split="train", vocab_size=128).vocab_size == 128
    with pytest.raises(SettingError, match="nothing states the size of its vocabulary"):
        open_data(f"tokens:{tmp_path / 't.npy'}", seq_len=4, split="train")


def test_a_token_file_that_does_not_match_its_description_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    write_tokens(path, np.arange(100), 100)
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(SettingError, match="has 75 tokens, t.bin.json says 100"):
        open_data(f"tokens:{path}", seq_len=4, split="train")
    sidecar(path).write_text("{")
    with pytest.raises(SettingError, match="not JSON"):
        open_data(f"tokens:{path}", seq_len=4, split="train")
    sidecar(path).write_text(json.dumps({"dtype": "float32"}))
    with pytest.raises(SettingError, match="uint16, uint32"):
        open_data(f"tokens:{path}", seq_len=4, split="train")
    np.save(tmp_path / "t.npy", np.zeros((3, 3)))
    with pytest.raises(SettingError, match="one row of integers"):
        open_data(f"tokens:{tmp_path / 't.npy'}", seq_len=4, split="train")
    with pytest.raises(SettingError, match="from 0 to 9"):
        write_tokens(path, np.array([10]), 10)


@pytest.mark.parametrize("stated", ["256", 256.5, 0, -1, True, [256]])
def test_a_vocabulary_that_is_no_number_is_refused_where_it_is_read(tmp_path: Path, stated: object) -> None:
    for path in (tmp_path / "t.bin", tmp_path / "t.npy"):
        write_tokens(path, np.arange(100), 256)
        sidecar(path).write_text(json.dumps({"dtype": "uint16", "vocab_size": stated}))
        with pytest.raises(SettingError) as err:
            open_data(f"tokens:{path}", seq_len=4, split="train")
        assert str(err.value) == f"{path}.json: vocab_size is {stated!r}; it must be a whole number of at least 1, not in quotation marks"


@pytest.mark.parametrize("vocab", [2, 7, 256, 50_304])
def test_synthetic_next_token_is_a_function_of_the_last(vocab: int) -> None:
    data = open_data("synthetic", seq_len=64, split="train", vocab_size=vocab)
    batch = data.batch(np.arange(200))
    pairs = set(zip(batch["tokens"].flatten().tolist(), batch["targets"].flatten().tolist(), strict=True))
    assert len({token for token, _ in pairs}) == len(pairs)
    assert batch["tokens"].min() >= 0 and batch["targets"].max() < vocab
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    again = open_data("synthetic", seq_len=64, split="train", vocab_size=vocab).batch(np.arange(200))
    assert torch.equal(batch["tokens"], again["tokens"])
    if vocab == 50_304:
        assert len(pairs) > 9_000  # of 12,800 drawn: the stream does not fall into a short cycle


def test_digits_are_images_of_both_splits() -> None:
    pytest.importorskip("sklearn")
    train, val = (open_data("digits", seq_len=128, split=s) for s in ("train", "val"))
    assert len(train) + len(val) == 1797 and 250 < len(val) < 450
    batch = train.batch(np.arange(16))
    assert batch["images"].shape == (16, 1, 8, 8) and batch["images"].dtype == torch.float32
    assert float(batch["images"].min()) == 0.0 and float(batch["images"].max()) == 1.0
    assert set(val.batch(np.arange(len(val)))["targets"].tolist()) == set(range(10))


def test_own_data_by_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_data")
    stream = np.arange(100, dtype=np.uint8)
    module.build = lambda split, seq_len: TokenWindows(stream, seq_len=seq_len, vocab_size=256, name=split, unit="byte")
    module.wrong = lambda **_: object()
    monkeypatch.setitem(sys.modules, "my_data", module)
    assert open_data("my_data:build", seq_len=9, split="val").name == "val"
    with pytest.raises(SettingError, match="has no name, vocab_size, unit, batch"):
        open_data("my_data:wrong", seq_len=9, split="val")
    with pytest.raises(SettingError, match="Did you mean 'build'"):
        open_data("my_data:biuld", seq_len=9, split="val")  # codespell:ignore biuld
    with pytest.raises(SettingError, match=r"'no_such_module' .* cannot be found"):
        open_data("no_such_module:build", seq_len=9, split="val")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("stdlob", "Did you mean 'stdlib'"),
        ("tokens:", "needs a path"),
        ("stdlib:3.11", "takes nothing"),
        ("tokens:{here}/corpos/train.bin", "Did you mean '.*corpus'"),
        ("tokens:{here}/corpus/trian.bin", "Did you mean '.*train.bin'"),  # codespell:ignore trian
        ("text:{here}/corpus/none", "there is no 'none' in"),
        ("tokens:{here}/corpus/train.txt", "ends in .bin or .npy"),
    ],
)
def test_a_wrong_spec_is_answered_with_what_is_allowed_or_near(tmp_path: Path, spec: str, said: str) -> None:
    write_tokens(tmp_path / "corpus" / "train.bin", np.arange(100), 100)
    (tmp_path / "corpus" / "train.txt").write_text("x")
    with pytest.raises(SettingError, match=said):
        open_data(spec.format(here=tmp_path), seq_len=4, split="train")


def test_data_that_needs_a_larger_vocabulary_than_the_model_is_refused() -> None:
    with pytest.raises(SettingError, match="vocabulary of 256, the model one of 100"):
        open_data("stdlib", seq_len=128, split="val", vocab_size=100)
    with pytest.raises(SettingError, match="choose one of train, val"):
        open_data("stdlib", seq_len=128, split="test")  # type: ignore[arg-type]

"""`holdfast data build` and data sets on disk: what goes in comes out, each document once, and nothing is left of a failure.

Run: pytest tests/launcher/commands/test_data_build.py"""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from jobs.config.settings import Job
from jobs.core.errors import SettingError
from train.data.build import build
from train.data.loader import TrainLoader
from train.data.sources import open_data
from train.data.tokens import read_tokens

TEXTS = [f"Document {n}: {'žluťoučký kůň ' * (n % 7)}ends.\r\n" for n in range(200)]


def jsonl(path: Path, texts: list[Any], column: str = "text") -> Path:
    data = "".join(json.dumps({"id": n, column: text}, ensure_ascii=False) + "\n" for n, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def parquet(path: Path, texts: list[Any], column: str = "text") -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=64)
    return path


def saved(path: Path, texts: list[Any], column: str = "text") -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"id": list(range(len(texts))), column: texts}).save_to_disk(path)
    return path


def folder(path: Path, texts: list[str]) -> Path:
    path.mkdir()
    for n, text in enumerate(texts):
        (path / f"{n:03d}.txt").write_bytes(text.encode())
    (path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (path / "empty.txt").write_bytes(b"")
    return path


def split_texts(out: Path, split: str) -> list[str]:
    stream, vocab = read_tokens(out / f"{split}.bin")
    assert vocab == 256
    return [part.decode() for part in stream.astype(np.uint8).tobytes().split(b"\0")[:-1]]


@pytest.mark.parametrize("form", ["folder", "jsonl", "jsonl.gz", "parquet", "saved"])
def test_documents_of_every_form_come_back_each_once_and_split_alike(tmp_path: Path, form: str) -> None:
    source = {"folder": folder, "saved": saved, "parquet": parquet}.get(form, jsonl)(tmp_path / f"in.{form}", TEXTS)
    built = build([str(source)], tmp_path / "out")
    train, val = split_texts(tmp_path / "out", "train"), split_texts(tmp_path / "out", "val")
    # Files of a folder are documents of their own; rows keep their order.
    assert sorted(train + val) == sorted(TEXTS)
    assert [text for text in TEXTS if text in set(train)] == train
    assert built.documents == {"train": len(train), "val": len(val)} and 2 <= len(val) <= 25
    again = build([str(jsonl(tmp_path / "other.jsonl", TEXTS[::-1]))], tmp_path / "again")
    assert sorted(split_texts(tmp_path / "again", "val")) == sorted(val) and again.tokens == built.tokens
    data = open_data(f"tokens:{tmp_path / 'out'}", seq_len=16, split="val")
    assert data.vocab_size == 256 and len(data) == (built.tokens["val"] - 1) // 16
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data.json", "train.bin", "train.bin.json", "val.bin", "val.bin.json"]


def tokenizer(path: Path) -> Path:
    """A trained tokenizer whose file also asks for truncation and special tokens, which would eat text."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "[CLS]"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    made.enable_truncation(8)
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    return path


def test_a_tokenizer_loses_nothing_and_ends_every_document(tmp_path: Path) -> None:
    where = tokenizer(tmp_path / "tok")
    built = build([str(jsonl(tmp_path / "in.jsonl", TEXTS))], tmp_path / "out", tokenizer=str(where))
    import tokenizers

    decoder = tokenizers.Tokenizer.from_file(str(where / "tokenizer.json"))
    ids = np.concatenate([read_tokens(tmp_path / "out" / f"{split}.bin")[0] for split in ("train", "val")]).tolist()
    texts, current = [], []
    for token in ids:
        if token == 0:
            texts.append(decoder.decode(current))
            current = []
        else:
            current.append(token)
    assert sorted(texts) == sorted(TEXTS) and not current
    note = json.loads((tmp_path / "out" / "train.bin.json").read_text())
    assert note["vocab_size"] == built.vocab_size <= 400 and note["dtype"] == "uint16" and note["end"] == 0 and note["documents"] == built.documents["train"]


def test_the_end_token_is_the_configured_one_a_named_one_or_none(tmp_path: Path) -> None:
    where, source = tokenizer(tmp_path / "tok"), str(jsonl(tmp_path / "in.jsonl", ["aa", "bb"] * 20 + ["c"]))
    (where / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[CLS]"}}))
    ends = {}
    for name, eos in (("said", None), ("named", "<|endoftext|>"), ("none", "none")):
        build([source], tmp_path / name, tokenizer=str(where), eos=eos)
        stream = np.concatenate([read_tokens(tmp_path / name / f"{split}.bin")[0] for split in ("train", "val")])
        ends[name] = [int((stream == token).sum()) for token in (0, 1)]
    assert ends == {"said": [0, 41], "named": [41, 0], "none": [0, 0]}
    with pytest.raises(SettingError, match="no token '<|endoftxt|>'.*Did you mean"):
        build([source], tmp_path / "x", tokenizer=str(where), eos="<|endoftxt|>")
    with pytest.raises(SettingError, match="Give --tokenizer too"):
        build([source], tmp_path / "x", eos="</s>")


def test_copies_of_a_document_lie_on_one_side(tmp_path: Path) -> None:
    build([str(jsonl(tmp_path / "in.jsonl", TEXTS * 3))], tmp_path / "out", val_share=0.5)
    train, val = (set(split_texts(tmp_path / "out", split)) for split in ("train", "val"))
    assert not train & val and len(train) > 50 < len(val)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_handful_of_documents_still_has_both_sides(tmp_path: Path, share: float) -> None:
    built = build([str(jsonl(tmp_path / "in.jsonl", TEXTS[:3]))], tmp_path / "out", val_share=share)
    assert built.documents == ({"train": 2, "val": 1} if share < 0.5 else {"train": 1, "val": 2})
    assert sorted(split_texts(tmp_path / "out", "train") + split_texts(tmp_path / "out", "val")) == sorted(TEXTS[:3])


def test_the_end_of_a_single_document_is_for_validation(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x" * 900 + "y" * 99)
    built = build([str(tmp_path / "one.txt")], tmp_path / "out", val_share=0.1)
    assert built.tokens == {"train": 900, "val": 100}
    assert read_tokens(tmp_path / "out" / "val.bin")[0].tolist() == [ord("y")] * 99 + [0]


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    built = build([str(jsonl(tmp_path / "in.jsonl", [*TEXTS, "", None, ""]))], tmp_path / "out")
    assert built.empty == 3 and sum(built.documents.values()) == 200


BAD: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "the file is empty"),
    "blank.jsonl": (b"\n\n", "no document with anything in it"),
    "nothing.jsonl": (b'{"text": ""}\n', r"no document with anything in it \(1 empty ones\)"),
    "column.jsonl": (b'{"text": "a"}\n{"texts": "b", "id": 1}\n', r"column.jsonl:2: has no column 'text'; it has 'texts', 'id'. Did you mean --column texts"),
    "number.jsonl": (b'{"text": 3}\n', "number.jsonl:1: 'text' holds a int, not text"),
    "list.jsonl": (b'["a"]\n', "list.jsonl:1: holds a list"),
    "json.jsonl": (b'{"text": "a"}\n{"text": \n', "json.jsonl:2: not JSON"),
    "deep.jsonl": (b'{"text": "a"}\n{"text": "b", "x": ' + b"[" * 100_000 + b"\n", "deep.jsonl:2: lists or objects lie too deep"),
    "half.jsonl": (b'{"text": "a \\ud83d\\ude42"}\n{"text": "bad \\ud83d half"}\n', r"half.jsonl:2: 'text' holds half a surrogate pair \(\\ud83d at 4\)"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "latin.jsonl:2: not UTF-8"),
    "latin.txt": ("für".encode("latin-1") * 9, r"latin.txt: not UTF-8 \(byte 0xfc at 1\)"),
    "utf16.txt": ("a text".encode("utf-16"), "utf16.txt: not UTF-8"),
    "torn.jsonl.gz": (gzip.compress(json.dumps({"text": os.urandom(4000).hex()}).encode() + b"\n")[:-40], "not a whole gzip file"),
    "plain.jsonl.gz": (b'{"text": "a"}\n', "not a whole gzip file"),
    "torn.parquet": (b"PAR1 and no more", "not a readable parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_that_says_where_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    content, said = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingError, match=said):
        build(
            [str(jsonl(tmp_path / "good.jsonl", TEXTS)), str(tmp_path / name)] if "nothing" not in name and "blank" not in name else [str(tmp_path / name)],
            tmp_path / "out",
        )
    assert {path.name for path in tmp_path.iterdir()} <= {name, "good.jsonl"}


def test_a_parquet_or_saved_set_without_the_column_names_those_there_are(tmp_path: Path) -> None:
    for source in (parquet(tmp_path / "in.parquet", TEXTS, "content"), saved(tmp_path / "set", TEXTS, "content")):
        with pytest.raises(SettingError, match="has no column 'text'; it has 'id', 'content'"):
            build([str(source)], tmp_path / "out")
        assert build([str(source)], tmp_path / f"{source.name}-out", column="content").documents["train"] > 150
        with pytest.raises(SettingError, match="not text"):
            build([str(source)], tmp_path / "out", column="id")
    assert not (tmp_path / "out").exists()


def holdfast(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli.app", "data", "build", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_builds_says_what_and_refuses_in_one_message(tmp_path: Path) -> None:
    jsonl(tmp_path / "in.jsonl", TEXTS)
    done = holdfast("in.jsonl", "--out", "set", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("200 documents, ") and "DATA=tokens:set" in done.stdout, done.stderr
    again = holdfast("in.jsonl", "--out", "set", cwd=tmp_path)
    assert again.returncode == 2 and "exists; name another folder" in again.stderr and len(again.stderr.splitlines()) == 2
    lacking = holdfast("in.jsonx", "--out", "more", cwd=tmp_path)
    assert lacking.returncode == 2 and "Did you mean" in lacking.stderr and "Traceback" not in lacking.stderr
    shown = json.loads(holdfast("in.jsonl", "--out", "third", "--json", cwd=tmp_path).stdout)
    assert shown["documents"]["train"] + shown["documents"]["val"] == 200
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "set", "third"}


def test_a_folder_with_a_script_of_ones_own_called_train_is_no_obstacle(tmp_path: Path) -> None:
    jsonl(tmp_path / "in.jsonl", TEXTS)
    for name in ("train.py", "jobs.py", "runpy.py"):
        (tmp_path / name).write_text("raise SystemExit('this is the script of a person')\n")
    # The command itself runs as it is installed, which looks for nothing in the working folder.
    start = "from launcher.cli.app import run_app; import sys; sys.exit(run_app(['data', 'build', 'in.jsonl', '--out', 'set']))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", start], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.startswith("200 documents, "), done.stdout + done.stderr


def test_a_build_that_is_told_to_end_takes_away_what_it_began(tmp_path: Path) -> None:
    jsonl(tmp_path / "in.jsonl", TEXTS)
    program = "import os, signal, sys; from train.data import build; build._Progress.__call__ = lambda *_: os.kill(os.getpid(), signal.SIGTERM); sys.exit(build.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out")], cwd=REPOSITORY, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}


# -- data sets on disk as they are -------------------------------------------------------------------------------------


def rows_set(path: Path, **splits: dict[str, list[Any]]) -> Path:
    datasets = pytest.importorskip("datasets")
    tables = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
    (datasets.DatasetDict(tables) if len(tables) > 1 else tables["train"]).save_to_disk(path)
    return path


def test_rows_of_tokens_are_samples_cut_and_filled_with_targets_that_do_not_count(tmp_path: Path) -> None:
    where = rows_set(tmp_path / "set", train={"input_ids": [[1, 2, 3], list(range(10, 30)), []]}, validation={"input_ids": [[5, 6]]})
    data = open_data(f"hfds:{where}", seq_len=4, split="train", options={"vocab_size": 64})
    batch = data.batch(np.array([1, 0, 2]))
    assert batch["tokens"].tolist() == [[10, 11, 12, 13], [1, 2, 3, 0], [0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[11, 12, 13, 14], [2, 3, -100, -100], [-100] * 4]
    assert len(open_data(f"hfds:{where}", seq_len=4, split="val", vocab_size=64)) == 1
    assert data.unit == "token" and data.vocab_size == 64 and data.fixed_shapes
    with pytest.raises(SettingError, match="vocab_size=N, or tokenizer=PATH"):
        open_data(f"hfds:{where}", seq_len=4, split="train")
    with pytest.raises(SettingError, match="holds token 29, its vocabulary is stated as 20"):
        open_data(f"hfds:{where}", seq_len=40, split="train", options={"vocab_size": 20}).batch(np.array([1]))


def test_labels_say_which_tokens_of_a_row_count(tmp_path: Path) -> None:
    where = rows_set(tmp_path / "set", train={"input_ids": [[1, 2, 3, 4]] * 30, "labels": [[-100, -100, 3, 4]] * 30})
    batch = open_data(f"hfds:{where}", seq_len=4, split="train", vocab_size=8).batch(np.array([0]))
    assert batch["targets"].tolist() == [[-100, 3, 4, -100]]


@pytest.mark.parametrize(
    ("label", "said"), [(8, "holds label 8, its vocabulary is stated as 8"), (-1, "holds label -1, its vocabulary is stated as 8; .* is -100")]
)
def test_a_label_outside_the_vocabulary_is_a_message_and_not_a_device_error(tmp_path: Path, label: int, said: str) -> None:
    where = rows_set(tmp_path / "set", train={"input_ids": [[1, 2, 3, 4]] * 30, "labels": [[-100, label, 3, 7]] * 30})
    with pytest.raises(SettingError, match=said):
        open_data(f"hfds:{where}", seq_len=4, split="train", vocab_size=8).batch(np.array([0]))


def test_labels_that_are_classes_of_rows_are_no_labels_of_tokens(tmp_path: Path) -> None:
    where = rows_set(tmp_path / "set", train={"input_ids": [[1, 2, 3, 4]] * 30, "labels": [1] * 30})
    with pytest.raises(SettingError, match="column 'labels' does not hold lists of whole numbers"):
        open_data(f"hfds:{where}", seq_len=4, split="train", vocab_size=8).batch(np.array([0]))


def test_rows_of_text_are_encoded_when_they_are_read_and_dealt_evenly(tmp_path: Path) -> None:
    where = rows_set(tmp_path / "set", train={"text": TEXTS})
    train, val = (open_data(f"hfds:{where}", seq_len=8, split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (190, 10) and train.vocab_size == 256 and train.unit == "byte" and train.name != val.name
    assert bytes(val.batch(np.array([0]))["tokens"][0].tolist()) == TEXTS[19].encode()[:8]
    seen = {bytes(data.batch(np.array([i]))["tokens"][0].tolist()) for data in (train, val) for i in range(len(data))}
    assert len(seen) == len({text.encode()[:8] for text in TEXTS})
    with_tokens = open_data(f"hfds:{where}", seq_len=8, split="train", options={"tokenizer": str(tokenizer(tmp_path / "tok"))})
    assert with_tokens.unit == "token" and 256 < with_tokens.vocab_size <= 400


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"colum": "a"}, "Did you mean 'column'"),  # codespell:ignore colum
        ({"column": "txt"}, "has no column 'txt'.*Did you mean --column text"),
        ({"column": 5}, r"data_options: column 5 must be text; in quotation marks, as 'column=\"5\"', it is"),
        ({"eos": True}, "data_options: eos True must be text"),
        ({"val_share": 2}, "must be between 0 and 1"),
        ({"val_share": "abc"}, "data_options: val_share 'abc' must be between 0 and 1"),
        ({"val_share": [0.1]}, r"data_options: val_share \[0.1\] must be between 0 and 1"),
        ({"vocab_size": "abc"}, "data_options: vocab_size 'abc' must be a whole number of at least 1"),
        ({"vocab_size": 0}, "data_options: vocab_size 0 must be a whole number of at least 1"),
        ({"vocab_size": 256.5}, "data_options: vocab_size 256.5 must be a whole number of at least 1"),
        ({"tokenizer": "/nowhere"}, "not found; give a local tokenizer.json"),
    ],
)
def test_options_of_a_set_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    where = rows_set(tmp_path / "set", train={"text": TEXTS})
    with pytest.raises(SettingError, match=said):
        open_data(f"hfds:{where}", seq_len=8, split="train", options=options)


def test_a_folder_that_is_no_saved_set_and_options_without_use_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(SettingError, match="not a folder that save_to_disk wrote"):
        open_data(f"hfds:{tmp_path}", seq_len=8, split="train")
    with pytest.raises(SettingError, match="there is no 'nowhere'"):
        open_data(f"hfds:{tmp_path}/nowhere", seq_len=8, split="train")
    with pytest.raises(SettingError, match="DATA=stdlib takes none"):
        open_data("stdlib", seq_len=8, split="train", options={"column": "text"})


def test_reading_processes_give_the_same_rows(tmp_path: Path) -> None:
    data = open_data(f"hfds:{rows_set(tmp_path / 'set', train={'text': TEXTS})}", seq_len=8, split="train")
    found = []
    for workers in (0, 1):
        job = Job(job_name="t", batch_size=8, micro_batch_size=4, grad_accum_steps=2, max_steps=3, seq_len=8, precision="fp32", num_workers=workers)
        feed = TrainLoader(job, SimpleNamespace(rank=0, world_size=1, attempt=1, device=torch.device("cpu")), data)
        found.append([batch["tokens"].tolist() for step in range(3) for batch in feed.take(step)])
        feed.close()
    assert found[0] == found[1]

"""What is read out of a profiler's trace, by hand-made ones: no GPU makes one here."""

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import trace


def kernel(name: str, begin: float, end: float, number: int, launched: float) -> list[dict[str, object]]:
    where = {"args": {"correlation": number}}
    return [
        {"cat": "kernel", "name": name, "ts": begin, "dur": end - begin, **where},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": launched, "dur": 1, **where},
    ]


# Two streams, microseconds: products 0-400 and 500-900, of which gradients hide 100 and stick out by 200; pauses of 50 and, before the last kernel, 10.
EVENTS = [
    *kernel("gemm", 0, 400, 1, -50),
    *kernel("gemm", 500, 900, 2, 100),
    *kernel("ncclDevKernel_AllReduce", 800, 1100, 3, 700),
    *kernel("adamw", 1150, 1190, 4, 1148),
    *kernel("adamw", 1200, 1250, 5, 1198),
    {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 10},
]


def test_time_is_told_apart_by_what_hid_it() -> None:
    assert trace.summary(EVENTS) == {"span": 1.25, "compute": 0.89, "sending": 0.3, "exposed": 0.2, "idle": 0.16, "gaps": 0.01, "lead": 0.05}
    assert trace.summary(EVENTS, steps=2)["span"] == 0.62
    assert trace.summary([event for event in EVENTS if event["cat"] == "cpu_op"]) == {}


def test_spans_that_overlap_or_touch_count_once() -> None:
    assert trace.union([(5, 6), (0, 2), (1, 3), (3, 4), (0.5, 1)]) == [(0, 4), (5, 6)]
    assert trace.union([]) == []


def test_the_command_reads_both_forms_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain, packed = tmp_path / "t.json", tmp_path / "t.json.gz"
    plain.write_text(json.dumps({"traceEvents": EVENTS}))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    said = []
    for file in (plain, packed):
        monkeypatch.setattr("sys.argv", ["trace", str(file), "--top", "1"])
        assert trace.main() == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "exposed 0.2" in said[0] and said[0].splitlines()[1:] == ["     0.80 ms      2.0 x  gemm"]
    plain.write_text(json.dumps({"traceEvents": []}))
    monkeypatch.setattr("sys.argv", ["trace", str(plain)])
    assert trace.main() == 1 and "no kernel" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [None, b"not json", b"[]", b'{"other": 1}', gzip.compress(b"{}" * 999, mtime=0)[:-20]], ids=["no file", "text", "a list", "no events", "cut off"]
)
def test_what_is_no_trace_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    file = tmp_path / ("t.json.gz" if content and content.startswith(b"\x1f") else "t.json")
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["trace", str(file)])
    with pytest.raises(SystemExit) as ended:
        trace.main()
    assert ended.value.code == 2 and f"error: {file} is no trace that can be read: " in capsys.readouterr().err.splitlines()[-1]

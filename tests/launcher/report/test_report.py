"""The report: what it says, that nothing in it is executed or fetched, and that a real browser draws every figure of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, examples
from hypothesis import given
from hypothesis import strategies as st
from written_runs import BEGAN, written_run

from jobs.core.contract import Event, Exit
from jobs.core.errors import SettingError
from jobs.run import event_log
from jobs.run.rundir import RunDir
from launcher.report import collect, render
from launcher.report.collect import figures_of, members_of, thinned
from launcher.report.render import page, write_report
from launcher.status.lookup import runs_named

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{ 7*7 }} &amp; \u2028 '\""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
]


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs are of no cluster; the one that the machine may have is not asked."""
    monkeypatch.setattr("launcher.status.run_status.ask_queue", lambda: (None, ""))


class Page(HTMLParser):
    """The elements of a page: (tag, attributes), and the text in each script."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def having(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def open_in_browser(path: Path, *, fragment: str = "", width: int = 1280) -> str:
    """The page's elements after its script has run; fails on anything the console of the browser says."""
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    home = tempfile.mkdtemp(prefix="hf-chromium-")
    try:
        command = [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={home}",
            "--enable-logging=stderr",
            f"--window-size={width},2000",
            "--dump-dom",
            path.as_uri() + fragment,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": home})
    finally:
        shutil.rmtree(home, ignore_errors=True)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    return done.stdout


def charts(dom: str) -> dict[str, int]:
    """Name of each figure -> number of shapes drawn in it."""
    return {name: len(re.findall(r"<(?:path|circle)\b", body)) for name, body in re.findall(r'<figure id="figure-([^"]+)"(.*?)</figure>', dom, re.S)}


# -- figures -----------------------------------------------------------------------------------------------------------


@given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=400), points=st.integers(8, 60))
@examples(200)
def test_a_thinned_curve_keeps_its_ends_and_its_extremes(values: list[float], points: int) -> None:
    kept = thinned(values, points)
    assert kept == sorted(set(kept)) and len(kept) <= max(points, 8)
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if values:
        assert kept[0] == 0 and kept[-1] == len(values) - 1
    if finite:
        shown = [values[index] for index in kept]
        assert min(finite) in shown and max(finite) in shown
    if len(finite) < len(values):
        assert any(not (values[index] == values[index] and abs(values[index]) != float("inf")) for index in kept)


def test_the_figures_of_an_interrupted_run(tmp_path: Path) -> None:
    run = written_run(tmp_path, "gpt-a2b3", steps=2000, causes=("preempted", "node_failure", "finished"))
    (shown,) = figures_of([run])["runs"]
    assert [(attempt["number"], attempt["cause"], attempt["lost_steps"]) for attempt in shown["attempts"]] == [
        (1, "preempted", 0),
        (2, "node_failure", 40),
        (3, "finished", 0),
    ]
    # Bands over steps neither overlap nor leave a gap, though attempt 2 went 40 steps further than was kept.
    assert [(attempt["from_step"], attempt["until_step"]) for attempt in shown["attempts"]] == [(0, 666), (666, 1293), (1293, 2000)]
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert shown["final"]["loss"] == pytest.approx(lines[-1]["loss"], rel=1e-5)
    assert shown["final"]["best_val_loss"] == pytest.approx(min(line["val_loss"] for line in lines if "val_loss" in line), rel=1e-5)
    ends = [event for event in event_log.read(run.ledger) if event["event"] == "end"]
    assert shown["time"]["gpu_hours"] == pytest.approx(sum(end["gpu_seconds"] for end in ends) / 3600, rel=1e-3)
    assert sum(part["share"] for part in shown["time"]["parts"]) == pytest.approx(1, abs=0.01)
    costs = {row["cause"]: row for row in shown["time"]["interruptions"]}
    assert set(costs) == {"preempted", "node_failure"} and costs["node_failure"]["lost"] > 0 == costs["preempted"]["lost"]
    again = sum(ends[1]["parts"][part] for part in ("start_up", "restore", "first_step")) * 16 / 3600
    assert costs["preempted"]["again"] == pytest.approx(again, rel=1e-3) and costs["preempted"]["queue_s"] > 200
    assert shown["overflows"]["count"] == sum(event["event"] == "overflow" for event in event_log.read(run.ledger))


def test_a_hundred_thousand_lines_make_a_small_page_quickly(tmp_path: Path) -> None:
    run = written_run(tmp_path, "long-a2b3", steps=100, diff="+" + "x" * 99 + "\n", causes=("preempted", "finished"))
    line = '{"step": %d, "loss": %.5f, "lr": %.6g, "grad_norm": 0.61234, "tokens": 1, "tokens_per_s": 1140123.4, "gpu_memory_gib": 66.2, "attempt": 1, "time": %.3f}\n'
    lines = [line % (step, 2 + 8 / (1 + step / 900) + (step * 7919 % 101) / 900, 1 / (step + 3000), BEGAN + step) for step in range(1, 100_001)]
    lines[50_000] = line % (50_001, 123.5, 0.001, BEGAN + 50_001)
    run.metrics.write_text("".join(lines))
    begun = time.process_time()
    figures = figures_of([run])
    text = page(figures)
    assert time.process_time() - begun < 20  # 2 s of an idle core
    assert len(text) < 1_500_000
    assert figures["thinned"] and "thinned to at most" in text
    loss = figures["runs"][0]["curves"]["loss"]
    assert 123.5 in loss["v"] and len(loss["v"]) <= figures["points_of_a_curve"]


def test_many_runs_share_the_room_of_one_page(tmp_path: Path) -> None:
    runs = [written_run(tmp_path, f"seed-{index}", steps=4000, every=2, seed=index, causes=("finished",), diff="-" + "y" * 400_000) for index in range(12)]
    text = page(figures_of(runs))
    assert len(text) < 2_000_000
    with pytest.raises(SettingError, match="too many for one page"):
        figures_of(runs * 5)


def test_torn_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    run = written_run(tmp_path, "torn-a2b3", steps=300, causes=("finished",))
    good = figures_of([run])["runs"][0]["curves"]["loss"]
    lines = run.metrics.read_text().splitlines(keepends=True)
    strange = ["step 7\n", '{"loss": 3}\n', "[1, 2]\n", '{"step": 5, "flag": true, "text": "x"}\n', '{"step": 9, "lo']
    run.metrics.write_text("".join([*lines[:10], strange[0], *lines[10:], *strange[1:]]))
    with run.ledger.open("a") as file:
        file.write('{"event": "overflow", "attempt": 1, "job_id": "1", "time": 1}\n{"event": "ov')
    found = figures_of([run])["runs"][0]
    assert found["curves"]["loss"] == good
    assert "flag" not in found["curves"] and "text" not in found["curves"]
    json.loads(json.dumps(found, allow_nan=False))


def test_a_loss_that_is_no_number_is_a_gap_and_no_fault(tmp_path: Path) -> None:
    run = written_run(tmp_path, "nan-a2b3", steps=100, causes=("code_error",))
    with run.metrics.open("a") as file:
        file.write('{"step": 100, "loss": NaN, "lr": 0.1, "time": 1795000100}\n{"step": 101, "loss": Infinity, "time": 1795000101}\n')
    figures = figures_of([run])
    assert figures["runs"][0]["curves"]["loss"]["v"][-2:] == [None, None]
    assert "NaN" not in page(figures).partition('id="data">')[2].partition("</script>")[0]


@pytest.mark.parametrize("kind", ["empty", "running", "failed", "no_ledger", "damaged_settings"])
def test_runs_in_every_state_have_a_page(tmp_path: Path, kind: str) -> None:
    run = written_run(
        tmp_path, f"{kind.replace('_', '-')}-a2b3", steps=400, causes={"running": ("preempted", "running"), "failed": ("code_error",)}.get(kind, ("finished",))
    )
    if kind == "empty":
        run.metrics.unlink()
        run.ledger.unlink()
        event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id="17")
    elif kind == "no_ledger":
        run.ledger.unlink()
    elif kind == "damaged_settings":
        run.job_yaml.write_text("lr: [broken")
    figures = figures_of([run], now=BEGAN + 3000)
    text = page(figures)
    (shown,) = figures["runs"]
    if kind == "empty":
        assert shown["state"] == "waiting" and "No metrics yet" in text and "No attempt has started yet" in text
    elif kind == "running":
        assert shown["state"] == "running" and shown["attempts"][-1]["cause"] == "running" and shown["attempts"][-1]["until"] == pytest.approx(3000, abs=1)
    elif kind == "failed":
        assert shown["state"] == "failed" and "what slurmctld said about attempt 1" in text
    elif kind == "damaged_settings":
        assert shown["state"] == "damaged" and "cannot be read" in text


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_into_the_run_and_prints_figures_for_programs(tmp_path: Path) -> None:
    run = written_run(tmp_path / "runs", "gpt-a2b3", steps=300)
    other = written_run(tmp_path / "runs", "gpt-c4d5", steps=300, seed=2)

    def holdfast(*words: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HOLDFAST_"))} | {"RUNS_DIR": str(tmp_path / "runs")}
        return subprocess.run([sys.executable, "-m", "launcher.cli.app", *words], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=60)

    done = holdfast("report", "a2b3")
    assert done.returncode == 0, done.stderr
    assert str(run.report) in done.stdout and "gpt-a2b3: finished" in done.stdout
    assert run.report.read_text().startswith("<!doctype html>")
    assert run.report.stat().st_mode & 0o022 == 0 and not list(run.path.glob(".*"))

    answer = json.loads(holdfast("report", "gpt-a2b3", "gpt-c4d5", "--json").stdout)
    assert [shown["id"] for shown in answer["runs"]] == [run.id, other.id]

    refused = holdfast("report", "gpt-a2b3", "gpt-c4d5")
    assert refused.returncode == 2 and "--out" in refused.stderr and "Traceback" not in refused.stderr
    both = holdfast("report", "gpt-a2b3", "gpt-c4d5", f"--out={tmp_path}/both.html")
    assert both.returncode == 0 and "gpt-c4d5" in (tmp_path / "both.html").read_text()
    for words, said in (
        (["report", "nothing"], "no run 'nothing'"),
        (["report", "LR=3"], "LR has no effect here"),
        (["report", "a2b3", f"--out={tmp_path}/no/such/x.html"], "cannot be written"),
    ):
        done = holdfast(*words)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_an_array_is_a_comparison_of_its_members(tmp_path: Path) -> None:
    array = RunDir(tmp_path / "sweep-a2b3")
    for index in range(11):
        written_run(array.members, str(index), steps=100, seed=index, causes=("finished",), job_name="sweep")
    shutil.copy(array.member(0).job_yaml, array.job_yaml)
    shutil.copy(array.member(0).snapshot, array.snapshot)
    for index in range(11):
        array.member(index).snapshot.unlink()
    _, named = runs_named(["sweep-a2b3", f"RUNS_DIR={tmp_path}"], {}, Path.cwd())
    assert [run.id for run in members_of(named)] == [f"sweep-a2b3.{index}" for index in range(11)]
    write_report(named, None, False)
    assert "11 runs compared" in array.report.read_text()
    # A member alone has the code of its array.
    (member,) = runs_named(["sweep-a2b3.3", f"RUNS_DIR={tmp_path}"], {}, Path.cwd())[1]
    assert figures_of([member])["runs"][0]["code"]["commit"] == "3f0c9a1be2"


def test_an_array_of_which_no_task_has_begun_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array = written_run(tmp_path, "sweep-a2b3", steps=10)
    array.members.mkdir()
    assert write_report([array], None, False) == Exit.DONE
    said = capsys.readouterr().out
    assert said.startswith("sweep-a2b3: none of its tasks has begun yet\nreport  ->  ")
    shown = Page(array.report.read_text())
    assert "None of its tasks has begun yet" in shown.text and "sweep-a2b3" in shown.text and not shown.having("script")
    assert write_report([array], None, True) == Exit.DONE and json.loads(capsys.readouterr().out)["runs"] == []


@pytest.mark.parametrize("out", ["", ".", "/"])
def test_a_report_into_no_file_is_refused(tmp_path: Path, out: str) -> None:
    with pytest.raises(SettingError, match="is no file; name one"):
        write_report([written_run(tmp_path, "mine-a2b3", steps=10)], Path(out), False)


def test_a_report_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = written_run(tmp_path, "gpt-a2b3", steps=100)
    write_report([run], None, False)
    before = run.report.read_bytes()

    def broken(*words: Any) -> str:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(render, "page", broken)
    with pytest.raises(RuntimeError):
        write_report([run], None, False)
    assert run.report.read_bytes() == before


# -- the page ----------------------------------------------------------------------------------------------------------


def hostile_run(tmp_path: Path) -> RunDir:
    run = written_run(tmp_path, "gpt-a2b3", steps=200, note=HOSTILE, diff=f"+{HOSTILE}\n-</pre></details>{HOSTILE}\n", causes=("code_error", "finished"))
    run.ledger.write_text(
        run.ledger.read_text().replace("what slurmctld said about attempt 1", json.dumps(HOSTILE)[1:-1]).replace('"node', f'"{json.dumps(HOSTILE)[1:-1]}')
    )
    run.metrics.write_text(run.metrics.read_text().replace('"grad_norm"', json.dumps(HOSTILE)))
    snapshot = json.loads(run.snapshot.read_text())
    run.snapshot.write_text(json.dumps(snapshot | {"branch": HOSTILE, "from": HOSTILE}))
    origins = json.loads(run.origins.read_text())
    run.origins.write_text(json.dumps(origins | {"lr": HOSTILE}))
    event_log.append(run.ledger, Event.OVERFLOW, attempt=1, job_id="1", step=7, scale=2.0, first=HOSTILE)
    return run


def test_nothing_that_a_run_says_becomes_markup(tmp_path: Path) -> None:
    text = page(figures_of([hostile_run(tmp_path)]))
    seen = Page(text)
    assert len(seen.having("script")) == 2 and not seen.having("img")
    assert "7*7" in seen.text and not any(name.startswith("on") for _, attributes in seen.elements for name in attributes)
    assert seen.text.count("</pre></details>") == 1


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    text = page(figures_of([written_run(tmp_path, "gpt-a2b3", steps=200)]))
    seen = Page(text)
    for tag, attributes in seen.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert not attributes.get(name) or str(attributes[name]).startswith("data:"), (tag, attributes)
    assert "url(" not in text.replace("url(#${clipId})", "") and "@import" not in text
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}
    (policy,) = [attributes["content"] for attributes in seen.having("meta") if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and "default-src 'none'" in policy and "unsafe-inline'; img" in policy and "script-src 'sha256-" in policy


@pytest.mark.parametrize("fragment", ["", "#wall-time"])
def test_a_browser_draws_every_figure_of_a_run(tmp_path: Path, fragment: str) -> None:
    run = written_run(tmp_path, "gpt-a2b3", steps=1000, causes=("preempted", "hang", "finished"), diff="+one\n")
    write_report([run], None, False)
    dom = open_in_browser(run.report, fragment=fragment)
    assert 'data-drawn="yes"' in dom
    drawn = charts(dom)
    assert set(drawn) == set(collect.FIGURES) - {"accuracy"} and all(drawn.values()), drawn
    assert (">wall time since the run began</text>" in dom) == bool(fragment)
    for words in ("attempt 1: preempted", "attempt 2: hang", "attempt 3: finished"):  # the bands say their causes, whatever their colour
        assert dom.count(f"<title>{words}") > len(drawn), words
    assert ">2 hang</text>" in dom
    assert re.search(r'<svg[^>]*aria-label="attempts over wall time"', dom)


def test_a_browser_draws_compared_runs_and_no_hostile_word_is_executed(tmp_path: Path) -> None:
    runs = [hostile_run(tmp_path), *(written_run(tmp_path, f"gpt-{index}", steps=200, seed=index, loss_scale=False) for index in range(9))]
    out = tmp_path / "all.html"
    write_report(runs, out, False)
    dom = open_in_browser(out, width=500)
    assert "<title>10 runs compared" in dom and "<img" not in dom and 'data-drawn="yes"' in dom
    inks = set(re.findall(r'<path class="curve"[^>]*stroke="(var\(--run-\d\))"(?: stroke-dasharray="([^"]*)")?', dom))
    assert len(inks) == 10, inks  # colour and dashes together tell ten runs apart

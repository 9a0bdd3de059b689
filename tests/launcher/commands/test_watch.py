"""`holdfast watch`: what it draws at every size, and what it does when a person types, resizes, interrupts or kills it."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY, Cluster, until
from terminal import ALT_OFF, Terminal

from benchmarks import many_runs
from jobs.core.contract import Event
from jobs.run import event_log
from jobs.run.rundir import RunDir
from launcher.status import screen
from launcher.status.poller import Known
from launcher.status.run_status import RunStatus

HOLDFAST = Path(sys.executable).with_name("holdfast")
_ROW = RunStatus(
    "gpt-1b-k3f9",
    "/runs/gpt-1b-k3f9",
    "running",
    "81237",
    3,
    6120,
    10_000,
    2.7139,
    71_400.0,
    0,
    ["preempted"],
    6100,
    time.time() - 1865,
    "2 interruptions (preempted), 0 steps lost",
    "",
    4321.0,
    55.2,
)
_ROWS = [
    _ROW,
    replace(
        _ROW,
        run="a-very-long-name-of-a-run-that-nobody-can-say-x8aa",
        path="/1",
        state="waiting",
        note="preempted, queued again; jobs of higher priority are before it",
    ),
    replace(
        _ROW,
        run="cnn-77fe",
        path="/2",
        state="failed",
        loss=None,
        tokens_per_s=None,
        seconds_left=None,
        checkpoint_step=None,
        checkpoint_time=None,
        note="overflow at step 139",
    ),
    replace(_ROW, run="new-abcd", path="/3", state="waiting", attempt=0, step=0, loss=None, checkpoint_step=None, checkpoint_time=None, note=""),
]
_CURVES = {_ROW.path: [10 / (n + 2) for n in range(60)]}


# -- the picture -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("height", [6, 7, 24, 60])
@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 160, 200, 300])
def test_the_picture_fits_the_terminal_at_every_size(width: int, height: int, ascii_only: bool) -> None:
    rows = [replace(row, path=f"{row.path}{index}") for index in range(20) for row in _ROWS]
    for selected in (0, 1, len(rows) - 1):
        view = screen.View(width, height, ascii_only=ascii_only)
        view = replace(view, selected=selected, top=screen.scrolled(0, selected, len(rows), view.room), curves=_CURVES, heading="runs/ - 80 runs")
        lines = [line.plain for line in screen.draw(rows, view)]
        assert len(lines) == height and max(map(len, lines)) <= width and (not ascii_only or "".join(lines).isascii())
        marked = [line for line in lines[2:] if line[:1] in ("▸", ">")]
        assert len(marked) == 1
        assert "running" in "".join(lines) or width < 40 or selected


def test_a_wide_terminal_shows_everything_and_a_narrow_one_what_matters_most() -> None:
    # The table above is as old as this process, which may be minutes.
    rows = [replace(_ROW, checkpoint_time=time.time() - 1865), *_ROWS[1:]]

    def line(width: int) -> str:
        return screen.draw(rows, screen.View(width, 12, curves=_CURVES))[2].plain

    wide = line(200)
    for part in ("gpt-1b-k3f9", "● running", "3", "6,120/10,000", " 61%", "2.714", "▁", "72 min", "71,400", "55 %", "31 min ago", "2 interruptions"):
        assert part in wide
    narrow = line(80)
    for part in ("gpt-1b-k3f9", "● running", "6,120/10,000", " 61%", "2.714", "72 min"):
        assert part in narrow
    assert "71,400" not in narrow


def test_the_reason_why_a_run_waits_stands_in_its_row_and_in_full_below() -> None:
    lines = [line.plain for line in screen.draw(_ROWS, screen.View(160, 12, selected=1))]
    assert "◌ waiting" in lines[3] and "preempted, queued again; jobs of" in lines[3]
    assert lines[-2] == _ROWS[1].note and _ROWS[1].run in lines[-3]


def test_what_is_said_of_the_selected_run_is_wrapped_where_there_is_room() -> None:
    row = replace(_ROW, state="failed", note="word " * 60 + "end")
    lines = [line.plain for line in screen.draw([row], screen.View(80, 24))]
    below = lines[lines.index(next(line for line in lines if line.startswith("gpt-1b-k3f9"))) : -1]
    assert len(lines) == 24 and " ".join(" ".join(below[1:]).split()) == row.note and len(below) == 5
    # Where the runs need the lines, there are two.
    assert len(screen.draw([row] * 30, screen.View(80, 24))) == 24
    assert [line.plain for line in screen.draw([row] * 30, screen.View(80, 24))][-2].startswith("word word")


def test_without_colour_every_state_is_a_word_and_a_sign() -> None:
    for state in ("running", "waiting", "finished", "failed", "cancelled", "stopped", "damaged"):
        for ascii_only in (False, True):
            line = screen.draw([replace(_ROW, state=state)], screen.View(80, 10, ascii_only=ascii_only))[2].plain
            assert state in line and line[line.index(state) - 2] != " "


def test_running_ones_come_first_and_then_the_waiting_ones_and_the_newest_of_each_first() -> None:
    rows = [replace(_ROW, run=f"{state}{index}", state=state) for index in range(2) for state in ("finished", "waiting", "running", "failed")]
    assert [row.run for row in screen.in_order(rows)] == ["running1", "running0", "waiting1", "waiting0", "failed1", "finished1", "failed0", "finished0"]


def test_curves_and_bars_mean_what_they_show() -> None:
    assert screen.sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8, False) == "▁▂▃▄▅▆▇█"
    assert screen.sparkline([5, 5, 5], 8, False) == "▁▁▁" and screen.sparkline([], 8, False) == ""
    assert len(screen.sparkline(list(range(1000)), 20, True)) == 20
    assert screen.bar(0.5, 4, False) == "██··" and screen.bar(2.0, 4, False) == "████" and screen.bar(-1, 4, True) == "----"
    assert len(screen.bar(0.37, 11, False)) == 11


# -- a thousand runs ---------------------------------------------------------------------------------------------------


def test_a_look_at_many_runs_reads_only_what_has_changed(tmp_path: Path) -> None:
    runs = many_runs.make(tmp_path / "runs", 400, lines=20)
    queue = {str(100 + index): ("RUNNING", "None", "node1") for index in range(2, 400, 8)}
    known = Known(tmp_path / "runs")
    first = known.rows(queue)
    before = resource.getrusage(resource.RUSAGE_SELF)
    again = known.rows(queue)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3  # it is about 0.01 s
    # And each kind of change is seen.
    running, waiting = runs[2], runs[4]
    running.attempt(3).progress.write_text("199".ljust(12))
    event_log.append(waiting.ledger, Event.START, attempt=1, job_id="104")
    many_runs.make(tmp_path / "more", 1)[0].path.rename(tmp_path / "runs" / "quickstart-new1")
    rows = {row.run: row for row in known.rows({**queue, "104": ("RUNNING", "None", "")})}
    assert rows[running.id].step == 199 and rows[waiting.id].state == "running" and len(rows) == 401
    assert {row.run: row for row in known.rows({})}[running.id].state == "stopped"


def environment(**more: str) -> dict[str, str]:
    """Without Slurm, so that the states are those of the files."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HOLDFAST_"))} | {"PATH": "/nowhere", **more}


def test_a_thousand_runs_can_be_walked_through(tmp_path: Path) -> None:
    many_runs.make(tmp_path / "runs", 1000, lines=20)
    with Terminal([HOLDFAST, "watch", f"RUNS_DIR={tmp_path}/runs"], environment(), REPOSITORY) as terminal:
        frame = terminal.see("1-25 of 1000")
        assert "125 running, 125 waiting, 750 over" in frame[0]
        assert frame[2].startswith("▸ quickstart-0994  ● running")
        terminal.type("\x1b[B\x1b[B")
        terminal.see("▸ quickstart-0978")
        terminal.type("\x1b[A")
        terminal.see("▸ quickstart-0986")
        terminal.type("G")
        terminal.see("976-1000 of 1000")
        terminal.see("▸ quickstart-0000")
        terminal.type("\x1b[5~")
        terminal.see("▸ quickstart-0033")
        terminal.size(80, 12)
        until(lambda: len(terminal.frame()) == 12 and max(map(len, terminal.frame())) <= 80, 20, "the smaller picture")
        assert any("▸ quickstart-0033" in line for line in terminal.frame())
        terminal.size(200, 50)
        until(lambda: len(terminal.frame()) == 50 and "saved  note" in terminal.frame()[1], 20, "the larger picture")
        terminal.type("q")
        assert terminal.gone() == 0


# -- coming and going --------------------------------------------------------------------------------------------------


@pytest.fixture
def few(tmp_path: Path) -> Path:
    many_runs.make(tmp_path / "runs", 8, lines=20)
    return tmp_path / "runs"


def test_where_there_is_no_terminal_it_is_one_plain_table(few: Path) -> None:
    plain = subprocess.run([HOLDFAST, "watch", f"RUNS_DIR={few}"], env=environment(), capture_output=True, text=True, timeout=60)
    assert plain.returncode == 0 and "\x1b" not in plain.stdout
    assert len(plain.stdout.splitlines()) == 9 and "quickstart-0002" in plain.stdout
    with Terminal([HOLDFAST, "watch", "--once", f"RUNS_DIR={few}"], environment(), REPOSITORY) as terminal:
        assert terminal.gone() == 0
        until(lambda: "quickstart-0007" in terminal.raw, 10, "the table")
        assert ALT_OFF not in terminal.raw


@pytest.mark.parametrize(("how", "code"), [("ctrl-c", 0), ("escape", 0), ("term", 143)])
def test_the_terminal_is_as_it_was_however_it_is_left(few: Path, how: str, code: int) -> None:
    with Terminal([HOLDFAST, "watch", f"RUNS_DIR={few}"], environment(), REPOSITORY) as terminal:
        terminal.see("quickstart-0002")
        if how == "term":
            terminal.process.send_signal(signal.SIGTERM)
        else:
            terminal.type("\x03" if how == "ctrl-c" else "\x1b")
        assert terminal.gone() == code


def test_the_terminal_is_as_it_was_after_an_error_of_ours(few: Path) -> None:
    broken = "import launcher.status.poller as r, sys\nfrom pathlib import Path\nr.run_status.is_recent = lambda row: 1 / 0\nfrom launcher.commands.watch import watch\nwatch(Path(sys.argv[1]), None, False, False)"
    with Terminal([sys.executable, "-c", broken, str(few)], environment(), REPOSITORY) as terminal:
        assert terminal.gone() == 1
        # The traceback is on the ordinary screen, where it can be read.
        until(lambda: "ZeroDivisionError" in terminal.raw.rpartition(ALT_OFF)[2], 10, "the traceback")


def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again(few: Path) -> None:
    with Terminal([HOLDFAST, "watch", f"RUNS_DIR={few}"], environment(), REPOSITORY) as terminal:
        terminal.see("quickstart-0002")
        terminal.process.send_signal(signal.SIGTSTP)
        until(lambda: Path(f"/proc/{terminal.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", 20, "the stop")
        until(lambda: ALT_OFF in terminal.raw, 10, "the ordinary screen")
        seen = len(terminal.raw)
        terminal.process.send_signal(signal.SIGCONT)
        until(lambda: "quickstart-0002" in terminal.raw[seen:], 20, "the runs again")
        terminal.type("q")
        assert terminal.gone() == 0


# -- keys --------------------------------------------------------------------------------------------------------------


def test_l_shows_the_log_and_q_comes_back(few: Path) -> None:
    run = RunDir(few / "quickstart-0002")
    run.log("102", 0).write_text("the first line\n")
    with Terminal([HOLDFAST, "watch", f"RUNS_DIR={few}"], environment(), REPOSITORY) as terminal:
        terminal.see("▸ quickstart-0002")
        terminal.type("l")
        until(lambda: "the first line" in terminal.raw, 20, "the log")
        with open(run.log("102", 0), "a") as file:
            file.write("a line that came later\n")
        until(lambda: "a line that came later" in terminal.raw, 20, "the rest of the log")
        assert "--- attempt 3 · job 102 · after preemption ---" in terminal.raw
        seen = len(terminal.raw)
        terminal.type("q")
        until(lambda: "▸ quickstart-0002" in terminal.raw[seen:], 20, "the runs again")
        terminal.type("q")
        assert terminal.gone() == 0


def test_what_cannot_be_done_is_said_and_a_no_changes_nothing(few: Path) -> None:
    before = {path: path.read_bytes() for path in few.rglob("ledger.jsonl")}
    with Terminal([HOLDFAST, "watch", f"RUNS_DIR={few}"], environment(), REPOSITORY) as terminal:
        terminal.see("▸ quickstart-0002")
        terminal.type("r")
        terminal.see("quickstart-0002 is running; there is nothing to resume")
        terminal.type("c")
        terminal.see("cancel quickstart-0002 (running, step")
        terminal.type("n")
        terminal.see("quickstart-0002 is left as it is")
        terminal.type("G")
        terminal.see("▸ quickstart-0000")
        terminal.type("c")
        terminal.see("quickstart-0000 is finished; there is nothing to cancel")
        terminal.type("q")
        assert terminal.gone() == 0
    assert before == {path: path.read_bytes() for path in few.rglob("ledger.jsonl")}


def test_a_waiting_run_of_slurm_is_explained_cancelled_and_resumed_by_keys(cluster: Cluster) -> None:
    done = cluster.holdfast("submit", "--json", "NODES=1", "GPUS_PER_NODE=1", "JOB_NAME=watched", "SBATCH_OPTIONS=hold=")
    run = RunDir(Path(json.loads(done.stdout)["path"]))
    first = cluster.job_id(run)
    with Terminal([HOLDFAST, "watch", run.id], cluster.env, REPOSITORY, columns=160) as terminal:
        frame = terminal.see("held by you: scontrol release starts it")
        assert "◌ waiting" in frame[2]
        terminal.type("c")
        terminal.see(f"cancel {run.id} (waiting, step 0)? y/n")
        terminal.type("y")
        terminal.see(f"cancelled job {first} of run {run.id}", 60)
        terminal.see("■ cancelled", 60)
        terminal.type("r")
        terminal.see(f"resume {run.id} (cancelled, step 0)? y/n")
        terminal.type("y")
        terminal.see("it goes on from step 0", 60)
        second = str(until(lambda: [e["job_id"] for e in event_log.read(run.ledger) if e["event"] == "submitted"][1:], 30, "the second job")[0])
        terminal.see("◌ waiting", 60)
        terminal.type("q")
        assert terminal.gone() == 0
    assert second != first
    cluster.slurm("scancel", second)

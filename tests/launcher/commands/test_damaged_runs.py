"""A damaged or hostile run directory is shown as damaged; it stops no command on other runs, hangs none and fills no memory."""

import json
import os
import shutil
from pathlib import Path

import pytest
from damaged_runs import CHECKPOINT, DAMAGED, LIMIT_MB, LIMIT_S, TOLERATED, Answer, Case, answers, cases, make_runs

from jobs.run.rundir import RunDir

CASES = cases()
BAD = ("open-bbbb", "over-cccc")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    make_runs(folder / "runs")
    found, _ = answers(folder, [["status", "--json"]])
    (folder / "rows.json").write_text(found[0].out)
    return folder


def copied(template: Path, work: Path, case: Case) -> Path:
    if case.needs_root and os.geteuid() != 0:
        pytest.skip("making a device needs root")
    shutil.copytree(template / "runs", work / "runs", symlinks=True)
    for name in BAD:
        case.damage(RunDir(work / "runs" / name))
    return work


def explained(words: list[str], answer: Answer) -> str:
    return f"holdfast {' '.join(words)}: {answer.code} after {answer.seconds:.1f} s\n{answer.out[-1500:]}\n{answer.err[-1500:]}"


def assert_ended(commands: list[list[str]], found: list[Answer], mb: float, limit_s: float = 5) -> None:
    """Every command ended by itself with an exit code and, where that is not 0, with a reason of few lines."""
    assert len(found) == len(commands), f"the process was killed: {mb} MB"
    for words, answer in zip(commands, found, strict=True):
        assert answer.code is not None and "Traceback" not in answer.err, explained(words, answer)
        assert answer.seconds < limit_s, explained(words, answer)
        assert len(answer.err.splitlines()) <= 5 and len(answer.err) < 3000, explained(words, answer)
    assert mb < LIMIT_MB


def commands_for_all(work: Path) -> list[list[str]]:
    return [["status", "--json"], ["status"], ["clean", "--older", "0h"], ["watch", "--once"]]


def assert_good_rows(template: Path, rows: dict[str, dict[str, object]]) -> None:
    before = {row["run"]: row for row in json.loads((template / "rows.json").read_text())}
    for name in ("good-aaaa", "good-dddd"):
        changed = {key for key, value in rows[name].items() if value != before[name][key]}
        assert changed <= {"time_s", "useful_share", "path"}, changed  # of a running attempt they grow


def assert_rows(template: Path, case: Case, shown: Answer) -> None:
    rows = {row["run"]: row for row in json.loads(shown.out)}
    assert set(rows) == {"good-aaaa", "good-dddd", *BAD}
    assert_good_rows(template, rows)
    for name in BAD:
        assert (rows[name]["state"] == "damaged") is (case.outcome == DAMAGED), rows[name]
        if case.outcome == DAMAGED:
            assert str(RunDir(Path(rows[name]["path"])).path) in rows[name]["note"] and "\n" not in rows[name]["note"]


def test_all_damaged_runs_in_one_folder_spoil_no_row(template: Path, tmp_path: Path) -> None:
    """Each case beside two intact runs and all the others, in one process."""
    runs = tmp_path / "runs"
    shutil.copytree(template / "runs", runs, symlinks=True, ignore=shutil.ignore_patterns(*BAD))
    wanted = {}
    for number, case in enumerate(case for case in CASES if not case.needs_root or os.geteuid() == 0):
        run = RunDir(runs / f"case-{number:04d}")
        shutil.copytree(template / "runs" / BAD[number % 2], run.path, symlinks=True)
        case.damage(run)
        wanted[run.id] = case
    commands = commands_for_all(tmp_path)
    found, mb = answers(tmp_path, commands)
    assert_ended(commands, found, mb, limit_s=LIMIT_S)
    rows = {row["run"]: row for row in json.loads(found[0].out)}
    assert set(rows) == {"good-aaaa", "good-dddd", *wanted}
    assert {case.name for name, case in wanted.items() if (rows[name]["state"] == "damaged") is not (case.outcome == DAMAGED)} == set()
    assert {case.name for name, case in wanted.items() if case.outcome == DAMAGED and str(runs / name) not in rows[name]["note"]} == set()
    assert_good_rows(template, rows)
    gone = {line.split()[0] for line in found[2].out.splitlines() if "would go" in line}
    assert {case.name for name, case in wanted.items() if case.outcome == DAMAGED and name in gone} == set()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damaged_run_spoils_no_row(template: Path, tmp_path: Path, case: Case) -> None:
    work = copied(template, tmp_path, case)
    commands = commands_for_all(work)
    found, mb = answers(work, commands)
    assert_ended(commands, found, mb)
    assert_rows(template, case, found[0])
    assert [answer.code for answer in found] == [0, 0, 0, 0]
    if case.outcome == DAMAGED:
        left = [line for line in found[2].out.splitlines() if line.startswith(BAD)]
        assert len(left) == 2 and all("left: " in line for line in left), found[2].out


def commands_for_one(name: str) -> list[list[str]]:
    return [
        ["status", name], ["report", name, "--out", "page.html"], ["report", "good-aaaa", name, "good-dddd", "--out", "all.html"], ["logs", name], ["logs", name, "--rank", "all", "--attempt", "all"], ["diff", "good-aaaa", name, "--code"],
        ["ckpt", "ls", name], ["ckpt", "verify", name], ["ckpt", "export", name, "--form", "none"], ["explain", f"runs/{name}/"], ["verify", "data", name], ["sweep", "show", name],
        ["cancel", name], ["resume", name], ["resume", name, "MAX_STEPS=50", "--allow-change"], ["rerun", name], ["clean", name], ["completion", "--line", f"holdfast status {name[:3]}"],
    ]  # fmt: skip


# One of each kind for every run of the tests; all of them where time is no matter.
QUICK = {
    "job.yaml: FIFO", "ledger: FIFO", "ledger: step is text", "ledger: nodes is a number", "ledger: 200,000 deep", "metrics: link to /dev/zero", "metrics: step is null", "progress: FIFO", "origins: FIFO",
    "origins: wrong values", "snapshot: FIFO", "code.diff: link to /dev/zero", "code.json: FIFO", "owner: FIFO", "log_sizes: FIFO", "log: FIFO", "script: FIFO", "samples: FIFO", "code file: FIFO", "attempts: superscript two",
    "manifest: FIFO", "manifest: tokens is text", "model: FIFO", "model: device of no bytes", "ledger: half a line",
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case, marks=[] if case.name in QUICK else [pytest.mark.slow]) for case in CASES], ids=lambda case: case.name)
def test_commands_on_a_damaged_run_end_with_a_reason(template: Path, tmp_path: Path, case: Case) -> None:
    work = copied(template, tmp_path, case)
    commands = [words for name in (BAD if case.name not in QUICK else BAD[1:]) for words in commands_for_one(name)]
    found, mb = answers(work, commands)
    assert_ended(commands, found, mb)
    for words, answer in zip(commands, found, strict=True):
        name = next((word for word in words if word in BAD), "")
        file = case.path(RunDir(work / "runs" / name)).name
        if words[:2] == ["ckpt", "verify"] and case.outcome == CHECKPOINT:
            assert answer.code == 1 and "step-00000020" in answer.out, explained(words, answer)
        if words[:2] == ["report", "good-aaaa"]:
            assert answer.code == 0 and all(f"{run}: " in answer.out for run in ("good-aaaa", "good-dddd", name)), explained(words, answer)
        if case.outcome == DAMAGED and words[0] in ("resume", "cancel") and "nothing to resume" not in answer.out:
            assert answer.code != 0 and name in answer.err and file in answer.err, explained(words, answer)


def test_quick_cases_exist() -> None:
    assert {case.name for case in CASES} >= QUICK
    assert len(CASES) >= 60 and {case.outcome for case in CASES} == {DAMAGED, CHECKPOINT, TOLERATED}

"""The reader of run directories, and what commands make of files that it refuses."""

import json
import os
import time
from pathlib import Path

import pytest
from damaged_runs import Answer, answers, make_runs

import holdfast as holdfast_module
from jobs.checkpoint import directory
from jobs.config import yaml_io
from jobs.config.resolver import load
from jobs.core import safe_read
from jobs.core.contract import Event
from jobs.core.errors import CheckpointError, DamagedFileError, SettingError
from jobs.run import event_log, metrics_log, rundir
from jobs.run.rundir import RunDir
from jobs.sweep import search_space
from launcher.commands import clean
from launcher.status import run_status
from launcher.status.poller import Known
from launcher.sweeps import study

REPO = Path(__file__).resolve().parents[3]


def holdfast(work: Path, *words: str) -> tuple[Answer, float]:
    found, mb = answers(work, [words])
    assert found and found[0].code is not None, f"{mb} MB: {found}"
    return found[0], mb


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_runs(tmp_path / "runs")
    return tmp_path / "runs"


def test_error_names_file_and_fault(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(FileNotFoundError):
        safe_read.read_bytes(path)
    os.mkfifo(path)
    with pytest.raises(DamagedFileError, match=f"{path}: is a FIFO, not a regular file"):
        safe_read.read_bytes(path)
    path.unlink()
    path.write_bytes(b"1234")
    with pytest.raises(DamagedFileError, match="has 4 bytes, more than the 3 that are read"):
        safe_read.read_bytes(path, 3)
    (tmp_path / "link").symlink_to("x")
    with pytest.raises(DamagedFileError, match="link: is a symbolic link, not a regular file"):
        safe_read.read_bytes(tmp_path / "link")
    assert safe_read.read_bytes(tmp_path / "link", links=True) == b"1234"
    with pytest.raises(DamagedFileError, match="no name of a file"):
        safe_read.read_bytes(tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[" * 100_000, "nested deeper"),
        ("[" * 65 + "]" * 65, "nested deeper"),
        ('{"a": ' * 70 + "1" + "}" * 70, "nested deeper"),
        ("9" * 19 + "9", "more than 64 bits"),
        ('"\\ud800"', "half a surrogate"),
        ('{"\\udc00": 1}', "half a surrogate"),
        ("{", "not JSON"),
        ("9" * 5000, "not JSON"),
    ],
)
def test_json_that_no_writer_makes_is_refused(text: str, fault: str) -> None:
    with pytest.raises(DamagedFileError, match=f"source: .*{fault}"):
        safe_read.parse(text.encode(), "source")


@pytest.mark.parametrize("text", ['"\\ud83d\\ude00"', str(2**63 - 1), "[" * 64 + "]" * 64, '{"loss": NaN}', "0.12345678901234567890123"])
def test_json_within_limits_is_read(text: str) -> None:
    safe_read.parse(text.encode(), "source")


@pytest.mark.parametrize("text", ["null\n", "Infinity\n", '{"step":"x"}\n', "binary \x00\x01\n"])
def test_ledger_without_any_event_is_damaged(tmp_path: Path, text: str) -> None:
    """Read as an empty one it would say that the run never began."""
    path = tmp_path / "ledger.jsonl"
    path.write_text(text)
    with pytest.raises(DamagedFileError, match="ledger.jsonl: line 1 is no event, and there is none in the file"):
        event_log.read(path)
    event_log.append(path, Event.CANCEL, attempt=1, job_id="1")
    assert len(event_log.read(path)) == 1


@pytest.mark.parametrize("torn", ["", "{", '{"event": "submi', "\0" * 300])
def test_first_line_torn_by_a_kill_is_no_damage(tmp_path: Path, torn: str) -> None:
    for name, read in (("ledger.jsonl", event_log.read), ("metrics.jsonl", metrics_log.tail)):
        (tmp_path / name).write_text(torn.replace("event", "step") if name == "metrics.jsonl" else torn)
        assert read(tmp_path / name) == []


def test_ledger_that_was_lost_is_damage(runs: Path) -> None:
    for change in (lambda path: path.write_text(""), lambda path: path.unlink()):
        change(RunDir(runs / "over-cccc").ledger)
        (row,) = run_status.collect([RunDir(runs / "over-cccc")], None)
        assert row.state == "damaged" and "ledger.jsonl: has no event, and metrics.jsonl has step 40" in row.note


def test_job_yaml_of_a_run_is_whole(tmp_path: Path) -> None:
    """Settings that a cut file has lost would be the defaults."""
    path = tmp_path / "job.yaml"
    for text, fault in (("", "no job_name"), ("nodes: 5\n", "no job_name"), ('job_name: "a"\nmax_steps: 60', "its last line has no end")):
        path.write_text(text)
        with pytest.raises(DamagedFileError, match=fault):
            load(path)
    names = [f"/data/{index:06d}.bin" for index in range(20_000)]
    path.write_text(yaml_io.dump_yaml({"job_name": "a", "data": names}))
    assert yaml_io.read_run_yaml(path)["data"] == names
    path.write_text("# edited\n" + path.read_text())
    with pytest.raises(SettingError, match="more than the 262,144 that are read of an edited file"):
        yaml_io.read_run_yaml(path)


def test_every_field_that_is_written_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    event_log.append(path, Event.START, attempt=1, job_id="12_3", nodes=["a"], world=2, restarts=0, host="h", setup_s=3)
    event_log.append(path, Event.REQUEUE, attempt=1, job_id="local-7", way="w", successor="9", avoids=["a"])
    event_log.append(path, Event.CHANGED, attempt=0, job_id="", changes={"lr": [1, {"a": [2]}]}, allow=True)
    event_log.append(
        path, Event.END, attempt=1, job_id="1", cause="killed", evidence="e", exit_code=None, saved_step=None, parts={"useful": 1.5}, marks=[[1, 2.0]]
    )
    event_log.append(path, Event.SUBMITTED, attempt=0, job_id="1", by="x", tasks="0-3,7", cluster="c", later={"kept": "out"})
    read = event_log.read(path)
    assert len(read) == 5 and read[2]["changes"] == {"lr": [1, {"a": [2]}]} and "later" not in read[4]


def test_ledger_is_not_appended_to_a_link(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("text\n")
    (tmp_path / "ledger.jsonl").symlink_to("other")
    with pytest.raises(OSError):
        event_log.append(tmp_path / "ledger.jsonl", Event.CANCEL, attempt=1, job_id="1")
    assert (tmp_path / "other").read_text() == "text\n"


def test_aliases_and_merges_do_not_multiply(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    tens = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))]
    for text in ("\n".join(tens), "a: &a [*a]", "a: &a {b: 1}\nc: {!!merge <<: *a}"):
        path.write_text(text + "\n")
        begun = time.monotonic()
        with pytest.raises(SettingError):
            yaml_io.read_yaml(path, "job.yaml")
        assert time.monotonic() - begun < 2
    path.write_text("a: &a {b: 1}\nc: [*a, *a]\n")
    assert yaml_io.read_yaml(path, "job.yaml") == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


def test_checkpoint_reads_links_within_itself_only(runs: Path) -> None:
    path = directory.path_of(RunDir(runs / "good-aaaa").checkpoints, 20)
    model = path / "model.safetensors"
    directory.verify(path)
    model.rename(path / "kept")
    model.symlink_to("kept")
    directory.verify(path)
    (path / "kept").rename(path.parent / "kept")
    model.unlink()
    model.symlink_to("../kept")
    with pytest.raises(CheckpointError, match="model.safetensors is a symbolic link"):
        directory.verify(path)


def test_log_refuses_what_status_cannot_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=r"holdfast.log: loss is 'low'; allowed: a number"):
        holdfast_module.log(step=1, loss="low")
    holdfast_module.log(step=1, loss=None, text="kept")


def test_metrics_of_other_content_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for text in ("null\n", "Infinity", '{"nodes":5}\n', "\x7fELF\n"):
        path.write_text(text)
        with pytest.raises(DamagedFileError, match="metrics.jsonl: line 1 holds no metrics"):
            metrics_log.check_content(path)
    for text in ("", '{"ste', "\0" * 50, '{"step": 1}\n'):
        path.write_text(text)
        metrics_log.check_content(path)


def test_metrics_tail_of_rubbish_reads_little(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{}\n" * 10_000_000)
    begun = time.process_time()
    with pytest.raises(DamagedFileError, match="hold no whole line"):
        metrics_log.tail(path)
    assert time.process_time() - begun < 3


# -- commands ----------------------------------------------------------------------------------------------------------


def test_clean_removes_a_damaged_run_only_by_name(runs: Path) -> None:
    run = RunDir(runs / "over-cccc")
    run.metrics.unlink()
    os.mkfifo(run.metrics)
    then = time.time() - 4000
    os.utime(run.metrics, (then, then))
    for words in (["--older", "0h", "--yes"], ["--failed", "--yes"]):
        answer, _ = holdfast(runs.parent, "clean", *words)
        assert answer.code == 0 and run.path.exists()
    assert "over-cccc" in answer.out and "metrics.jsonl: is a FIFO" in answer.out
    answer, _ = holdfast(runs.parent, "clean", "over-cccc", "--yes")
    assert answer.code == 0 and not run.path.exists(), answer.out


def test_clean_keeps_a_damaged_run_that_may_be_at_work(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is named: its ledger cannot be read and is new, its job is queued, or its last attempt has no end."""
    monkeypatch.setenv("PATH", "/nowhere")
    fresh = RunDir(runs / "over-cccc")
    fresh.ledger.write_text('{"event": "end", "attempt": 1, "job_id": "1", "time": 1, "step": "x"}\n')
    open_end = RunDir(runs / "open-bbbb")
    open_end.metrics.write_text('{"step": null}\n')
    assert clean.clean(runs, [fresh, open_end], older=None, failed=False, keep_checkpoints=False, yes=True, as_json=False) == 0
    assert fresh.path.exists() and open_end.path.exists()
    queued = RunDir(runs / "good-aaaa")
    queued.metrics.write_text('{"step": null}\n')
    monkeypatch.setattr(run_status, "ask_queue", lambda: ({"81237": ("PENDING", "Priority", "")}, ""))
    clean.clean(runs, [queued], older=None, failed=False, keep_checkpoints=False, yes=True, as_json=False)
    assert queued.path.exists()


def test_cancel_of_a_damaged_run_is_an_error(runs: Path) -> None:
    """Its job is unknown, and may go on."""
    ledger_path = RunDir(runs / "open-bbbb").ledger
    ledger_path.unlink()
    os.mkfifo(ledger_path)
    answer, _ = holdfast(runs.parent, "cancel", "open-bbbb")
    assert answer.code == 1 and "ledger.jsonl: is a FIFO" in answer.err and "was not cancelled" in answer.err
    answer, _ = holdfast(runs.parent, "resume", "open-bbbb")
    assert answer.code == 2 and "ledger.jsonl" in answer.err and "holdfast resume would execute what it holds" in answer.err


def test_watch_shows_a_repaired_run_at_once(runs: Path) -> None:
    run = RunDir(runs / "over-cccc")
    intact = run.metrics.read_text()
    run.metrics.write_text('{"step": null}\n')
    known = Known(runs)
    assert {row.run: row.state for row in known.rows(None)}["over-cccc"] == "damaged"
    run.metrics.write_text(intact)
    assert {row.run: row.state for row in known.rows(None)}["over-cccc"] == "finished"


def test_names_that_are_no_text_are_shown(runs: Path) -> None:
    os.rename(bytes(runs / "over-cccc"), bytes(runs) + b"/over-\xff\xfe")
    for words in (["status"], ["clean", "--older", "0h"], ["watch", "--once"]):
        answer, _ = holdfast(runs.parent, *words)
        assert answer.code == 0 and "over-\\udcff" in answer.out, answer


def test_job_yaml_that_is_a_dangling_link_is_shown(runs: Path) -> None:
    path = RunDir(runs / "over-cccc").job_yaml
    path.unlink()
    path.symlink_to("nowhere")
    answer, _ = holdfast(runs.parent, "status", "--json")
    (row,) = [row for row in json.loads(answer.out) if row["run"] == "over-cccc"]
    assert row["state"] == "damaged" and "job.yaml: is a symbolic link" in row["note"]


@pytest.mark.parametrize(
    "fault", ["FIFO", "null", '{"values": [1]}', '{"values": {"LR": [1]}}', '{"values": {"SEED": 1}}', '{"values": {}, "x": ' + "[" * 100_000]
)
def test_sweep_shows_its_other_trials(runs: Path, fault: str) -> None:
    sweep = make_sweep(runs)
    bad = sweep.member(1).trial
    bad.unlink()
    os.mkfifo(bad) if fault == "FIFO" else bad.write_text(fault)
    assert_second_trial_is_damaged(sweep)


@pytest.mark.parametrize("name", ["job.yaml", "ledger.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("fault", ["FIFO", "Infinity\n", "[" * 200_000 + "\n", '{"step":"x"}\n'])
def test_sweep_shows_a_damaged_run_as_a_trial(runs: Path, name: str, fault: str) -> None:
    sweep = make_sweep(runs)
    bad = sweep.member(1).path / name
    bad.unlink()
    os.mkfifo(bad) if fault == "FIFO" else bad.write_text(fault)
    assert_second_trial_is_damaged(sweep)


@pytest.mark.parametrize("fault", ["FIFO", "null", "[" * 200_000, '{"over": 5}', "Infinity"])
def test_sweep_file_that_cannot_be_read_is_named(runs: Path, fault: str) -> None:
    sweep = make_sweep(runs)
    sweep.sweep.unlink()
    os.mkfifo(sweep.sweep) if fault == "FIFO" else sweep.sweep.write_text(fault)
    for words in (["sweep", "show", "sweep-eeee"], ["sweep", "--resume", "sweep-eeee"]):
        answer, _ = holdfast(runs.parent, *words)
        assert answer.code not in (0, None) and "sweep-eeee/sweep.json" in answer.err and "Traceback" not in answer.err, answer
    answer, _ = holdfast(runs.parent, "status", "--json")
    assert answer.code == 0 and "open-bbbb" in answer.out


def test_study_leaves_out_a_damaged_trial(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One trial that cannot be read kept every later one from its values."""
    pytest.importorskip("optuna")
    for name, text in (("trial.json", '{"values": 5}'), ("ledger.jsonl", '{"event": "start", "attempt": 1, "job_id": "1", "time": 1, "nodes": 5}\n')):
        sweep = RunDir(runs / "sweep-eeee") if (runs / "sweep-eeee").exists() else make_sweep(runs)
        kept = (sweep.member(1).path / name).read_text()
        (sweep.member(1).path / name).write_text(text)
        known = study.in_memory(sweep, search_space.load(sweep.sweep)).get_trials(deepcopy=False)
        assert [trial.state.name for trial in known][:2] == ["COMPLETE", "FAIL"] and known[0].params == {"LR": 0.2}
        assert f"run {sweep.member(1).id} is damaged and left out of the study: {sweep.member(1).path / name}" in capsys.readouterr().err
        (sweep.member(1).path / name).write_text(kept)


def assert_second_trial_is_damaged(sweep: RunDir) -> None:
    answer, _ = holdfast(sweep.path.parent.parent, "sweep", "show", "sweep-eeee", "--json")
    assert answer.code == 0, answer
    states = [trial["state"] for trial in json.loads(answer.out)["trials"]]
    assert states[1] == "damaged" and states[0] == "finished", states


def make_sweep(runs: Path) -> RunDir:
    sweep = RunDir(runs / "sweep-eeee")
    sweep.members.mkdir(parents=True)
    made = RunDir(runs / "over-cccc")
    for path in (made.job_yaml, made.origins):
        (sweep.path / path.name).write_bytes(path.read_bytes())
    sweep.sweep.write_text(json.dumps({"over": [{"name": "lr", "low": 0.1, "high": 0.5}], "trials": 3, "parallel": 1, "sampler": "random", "metric": "loss"}))
    for number in range(3):
        os.rename(runs / ("good-aaaa", "over-cccc", "good-dddd")[number], sweep.member(number).path)
        sweep.member(number).trial.write_text(json.dumps({"number": number, "values": {"LR": 0.2}}))
    search_space.load(sweep.sweep)
    return sweep


def test_code_of_a_rerun_stays_inside(runs: Path) -> None:
    RunDir(runs / "over-cccc").code_sums.write_text(json.dumps({"../../x": "0"}))
    answer, _ = holdfast(runs.parent, "rerun", "over-cccc")
    assert answer.code == 1 and "code.json" in answer.err and not (runs / "x").exists()


def test_origins_of_wrong_types_are_refused(runs: Path) -> None:
    run = RunDir(runs / "over-cccc")
    run.origins.write_text('{"lr": 5}')
    with pytest.raises(DamagedFileError, match=r"origins.json: lr is 5; allowed: text"):
        rundir.origins(run)


@pytest.mark.slow
def test_report_of_a_long_run_takes_bounded_memory(runs: Path) -> None:
    """170 MB of metrics took 1.2 GB."""
    run = RunDir(runs / "good-aaaa")
    with open(run.metrics, "w") as file:
        for step in range(560_000):
            values = {
                name: 1.0 + 1 / (step + 1)
                for name in ("loss", "lr", "grad_norm", "tokens_per_s", "peak_pct", "gpu_memory_gib", "data_wait_pct", "save_wait_pct")
            }
            file.write(json.dumps({"step": step, "time": 1_795_000_000.0 + step, "attempt": 1, "padding": "x" * 40, **values}) + "\n")
    assert run.metrics.stat().st_size > 150e6
    found, mb = answers(runs.parent, [["report", "good-aaaa", "--out", "page.html"]], limit_s=120)
    assert found[0].code == 0, found
    assert mb < 150, mb


def test_run_files_are_read_in_one_place() -> None:
    """No reader opens a file of a run directory by itself: what a property of RunDir or AttemptDir names goes through safe_read."""
    names = "job_yaml|origins|snapshot|diff|code_sums|ledger|metrics|sweep|study|trial|pace|script|stop_file|progress|clock|owner|section|watch|hang|allreduce|env|log_sizes"
    wrong = []
    for package in ("jobs", "launcher", "train", "slurm"):
        for path in (REPO / package).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if any(f".{name}.read_{kind}(" in line for name in names.split("|") for kind in ("text", "bytes")):
                    wrong.append(f"{path.relative_to(REPO)}:{number}")
    assert not wrong


def test_only_an_own_link_to_a_regular_file_is_followed(tmp_path: Path) -> None:
    log, link = tmp_path / "slurm-1.out", tmp_path / "1.batch.out"
    log.write_text("a line\n")
    link.symlink_to(log)
    assert safe_read.follow_own_link(link) == log.resolve() and safe_read.follow_own_link(log) == log
    with safe_read.open_file(safe_read.follow_own_link(link)) as file:
        assert file.read() == b"a line\n"
    for target in (tmp_path / "gone", Path("/dev/zero")):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises((OSError, DamagedFileError)):
            safe_read.open_file(safe_read.follow_own_link(link)).__enter__()
    if os.geteuid() == 0:
        os.chown(link, 65534, 65534, follow_symlinks=False)
        assert safe_read.follow_own_link(link) == link, "a link of another user stays a link, which open_file refuses"

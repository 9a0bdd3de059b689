"""Sweeps without Slurm: how a space is written and checked, and that the study keeps its trials whatever is killed."""

import json
import os
import random
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import holdfast
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from training import TINY, Farm, farm  # noqa: F401

from jobs.config.resolver import load
from jobs.config.yaml_io import dump_yaml
from jobs.core.contract import Cause, Event, Exit
from jobs.core.errors import ImpossibleJobError, SettingError, SubmitError
from jobs.run import event_log, metrics_log
from jobs.run.rundir import RunDir
from jobs.sweep import parser, search_space
from jobs.sweep.search_space import Dimension, Sweep
from launcher.cli.app import run_app
from launcher.commands import sweep
from launcher.status import sweep_status
from launcher.submission import sweep_jobs
from launcher.submission.create_run import resolve_here
from launcher.sweeps import pruner, study, trial, trial_values

BASE = resolve_here(["NODES=1", "GPUS_PER_NODE=1", "DEVICE=cpu"], {}, REPOSITORY)


def define(*over: str, **options: Any) -> Sweep:
    return parser.define(over, options, None, "", 256)


# -- how a space is written --------------------------------------------------------------------------------------------


def test_words_become_dimensions() -> None:
    described = define("LR=1e-4..1e-2:log", "precision=bf16,fp32", "batch-size=16..64:step=16", "MODEL_OPTIONS.d_model=64,128", "beta2=0.9..0.99", trials=12)
    assert [d.text() for d in described.over] == [
        "LR=0.0001..0.01:log",
        "PRECISION=bf16,fp32",
        "BATCH_SIZE=16..64:step=16",
        "MODEL_OPTIONS.d_model=64,128",
        "BETA2=0.9..0.99",
    ]
    assert [d.whole for d in described.over] == [False, False, True, False, False]
    assert (described.sampler, described.trials, described.parallel, described.metric, described.pruner) == ("tpe", 12, 3, "val_loss", "none")


@pytest.mark.parametrize(
    ("over", "options", "said"),
    [
        (["LRR=1,2"], {}, "LRR is not a setting (--over). Did you mean LR?"),
        (["NODES=1,2"], {}, "NODES: is the same for all trials of a sweep"),
        (["LR=a..b"], {}, "'a' is not a number; write LOW..HIGH"),
        (["LR=1e-2..1e-3"], {}, "0.01 is not below 0.001"),
        (["LR=0..1:log"], {}, "begins above 0"),
        (["LR=1..2:logarithmic"], {}, "'logarithmic' behind a range is neither log nor step=N"),
        (["LR=1..2:step=5"], {}, "a step of 5 does not fit"),
        (["SEED=1.5..3"], {}, "SEED: takes whole numbers"),
        (["PRECISION=bf16"], {}, "has one value only; give PRECISION=bf16 as a setting"),
        (["PRECISION=bf16,bf16"], {}, "has 'bf16' twice"),
        (["PRECISION=bf16,"], {}, "has an empty value"),
        (["LR"], {}, "write KEY=value1,value2 or KEY=low..high"),
        (["LR=1,2", "LR=3,4"], {}, "LR varies twice"),
        (["LR=1,2", "learning_rate=3,4"], {}, "LR varies twice"),
        (["MODEL_OPTIONS.d_model=1,2", "MODEL_OPTIONS=a=1,a=2"], {}, "vary the whole or its keys"),
        (["LR.x=1,2"], {}, "LR has no keys to vary"),
        (["LR=1e-4..1e-2"], {"sampler": "grid"}, "a grid takes each once"),
        (["LR=1,2"], {"sampler": "grid", "trials": 3}, "takes each of its 2 points once, but --trials says 3"),
        (["LR=1e-4..1e-2"], {}, "needs --trials N"),
        (["LR=1,2"], {"sampler": "bayes", "trials": 3}, "sampler: 'bayes': input should be 'grid', 'random' or 'tpe' (--sampler)"),
        (["LR=1,2"], {"trials": 0}, "trials: 0: input should be greater than or equal to 1 (--trials)"),
        (["SEED=1..200", "BATCH_SIZE=1..200"], {}, "40,000 points, at most 10,000"),
        (["SEED=0..9007199254740992"], {}, "points, at most 10,000"),
        ([], {}, "A sweep needs something that varies"),
    ],
)
def test_what_is_wrong_with_a_space_is_said(over: list[str], options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError) as err:
        define(*over, **options)
    assert said in str(err.value)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(SettingError) as err:
        define("LRR=1,2", "NODES=1,2", "SEED=x..y", trials=3)
    assert len(str(err.value).splitlines()) == 3


def test_a_file_says_the_same_as_words_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "over:\n  lr: {low: 1e-4, high: 1e-2, log: true}\n  precision: [bf16, none]\n  warmup_pct: [0.1, ~]\n  seed: 1..3\ntrials: 12\npruner: median\n"
    )
    described = parser.define(["PRECISION=fp32,bf16"], {"trials": 8}, file, "x.yaml", 256)
    assert [d.text() for d in described.over] == ["LR=0.0001..0.01:log", "PRECISION=fp32,bf16", "WARMUP_PCT=0.1,none", "SEED=1..3"]
    assert (described.trials, described.pruner) == (8, "median")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("over: {lr: 1..2}\ntrails: 3\n", "'trails' is no option of a sweep (x.yaml). Did you mean 'trials'?"),
        ("over: {lr: {low: 1, hight: 2}}\n", "needs low and high"),  # codespell:ignore hight
        ("over: [lr]\n", "over: holds a list"),
        ("over: {lr: 3}\n", "has one value only"),
        ("over: {lr: {low: 1, high: true}}\n", "'True' is not a number"),
        ("- a\n", "holds a list"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(SettingError) as err:
        parser.define([], {}, file, "x.yaml", 256)
    assert said in str(err.value)


_numbers = st.one_of(st.integers(-1000, 1000), st.floats(-1e6, 1e6, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-9))


@settings(deadline=None)
@given(st.sampled_from(["LR", "SEED", "BETA2", "BATCH_SIZE", "MODEL_OPTIONS.x"]), _numbers, _numbers, st.sampled_from(["", ":log", ":step=2", ":step=0.25"]))
def test_a_range_reads_back_as_it_is_printed(name: str, low: float, high: float, how: str) -> None:
    try:
        dimension = define(f"{name}={low!r}..{high!r}{how}", trials=3).over[0]
    except SettingError:
        return
    assert define(dimension.text(), trials=3).over[0] == dimension
    chance = random.Random(0)
    for value in [*dimension.ends(), *(dimension.anywhere(chance) for _ in range(5))]:
        assert dimension.low is not None and dimension.high is not None and dimension.low <= value <= dimension.high  # type: ignore[operator]
        assert not dimension.whole or isinstance(value, int)
    assert {"low", "high"} <= set(Dimension.model_validate_json(dimension.model_dump_json()).model_fields_set)


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_no_text_breaks_the_parser(name: str, value: str) -> None:
    for word in (f"{name}={value}", f"LR={value}", f"SEED={value}..{value}", f"MODEL_OPTIONS.{name}={value}"):
        try:
            define(word, trials=3)
        except SettingError as err:
            assert str(err)


@settings(deadline=None)
@given(st.lists(st.integers(2, 5), min_size=1, max_size=4))
def test_a_grid_has_each_point_once(sizes: list[int]) -> None:
    names = ["SEED", "BATCH_SIZE", "EVAL_EVERY", "LOG_EVERY"]
    described = define(*(f"{name}=1..{size}" for name, size in zip(names, sizes, strict=False)))
    points = [tuple(described.point(index).values()) for index in range(described.trials)]
    assert len(set(points)) == described.trials == len(points) and points == sorted(points)


# -- what can be run ---------------------------------------------------------------------------------------------------


def test_combinations_that_cannot_run_are_named() -> None:
    with pytest.raises(ImpossibleJobError) as err:
        search_space.check(define("PRECISION=bf16,fp16,none", "BATCH_SIZE=16,32"), BASE)
    assert "PRECISION=fp16 (sweep) needs a GPU" in str(err.value) and "as at PRECISION=fp16 BATCH_SIZE=16, and 1 more" in str(err.value)


def test_combinations_inside_a_range_are_tried_too() -> None:
    base = resolve_here(["NODES=1", "GPUS_PER_NODE=2", "DEVICE=cpu"], {}, REPOSITORY)
    with pytest.raises(ImpossibleJobError, match="is not divisible by 2 processes"):
        search_space.check(define("BATCH_SIZE=16..64", trials=5), base)
    search_space.check(define("BATCH_SIZE=16..64:step=2", trials=5), base)


def test_values_that_a_setting_cannot_have_are_told_like_anywhere() -> None:
    with pytest.raises(SettingError) as err:
        search_space.check(define("LR=-1,1e-3", "SEED=1,x", "PRECISION=fp32,none"), BASE)
    assert str(err.value).splitlines() == [
        "LR: '-1' must be more than 0.0 (sweep).",
        "SEED: 'x' is not a whole number (sweep).",
        *str(err.value).splitlines()[2:],
    ]


def test_two_words_for_one_value_are_refused() -> None:
    with pytest.raises(SettingError, match="'fp32' and 'none' mean the same"):
        search_space.check(define("PRECISION=fp32,none"), BASE)


def test_what_follows_from_a_value_follows_for_each_trial() -> None:
    jobs = [search_space.trial_of(BASE.job, BASE.origins, [f"BATCH_SIZE={size}"], "trial 0").job for size in (16, 48)]
    assert [job.micro_batch_size for job in jobs] == [16, 48]


@pytest.mark.parametrize("text", ["😀", "é\x85\u2028\x7f", 'a, "b": {c}'])
def test_a_key_varies_beside_any_text_in_its_mapping(text: str) -> None:
    base = replace(BASE, job=BASE.job.model_copy(update={"data_options": {"said": text}}))
    described = define("DATA_OPTIONS.x=1,2")
    search_space.check(described, base)
    words = search_space.words_of(described, base.job, described.point(0))
    assert search_space.trial_of(base.job, base.origins, words, "x").job.data_options == {"said": text, "x": 1}


def test_keys_of_a_mapping_are_put_into_the_jobs_own() -> None:
    base = resolve_here(["NODES=1", "GPUS_PER_NODE=1", "DEVICE=cpu", "MODEL_OPTIONS=n_layers=1"], {}, REPOSITORY)
    described = define("MODEL_OPTIONS.d_model=64,128", "LR=1,2")
    words = search_space.words_of(described, base.job, described.point(2))
    assert words == ["LR=1", 'MODEL_OPTIONS={"n_layers": 1, "d_model": 128}']
    assert search_space.trial_of(base.job, base.origins, words, "x").job.model_options == {"n_layers": 1, "d_model": 128}


@pytest.mark.parametrize(
    ("words", "over"),
    [
        (["ENTRY=t.py"], "SEED=1,2"),
        (["ENTRY=t.py", "ENTRY_ARGS=--a,--b", "NOTE=it's $HOME", "MODEL=true", "TIME_LIMIT=2-12"], "SEED=1,2"),
        (["MODEL_OPTIONS={a: [1, 2], b: 'x,y', c: {d: 😀}, e: \"it's\"}", "JOB_NAME=x"], "SEED=1,2"),
        (["MODEL_OPTIONS=n_layers=2,tied=true,theta=1e4", "SBATCH_OPTIONS=begin=now+1hour,licenses=a:1"], "MODEL_OPTIONS.d_model=64,128"),
        (["ENTRY=t.py", "MODEL_OPTIONS={a: [1, 2], b: 'x,y'}"], "MODEL_OPTIONS.d_model=64,128"),
        (["jobs/quickstart.yaml", "ENTRY=t.py", "LR_SCHEDULER_PARAMS={eta_min: 1e-5}", "NOTE=none"], "SEED=1,2"),
    ],
)
def test_the_command_in_full_reads_back_as_the_trial(tmp_path: Path, words: list[str], over: str) -> None:
    (tmp_path / "t.py").touch()
    (tmp_path / "sweep").mkdir()
    run = RunDir(tmp_path / "sweep")
    base, described = sweep.described([*words, "DEVICE=cpu", "NODES=1", "GPUS_PER_NODE=1"], tmp_path, [over], None, {})
    run.job_yaml.write_text(dump_yaml(base.job.model_dump(mode="json")))
    command, left_out = sweep_status.command_of(run, described, described.point(1))
    assert not left_out and ("quickstart.yaml" in command) == (words[0] != "ENTRY=t.py")
    said = resolve_here(shlex.split(command)[2:], {}, tmp_path).job
    trained = search_space.trial_of(base.job, base.origins, search_space.words_of(described, base.job, described.point(1)), "x").job
    assert said == trained.model_copy(update={"array_parallel": said.array_parallel})


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--over", "LRR=1,2"], 2, ["LRR is not a setting (--over)", "Did you mean LR?"]),
        (["--over", "LR=1e-4..1e-2:log", "PRECISON=bf16"], 2, ["PRECISON is not a setting", "needs --trials N"]),
        (["--over", "LR=1,2", "LR=3"], 2, ["LR is given and varies too"]),
        (["--over", "PRECISION=bf16,fp8", "DEVICE=cpu"], 78, ["PRECISION=fp8 (sweep) needs a GPU", "as at PRECISION=fp8"]),
        (["--space", "no/such.yaml"], 2, ["space file 'no/such.yaml' does not exist", "These come with holdfast: precision, quickstart"]),
        (["show"], 2, ["there is no sweep in"]),
        (["show", "--trials", "3"], 2, ["--trials: sweep show takes a sweep"]),
        (["--resume", "x", "--over", "LR=1,2"], 2, ["--over: A sweep keeps what it searches"]),
        (["--over", "LR=1,2", "--parallel", "0"], 2, ["parallel: '0': input should be greater than or equal to 1"]),
    ],
)
def test_a_bad_sweep_gets_one_message_and_makes_nothing(tmp_path: Path, words: list[str], code: int, said: list[str]) -> None:
    done = holdfast("sweep", *words, f"RUNS_DIR={tmp_path}/runs")
    assert done.returncode == code, done.stderr
    assert all(part in done.stderr for part in said) and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_without_optuna_a_grid_works_and_a_study_is_refused_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    words = ["NODES=1", "GPUS_PER_NODE=1", "DEVICE=cpu"]
    assert sweep.described(words, REPOSITORY, ["LR=1,2"], None, {})[1].trials == 2
    for options in ({"trials": 3}, {"pruner": "median"}):
        with pytest.raises(SettingError, match="pip install 'optuna>=4'"):
            sweep.described(words, REPOSITORY, ["LR=1,2"], None, options)


def test_the_guide_names_every_option() -> None:
    text = (REPOSITORY / "docs" / "howto" / "sweeps.md").read_text()
    missing = [name for name, field in Sweep.model_fields.items() if field.description and f"`--{name.replace('_', '-')}" not in text]
    assert not missing


@pytest.mark.parametrize("file", sorted((REPOSITORY / "jobs" / "sweeps").glob("*.yaml")), ids=lambda path: path.name)
def test_the_sweeps_that_come_with_holdfast_can_be_run(file: Path) -> None:
    described = sweep.described(["NODES=1", "GPUS_PER_NODE=1", "SITE=h100"], REPOSITORY, [], file.stem, {})[1]
    assert described.trials > 1


def test_ranges_of_an_array() -> None:
    assert sweep_jobs.ranges([7, 0, 1, 2, 12, 13]) == "0-2,7,12-13"


# -- the study ---------------------------------------------------------------------------------------------------------


def made(folder: Path, *over: str, **options: Any) -> tuple[RunDir, Sweep]:
    """A sweep's directory as `holdfast sweep` makes it, without a script and code."""
    described = define(*over, **options)
    run = RunDir(folder / "search-abcd")
    run.path.mkdir()
    run.job_yaml.write_text(dump_yaml(BASE.job.model_copy(update={"max_steps": 100}).model_dump(mode="json")))
    run.origins.write_text(json.dumps(BASE.origins))
    run.sweep.write_text(described.model_dump_json())
    for number in range(described.trials):
        run.member(number).logs.mkdir(parents=True)
    if described.has_study:
        study.create(run, described)
    return run, described


def ends(run: RunDir, cause: str, curve: dict[int, float], attempt: int = 1) -> None:
    """As if an attempt of the trial had come to its end."""
    with open(run.metrics, "a") as file:
        file.writelines(json.dumps({"step": step, "loss": 1.0, "val_loss": value}) + "\n" for step, value in curve.items())
    event_log.append(run.ledger, Event.START, attempt=attempt, job_id="1_0", world=1)
    event_log.append(run.ledger, Event.END, attempt=attempt, job_id="1_0", cause=cause, step=100, saved_step=100, start_step=0)


def test_trials_are_drawn_differently_and_the_same_again(tmp_path: Path) -> None:
    run, described = made(tmp_path, "LR=1e-4..1e-2:log", "PRECISION=bf16,fp32", trials=6)
    for number in (2, 0, 1, 5, 4, 3):
        trial.take_up(run.member(number), f"1_{number}")
    values = [trial_values.values_of(run.member(number))[0] for number in range(6)]
    assert len({value["LR"] for value in values}) == 6
    for number, value in enumerate(values):
        job = load(run.member(number).job_yaml)
        assert job.lr == value["LR"] and job.precision == value["PRECISION"]
        assert json.loads(run.member(number).origins.read_text())["lr"] == f"trial {number} of the sweep"
        trial.take_up(run.member(number), "2_0")  # an attempt that comes back
    assert [trial_values.values_of(run.member(number))[0] for number in range(6)] == values
    known = study.opened(run, described).get_trials()
    assert [(t.number, t.params, t.state.name) for t in known] == [(n, values[n], "RUNNING") for n in range(6)]


def test_an_end_is_told_to_the_study_by_whoever_comes_next(tmp_path: Path) -> None:
    run, described = made(tmp_path, "LR=1e-4..1e-2:log", trials=6, pruner="median")
    for number in range(6):
        trial.take_up(run.member(number), "1_0")
    ends(run.member(0), Cause.FINISHED, {50: 3.0, 100: 2.0})
    ends(run.member(1), Cause.PRUNED, {50: 9.0})
    ends(run.member(2), Cause.CODE_ERROR, {})
    ends(run.member(3), Cause.CANCELLED, {50: 3.0})
    ends(run.member(4), Cause.PREEMPTED, {50: 3.0})
    ends(run.member(5), Cause.FINISHED, {})
    trial.tell_sweep(run.member(0))
    known = study.opened(run, described).get_trials()
    # Cancelled and preempted trials may still come to their end.
    assert [t.state.name for t in known] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "RUNNING", "FAIL"]
    assert known[0].value == 2.0 and known[0].intermediate_values == {50: 3.0, 100: 2.0} and known[1].value == 9.0
    best = described.model_copy(update={"value": "best", "direction": "maximize"})
    assert study.value_of({50: 3.0, 100: 2.0, 150: float("nan")}, best) == 3.0
    assert study.value_of({50: 3.0, 100: float("nan")}, described) is None


def test_many_processes_at_once_take_each_trial_once(tmp_path: Path) -> None:
    run, described = made(tmp_path, "LR=1e-4..1e-2:log", "SEED=0..1000", trials=8, sampler="random")
    children = []
    for worker in range(16):  # two for each trial, as if it had been submitted twice
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                trial.take_up(run.member(worker % 8), f"{worker // 8}_0")
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 16
    known = study.opened(run, described).get_trials()
    assert len(known) == 8 and {t.state.name for t in known} == {"RUNNING"}
    assert [t.params for t in known] == [trial_values.values_of(run.member(number))[0] for number in range(8)]
    assert [load(run.member(number).job_yaml).lr for number in range(8)] == [t.params["LR"] for t in known]
    assert not list(tmp_path.rglob("*.damaged*"))


def test_a_worker_killed_anywhere_in_the_question_gets_the_same_trial_again(tmp_path: Path) -> None:
    run, described = made(tmp_path, "LR=1e-4..1e-2:log", "PRECISION=bf16,fp32", trials=3, sampler="random")
    chance = random.Random(5)
    kills = 0
    for number in range(3):
        while not run.member(number).job_yaml.exists():
            pid = os.fork()
            if pid == 0:
                try:
                    trial.take_up(run.member(number), "1_0")
                finally:
                    os._exit(0)
            if kills < 12:
                time.sleep(chance.uniform(0, 0.04))
                os.kill(pid, signal.SIGKILL)
                kills += 1
            os.waitpid(pid, 0)
            # What a killed holder left of the journal's lock would be waited for; the wait itself is Optuna's and is not tried here.
            run.study.with_name(run.study.name + ".lock").unlink(missing_ok=True)
    known = study.opened(run, described).get_trials()
    assert [t.params for t in known] == [trial_values.values_of(run.member(number))[0] for number in range(3)]
    assert {t.state.name for t in known} == {"RUNNING"}


@pytest.mark.parametrize("step", ["claimed", "suggested", "written down", "all but frozen"])
def test_a_worker_that_dies_between_two_steps_gets_the_same_trial_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    run, described = made(tmp_path, "LR=1e-4..1e-2:log", "PRECISION=bf16,fp32", trials=2)

    class Death(BaseException):
        pass

    def dies(*_: Any, **__: Any) -> Any:
        raise Death

    where = {
        "claimed": (study, "_suggest"),
        "suggested": (search_space, "words_of"),
        "written down": (event_log, "append"),
        "all but frozen": (trial, "dump_yaml"),
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(*where, dies)
        with pytest.raises(Death):
            trial.take_up(run.member(1), "1_1")
    assert not run.member(1).job_yaml.exists()
    before = study.opened(run, described).get_trials()[1]
    trial.take_up(run.member(1), "1_1")
    known = study.opened(run, described).get_trials()
    assert [t.state.name for t in known] == ["WAITING", "RUNNING"]
    assert known[1].params == trial_values.values_of(run.member(1))[0]
    assert before.params.items() <= known[1].params.items()


@pytest.mark.parametrize("damage", ["torn", "garbage", "gone"])
def test_a_journal_that_cannot_be_read_is_written_anew_from_the_runs(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, described = made(tmp_path, "LR=1e-4..1e-2:log", "PRECISION=bf16,fp32", trials=5, pruner="median")
    for number in range(4):
        trial.take_up(run.member(number), "1_0")
    ends(run.member(0), Cause.FINISHED, {50: 3.0, 100: 2.0})
    ends(run.member(1), Cause.PRUNED, {50: 9.0})
    ends(run.member(2), Cause.CODE_ERROR, {})
    trial.tell_sweep(run.member(0))
    before = [(t.number, t.state.name, t.params, t.value) for t in study.opened(run, described).get_trials()]
    whole = run.study.read_bytes()
    if damage == "torn":
        run.study.write_bytes(whole[:-7])
    elif damage == "garbage":
        run.study.write_bytes(whole[:200] + b"\0\0\0" + whole[203:])
    else:
        run.study.unlink()
    trial.take_up(run.member(4), "1_4")
    after = [(t.number, t.state.name, t.params, t.value) for t in study.opened(run, described).get_trials()]
    assert after[:4] == before[:4] and after[4][1] == "RUNNING"
    assert "written anew from the runs" in capsys.readouterr().err and bool(list(run.path.glob("study.journal.damaged-*"))) == (damage != "gone")


def test_cancel_with_the_name_of_a_sweep_stops_the_trials_that_have_not_begun_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = made(tmp_path, "SEED=1,2,3")
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id="1")
    trial.take_up(run.member(0), "1_0")
    event_log.append(run.member(0).ledger, Event.START, attempt=1, job_id="1_0", world=1)
    queue = {"1_0": ("RUNNING", "None", "node1"), "1_1": ("PENDING", "Priority", ""), "1_2": ("PENDING", "Priority", "")}
    monkeypatch.setattr(sweep_status, "ask_queue", lambda run: (queue, ""))
    told: list[str] = []
    monkeypatch.setattr(sweep.Slurm, "run", lambda self, *words: told.extend(words))
    monkeypatch.setattr(sweep, "require_jobs_of", lambda *_: None)  # needs a real queue: tests/slurm/test_job_identity.py
    assert run_app(["cancel", "search", f"RUNS_DIR={tmp_path}"]) == Exit.DONE
    assert told == ["scancel", "1_0", "1_1", "1_2"]
    assert event_log.read(run.member(0).ledger)[-1]["event"] == Event.CANCEL


def test_a_trial_that_a_person_resumed_is_not_submitted_a_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, described = made(tmp_path, "SEED=1,2")
    event_log.append(run.ledger, Event.SUBMITTED, attempt=0, job_id="1")
    for number, cause in enumerate((Cause.CANCELLED, Cause.FINISHED)):
        trial.take_up(run.member(number), "1_0")
        ends(run.member(number), cause, {100: 2.0})
    monkeypatch.setattr(sweep_status, "ask_queue", lambda run: ({"9_0": ("PENDING", "Priority", "")}, ""))
    monkeypatch.setattr(sweep_jobs, "taken_over", lambda run, slurm: {"9"})
    assert [row.state for row in sweep_status.trials_of(run, described, sweep_status.ask_queue(run)[0])] == ["cancelled", "finished"]
    event_log.append(run.member(0).ledger, Event.SUBMITTED, attempt=0, job_id="9_0", by="resume")
    assert [(row.state, row.job_id) for row in sweep_status.trials_of(run, described, sweep_status.ask_queue(run)[0])] == [
        ("waiting", "9_0"),
        ("finished", "1_0"),
    ]
    assert sweep.resume([str(run.path)], tmp_path, trials=None, parallel=None, local=False, wait=False, as_json=False) == Exit.DONE
    assert "every trial is over, waits or runs; nothing was submitted" in capsys.readouterr().out


def test_a_failed_trial_that_a_person_resumed_to_its_end_counts_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, described = made(tmp_path, "LR=1e-4..1e-2:log", trials=4, pruner="median")
    for number in range(3):
        trial.take_up(run.member(number), "1_0")
    ends(run.member(0), Cause.FINISHED, {50: 3.0, 100: 2.0})
    ends(run.member(1), Cause.CODE_ERROR, {50: 2.5})
    trial.tell_sweep(run.member(1))
    before = study.opened(run, described).get_trials()
    assert [t.state.name for t in before] == ["COMPLETE", "FAIL", "RUNNING"] and not capsys.readouterr().err
    # A running trial of the sweep has the journal open.
    judge = pruner.Judge(run.member(2))
    validates(run.member(2), 50, 1.0)
    assert judge.look() == ""
    ends(run.member(1), Cause.FINISHED, {100: 1.5}, attempt=2)
    trial.tell_sweep(run.member(1))
    after = study.opened(run, described).get_trials()
    assert [(t.state.name, t.value) for t in after] == [("COMPLETE", 2.0), ("COMPLETE", 1.5), ("RUNNING", None)]
    assert [t.params for t in after] == [t.params for t in before] and study.opened(run, described).best_trial.number == 1
    said = capsys.readouterr().err
    assert "had trial 1 as failed, which was resumed since and ended well; it was written anew" in said and len(list(run.path.glob("study.journal.old-*"))) == 1
    validates(run.member(2), 60, 0.5)
    assert judge.look() == "" and not capsys.readouterr().out
    assert study.opened(run, described).get_trials()[2].intermediate_values == {50: 1.0, 60: 0.5}


def test_a_trial_whose_values_cannot_be_run_is_told_to_the_study_and_shown(tmp_path: Path) -> None:
    run, described = made(tmp_path, "BATCH_SIZE=1..3", trials=2)
    base = load(run.job_yaml)
    run.job_yaml.write_text(dump_yaml(base.model_copy(update={"gpus_per_node": 64}).model_dump(mode="json")))
    for _ in range(2):
        with pytest.raises(ImpossibleJobError, match="trial 0 .* cannot be run"):
            trial.take_up(run.member(0), "1_0")
    assert not run.member(0).job_yaml.exists()
    assert study.opened(run, described).get_trials()[0].state.name == "FAIL"
    row = sweep_status.trial_of(run.member(0), described, None, ["1"])
    assert row.state == "failed" and "cannot be run" in row.note


def lossy(folder: Path, monkeypatch: pytest.MonkeyPatch, run: RunDir) -> None:
    """A Slurm whose sbatch queues an array and reports that the answer was lost. One squeue shows it, with the run's name."""
    folder.mkdir()
    shown = f'printf \'%s\\n\' "${{job}}_0|PENDING|{run.path.name}|x" "${{job}}_1|PENDING|{run.path.name}|x"'
    scripts = {
        "sbatch": f'echo "$@" >> {folder}/asked; echo 7 >> {folder}/queue; echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1',
        "squeue": f"[ ! -e {folder}/queue ] || sort -u {folder}/queue | while read job; do {shown}; done",
        "scontrol": f'echo "JobId=$4 StdOut={run.path}/logs/$4.batch.out Power="',
        "srun": "true",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def resumed(run: RunDir) -> int:
    return sweep.resume([str(run.path)], run.path.parent, trials=None, parallel=None, local=False, wait=False, as_json=True)


def test_a_resume_whose_answer_was_lost_has_submitted_and_the_next_one_submits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = made(tmp_path, "LR=1,2")
    lossy(tmp_path / "bin", monkeypatch, run)
    assert resumed(run) == Exit.DONE and json.loads(capsys.readouterr().out)["job_id"] == "7"
    assert [event["job_id"] for event in event_log.read(run.ledger)] == ["7"]
    # Nor where the launcher was killed before the ledger knew.
    run.ledger.unlink()
    assert resumed(run) == Exit.DONE and json.loads(capsys.readouterr().out)["trials"] == 0
    assert [(event["job_id"], event["by"]) for event in event_log.read(run.ledger)] == [("7", "found in the queue")]
    assert len((tmp_path / "bin" / "asked").read_text().splitlines()) == 1


def test_a_resume_that_sbatch_refuses_or_a_queue_that_does_not_answer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = made(tmp_path, "LR=1,2")
    lossy(tmp_path / "bin", monkeypatch, run)
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    with pytest.raises(SubmitError, match="invalid partition"):
        resumed(run)
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(SubmitError, match="is not known, so nothing was submitted"):
        resumed(run)
    assert event_log.read(run.ledger) == []


# -- giving up ---------------------------------------------------------------------------------------------------------


def pruned_sweep(folder: Path) -> tuple[RunDir, Sweep]:
    """Five finished trials that were at 3.0 to 3.4 at step 50, and a sixth that runs."""
    run, described = made(folder, "LR=1e-4..1e-2:log", trials=6, pruner="median")
    for number in range(6):
        trial.take_up(run.member(number), "1_0")
    for number in range(5):
        ends(run.member(number), Cause.FINISHED, {25: 4.0, 50: 3.0 + number / 10, 100: 2.0})
    return run, described


def validates(run: RunDir, step: int, value: float) -> None:
    with open(run.metrics, "a") as file:
        file.write(json.dumps({"step": step, "loss": 1.0, "val_loss": value}) + "\n")


def test_a_trial_worse_than_the_median_is_given_up_by_a_stop_file_that_says_why(tmp_path: Path) -> None:
    run, described = pruned_sweep(tmp_path)
    mine = run.member(5)
    judge = pruner.Judge(mine)
    assert judge.look() == ""
    validates(mine, 25, 3.9)
    assert judge.look() == ""
    validates(mine, 50, 3.3)
    assert judge.look() == "pruned at step 50: val_loss 3.3, worse than the median"
    pruner.give_up(mine, "pruned at step 50")
    assert mine.stop_file.read_text() == "pruned at step 50\n"
    assert study.opened(run, described).get_trials()[5].intermediate_values == {25: 3.9, 50: 3.3}
    # A person's own wish stays what it was.
    mine.stop_file.write_text("lunch")
    pruner.give_up(mine, "pruned at step 75")
    assert mine.stop_file.read_text() == "lunch"


def test_a_good_trial_and_one_at_its_end_go_on(tmp_path: Path) -> None:
    run, _ = pruned_sweep(tmp_path)
    judge = pruner.Judge(run.member(5))
    validates(run.member(5), 50, 3.1)
    assert judge.look() == ""
    validates(run.member(5), 100, 99.0)
    assert judge.look() == ""


def test_a_study_that_cannot_be_asked_stops_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = pruned_sweep(tmp_path)
    validates(run.member(5), 50, 3.3)
    whole = run.study.read_bytes()
    run.study.write_bytes(b"{}\n")
    judge = pruner.Judge(run.member(5))
    assert judge.look() == "" and "could not be asked" in capsys.readouterr().out
    run.study.write_bytes(whole)
    assert judge.look().startswith("pruned at step 50")


def test_who_is_watched(tmp_path: Path) -> None:
    run, described = pruned_sweep(tmp_path)
    ends(run.member(5), Cause.PRUNED, {})
    assert pruner.beside(run.member(5), os.getpid()) is None  # a person resumed it
    run.sweep.write_text(described.model_copy(update={"pruner": "none"}).model_dump_json())
    assert pruner.beside(run.member(4), os.getpid()) is None
    assert pruner.beside(RunDir(tmp_path / "plain-run"), os.getpid()) is None


# -- real trials on this machine ---------------------------------------------------------------------------------------


def test_a_sweep_on_this_machine_goes_on_over_a_trial_that_fails_and_can_be_enlarged(
    farm: Farm,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPOSITORY)
    runs = farm.root / "sweeps"
    words = [f"{name}={value}" for name, value in {**TINY, "RUNS_DIR": str(runs), "GPUS_PER_NODE": "1", "MAX_CODE_ERROR": "0"}.items()]
    words = [word for word in words if not word.startswith("SEED=")]
    options: dict[str, Any] = {"trials": 3, "parallel": None, "sampler": "random"}
    code = sweep.command(
        words, REPOSITORY, over=["SEED=1..100", "LR=1e-3,1e30"], file=None, options=options, resumed=None, local=True, test_only=False, wait=False, as_json=True
    )
    told = json.loads(capsys.readouterr().out)
    states = [row["state"] for row in told["trials"]]
    assert code == Exit.DONE and len(states) == 3 and set(states) == {"finished", "failed"}, told
    assert [row["state"] == "failed" for row in told["trials"]] == [row["values"]["LR"] == "1e30" for row in told["trials"]]
    run = RunDir(Path(told["path"]))
    assert metrics_log.read(run.member(told["best"]).metrics)[-1]["val_loss"] == told["trials"][told["best"]]["value"]
    # More of it: only the new ones are trained.
    before = {number: run.member(number).ledger.read_bytes() for number in range(3)}
    code = sweep.command(
        [], REPOSITORY, over=[], file=None, options={"trials": 4}, resumed=str(run.path), local=True, test_only=False, wait=False, as_json=True
    )
    told = json.loads(capsys.readouterr().out)
    assert code == Exit.DONE and len(told["trials"]) == 4 and told["counts"].get("finished", 0) + told["counts"].get("failed", 0) == 4
    assert before == {number: run.member(number).ledger.read_bytes() for number in range(3)}
    sweep.command([], REPOSITORY, over=[], file=None, options={"trials": None}, resumed=str(run.path), local=True, test_only=False, wait=False, as_json=False)
    assert "every trial is over" in capsys.readouterr().out
    with pytest.raises(SettingError, match="has 4 trials already"):
        sweep.command([], REPOSITORY, over=[], file=None, options={"trials": 2}, resumed=str(run.path), local=True, test_only=False, wait=False, as_json=False)

"""Many runs at once: an array means what its runs would mean one by one, and a thousand of them are one quick submission."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from conftest import Cluster
from counting import counted

from jobs.config.resolver import load
from jobs.core.contract import Exit
from jobs.core.errors import HoldfastError, NotFoundError, SettingError
from jobs.run import event_log, store
from jobs.run.rundir import RunDir
from launcher.cli.app import run_app
from launcher.submission import create_run
from launcher.submission.create_run import resolve_here, resolve_members
from launcher.submission.reconfigure import change

_POINTS = [
    ["SEED=1"],
    ["lr=3e-4", "SEED=2"],
    ["--seed", "3"],
    ["PRECISION=no"],
    ["MODEL_OPTIONS=n_layers=2", "NOTE=a b"],
    ["GRAD_CKPT=true"],
    ["WARMUP_PCT=0.1"],
    ["NOTE="],
    ["DATA=text:corpus"],
]


@pytest.mark.parametrize(
    ("words", "environ"),
    [
        ([], {}),
        (["SITE=h100", "BATCH_SIZE=64", "MODEL_OPTIONS={n_layers: 1, d_model: 64}", "NODE_ENV=A=1,B=2"], {"LR": "1e-3", "HOLDFAST_SEED": "9"}),
        (["jobs/gpt_124m_h100.yaml", "SEED=8"], {"MAKEFLAGS": " -- NOTE=from\\ make", "USE_AMP": "true", "AMP_DTYPE": "float16"}),
    ],
)
def test_each_run_of_an_array_is_the_one_that_its_words_alone_would_be(words: Sequence[str], environ: Mapping[str, str], tmp_path: Path) -> None:
    together = resolve_members(words, _POINTS, environ, tmp_path)
    for point, member in zip(_POINTS, together, strict=True):
        assert member == resolve_here([*words, *point], environ, tmp_path), point


@pytest.mark.parametrize("point", [["SEED=x"], ["SEDE=1"], ["BATCH_SIZE=33", "MICRO_BATCH_SIZE=8"], ["WARMUP_STEPS=3"], ["PRECISION=fp8", "DEVICE=cpu"]])
def test_what_is_refused_alone_is_refused_in_an_array_in_the_same_words(point: list[str], tmp_path: Path) -> None:
    said = []
    for resolve in (
        lambda: resolve_here(["WARMUP_PCT=0.1", *point], {}, tmp_path),
        lambda: resolve_members(["WARMUP_PCT=0.1"], [["SEED=1"], point], {}, tmp_path),
    ):
        with pytest.raises(HoldfastError) as caught:
            resolve()
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


@pytest.mark.parametrize(("point", "name"), [(["SITE=lab"], "SITE"), (["JOB=jobs/gpt_1b_h100.yaml"], "JOB"), (["jobs/quickstart.yaml"], "JOB")])
def test_job_file_and_site_are_one_for_all(point: list[str], name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=f"{name} is the same for all"):
        resolve_members([], [point], {}, tmp_path)


def test_nothing_is_left_of_an_array_when_one_of_its_runs_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = create_run.write_settings

    def fails(run: RunDir, *more: object) -> None:
        if run.path.name == "5":
            raise OSError(28, "No space left on device", str(run.path))
        write(run, *more)

    monkeypatch.setattr(create_run, "write_settings", fails)
    words = [f"RUNS_DIR={tmp_path}/runs"]
    members = resolve_members(words, [[f"SEED={seed}"] for seed in range(20)], {}, tmp_path)
    with pytest.raises(SettingError, match="No space left on device"):
        create_run.prepare(resolve_here(words, {}, tmp_path), tmp_path, "python3", members)
    assert not (tmp_path / "runs").exists()


def array_of(runs: Path, run_id: str, count: int, *words: str) -> RunDir:
    """The directory of an array as a submission leaves it, named t."""
    words = (f"RUNS_DIR={runs}", "JOB_NAME=t", f"RUN_ID={run_id}", *words)
    members = resolve_members(words, [[f"SEED={seed}"] for seed in range(count)], {}, runs.parent)
    return create_run.prepare(resolve_here(words, {}, runs.parent), runs.parent, "python3", members)[0]


def test_a_name_or_an_id_of_an_array_means_the_array(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    array = array_of(runs, "q1", 3)
    for word in ("t", "q1", "t-q1", str(array.path)):
        assert store.find(word, runs) == array
    for word in ("q1.2", "t-q1.2", str(array.member(2).path)):
        assert store.find(word, runs) == array.member(2)
    assert store.find(None, runs).is_member
    # A name means the newest, array or not, whenever its tasks were made.
    other = array_of(runs, "a0", 2)
    single = array_of(runs, "z9", 0)
    os.utime(array.member(1).job_yaml, ns=(2 * other.job_yaml.stat().st_mtime_ns,) * 2)
    assert store.find("t", runs) == single
    shutil.rmtree(single.path)
    assert store.find("t", runs) == other
    with pytest.raises(NotFoundError, match="no run 'q'"):
        store.find("q", runs)


@pytest.mark.parametrize("words", [[], ["--local"], ["TIME_LIMIT=5"], ["MAX_STEPS=2000", "--allow-change"]], ids=" ".join)
@pytest.mark.parametrize("is_sweep", [False, True])
def test_an_array_is_not_resumed_as_a_whole(words: list[str], is_sweep: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its finished tasks would train again, and a script written anew for it would have no --array."""
    array = array_of(tmp_path / "runs", "q1", 2)
    if is_sweep:
        array.sweep.touch()
    before = {path: path.read_bytes() for path in array.path.rglob("*") if path.is_file()}
    assert run_app(["resume", array.id, *words, f"RUNS_DIR={tmp_path}/runs"]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "holdfast resume t-q1.N goes on with task N" in said and ("holdfast sweep --resume t-q1" in said) == is_sweep
    with pytest.raises(SettingError, match="goes on with task N"):
        change(array, ["TIME_LIMIT=5"], allow=False, executable="python3")
    assert before == {path: path.read_bytes() for path in array.path.rglob("*") if path.is_file()}


def test_a_thousand_runs_are_one_submission_and_cost_little(cluster: Cluster) -> None:
    words = ["submit", "--json", "--array", "SEED=1..1000", "JOB_NAME=thousand", "GPUS_PER_NODE=1", "NODES=1", "SBATCH_OPTIONS=hold="]
    done, calls = counted(*words, env=cluster.env)
    said = json.loads(done.stdout)
    try:
        assert calls < 3_800_000  # 3.05 million; 4.7 when each value went through JSON's own encoder
        runs = store.all_runs(cluster.runs)
        members = {int(run.path.name): run for run in runs if run.is_member and str(run.path).startswith(said["path"])}
        assert sorted(members) == list(range(1000)) and said["members"] == 1000
        assert [load(members[index].job_yaml).seed for index in (0, 499, 999)] == [1, 500, 1000]
        assert [event["job_id"] for event in event_log.read(members[999].ledger)] == [f"{said['job_id']}_999"]
        waiting = [line for line in cluster.slurm("squeue", "-h", "-r", "-o", "%F|%r").splitlines() if line.startswith(f"{said['job_id']}|")]
        assert waiting == [f"{said['job_id']}|JobHeldUser"] * 1000
        # One question to Slurm shows them all.
        (row,) = json.loads(cluster.holdfast("status", "--json", str(members[7].path)).stdout)
        assert (row["state"], row["queue_reason"]) == ("waiting", "held by you: scontrol release starts it")
    finally:
        cluster.slurm("scancel", said["job_id"])
        shutil.rmtree(said["path"])  # the tests after this one look through all runs

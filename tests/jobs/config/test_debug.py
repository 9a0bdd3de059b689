"""DEBUG=true makes small what nobody gave by hand; what the command line or the environment says, wins."""

from pathlib import Path

import pytest
from training import Farm, curve, farm  # noqa: F401

from jobs.config.job_files import shipped_jobs
from jobs.config.resolver import Resolved, amend, given_values, resolve
from jobs.core.contract import Exit
from jobs.core.errors import ImpossibleJobError
from jobs.sweep.search_space import trial_of
from slurm import site_file

FILE = "max_steps: 5000\nbatch_size: 256\nmicro_batch_size: 16\ngrad_accum_steps: 4\neval_every: 500\neval_samples: 4096\nwarmup_steps: 400\ngpus_per_node: 4\n"
SIZES = ("max_steps", "batch_size", "micro_batch_size", "grad_accum_steps", "eval_every", "eval_samples", "warmup_steps")


def resolved(folder: Path, *words: str, text: str = FILE, **environ: str) -> Resolved:
    (folder / "job.yaml").write_text(text)
    return resolve(["job.yaml", *words], environ, folder, lambda word: site_file.find(word, folder))


def sizes(found: Resolved) -> tuple[object, ...]:
    return tuple(getattr(found.job, name) for name in SIZES)


def test_sizes_of_the_job_file_and_defaults_become_small_and_say_why(tmp_path: Path) -> None:
    assert sizes(resolved(tmp_path)) == (5000, 256, 16, 4, 500, 4096, 400)
    found = resolved(tmp_path, "DEBUG=true")
    assert sizes(found) == (20, 8, 2, 1, 10, 32, 5)
    assert {found.origins[name] for name in SIZES} == {"debug"}
    assert found.job.model == resolved(tmp_path).job.model and found.job.seq_len == resolved(tmp_path).job.seq_len
    bare = resolved(tmp_path, "DEBUG=true", text="")
    assert (bare.job.max_steps, bare.origins["max_steps"], bare.job.batch_size) == (20, "debug", 2)
    assert sizes(resolved(tmp_path, text=FILE + "debug: true\n")) == sizes(found)


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_was_said_wins(name: str, tmp_path: Path) -> None:
    said = {"max_steps": 77, "batch_size": 64, "micro_batch_size": 8, "grad_accum_steps": 2, "eval_every": 33, "eval_samples": 99, "warmup_steps": 7}[name]
    for found in (resolved(tmp_path, "DEBUG=true", f"{name}={said}"), resolved(tmp_path, "DEBUG=true", **{name.upper(): str(said)})):
        assert getattr(found.job, name) == said and found.origins[name] in ("command line", f"environment {name.upper()}")
        assert found.job.batch_size == found.job.world_size * (found.job.micro_batch_size or 0) * (found.job.grad_accum_steps or 0)
        assert found.job.max_steps == (77 if name == "max_steps" else 20)


def test_nothing_grows(tmp_path: Path) -> None:
    text = "max_steps: 3\nbatch_size: 1\neval_every: 0\neval_samples: 4\n"
    before, found = resolved(tmp_path, text=text), resolved(tmp_path, "DEBUG=true", text=text)
    assert sizes(found)[:-1] == sizes(before)[:-1] and "debug" not in found.origins.values()
    assert resolved(tmp_path, "DEBUG=true", text="eval_samples: none\n").job.eval_samples == 32


def test_what_no_longer_fits_into_the_run_follows_unless_it_was_said(tmp_path: Path) -> None:
    text = "max_steps: 5000\nlr_scheduler: wsd\nlr_scheduler_params: {decay_steps: 400}\nprofile_steps: 100-110\n"
    found = resolved(tmp_path, "DEBUG=true", text=text)
    assert found.job.lr_scheduler_params == {} and found.job.profile_steps is None and found.origins["profile_steps"] == "debug"
    with pytest.raises(ImpossibleJobError, match="decay_steps"):
        resolved(tmp_path, "DEBUG=true", "LR_SCHEDULER_PARAMS=decay_steps=400", text=text)


@pytest.mark.parametrize("name", shipped_jobs())
def test_every_job_file_of_ours_can_be_debugged(name: str, tmp_path: Path) -> None:
    job = resolve([name, "DEBUG=true"], {}, tmp_path, lambda word: site_file.find(word, tmp_path)).job
    assert job.max_steps <= 20 and job.batch_size <= 2 * job.world_size


def test_a_script_of_somebodys_own_has_its_own_sizes(tmp_path: Path) -> None:
    assert resolved(tmp_path, "DEBUG=true", "ENTRY=train.py").job.max_steps == 5000


def test_a_run_that_exists_keeps_its_sizes_and_a_small_one_follows_its_batch(tmp_path: Path) -> None:
    """A fault at step 4,000 is looked for with DEBUG=true in a rerun of those 4,000 steps."""
    long = resolved(tmp_path)
    assert sizes(amend(given_values(long.job, long.origins), long.origins, ["DEBUG=true"])) == sizes(long)
    small = resolved(tmp_path, "DEBUG=true")
    again = amend(given_values(small.job, small.origins), small.origins, ["GPUS_PER_NODE=2"])
    assert (again.job.batch_size, again.job.micro_batch_size, again.origins["max_steps"]) == (8, 4, "debug")
    assert trial_of(small.job, small.origins, ["BATCH_SIZE=16"], "sweep").job.micro_batch_size == 4


def test_every_step_is_logged_and_the_operation_that_makes_a_nan_is_named(farm: Farm) -> None:  # noqa: F811
    own = {
        "MODEL": "own_models:torn",
        "MODEL_OPTIONS": "{}",
        "DATA": "own_models:numbers",
        "GPUS_PER_NODE": "1",
        "MAX_STEPS": "4",
        "LOG_EVERY": "4",
        "PRECISION": "fp32",
    }
    healthy = farm.finished(DEBUG="true", **{**own, "MODEL": "own_models:regression"})
    assert [step for step, *_ in curve(healthy)] == [1, 2, 3, 4]
    torn = farm.prepare(DEBUG="true", **own)
    assert farm.train(torn) == Exit.FAILED
    assert "'MulBackward0' returned nan" in torn.attempt(1).error(0).read_text()
    assert "own_models.py" in "".join(log.read_text() for log in torn.logs.iterdir()), "with the line of its forward"

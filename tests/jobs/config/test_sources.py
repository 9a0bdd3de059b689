"""Where values come from: layers and their order, the ways to write one, and what is said about those that are wrong."""

import json
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from jobs.config import precision_cache
from jobs.config.job_files import find_job_file
from jobs.config.overrides import split_words, words_from_make
from jobs.config.resolver import Resolved, amend, given_values, load, resolve, resolve_each
from jobs.config.settings import Job
from jobs.config.yaml_io import dump_yaml, read_yaml
from jobs.core.errors import ImpossibleJobError, NotFoundError, SettingError
from launcher.submission.create_run import resolve_here
from slurm import site_file

REPO = Path(__file__).resolve().parents[3]


class Desk:
    """A folder with a job file and a site file, and a person's words and environment."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.job("")
        self.site("")

    def job(self, text: str | bytes, name: str = "job.yaml") -> "Desk":
        (self.folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return self

    def site(self, text: str) -> "Desk":
        (self.folder / "site.yaml").write_text(text)
        return self

    def __call__(self, *words: str, **environ: str) -> Resolved:
        return self.resolve(["job.yaml", "SITE=./site.yaml", *words], environ)

    def resolve(self, words: Sequence[str], environ: Mapping[str, str]) -> Resolved:
        return resolve(words, environ, self.folder, lambda word: site_file.find(word, self.folder))

    def refused(self, *words: str, **environ: str) -> list[str]:
        with pytest.raises(SettingError) as err:
            self(*words, **environ)
        return str(err.value).splitlines()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


# -- layers ------------------------------------------------------------------------------------------------------------


def test_each_layer_beats_the_one_below_and_is_named_as_the_origin(desk: Desk) -> None:
    assert (desk().job.lr, desk().origins["lr"]) == (1e-3, "default")
    desk.site("lr: 2.0")
    assert (desk().job.lr, desk().origins["lr"]) == (2.0, "./site.yaml")
    desk.job("lr: 3.0")
    assert (desk().job.lr, desk().origins["lr"]) == (3.0, "job.yaml")
    assert (desk(LR="4.0").job.lr, desk(LR="4.0").origins["lr"]) == (4.0, "environment LR")
    last = desk("LR=5.0", LR="4.0")
    assert (last.job.lr, last.origins["lr"]) == (5.0, "command line")


def test_the_prefixed_variable_beats_the_bare_one(desk: Desk) -> None:
    resolved = desk(PRECISION="fp16", HOLDFAST_PRECISION="fp32")
    assert (resolved.job.precision, resolved.origins["precision"]) == ("fp32", "environment HOLDFAST_PRECISION")


def test_the_prefixed_variable_beats_another_tools_bare_word_for_the_same_thing(desk: Desk) -> None:
    assert desk(MIXED_PRECISION="fp16", HOLDFAST_PRECISION="fp32").job.precision == "fp32"
    assert desk(PRECISION="fp16", HOLDFAST_MIXED_PRECISION="fp32").job.precision == "fp32"
    assert desk(MIXED_PRECISION="fp16", PRECISION="fp32").job.precision == "fp32"


def test_what_slurm_has_already_given_beats_everything(desk: Desk, tmp_path: Path) -> None:
    resolved = resolve(["NODES=3"], {}, tmp_path, lambda word: site_file.find(word, tmp_path), allocation={"nodes": 4})
    assert (resolved.job.nodes, resolved.origins["nodes"]) == (4, "Slurm allocation")
    small = resolve(["DEBUG=true"], {}, tmp_path, lambda word: site_file.find(word, tmp_path), allocation={"max_steps": 50})
    assert (small.job.max_steps, small.job.eval_every) == (50, 10)


def test_every_setting_has_an_origin_and_values_that_follow_say_so(desk: Desk) -> None:
    resolved = desk("BATCH_SIZE=8", "GRAD_ACCUM_STEPS=2")
    assert set(resolved.origins) == set(Job.model_fields)
    assert (resolved.origins["micro_batch_size"], resolved.origins["grad_accum_steps"]) == ("derived", "command line")
    assert resolved.job.micro_batch_size == 4 and resolved.origins["job_name"] == "derived"
    assert set(resolved.not_default()) == {"batch_size", "grad_accum_steps", "site"}


def test_the_site_is_chosen_by_the_highest_layer_that_names_one(desk: Desk) -> None:
    desk.job("site: h100")
    assert desk.resolve(["job.yaml"], {}).job.gpu_arch == "sm_90"
    assert desk.resolve(["job.yaml"], {"SITE": "lab"}).job.partition == "low"
    assert desk.resolve(["job.yaml", "SITE=generic"], {"SITE": "lab"}).job.partition is None


def test_a_list_of_a_higher_layer_replaces_that_of_a_lower_one(desk: Desk) -> None:
    desk.site("modules: [a, b]\nnode_env: {A: '1', B: '2'}")
    resolved = desk("MODULES=c", NODE_ENV="A=3")
    assert resolved.job.modules == ("c",) and resolved.job.node_env == {"A": "3"}


@pytest.mark.parametrize("word", ["none", "null", "None", "NULL", ""])
@pytest.mark.parametrize(("name", "cleared"), [("partition", None), ("eval_samples", None), ("modules", ()), ("node_env", {}), ("fp8_recipe", None)])
def test_none_clears_what_a_lower_layer_gave(desk: Desk, word: str, name: str, cleared: object) -> None:
    desk.site("partition: low\neval_samples: 7\nmodules: [a]\nnode_env: {A: b}\nfp8_recipe: block\n")
    assert getattr(desk(f"{name.upper()}={word}").job, name) == cleared
    assert getattr(desk(**{name.upper(): word}).job, name) == cleared
    desk.job(f"{name}: {word if word.lower() in ('null', '') else 'null'}")
    assert getattr(desk().job, name) == cleared


@pytest.mark.parametrize("name", ["micro_batch_size", "grad_accum_steps"])
def test_what_none_clears_follows_from_the_others_and_goes_on_following(desk: Desk, name: str) -> None:
    desk.job(f"{name}: 4\nbatch_size: 32\nnodes: 1\ngpus_per_node: 1\n")
    left_out = desk(f"{name.upper()}=none")
    assert left_out.origins[name] == "derived" and name not in left_out.not_default()
    assert desk(f"{name.upper()}=none", "DEBUG=true").origins[name] == "derived"
    larger = amend(given_values(left_out.job, left_out.origins), left_out.origins, ["GPUS_PER_NODE=4"])
    assert larger.job.micro_batch_size == 8 and larger.job.grad_accum_steps == 1


def test_none_is_an_ordinary_text_for_a_setting_that_must_have_one(desk: Desk) -> None:
    assert desk("NOTE=none").job.note == "none"
    assert desk.refused("LR=none")[0].startswith("LR: 'none' is not a number (command line)")


def test_a_path_is_whole_before_it_reaches_a_script_and_what_is_none_stays(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (desk.folder / "mine.py").touch()
    paths = {
        "setup_script": ("~/setup.sh", "setup.sh", "/opt/setup.sh"), "init_from": ("~/a run/x", "x", "/x/"), "notify_webhook_file": ("~/hook", "hook", "/hook"),
        "data": ("text:~/d.txt", "text:d.txt", "text:/d//e"), "model": ("hf:~/m", "hf:m", "hf:/m"),
    }  # fmt: skip
    for name, (short, near, whole) in paths.items():
        word, colon, rest = near.rpartition(":")
        assert getattr(at(desk, f"{name.upper()}={short}"), name) == short.replace("~", "/home/me"), name
        assert getattr(at(desk, f"{name.upper()}={near}"), name) == f"{word}{colon}{desk.folder / rest}", name
        assert getattr(at(desk, f"{name.upper()}={whole}"), name) == whole, name
    for name in ("node_python", "container_image"):
        assert getattr(at(desk, f"{name.upper()}=~/a b/c"), name) == "/home/me/a b/c"
        for same in ("python3", "docker://nvcr.io/nvidia/pytorch:24.01-py3", "nvidia/pytorch", "/opt/~x", "~nobody-of-that-name/x"):
            assert getattr(at(desk, f"{name.upper()}={same}"), name) == same
    assert at(desk, "CONTAINER_MOUNTS=~/data:/data,~/x,/y").container_mounts == ("/home/me/data:/data", "/home/me/x", "/y")
    monkeypatch.setenv("HOME", str(desk.folder))
    assert at(desk, "ENTRY=~/mine.py").entry == "mine.py" and at(desk, "ENTRY=-m mine").entry == "-m mine"


def at(desk: Desk, *words: str) -> Job:
    return resolve_here(["job.yaml", *words], {}, desk.folder).job


# -- ways to write a word ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["BATCH_SIZE=64"], ["batch_size=64"], ["batch-size=64"], ["Batch_Size=64"], ["--batch_size=64"], ["--batch-size=64"], ["--BATCH_SIZE=64"],
        ["--batch_size", "64"], ["--batch-size", "64"], ["--global-batch-size=64"], ["GLOBAL_BATCH_SIZE=64"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_setting_can_be_written_in_each_of_these_ways(desk: Desk, words: list[str]) -> None:
    assert desk(*words).job.batch_size == 64


@pytest.mark.parametrize(
    ("words", "pairs"),
    [
        (["--compile"], [("compile", "true")]),
        (["--compile", "false"], [("compile", "false")]),
        (["--compile", "--lr", "1"], [("compile", "true"), ("lr", "1")]),
        (["--compile", "LR=1"], [("compile", "true"), ("LR", "1")]),
        (["--use_amp", "--amp-dtype", "float16"], [("use_amp", "true"), ("amp-dtype", "float16")]),
        (["--note", "seed=1 was best"], [("note", "seed=1 was best")]),
        (["--note", "-1"], [("note", "-1")]),
        (["--note", "--lr", "1"], [("note", "true"), ("lr", "1")]),
        (["--n", "1"], [("n", "1")]),
        (["NOTE=a=b"], [("NOTE", "a=b")]),
        (["NOTE="], [("NOTE", "")]),
        (["--note="], [("note", "")]),
        (["LR=1", "LR=2"], [("LR", "1"), ("LR", "2")]),
    ],
)
def test_words_become_pairs(words: list[str], pairs: list[tuple[str, str]]) -> None:
    assert split_words(words) == (pairs, None, [])


@pytest.mark.parametrize("value", ["true", "false", "1", "0", "yes", "no", "on", "off", "OFF"])
def test_a_switch_takes_a_word_that_can_only_be_its_value(value: str) -> None:
    assert split_words(["--compile", value, "job.yaml"]) == ([("compile", value)], "job.yaml", [])


def test_what_only_looks_like_a_setting_is_a_job_file() -> None:
    for word in ("--", "=5", "jobs/aX=b", "Xa.b=1"):
        assert split_words([word]) == ([], word, [])


def test_a_switch_before_the_job_file_does_not_swallow_it() -> None:
    assert split_words(["--compile", "job.yaml"]) == ([("compile", "true")], "job.yaml", [])
    assert split_words(["--use_amp", "job.yaml"]) == ([("use_amp", "true")], "job.yaml", [])


@pytest.mark.parametrize("words", [["x.yaml"], ["JOB=x.yaml"], ["--job", "x.yaml"], ["--job=x.yaml"], ["LR=1", "x.yaml"], ["./a=b/x.yaml"]])
def test_the_job_file_is_found_among_the_words(words: list[str]) -> None:
    assert split_words(words)[1] == words[-1].removeprefix("--").removeprefix("JOB=").removeprefix("job=")


def test_the_job_file_can_be_named_in_the_environment_and_the_words_win(desk: Desk) -> None:
    desk.job("seed: 1", "one.yaml").job("seed: 2", "two.yaml").job("seed: 3", "three.yaml")
    assert desk.resolve([], {"JOB": "one.yaml"}).job.seed == 1
    assert desk.resolve([], {"JOB": "one.yaml", "HOLDFAST_JOB": "two.yaml"}).job.seed == 2
    assert desk.resolve(["JOB=three.yaml"], {"JOB": "one.yaml"}).job.seed == 3
    assert desk.resolve([], {}).job.job_name == "quickstart"


def test_a_script_of_ones_own_needs_no_job_file_and_gives_the_run_its_name(desk: Desk) -> None:
    site = str(desk.folder / "site.yaml")
    for words, environ, name in (
        (["ENTRY=/x/fit.py"], {}, "fit"),
        (["ENTRY=-m  my.fit"], {}, "my.fit"),
        ([], {"ENTRY": "fit.py"}, "fit"),
        (["ENTRY=a.py"], {"ENTRY": "b.py"}, "a"),
    ):
        resolved = desk.resolve([*words, "SITE=./site.yaml"], environ)
        assert (resolved.job.job_name, resolved.files, resolved.origins["lr"]) == (name, (site,), "default")
    with_file = desk.job("lr: 2")("ENTRY=fit.py")
    own = str(desk.folder / "job.yaml")
    assert (with_file.job.job_name, with_file.job.lr, with_file.files) == ("job", 2, (own, own, site))
    shipped = desk.resolve(["SITE=./site.yaml"], {})
    assert shipped.files == (str(desk.folder / "jobs/quickstart.yaml"), str(REPO / "jobs/quickstart.yaml"), site)


def test_two_job_files_are_refused(desk: Desk) -> None:
    desk.job("", "other.yaml")
    assert desk.refused("other.yaml") == ["'other.yaml': a second job file beside 'job.yaml' (command line); settings are written KEY=value."]


def test_lists_and_mappings_can_be_given_as_one_word(desk: Desk) -> None:
    job = desk(
        "MODULES=a, b,", "NODE_ENV=A=1,B=x=y", "EXCLUDE=node[1,3]", "MODEL_OPTIONS=n_layers=2,tied=true,theta=1e4", "LR_SCHEDULER_PARAMS={eta_min: 1e-5, T_0: 3}"
    ).job  # fmt: skip
    assert job.modules == ("a", "b") and job.node_env == {"A": "1", "B": "x=y"}
    assert ",".join(job.exclude) == "node[1,3]"
    assert job.model_options == {"n_layers": 2, "tied": True, "theta": 1e4} and job.lr_scheduler_params == {"eta_min": 1e-5, "T_0": 3}


# -- words of other tools ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["mixed_precision", "fp_precision", "precision"])
@pytest.mark.parametrize(
    ("value", "meant"), [("no", "fp32"), ("none", "fp32"), ("NO", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16"), ("half", "fp16"), ("fp8", "fp8")]
)
def test_words_of_other_tools_for_precision_are_understood_everywhere(desk: Desk, word: str, value: str, meant: str) -> None:
    assert desk(f"{word}={value}").job.precision == meant
    assert desk(**{word.upper(): value}).job.precision == meant
    assert desk.job(f"{word}: {value}")().job.precision == meant


def test_precision_no_is_fp32_also_when_yaml_already_made_it_false(desk: Desk) -> None:
    assert desk.job("precision: false")().job.precision == "fp32"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["use_amp=false"], "fp32"),
        (["use_amp=false", "amp_dtype=float16"], "fp32"),
        (["use_amp=true"], "bf16"),
        (["use_amp=1", "amp_dtype=bfloat16"], "bf16"),
        (["--use_amp", "--amp_dtype", "float16"], "fp16"),
        (["amp_dtype=fp16"], "fp16"),
        (["use_amp=0"], "fp32"),
        (["amp_dtype=bf16"], "bf16"),
        (["precision=no", "use_amp=false"], "fp32"),
        (["precision=float16", "amp_dtype=fp16"], "fp16"),
        (["precision=fp8", "use_amp=true"], "fp8"),
        (["precision=fp8", "amp_dtype=fp16"], "fp8"),
    ],
)
def test_use_amp_and_amp_dtype_together_mean_a_precision(desk: Desk, words: list[str], meant: str) -> None:
    assert desk(*words).job.precision == meant
    assert (
        desk.job("".join(f"{word.lstrip('-').replace('=', ': ')}\n" for word in words if "=" in word) or "use_amp: true\namp_dtype: float16")().job.precision
        == meant
    )


@pytest.mark.parametrize(
    "words",
    [
        "precision=bf16 use_amp=false",
        "precision=half amp_dtype=bfloat16",
        "precision=fp32 use_amp=true",
        "precision=no amp_dtype=bf16",
        "precision=fp8 use_amp=false",
        "precision=fp16 use_amp=0",
        "precision=tf32 use_amp=true",
        "precision=bf16 amp_dtype=fp16",
    ],
)
def test_words_that_contradict_a_precision_beside_them_are_refused(desk: Desk, words: str) -> None:
    (line,) = desk.refused(*words.split())
    assert "contradict each other" in line and "PRECISION=" in line and words.split()[1].partition("=")[2] in line


def test_yes_is_no_number_of_a_schedule(desk: Desk) -> None:
    (line,) = desk.job("lr_scheduler: cosine_with_restarts\nlr_scheduler_params: {T_0: 10, T_mult: true}").refused()
    assert "T_mult" in line and "not a number" in line


def test_amp_flags_win_over_the_file_and_a_precision_above_them_wins_over_them(desk: Desk) -> None:
    desk.job("precision: fp32")
    resolved = desk("--use-amp", "--amp-dtype=float16")
    assert resolved.job.precision == "fp16" and resolved.origins["precision"] == "command line: use_amp and amp_dtype"
    desk.job("use_amp: true\namp_dtype: float16")
    assert desk().job.precision == "fp16"
    assert desk("--use_amp=false").job.precision == "fp32"
    assert desk("PRECISION=bf16").job.precision == "bf16"
    assert desk(PRECISION="bf16").job.precision == "bf16"
    desk.job("").site("use_amp: true\namp_dtype: float16")
    assert desk().job.precision == "fp16"


@pytest.mark.parametrize(("words", "said"), [(["use_amp=maybe"], "use_amp: 'maybe' is neither"), (["amp_dtype=fp8"], "amp_dtype: 'fp8' is not known")])
def test_amp_words_that_mean_nothing_are_refused(desk: Desk, words: list[str], said: str) -> None:
    (line,) = desk.refused(*words)
    assert said in line and "(command line)" in line


def test_an_alias_on_the_command_line_is_shown_as_what_it_means(desk: Desk) -> None:
    resolved = desk("LEARNING_RATE=1", "--grad-ckpt", "batch-size=8")
    assert (
        resolved.job.lr == 1
        and resolved.job.grad_checkpointing
        and resolved.notes == ("LEARNING_RATE is read as LR", "grad-ckpt is read as GRAD_CHECKPOINTING")
    )


def test_one_thing_under_two_words_in_one_file_is_refused(desk: Desk) -> None:
    (line,) = desk.job("precision: bf16\nmixed_precision: fp16").refused()
    assert line == "PRECISION is given twice, under two words for it (job.yaml); give one."
    (line,) = desk.job("lr: 1\ntraining:\n  learning_rate: 2").refused()
    assert line.startswith("LR is given twice")


def test_auto_takes_what_was_measured_and_a_value_of_ones_own_goes_before_it(desk: Desk) -> None:
    words = ("GPU_ARCH=sm_90", "PRECISION=auto")
    one = desk(words[0]).job
    path = precision_cache.place(desk.folder / one.runs_dir, one, 90)
    precision_cache.keep(path, {"settings": {"precision": "fp8", "fp8_recipe": "current"}, "device": "H100", "date": "2026-01-02", "rule": "fastest"})
    taken, said = desk(*words), "auto: measured on H100, 2026-01-02"
    assert (taken.job.precision, taken.job.fp8_recipe) == ("fp8", "current") and taken.files[-1] == str(path)
    assert (taken.origins["precision"], taken.origins["fp8_recipe"]) == (said, said)
    own = desk(*words, "FP8_RECIPE=delayed")
    assert (own.job.fp8_recipe, own.origins["fp8_recipe"], own.origins["precision"]) == ("delayed", "command line", said)


def test_auto_without_a_measurement_is_refused_with_what_makes_one(desk: Desk) -> None:
    (line,) = desk.refused("GPU_ARCH=sm_90", PRECISION="auto")
    assert line.startswith("PRECISION=auto (environment PRECISION): MODEL=") and "was not measured yet" in line and "`holdfast precision JOB`" in line
    assert desk.refused("PRECISION=auto", "LR=x") == ["LR: 'x' is not a number (command line)."]
    with pytest.raises(SettingError) as err:
        amend({"job_name": "a", "batch_size": 8}, {}, ["PRECISION=auto"])
    assert str(err.value) == "PRECISION=auto (command line) is looked up at submit; a run that exists needs a precision by its name."


# -- warm-up -----------------------------------------------------------------------------------------------------------


def test_the_warm_up_word_of_the_higher_layer_counts(desk: Desk) -> None:
    desk.job("warmup_steps: 7")
    assert (desk().job.warmup_steps, desk("WARMUP_STEPS=9").job.warmup_steps) == (7, 9)
    assert (desk("WARMUP_PCT=0.5").job.warmup_steps, desk("WARMUP_PCT=0.5").job.warmup_pct) == (None, 0.5)
    desk.job("warmup_pct: 0.3")
    assert desk(WARMUP_STEPS="3").job.warmup_steps == 3


def test_warm_up_under_lr_scheduler_params_is_the_setting_and_the_higher_layer_counts(desk: Desk) -> None:
    desk.job("lr_scheduler_params: {warmup_steps: 9, eta_min: 1e-5}")
    resolved = desk()
    assert (resolved.job.warmup_steps, resolved.job.warmup_pct, resolved.job.lr_scheduler_params) == (9, None, {"eta_min": 1e-5})
    assert resolved.origins["warmup_steps"].endswith("lr_scheduler_params") and resolved.origins["warmup_pct"] == "derived"
    assert desk("WARMUP_STEPS=5").job.warmup_steps == 5
    assert (desk("WARMUP_PCT=0.5").job.warmup_steps, desk("WARMUP_PCT=0.5").job.warmup_pct) == (None, 0.5)
    assert desk("LR_SCHEDULER_PARAMS=warmup_steps=2").job.warmup_steps == 2
    (line,) = desk.job("warmup_steps: 7\nlr_scheduler_params: {warmup_steps: 9}").refused()
    assert "lr_scheduler_params" in line and "WARMUP_STEPS" in line and "give one" in line
    (line,) = desk.job("warmup_pct: 0.1\nlr_scheduler_params: {warmup_steps: 9}").refused()
    assert line == "warmup_steps under lr_scheduler_params and WARMUP_PCT (job.yaml) say the same thing twice; give one."
    desk.job("lr_scheduler_params: {warmup_steps: 9}").site("warmup_pct: 0.3")
    assert (desk().job.warmup_steps, desk().job.warmup_pct) == (9, None)
    assert desk.refused("LR_SCHEDULER_PARAMS=fast")[0].startswith("LR_SCHEDULER_PARAMS: 'fast' ")


def test_a_run_with_warmup_steps_can_be_resumed_with_other_settings(desk: Desk) -> None:
    desk.job("warmup_pct: 0.3")
    first = desk("WARMUP_STEPS=9")
    for values in (first.job.model_dump(mode="json"), {**first.job.model_dump(mode="json"), "warmup_pct": 0.3}):
        assert amend(values, first.origins, ["NODES=2", "BATCH_SIZE=64"]).job.warmup_steps == 9
        assert amend(values, first.origins, ["WARMUP_PCT=0.1"]).job.warmup_steps is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scheduler: {warmup_steps: 5}", ["scheduler is neither a setting nor a heading", "training", "WARMUP_STEPS"]),
        ("model_options: {warmup_steps: 5}", ["warmup_steps has no meaning under model_options", "training: or optimizer:", "WARMUP_STEPS"]),
        ("data_options: {warmup-pct: 0.1}", ["has no meaning under data_options", "WARMUP_PCT"]),
        ("sbatch_options: {warmup_steps: 5}", ["has no meaning under sbatch_options", "WARMUP_STEPS"]),
        ("lr_scheduler_params: {warmup_pct: 0.1}", ["has no meaning under lr_scheduler_params", "WARMUP_PCT"]),
        ("T_0: 100", ["T_0 is not a setting", "lr_scheduler_params: (or LR_SCHEDULER_PARAMS=T_0=...)"]),
        ("training: {eta_min: 0.1}", ["eta_min is not a setting", "training", "lr_scheduler_params"]),
    ],
)
def test_a_word_of_the_schedule_in_the_wrong_block_is_told_where_it_belongs(desk: Desk, text: str, said: list[str]) -> None:
    (line,) = desk.job(text).refused()
    assert all(part in line for part in said), line


def test_headings_may_stand_under_headings(desk: Desk) -> None:
    resolved = desk.job("training:\n  optimizer: {warmup_steps: 3}\n  precision: {use_amp: true, amp_dtype: bfloat16}")()
    assert resolved.job.warmup_steps == 3 and resolved.job.precision == "bf16"
    assert resolved.origins["warmup_steps"].endswith("training, optimizer")


def test_flags_win_over_the_amp_words_of_a_training_block(desk: Desk) -> None:
    desk.job("training: {use_amp: true, amp_dtype: bfloat16}")
    assert desk().job.precision == "bf16"
    assert desk("--amp_dtype", "float16").job.precision == "fp16" and desk("--amp-dtype=float16").job.precision == "fp16"
    assert desk("--use_amp", "false").job.precision == "fp32" and desk("USE_AMP=false").job.precision == "fp32"
    assert desk(USE_AMP="false").job.precision == "fp32" and desk("PRECISION=tf32").job.precision == "tf32"


def test_both_warm_up_words_in_one_layer_are_refused(desk: Desk) -> None:
    (line,) = desk.job("warmup_steps: 7\nwarmup_pct: 0.3").refused()
    assert "WARMUP_STEPS (job.yaml) and WARMUP_PCT (job.yaml)" in line
    assert "command line" in desk.job("").refused("WARMUP_STEPS=7", "WARMUP_PCT=0.3")[0]


# -- YAML --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("precision: no", "precision", "fp32"),
        ("lr: 1e-3", "lr", 1e-3),
        ("lr: 1.0e-3", "lr", 1e-3),
        ("lr: .5", "lr", 0.5),
        ("lr: 3", "lr", 3.0),
        ("time_limit: 24:00:00", "time_limit", 1440),
        ("time_limit: 01:30:00", "time_limit", 90),
        ("time_limit: 90", "time_limit", 90),
        ("time_limit: 2-12", "time_limit", 3600),
        ("seed: 010", "seed", 10),
        ("seed: 08", "seed", 8),
        ("note: yes", "note", "yes"),
        ("note: off", "note", "off"),
        ("note: 2024-01-01", "note", "2024-01-01"),
        ("note: 0x1F", "note", "0x1F"),
        ("note: 'null'", "note", "null"),
        ("note: =", "note", "="),
        ("compile: True", "compile", True),
        ("nodes: 2 # two", "nodes", 2),
        ("\ufeffnodes: 2", "nodes", 2),
        ("nodes: 2\r\nseed: 3\r\n", "seed", 3),
        ("node_env: {DEBUG: 1, ON: true, EMPTY: null, HALF: 0.5}", "node_env", {"DEBUG": "1", "ON": "true", "EMPTY": "", "HALF": "0.5"}),
    ],
)
def test_yaml_values_mean_what_they_look_like(desk: Desk, text: str, name: str, value: object) -> None:
    assert getattr(desk.job(text + "\nbatch_size: 64")().job, name) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 1\nseed: 2\nlr: 3", "job.yaml:3: not valid YAML: 'lr' is given twice"),
        ("node_env:\n  A: 1\n  A: 2", "job.yaml:3: not valid YAML: 'A' is given twice"),
        ("training:\n\tlr: 1", "job.yaml:2: not valid YAML"),
        ("- lr", "job.yaml: holds a list, not settings"),
        ("quickstart", "job.yaml: holds a str, not settings"),
        ("lr: [1", "job.yaml:1: not valid YAML"),
        ("? [a]\n: 1", "job.yaml:1: not valid YAML: a name is one word"),
        ("lr: !!python/object/apply:os.system ['touch x']", "job.yaml:1: not valid YAML"),
        ("lr: !!float x", "job.yaml: not readable"),
        ("note: " + "[" * 1500, "job.yaml:1: not valid YAML: nested deeper than 64 levels"),
        ("note: \0", "job.yaml: not valid YAML: unacceptable character"),
        ("nodes: true", "NODES: 'true' is not a whole number (job.yaml)"),
        ("lr: true", "LR: 'true' is not a number (job.yaml)"),
        ("nodes: 1.5", "NODES: 1.5 is not a whole number (job.yaml)"),
        ("nodes:", "NODES: None is not a whole number (job.yaml)"),
        ("account: 0042", "ACCOUNT: 42 is not text; write it in quotes (job.yaml)"),
        ("note: [a]", "NOTE: is not text; write it in quotes (job.yaml)"),
        ("modules: {a: b}", "MODULES: "),
        ("slurm: fast", "slurm is not a setting (job.yaml)"),
        ('"a\\nb": 1', "'a\\nb' is not a setting (job.yaml)"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_with_its_place(desk: Desk, text: str, said: str) -> None:
    lines = desk.job(text).refused()
    assert lines[0].startswith(said), lines


@pytest.mark.parametrize("content", [b"\xff\xfe\x00lr", b"\x80lr: 1", bytes(range(256)), b"\x7fELF\x02\x01\x01\x00\xff"])
def test_a_binary_file_is_refused_as_such(desk: Desk, content: bytes) -> None:
    (line,) = desk.job(content).refused()
    assert line.startswith("job.yaml: not a text file in UTF-8")


def test_an_empty_file_is_a_job_of_defaults(desk: Desk) -> None:
    assert set(desk.job("# nothing\n")().not_default()) == {"site"}


def test_headings_change_nothing_and_are_part_of_the_origin(desk: Desk) -> None:
    desk.job("training:\n  lr: 2\nmodel: nano\nslurm:\n  nodes: 2\noptimizer:\n  beta1: 0.5\n")
    resolved = desk()
    assert (resolved.job.lr, resolved.job.nodes, resolved.job.beta1, resolved.origins["nodes"]) == (2, 2, 0.5, "job.yaml, slurm")


# -- faults ------------------------------------------------------------------------------------------------------------


def test_all_faults_of_all_layers_are_reported_at_once_with_their_origins(desk: Desk) -> None:
    desk.site("gpu_request: maybe")
    desk.job("max_stepz: 3\nprecision: bf-16")
    lines = desk.refused("BATCHSIZE=4", "LR=fast", NODES="two", HOLDFAST_SEEED="1")
    expected = [
        ("max_stepz is not a setting (job.yaml)", "Did you mean MAX_STEPS?"),
        ("HOLDFAST_SEEED is not a setting (environment)", "Did you mean HOLDFAST_SEED?"),
        ("BATCHSIZE is not a setting (command line)", "Did you mean BATCH_SIZE?"),
        ("GPU_REQUEST: 'maybe' is not known; choose one of gpus-per-node, gres, none (./site.yaml)", ""),
        ("PRECISION: 'bf-16' is not known; choose one of fp32, tf32, bf16, fp16, fp8 (job.yaml)", "Did you mean 'bf16'?"),
        ("NODES: 'two' is not a whole number (environment NODES)", ""),
        ("LR: 'fast' is not a number (command line)", ""),
    ]
    for begin, end in expected:
        assert [line for line in lines if line.startswith(begin) and line.endswith(end)], (begin, lines)
    assert len(lines) == len(expected)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("PRECISON", "PRECISION"),
        ("batchsize", "BATCH_SIZE"),
        ("gpus", "GPUS_PER_NODE"),
        ("learning_rat", "LEARNING_RATE"),
        ("mixed_precison", "MIXED_PRECISION"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(desk: Desk, word: str, meant: str) -> None:
    (line,) = desk.refused(f"{word}=1")
    if word == "gpus":  # too far from anything to guess
        assert "`holdfast explain` lists the settings" in line or meant in line
    else:
        assert line == f"{word} is not a setting (command line). Did you mean {meant}?"


def test_other_variables_of_the_environment_are_left_alone(desk: Desk) -> None:
    assert desk(PATH="/bin", HOME="/x", BATCHSIZE="1", HOLDFAST_RUN_DIR="/x", HOLDFAST_LAB="/y", lr="3").job.lr == 1e-3


def test_problems_of_the_combination_come_with_their_own_exit_code(desk: Desk) -> None:
    with pytest.raises(ImpossibleJobError) as err:
        desk("BATCH_SIZE=7", "NODES=2", "PRECISION=fp8", "DEVICE=cpu")
    assert err.value.exit_code == 78
    assert "not divisible by 2 processes" in str(err.value) and "PRECISION=bf16" in str(err.value)
    assert [line[:2].isspace() for line in str(err.value).split("\n")] == [False, True, True]


@pytest.mark.parametrize("word", ["nope.yaml", "jobs/nope.yaml", "x" * 300, "a\0b", "\ud800", "", "nowhere/quickstart.yaml"])
def test_a_job_file_that_does_not_exist_is_not_found(word: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        find_job_file(word or ".", tmp_path)


def test_a_misspelt_job_file_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"Did you mean jobs/quickstart.yaml\?"):
        find_job_file("quikstart", tmp_path)


@pytest.mark.parametrize("word", ["quickstart", "quickstart.yaml", "jobs/quickstart.yaml"])
def test_a_shipped_job_file_is_found_from_anywhere_unless_one_lies_here(word: str, tmp_path: Path) -> None:
    assert find_job_file(word, tmp_path) == (REPO / "jobs/quickstart.yaml", "jobs/quickstart.yaml")
    (tmp_path / "jobs").mkdir()
    for name in ("quickstart", "quickstart.yaml", "jobs/quickstart.yaml"):
        (tmp_path / name).write_text("")
    assert find_job_file(word, tmp_path) == (tmp_path / word, word)


@pytest.mark.parametrize("word", ["nope", "./nope.yaml", "h10", "a/" + "y" * 300, "a\0/b", "\ud800/b"])
def test_a_site_that_does_not_exist_is_one_of_the_faults(desk: Desk, word: str) -> None:
    lines = desk.refused(f"SITE={word}", "LR=x")
    assert any("site" in line.lower() and "command line" in line for line in lines) and any(line.startswith("LR: 'x'") for line in lines)


def test_a_site_that_cannot_be_had_is_told_with_who_asked_for_it(desk: Desk) -> None:
    def refused(error: Exception, *words: str) -> str:
        def load_site(word: str) -> tuple[Path, str]:
            raise error

        with pytest.raises(SettingError) as err:
            resolve(["job.yaml", *words], {}, desk.folder, load_site)
        return str(err.value)

    assert refused(NotFoundError("gone")) == "gone (SITE from default)"
    assert refused(PermissionError(13, "Permission denied"), "SITE=there") == "SITE: 'there' cannot be read: Permission denied (command line)."


# -- make --------------------------------------------------------------------------------------------------------------

# Values as typed on the command line of make. Spaces before a value are missing: make itself drops them.
TYPED = (
    "two words",
    "spaces  within and  behind ",
    "back\\slash",
    "two\\\\ and \\ space",
    "ends in a backslash\\",
    "$HOME $$ $(shell touch x) ${x}",
    "x -- y",
    "-- x",
    "a=b",
    'it\'s "quoted"',
    "`touch x`; touch x",
    "# no remark \\#",
    "tab\there",
    "line\nbreak",
    "naïve 日本 😀",
    "",
)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("options", [[], ["-s", "-j2", "--no-print-directory"]], ids=["plain", "with options"])
@pytest.mark.parametrize("target", ["show", "nested"])
def test_words_of_a_real_make_are_read_as_they_were_typed(tmp_path: Path, target: str, options: list[str]) -> None:
    (tmp_path / "show.py").write_text(
        "import json, os\nfrom jobs.config.overrides import words_from_make\nopen('out.json', 'a').write(json.dumps(words_from_make(os.environ)) + '\\n')\n"
    )
    (tmp_path / "Makefile").write_text(f"show:\n\t@{sys.executable} -S show.py\nnested:\n\t@$(MAKE) show\n")
    environ = {**{k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}, "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])}
    words = [f"V{number}={value}" for number, value in enumerate(TYPED)]
    subprocess.run(["make", *options, target, *words], cwd=tmp_path, env=environ, check=True, timeout=60, capture_output=True)
    assert sorted(json.loads((tmp_path / "out.json").read_text())) == sorted(words)


def test_no_words_come_from_a_make_without_any() -> None:
    for flags in (None, "", "s", "-j2 --jobserver-auth=3,4", "s -- "):
        assert words_from_make({} if flags is None else {"MAKEFLAGS": flags}) == []


def test_words_for_the_makefile_itself_are_none_for_the_job() -> None:
    own = "HOLDFAST_PYTHON=/a HOLDFAST_INSTALL_SLURM=1 HOLDFAST_PINS=no HOLDFAST_LAB=/b ARGS=--x=y TESTS=t.py"
    assert words_from_make({"MAKEFLAGS": f"s -- {own} LR=2 HOLDFAST_NODES=3"}) == ["LR=2", "HOLDFAST_NODES=3"]
    assert words_from_make({"MAKEFLAGS": "s --  LR=2"}) == ["LR=2"]


# -- the way into the run directory and back ---------------------------------------------------------------------------

anything = st.text(st.characters(codec=None, exclude_categories=())) | st.text(string.printable)


@given(st.dictionaries(st.sampled_from(["note", "data", "model"]), anything))
@examples(200)
def test_any_text_comes_back_from_a_job_file_as_it_went_in(tmp_path_factory: pytest.TempPathFactory, values: dict[str, str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(dump_yaml(values), "ascii")
    assert read_yaml(path, "any.yaml") == values


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | anything,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(anything, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(anything, trees, max_size=4))
@examples(200)
def test_any_tree_of_options_comes_back_from_a_job_file_as_it_went_in(tmp_path_factory: pytest.TempPathFactory, options: dict[str, object]) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.yaml"
    path.write_text(dump_yaml({"model_options": options}), "ascii")
    assert read_yaml(path, "tree.yaml")["model_options"] == options


def test_a_key_longer_than_yaml_allows_without_a_mark_comes_back(tmp_path: Path) -> None:
    values = {"model_options": {"k" * 2000: {"é" * 500: [1, {"": None}]}}}
    (tmp_path / "long.yaml").write_text(dump_yaml(values), "ascii")
    assert read_yaml(tmp_path / "long.yaml", "long.yaml") == values


def test_a_resolved_job_comes_back_from_its_file_equal(desk: Desk, tmp_path: Path) -> None:
    desk.site("node_env: {A: 'x y', B: '1'}\nmodules: [a, b]\ntime_limit: 2-12")
    job = desk("NOTE=😀 \u2028 \\ ' \"", "MODEL_OPTIONS={a: {b: [1, 2.5, null, x]}}", "PRECISION=no", "WARMUP_STEPS=3", "RUN_ID=abcd").job
    path = tmp_path / "again.yaml"
    path.write_text(dump_yaml(job.model_dump(mode="json")))
    assert load(path) == job


def test_a_damaged_job_file_of_a_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text('nodes: "many"\nnew_setting: 1\n')
    with pytest.raises(SettingError) as err:
        load(path)
    lines = str(err.value).split("\n")
    assert len(lines) == 2 and any(line.startswith("new_setting is not a setting") for line in lines)
    assert any(line.startswith(f"NODES: 'many' is not a whole number ({path})") for line in lines)


def test_secrets_of_a_mapping_are_not_printed_back(desk: Desk) -> None:
    lines = desk.job("node_env:\n  'A B': hunter2").refused()
    assert "hunter2" not in "\n".join(lines) and lines[0].startswith("NODE_ENV: 'A B' cannot be the name")


# -- many at once, and a run that exists -------------------------------------------------------------------------------


def each(desk: Desk, points: list[list[str]], **environ: str) -> list[Resolved]:
    words = ["job.yaml", "SITE=./site.yaml", "LR=1e-3"]
    return resolve_each(words, points, environ, desk.folder, lambda word: site_file.find(word, desk.folder))


def test_points_of_a_sweep_are_what_each_would_be_alone(desk: Desk) -> None:
    desk.job("max_steps: 100\nuse_amp: true\namp_dtype: float16\n")
    points = [["SEED=1"], ["SEED=2", "LR=5e-4", "mixed_precision=no"], []]
    together = each(desk, points, EVAL_EVERY="7")
    for one, point in zip(together, points, strict=True):
        assert one == desk("LR=1e-3", *point, EVAL_EVERY="7")


@pytest.mark.parametrize(
    ("point", "said"), [(["SITE=h100"], "SITE is the same for all"), (["other.yaml"], "JOB is the same for all"), (["--sied=1"], "sied is not a setting")]
)
def test_a_point_that_names_another_file_or_nothing_is_refused(desk: Desk, point: list[str], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        each(desk, [["SEED=1"], point])


def test_a_fault_of_the_common_words_is_told_once_and_what_they_say_by_hand_is_kept(desk: Desk) -> None:
    def points(*words: str) -> list[Resolved]:
        words = ("job.yaml", "SITE=./site.yaml", *words)
        return resolve_each(words, [["SEED=1"]], {}, desk.folder, lambda word: site_file.find(word, desk.folder))

    with pytest.raises(SettingError) as err:
        points("BATCHSIZE=4")
    assert str(err.value) == "BATCHSIZE is not a setting (command line). Did you mean BATCH_SIZE?"
    assert points("DEBUG=true", "MAX_STEPS=50")[0].job.max_steps == 50


def test_a_secret_in_a_point_is_refused_as_it_is_alone(desk: Desk) -> None:
    secret = {"WANDB_API_KEY": "89abcdef01234567" * 2 + "89abcdef"}
    point = ["NODE_ENV=KEY=" + secret["WANDB_API_KEY"]]
    with pytest.raises(SettingError) as alone:
        desk("LR=1e-3", *point, **secret)
    with pytest.raises(SettingError) as together:
        each(desk, [point], **secret)
    assert str(together.value) == str(alone.value) and secret["WANDB_API_KEY"] not in str(alone.value)


def test_what_followed_from_others_follows_anew_in_a_run_that_exists(desk: Desk) -> None:
    made = desk("BATCH_SIZE=64", "NODES=1", "GPUS_PER_NODE=2", "JOB_NAME=mine")
    values = given_values(made.job, made.origins)
    assert "micro_batch_size" not in values and values["job_name"] == "mine" and values["batch_size"] == 64
    again = amend(values, made.origins, ["BATCH_SIZE=32"])
    assert (again.job.micro_batch_size, again.job.batch_size, again.job.job_name) == (16, 32, "mine")
    assert again.origins["micro_batch_size"] == "derived" and again.origins["batch_size"] == again.origins["nodes"] == "command line"
    assert amend(values, made.origins, []).job == made.job
    with pytest.raises(SettingError, match=r"'x.yaml' is neither a setting nor expected here"):
        amend(values, made.origins, ["x.yaml"])
    with pytest.raises(SettingError, match="HF_TOKEN looks like a secret"):
        amend(values, made.origins, ["NODE_ENV=HF_TOKEN=x1y2z3"])
    assert amend(values, {}, []).origins["batch_size"] == "default"


def test_the_values_of_a_run_are_plain_and_only_what_follows_from_a_batch_is_left_out(desk: Desk) -> None:
    desk.job("batch_size: 64\nmicro_batch_size: 16\nmax_steps: 5000\nmodules: [a]")
    small = desk("DEBUG=true")
    values = given_values(small.job, small.origins)
    assert values["modules"] == ["a"] and (values["max_steps"], values["batch_size"]) == (small.job.max_steps, small.job.batch_size)
    assert small.origins["micro_batch_size"] == "debug" and "micro_batch_size" not in values
    whole = desk()
    assert given_values(whole.job, whole.origins)["micro_batch_size"] == 16


def test_debug_shrinks_what_a_file_says_and_neither_what_the_environment_says_nor_a_run_that_exists(desk: Desk) -> None:
    desk.job("max_steps: 5000\neval_every: 500\n")
    made = desk("DEBUG=true", EVAL_EVERY="400")
    assert made.job.eval_every == 400 and made.job.max_steps < 5000 and made.origins["max_steps"] == "debug"
    assert desk("DEBUG=true", "MAX_STEPS=4000").job.max_steps == 4000
    plain = desk("DEBUG=false")
    assert amend(given_values(plain.job, plain.origins), plain.origins, ["DEBUG=true"]).job.max_steps == 5000


def test_a_job_file_without_a_letter_in_its_name_gives_a_job_a_plain_one(desk: Desk) -> None:
    for name, slug in (("--", "job"), ("a b+c", "a-b-c"), ("fitX", "fitX"), ("x" * 70, "x" * 64)):
        desk.job("", f"{name}.yaml")
        assert desk.resolve([f"./{name}.yaml", "SITE=./site.yaml"], {}).job.job_name == slug

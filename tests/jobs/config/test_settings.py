"""Every setting: declared once, explained, bounded, documented; and what the settings demand of each other."""

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.config import settings as declared
from jobs.config import validation
from jobs.config.resolver import resolve
from jobs.config.setting_names import setting_name
from jobs.config.settings import NAME_ALIASES, Job, group_of, help_of, names, setting, unit_of
from jobs.config.types import format_minutes, parse_minutes
from jobs.config.yaml_io import read_yaml
from jobs.core.errors import ImpossibleJobError
from jobs.specs.precision import MODES, Precision, nearest_that_runs, runs_on
from launcher.output.settings_table import unit_beside
from slurm import site_file
from tools import generate_docs as docs

FIXED = """JOB_NAME RUNS_DIR SITE PARTITION ACCOUNT QOS NODES GPUS_PER_NODE TIME_LIMIT PRECISION FP8_BACKEND FP8_RECIPE BATCH_SIZE
MICRO_BATCH_SIZE GRAD_ACCUM_STEPS MAX_STEPS EVAL_EVERY CHECKPOINT_EVERY LR WARMUP_PCT SEED MODEL DATA SEQ_LEN COMPILE PARALLEL""".split()
SHIPPED = sorted([*(docs.ROOT / "jobs").glob("*.yaml"), *(docs.ROOT / "slurm/sites").glob("*.yaml")])


# -- declarations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED)
def test_names_that_scripts_rely_on_exist(name: str) -> None:
    assert setting_name(name) == name.lower()


@pytest.mark.parametrize("name", names())
def test_every_setting_has_help_and_a_known_group(name: str) -> None:
    assert len(help_of(name)) > 5 and not help_of(name).endswith(".")
    assert group_of(name) in docs._GROUPS
    assert isinstance(unit_of(name), str)


def test_every_setting_is_read_by_something() -> None:
    """As an attribute of a job, or by its name where Slurm's options are listed."""
    homes = [path for package in ("jobs", "slurm", "launcher", "train") for path in (docs.ROOT / package).rglob("*") if path.suffix in (".py", ".j2")]
    code = "\n".join(path.read_text() for path in homes if path.name not in ("settings.py", "setting_types.py", "refreeze.py"))
    unread = [name for name in names() if not re.search(rf"\.{name}\b|[\"']{name}[\"']", code)]
    assert not unread, f"nobody reads {', '.join(unread)}"


def test_a_setting_without_help_cannot_be_declared() -> None:
    with pytest.raises(TypeError, match="help"):
        setting(1, group="run")  # type: ignore[call-arg]


def test_every_name_in_the_body_of_job_is_a_field() -> None:
    """`allow_something = True` without its type is no field: it could be set nowhere, and nobody would notice."""
    (body,) = [node.body for node in ast.parse(Path(declared.__file__).read_text()).body if isinstance(node, ast.ClassDef) and node.name == "Job"]
    bare = [target.id for node in body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)]
    assert bare == ["model_config"]
    annotated = [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    assert annotated == names()
    assert all(isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "setting" for node in body if isinstance(node, ast.AnnAssign))


@pytest.mark.parametrize("name", [name for name in names() if name != "job_name"])
def test_every_default_passes_its_own_checks(name: str) -> None:
    """Defaults are not checked when a job is made; job_name has none that could, it follows from the job file."""
    default = getattr(Job(), name)
    assert getattr(Job(**{name: default}), name) == default


def test_aliases_mean_settings_that_exist_and_shadow_none() -> None:
    assert set(NAME_ALIASES.values()) <= set(names())
    assert not set(NAME_ALIASES) & set(names())


def test_a_job_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Job().lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", [n for n in names() if Job.model_fields[n].annotation in (float, float | None)])
def test_numbers_are_finite(name: str) -> None:
    for wrong in (math.inf, -math.inf, math.nan, "inf", "nan", "1e999"):
        with pytest.raises(ValidationError):
            Job(**{name: wrong})


@pytest.mark.parametrize("name", ["model_options", "data_options", "lr_scheduler_params"])
@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_numbers_in_mappings_are_finite(name: str, wrong: float) -> None:
    for value in ({"x": wrong},) if name == "lr_scheduler_params" else ({"x": wrong}, {"x": [1, {"y": wrong}]}):
        with pytest.raises(ValidationError, match="finite"):
            Job(**{name: value})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("nodes", 0), ("gpus_per_node", 0), ("batch_size", 0), ("max_steps", 0), ("lr", 0), ("lr", -1), ("warmup_pct", 1.01), ("warmup_pct", -0.1),
        ("beta1", 1.0), ("beta2", -0.1), ("seed", -1), ("seed", 2**63), ("seq_len", 1), ("grad_scaler_growth", 1.0), ("grad_scaler_backoff", 1.0),
        ("checkpoint_every", 0), ("eval_every", -1), ("keep_last", 0), ("time_limit", 0), ("stop_lead_s", 65_536), ("cpu_threads", 0),
        ("max_no_progress", 0), ("grad_clip", -1), ("nodes", 1.5), ("nodes", "two"), ("nodes", ""), ("compile", "maybe"), ("parallel", "pp"),
        ("bucket_cap_mb", 0), ("bucket_cap_mb", "large"), ("checkpoint_every", True),
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused(name: str, wrong: Any) -> None:
    with pytest.raises(ValidationError):
        Job(**{name: wrong})


def test_a_unit_stands_behind_numbers_only() -> None:
    job = Job(checkpoint_every="auto", seq_len=64)  # type: ignore[arg-type]
    assert unit_beside("seq_len", job) == "tokens"
    assert not any(unit_beside(name, job) for name in ("checkpoint_every", "bucket_cap_mb", "mem_gb", "time_limit", "model"))


@pytest.mark.parametrize("name", ["a b", "", ".hidden", "-x", "a/b", "../up", "a\n", "é", "x" * 65, "$(x)"])
def test_a_job_name_that_cannot_name_a_folder_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="names a folder"):
        Job(job_name=name)


@pytest.mark.parametrize("name", ["RANK", "HOLDFAST_RUN_DIR", "MASTER_ADDR"])
def test_a_variable_that_holdfast_sets_for_every_process_cannot_be_given(name: str) -> None:
    with pytest.raises(ValidationError, match="set by holdfast itself"):
        Job(node_env={name: "1"})


def test_options_that_no_job_file_can_carry_are_refused() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    for wrong in (loop, {"x": object()}, {"x": "\ud800"}):
        with pytest.raises(ValidationError, match="no job file can carry"):
            Job(model_options=wrong)


# -- times -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        (90, 90), ("90", 90), (" 90 ", 90), ("90:00", 90), ("90:01", 91), ("0:30", 1), ("24:00:00", 1440), ("01:30:00", 90), ("1:30:30", 91),
        ("2-12", 3600), ("2-12:30", 3630), ("2-12:30:00", 3630), ("2-12:30:59", 3631), ("0-1", 60), ("00:00:01", 1),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(text: Any, minutes: int) -> None:
    assert parse_minutes(text) == minutes
    assert Job(time_limit=text).time_limit == minutes


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "1-", "-1:00", "1:-5", "1-2:3:4:5", "90.5", "1d", "24h", True, None, [1]])
def test_what_is_no_time_is_refused(text: Any) -> None:
    with pytest.raises(ValidationError):
        Job(time_limit=text)


@given(st.integers(1, 10**6))
def test_a_time_is_written_so_that_it_is_read_back(minutes: int) -> None:
    assert parse_minutes(format_minutes(minutes)) == minutes


# -- batch arithmetic --------------------------------------------------------------------------------------------------

_small = st.integers(1, 64)


@given(nodes=st.integers(1, 6), gpus=st.integers(1, 9), batch=st.integers(1, 600), micro=st.none() | _small, accum=st.none() | _small)
@examples(400)
def test_whatever_batch_is_accepted_adds_up_and_what_is_refused_does_not(nodes: int, gpus: int, batch: int, micro: int | None, accum: int | None) -> None:
    job = Job(nodes=nodes, gpus_per_node=gpus, batch_size=batch, micro_batch_size=micro, grad_accum_steps=accum)
    problems, derived = validation.check(job, {})
    possible = any(
        nodes * gpus * m * a == batch
        for m in ([micro] if micro else range(1, batch + 1))
        for a in ([accum] if accum else {1, max(batch // (nodes * gpus * m), 1)})
    )
    assert bool(problems) is not possible
    if not problems:
        done = job.model_copy(update=derived)
        assert done.world_size * done.micro_batch_size * done.grad_accum_steps == batch
        assert micro in (None, done.micro_batch_size) and accum in (None, done.grad_accum_steps)


@given(nodes=st.integers(1, 6), gpus=st.integers(1, 9), batch=st.integers(1, 600), micro=st.none() | _small, accum=st.none() | _small)
@examples(300)
def test_every_near_value_that_is_offered_is_accepted(nodes: int, gpus: int, batch: int, micro: int | None, accum: int | None) -> None:
    job = Job(nodes=nodes, gpus_per_node=gpus, batch_size=batch, micro_batch_size=micro, grad_accum_steps=accum)
    problems, _ = validation.check(job, {})
    for problem in problems:
        if "Near values: " in problem:
            near = [int(word) for word in problem.partition("Near values: ")[2].rstrip(".").split(", ")]
            assert near and all(validation.check(job.model_copy(update={"batch_size": value}), {})[0] == [] for value in near)
        else:
            assert "Leave one of them out" in problem and micro and accum
            assert validation.check(job.model_copy(update={"batch_size": nodes * gpus * micro * accum}), {})[0] == []


def test_a_batch_that_does_not_divide_names_both_neighbours() -> None:
    (problem,), _ = validation.check(Job(nodes=2, gpus_per_node=4, batch_size=100), {"batch_size": "command line"})
    assert "BATCH_SIZE=100 (command line) is not divisible by 8 processes" in problem and problem.endswith("Near values: 104, 96.")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"stop_lead_s": 60, "time_limit": 1}, "do not fit into TIME_LIMIT=00:01:00"),
        ({"warmup_steps": 11, "max_steps": 10, "warmup_pct": None}, "WARMUP_STEPS=11 (default) is more than MAX_STEPS=10"),
    ],
)
def test_values_that_contradict_each_other_are_refused(values: dict[str, Any], said: str) -> None:
    problems, _ = validation.check(Job(**values), {})
    assert len(problems) == 1 and said in problems[0]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("profile_steps", "5-3", "is not a range of steps; write it like 10-14"),
        ("profile_steps", "0-3", "is not a range of steps"),
        ("profile_steps", "ten", "is not a range of steps"),
        ("profile_steps", "1-100000", "no viewer opens such a trace"),
        ("node_env", "A=1,B", "'B' has no value; write NAME=value"),
        ("node_env", {"RANK": "1"}, "RANK is set by holdfast itself"),
        ("trackers", "tensorbord", "Did you mean 'tensorboard'?"),
        ("trackers", "auto,wandb", "has auto beside others"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_and_the_right_way_is_shown(name: str, value: object, said: str) -> None:
    with pytest.raises(ValidationError) as err:
        Job(**{name: value})
    assert said in str(err.value)


# -- hardware ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "nearest"),
    [
        ({"precision": "fp8", "gpu_arch": "sm_80"}, "bf16"),
        ({"precision": "bf16", "gpu_arch": "sm_75"}, "fp16"),
        ({"precision": "fp16", "gpu_arch": "sm_60"}, "fp32"),
        ({"precision": "tf32", "gpu_arch": "sm_70"}, "fp32"),
        ({"precision": "fp8", "device": "cpu"}, "bf16"),
        ({"precision": "fp16", "device": "cpu"}, "fp32"),
        ({"precision": "tf32", "device": "cpu"}, "fp32"),
        ({"precision": "fp8", "device": "cpu", "gpu_arch": "sm_90"}, "bf16"),
    ],
)
def test_what_the_hardware_cannot_do_is_refused_with_the_nearest_mode_that_works(values: dict[str, Any], nearest: str) -> None:
    (problem,), _ = validation.check(Job(**values), {})
    assert f"PRECISION={values['precision']}" in problem and problem.endswith(f"PRECISION={nearest}.")
    assert validation.check(Job(**{**values, "precision": nearest}), {})[0] == []


@pytest.mark.parametrize(
    "values",
    [{"precision": "fp8", "gpu_arch": "sm_90"}, {"precision": "fp8", "gpu_arch": "sm_89"}, {"precision": "fp8"}, {"precision": "bf16", "device": "cpu"}],
)
def test_what_the_hardware_can_do_or_is_not_known_is_let_through(values: dict[str, Any]) -> None:
    assert validation.check(Job(**values), {})[0] == []


@pytest.mark.parametrize("arch", ["h100", "90", "sm_", "sm_x", "SM_90"])
def test_an_architecture_that_is_none_is_refused(arch: str) -> None:
    (problem,), _ = validation.check(Job(gpu_arch=arch), {})
    assert "sm_90" in problem and arch in problem


@pytest.mark.parametrize("arch", [None, 60, 70, 75, 80, 86, 89, 90, 100])
@pytest.mark.parametrize("mode", [m for m in Precision if m is not Precision.FP32])
def test_there_is_a_mode_to_offer_for_every_piece_of_hardware(mode: Precision, arch: int | None) -> None:
    offered = nearest_that_runs(MODES[mode], arch)
    assert runs_on(MODES[offered], arch) and offered is not mode


# -- shipped files and generated docs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.parent.name == "jobs"], ids=lambda path: path.stem)
@pytest.mark.parametrize("where", site_file.shipped())
def test_every_shipped_job_file_resolves_on_every_shipped_site(path: Path, where: str, tmp_path: Path) -> None:
    words = [f"JOB={path}", f"SITE={where}"]
    if where == "lab" and read_yaml(path, path.name).get("precision") == "fp16":
        with pytest.raises(ImpossibleJobError, match=r"PRECISION=fp16 .* needs a GPU, but DEVICE=cpu .*Nearest that works: PRECISION=fp32"):
            resolve(words, {}, tmp_path, lambda word: site_file.find(word, tmp_path))
        return
    resolved = resolve(words, {}, tmp_path, lambda word: site_file.find(word, tmp_path))
    assert resolved.job.job_name == path.stem and resolved.job.site == where


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_file_fits_the_schema(path: Path) -> None:
    schema = json.loads((docs.ROOT / "docs/reference/job.schema.json").read_text())
    for key, value in read_yaml(path, path.name).items():
        assert key in schema["properties"], f"{path.name}: {key}"
        assert fits(schema["properties"][key], value, schema), f"{path.name}: {key}: {value!r}"


def fits(part: dict[str, Any], value: Any, schema: dict[str, Any]) -> bool:
    """As much of JSON schema as ours uses."""
    if part.get("$ref") == "#":
        return all(key in schema["properties"] and fits(schema["properties"][key], item, schema) for key, item in value.items())
    if "$ref" in part:
        return fits(schema["$defs"][part["$ref"].rpartition("/")[2]], value, schema)
    if "anyOf" in part:
        return any(fits(one, value, schema) for one in part["anyOf"])
    if "enum" in part:
        return value in part["enum"]
    kinds = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}
    if not isinstance(value, kinds[part["type"]]) or (isinstance(value, bool) and part["type"] != "boolean"):
        return False
    if part["type"] == "array":
        return all(fits(part["items"], item, schema) for item in value)
    if part["type"] == "object" and isinstance(part.get("additionalProperties"), dict):
        return all(fits(part["additionalProperties"], item, schema) for item in value.values())
    return part.get("minimum", value) <= value <= part.get("maximum", value) if part["type"] in ("integer", "number") else True


def test_the_schema_refuses_what_it_should() -> None:
    schema = json.loads((docs.ROOT / "docs/reference/job.schema.json").read_text())
    assert schema["additionalProperties"] is False
    for key, wrong in (("nodes", 0), ("nodes", "2"), ("precision", "bf-16"), ("compile", 1), ("modules", 3), ("model_options", [])):
        assert not fits(schema["properties"][key], wrong, schema), key
    assert not fits(schema["properties"]["training"], {"use_amp": "yes"}, schema) and not fits(schema["properties"]["training"], {"nope": 1}, schema)
    for key, right in (
        ("training", {"use_amp": True, "amp_dtype": "float16", "learning_rate": 0.1}),
        ("time_limit", "24:00:00"),
        ("time_limit", 90),
        ("precision", "no"),
        ("precision", False),
        ("modules", "a,b"),
        ("modules", ["a"]),
        ("partition", None),
    ):
        assert fits(schema["properties"][key], right, schema), key


def test_generated_files_are_current() -> None:
    assert docs.stale() == [], f"`{docs.ACCEPT}` accepts the change; read the diff before you commit it"


def test_the_settings_page_has_a_row_for_every_setting_alias_and_mode() -> None:
    page = docs.settings_page()
    for word in (*names(), *NAME_ALIASES, *Precision):
        assert f"\n| `{word}` |" in page, word
    assert "use_amp" in page and "amp_dtype" in page
    for block in page.split("\n\n"):
        if block.startswith("|"):  # a value with a bar in it would add a column
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().splitlines()}) == 1, block


def test_a_stale_a_missing_and_a_left_over_file_are_each_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    docs.write(tmp_path)
    assert docs.stale(tmp_path) == [] and docs.write(tmp_path) == []
    (tmp_path / "docs/reference/settings.md").write_text("old")
    (tmp_path / "slurm/train.sbatch").unlink()
    (tmp_path / docs.GOLDEN / "gone.sbatch").write_text("#!/bin/bash\n")
    assert docs.stale(tmp_path) == [
        "docs/reference/settings.md is not what its sources say now",
        "slurm/train.sbatch is missing",
        "tests/golden/gone.sbatch belongs to no job file",
    ]
    stale = docs.stale
    monkeypatch.setattr(docs, "stale", lambda: stale(tmp_path))
    assert docs.main(["--check"]) == 1
    assert "make golden" in capsys.readouterr().err
    docs.write(tmp_path)
    assert docs.main(["--check"]) == 0

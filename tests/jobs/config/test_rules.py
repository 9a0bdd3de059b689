"""Each rule about settings together: where exactly it begins, what it says, and what follows from what."""

from typing import Any

import pytest

from jobs.config import validation
from jobs.config.settings import Job
from jobs.core.errors import SettingError
from jobs.specs.precision import Precision

GIVEN = {"precision": "environment PRECISION", "amp_opt_level": "command line"}


def problems(**values: Any) -> list[str]:
    return validation.check(Job(**values), {})[0]


def derived(**values: Any) -> dict[str, Any]:
    found, follows = validation.check(Job(**values), {})
    assert found == []
    return follows


# -- the level of mixed precision --------------------------------------------------------------------------------------


def test_o0_means_fp32_unless_a_person_asked_for_another_precision() -> None:
    assert derived(amp_opt_level="O0")["precision"] is Precision.FP32
    assert "precision" not in derived(amp_opt_level="O0", precision="fp32")
    (said,), _ = validation.check(Job(amp_opt_level="O0", precision="bf16"), GIVEN)
    assert said == "AMP_OPT_LEVEL=O0 (command line) means no mixed precision, but PRECISION=bf16 (environment PRECISION). Give one of them."
    assert validation.check(Job(amp_opt_level="O0", precision="fp32"), GIVEN)[0] == []


def test_o0_on_hardware_that_has_fp32_alone_is_no_problem_of_the_default_precision() -> None:
    assert derived(amp_opt_level="O0", gpu_arch="sm_60")["precision"] is Precision.FP32


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_o2_needs_a_precision_of_16_bits(precision: str) -> None:
    (said,) = problems(amp_opt_level="O2", precision=precision)
    assert said.endswith(f"which needs PRECISION=bf16, fp16 or fp8, not PRECISION={precision} (default). AMP_OPT_LEVEL=none leaves it out.")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_o2_has_what_it_needs_but_not_when_sharded(precision: str) -> None:
    assert problems(amp_opt_level="O2", precision=precision) == []
    (said,) = problems(amp_opt_level="O2", precision=precision, parallel="fsdp")
    assert said.startswith("AMP_OPT_LEVEL=O2 (default) and PARALLEL=fsdp (default): sharding keeps fp32 masters")
    assert problems(amp_opt_level="O1", precision=precision, parallel="fsdp") == []


def test_o1_is_autocast_and_fp32_has_none() -> None:
    for precision in ("fp32", "tf32"):
        (said,) = problems(amp_opt_level="O1", precision=precision)
        assert said.endswith("computes in fp32. Nearest that works: PRECISION=bf16.")
    assert problems(amp_opt_level="O1", precision="bf16") == problems(amp_opt_level="O1", precision="fp16") == []


# -- fp8 ---------------------------------------------------------------------------------------------------------------


def test_a_recipe_belongs_to_its_backend_and_only_fp8_has_one() -> None:
    (said,) = problems(precision="fp8", fp8_backend="torchao", fp8_recipe="delayed")
    assert said == "FP8_RECIPE=delayed (default) is not one of FP8_BACKEND=torchao (default); choose one of tensorwise, rowwise."
    assert problems(precision="fp8", fp8_backend="torchao", fp8_recipe="rowwise") == []
    assert problems(precision="fp8", fp8_backend="torchao") == []
    assert problems(precision="bf16", fp8_backend="torchao", fp8_recipe="delayed") == []


@pytest.mark.parametrize("recipe", ["delayed", "block", "mxfp8"])
def test_recipes_of_their_own_scaling_have_no_choice_of_fast_accumulation(recipe: str) -> None:
    (said,) = problems(precision="fp8", fp8_recipe=recipe, fp8_fast_accum="all")
    assert said == f"FP8_FAST_ACCUM=all (default) is for the recipes current, tensorwise and rowwise, not FP8_RECIPE={recipe} (default)."
    assert problems(precision="fp8", fp8_recipe=recipe) == problems(precision="bf16", fp8_recipe=recipe, fp8_fast_accum="all") == []
    assert problems(precision="fp8", fp8_recipe="current", fp8_fast_accum="all") == []


def test_mxfp8_begins_with_blackwell() -> None:
    (said,) = problems(precision="fp8", fp8_recipe="mxfp8", gpu_arch="sm_99")
    assert said == "FP8_RECIPE=mxfp8 (default) needs sm_100, but GPU_ARCH=sm_99 (default). Nearest that works: FP8_RECIPE=current."
    assert problems(precision="fp8", fp8_recipe="mxfp8", gpu_arch="sm_100") == []
    assert problems(precision="fp8", fp8_recipe="mxfp8") == []  # not known yet: the node is asked
    assert problems(precision="bf16", fp8_recipe="mxfp8", gpu_arch="sm_90") == []
    assert problems(precision="fp8", fp8_recipe="block", gpu_arch="sm_90") == []


def test_what_is_needed_is_named_and_a_cpu_needs_a_gpu() -> None:
    assert "needs sm_89, but GPU_ARCH=sm_80 (default)" in problems(precision="fp8", gpu_arch="sm_80")[0]
    assert "needs a GPU, but DEVICE=cpu (default)" in problems(precision="fp8", device="cpu")[0]


# -- sizes and lengths -------------------------------------------------------------------------------------------------


def test_what_is_left_out_of_a_batch_follows() -> None:
    assert derived(nodes=1, gpus_per_node=2, batch_size=24) == {"micro_batch_size": 12, "grad_accum_steps": 1}
    assert derived(nodes=1, gpus_per_node=2, batch_size=24, grad_accum_steps=3) == {"micro_batch_size": 4, "grad_accum_steps": 3}
    assert derived(nodes=1, gpus_per_node=2, batch_size=24, micro_batch_size=3) == {"micro_batch_size": 3, "grad_accum_steps": 4}
    assert derived(nodes=1, gpus_per_node=2, batch_size=24, micro_batch_size=3, grad_accum_steps=4) == {"micro_batch_size": 3, "grad_accum_steps": 4}
    assert set(validation.BATCH_PARTS) == set(derived(batch_size=8))


def test_a_batch_that_does_not_come_out_says_what_was_multiplied() -> None:
    (said,) = problems(nodes=1, gpus_per_node=2, batch_size=24, micro_batch_size=3, grad_accum_steps=5)
    assert said.startswith("MICRO_BATCH_SIZE=3 (default) x GRAD_ACCUM_STEPS=5 (default) x 2 processes (NODES=1 x GPUS_PER_NODE=2) = 30, but BATCH_SIZE=24")
    (said,) = problems(nodes=1, gpus_per_node=1, batch_size=2, micro_batch_size=3)
    assert said == "BATCH_SIZE=2 (default) is not divisible by 1 process (NODES=1 x GPUS_PER_NODE=1) x MICRO_BATCH_SIZE=3 (default) = 3. Near values: 3."
    (said,) = problems(nodes=1, gpus_per_node=2, batch_size=10, grad_accum_steps=3)
    assert "x GRAD_ACCUM_STEPS=3 (default) = 6. Near values: 12, 6." in said and "MICRO_BATCH_SIZE" not in said


def test_each_length_may_reach_its_limit_and_not_pass_it() -> None:
    assert problems(stop_lead_s=59, time_limit=1) == []
    assert len(problems(stop_lead_s=60, time_limit=1)) == 1
    assert problems(max_steps=100, profile_steps="100-110") == []
    (said,) = problems(max_steps=100, profile_steps="101-110")
    assert said == "PROFILE_STEPS=101-110 (default) lies behind MAX_STEPS=100 (default)."
    assert problems(max_steps=10, warmup_steps=10) == []
    assert len(problems(max_steps=10, warmup_steps=11)) == 1


def test_a_curve_that_is_none_is_a_problem_of_its_parameters() -> None:
    found, _ = validation.check(Job(lr_scheduler="cosine", lr_scheduler_params={"T_max": 0}), {"lr_scheduler_params": "job.yaml"})
    assert found == ["T_max: 0 is not allowed; it must be a whole number of at least 1 (job.yaml)."]
    assert problems(lr_scheduler="cosine", lr_scheduler_params={"T_max": 0})[0].endswith("(default).")


def test_the_warm_up_of_the_curve_is_the_one_that_was_given_last_in_rank() -> None:
    assert validation.schedule_of(Job(max_steps=200, warmup_pct=0.1)).warmup_steps == 20
    assert validation.schedule_of(Job(max_steps=200, warmup_steps=7)).warmup_steps == 7
    assert validation.schedule_of(Job(max_steps=200, warmup_pct=None)).warmup_steps == 0
    assert validation.schedule_of(Job(max_steps=200, warmup_steps=0, warmup_pct=0.5)).warmup_steps == 0
    assert validation.schedule_of(Job(max_steps=200, warmup_steps=7, lr_scheduler_params={"warmup_steps": 9})).warmup_steps == 9
    schedule = validation.schedule_of(Job(max_steps=200, lr=0.5, lr_scheduler="linear", lr_scheduler_params={"eta_min": 0.1}))
    assert (schedule.kind, schedule.base_lr, schedule.total_steps, schedule.min_lr) == ("linear", 0.5, 200, 0.1)


# -- a script of somebody's own ----------------------------------------------------------------------------------------


def test_a_script_of_ones_own_is_not_stopped_by_settings_that_it_does_not_use() -> None:
    assert derived(entry="train.py", nodes=2, gpus_per_node=4, batch_size=7) == {}
    assert problems(entry="train.py", precision="fp8", device="cpu") == []


def test_a_file_for_accelerate_is_read_where_accelerate_launches_a_script() -> None:
    assert problems(entry="train.py", launch="accelerate", accelerate_config="a.yaml") == []
    for values in ({"entry": "train.py", "launch": "srun"}, {"launch": "accelerate"}):
        (said,) = problems(accelerate_config="a.yaml", **values)
        assert said.startswith("ACCELERATE_CONFIG=a.yaml (default) is read by accelerate launch for a script of your own")
    assert problems(launch="accelerate") == []


def test_a_misspelt_model_or_data_set_is_refused_before_it_is_queued_and_all_that_a_node_may_know_is_not() -> None:
    with pytest.raises(SettingError, match=r"(?s)'nanoo' is not known.*Did you mean 'nano'\? \(from command line\).*'stdlb'.*Did you mean 'stdlib'"):
        validation.check(Job(model="nanoo", data="stdlb"), {"model": "command line"})
    for spec in ("hf/folder", "module", "tokens", "text", "a:b:c", "my.module:2nd"):
        with pytest.raises(SettingError, match="is not known"):
            problems(data=spec)
    for spec in ("tokens:a, b/c.bin", "hfds:x", "text:~/x y", "package.module:build", "digits"):
        assert problems(data=spec) == []
    # A script of one's own may mean anything by it.
    assert problems(model="nanoo", entry="mine.py") == []

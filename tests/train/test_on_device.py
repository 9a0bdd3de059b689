"""What tests/train/test_gpu.py does on a GPU, as far as a CPU can: the same helpers, and gradients over several processes.

Run: pytest tests/train/test_on_device.py"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import on_device
import pytest
import torch
from on_device import CASES, SMALL_SHAPE, One, Training, falls, gradient_job, gradients_of, gradients_over_ranks, job_of, largest_gap, needs_compiler

from jobs.checkpoint import directory
from train.checkpoint import export, host_staging, state_dict
from train.checkpoint.host_staging import PinnedCopier
from train.precision.check import TOLERANCE

CPU = torch.device("cpu")


def training(folder: Path, precision: str, **settings: object) -> Training:
    """Smaller than on a GPU: 16-bit products are slow on most CPUs."""
    return Training(job_of(precision, "cpu", **{"model_options": {**SMALL_SHAPE, "n_layers": 1}, "seq_len": 16, "lr": 1e-2, **settings}), CPU, folder)


def test_sixteen_bit_training_falls_with_fp32(tmp_path: Path) -> None:
    reference = training(tmp_path / "fp32", "fp32").train(25)
    assert falls(reference)
    for name, settings in (("bf16", {}), ("bf16 O2", {"amp_opt_level": "O2"}), ("fp16", {})):
        other = training(tmp_path / name, name.split()[0], **settings).train(25)
        assert falls(other) and not other.overflows()
        assert 0 < largest_gap(other, reference) <= TOLERANCE[other.job.precision], name


def test_fp16_that_overflows_is_recorded_step_by_step_and_survived(tmp_path: Path) -> None:
    run = training(tmp_path / "fp16", "fp16", grad_scaler_init=2.0**36).train(25)
    events = run.overflows()
    assert len(events) > 3 and events[0]["step"] == 0
    # Halved each time; the last ones may come later, where the scale sits at the edge.
    assert [event["scale"] for event in events] == [2.0 ** (36 - n) for n in range(len(events))]
    assert all(event["first"] in dict(run.model.named_parameters()) for event in events)
    assert falls(run) and run.stepper.scale and run.stepper.scale.scale == events[-1]["scale"] / 2


def test_a_policy_of_fallback_goes_on_in_bf16_without_a_scale(tmp_path: Path) -> None:
    run = training(tmp_path / "fp16", "fp16", grad_scaler_init=2.0**60, on_overflow="fallback", max_overflows=2).train(3)
    assert run.stepper.scale is None and len(run.overflows()) == 3 and any("going on in bf16" in line for line in run.said)


def test_a_run_that_fell_back_goes_on_in_bf16_after_a_resume_unless_the_policy_is_another(tmp_path: Path) -> None:
    settings = {"grad_scaler_init": 2.0**60, "max_overflows": 2}
    straight = training(tmp_path / "straight", "fp16", on_overflow="fallback", **settings).train(6)
    stopped = training(tmp_path / "stopped", "fp16", on_overflow="fallback", **settings).train(3)
    stopped.save()
    resumed = training(tmp_path / "resumed", "fp16", on_overflow="fallback", **settings)
    resumed.load(stopped)
    resumed.train(3)
    assert resumed.stepper.scale is None and not resumed.overflows() and resumed.losses == straight.losses[3:]
    assert all(torch.equal(tensor, straight.weights()[name]) for name, tensor in resumed.weights().items())
    # A person who asks for another policy gets fp16 again, with a scale that starts anew.
    other = training(tmp_path / "other", "fp16", on_overflow="skip", grad_scaler_init=1024.0)
    other.load(stopped)
    assert other.stepper.scale and other.stepper.scale.scale == 1024.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_activations_changes_no_loss_and_is_done_in_its_contexts(tmp_path: Path, precision: str) -> None:
    kept = training(tmp_path / "kept", precision).train(3)
    again, entered = training(tmp_path / "again", precision, grad_checkpointing=True), []

    @contextmanager
    def told(what: str) -> Iterator[None]:
        entered.append(what)
        yield

    again.model.recomputing = lambda: (told("first"), told("again"))
    again.train(3)
    assert largest_gap(again, kept) <= TOLERANCE[again.job.precision]
    assert entered == ["first", "again"] * 3, "one block"


def test_a_tensor_of_another_shape_fills_nothing() -> None:
    target = torch.zeros(3)
    with pytest.raises(ValueError, match=r"\(2,\) does not fit into \(3,\)"), PinnedCopier() as filling:
        filling.add(target, torch.ones(2))
    assert not target.any() and torch.equal(PinnedCopier().new(torch.ones(2), CPU), torch.ones(2))


MODES_HERE = [("fp32", {}), ("bf16", {}), ("bf16", {"amp_opt_level": "O2"}), ("fp16", {})]


def test_a_checkpoint_of_every_precision_goes_on_in_every_other(tmp_path: Path) -> None:
    sources = [training(tmp_path / f"from-{n}", precision, **settings).train(4) for n, (precision, settings) in enumerate(MODES_HERE)]
    for n, source in enumerate(sources):
        source.save()
        weights = source.weights()
        source.train(1)
        for m, (precision, settings) in enumerate(MODES_HERE):
            target = training(tmp_path / f"{n}-{m}", precision, **settings)
            target.load(source)
            assert all(torch.equal(tensor, weights[name]) for name, tensor in target.weights().items())
            target.train(1)
            assert target.losses[0] == pytest.approx(source.losses[4], rel=3e-2)
            if n == m:
                assert target.losses[0] == source.losses[4]


def test_a_save_in_the_background_holds_the_step_that_it_was_asked_at(tmp_path: Path) -> None:
    run = training(tmp_path / "run", "fp32").train(3)
    run.saver.preallocate(run.model, run.optimizer)
    before = run.weights()
    run.save(blocking=False)
    run.train(3)
    run.saver.join()
    other = training(tmp_path / "other", "fp32")
    other.load(run)
    assert other.step == 3 and all(torch.equal(tensor, before[name]) for name, tensor in other.weights().items())


def test_what_is_large_lies_in_several_files_of_about_the_same_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_dict, "FILE_BYTES", 40_000)
    run = training(tmp_path / "run", "bf16", amp_opt_level="O2").train(2)
    run.save()
    path = run.run.checkpoints / "step-00000002"
    files = directory.verify(path).files
    total = sum(entry.bytes for name, entry in files.items() if name.startswith("model"))
    parts = [files[f"model.{n:05}-of-{-(-total // 40_000):05}.safetensors"].bytes for n in range(total // 40_000)]
    assert len(parts) > 3 and max(parts) < 3 * 40_000 and len([name for name in files if name.startswith("optimizer")]) > 2 * len(parts) - 2
    for settings in ({"amp_opt_level": "O2"}, {}):
        other = training(tmp_path / "other", "bf16", **settings)
        other.load(run)
        assert other.step == 2 and all(torch.equal(tensor, run.weights()[name]) for name, tensor in other.weights().items())
    assert sorted(export.weights_of(path)) == sorted(run.weights())


def test_memory_for_saves_is_cut_from_slabs_without_gaps_and_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_staging, "_SLAB", 4096)
    memory = host_staging.PinnedPool(pinned=True)
    monkeypatch.setattr(memory, "_new", lambda size: torch.empty(size, dtype=torch.uint8))
    sizes = [3000, 2000, 900, 5000, 1, 0, 1700]
    taken = [memory.buffer("model.safetensors", str(n), torch.Size([size]), torch.uint8) for n, size in enumerate(sizes)]
    assert all(
        torch.equal(again, first) and again.data_ptr() == first.data_ptr()
        for first, again in ((one, memory.buffer("model.safetensors", str(n), one.shape, one.dtype)) for n, one in enumerate(taken))
    )
    spans = sorted((one.data_ptr(), one.data_ptr() + one.numel()) for one in taken if one.numel())
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False)), "none lies in another"
    assert len(memory._rests) == 3, "3000 and 900; 2000, 1 and 1700; 5000 by itself"
    assert not any((one.data_ptr() - first.data_ptr()) % 256 for one, first in ((taken[2], taken[0]), (taken[6], taken[1])))


def test_gradients_of_two_ranks_equal_those_of_one_and_of_one_whole_batch(tmp_path: Path) -> None:
    """One step of 8 samples: 1 rank x 1 x 8, 1 rank x 4 x 2, 2 ranks x 2 x 2 under DDP and FSDP2; also with a last window of
    few targets and ranks of unequal numbers. fp32 sums in another order: 2e-6 of the largest gradient of a weight."""
    over_two = gradients_over_ranks(2, "cpu", tmp_path / "two")
    for case in CASES:
        job = gradient_job("cpu", 1)
        whole = gradients_of(job.model_copy(update={"micro_batch_size": 8, "grad_accum_steps": 1}), One(CPU), case)
        accumulated = gradients_of(job, One(CPU), case)
        for name, expected in whole.items():
            assert float(expected.abs().max()) > 0, name
            for other in (accumulated[name], over_two[f"ddp {case}"][name], over_two[f"fsdp {case}"][name]):
                torch.testing.assert_close(
                    other, expected, rtol=0, atol=2e-6 * float(expected.abs().max()), msg=lambda text, name=name, case=case: f"{name}, {case}: {text}"
                )


@pytest.mark.slow
@needs_compiler
def test_compiled_blocks_train_like_eager_ones(tmp_path: Path) -> None:
    eager, compiled = (training(tmp_path / str(flag), "fp32", compile=flag).train(8) for flag in (False, True))
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-4)


def test_the_programs_of_ranks_say_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(on_device, "__file__", str(tmp_path / "nothing.py"))
    with pytest.raises(AssertionError, match="nothing.py"):
        gradients_over_ranks(1, "cpu", tmp_path / "ranks")

"""The largest micro-batch that a GPU has memory for: guessed, tried out, guessed better."""

from collections.abc import Callable, Mapping

from jobs.config.memory_estimate import estimate
from jobs.config.settings import Job

# Of a GPU's memory: what a guess may fill. The rest goes to CUDA itself and to gaps.
_FILLED = 0.97


def largest_micro_batch(
    job: Job, samples: int, held_gb: Mapping[str, float | None], memory_gb: float, peak_of: Callable[[Job], float | None], guess: int | None = None
) -> tuple[int, float | None]:
    """Samples of the largest micro-batch that fits, to within 7 %, and its peak in GB. `samples` do, and held_gb says what they took at their peak
    and of that for activations. Tried first: `guess`, or what follows from the activations of one sample; then what each try has shown that a
    sample takes. `peak_of` says what two steps of a job take, GB, or None where they do not fit."""
    best, peak = samples, held_gb.get("peak") or 0.0
    per_sample = max((held_gb.get("activations") or 0.0) / best, 1e-6)
    too_large: int | None = None

    def size_of(gb: float) -> int:
        return int(gb / per_sample)

    # The first try may be far off: little is known of how much does not grow with the samples.
    size = max(best + 1, guess or best + size_of(_FILLED * memory_gb - peak))
    while size > best:
        found = peak_of(with_micro_batch(job, size))
        if found is None:
            too_large = size
        else:
            per_sample = max((found - peak) / (size - best), per_sample / 100)
            best, peak = size, found
        next_one = max(best + 1, int(1.07 * best))
        if too_large is None:
            size = max(next_one, best + size_of(_FILLED * memory_gb - peak))
        else:
            size = max(next_one, int(0.93 * too_large)) if next_one < too_large else best
    return best, held_gb.get("peak") if best == samples else peak


def expected_to_fit(job: Job, memory_gb: float) -> int | None:
    """The most samples of a micro-batch that the estimate of jobs/config/memory_estimate.py has room for; None where it knows nothing, or one is too many."""
    size = 0
    for doubling in reversed(range(20)):
        found = estimate(with_micro_batch(job, size + 2**doubling))
        if found is not None and found.peak / 1e9 <= _FILLED * memory_gb:
            size += 2**doubling
    return size or None


def with_micro_batch(job: Job, size: int) -> Job:
    """The same job with one forward pass of `size` samples per step."""
    return job.model_copy(update={"micro_batch_size": size, "batch_size": size, "grad_accum_steps": 1})

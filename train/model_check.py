"""Start-up check of a model that returns a mean loss: what its mean is over."""

from collections.abc import Callable

import numpy as np
from torch import nn

from jobs.config.settings import Job
from jobs.specs.precision import MODES
from train.data.sources import Dataset
from train.distributed.runtime import Distributed
from train.models.contract import MeanLossModel, find_count_rule

# Samples of the check: enough that two halves differ in their numbers of targets.
_LEAST_SAMPLES, _MOST_SAMPLES = 4, 16
# Relative difference that rounding explains: batches of other sizes go through other kernels.
_TOLERANCE_FP32, _TOLERANCE_16_BIT = 1e-5, 5e-3


def check_count_rule(model: nn.Module, job: Job, data: Dataset, rt: Distributed, say: Callable[[str], None]) -> None:
    """Chooses `model.count_rule` from samples of the data, the same on every rank; only where the batch is cut.

    Does nothing for models that return sums. Raises SettingError when no rule fits."""
    is_cut = rt.world_size > 1 or job.batch_size > (job.micro_batch_size or job.batch_size)
    if not isinstance(model, MeanLossModel) or job.check_model == "off" or not is_cut:
        return
    # Twice a micro-batch without gradients needs less memory than one with them.
    count = min(max(2 * (job.micro_batch_size or 1), _LEAST_SAMPLES), _MOST_SAMPLES, len(data))
    if count < 2:
        return
    # Spread over the whole set: data that are sorted by class begin with one class only.
    chosen = np.linspace(0, len(data) - 1, count).round().astype(np.int64)
    batch = {name: tensor.to(rt.device) for name, tensor in data.batch(chosen).items()}
    low = MODES[job.precision].autocast is not None and job.amp_opt_level == "O2"
    rule = find_count_rule(model, batch, tolerance=_TOLERANCE_16_BIT if low else _TOLERANCE_FP32)
    model.count_rule = rule
    if rule is not None:
        say(f"  loss: a mean over {rule}, checked on {count} samples")

"""Progress of a run: the part of a checkpoint that is neither weights nor moments and changes with each step."""

import math
from dataclasses import dataclass
from typing import Any

from jobs.config.settings import Job
from train.checkpoint.state_dict import TrainStateRecord, versions
from train.data.sources import Dataset, content_of


@dataclass
class TrainState:
    """Where training is. A checkpoint holds it as a `TrainStateRecord`, together with what the job was at that step.

    step: finished optimizer steps.
    tokens: targets trained on, up to the last log line or checkpoint; counting them for each step would wait for the device.
    val_loss: validation loss of exactly this step; None if it was not validated.
    best_val_loss: the smallest finite one so far. It is kept in the manifest of each checkpoint that was validated, not in one place.
    pending_metrics: log line of this step whose validation was interrupted; the next attempt validates first and logs it."""

    step: int = 0
    tokens: int = 0
    val_loss: float | None = None
    best_val_loss: float | None = None
    pending_metrics: dict[str, Any] | None = None

    @classmethod
    def from_record(cls, record: TrainStateRecord | None, best_val_loss: float | None) -> "TrainState":
        """The state to continue from; without a checkpoint that of a run at its beginning."""
        if record is None:
            return cls(best_val_loss=best_val_loss)
        return cls(record.step, record.tokens, best_val_loss=best_val_loss, pending_metrics=record.pending)

    def advance(self) -> None:
        """Count a finished step."""
        self.step += 1
        self.val_loss = None

    def record_validation(self, loss: float) -> bool:
        """Note the validation loss of this step. Returns whether it is the best so far; NaN never is."""
        self.val_loss = loss
        is_best = math.isfinite(loss) and (self.best_val_loss is None or loss < self.best_val_loss)
        if is_best:
            self.best_val_loss = loss
        return is_best

    def to_record(self, job: Job, data: Dataset, world_size: int, scaler: dict[str, float] | None) -> TrainStateRecord:
        """What a checkpoint of this step says beside its tensors."""
        return TrainStateRecord(
            step=self.step,
            tokens=self.tokens,
            seed=job.seed,
            max_steps=job.max_steps,
            batch_size=job.batch_size,
            data=data.name,
            samples=len(data),
            content=content_of(data),
            precision=str(job.precision),
            world=world_size,
            parallel=job.parallel,
            val_loss=self.val_loss if self.val_loss is not None and math.isfinite(self.val_loss) else None,
            pending=self.pending_metrics,
            scaler=scaler,
            versions=versions(),
        )

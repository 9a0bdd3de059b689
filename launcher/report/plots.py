"""The loss curve of a run as a picture."""

from pathlib import Path

from jobs.core.atomic_write import replacing
from jobs.run import event_log, metrics_log
from jobs.run.rundir import RunDir


def draw(run: RunDir) -> Path | None:
    """Writes loss and validation loss over steps, with the places where attempts ended, to run.loss_curve.

    Returns its path, or None where matplotlib is not installed or nothing was logged."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = metrics_log.read(run.metrics)
    if not lines:
        return None
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label="training", linewidth=1, color="#4477aa")
    validated = [line for line in lines if "val_loss" in line]
    if validated:
        axes.plot([line["step"] for line in validated], [line["val_loss"] for line in validated], label="validation", marker="o", markersize=4, color="#cc6677")
    for attempt in event_log.attempts(event_log.read(run.ledger))[:-1]:
        if attempt.cause and attempt.step is not None:
            axes.axvline(attempt.step, color="#888888", linestyle="--", linewidth=1)
            axes.annotate(
                f" {attempt.cause.value.replace('_', ' ')}", (attempt.step, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8, color="#555555"
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per target)")
    axes.set_title(run.id)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(run.loss_curve, flush=False) as file:
        figure.savefig(file, format="png")
    return run.loss_curve

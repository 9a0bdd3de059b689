"""`holdfast precision JOB`: every precision that this machine has, measured on the job's own model, and the one to take.

Each mode trains in a process of its own (train/bench.py), from the same weights on the same samples. What is kept in the
runs directory is what `PRECISION=auto` looks up.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.config import precision_cache
from jobs.config.settings import Job
from jobs.config.yaml_io import dump_yaml
from jobs.core.atomic_write import replace_file, replacing
from jobs.core.contract import Exit
from jobs.core.errors import HoldfastError, SettingError
from jobs.specs.gpu_peaks import peak_of
from jobs.specs.precision import FP8_RECIPES, MODES, MXFP8_ARCH, Precision, runs_on
from launcher import subprocesses
from launcher.status.run_status import near
from launcher.submission.create_run import resolve_here

# The first gradient has to point where that of fp32 does; fp8 products have 3 or 2 bits of mantissa.
LEAST_COSINE = 0.9
# Simpler ways of training are kept when a faster one gains less than this.
LEAST_GAIN = 1.03
# From the simplest to the one with the most that can go wrong: no scaling; dynamic loss scaling; fp8 scales and a library.
_SIMPLEST_FIRST = (Precision.FP32, Precision.TF32, Precision.BF16, Precision.FP16, Precision.FP8)
_WARM_UP = 5
# One mode may compile for minutes; it may not hang for ever.
_LIMIT_S = 1800


@dataclass
class Row:
    """One mode as the table shows it. `settings` are the words that choose it; figures are None where nothing was measured."""

    name: str
    settings: dict[str, str]
    per_s: float | None = None
    step_ms: float | None = None
    step_ms_p95: float | None = None
    first_step_s: float | None = None
    tflops: float | None = None
    peak_share: float | None = None
    memory_gb: dict[str, float | None] = field(default_factory=dict)
    largest_micro_batch: int | None = None
    max_gap: float | None = None
    mean_gap: float | None = None
    relative_gap: float | None = None
    cosine: float | None = None
    overflows: int = 0
    culprit: str = ""
    losses: list[float] = field(default_factory=list)
    verdict: str = ""
    passed: bool = False


def compare(words: Sequence[str], environ: Mapping[str, str], cwd: Path, *, steps: int, only: str, largest: bool, tolerance: float, as_json: bool) -> int:
    """Measures, prints, keeps. 0 when a precision can be recommended, else 1."""
    # Whatever precision the job asks for: all are looked at, from the one that runs everywhere.
    job = resolve_here([*words, "PRECISION=fp32"], environ, cwd).job
    job = _one_process(job, steps)
    hardware = _ask(["--hardware"], cwd)
    modes = candidates(hardware, job, only)
    rows = []
    with tempfile.TemporaryDirectory(prefix="holdfast-precision-") as folder, _progress(len(modes), enabled=not as_json) as told:
        for settings in modes:
            rows.append(Row(name_of(settings), settings))
            told(rows[-1].name)
            _measure(rows[-1], job, Path(folder), cwd, steps, largest)
    judge(rows, tolerance)
    chosen, rule = recommend(rows)
    report = {
        "model": job.model,
        "samples": job.batch_size,
        "seq_len": job.seq_len,
        "steps": steps,
        "tolerance": tolerance,
        **{k: hardware[k] for k in ("device", "arch", "torch")},
        "date": time.strftime("%Y-%m-%d"),
        "rows": [asdict(row) for row in rows],
        "settings": chosen.settings if chosen else {},
        "rule": rule,
    }
    path = precision_cache.place(cwd / job.runs_dir, job, hardware["arch"])
    # A measurement of some modes only must not hide a faster one from PRECISION=auto.
    if chosen and not only:
        precision_cache.keep(path, report)
        replace_file(path.with_suffix(".md"), markdown(job, report, rows))
        plot = _plot(rows, path.with_suffix(".png"), f"{job.model} on {hardware['device']}")
    if as_json:
        print(json.dumps(report, indent=1))
        return Exit.DONE if chosen else Exit.FAILED
    print(headline(job, report))
    _print(rows)
    if chosen is None:
        print(rule)
        return Exit.FAILED
    said = " ".join(f"{name.upper()}={value}" for name, value in chosen.settings.items())
    print(f"-> {said}    {rule}")
    if not only:
        print(f"kept for PRECISION=auto: {near(path)} (beside it the same as .md{' and .png' if plot else ''})")
    return Exit.DONE


def candidates(hardware: Mapping[str, Any], job: Job, only: str) -> list[dict[str, str]]:
    """The settings of every mode that this hardware has, fp32 first. Raises SettingError when `only` leaves nothing beside it."""
    arch = hardware["arch"]
    found: list[dict[str, str]] = []
    for mode in MODES.values():
        if not runs_on(mode, arch):
            continue
        if mode.name is not Precision.FP8:
            found.append({"precision": mode.name.value})
            continue
        found += [
            {"precision": mode.name.value, "fp8_backend": backend, "fp8_recipe": recipe}
            for backend, recipes in FP8_RECIPES.items()
            for recipe in recipes
            if backend in hardware["fp8"] and not (recipe == "mxfp8" and arch < MXFP8_ARCH)
        ]
    words = [word.strip() for word in only.split(",") if word.strip()]
    if not words:
        return found
    kept = [settings for settings in found if settings["precision"] == Precision.FP32 or any(word in name_of(settings) for word in words)]
    if len(kept) == 1 and "fp32" not in words:
        raise SettingError(f"--only {only}: this machine ({hardware['device']}) has none of it; it has {', '.join(map(name_of, found))}.")
    return kept


def name_of(settings: Mapping[str, str]) -> str:
    """bf16, or fp8 te current."""
    return " ".join(settings.values())


def judge(rows: Sequence[Row], tolerance: float) -> None:
    """Fills in gaps, verdict and passed of every row that was measured, against the one of fp32."""
    reference = next((row.losses for row in rows if row.settings["precision"] == Precision.FP32), [])
    for row in rows:
        if row.verdict:
            continue
        gaps = [abs(a - b) for a, b in zip(row.losses, reference, strict=False)]
        if not reference:
            row.verdict, row.passed = "no fp32 to compare with", True
            continue
        row.max_gap, row.mean_gap = max(gaps), sum(gaps) / len(gaps)
        row.relative_gap = max(gap / max(abs(b), 1e-9) for gap, b in zip(gaps, reference, strict=False))
        if any(loss != loss for loss in row.losses):
            row.verdict = f"not finite{f', first in {row.culprit}' if row.culprit else ''}"
        elif row.settings["precision"] == Precision.FP32:
            row.verdict, row.passed = "reference", True
        elif row.relative_gap > tolerance:
            row.verdict = f"too far from fp32: {100 * row.relative_gap:.1f} % of the loss, {100 * tolerance:g} % allowed"
        elif row.cosine is not None and row.cosine < LEAST_COSINE:
            row.verdict = f"its gradient points elsewhere: cosine {row.cosine:.3f}, {LEAST_COSINE:g} at least"
        else:
            row.verdict, row.passed = "good" + (", needs loss scaling" if MODES[Precision(row.settings["precision"])].loss_scaling else ""), True


def recommend(rows: Sequence[Row]) -> tuple[Row | None, str]:
    """The row to take, and the rule that chose it: the fastest within parity, unless a simpler one is nearly as fast."""
    good = [row for row in rows if row.passed and row.per_s]
    if not good:
        return None, "no precision of this machine trains this model as fp32 does; see the verdicts"
    fastest = max(good, key=lambda row: row.per_s or 0.0)
    for row in sorted(good, key=lambda row: (_SIMPLEST_FIRST.index(Precision(row.settings["precision"])), -(row.per_s or 0.0))):
        assert row.per_s and fastest.per_s
        if row.per_s * LEAST_GAIN >= fastest.per_s:
            row.verdict = f"recommended{': reference' if row.verdict == 'reference' else ''}"
            if row is fastest:
                return row, "fastest within parity with fp32"
            return (
                row,
                f"{fastest.name} is {100 * (fastest.per_s / row.per_s - 1):.1f} % faster, less than the {100 * (LEAST_GAIN - 1):.0f} % that its scaling is worth",
            )
    raise AssertionError("the fastest is as fast as itself")


def _one_process(job: Job, steps: int) -> Job:
    """The share of one GPU of this job, with one forward pass per step."""
    micro = job.micro_batch_size or job.batch_size
    return job.model_copy(
        update={
            "nodes": 1,
            "gpus_per_node": 1,
            "batch_size": micro,
            "micro_batch_size": micro,
            "grad_accum_steps": 1,
            "parallel": "ddp",
            "max_steps": steps,
            "log_samples": False,
        }
    )


def _measure(row: Row, job: Job, folder: Path, cwd: Path, steps: int, largest: bool) -> None:
    """Runs one mode and fills in its row. The one of fp32, which comes first, leaves the gradient to compare with in `folder`."""
    frozen, gradient = folder / "job.yaml", folder / "gradient.npy"
    mode = MODES[Precision(row.settings["precision"])]
    # O2 keeps 16-bit parameters, which the others have not.
    level = job.amp_opt_level if mode.autocast is not None and job.amp_opt_level == "O2" else None
    frozen.write_text(dump_yaml({**job.model_dump(mode="json"), **row.settings, "amp_opt_level": level}))
    arguments = ["--job", str(frozen), "--steps", str(steps), "--warm-up", str(min(_WARM_UP, steps // 2)), *(["--largest"] if largest else [])]
    arguments += ["--keep-gradient" if mode.name is Precision.FP32 else "--compare-gradient", str(gradient)]
    try:
        found = _ask(arguments, cwd)
    except HoldfastError as err:
        row.verdict = f"failed: {err}"
        return
    if "refused" in found:
        row.verdict = f"left out: {found['refused']}"
        return
    seconds = found["step_ms"] / 1000
    row.per_s = found["samples"] * found["targets_per_sample"] / seconds
    row.step_ms, row.step_ms_p95, row.first_step_s = round(found["step_ms"], 4), round(found["step_ms_p95"], 4), found["first_step_s"]
    row.tflops = found["flops_per_sample"] * found["samples"] / seconds / 1e12 or None
    peak = peak_of(found["device"], Precision(found["precision"]))
    row.peak_share = row.tflops / peak.tflops if row.tflops and peak else None
    row.memory_gb, row.largest_micro_batch = found["memory_gb"], found.get("largest_micro_batch")
    row.losses, row.overflows, row.culprit, row.cosine = found["losses"], found["overflows"], found["culprit"], found["cosine"]


def _ask(arguments: list[str], cwd: Path) -> dict[str, Any]:
    """The answer of train.bench. Raises HoldfastError with its last line when it gives none."""
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        out = Path(folder) / "out.json"
        try:
            done = subprocess.run(
                subprocesses.command("train.bench", *arguments, "--out", str(out), user_code=True),
                cwd=cwd,
                capture_output=True,
                text=True,
                timeout=_LIMIT_S,
                env=_without_ranks(os.environ),
            )
        except subprocess.TimeoutExpired:
            raise HoldfastError(f"it did not end within {_LIMIT_S} s") from None
        if not out.exists():
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            raise HoldfastError(last[0].strip() if last else f"it ended with {done.returncode}")
        answer: dict[str, Any] = json.loads(out.read_text())
        return answer


def _without_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what a launcher around us said about ranks: each measurement is a process of its own."""
    return {name: value for name, value in environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}


def headline(job: Job, report: Mapping[str, Any]) -> str:
    return f"{job.model} · {report['device']} · {report['samples']} samples of {report['seq_len']} per step, {report['steps']} steps each, {'compiled' if job.compile else 'eager'}"


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, columns that no row has anything to say in left out."""
    base = next((row.per_s for row in rows if row.settings["precision"] == Precision.BF16), None)
    columns: list[tuple[str, list[str]]] = [
        ("precision", [row.name for row in rows]),
        ("per second", [_number(row.per_s, ",.0f") for row in rows]),
        ("x bf16", [_number(row.per_s / base if row.per_s and base else None, ".2f") for row in rows]),
        ("step ms", [_number(row.step_ms, ",.1f") for row in rows]),
        ("p95", [_number(row.step_ms_p95, ",.1f") for row in rows]),
        ("TFLOP/s", [_number(row.tflops, ".3g") for row in rows]),
        ("of peak", [_number(100 * row.peak_share if row.peak_share else None, ".1f", " %") for row in rows]),
        ("memory", [_number(row.memory_gb.get("peak"), ".1f", " GB") for row in rows]),
        ("weights + grads + optimizer", [_split(row.memory_gb) for row in rows]),
        ("largest micro-batch", [_number(row.largest_micro_batch, "d") for row in rows]),
        ("max |loss - fp32|", [_number(row.max_gap, ".4f") for row in rows]),
        ("gradient cosine", [_number(row.cosine, ".4f") for row in rows]),
        ("overflows", [str(row.overflows) if row.overflows else "" for row in rows]),
        ("verdict", [row.verdict for row in rows]),
    ]
    shown = [(name, cells) for name, cells in columns if any(cells)]
    return [name for name, _ in shown], [list(cells) for cells in zip(*(cells for _, cells in shown), strict=True)]


def markdown(job: Job, report: Mapping[str, Any], rows: Sequence[Row]) -> str:
    headings, lines = table(rows)
    said = " ".join(f"{name.upper()}={value}" for name, value in report["settings"].items())
    body = ["| " + " | ".join(cells) + " |" for cells in ([*headings], ["---"] * len(headings), *lines)]
    return "\n".join([f"# {headline(job, report)}", "", f"{report['date']}, torch {report['torch']}.", "", *body, "", f"Take `{said}`: {report['rule']}.", ""])


def _split(memory_gb: Mapping[str, float | None]) -> str:
    """`5.0 + 5.0 + 10.1 GB`, small models in MB."""
    parts = [memory_gb.get(part) for part in ("parameters", "gradients", "optimizer")]
    if not all(part is not None for part in parts):
        return ""
    small = max(part or 0.0 for part in parts) < 0.1
    return " + ".join(f"{(part or 0.0) * (1000 if small else 1):.1f}" for part in parts) + (" MB" if small else " GB")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


def _print(rows: Sequence[Row]) -> None:
    headings, lines = table(rows)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading in ("precision", "verdict") else "right", overflow="fold")
    for cells in lines:
        shown.add_row(*map(Text, cells))
    console = Console(highlight=False)
    console.print(shown) if console.is_terminal else Console(width=400, highlight=False).print(shown)


@contextmanager
def _progress(total: int, enabled: bool) -> Iterator[Any]:
    """A function to tell which mode comes now; what it shows goes to standard error."""
    console = Console(stderr=True, highlight=False)
    if not enabled:
        yield lambda name: None
        return
    done = 0
    if not console.is_terminal:

        def line(name: str) -> None:
            nonlocal done
            done += 1
            print(f"measuring {name} ({done} of {total})", file=sys.stderr, flush=True)

        yield line
        return
    with console.status("asking for the hardware") as status:

        def show(name: str) -> None:
            nonlocal done
            done += 1
            status.update(f"measuring {name} ({done} of {total})")

        yield show


def _plot(rows: Sequence[Row], path: Path, title: str) -> bool:
    """Speed beside the distance from fp32, as a picture. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.per_s]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 0.5 * len(shown) + 1.6), sharey=True)
    names = [row.name for row in shown]
    left.barh(names, [row.per_s or 0.0 for row in shown], color=["#2a7de1" if row.verdict.startswith("recommended") else "#9db4cc" for row in shown])
    left.set_xlabel("targets per second")
    left.invert_yaxis()
    right.barh(names, [row.max_gap or 0.0 for row in shown], color=["#9db4cc" if row.passed else "#d1495b" for row in shown])
    right.set_xlabel("largest |loss - loss of fp32|")
    for axes in (left, right):
        axes.locator_params(axis="x", nbins=5)
    figure.suptitle(title)
    figure.tight_layout()
    with replacing(path, flush=False) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
    return True

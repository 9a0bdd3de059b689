"""The pictures of docs/explanation/architecture.md and its tables of the three walks: `python tools/draw.py` writes them.

A step of a walk names a file and a function; tests/project/test_house.py holds that each one exists, and that nothing here is stale.
"""

import ast
import textwrap
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/explanation/architecture.md"
PACKAGES = ("jobs", "slurm", "launcher", "train")


@dataclass(frozen=True)
class Step:
    """One station: the lane it lies in, `path.py:function` (or a path alone), and what happens there.

    `always`: in every run; tests/support/walked.py makes one and must come by."""

    lane: int
    place: str
    what: str
    always: bool = True


@dataclass(frozen=True)
class Walk:
    name: str
    title: str
    lanes: tuple[str, ...]
    steps: tuple[Step, ...]


PRECISION = Walk(
    "precision",
    "PRECISION=bf16, from the shell to the autocast",
    ("launcher: commands", "jobs: settings", "slurm: batch script", "train: one process per GPU"),
    (
        Step(0, "Makefile", "runs holdfast submit; MAKEFLAGS keeps the value unexpanded"),
        Step(0, "launcher/commands/submit.py:submit_job", "the whole submission; a refused one leaves no files"),
        Step(1, "jobs/config/overrides.py:words_from_make", "PRECISION=bf16 as typed"),
        Step(1, "jobs/config/resolver.py:resolve", "merges the layers; records the origin: command line"),
        Step(1, "jobs/config/layers.py:gather", "site file, job file, environment, command line"),
        Step(1, "jobs/config/settings.py:Job", "parses the text to Precision.BF16; the job is immutable"),
        Step(1, "jobs/config/validation.py:check", "checks the precision against the site's GPU before queueing"),
        Step(2, "slurm/script/render.py:render_script", "the script holds the run directory and no training setting"),
        Step(0, "launcher/submission/create_run.py:make", "writes job.yaml and origins.json"),
        Step(0, "launcher/submission/submitit_executor.py:to_slurm", "sbatch through submitit; the job is pending"),
        Step(0, "launcher/attempt/lifecycle.py:begin", "on the node: claims the attempt, sets the rendezvous"),
        Step(3, "train/__main__.py:main", "one process per GPU; reads only job.yaml"),
        Step(3, "train/startup.py:build_trainer", "joins the ranks, opens the data, builds and restores the model"),
        Step(3, "train/distributed/runtime.py:init", "checks the precision against the GPU; sets TF32"),
        Step(3, "train/build.py:build", "builds the fp32 model and its autocast context"),
        Step(3, "train/precision/numerics.py:autocast_context", "torch.autocast(dtype=bfloat16)"),
        Step(3, "train/train_step.py:TrainStep.__call__", "forward of every micro-batch inside the context"),
    ),
)

STEP = Walk(
    "step",
    "One optimizer step, from the batch to the checkpoint",
    ("functions of the step", "training loop", "arithmetic", "checkpoint thread"),
    (
        Step(0, "train/data/order.py:sample_ids", "sample ids of step N, from step and seed"),
        Step(1, "train/trainer.py:Trainer.next_batches", "waits until every rank has its batches or the ranks agree to stop"),
        Step(1, "train/data/loader.py:TrainLoader.ready", "prefetches in a thread; ready when every rank has its samples"),
        Step(1, "train/distributed/runtime.py:Distributed.all_reduce_max", "CPU all-reduce: samples ready, stop requested, save due"),
        Step(1, "train/trainer.py:Trainer.train_step", "one optimizer step with its log line, validation and checkpoint"),
        Step(0, "jobs/specs/lr_schedule.py:LRSchedule.__call__", "learning rate of step N"),
        Step(1, "train/rng.py:seed_everything", "seeds dropout from seed, step and rank"),
        Step(2, "train/train_step.py:TrainStep.__call__", "runs the micro-batches of the step"),
        Step(2, "train/distributed/parallel.py:accumulating", "accumulates gradients; all-reduces after the last micro-batch"),
        Step(2, "train/models/contract.py:read_loss", "forward under autocast: loss sum and target count"),
        Step(2, "train/optim.py:gradients_of", "divides by the targets of the global batch, clips, updates"),
        Step(1, "train/precision/numerics.py:OverflowPolicy.record_overflow", "fp16: on overflow reduces the scale and repeats the step", always=False),
        Step(1, "jobs/run/progress.py:Progress.set", "publishes the finished step"),
        Step(1, "train/metrics/logger.py:MetricsFile.write", "every log_every steps; first synchronization with the GPU"),
        Step(1, "train/checkpoint/manager.py:CheckpointManager.save", "every checkpoint_every steps or Young's interval"),
        Step(1, "train/checkpoint/state_dict.py:local_shards", "copies weights and optimizer to host memory; training continues"),
        Step(3, "jobs/checkpoint/commit.py:Commit.write", "writes a temporary directory; fsync of each file"),
        Step(3, "jobs/checkpoint/commit.py:Commit.finish", "writes the manifest, then renames: now complete"),
        Step(3, "jobs/run/event_log.py:append", "appends a `checkpoint` event"),
        Step(3, "jobs/checkpoint/commit.py:prune", "deletes old checkpoints"),
    ),
)

SIGTERM = Walk(
    "sigterm",
    "One SIGTERM, from Slurm to the requeue",
    ("Slurm", "every rank", "batch script", "pure functions and files"),
    (
        Step(0, "slurm/script/templates/train.sbatch.j2", "preemption: SIGCONT and SIGTERM to all, SIGKILL after the grace time"),
        Step(2, "slurm/script/templates/train.sbatch.j2", "trap: records the signal, keeps waiting for srun"),
        Step(1, "jobs/rank/stop_flag.py:StopFlag.install", "the handler sets a flag"),
        Step(1, "train/distributed/runtime.py:Distributed.all_reduce_max", "at the step boundary all ranks agree to stop"),
        Step(1, "train/trainer.py:Trainer.shut_down", "saves the step at which the ranks agreed to stop, then closes everything"),
        Step(1, "train/checkpoint/manager.py:CheckpointManager.save", "blocking: waits for the save in flight, then saves this step"),
        Step(1, "jobs/rank/stop_flag.py:leave_marker", "writes exit.N.json; exits with 75"),
        Step(2, "launcher/attempt/lifecycle.py:end", "runs after srun has exited"),
        Step(3, "launcher/attempt/evidence.py:evidence_of", "collects markers, logs, hang report, lost nodes, Slurm's answer"),
        Step(3, "launcher/attempt/classify_exit.py:classify", "cause preempted, with the evidence"),
        Step(3, "launcher/attempt/finalize.py:write_end", "appends an `end` event: cause, steps, time parts"),
        Step(3, "jobs/run/retry_policy.py:judge", "retry decision from the limits per cause"),
        Step(2, "launcher/attempt/requeue.py:send_back", "requests the requeue, appends a `requeue` event"),
        Step(0, "slurm/client.py:Slurm.requeue", "scontrol requeue, or a successor job"),
        Step(2, "launcher/attempt/lifecycle.py:begin", "the same script, on nodes that Slurm chooses"),
        Step(3, "jobs/run/claim.py:claim", "claims the next number by one rename; fences the old attempt"),
        Step(1, "jobs/checkpoint/directory.py:newest_verified", "resumes at the saved step"),
    ),
)

WALKS = (PRECISION, STEP, SIGTERM)

# -- drawing -----------------------------------------------------------------------------------------------------------

_STYLE = """
  .paper { fill: #ffffff } .lane { fill: #f3f5f8 } .box { fill: #ffffff; stroke: #5b6b82 } .head { fill: #33415c; font-weight: 600 }
  text { fill: #1f2733; font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 12px }
  .place { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 10.5px; font-weight: 600; fill: #0b4f9c }
  .number { fill: #6a7688; font-size: 11px } .way { stroke: #8a5a00; stroke-width: 1.6; fill: none } .tip { fill: #8a5a00 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0f141b } .lane { fill: #171e28 } .box { fill: #1d2733; stroke: #7d8da6 } .head { fill: #c3d0e4 }
    text { fill: #dfe6ef } .place { fill: #82b8ff } .number { fill: #93a1b5 } .way { stroke: #e0a94a } .tip { fill: #e0a94a }
  }
"""
_LANE, _BOX, _MARGIN, _TOP, _ROW, _HIGH = 284, 268, 12, 44, 80, 66


def picture(walk: Walk) -> str:
    """The walk as SVG: a column for each lane, a row for each step, downwards in time."""
    width = 2 * _MARGIN + _LANE * len(walk.lanes)
    height = _TOP + _ROW * len(walk.steps) + _MARGIN
    parts = [_frame(width, height, walk.title)]
    for lane, title in enumerate(walk.lanes):
        x = _MARGIN + lane * _LANE
        parts.append(f'<rect class="lane" x="{x}" y="{_MARGIN}" width="{_LANE - 8}" height="{height - 2 * _MARGIN}" rx="6"/>')
        parts.append(f'<text class="head" x="{x + 10}" y="{_MARGIN + 20}">{escape(title)}</text>')
    for index, (before, after) in enumerate(zip(walk.steps, walk.steps[1:], strict=False)):
        parts.append(_way(before.lane, after.lane, index))
    for index, step in enumerate(walk.steps):
        left, y = _MARGIN + step.lane * _LANE + (_LANE - 8 - _BOX) / 2, _TOP + index * _ROW
        parts.append(f'<rect class="box" x="{left:g}" y="{y}" width="{_BOX}" height="{_HIGH}" rx="5"/>')
        parts.append(f'<text class="place" x="{left + 8:g}" y="{y + 17}">{escape(_fitting(step.place))}</text>')
        parts.append(f'<text class="number" x="{left + _BOX - 8:g}" y="{y + _HIGH - 7}" text-anchor="end">{index + 1}</text>')
        lines = textwrap.wrap(step.what, 39)
        assert len(lines) <= 3, step
        parts += [f'<text x="{left + 8:g}" y="{y + 32 + 14 * n}">{escape(line)}</text>' for n, line in enumerate(lines)]
    return "\n".join([*parts, "</svg>\n"])


def _fitting(place: str, most: int = 40) -> str:
    """A place as its box can hold it: leading folders are left out when it is too long."""
    while len(place) > most and "/" in place:
        place = "…/" + place.removeprefix("…/").partition("/")[2]
    return place


def _frame(width: int, height: int, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>\n'
        f'<rect class="paper" width="{width}" height="{height}" rx="8"/>'
    )


def _way(start: int, goal: int, index: int) -> str:
    """From one row to the next: straight down within a lane, else out at the side and down into the other."""
    middle = [_MARGIN + lane * _LANE + (_LANE - 8) / 2 for lane in (start, goal)]
    bottom, top = _TOP + index * _ROW + _HIGH, _TOP + (index + 1) * _ROW
    if start == goal:
        return f'<path class="way" d="M{middle[0]:g} {bottom} V{top}" marker-end="url(#tip)"/>'
    side = middle[0] + (_BOX / 2 if goal > start else -_BOX / 2)
    return f'<path class="way" d="M{side:g} {bottom - _HIGH / 2:g} H{middle[1]:g} V{top}" marker-end="url(#tip)"/>'


_ROOMS = {
    "launcher": ("commands", "submission, start and end of an attempt,|watch, logs, report, sweep, doctor, drill", "typer rich submitit · optuna matplotlib on demand"),
    "slurm": ("Slurm", "batch script and quoting, clients, job states,|site files, dev cluster", "jinja2 · sbatch squeue sacct scontrol"),
    "jobs": ("jobs and runs", "settings and layers, precision, run directory,|event log, signals, exit codes, retry policy", "pydantic yaml"),
    "train": ("training", "models, data, step, checkpoint, metrics;|one process per GPU, independent of Slurm", "torch accelerate numpy safetensors"),
}  # fmt: skip


def house() -> str:
    """The four packages and the ways in which they may import each other."""
    wide, high, gap = 324, 104, 56
    at = {"launcher": (20, 40), "slurm": (20 + wide + gap, 40), "jobs": (20 + 2 * (wide + gap), 40), "train": (20 + 2 * (wide + gap), 40 + high + gap)}
    width, height = 40 + 3 * wide + 2 * gap, 60 + 2 * high + gap
    parts = [_frame(width, height, "Packages: launcher imports slurm and jobs, slurm imports jobs, train imports jobs")]
    parts.append(f'<path class="way" d="M{at["launcher"][0] + wide} 92 H{at["slurm"][0] - 2}" marker-end="url(#tip)"/>')
    parts.append(f'<path class="way" d="M{at["slurm"][0] + wide} 92 H{at["jobs"][0] - 2}" marker-end="url(#tip)"/>')
    parts.append(f'<path class="way" d="M{at["train"][0] + wide / 2} {at["train"][1]} V{40 + high + 2}" marker-end="url(#tip)"/>')
    parts.append(f'<path class="way" d="M{at["launcher"][0] + wide / 2} 40 V22 H{at["jobs"][0] + wide / 2} V38" marker-end="url(#tip)"/>')
    for name, (x, y) in at.items():
        title, inside, outside = _ROOMS[name]
        parts.append(f'<rect class="box" x="{x}" y="{y}" width="{wide}" height="{high}" rx="6"/>')
        parts.append(f'<text x="{x + 12}" y="{y + 24}"><tspan class="place" style="font-size:14px">{name}/</tspan>  <tspan class="head">{title}</tspan></text>')
        parts += [f'<text x="{x + 12}" y="{y + 46 + 16 * n}">{escape(line)}</text>' for n, line in enumerate(inside.split("|"))]
        parts.append(f'<text class="number" x="{x + 12}" y="{y + 88}">{escape(outside)}</text>')
    x, y = at["launcher"][0], at["train"][1]
    words = ("An arrow means: may import. launcher and train share only the", "run directory: job.yaml in one direction; event log, markers,", "metrics and checkpoints in the other. The launcher needs no", "torch to report the state of a run.")  # fmt: skip
    parts += [f'<text x="{x + 4}" y="{y + 24 + 18 * n}">{line}</text>' for n, line in enumerate(words)]
    return "\n".join([*parts, "</svg>\n"])


# -- the page ----------------------------------------------------------------------------------------------------------


def modules() -> dict[str, str]:
    """`jobs/run/permissions.py` -> the first paragraph of its docstring, for every module of the house that has anything in it."""
    paths = [ROOT / "holdfast.py", *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))]
    said = {path.relative_to(ROOT).as_posix(): ast.get_docstring(ast.parse(path.read_text())) for path in paths if path.stat().st_size}
    return {name: " ".join((doc or "").split("\n\n")[0].split()) for name, doc in said.items()}


def _walk_table(walk: Walk) -> str:
    rows = [f"| {index} | `{step.place}` | {step.what} |" for index, step in enumerate(walk.steps, 1)]
    return "\n".join(["| | where | what happens |", "|---|---|---|", *rows])


def page(text: str) -> str:
    """The page with everything between its marks written anew."""
    blocks = {f"walk {walk.name}": _walk_table(walk) for walk in WALKS}
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: written by tools/draw.py -->\n", f"\n<!-- end of {name} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        assert found and closed, f"{PAGE} has no place for {name!r}"
        text = head + begin + block + end + tail
    return text


def generated() -> dict[str, str]:
    """Path in the repository -> the text that belongs there."""
    pictures = {f"docs/images/walk-{walk.name}.svg": picture(walk) for walk in WALKS}
    return {PAGE: page((ROOT / PAGE).read_text("utf-8")), "docs/images/house.svg": house(), **pictures}


if __name__ == "__main__":
    for name, text in generated().items():
        if not (ROOT / name).exists() or (ROOT / name).read_text("utf-8") != text:
            (ROOT / name).write_text(text, "utf-8")
            print(f"wrote {name}")

"""The pictures of docs/architecture.md, its tables of the three walks and of the modules: `python tools/draw.py` writes them anew.

A step of a walk names a file and a function; tests/project/test_house.py holds that each one exists, and that nothing here is stale.
"""

import ast
import textwrap
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/architecture.md"
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
    ("launcher: what a person does", "jobs: what a job is", "slurm: what Slurm is told", "train: what a GPU does"),
    (
        Step(0, "Makefile", "make submit PRECISION=bf16 starts holdfast submit; the word stays in MAKEFLAGS, unexpanded"),
        Step(0, "launcher/commands/submit.py:submit_job", "a submit from first to last; one that is refused leaves nothing"),
        Step(1, "jobs/config/overrides.py:words_from_make", "PRECISION=bf16 as it was typed"),
        Step(1, "jobs/config/resolver.py:resolve", "gathers the layers; the highest wins, and leaves its origin: command line"),
        Step(1, "jobs/config/layers.py:gather", "one layer each: site, job file, environment, command line; the word is precision"),
        Step(1, "jobs/config/settings.py:Job", "the text becomes Precision.BF16; the job is frozen"),
        Step(1, "jobs/config/validation.py:check", "the row of jobs/specs/precision.py against the site's GPU; refused here, before any queue"),
        Step(2, "slurm/script/render.py:render_script", "the script holds the run directory, and no setting of training"),
        Step(0, "launcher/submission/create_run.py:make", "job.yaml says precision: bf16, origins.json says who"),
        Step(0, "launcher/submission/submitit_executor.py:to_slurm", "sbatch, through submitit; the job waits"),
        Step(0, "launcher/attempt/lifecycle.py:begin", "on the node: the attempt is counted, the ranks learn where to meet"),
        Step(3, "train/__main__.py:main", "one process per GPU reads job.yaml and nothing else"),
        Step(3, "train/startup.py:build_trainer", "joins the other ranks, opens the data, builds and restores the model"),
        Step(3, "train/distributed/runtime.py:init", "the same row against the real GPU; the one TF32 switch"),
        Step(3, "train/build.py:build", "the model in fp32, and the context of its forward"),
        Step(3, "train/precision/numerics.py:autocast_context", "torch.autocast(dtype=bfloat16), as the row says"),
        Step(3, "train/train_step.py:TrainStep.__call__", "with context(): the forward of every micro-batch"),
    ),
)

STEP = Walk(
    "step",
    "One optimizer step, from the batch to the checkpoint",
    ("pure functions of the step", "the loop", "the arithmetic", "saving, in a thread"),
    (
        Step(0, "train/data/order.py:sample_ids", "which samples step N takes: from step and seed, so there is no state to save"),
        Step(1, "train/trainer.py:Trainer.next_batches", "until every rank has its batches, or the ranks agree to stop"),
        Step(1, "train/data/loader.py:TrainLoader.ready", "read ahead in a thread; all ranks wait until each has its samples"),
        Step(1, "train/distributed/runtime.py:Distributed.all_reduce_max", "one small message on the CPU: samples there? a stop heard? a save due?"),
        Step(1, "train/trainer.py:Trainer.train_step", "one optimizer step with its log line, validation and checkpoint"),
        Step(0, "jobs/specs/lr_schedule.py:LRSchedule.__call__", "the learning rate of step N"),
        Step(1, "train/rng.py:seed_everything", "dropout of step N: again from seed, step and rank"),
        Step(2, "train/train_step.py:TrainStep.__call__", "the micro-batches of the step, one after the other"),
        Step(2, "train/distributed/parallel.py:accumulating", "gradients pile up; ranks add theirs at the last micro-batch only"),
        Step(2, "train/models/contract.py:read_loss", "forward under autocast: a sum of losses and how many targets it has"),
        Step(2, "train/optim.py:gradients_of", "one division by the targets of the whole batch, one clip, one update"),
        Step(1, "train/precision/numerics.py:OverflowPolicy.record_overflow", "fp16 only: not finite? a smaller scale, and the same step again", always=False),
        Step(1, "jobs/run/progress.py:Progress.set", "the step counts from here, also for whoever looks from outside"),
        Step(1, "train/metrics/logger.py:MetricsFile.write", "each log_every steps; the first moment that waits for the GPU"),
        Step(1, "train/checkpoint/manager.py:CheckpointManager.save", "each checkpoint_every steps, or when Young's interval is over"),
        Step(1, "train/checkpoint/state_dict.py:local_shards", "fp32 weights and optimizer by name, copied to host memory; then training goes on"),
        Step(3, "jobs/checkpoint/commit.py:Commit.write", "under a name with the attempt in it; fsync of each file"),
        Step(3, "jobs/checkpoint/commit.py:Commit.finish", "manifest of sha256 sums, then one rename: only now is it a checkpoint"),
        Step(3, "jobs/run/event_log.py:append", "the line `checkpoint`, with seconds and bytes"),
        Step(3, "jobs/checkpoint/commit.py:prune", "old ones go, after the new one is safe"),
    ),
)

SIGTERM = Walk(
    "sigterm",
    "One SIGTERM, from Slurm to the requeue",
    ("Slurm", "every rank", "the batch script", "pure, or on disk"),
    (
        Step(0, "slurm/script/templates/train.sbatch.j2", "preemption: SIGCONT and SIGTERM to every process, SIGKILL after the grace time"),
        Step(2, "slurm/script/templates/train.sbatch.j2", "trap: writes the signal down and waits on for srun"),
        Step(1, "jobs/rank/stop_flag.py:StopFlag.install", "the handler sets a flag; nothing else happens in a handler"),
        Step(1, "train/distributed/runtime.py:Distributed.all_reduce_max", "at the next step boundary all ranks agree to stop"),
        Step(1, "train/trainer.py:Trainer.shut_down", "saves where the ranks agreed to stop, then closes everything"),
        Step(1, "train/checkpoint/manager.py:CheckpointManager.save", "blocking: waits for the save in flight, then writes this step"),
        Step(1, "jobs/rank/stop_flag.py:leave_marker", "exit.N.json: stopped, by TERM, at step N; exit code 75"),
        Step(2, "launcher/attempt/lifecycle.py:end", "srun is gone; the script has become this program"),
        Step(3, "launcher/attempt/evidence.py:evidence_of", "markers, logs, hang, lost nodes; what Slurm says beside it"),
        Step(3, "launcher/attempt/classify_exit.py:classify", "preempted, and the words that prove it"),
        Step(3, "launcher/attempt/finalize.py:write_end", "the line `end`: cause, step, lost steps, where the time went"),
        Step(3, "jobs/run/retry_policy.py:judge", "again? budgets per cause; preemption costs none while the run gets forward"),
        Step(2, "launcher/attempt/requeue.py:send_back", "asks Slurm, then writes the line `requeue`"),
        Step(0, "slurm/client.py:Slurm.requeue", "scontrol requeue, content if Slurm has done it; else a successor"),
        Step(2, "launcher/attempt/lifecycle.py:begin", "the same script again, on nodes that Slurm chooses"),
        Step(3, "jobs/run/claim.py:claim", "its number is taken by one rename; a ghost of the old attempt may write no more"),
        Step(1, "jobs/checkpoint/directory.py:newest_verified", "resumed at the step that was saved: nothing lost"),
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
    "launcher": ("what a person does", "commands, submitting, both ends of an attempt,|watch, logs, report, sweep, doctor, drill", "typer rich submitit · optuna matplotlib when asked"),
    "slurm": ("all that knows Slurm", "script and its quoting, clients, job states,|site files, the private lab", "jinja2 · sbatch squeue sacct scontrol"),
    "jobs": ("what a job is", "settings and their layers, precision, run directory,|ledger, signals and exit codes, verdict", "pydantic yaml"),
    "train": ("what a GPU does", "models, data, step, checkpoint, stop, metrics;|one process per GPU, knows nothing of Slurm", "torch accelerate numpy safetensors"),
}  # fmt: skip


def house() -> str:
    """The four packages and the ways in which they may import each other."""
    wide, high, gap = 324, 104, 56
    at = {"launcher": (20, 40), "slurm": (20 + wide + gap, 40), "jobs": (20 + 2 * (wide + gap), 40), "train": (20 + 2 * (wide + gap), 40 + high + gap)}
    width, height = 40 + 3 * wide + 2 * gap, 60 + 2 * high + gap
    parts = [_frame(width, height, "The house: launcher imports slurm and jobs, slurm imports jobs, train imports jobs")]
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
    words = ("An arrow means: may import. launcher and train meet on disk only,", "in the run directory: job.yaml one way, ledger, markers, metrics and", "checkpoints the other. So a node needs no launcher to train, and the", "launcher no torch to say what a run is doing.")  # fmt: skip
    parts += [f'<text x="{x + 4}" y="{y + 24 + 18 * n}">{line}</text>' for n, line in enumerate(words)]
    return "\n".join([*parts, "</svg>\n"])


# -- the page ----------------------------------------------------------------------------------------------------------


def modules() -> dict[str, str]:
    """`jobs/run/permissions.py` -> the first paragraph of its docstring, for every module of the house that has anything in it."""
    paths = [ROOT / "holdfast.py", *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))]
    said = {path.relative_to(ROOT).as_posix(): ast.get_docstring(ast.parse(path.read_text())) for path in paths if path.stat().st_size}
    return {name: " ".join((doc or "").split("\n\n")[0].split()) for name, doc in said.items()}


def _modules_table(package: str) -> str:
    rows = [f"| `{name}` | {line.replace('|', chr(92) + '|')} |" for name, line in modules().items() if name.startswith(f"{package}/")]
    return "\n".join(["| module | what it is |", "|---|---|", *rows])


def _walk_table(walk: Walk) -> str:
    rows = [f"| {index} | `{step.place}` | {step.what} |" for index, step in enumerate(walk.steps, 1)]
    return "\n".join(["| | where | what happens |", "|---|---|---|", *rows])


def page(text: str) -> str:
    """The page with everything between its marks written anew."""
    blocks = {f"walk {walk.name}": _walk_table(walk) for walk in WALKS} | {f"modules {package}": _modules_table(package) for package in PACKAGES}
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

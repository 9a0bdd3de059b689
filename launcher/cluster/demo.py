"""`holdfast demo`: preemption and resume on a private Slurm cluster, in 1 to 7 minutes.

A small language model trains on 2 nodes x 2 ranks, a job of higher priority takes its nodes away, Slurm puts it back into
the queue, and it goes on from its checkpoint. Without Slurm the same job runs through submitit's local executor, one of
its ranks is killed, and the text says what was therefore not shown.
"""

import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.config.overrides import words_from_make
from jobs.core.contract import LOCAL, Event, Exit
from jobs.core.errors import HoldfastError
from jobs.run import event_log, metrics_log
from jobs.run.rundir import RunDir
from launcher.local.executor import pid_of_rank
from launcher.output import settings_table
from launcher.report import plots
from launcher.status import run_status
from launcher.status.run_status import RunStatus
from launcher.submission.create_run import prepare, resolve_here
from slurm.client import Slurm
from slurm.devcluster import lab

# The interruption comes after this share of the steps: late enough for a checkpoint, early enough for a second half.
INTERRUPT_AT = 0.4
# The demo gives up after so many seconds: it ends by itself on any machine.
# 376 s were measured on two idle cores, 505 s on two busy ones.
LIMIT_S = 1200.0
_POLL_S = 0.2


class Story:
    """What has happened so far: live on a terminal, line by line in a pipe."""

    def __init__(self, console: Console):
        self.console, self.begun = console, time.monotonic()
        self._last_step = 0

    def tell(self, text: str) -> None:
        self.console.print(Text(f"{time.monotonic() - self.begun:5.0f} s  {text}"), soft_wrap=not self.console.is_terminal)

    def picture(self, row: RunStatus) -> Group:
        last = Text(f"         step {row.step:,}/{row.max_steps:,}")
        if row.loss is not None:
            last.append(f" · loss {row.loss:.3f}")
        if row.tokens_per_s and row.state == "running":
            last.append(f" · {row.tokens_per_s:,.0f} tokens/s")
        grid = Table.grid(padding=(0, 1))
        grid.add_row(Text(f"         {row.state:9}"), ProgressBar(total=row.max_steps, completed=row.step, width=50))
        return Group(grid, last)

    def plain(self, row: RunStatus) -> None:
        """A line now and then, where nothing can be redrawn."""
        if row.step >= self._last_step + row.max_steps // 6:
            self._last_step = row.step
            loss = f", loss {row.loss:.3f}" if row.loss is not None else ""
            self.tell(f"step {row.step:,}/{row.max_steps:,}{loss}")


def demo(words: list[str]) -> int:
    """Shows it with the settings of `words`, and those of make; returns the exit code of the command."""
    console = Console(highlight=False)
    missing = lab.missing_programs()
    # bf16 is what it shows where a person says nothing else.
    words = words if any(re.match("(--)?precision\\b", word, re.I) for word in [*words_from_make(os.environ), *words]) else ["PRECISION=bf16", *words]
    story = Story(console)
    try:
        return _without_slurm(story, words, missing) if missing else _on_lab(story, words)
    except KeyboardInterrupt:
        console.print("interrupted; the private cluster is stopped")
        return Exit.INTERRUPTED
    except HoldfastError as err:
        print(err, file=sys.stderr)
        return err.exit_code


def _on_lab(story: Story, words: list[str]) -> int:
    from launcher.submission.submitit_executor import to_slurm

    room = Path(tempfile.mkdtemp(prefix="holdfast-demo-"))
    here: lab.Lab | None = None
    try:
        here = lab.start(room / "lab", lab.LabConfig())
        os.environ.update(here.env())
        os.environ["HOLDFAST_SITE"] = "lab"
        slurm = Slurm()
        story.tell(f"a private Slurm of {here.config.nodes} virtual nodes runs in {here.root} (real slurmctld and slurmd, loopback only)")
        resolved = resolve_here(words, os.environ, Path.cwd())
        run, _ = prepare(resolved, Path.cwd(), sys.executable)
        job_id = to_slurm(run, resolved.job, os.environ)
        story.tell(settings_table.headline(resolved.job))
        story.tell(f"submitted job {job_id} as run {run.id}  ->  {run_status.near(run.path)}/")

        def interrupt() -> None:
            taker = slurm.run(
                "sbatch",
                "--parsable",
                "--partition=high",
                "--exclusive",
                f"--nodes={here.config.nodes}",
                "--job-name=urgent",
                "--output=/dev/null",
                "--wrap=sleep 2",
            ).strip()
            story.tell(f"job {taker} of partition high, which goes before low, asks for all nodes: Slurm preempts our run")

        _follow(story, run, interrupt, slurm)
    finally:
        if here is not None:
            here.stop()
        shutil.rmtree(room, ignore_errors=True)
    return _summary(story, run, ())


def _without_slurm(story: Story, words: list[str], missing: list[str]) -> int:
    from launcher.submission.submitit_executor import to_local

    story.tell(f"no Slurm here (missing: {', '.join(missing)}), so this machine runs the job by submitit's local executor")
    story.tell(f"to see it on a real Slurm: {lab.how_to_install()}; then again")
    resolved = resolve_here([*words, "DEVICE=cpu"], os.environ, Path.cwd())
    run, _ = prepare(resolved, Path.cwd(), sys.executable)
    started = to_local(run, resolved.job)
    story.tell(settings_table.headline(resolved.job))
    story.tell(f"started as {LOCAL}{started.job_id}, run {run.id}  ->  {run_status.near(run.path)}/")

    def interrupt() -> None:
        victim = pid_of_rank(run, resolved.job.world_size - 1)
        if victim is not None:
            os.kill(victim, signal.SIGKILL)
            story.tell(f"rank {resolved.job.world_size - 1} (process {victim}) is killed without warning")

    try:
        _follow(story, run, interrupt, None)
    finally:
        if not started.done():
            started.cancel()
    return _summary(story, run, ("preemption by Slurm and its warning", "requeue by Slurm", "several nodes"))


def _follow(story: Story, run: RunDir, interrupt: Callable[[], None], slurm: Slurm | None) -> None:
    """Shows the run until it is over, and interrupts it once."""
    interrupted = False
    told = 0
    live = Live(console=story.console, refresh_per_second=8, transient=True) if story.console.is_terminal else None
    with live or nullcontext():
        while time.monotonic() - story.begun < LIMIT_S:
            queue = slurm.queue() if slurm else None
            row = run_status.collect([run], queue)[0]
            events = event_log.read(run.ledger)
            for event in events[told:]:
                _tell_event(story, event)
            told = len(events)
            if live:
                live.update(story.picture(row))
            else:
                story.plain(row)
            if not interrupted and row.step >= INTERRUPT_AT * row.max_steps and row.checkpoint_step:
                interrupted = True
                interrupt()
            attempts = event_log.attempts(events)
            over = bool(attempts) and attempts[-1].cause is not None and row.state not in ("running", "waiting")
            if over and (slurm is None or not slurm.queue()):
                return
            time.sleep(_POLL_S)
    raise HoldfastError(f"the demo did not end within {LIMIT_S:.0f} s; holdfast logs {run.id} shows how far it came")


def _tell_event(story: Story, event: dict[str, object]) -> None:
    kind = event["event"]
    if kind == Event.START:
        nodes = event.get("nodes")
        story.tell(f"attempt {event['attempt']} starts on {', '.join(map(str, nodes)) if isinstance(nodes, list) else '?'}, {event['world']} ranks")
    elif kind == Event.RESUMED and event["step"]:
        story.tell(f"resumed from its checkpoint at step {event['step']}")
    elif kind == Event.STOP:
        story.tell(f"all ranks agreed to stop after SIG{event['signal']} and saved step {event['step']}")
    elif kind == Event.END:
        story.tell(f"attempt {event['attempt']} ended: {str(event['cause']).replace('_', ' ')} ({event['evidence']}), {event['lost_steps']} steps lost")
    elif kind == Event.REQUEUE:
        story.tell(f"back in the queue: {event['way']}")


def _summary(story: Story, run: RunDir, not_shown: tuple[str, ...]) -> int:
    attempts = event_log.attempts(event_log.read(run.ledger))
    lines = [line for line in metrics_log.read(run.metrics) if "val_loss" in line]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("attempt", "steps", "seconds", "ended by", "steps lost"):
        table.add_column(column)
    for attempt in attempts:
        seconds = f"{attempt.ended - attempt.started:.0f}" if attempt.ended else ""
        table.add_row(
            str(attempt.number),
            f"{attempt.start_step} to {attempt.step}",
            seconds,
            attempt.cause.value.replace("_", " ") if attempt.cause else "-",
            str(attempt.lost_steps),
        )
    story.console.print()
    story.console.print(table)
    story.console.print()
    if lines:
        first, last = lines[0], lines[-1]
        text = f"validation loss   {first['val_loss']:.3f} at step {first['step']}, {last['val_loss']:.3f} at step {last['step']}"
        if "val_bits_per_byte" in last:
            text += f"  =  {last['val_bits_per_byte']:.2f} bits per byte; the bytes' own entropy is {last['val_entropy_bits_per_byte']:.2f}"
        story.console.print(text, soft_wrap=True)
    story.console.print(f"run directory     {run_status.near(run.path)}/")
    picture = plots.draw(run)
    if picture:
        story.console.print(f"loss curve        {run_status.near(picture)}")
    if not_shown:
        story.console.print(f"not shown         {', '.join(not_shown)}: that needs Slurm")
    story.console.print(f"took              {time.monotonic() - story.begun:.0f} s")
    finished = bool(attempts) and attempts[-1].cause is not None and attempts[-1].cause.value == "finished"
    if not finished:
        story.console.print(f"the run did not finish; holdfast logs {run.id} says why")
    return Exit.DONE if finished else Exit.FAILED

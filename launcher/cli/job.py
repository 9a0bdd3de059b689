"""Commands that take a job: render, explain, submit, sweep, run."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.options import HINT, SETTINGS, Json, group

app = group()


@app.command(context_settings=SETTINGS, options_metavar=HINT)
def render(ctx: typer.Context) -> None:
    """Print the script that submit would submit, byte for byte."""
    from launcher.submission.create_run import resolve_here
    from slurm.script.render import run_dir_of, script_for

    resolved = resolve_here(list(ctx.args), os.environ, Path.cwd())
    sys.stdout.write(script_for(resolved.job, run_dir_of(resolved.job, Path.cwd()), sys.executable))


@app.command(context_settings=SETTINGS, options_metavar=HINT)
def explain(
    ctx: typer.Context,
    as_json: Json = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a job file.")] = False,
    curve: Annotated[bool, typer.Option("--curve", help="Draw the learning rate over the run instead; with FILE.png behind it, into that file.")] = False,
) -> None:
    """Show every setting, its value, where it comes from, and what it means."""
    from launcher.output import settings_table
    from launcher.submission.create_run import resolve_here

    if schema:
        print(settings_table.schema())
        return
    words = list(ctx.args)
    if curve:
        from launcher.report import lr_plot

        pictures = [word for word in words if word.lower().endswith(lr_plot.PICTURES) and "=" not in word]
        resolved = resolve_here([word for word in words if word not in pictures], os.environ, Path.cwd())
        lr_plot.show(resolved.job, Path(pictures[0]) if pictures else None, as_json)
        return
    resolved = resolve_here(words, os.environ, Path.cwd())
    settings_table.explain(resolved, as_json)


@app.command(context_settings=SETTINGS, options_metavar=HINT)
def submit(
    ctx: typer.Context,
    local: Annotated[bool, typer.Option("--local", help="Run on this machine, in the background, without Slurm.")] = False,
    test_only: Annotated[bool, typer.Option("--test-only", help="Ask Slurm when it would start; submit nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the run is over, with its exit code.")] = False,
    array: Annotated[
        list[str] | None,
        typer.Option("--array", metavar="KEY=V1,V2 | KEY=1..20", help="One run for each value, as one job array; may be given again for a grid."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Submit a job to Slurm; prints its run directory and job id."""
    from launcher.commands.submit import submit_job

    raise typer.Exit(submit_job(list(ctx.args), Path.cwd(), local=local, test_only=test_only, wait=wait, array=array or [], as_json=as_json))


@app.command(context_settings=SETTINGS, options_metavar="[JOB | show SWEEP | cancel SWEEP] [KEY=value | --key value]...")
def sweep(
    ctx: typer.Context,
    over: Annotated[
        list[str] | None, typer.Option("--over", metavar="KEY=V1,V2 | KEY=LOW..HIGH[:log|:step=N]", help="A setting that varies; may be given again.")
    ] = None,
    space: Annotated[
        str | None, typer.Option("--space", metavar="FILE", help="YAML file with `over:` and any of these options; the command line wins.")
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", metavar="N", help="Runs in all. A grid has as many as it has points.")] = None,
    parallel: Annotated[str | None, typer.Option("--parallel", metavar="N", help="Trials at the same time.")] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", metavar="grid|random|tpe", help="Who chooses the values.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="What is compared: a name in metrics.jsonl; val_loss when left out.")] = None,
    direction: Annotated[str | None, typer.Option("--direction", metavar="minimize|maximize", help="Whether less or more of it is better.")] = None,
    value: Annotated[str | None, typer.Option("--value", metavar="last|best", help="Which of a run's validations counts.")] = None,
    pruner: Annotated[str | None, typer.Option("--pruner", metavar="none|median", help="Give trials up that do worse than the median of the others.")] = None,
    prune_startup: Annotated[int | None, typer.Option("--prune-startup", metavar="N", help="Trials that must be over before.")] = None,
    prune_after: Annotated[int | None, typer.Option("--prune-after", metavar="STEPS", help="Steps that every trial may make.")] = None,
    sampler_seed: Annotated[int | None, typer.Option("--sampler-seed", metavar="N", help="Seed of the sampler.")] = None,
    resume: Annotated[str | None, typer.Option("--resume", metavar="SWEEP", help="Start what is missing of a sweep; with --trials, add more.")] = None,
    local: Annotated[bool, typer.Option("--local", help="One trial after the other on this machine, without Slurm.")] = False,
    test_only: Annotated[bool, typer.Option("--test-only", help="Check everything and ask Slurm when it would start; submit nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show the trials until all are over; 0 when one finished.")] = False,
    as_json: Json = False,
) -> None:
    """Search settings: a grid, or an Optuna study, as one job array of ordinary runs."""
    from launcher.commands.sweep import command

    options = {"trials": trials, "parallel": parallel, "sampler": sampler, "metric": metric, "direction": direction, "value": value, "pruner": pruner}
    options |= {"prune_startup": prune_startup, "prune_after": prune_after, "sampler_seed": sampler_seed}
    raise typer.Exit(
        command(
            list(ctx.args),
            Path.cwd(),
            over=over or [],
            file=space,
            options=options,
            resumed=resume,
            local=local,
            test_only=test_only,
            wait=wait,
            as_json=as_json,
        )
    )


@app.command(context_settings=SETTINGS, options_metavar=HINT)
def run(ctx: typer.Context) -> None:
    """Train here and now in the foreground, without Slurm: same run directory, same resume."""
    from launcher.commands.submit import run_here

    raise typer.Exit(run_here(list(ctx.args), Path.cwd()))

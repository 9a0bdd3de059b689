"""Commands that take a run: what it is doing, stopping it, starting it again, comparing and clearing away; its checkpoints."""

import os
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.options import RUN_HINT, SETTINGS, Json, group

app = group()
ckpt_app = group("Checkpoints of a run: list, verify, export.")


@app.command(context_settings=SETTINGS, options_metavar=RUN_HINT)
def status(
    ctx: typer.Context, as_json: Json = False, every: Annotated[bool, typer.Option("--all", help="Also runs that ended more than a day ago.")] = False
) -> None:
    """Show what the runs are doing."""
    from launcher.status import run_status
    from launcher.status.lookup import which_run

    run_status.status(*which_run(list(ctx.args), os.environ, Path.cwd()), as_json, every)


@app.command(context_settings=SETTINGS, options_metavar=RUN_HINT)
def watch(
    ctx: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="One plain table, as where there is no terminal.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Also runs that ended more than a day ago.")] = False,
) -> None:
    """Watch the runs live; keys read logs, cancel and resume."""
    from launcher.commands.watch import watch as watch_runs
    from launcher.status.lookup import which_run

    watch_runs(*which_run(list(ctx.args), os.environ, Path.cwd()), once, every)


@app.command(context_settings=SETTINGS, options_metavar=RUN_HINT)
def logs(
    ctx: typer.Context,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing until the run is over.")] = False,
    rank: Annotated[
        str, typer.Option("--rank", metavar="0|3|batch|all", help="Whose log: a rank, batch for the script's, or all with the rank before each line.")
    ] = "0",
    attempt: Annotated[
        str | None, typer.Option("--attempt", metavar="N|all", help="Which attempt; the newest when left out, and with -f all that come after it.")
    ] = None,
) -> None:
    """Print what a run's newest attempt wrote; with -f, go on over requeues until the run is over."""
    from launcher.commands.logs import print_logs
    from launcher.status.lookup import find_task

    print_logs(find_task(list(ctx.args), os.environ, Path.cwd()), rank, attempt, follow)


@app.command(context_settings=SETTINGS, options_metavar=RUN_HINT)
def cancel(ctx: typer.Context) -> None:
    """Stop a run for good; it saves a checkpoint first, and `resume` can start it again."""
    from launcher.commands.submit import cancel_run
    from launcher.status.lookup import find_run

    cancel_run(find_run(list(ctx.args), os.environ, Path.cwd()))


@app.command(context_settings=SETTINGS, options_metavar=f"{RUN_HINT} [KEY=value]...")
def resume(
    ctx: typer.Context,
    local: Annotated[bool, typer.Option("--local", help="Here and now, in the foreground.")] = False,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Also settings that make another training of it: MAX_STEPS, BATCH_SIZE, SEED, DATA, LR and the like.")
    ] = False,
) -> None:
    """Start a run again that was stopped, cancelled or given up; also at another size or precision (NODES=1 PRECISION=fp32)."""
    from launcher.commands.submit import resume_run
    from launcher.status.lookup import run_and_settings

    run, settings = run_and_settings(list(ctx.args), os.environ, Path.cwd())
    raise typer.Exit(resume_run(run, local, settings, allow_change))


@app.command(context_settings=SETTINGS, options_metavar="[RUN] [RUNS_DIR=folder] [KEY=value]...")
def rerun(
    ctx: typer.Context,
    current_code: Annotated[bool, typer.Option("--with-current-code", help="The working tree as it is now, instead of the frozen copy.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Here and now, in the foreground.")] = False,
    as_json: Json = False,
) -> None:
    """Start a run again from its first step as a new run: same code, settings and seed; says what differs."""
    from launcher.commands.rerun import rerun as rerun_run
    from launcher.status.lookup import run_and_settings

    source, settings = run_and_settings(list(ctx.args), os.environ, Path.cwd())
    raise typer.Exit(rerun_run(source, settings, Path.cwd(), current_code=current_code, local=local, as_json=as_json))


@app.command(context_settings=SETTINGS, options_metavar="RUN RUN [RUNS_DIR=folder]")
def diff(ctx: typer.Context, code: Annotated[bool, typer.Option("--code", help="Also the changed lines of the code.")] = False, as_json: Json = False) -> None:
    """Compare two runs: settings, code, library versions, results. 0 when nothing differs, 1 when something does."""
    from launcher.commands.diff import diff as diff_runs
    from launcher.commands.diff import named_pair
    from launcher.status.lookup import runs_named

    folder, runs = runs_named(list(ctx.args), os.environ, Path.cwd())
    raise typer.Exit(diff_runs(*named_pair(runs, folder), code=code, as_json=as_json))


@app.command(context_settings=SETTINGS, options_metavar="[RUN]... [RUNS_DIR=folder]")
def clean(
    ctx: typer.Context,
    older: Annotated[
        str | None, typer.Option("--older", metavar="30d", help="Runs last touched longer ago than this: hours (h), days (d) or weeks (w).")
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Runs that failed.")] = False,
    keep_checkpoints: Annotated[bool, typer.Option("--keep-checkpoints", help="Everything but checkpoints, settings, ledger and metrics.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this, only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Remove runs that are over. Says what would go and what stays until it is told --yes."""
    from launcher.commands.clean import clean as clean_runs
    from launcher.status.lookup import runs_named

    folder, runs = runs_named(list(ctx.args), os.environ, Path.cwd())
    raise typer.Exit(clean_runs(folder, runs, older=older, failed=failed, keep_checkpoints=keep_checkpoints, yes=yes, as_json=as_json))


@app.command(context_settings=SETTINGS, options_metavar="[RUN]... [RUNS_DIR=folder]")
def report(
    ctx: typer.Context,
    out: Annotated[Path | None, typer.Option("--out", help="File to write; report.html in the run directory when left out.")] = None,
    as_json: Json = False,
) -> None:
    """Write one page with curves, attempts, useful time, settings and code of a run, or of several to compare."""
    from jobs.run import store
    from launcher.report.render import write_report
    from launcher.status.lookup import runs_named

    folder, runs = runs_named(list(ctx.args), os.environ, Path.cwd())
    raise typer.Exit(write_report(runs or [store.find(None, folder)], out, as_json))


@ckpt_app.command("ls", context_settings=SETTINGS, options_metavar=RUN_HINT)
def ckpt_ls(ctx: typer.Context, as_json: Json = False) -> None:
    """Show the checkpoints of a run by their names and manifests."""
    from launcher.commands.checkpoints import list_checkpoints
    from launcher.status.lookup import find_task

    raise typer.Exit(list_checkpoints(find_task(list(ctx.args), os.environ, Path.cwd()), as_json))


@ckpt_app.command("verify", context_settings=SETTINGS, options_metavar=RUN_HINT)
def ckpt_verify(ctx: typer.Context, as_json: Json = False) -> None:
    """Read every byte of every checkpoint; 0 when all are whole, 1 when one is damaged. Changes nothing."""
    from launcher.commands.checkpoints import verify_checkpoints
    from launcher.status.lookup import find_task

    raise typer.Exit(verify_checkpoints(find_task(list(ctx.args), os.environ, Path.cwd()), as_json))


@ckpt_app.command("export", context_settings=SETTINGS, options_metavar=RUN_HINT)
def ckpt_export(
    ctx: typer.Context,
    step: Annotated[int | None, typer.Option("--step", help="Which one; the newest when left out.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New folder for it.")] = None,
    form: Annotated[str, typer.Option("--form", help="hf: what transformers loads. plain: weights by our names.")] = "hf",
) -> None:
    """Write a checkpoint as safetensors for other tools."""
    from launcher.commands.checkpoints import export
    from launcher.status.lookup import find_task

    raise typer.Exit(export(find_task(list(ctx.args), os.environ, Path.cwd()), step, out, form))

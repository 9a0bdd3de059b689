"""The command line: `holdfast COMMAND`. Each command says first what happened, then where it is, then what to do next."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs import access
from jobs.contract import Exit
from jobs.errors import HoldfastError

# Settings are words of their own (KEY=value, --key value), so every job command takes whatever typer does not know.
_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
_HINT = "[JOB] [KEY=value | --key value]..."

app = typer.Typer(
    name="holdfast",
    help="Launches training jobs on Slurm clusters and brings them to their end.",
    epilog="JOB is a job file (jobs/quickstart.yaml when left out), RUN a run directory, its id or its name (the newest when left out). Settings: holdfast explain",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
lab_app = typer.Typer(help="A private, real Slurm cluster in one directory.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(lab_app, name="lab")
ckpt_app = typer.Typer(help="Checkpoints of a run: list, verify, export.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(ckpt_app, name="ckpt")
verify_app = typer.Typer(help="Proofs on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(verify_app, name="verify")
data_app = typer.Typer(help="Token files for training.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="Answer for programs, on standard output.")]
_RUN_HINT = "[RUN] [RUNS_DIR=folder]"


def _words(ctx: typer.Context) -> list[str]:
    return list(ctx.args)


@app.command(context_settings=_SETTINGS, options_metavar=_HINT)
def render(ctx: typer.Context) -> None:
    """Print the script that submit would submit, byte for byte."""
    from jobs.setting_names import variables
    from launcher import entry
    from launcher.prepare import resolve_here
    from slurm.render import own_files, run_dir_of, script_for

    resolved = resolve_here(_words(ctx), os.environ, Path.cwd())
    text = script_for(resolved.job, run_dir_of(resolved.job, Path.cwd()), sys.executable)
    measured = resolved.origins["precision"].startswith("auto")  # a newer measurement may come at any time
    if sys.argv[2:] == list(ctx.args) and not measured:  # not when another program calls this with words of its own
        entry.keep(sys.argv[2:], variables(), [*resolved.files, *own_files()], text)
    sys.stdout.write(text)


@app.command(context_settings=_SETTINGS, options_metavar=_HINT)
def explain(
    ctx: typer.Context,
    as_json: Json = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a job file.")] = False,
    curve: Annotated[bool, typer.Option("--curve", help="Draw the learning rate over the run instead; with FILE.png behind it, into that file.")] = False,
) -> None:
    """Show every setting, its value, where it comes from, and what it means."""
    from launcher import show
    from launcher.prepare import resolve_here

    if schema:
        print(show.schema())
        return
    words = _words(ctx)
    if curve:
        from launcher import lr_curve

        pictures = [word for word in words if word.lower().endswith(lr_curve.PICTURES) and "=" not in word]
        resolved = resolve_here([word for word in words if word not in pictures], os.environ, Path.cwd())
        lr_curve.show(resolved.job, Path(pictures[0]) if pictures else None, as_json)
        return
    resolved = resolve_here(words, os.environ, Path.cwd())
    show.explain(resolved, as_json)


@app.command(context_settings=_SETTINGS, options_metavar=_HINT)
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
    from launcher.commands import submit_job

    raise typer.Exit(submit_job(_words(ctx), Path.cwd(), local=local, test_only=test_only, wait=wait, array=array or [], as_json=as_json))


@app.command(context_settings=_SETTINGS, options_metavar="[JOB | show SWEEP | cancel SWEEP] [KEY=value | --key value]...")
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
    from launcher.sweep import command

    options = {"trials": trials, "parallel": parallel, "sampler": sampler, "metric": metric, "direction": direction, "value": value, "pruner": pruner}
    options |= {"prune_startup": prune_startup, "prune_after": prune_after, "sampler_seed": sampler_seed}
    raise typer.Exit(
        command(
            _words(ctx), Path.cwd(), over=over or [], file=space, options=options, resumed=resume, local=local, test_only=test_only, wait=wait, as_json=as_json
        )
    )


@app.command(context_settings=_SETTINGS, options_metavar=_HINT)
def run(ctx: typer.Context) -> None:
    """Train here and now in the foreground, without Slurm: same run directory, same resume."""
    from launcher.commands import run_here

    raise typer.Exit(run_here(_words(ctx), Path.cwd()))


@app.command(context_settings=_SETTINGS, options_metavar=_RUN_HINT)
def status(
    ctx: typer.Context, as_json: Json = False, every: Annotated[bool, typer.Option("--all", help="Also runs that ended more than a day ago.")] = False
) -> None:
    """Show what the runs are doing."""
    from launcher import show
    from launcher.prepare import which_run

    show.status(*which_run(_words(ctx), os.environ, Path.cwd()), as_json, every)


@app.command(context_settings=_SETTINGS, options_metavar=_RUN_HINT)
def watch(
    ctx: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="One plain table, as where there is no terminal.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Also runs that ended more than a day ago.")] = False,
) -> None:
    """Watch the runs live; keys read logs, cancel and resume."""
    from launcher.prepare import which_run
    from launcher.watch import watch as watch_runs

    watch_runs(*which_run(_words(ctx), os.environ, Path.cwd()), once, every)


@app.command(context_settings=_SETTINGS, options_metavar=_RUN_HINT)
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
    from launcher.logs import print_logs
    from launcher.prepare import find_run

    print_logs(find_run(_words(ctx), os.environ, Path.cwd()), rank, attempt, follow)


@app.command(context_settings=_SETTINGS, options_metavar=_RUN_HINT)
def cancel(ctx: typer.Context) -> None:
    """Stop a run for good; it saves a checkpoint first, and `resume` can start it again."""
    from launcher.commands import cancel_run
    from launcher.prepare import find_run

    cancel_run(find_run(_words(ctx), os.environ, Path.cwd()))


@app.command(context_settings=_SETTINGS, options_metavar=f"{_RUN_HINT} [KEY=value]...")
def resume(
    ctx: typer.Context,
    local: Annotated[bool, typer.Option("--local", help="Here and now, in the foreground.")] = False,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Also settings that make another training of it: MAX_STEPS, BATCH_SIZE, SEED, DATA, LR and the like.")
    ] = False,
) -> None:
    """Start a run again that was stopped, cancelled or given up; also at another size or precision (NODES=1 PRECISION=fp32)."""
    from launcher.commands import resume_run
    from launcher.prepare import find_run, split_run_words

    naming, settings = split_run_words(_words(ctx), os.environ)
    raise typer.Exit(
        resume_run(find_run(naming, {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}, Path.cwd()), local, settings, allow_change)
    )


@app.command(context_settings=_SETTINGS, options_metavar="[RUN] [RUNS_DIR=folder] [KEY=value]...")
def rerun(
    ctx: typer.Context,
    current_code: Annotated[bool, typer.Option("--with-current-code", help="The working tree as it is now, instead of the frozen copy.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Here and now, in the foreground.")] = False,
    as_json: Json = False,
) -> None:
    """Start a run again from its first step as a new run: same code, settings and seed; says what differs."""
    from launcher.prepare import find_run, split_run_words
    from launcher.rerun import rerun as rerun_run

    naming, settings = split_run_words(_words(ctx), os.environ)
    source = find_run(naming, {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}, Path.cwd())
    raise typer.Exit(rerun_run(source, settings, Path.cwd(), current_code=current_code, local=local, as_json=as_json))


@app.command(context_settings=_SETTINGS, options_metavar="RUN RUN [RUNS_DIR=folder]")
def diff(ctx: typer.Context, code: Annotated[bool, typer.Option("--code", help="Also the changed lines of the code.")] = False, as_json: Json = False) -> None:
    """Compare two runs: settings, code, library versions, results. 0 when nothing differs, 1 when something does."""
    from launcher.choose import runs_named
    from launcher.compare import diff as diff_runs
    from launcher.compare import named_pair

    folder, runs = runs_named(_words(ctx), os.environ, Path.cwd())
    raise typer.Exit(diff_runs(*named_pair(runs, folder), code=code, as_json=as_json))


@app.command(context_settings=_SETTINGS, options_metavar="[RUN]... [RUNS_DIR=folder]")
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
    from launcher.choose import runs_named
    from launcher.clean import clean as clean_runs

    folder, runs = runs_named(_words(ctx), os.environ, Path.cwd())
    raise typer.Exit(clean_runs(folder, runs, older=older, failed=failed, keep_checkpoints=keep_checkpoints, yes=yes, as_json=as_json))


@app.command(context_settings=_SETTINGS, options_metavar="[RUN]... [RUNS_DIR=folder]")
def report(
    ctx: typer.Context,
    out: Annotated[Path | None, typer.Option("--out", help="File to write; report.html in the run directory when left out.")] = None,
    as_json: Json = False,
) -> None:
    """Write one page with curves, attempts, useful time, settings and code of a run, or of several to compare."""
    from jobs import rundir
    from launcher.choose import runs_named
    from launcher.report_page import write_report

    folder, runs = runs_named(_words(ctx), os.environ, Path.cwd())
    raise typer.Exit(write_report(runs or [rundir.find(None, folder)], out, as_json))


@ckpt_app.command("ls", context_settings=_SETTINGS, options_metavar=_RUN_HINT)
def ckpt_ls(ctx: typer.Context, as_json: Json = False) -> None:
    """Show the checkpoints of a run by their names and manifests."""
    from launcher.ckpt import list_checkpoints
    from launcher.prepare import find_run

    raise typer.Exit(list_checkpoints(find_run(_words(ctx), os.environ, Path.cwd()), as_json))


@ckpt_app.command("verify", context_settings=_SETTINGS, options_metavar=_RUN_HINT)
def ckpt_verify(ctx: typer.Context, as_json: Json = False) -> None:
    """Read every byte of every checkpoint; 0 when all are whole, 1 when one is damaged. Changes nothing."""
    from launcher.ckpt import verify_checkpoints
    from launcher.prepare import find_run

    raise typer.Exit(verify_checkpoints(find_run(_words(ctx), os.environ, Path.cwd()), as_json))


@ckpt_app.command("export", context_settings=_SETTINGS, options_metavar=_RUN_HINT)
def ckpt_export(
    ctx: typer.Context,
    step: Annotated[int | None, typer.Option("--step", help="Which one; the newest when left out.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New folder for it.")] = None,
    form: Annotated[str, typer.Option("--form", help="hf: what transformers loads. plain: weights by our names.")] = "hf",
) -> None:
    """Write a checkpoint as safetensors for other tools."""
    from launcher.ckpt import export
    from launcher.prepare import find_run

    raise typer.Exit(export(find_run(_words(ctx), os.environ, Path.cwd()), step, out, form))


@verify_app.command("resume", context_settings=_SETTINGS, options_metavar=_HINT)
def verify_resume_command(
    ctx: typer.Context,
    kills: Annotated[int, typer.Option("--kills", min=1, help="How often each run is killed.")] = 3,
    changes: Annotated[
        list[str] | None,
        typer.Option("--change", metavar="KEY=value", help="Also resume with this changed, such as GPUS_PER_NODE=1 or PRECISION=fp32; may be given again."),
    ] = None,
    seed: Annotated[int, typer.Option("--kill-seed", help="Chooses the moments of the kills.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the runs.")] = False,
    as_json: Json = False,
) -> None:
    """Train straight, then killed and resumed, and compare bits of weights and losses."""
    from launcher.verify import verify_resume

    raise typer.Exit(verify_resume(_words(ctx), Path.cwd(), kills=kills, changes=changes or [], seed=seed, keep=keep, as_json=as_json))


@verify_app.command("autocast", context_settings=_SETTINGS, options_metavar="[MODEL] [KEY=value]...")
def verify_autocast_command(
    ctx: typer.Context,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Steps in each precision.")] = 5,
    as_json: Json = False,
) -> None:
    """Check that a model trains in every precision of this machine; names the first module that overflows."""
    from launcher.verify_autocast import verify_autocast

    words = _words(ctx)
    # A first word that is neither a setting nor a job file is the model itself.
    model = words.pop(0) if words and "=" not in words[0] and not words[0].startswith("-") and not words[0].endswith(".yaml") else None
    raise typer.Exit(verify_autocast(model, words, Path.cwd(), steps=steps, as_json=as_json))


@verify_app.command("data", context_settings=_SETTINGS, options_metavar=_RUN_HINT)
def verify_data_command(ctx: typer.Context, as_json: Json = False) -> None:
    """Check that a run used each sample of an epoch exactly once (LOG_SAMPLES=true)."""
    from launcher.prepare import find_run
    from launcher.verify import verify_data

    raise typer.Exit(verify_data(find_run(_words(ctx), os.environ, Path.cwd()), as_json))


@data_app.command("build")
def data_build(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Text, .jsonl(.gz) and .parquet files, folders of them, or data sets by save_to_disk.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for train.bin and val.bin.")],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="PATH", help="A local tokenizer.json, or a folder with one; left out, a byte is a token.")
    ] = None,
    eos: Annotated[
        str | None, typer.Option("--eos", metavar="TOKEN", help="Token that ends a document, none for no such; left out, what the tokenizer says.")
    ] = None,
    column: Annotated[str, typer.Option("--column", help="Column that holds the text.")] = "text",
    val_share: Annotated[float, typer.Option("--val-share", help="Share of the documents for validation.")] = 0.05,
    as_json: Json = False,
) -> None:
    """Build token files; train on them with DATA=tokens:DIR."""
    from launcher.data import build

    raise typer.Exit(build(inputs, out, tokenizer=tokenizer, eos=eos, column=column, val_share=val_share, as_json=as_json))


@app.command(context_settings=_SETTINGS, options_metavar=_HINT)
def precision(
    ctx: typer.Context,
    steps: Annotated[int, typer.Option("--steps", min=6, help="Training steps in each precision.")] = 30,
    only: Annotated[
        str, typer.Option("--only", metavar="WORDS", help="Only modes whose name has one of these words, such as bf16,te; fp32 is always measured.")
    ] = "",
    largest: Annotated[bool, typer.Option("--largest", help="Also look for the largest micro-batch that fits.")] = False,
    tolerance: Annotated[float, typer.Option("--tolerance", min=0.0, help="Largest |loss - loss of fp32|, relative, that is recommended.")] = 0.02,
    as_json: Json = False,
) -> None:
    """Measure every precision for this model on this machine: speed, memory, parity with fp32; recommend one."""
    from launcher.precision import compare

    raise typer.Exit(compare(_words(ctx), os.environ, Path.cwd(), steps=steps, only=only, largest=largest, tolerance=tolerance, as_json=as_json))


@app.command(context_settings=_SETTINGS, options_metavar=_HINT)
def doctor(
    ctx: typer.Context, as_json: Json = False, node: Annotated[bool, typer.Option("--node/--no-node", help="Ask a node what it has, by a short srun.")] = True
) -> None:
    """Say what this cluster will do to a run at preemption and time limit, and what is misconfigured; 1 if something must be fixed."""
    from launcher.doctor import examine

    raise typer.Exit(examine(_words(ctx), os.environ, Path.cwd(), as_json, node))


@app.command(context_settings=_SETTINGS, options_metavar="[FILE] [PARTITION=...] [ACCOUNT=...] [QOS=...]")
def init(
    ctx: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: take the partition with GPUs, and your default account.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    as_json: Json = False,
) -> None:
    """Ask Slurm what this cluster has, and write a site file (site.yaml when no FILE is named)."""
    from launcher.init import init as write_site

    raise typer.Exit(write_site(_words(ctx), os.environ, Path.cwd(), yes=yes, force=force, as_json=as_json))


@app.command(context_settings=_SETTINGS, options_metavar="[KEY=value | --key value]...")
def drill(ctx: typer.Context) -> None:
    """Submit a tiny job, interrupt it for real, and see that it comes back with nothing lost."""
    from launcher.drill import drill as run_drill

    raise typer.Exit(run_drill(_words(ctx), os.environ, Path.cwd()))


@app.command()
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="Which shell.")] = "bash",
    line: Annotated[str | None, typer.Option("--line", hidden=True, help="A command line up to the cursor: print what may follow.")] = None,
) -> None:
    """Print the completion script of a shell: source <(holdfast completion bash)."""
    from launcher import completion as words

    if line is None:
        print(words.script(shell), end="")
    else:
        words.answer(line)


LabDir = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DIR]", envvar="HOLDFAST_LAB", help="Directory of the lab; one per user in the temporary folder when left out.", show_default=False
    ),
]


@lab_app.command("start")
def lab_start(
    directory: LabDir = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=64, help="Virtual nodes.")] = 4,
    grace: Annotated[int, typer.Option("--grace", min=0, help="Seconds between preemption and kill (GraceTime).")] = 0,
    accounting: Annotated[bool, typer.Option("--accounting", help="With slurmdbd and MariaDB, so that sacct works.")] = False,
    preempt_mode: Annotated[str, typer.Option("--preempt-mode", help="REQUEUE or CANCEL.")] = "REQUEUE",
    real_gpus: Annotated[bool, typer.Option("--real-gpus", help="This machine's NVIDIA GPUs instead of stand-ins.")] = False,
) -> None:
    """Boot it: slurmctld, slurmd per node, munged, on loopback."""
    from launcher.lab import start

    start(directory, nodes=nodes, grace=grace, accounting=accounting, preempt_mode=preempt_mode, real_gpus=real_gpus)


@lab_app.command("stop")
def lab_stop(directory: LabDir = None) -> None:
    """End its jobs and daemons; logs stay."""
    from launcher.lab import stop

    stop(directory)


@lab_app.command("status")
def lab_status(directory: LabDir = None) -> None:
    """Show daemons, nodes and jobs."""
    from launcher.lab import status as show_status

    raise typer.Exit(show_status(directory))


@lab_app.command("env")
def lab_env(directory: LabDir = None) -> None:
    """Print the shell lines that point Slurm's clients, and holdfast, at it: eval "$(holdfast lab env)"."""
    from launcher.lab import env

    env(directory)


def main() -> None:
    """Entry point of the console script. Every error that a person can be told ends in one message and its exit code."""
    sys.exit(run_app())


def run_app(arguments: list[str] | None = None) -> int:
    access.keep_to_oneself()
    try:
        app(arguments)
    except HoldfastError as err:
        print(err, file=sys.stderr)
        return err.exit_code
    except OSError as err:
        # A full disk, a folder taken away: what and where, instead of a traceback.
        print(f"{err.strerror or err}{f': {err.filename}' if err.filename else ''}", file=sys.stderr)
        return Exit.FAILED
    except SystemExit as err:
        return err.code if isinstance(err.code, int) else Exit.DONE
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    return Exit.DONE


if __name__ == "__main__":
    main()

"""Commands about this machine and this cluster: measuring, proving, looking after it; the lab."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from launcher.cli.options import HINT, RUN_HINT, SETTINGS, Json, group

app = group()
lab_app = group("A private, real Slurm cluster in one directory.")
verify_app = group("Proofs on this machine.")
data_app = group("Token files for training.")


@app.command(context_settings=SETTINGS, options_metavar=HINT)
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
    from launcher.commands.precision import compare

    raise typer.Exit(compare(list(ctx.args), os.environ, Path.cwd(), steps=steps, only=only, largest=largest, tolerance=tolerance, as_json=as_json))


@app.command(context_settings=SETTINGS, options_metavar=HINT)
def doctor(
    ctx: typer.Context, as_json: Json = False, node: Annotated[bool, typer.Option("--node/--no-node", help="Ask a node what it has, by a short srun.")] = True
) -> None:
    """Say what this cluster will do to a run at preemption and time limit, and what is misconfigured; 1 if something must be fixed."""
    from launcher.cluster.doctor import examine

    raise typer.Exit(examine(list(ctx.args), os.environ, Path.cwd(), as_json, node))


@app.command(context_settings=SETTINGS, options_metavar="[FILE] [PARTITION=...] [ACCOUNT=...] [QOS=...]")
def init(
    ctx: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: take the partition with GPUs, and your default account.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    as_json: Json = False,
) -> None:
    """Ask Slurm what this cluster has, and write a site file (site.yaml when no FILE is named)."""
    from launcher.cluster.init import init as write_site

    raise typer.Exit(write_site(list(ctx.args), os.environ, Path.cwd(), yes=yes, force=force, as_json=as_json))


@app.command(context_settings=SETTINGS, options_metavar="[KEY=value | --key value]...")
def drill(ctx: typer.Context) -> None:
    """Submit a tiny job, interrupt it for real, and see that it comes back with nothing lost."""
    from launcher.cluster.drill import drill as run_drill

    raise typer.Exit(run_drill(list(ctx.args), os.environ, Path.cwd()))


@app.command(context_settings=SETTINGS, options_metavar="[KEY=value | --key value]...")
def demo(ctx: typer.Context) -> None:
    """Train on a private Slurm cluster, be preempted and resume, in 1 to 7 minutes; without Slurm, on the local executor."""
    from launcher.cluster.demo import demo as show_it

    raise typer.Exit(show_it(list(ctx.args)))


@app.command()
def completion(
    ctx: typer.Context,
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="Which shell.")] = "bash",
    line: Annotated[str | None, typer.Option("--line", hidden=True, help="A command line up to the cursor: print what may follow.")] = None,
) -> None:
    """Print the completion script of a shell: source <(holdfast completion bash)."""
    from launcher.cli.completion import answer, script

    if line is None:
        print(script(shell), end="")
    else:
        answer(ctx.find_root().command, line)


@verify_app.command("resume", context_settings=SETTINGS, options_metavar=HINT)
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
    from launcher.verify.resume import verify_resume

    raise typer.Exit(verify_resume(list(ctx.args), Path.cwd(), kills=kills, changes=changes or [], seed=seed, keep=keep, as_json=as_json))


@verify_app.command("autocast", context_settings=SETTINGS, options_metavar="[MODEL] [KEY=value]...")
def verify_autocast_command(
    ctx: typer.Context,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Steps in each precision.")] = 5,
    as_json: Json = False,
) -> None:
    """Check that a model trains in every precision of this machine; names the first module that overflows."""
    from launcher.verify.autocast import verify_autocast

    words = list(ctx.args)
    # A first word that is neither a setting nor a job file is the model itself.
    model = words.pop(0) if words and "=" not in words[0] and not words[0].startswith("-") and not words[0].endswith(".yaml") else None
    raise typer.Exit(verify_autocast(model, words, Path.cwd(), steps=steps, as_json=as_json))


@verify_app.command("data", context_settings=SETTINGS, options_metavar=RUN_HINT)
def verify_data_command(ctx: typer.Context, as_json: Json = False) -> None:
    """Check that a run used each sample of an epoch exactly once (LOG_SAMPLES=true)."""
    from launcher.status.lookup import find_task
    from launcher.verify.data import verify_data

    raise typer.Exit(verify_data(find_task(list(ctx.args), os.environ, Path.cwd()), as_json))


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
    from launcher.commands.data import build

    raise typer.Exit(build(inputs, out, tokenizer=tokenizer, eos=eos, column=column, val_share=val_share, as_json=as_json))


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
    from launcher.cluster.lab import start

    start(directory, nodes=nodes, grace=grace, accounting=accounting, preempt_mode=preempt_mode, real_gpus=real_gpus)


@lab_app.command("stop")
def lab_stop(directory: LabDir = None) -> None:
    """End its jobs and daemons; logs stay."""
    from launcher.cluster.lab import stop

    stop(directory)


@lab_app.command("status")
def lab_status(directory: LabDir = None) -> None:
    """Show daemons, nodes and jobs."""
    from launcher.cluster.lab import status as show_status

    raise typer.Exit(show_status(directory))


@lab_app.command("env")
def lab_env(directory: LabDir = None) -> None:
    """Print the shell lines that point Slurm's clients, and holdfast, at it: eval "$(holdfast lab env)"."""
    from launcher.cluster.lab import env

    env(directory)

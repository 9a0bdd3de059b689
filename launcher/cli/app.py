"""The command line: `holdfast COMMAND`. Each command says first what happened, then where it is, then what to do next."""

import io
import sys
from typing import Annotated

import typer

from jobs.core.contract import Exit
from jobs.core.errors import HoldfastError
from jobs.run import permissions
from launcher.cli import cluster, job, run
from launcher.cli.options import HELP
from launcher.output.streams import flush_output, tolerate_closed_pipes

app = typer.Typer(
    name="holdfast",
    help="Launches training jobs on Slurm clusters and brings them to their end.",
    epilog="JOB is a job file (jobs/quickstart.yaml when left out), RUN a run directory, its id or its name (the newest when left out). Settings: holdfast explain",
    no_args_is_help=True,
    add_completion=False,
    context_settings=HELP,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"holdfast {version('holdfast')}")
        raise typer.Exit


@app.callback()
def options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version, and nothing else.")] = False) -> None:
    """What holds for every command."""


for commands in (job.app, run.app, cluster.app):
    app.add_typer(commands)
app.add_typer(cluster.lab_app, name="lab")
app.add_typer(run.ckpt_app, name="ckpt")
app.add_typer(cluster.verify_app, name="verify")
app.add_typer(cluster.data_app, name="data")


def main() -> None:
    """Entry point of the console script. Every error that a person can be told ends in one message and its exit code."""
    tolerate_closed_pipes()
    sys.exit(flush_output(run_app()))


def run_app(arguments: list[str] | None = None) -> int:
    permissions.keep_to_oneself()
    for stream in (sys.stdout, sys.stderr):
        # A file name may hold bytes that are no text: shown as \\udcff, and no reason to stop.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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

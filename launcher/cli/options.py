"""What commands share: how settings and runs are written behind them, and the answer for programs."""

from typing import Annotated

import typer

# Settings are words of their own (KEY=value, --key value), so every job command takes whatever typer does not know.
HELP = {"help_option_names": ["--help", "-h"]}
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, **HELP}
HINT = "[JOB] [KEY=value | --key value]..."
RUN_HINT = "[RUN] [RUNS_DIR=folder]"
Json = Annotated[bool, typer.Option("--json", help="Answer for programs, on standard output.")]


def group(help: str | None = None) -> typer.Typer:
    """A group of commands. Without help of its own it has no name either: its commands stand at the top."""
    return typer.Typer(help=help, no_args_is_help=True, rich_markup_mode=None, context_settings=HELP)

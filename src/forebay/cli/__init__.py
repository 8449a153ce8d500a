"""The command line: reads settings, calls the rooms, prints.

It refuses to hold logic of its own, and turns every SetupError into one sentence and exit status 1.
"""

from typing import Annotated

import typer

import forebay
from forebay.cli.commands import Commands

app = typer.Typer(
    name="forebay",
    cls=Commands,
    help="One self-hosted server in front of your own AI models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"forebay {forebay.__version__}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and leave."),
    ] = False,
) -> None:
    """One self-hosted server in front of your own AI models."""


def main() -> None:
    """Entry point of the `forebay` command."""
    app()

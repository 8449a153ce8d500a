"""The command line: reads settings, calls the rooms, prints.

It refuses to hold logic of its own, and turns every SetupError into one sentence and exit status 1.
"""

from typing import Annotated

import typer

import forebay
from forebay.cli import batch, bench, chat, db, dead_letters, doctor, jobs, keys, models, serve, worker

app = typer.Typer(
    name="forebay",
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


app.command("serve")(serve.serve)
app.command("worker")(worker.worker)
app.command("chat")(chat.chat)
app.command("doctor")(doctor.doctor)
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
app.add_typer(batch.app, name="batch")
app.add_typer(jobs.app, name="jobs")
app.add_typer(dead_letters.app, name="dead-letters")
app.add_typer(db.app, name="db")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point of the `forebay` command."""
    app()

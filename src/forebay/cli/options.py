"""What every command shares: its options, the reading of settings, and the turning of errors into sentences.

It refuses to let a trace reach a person for anything that went wrong in a way we know.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from forebay import config
from forebay.config import Settings
from forebay.errors import ForebayError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
PIPED_WIDTH = 240  # wide enough for every column of a table, so that a script sees whole values

ConfigFile = Annotated[Path | None, typer.Option("--config", help="Configuration file.")]
DataFolder = Annotated[Path | None, typer.Option("--data-dir", help="Folder of the database and the models.")]


def load_settings(config_file: Path | None, **overrides: Any) -> Settings:
    """The settings of this command. Raises SetupError."""
    return config.load(config_file, config.environment(), overrides)


@contextmanager
def sentences(interrupted: str = "Stopped.") -> Iterator[None]:
    """What goes wrong inside is a sentence on standard error and status 1; Ctrl-C is `interrupted` and status 130."""
    try:
        yield
    except ForebayError as error:
        leave(f"forebay: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        leave(interrupted, EXIT_INTERRUPTED)


def leave(sentence: str, status: int) -> NoReturn:
    """End the command with a last sentence."""
    typer.echo(sentence, err=True)
    raise typer.Exit(status) from None


def loop_factory() -> Any:
    """Makes the fastest event loop that this system has; None leaves it to asyncio."""
    if sys.platform == "win32":
        return None
    import uvloop  # noqa: PLC0415  # there is no uvloop on Windows

    return uvloop.new_event_loop

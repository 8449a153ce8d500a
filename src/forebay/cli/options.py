"""What every command shares: its options, the reading of settings, and the turning of errors into sentences.

It refuses to let a trace reach a person for anything that went wrong in a way we know.
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from forebay import config
from forebay.config import Settings
from forebay.errors import ForebayError, SetupError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
_T = TypeVar("_T")
PIPED_WIDTH = 240  # wide enough for every column of a table, so that a script sees whole values

ConfigFile = Annotated[Path | None, typer.Option("--config", help="Configuration file.")]
DataFolder = Annotated[Path | None, typer.Option("--data-dir", help="Folder of the database and the models.")]


def load_settings(config_file: Path | None, **overrides: Any) -> Settings:
    """The settings of this command. Raises SetupError."""
    return config.load(config_file, config.environment(), overrides)


def look_into(folder: Path) -> None:
    """Raises SetupError where this user may not see what is in `folder`, which need not be there."""
    try:
        os.stat(f"{folder}/.")  # it takes the same right as a look at anything else in there
    except PermissionError:
        raise SetupError(
            f"{folder} cannot be looked at: permission denied. Run this as the user that runs the server."
        ) from None
    except (OSError, ValueError):
        return


@contextmanager
def looking() -> Iterator[None]:
    """What keeps files from being looked at inside becomes a SetupError."""
    try:
        yield
    except OSError as error:
        raise SetupError(f"{error.filename} cannot be looked at: {error.strerror}.") from None


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


def run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run `coroutine` to its end; Ctrl-C cancels it and comes out as KeyboardInterrupt.

    The loop takes the signal through its wake-up pipe. The handler that `asyncio.run` sets up is called between two
    byte codes, so a signal that arrives just before the loop goes to sleep would be noticed when it wakes, if ever.
    """

    async def interruptible() -> _T:
        current = asyncio.current_task()
        on_main_thread = threading.current_thread() is threading.main_thread()  # signals come to no other
        if current is not None and on_main_thread and sys.platform != "win32":
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, current.cancel)
        return await coroutine

    try:
        return asyncio.run(interruptible())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def loop_factory() -> Any:
    """Makes the fastest event loop that this system has; None leaves it to asyncio."""
    if sys.platform == "win32":
        return None
    import uvloop  # noqa: PLC0415  # there is no uvloop on Windows

    return uvloop.new_event_loop

"""What a server has sent, written where a person wants it.

It refuses to leave half a file behind, and to put a file in the place of a pipe or a device.
"""

import os
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import aiohttp
import typer

from forebay.cli.options import EXIT_INTERRUPTED, leave
from forebay.clock import new_token
from forebay.errors import SetupError

_DRAFT_BYTES = 12  # of chance in the name of a draft
_RIGHTS = 0o777


async def print_out(pieces: AsyncIterator[bytes]) -> None:
    """Write to standard output as it comes. Raises SetupError."""
    try:
        async for piece in pieces:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        _print_nothing_more()
        leave("The reader of the results has gone.", EXIT_INTERRUPTED)
    except OSError as error:
        if isinstance(error, aiohttp.ClientError | TimeoutError):
            raise
        _print_nothing_more()
        raise SetupError(f"Standard output cannot be written: {error.strerror or error}.") from None


def _print_nothing_more() -> None:
    """What is still kept for standard output would fail again when the program ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def write_whole(pieces: AsyncIterator[bytes], out: Path) -> None:
    """Write `out` as a whole or not at all; a pipe or a device as it comes. Raises SetupError."""
    try:
        with _written(out) as file:
            async for piece in pieces:
                file.write(piece)
    except OSError as error:
        if isinstance(error, aiohttp.ClientError | TimeoutError):
            raise
        raise SetupError(f"{out} cannot be written: {error.strerror or error}.") from None
    typer.echo(f"Wrote {out}.", err=True)


@contextmanager
def _written(out: Path) -> Iterator[BinaryIO]:
    """What to write `out` through; a file gets it when the block ends well. Raises OSError."""
    try:
        there: os.stat_result | None = os.stat(out)
    except FileNotFoundError:
        there = None
    if there is not None and not stat.S_ISREG(there.st_mode):
        with out.open("wb") as file:
            yield file
        return
    whole = Path(os.path.realpath(out))  # a link goes on leading there
    draft = whole.parent / f".forebay-{new_token(_DRAFT_BYTES)}"  # one's own: two may write the same file at once
    try:
        with draft.open("xb") as file:
            if there is not None:
                draft.chmod(there.st_mode & _RIGHTS)
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(whole)
    finally:
        with suppress(OSError):  # it has got its name, or never came to be: what went wrong is on its way already
            draft.unlink()

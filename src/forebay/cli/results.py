"""What a server has sent, written where a person wants it.

It refuses to leave half a file behind.
"""

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import typer

from forebay.cli.options import EXIT_INTERRUPTED, leave
from forebay.errors import SetupError


async def print_out(pieces: AsyncIterator[bytes]) -> None:
    """Write to standard output as it comes."""
    try:
        async for piece in pieces:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave("The reader of the results has gone.", EXIT_INTERRUPTED)


async def write_whole(pieces: AsyncIterator[bytes], out: Path) -> None:
    """Write `out` as a whole or not at all. Raises SetupError."""
    part = out.with_name(f".{out.name}.part")
    try:
        with part.open("wb") as file:
            async for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
    except OSError as error:
        if isinstance(error, aiohttp.ClientError | TimeoutError):
            raise
        raise SetupError(f"{out} cannot be written: {error.strerror}.") from None
    finally:
        part.unlink(missing_ok=True)
    typer.echo(f"Wrote {out}.", err=True)

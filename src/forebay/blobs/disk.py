"""Work on a disk in threads: small writes gathered, room that must be left, and what goes wrong in the words of ours.

It refuses to block the event loop, and to fill a disk to its end.
"""

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from forebay.blobs.shielded import shielded
from forebay.errors import InsufficientStorage, StoreUnavailable

PIECE_BYTES = 2**20

P = ParamSpec("P")
T = TypeVar("T")


class Pieces:
    """Gathers small writes, so that each trip to a thread is worth it. Raises what `write` does, as `in_thread`."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    async def write(self, data: bytes) -> None:
        """Add bytes."""
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= PIECE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Hand what waits to the operating system."""
        pieces, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if pieces:
            await in_thread(self._write, b"".join(pieces))


def check_room(folder: Path, size: int, free_bytes_min: int) -> None:
    """Raise InsufficientStorage where `size` bytes more would leave less room than must be left."""
    disk = os.statvfs(folder)
    if disk.f_bavail * disk.f_frsize - size < free_bytes_min:
        raise InsufficientStorage


async def in_thread(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run in a thread that a cancel of the caller does not stop half-way, and translate what goes wrong."""
    with translated():
        return await shielded(asyncio.to_thread(function, *arguments, **named))


@contextmanager
def translated() -> Iterator[None]:
    """Let trouble with the disk be trouble of ours: InsufficientStorage and StoreUnavailable."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InsufficientStorage from error
        raise StoreUnavailable from error

"""What a request brings, on the disk as it was sent.

It refuses more bytes than one may have, and to hold more than a piece of it in memory.
"""

from collections.abc import AsyncGenerator

from forebay.blobs.disk import PIECE_BYTES, Pieces, in_thread
from forebay.media.medium import Medium
from forebay.media.private_file import PrivateFile


class Spool:
    """One file of a request."""

    def __init__(self, file: PrivateFile, medium: Medium, bytes_max: int) -> None:
        self.file = file
        self.medium = medium
        self.bytes = 0
        self._bytes_max = bytes_max
        self._pieces = Pieces(file.write)

    async def write(self, data: bytes) -> None:
        """Add bytes. Raises PayloadTooLarge (`media_too_large`), InsufficientStorage and StoreUnavailable."""
        self.bytes += len(data)
        if self.bytes > self._bytes_max:
            raise self.medium.too_large(f"It has at most {self._bytes_max} bytes.")
        await self._pieces.write(data)

    async def flush(self) -> None:
        """Hand what waits to the operating system."""
        await self._pieces.flush()

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """What was written, from its beginning."""
        await self.flush()
        offset = 0
        while piece := await in_thread(self.file.read, offset, PIECE_BYTES):
            offset += len(piece)
            yield piece

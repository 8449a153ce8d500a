"""What a request brings, on the disk as it was sent.

It refuses more bytes than one may have, and to hold more than a piece of it in memory.
"""

from collections.abc import AsyncGenerator

from forebay.media.medium import Medium
from forebay.media.private_file import PrivateFile, in_thread

_PIECE_BYTES = 2**20


class Spool:
    """One file of a request."""

    def __init__(self, file: PrivateFile, medium: Medium, bytes_max: int) -> None:
        self.file = file
        self.medium = medium
        self.bytes = 0
        self._bytes_max = bytes_max
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    async def write(self, data: bytes) -> None:
        """Add bytes. Raises PayloadTooLarge (`media_too_large`), InsufficientStorage and StoreUnavailable."""
        self.bytes += len(data)
        if self.bytes > self._bytes_max:
            raise self.medium.too_large(f"It has at most {self._bytes_max} bytes.")
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= _PIECE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Hand what waits to the operating system."""
        pieces, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if pieces:
            await in_thread(self.file.write, b"".join(pieces))

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """What was written, from its beginning."""
        await self.flush()
        offset = 0
        while piece := await in_thread(self.file.read, offset, _PIECE_BYTES):
            offset += len(piece)
            yield piece

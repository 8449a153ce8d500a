"""The objects of a store that others fill: what work is about is read from there, and what it makes is put there.

It refuses to read more than an image may have, and to leave a half of an object behind.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing

from forebay.blobs.blobs import Blobs
from forebay.errors import Conflict, InvalidRequest, NotFound
from forebay.media.spool import Spool


class Objects:
    """Reads and writes objects; with no `store` the settings have closed it."""

    def __init__(self, store: Blobs | None) -> None:
        self._store = store

    async def fetch(self, spool: Spool, name: str, field: str) -> None:
        """Copy the object that `field` names. Raises InvalidRequest (`object_not_found`), and what `Spool.write` does."""
        try:
            async with aclosing(self._open().stream(name)) as pieces:
                async for piece in pieces:
                    await spool.write(piece)
        except NotFound:
            raise InvalidRequest(
                f"There is no such object: the `{field}` of the message is gone, or was never there.",
                param=field,
                code="object_not_found",
            ) from None
        await spool.flush()

    async def put(self, name: str, pieces: AsyncIterator[bytes], field: str) -> None:
        """Write the object that `field` names, in place of one that is there; it is durable on return. Raises Conflict."""
        try:
            async with self._open().write(name) as writer:
                async for piece in pieces:
                    await writer.write(piece)
        except NotFound:
            raise Conflict(f"The `{field}` of the message cannot be written: something else is in its place.") from None

    def _open(self) -> Blobs:
        if self._store is None:
            raise InvalidRequest(
                "This server has no store of objects any more. Its operator sets `intake.url`.", code="intake_closed"
            )
        return self._store

"""Blobs in a bucket of an S3-compatible store, on obstore.

It refuses to hold a blob whole in memory and to leave a half of one behind: a write that ends early is aborted.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from forebay.blobs.key import checked_key, checked_prefix
from forebay.blobs.shielded import shielded
from forebay.clock import new_id
from forebay.config import StoreSettings
from forebay.errors import InsufficientStorage, NotFound, SetupError, StoreUnavailable

if TYPE_CHECKING:
    from obstore import ObjectMeta

_PIECE_BYTES = 4 * 2**20  # of a read
_PART_BYTES = 5 * 2**20  # the least that S3 takes; a writer holds up to four: gathered, queued, cut and on the way
_PAGE = 1000
_FULL = re.compile(r"status code: 507\b")  # not any 507: the message tells times as well
_OUT_OF_RANGE = re.compile(r"status code: 416\b")


class S3Blobs:
    """Implements `Blobs` on a bucket. `section` is where the settings have it, and `checked` refuses what is no key."""

    def __init__(
        self, settings: StoreSettings, section: str = "blobs", checked: Callable[[str], str] = checked_key
    ) -> None:
        self._section = section
        self._checked = checked
        place = urlsplit(settings.url or "")
        self._bucket = place.netloc
        prefix = place.path.strip("/")
        secret = settings.secret_access_key
        given = {
            "endpoint": settings.endpoint,
            "region": settings.region,
            "access_key_id": settings.access_key_id,
            "secret_access_key": secret.get_secret_value() if secret is not None else None,
        }
        patience = timedelta(seconds=settings.timeout_seconds)
        try:
            self._store = S3Store(
                self._bucket,
                prefix=prefix or None,
                config={key: value for key, value in given.items() if value is not None},  # type: ignore[arg-type]
                client_options={"allow_http": settings.allow_http, "timeout": patience, "connect_timeout": patience},
                retry_config={
                    "max_retries": settings.retries_max,
                    "retry_timeout": patience * (settings.retries_max + 1),
                    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5)},
                },
            )
        except (BaseError, ValueError) as error:
            raise SetupError(f"The settings of `{section}` name no usable bucket: {type(error).__name__}.") from None

    async def check(self) -> None:
        """Write, read and remove a blob. Raises SetupError with the remedy."""
        key = f"checks/{new_id('check')}"
        try:
            await self.put(key, b"check")
            await self.read(key)
            await self.delete(key)
        except (NotFound, StoreUnavailable, InsufficientStorage) as error:
            remedy = _remedy(error.__cause__, f"FOREBAY_{self._section.upper()}")
            raise SetupError(f"The bucket {self._bucket} cannot be used: {remedy}") from None

    async def put(self, key: str, data: bytes) -> None:
        """Store a small blob; it is durable on return."""
        with _translated():
            await obstore.put_async(self._store, self._checked(key), data, use_multipart=False)

    @asynccontextmanager
    async def write(self, key: str) -> AsyncIterator["S3Writer"]:
        """Store a blob as it comes."""
        writer = S3Writer(self, self._store, self._checked(key))
        try:
            yield writer
            await writer.commit()
        except BaseException:
            await shielded(writer.abandon())
            raise

    async def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """At most `length` bytes from `offset`."""
        if length is None:
            length = max(0, await self.size(key) - offset)
        if length == 0:
            return b""
        try:
            return await self._range(key, offset, length)
        except StoreUnavailable as error:
            # A store says of bytes behind the end that they are out of range.
            if _OUT_OF_RANGE.search(str(error.__cause__)) and await self.size(key) <= offset:
                return b""
            raise

    async def stream(self, key: str, offset: int = 0, length: int | None = None) -> AsyncGenerator[bytes, None]:
        """The bytes in pieces, each fetched when it is wanted: a slow reader holds no connection to the store.

        Raises StoreUnavailable at its end if the blob was replaced meanwhile: what was read is then of two of them.
        """
        found = await self._head(key)
        end = found["size"] if length is None else min(found["size"], offset + length)
        several = end - offset > _PIECE_BYTES
        while offset < end:
            piece = await self._range(key, offset, min(_PIECE_BYTES, end - offset))
            offset += len(piece)
            yield piece
        with suppress(NotFound):  # all of it was read before it went
            if several and (await self._head(key))["e_tag"] != found["e_tag"]:
                raise StoreUnavailable

    async def size(self, key: str) -> int:
        """How many bytes it has."""
        return (await self._head(key))["size"]

    async def _head(self, key: str) -> "ObjectMeta":
        with _translated():
            return await obstore.head_async(self._store, self._checked(key))

    async def delete(self, key: str) -> None:
        """Remove a blob."""
        with suppress(NotFound), _translated():
            await obstore.delete_async(self._store, self._checked(key))

    async def delete_prefix(self, prefix: str) -> int:
        """Remove every blob below `prefix`."""
        removed = 0
        with _translated():
            async for page in obstore.list(self._store, checked_prefix(prefix) or None, chunk_size=_PAGE):
                await obstore.delete_async(self._store, [found["path"] for found in page])
                removed += len(page)
        return removed

    async def list(self, prefix: str) -> AsyncIterator[str]:
        """The keys below `prefix`."""
        pages = obstore.list(self._store, checked_prefix(prefix) or None, chunk_size=_PAGE)
        while True:
            try:
                with _translated():
                    page = await anext(pages)
            except StopAsyncIteration:
                return
            for found in page:
                yield found["path"]

    async def _range(self, key: str, offset: int, length: int) -> bytes:
        with _translated():
            return bytes(await obstore.get_range_async(self._store, self._checked(key), start=offset, length=length))


class S3Writer:
    """One blob on its way: a small one goes in one request, a larger one in parts."""

    def __init__(self, blobs: S3Blobs, store: S3Store, key: str) -> None:
        self._blobs = blobs
        self._store = store
        self._key = key
        self._waiting = bytearray()
        self._parts: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        self._abandoned = False
        self._sending: asyncio.Task[None] | None = None

    async def write(self, data: bytes) -> None:
        """Add bytes; waits while the store is behind."""
        self._waiting += data
        while len(self._waiting) >= _PART_BYTES:
            part = bytes(self._waiting[:_PART_BYTES])
            del self._waiting[:_PART_BYTES]
            await self._hand_over(part)

    async def commit(self) -> None:
        """Make it the blob, durably."""
        if self._sending is None:
            await self._blobs.put(self._key, bytes(self._waiting))
            return
        if self._waiting:
            await self._hand_over(bytes(self._waiting))
        await self._hand_over(None)
        await asyncio.shield(self._sending)

    async def abandon(self) -> None:
        """Abort: the store forgets the parts that it has."""
        self._abandoned = True
        if self._sending is None:
            return
        while not self._sending.done():
            if self._parts.full():
                self._parts.get_nowait()
            self._parts.put_nowait(None)
            await asyncio.wait([self._sending], timeout=0.1)
        if self._sending.exception() is None:  # it was committed before anybody could stop it
            await self._blobs.delete(self._key)

    async def _hand_over(self, part: bytes | None) -> None:
        """Give a part to the sender, or learn why it has ended."""
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())
        putting = asyncio.ensure_future(self._parts.put(part))
        try:
            await asyncio.wait([putting, self._sending], return_when=asyncio.FIRST_COMPLETED)
        finally:
            putting.cancel()
        if self._sending.done():
            await self._sending

    async def _send(self) -> None:
        with _translated():
            await obstore.put_async(self._store, self._key, self._queued(), chunk_size=_PART_BYTES, max_concurrency=1)

    async def _queued(self) -> AsyncIterator[bytes]:
        while (part := await self._parts.get()) is not None:
            yield part
        if self._abandoned:
            raise _Abandoned


class _Abandoned(Exception):
    """Makes obstore abort a multipart upload."""


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("The content is not there any more.") from error
    except (BaseError, OSError) as error:
        if _FULL.search(str(error)):
            raise InsufficientStorage from error
        raise StoreUnavailable from error


def _remedy(cause: BaseException | None, variables: str) -> str:
    """What to do, by environment variables that begin with `variables`."""
    if isinstance(cause, FileNotFoundError):
        return f"there is no such bucket. Create it, or correct {variables}_URL."
    if isinstance(cause, (PermissionDeniedError, UnauthenticatedError)):
        return f"the access key may not write there. Check {variables}_ACCESS_KEY_ID and its secret."
    return f"it does not answer as a store does. Check {variables}_URL, {variables}_ENDPOINT and the network."

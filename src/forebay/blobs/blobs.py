"""Bytes by key: what the house asks of the cellar, and the choice of the one that the settings name.

It refuses to know whose bytes they are: rows say that, and a blob without a row is rubbish.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from forebay.blobs.key import checked_object
from forebay.blobs.local import LocalBlobs
from forebay.blobs.s3 import S3Blobs
from forebay.config import Settings
from forebay.errors import SetupError


class Writer(Protocol):
    """One blob that is being written."""

    async def write(self, data: bytes) -> None:
        """Add bytes; waits while the store takes them."""
        ...


class Blobs(Protocol):
    """Bytes by key, each written once.

    Every method raises InsufficientStorage where there is no room, StoreUnavailable where the store cannot be used,
    and those that read raise NotFound for a key that is not there.
    """

    async def check(self) -> None:
        """Try the store at start-up and remove what a crash left over. Raises SetupError with the remedy."""
        ...

    async def put(self, key: str, data: bytes) -> None:
        """Store a small blob; it is durable on return."""
        ...

    def write(self, key: str) -> AbstractAsyncContextManager[Writer]:
        """Store a blob as it comes: durable when the block ends, and nothing is left when it raises or is cancelled."""
        ...

    async def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """At most `length` bytes from `offset`; the caller knows that they fit into memory."""
        ...

    def stream(self, key: str, offset: int = 0, length: int | None = None) -> AsyncGenerator[bytes, None]:
        """The same in pieces of a few megabytes at most."""
        ...

    async def size(self, key: str) -> int:
        """How many bytes it has."""
        ...

    async def delete(self, key: str) -> None:
        """Remove a blob; one that is not there is fine."""
        ...

    async def delete_prefix(self, prefix: str) -> int:
        """Remove every blob below `prefix`, which ends in a slash; how many there were."""
        ...

    def list(self, prefix: str) -> AsyncIterator[str]:
        """The keys below `prefix`, in no order."""
        ...


def open_blobs(settings: Settings) -> Blobs:
    """The store that the settings name for what this server keeps; `check` tells whether it can be used."""
    url = settings.blobs.url
    if url is not None and url.startswith("s3://"):
        return S3Blobs(settings.blobs, "blobs")
    folder = settings.data_dir / "blobs" if url is None else _folder(url, "blobs")
    return LocalBlobs(folder, settings.files.free_bytes_min, "blobs")


def open_objects(settings: Settings) -> Blobs | None:
    """The store that others fill, whose objects pushed messages name; none where the settings name none.

    Its keys are names of objects as `is_object_name` has them, and an object that is written takes the place of another.
    """
    url = settings.intake.url
    if url is None:
        return None
    if url.startswith("s3://"):
        return S3Blobs(settings.intake, "intake", checked_object)
    folder, room = _folder(url, "intake"), settings.files.free_bytes_min
    return LocalBlobs(folder, room, "intake", checked_object, private=False)


def _folder(url: str, section: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise SetupError(f"`{section}.url` is no folder. Write it as file:/folder with an absolute path.")
    return Path(unquote(parts.path))

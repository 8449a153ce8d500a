"""Pictures that become files of their project as soon as they are finished.

It refuses to leave the bytes of a picture behind that has not become a file.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from forebay.blobs.blobs import Blobs
from forebay.blobs.disk import PIECE_BYTES
from forebay.blobs.shielded import shielded
from forebay.dialects.imaging import Painted
from forebay.dialects.openai.files import IMAGE_RESULT
from forebay.errors import InsufficientStorage, NotFound, StoreUnavailable
from forebay.store.files import File, FileStore

Keep = Callable[[Painted], Awaitable[File]]


async def keep_as_file(files: FileStore, blobs: Blobs, project: str, picture: Painted, keep_seconds: float) -> File:
    """The file that a picture becomes. Raises InsufficientStorage and StoreUnavailable."""
    begun = await files.begin(project)
    file = replace(begun, filename=file_name(begun.id, picture.content_type), purpose=IMAGE_RESULT)
    try:
        await store_blob(blobs, file.blob_key, picture.data)
        digest = await sha256_of(picture.data)
        async with files.database.begin() as transaction:
            return await files.finish(transaction, file, len(picture.data), digest, keep_seconds)
    except BaseException:
        await shielded(_give_up(files, blobs, file))
        raise


async def _give_up(files: FileStore, blobs: Blobs, file: File) -> None:
    """Leave nothing of a file, which may be one by now: who is cancelled while it is committed hears of no end."""
    with suppress(StoreUnavailable, InsufficientStorage):  # what cannot be removed now, a sweep removes
        await files.discard(blobs, file)
    await _remove(files, blobs, file.project_id, [file.id])


@asynccontextmanager
async def kept_files(files: FileStore, blobs: Blobs, project: str, keep_seconds: float) -> AsyncIterator[Keep]:
    """Makes files of pictures, for a block that tells somebody where they are; if it fails, nothing of them is left.

    What it calls raises what `keep_as_file` does.
    """
    made: list[str] = []

    async def keep(picture: Painted) -> File:
        file = await keep_as_file(files, blobs, project, picture, keep_seconds)
        made.append(file.id)
        return file

    try:
        yield keep
    except BaseException:
        await shielded(_remove(files, blobs, project, made))
        raise


async def _remove(files: FileStore, blobs: Blobs, project: str, file_ids: Sequence[str]) -> None:
    for file_id in file_ids:
        with suppress(NotFound, StoreUnavailable, InsufficientStorage):  # it expires
            await files.delete(blobs, project, file_id)


async def store_blob(blobs: Blobs, key: str, data: bytes) -> None:
    """Store a blob of which nothing is left when this is cancelled."""
    async with blobs.write(key) as writer:
        await writer.write(data)


async def sha256_of(data: bytes) -> str:
    """The digest of a picture, piece by piece: one call over megabytes holds up the event loop."""
    digest = hashlib.sha256()
    for start in range(0, len(data), PIECE_BYTES):
        digest.update(memoryview(data)[start : start + PIECE_BYTES])
        await asyncio.sleep(0)
    return digest.hexdigest()


def file_name(file_id: str, content_type: str) -> str:
    """What a picture is called as a file."""
    return f"{file_id}.{content_type.rpartition('/')[2]}"

"""Images and recordings that were uploaded as files.

It refuses the file of another project, as the store does, and one that is larger than it may be.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from forebay.blobs.blobs import Blobs
from forebay.media.medium import Medium
from forebay.store.files import FileStore


class UploadedFiles:
    """Reads a project's files as what a request says that they are."""

    def __init__(self, files: FileStore, blobs: Blobs) -> None:
        self._files = files
        self._blobs = blobs

    async def read(self, medium: Medium, project: str, file_id: str, bytes_max: int) -> bytes:
        """The bytes of the project's file. Raises NotFound, and PayloadTooLarge (`media_too_large`)."""
        return await self._blobs.read(await self._key(medium, project, file_id, bytes_max))

    async def stream(self, medium: Medium, project: str, file_id: str, bytes_max: int) -> AsyncGenerator[bytes, None]:
        """The same in pieces."""
        async with aclosing(self._blobs.stream(await self._key(medium, project, file_id, bytes_max))) as pieces:
            async for piece in pieces:
                yield piece

    async def _key(self, medium: Medium, project: str, file_id: str, bytes_max: int) -> str:
        file = await self._files.get(project, file_id)
        if file.bytes > bytes_max:
            raise medium.too_large(f"It has at most {bytes_max} bytes.")
        return file.blob_key

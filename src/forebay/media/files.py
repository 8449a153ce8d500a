"""Images and recordings that were uploaded as files.

It refuses the file of another project, as the store does, and one that is larger than it may be.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from forebay.blobs.blobs import Blobs
from forebay.media import decoder, images
from forebay.store.files import FileStore


class UploadedImages:
    """Reads a project's files as images."""

    def __init__(self, files: FileStore, blobs: Blobs) -> None:
        self._files = files
        self._blobs = blobs

    async def read(self, project: str, file_id: str, bytes_max: int) -> bytes:
        """The bytes of the project's file. Raises NotFound, and PayloadTooLarge (`media_too_large`)."""
        file = await self._files.get(project, file_id)
        if file.bytes > bytes_max:
            raise images.too_large(f"An image has at most {bytes_max} bytes.")
        return await self._blobs.read(file.blob_key)


class UploadedRecordings:
    """Reads a project's files as recordings."""

    def __init__(self, files: FileStore, blobs: Blobs) -> None:
        self._files = files
        self._blobs = blobs

    async def stream(self, project: str, file_id: str, bytes_max: int) -> AsyncGenerator[bytes, None]:
        """The bytes of the project's file in pieces. Raises NotFound, and PayloadTooLarge (`media_too_large`)."""
        file = await self._files.get(project, file_id)
        if file.bytes > bytes_max:
            raise decoder.too_large(f"It has at most {bytes_max} bytes.")
        async with aclosing(self._blobs.stream(file.blob_key)) as pieces:
            async for piece in pieces:
                yield piece

"""Images that were uploaded as files.

It refuses the file of another project, as the store does, and one that is larger than an image may be.
"""

from forebay.blobs.blobs import Blobs
from forebay.media.images import too_large
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
            raise too_large(f"An image has at most {bytes_max} bytes.")
        return await self._blobs.read(file.blob_key)

"""Files for the time of one request or job: without a name, so that they go with the process however it ends.

It refuses to fill the disk to its end, to block the event loop, and to let anybody else read them.
"""

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from forebay.blobs.disk import check_room, in_thread
from forebay.clock import new_id
from forebay.errors import SetupError


class PrivateFiles:
    """Makes private files in a folder that no other process uses."""

    def __init__(self, folder: Path, free_bytes_min: int) -> None:
        self._folder = folder
        self._free_bytes_min = free_bytes_min

    def open(self) -> None:
        """Create the folder, and remove what a crash left in it. Raises SetupError."""
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)
        except OSError as error:
            raise SetupError(
                f"The folder {self._folder} cannot be used: {error.strerror}. "
                "Choose another data folder with FOREBAY_DATA_DIR."
            ) from None

    def check_room(self, size: int = 0) -> None:
        """Raise InsufficientStorage where `size` bytes more would leave less room than must be left."""
        check_room(self._folder, size, self._free_bytes_min)

    @asynccontextmanager
    async def file(self) -> AsyncIterator["PrivateFile"]:
        """An empty file; it is gone when the block ends."""
        opening = asyncio.ensure_future(in_thread(PrivateFile, self._folder, self.check_room))
        try:
            file = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close)
            raise
        try:
            yield file
        finally:
            await in_thread(file.close)


def _close(opening: "asyncio.Future[PrivateFile]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class PrivateFile:
    """One of them, used from threads; the lock holds where a cancelled caller leaves one of them behind."""

    def __init__(self, folder: Path, check_room: Callable[[int], None]) -> None:
        self._check_room = check_room
        self._lock = threading.Lock()
        self._closed = False
        path = folder / new_id("part")
        self.writer = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            self.reader = os.open(path, os.O_RDONLY)
        except OSError:
            os.close(self.writer)
            raise
        finally:
            path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Append bytes. Raises InsufficientStorage before the disk has less room than must be left."""
        with self._lock:
            if self._closed:
                return
            self._check_room(len(data))
            view = memoryview(data)
            while view:
                view = view[os.write(self.writer, view) :]

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`."""
        with self._lock:
            return b"" if self._closed else os.pread(self.reader, size, offset)

    def size(self) -> int:
        """How many bytes it has."""
        with self._lock:
            return 0 if self._closed else os.fstat(self.reader).st_size

    def close(self) -> None:
        """Give it up."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self.writer)
                os.close(self.reader)

"""Files that another program has opened and handed on as descriptors.

It refuses to open anything, and to move a place in a file that others share.
"""

import errno
import io
import os

from forebay.engines.fence import Refused, write


class Source:
    """A file that can only be read and sought in. Its place is its own: the descriptor is shared."""

    name = ""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._at = 0
        self.bytes = os.fstat(descriptor).st_size

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most `size` of them where it is not negative."""
        left = max(0, self.bytes - self._at)
        piece = os.pread(self._descriptor, left if size < 0 else min(size, left), self._at)
        self._at += len(piece)
        return piece

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go elsewhere."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.bytes}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        """Where it is."""
        return self._at


class Sink:
    """A file that can only be written to, from its beginning to its end. `no_room` is the verdict for a full disk."""

    def __init__(self, descriptor: int, no_room: int) -> None:
        self._descriptor = descriptor
        self._no_room = no_room
        self.bytes = 0

    def write(self, data: bytes) -> int:
        """Add them all. Raises Refused, and OSError for a file that would become too long."""
        try:
            write(self._descriptor, data)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise Refused(self._no_room) from None
            raise
        self.bytes += len(data)
        return len(data)

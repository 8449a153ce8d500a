"""Blobs in a folder: written beside, flushed to the disk, renamed, and the folder flushed.

It refuses to answer before the bytes would survive a power cut, to fill the disk to its end, and to block the event loop.
"""

import asyncio
import errno
import fcntl
import itertools
import os
import stat
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import ParamSpec, TypeVar

from forebay.blobs.disk import PIECE_BYTES, Pieces, check_room, translated
from forebay.blobs.key import checked_key, checked_prefix
from forebay.blobs.shielded import shielded
from forebay.clock import new_id
from forebay.errors import InsufficientStorage, NotFound, SetupError, StoreUnavailable

_PARTIAL = ".partial"  # no key begins with a dot
_LIST_PAGE = 1000
_RENAMES_MAX = 5

P = ParamSpec("P")
T = TypeVar("T")


class LocalBlobs:
    """Implements `Blobs` on a folder that several processes of one machine may share.

    `section` is where the settings have it, and `checked` refuses what is no key. What is not `private` may be read by
    whoever the mask of the process lets.
    """

    def __init__(
        self,
        folder: Path,
        free_bytes_min: int,
        section: str = "blobs",
        checked: Callable[[str], str] = checked_key,
        *,
        private: bool = True,
    ) -> None:
        self._folder = folder
        self._free_bytes_min = free_bytes_min
        self._section = section
        self._checked = checked
        self._private = private

    async def check(self) -> None:
        """Create the folder, write and remove a blob, and sweep what dead processes left half-written."""
        key = f"checks/{new_id('check')}"
        try:
            await asyncio.to_thread(self._sweep)
            await _in_thread(self._put, key, b"check", 0)
            await self.delete(key)
        except InsufficientStorage:
            raise SetupError(
                f"The disk of the folder {self._folder} of `{self._section}` is full. Make room on it."
            ) from None
        except (StoreUnavailable, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) else "it cannot be used"
            raise SetupError(
                f"The folder {self._folder} of `{self._section}` cannot be written: {reason}. "
                f"Choose another with FOREBAY_{self._section.upper()}_URL."
            ) from None

    async def put(self, key: str, data: bytes) -> None:
        """Store a small blob; it is durable on return."""
        await _in_thread(self._put, key, data, self._free_bytes_min)

    @asynccontextmanager
    async def write(self, key: str) -> AsyncIterator[Pieces]:
        """Store a blob as it comes."""
        part = _Part(self._folder, self._checked(key), self._free_bytes_min, private=self._private)
        writer = Pieces(part.write)
        try:
            yield writer
            await writer.flush()
            await _in_thread(part.commit)
        finally:
            await _in_thread(part.abandon)

    async def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """At most `length` bytes from `offset`."""
        return await _in_thread(self._read, key, offset, length)

    async def stream(self, key: str, offset: int = 0, length: int | None = None) -> AsyncGenerator[bytes, None]:
        """The bytes in pieces; a blob that is deleted meanwhile is still read to its end."""
        file = await _in_thread(_opened, self._path(key))
        with file:
            end = os.fstat(file.fileno()).st_size if length is None else offset + length
            while offset < end:
                piece = await _in_thread(os.pread, file.fileno(), min(PIECE_BYTES, end - offset), offset)
                if not piece:
                    return
                offset += len(piece)
                yield piece

    async def size(self, key: str) -> int:
        """How many bytes it has."""
        return await _in_thread(_size, self._path(key))

    async def delete(self, key: str) -> None:
        """Remove a blob; the removal is durable on return."""
        with suppress(NotFound):
            await _in_thread(_remove, self._path(key))

    async def delete_prefix(self, prefix: str) -> int:
        """Remove every blob below `prefix`, and the folders that this leaves empty."""
        return await _in_thread(self._delete_prefix, prefix)

    async def list(self, prefix: str) -> AsyncIterator[str]:
        """The keys below `prefix`."""
        keys = self._keys(prefix)
        while page := await _in_thread(lambda: list(itertools.islice(keys, _LIST_PAGE))):
            for key in page:
                yield key

    def _path(self, key: str) -> Path:
        return self._folder / self._checked(key)

    def _put(self, key: str, data: bytes, free_bytes_min: int) -> None:
        part = _Part(self._folder, self._checked(key), free_bytes_min, private=self._private)
        try:
            part.write(data)
            part.commit()
        finally:
            part.abandon()

    def _read(self, key: str, offset: int, length: int | None) -> bytes:
        with _opened(self._path(key)) as file:
            left = max(0, os.fstat(file.fileno()).st_size - offset)
            file.seek(offset)
            return _read_whole(file.fileno(), left if length is None else min(left, length))

    def _keys(self, prefix: str) -> Iterator[str]:
        top = self._folder / checked_prefix(prefix)
        for folder, names, files in os.walk(top):
            names[:] = [name for name in names if not name.startswith(".")]
            for name in files:
                yield (Path(folder) / name).relative_to(self._folder).as_posix()

    def _delete_prefix(self, prefix: str) -> int:
        removed = 0
        top = self._folder / checked_prefix(prefix)
        for folder, _, files in os.walk(top, topdown=False):
            place = Path(folder)
            if _PARTIAL in place.parts or place == self._folder:
                continue
            for name in files:
                (place / name).unlink(missing_ok=True)
                removed += 1
            with suppress(OSError):  # somebody writes there again
                place.rmdir()
            _flush_folder(place if place.exists() else place.parent)
        return removed

    def _sweep(self) -> None:
        """Remove what no living process writes: whoever writes a part holds a lock on it."""
        partial = self._folder / _PARTIAL
        _make_folder(partial)
        for path in partial.iterdir():
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)
                except BlockingIOError:
                    pass
                finally:
                    os.close(descriptor)


class _Part:
    """A blob that is being written, from threads; the lock holds where a cancelled caller leaves one of them behind."""

    def __init__(self, folder: Path, key: str, free_bytes_min: int, *, private: bool) -> None:
        self._folder = folder
        self._private = private
        self._target = folder / key
        self._free_bytes_min = free_bytes_min
        self._lock = threading.Lock()
        self._opened: tuple[Path, int] | None = None
        self._ended = False

    def write(self, data: bytes) -> None:
        """Append bytes. Raises InsufficientStorage before the disk has less room than must be left."""
        with self._lock:
            if self._ended:
                return
            _, descriptor = self._open()
            check_room(self._folder, len(data), self._free_bytes_min)
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]

    def commit(self) -> None:
        """Make it the blob, durably."""
        with self._lock:
            if self._ended:
                return
            path, descriptor = self._open()
            os.fsync(descriptor)
            self._rename(path)
            _flush_folder(self._target.parent)
            self._close()

    def abandon(self) -> None:
        """Leave nothing behind, unless it was committed."""
        with self._lock:
            if self._opened is not None and not self._ended:
                self._opened[0].unlink(missing_ok=True)
            self._close()

    def _open(self) -> tuple[Path, int]:
        if self._opened is None:
            self._opened = _open_part(self._folder / _PARTIAL, 0o600 if self._private else 0o666)
        return self._opened

    def _rename(self, path: Path) -> None:
        for _ in range(_RENAMES_MAX):
            _make_folder(self._target.parent, 0o700 if self._private else 0o777)
            with suppress(FileNotFoundError):  # somebody has just removed the folder because it was empty
                path.rename(self._target)
                return
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _close(self) -> None:
        if self._opened is not None and not self._ended:
            os.close(self._opened[1])
        self._ended = True


async def _in_thread(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run in a thread that a cancel of the caller does not stop half-way, and translate what goes wrong."""
    with translated(), _gone():
        return await shielded(asyncio.to_thread(function, *arguments, **named))


@contextmanager
def _gone() -> Iterator[None]:
    """Whoever asks for what is not there is told so."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise NotFound("The content is not there any more.") from error


def _open_part(partial: Path, mode: int) -> tuple[Path, int]:
    """A new file that this process has locked; it is tried again where a sweep took the file before the lock was on."""
    while True:
        path = partial / new_id("part")
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode)
        except FileNotFoundError:
            _make_folder(partial)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)


def _size(path: Path) -> int:
    return _checked_kind(path.stat()).st_size


def _opened(path: Path) -> FileIO:
    """The file, for reading."""
    file = FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        _checked_kind(os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def _checked_kind(found: os.stat_result) -> os.stat_result:
    """Raise FileNotFoundError for a folder, and for what a reader would wait for."""
    if not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return found


def _read_whole(descriptor: int, size: int) -> bytes:
    pieces = []
    while size > 0 and (piece := os.read(descriptor, min(size, 2**30))):
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _remove(path: Path) -> None:
    path.unlink()
    _flush_folder(path.parent)


def _make_folder(folder: Path, mode: int = 0o700) -> None:
    """Create a folder and those above it, each of them durably."""
    if folder.is_dir():
        return
    _make_folder(folder.parent, mode)
    with suppress(FileExistsError):
        folder.mkdir(mode=mode)
    _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    with suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

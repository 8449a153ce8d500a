"""The journal of one process: what was used, appended before the answer that used it ends.

One write a record, and no wait for the disk: what was written outlives the process, however it ends, and may be lost with
the machine. It refuses to read on behind a record that is not whole, or that it does not know.
"""

import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic_core import from_json, to_json

from forebay.quotas import Account, Use

_BEGINNING = b"forebay usage 1\n"
_FRAME = struct.Struct("<II")  # the size of a record and its checksum
_RECORD_BYTES_MAX = 65_536
_PIECE_BYTES = 4 * 2**20  # of a journal that are read at once
_SUFFIX = ".journal"
_DRAFT = ".new"
_AMOUNTS = len(Use().values)


@dataclass(frozen=True, slots=True)
class Entry:
    """One record: the day is that of the writing, in UTC."""

    day: str
    account: Account
    use: Use


class Journal:
    """A file that this process appends to. The lock on it goes with the process, also by `kill -9`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self.size = len(_BEGINNING)

    @classmethod
    def create(cls, folder: Path, name: str) -> Self:
        """A new journal. Nobody sees it by its name before it is locked. Raises OSError."""
        path = folder / (name + _SUFFIX)
        draft = path.with_suffix(_DRAFT)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, _BEGINNING)
            draft.rename(path)
        except BaseException:
            os.close(descriptor)
            draft.unlink(missing_ok=True)
            raise
        return cls(path, descriptor)

    @property
    def name(self) -> str:
        """The name by which the database knows it."""
        return self.path.stem

    def append(self, entry: Entry) -> None:
        """Write one record, whole or not at all. Raises OSError."""
        account = entry.account
        values = (entry.day, account.project, account.key_id, account.model, account.capability, *entry.use.values)
        record = to_json(values)
        data = _FRAME.pack(len(record), zlib.crc32(record)) + record
        written = 0
        try:
            written = os.write(self._descriptor, data)
        finally:
            if written != len(data):
                os.ftruncate(self._descriptor, self.size)
        if written != len(data):
            raise OSError("There is no room for a whole record.")
        self.size += written

    def close(self, *, remove: bool) -> None:
        """Let go of it."""
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class Reading:
    """Some of what a journal holds from an offset on. `rest` is how many bytes there are behind: none of a record if it is empty."""

    entries: tuple[Entry, ...]
    end: int
    rest: int


def journals(folder: Path) -> list[Path]:
    """All journals of a data folder, those of living processes too."""
    return sorted(folder.glob(f"*{_SUFFIX}"))


def remove_drafts(folder: Path, before: float) -> None:
    """Remove journals that a process began to create before that time and has not come to use."""
    for draft in folder.glob(f"*{_DRAFT}"):
        with suppress(FileNotFoundError):
            if draft.stat().st_mtime < before:
                draft.unlink()


@contextmanager
def abandoned(path: Path) -> Iterator[bool]:
    """Whether whoever wrote this journal is dead; if so nobody else deals with it while the block lasts."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        locked = False
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = path.exists()  # not one that somebody else has dealt with meanwhile
        yield locked
    finally:
        os.close(descriptor)


def read(path: Path, offset: int) -> Reading:
    """Records from `offset` on, or from the first one; a torn one ends them, and all of another format is one. Raises OSError.

    There are none only behind the last one: a journal that grew while the database was away is read piece by piece.
    """
    start = max(offset, len(_BEGINNING))
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if file.read(len(_BEGINNING)) != _BEGINNING:
            return Reading((), offset, size)
        if start >= size:
            return Reading((), offset, 0)
        file.seek(start)
        content = file.read(_PIECE_BYTES)
    entries, place = [], 0
    while (found := _record(content, place)) is not None:
        entry, place = found
        entries.append(entry)
    return Reading(tuple(entries), start + place, size - start - place)


def _record(content: bytes, place: int) -> tuple[Entry, int] | None:
    begins = place + _FRAME.size
    if begins > len(content):
        return None
    size, checksum = _FRAME.unpack_from(content, place)
    record = content[begins : begins + size]
    if not 0 < size <= _RECORD_BYTES_MAX or len(record) < size or zlib.crc32(record) != checksum:
        return None
    entry = _entry(record)
    return None if entry is None else (entry, begins + size)


def _entry(record: bytes) -> Entry | None:
    """What a process of any version wrote, as far as this one knows it; None for what none has written.

    Amounts are only ever added, behind the others: what is missing was not counted then, and what is more has no column in
    the database of this version. Another order or meaning needs another `_BEGINNING`.
    """
    try:
        day, project, key_id, model, capability, *amounts = from_json(record)
    except (ValueError, TypeError):
        return None
    known = amounts[:_AMOUNTS]
    account = (project, key_id, model, capability)
    if not all(isinstance(each, str) for each in (day, *account)) or not all(isinstance(each, int) for each in known):
        return None
    return Entry(day, Account(*account), Use(*known))

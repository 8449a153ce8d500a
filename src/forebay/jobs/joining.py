"""Puts the results of a batch together: all segments, and an error line for every line without a result, into two files.

It refuses to hold a file in memory, and to leave two versions of one: who does it again after a crash writes the same bytes
to the same place.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass

from forebay.blobs.blobs import Blobs, Writer
from forebay.clock import Clock, Slices
from forebay.dialects.openai.batches import failure_line, line_id, parse_line
from forebay.errors import InvalidRequest, NotFound
from forebay.jobs.lines import LineReader, Place, unpack_numbers, unpack_places
from forebay.store.batches import Batch, BatchStore, Chunk, Segment
from forebay.store.dead_letters import LostLine
from forebay.store.files import blob_key
from forebay.store.job_state import JobState

_PIECE_BYTES = 2**20
_PIECES_AT_ONCE = 8  # that are fetched together: a store that is far away takes its time for each
_LOST_BY_STATE = {
    JobState.EXPIRED: ("batch_expired", "The batch was not finished within its completion window."),
    JobState.CANCELLED: ("batch_cancelled", "The batch was cancelled before this line was run."),
}


@dataclass(frozen=True, slots=True)
class Part:
    """One of the two files of a batch, stored under a key that follows from the id of the batch."""

    file_id: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Joined:
    """What became of a batch. Without a line a file is none; `missing` lines had no result."""

    output: Part | None
    errors: Part | None
    missing: int
    lost: list[LostLine]
    expired: bool


class _Hashing:
    """Writes and measures."""

    def __init__(self, out: Writer) -> None:
        self._out = out
        self._hash = hashlib.sha256()
        self.size = 0

    async def write(self, data: bytes) -> None:
        self._hash.update(data)
        self.size += len(data)
        await self._out.write(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@dataclass(frozen=True, slots=True)
class _Blob:
    """What a segment has written, and how much of it there is."""

    key: str
    size: int


def _pieces(blobs: Iterable[_Blob]) -> Iterator[tuple[str, int, int]]:
    for blob in blobs:
        for offset in range(0, blob.size, _PIECE_BYTES):
            yield blob.key, offset, min(_PIECE_BYTES, blob.size - offset)


class Joiner:
    """Makes the files of batches whose chunks have all ended."""

    def __init__(self, batches: BatchStore, blobs: Blobs, clock: Clock) -> None:
        self._batches = batches
        self._blobs = blobs
        self._clock = clock

    async def join(self, batch: Batch) -> Joined:
        """Write both files. Raises StoreUnavailable, InsufficientStorage."""
        segments = await self._batches.segments(batch.id)
        chunks = await self._batches.chunks(batch.id)
        missing = await asyncio.to_thread(_missing, chunks, segments)
        lost: list[LostLine] = []
        output = [_Blob(each.output_key, each.output_bytes) for each in segments if each.output_key is not None]
        errors = [_Blob(each.error_key, each.error_bytes) for each in segments if each.error_key is not None]
        return Joined(
            await self._write(output_file_id(batch.id), self._copied(output)) if output else None,
            await self._write(error_file_id(batch.id), self._errors(batch, errors, missing, lost))
            if errors or missing
            else None,
            sum(len(places) for _, places in missing),
            lost,
            any(chunk.state is JobState.EXPIRED for chunk, _ in missing),
        )

    async def _write(self, file_id: str, pieces: AsyncGenerator[bytes, None]) -> Part:
        async with aclosing(pieces), self._blobs.write(blob_key(file_id)) as out:
            hashing = _Hashing(out)
            async for piece in pieces:
                await hashing.write(piece)
        return Part(file_id, hashing.size, hashing.sha256)

    async def _copied(self, blobs: Iterable[_Blob]) -> AsyncGenerator[bytes, None]:
        """The bytes of all of them, one after the other; the pieces that come next are fetched meanwhile."""
        ahead: deque[asyncio.Task[bytes]] = deque()
        try:
            for key, offset, length in _pieces(blobs):
                ahead.append(asyncio.create_task(self._blobs.read(key, offset, length)))
                if len(ahead) == _PIECES_AT_ONCE:
                    yield await ahead.popleft()
            while ahead:
                yield await ahead.popleft()
        finally:
            for reading in ahead:
                reading.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def _errors(
        self, batch: Batch, blobs: list[_Blob], missing: list[tuple[Chunk, list[Place]]], lost: list[LostLine]
    ) -> AsyncGenerator[bytes, None]:
        """The error lines that are written, then those of missing lines; adds the given-up ones to `lost`."""
        async with aclosing(self._copied(blobs)) as copied:
            async for piece in copied:
                yield piece
        reader, slices = LineReader(self._blobs, blob_key(batch.input_file_id)), Slices(self._clock)
        ready = bytearray()
        for chunk, places in missing:
            code, message = _why(chunk)
            for place in places:
                await slices.pause()
                custom_id = await _custom_id(reader, place, batch.endpoint)
                ready += failure_line(line_id(batch.id, place.number), custom_id, code, message)
                if chunk.state is JobState.FAILED:
                    lost.append(_lost(place, custom_id, code, message, self._clock.now()))
                if len(ready) >= _PIECE_BYTES:
                    yield bytes(ready)
                    ready.clear()
        if ready:
            yield bytes(ready)

    async def discard(self, batch: Batch) -> None:
        """Remove files that were written and never came to belong to the batch."""
        if batch.output_file_id is None:
            await self._blobs.delete(blob_key(output_file_id(batch.id)))
        if batch.error_file_id is None:
            await self._blobs.delete(blob_key(error_file_id(batch.id)))


def output_file_id(batch_id: str) -> str:
    """The id of the output file, as unguessable as that of the batch."""
    return _file_id(batch_id, "output")


def error_file_id(batch_id: str) -> str:
    """The id of the error file."""
    return _file_id(batch_id, "errors")


def _file_id(batch_id: str, which: str) -> str:
    return "file_" + hashlib.sha256(f"{batch_id}/{which}".encode()).hexdigest()[:32]


def _missing(chunks: list[Chunk], segments: list[Segment]) -> list[tuple[Chunk, list[Place]]]:
    """Of each chunk the lines that no segment has."""
    written = {number for segment in segments for number in unpack_numbers(segment.lines)}
    return list(_left(chunks, written))


def _left(chunks: list[Chunk], written: set[int]) -> Iterator[tuple[Chunk, list[Place]]]:
    for chunk in chunks:
        places = [place for place in unpack_places(chunk.lines) if place.number not in written]
        if places:
            yield chunk, places


def _why(chunk: Chunk) -> tuple[str, str]:
    own = (chunk.error_code or "internal_error", chunk.error_message or "The line could not be run.")
    return _LOST_BY_STATE.get(chunk.state, own)


async def _custom_id(reader: LineReader, place: Place, endpoint: str) -> str | None:
    """The name of a line; none if the input file was removed meanwhile."""
    try:
        return parse_line(await reader.read(place), endpoint).custom_id
    except (NotFound, InvalidRequest):
        return None


def _lost(place: Place, custom_id: str | None, code: str, message: str, now: float) -> LostLine:
    return LostLine(
        custom_id=custom_id or "",
        line=place.number,
        source_offset=place.offset,
        source_bytes=place.length,
        error_code=code,
        error_message=message,
        attempts=[{"attempt": 1, "at": now, "status": 500, "code": code, "message": message}],
    )

"""The one way of a recording to an engine: taken from where it is into a private file, and decoded into another.

It refuses local paths, every scheme but `data:`, http and https, hosts that the settings do not name, and to hold a
recording in memory; no engine ever sees an address or a container.
"""

import binascii
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Protocol

from forebay.clock import Clock
from forebay.config import AudioSettings
from forebay.dialects.speech import AudioRef
from forebay.errors import InsufficientStorage, InvalidRequest, Unreachable
from forebay.media.decoder import Decoder, invalid, too_large
from forebay.media.private_file import PrivateFile, PrivateFiles, in_thread
from forebay.outbound import Outbound
from forebay.speech import SAMPLE_BYTES, SAMPLE_RATE

_PIECE_BYTES = 2**20
_BASE64_CHARS = 4 * 2**18  # a multiple of four
_DATA = re.compile(
    r"data:(?:audio|video)/[a-z0-9.+-]{1,64}(?:;[a-z0-9-]{1,32}=[a-z0-9.,+\"-]{1,64}){0,4};base64,", re.IGNORECASE
)
_DATA_HEAD_CHARS = 1024
_NOT_BASE64 = "Its base64 is not valid: write it in one line, with its padding and without percent-encoding."


class StoredFiles(Protocol):
    """Where uploaded files are."""

    def stream(self, project: str, file_id: str, bytes_max: int) -> AsyncGenerator[bytes, None]:
        """The bytes of the project's file in pieces. Raises NotFound, and PayloadTooLarge (`media_too_large`)."""
        ...


class Spool:
    """A recording as it was sent, on the disk."""

    def __init__(self, file: PrivateFile, bytes_max: int) -> None:
        self.file = file
        self.bytes = 0
        self._bytes_max = bytes_max
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    async def write(self, data: bytes) -> None:
        """Add bytes. Raises PayloadTooLarge (`media_too_large`), InsufficientStorage and StoreUnavailable."""
        self.bytes += len(data)
        if self.bytes > self._bytes_max:
            raise too_large(f"It has at most {self._bytes_max} bytes.")
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= _PIECE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Hand what waits to the operating system."""
        pieces, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if pieces:
            await in_thread(self.file.write, b"".join(pieces))

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """What was written, from its beginning."""
        await self.flush()
        offset = 0
        while piece := await in_thread(self.file.read, offset, _PIECE_BYTES):
            offset += len(piece)
            yield piece


class Recording:
    """What was recorded, as samples on the disk: mono, 16 kHz, signed 16-bit, little-endian."""

    def __init__(self, file: PrivateFile) -> None:
        self._file = file
        self.samples = file.size() // SAMPLE_BYTES
        self.seconds = self.samples / SAMPLE_RATE

    async def read(self, first_sample: int, count: int) -> bytes:
        """At most `count` samples from `first_sample` on."""
        return await in_thread(self._file.read, first_sample * SAMPLE_BYTES, count * SAMPLE_BYTES)


class Recordings:
    """Makes recordings of what requests refer to or bring along. Shared by the front door, jobs and the lines of batches."""

    def __init__(
        self,
        settings: AudioSettings,
        folder: Path,
        outbound: Outbound,
        stored: StoredFiles,
        clock: Clock,
        *,
        free_bytes_min: int = 0,
    ) -> None:
        self._settings = settings
        self._outbound = outbound
        self._stored = stored
        self._files = PrivateFiles(folder, free_bytes_min)
        self._decoder = Decoder(settings, clock)

    def open(self) -> None:
        """Make the folder, and remove what a crash left there. Raises SetupError."""
        self._files.open()

    async def close(self) -> None:
        """End whatever decodes."""
        await self._decoder.close()

    @asynccontextmanager
    async def spool(self) -> AsyncIterator[Spool]:
        """A place for one recording as it is sent; it is gone when the block ends."""
        async with self._files.file() as file:
            yield Spool(file, self._settings.bytes_max)

    @asynccontextmanager
    async def decode(
        self, spool: Spool, *, seconds_max: float | None = None, on_progress: Callable[[float], None] | None = None
    ) -> AsyncIterator[Recording]:
        """The samples of a recording; they are gone when the block ends. `on_progress` is told percents.

        Raises InvalidRequest (`media_invalid`), PayloadTooLarge (`media_too_large`), Overloaded, InsufficientStorage,
        StoreUnavailable and ServerError.
        """
        seconds = min(seconds_max or self._settings.seconds_max, self._settings.seconds_max)

        def on_percent(percent: int) -> None:
            if not self._files.has_room():
                raise InsufficientStorage
            if on_progress is not None:
                on_progress(float(percent))

        await spool.flush()
        async with self._files.file() as file:
            await self._decoder.decode(spool.file.reader, file.writer, int(seconds * SAMPLE_RATE), on_percent)
            yield Recording(file)

    def check(self, ref: AudioRef) -> None:
        """Raise InvalidRequest (`url_not_allowed`) for an address from which nothing will ever be fetched."""
        if ref.url is not None and ref.url[:5].lower() != "data:":
            self._check_fetches()
            self._outbound.check(ref.url, hosts=self._settings.fetch_hosts)

    def _check_fetches(self) -> None:
        if not self._settings.fetch_hosts:
            raise InvalidRequest(
                "This server fetches no recordings. Send the recording itself, or upload it as a file.",
                param="url",
                code="url_not_allowed",
            )

    async def fetch(self, spool: Spool, ref: AudioRef, project: str) -> None:
        """Write what `ref` refers to into the spool.

        Raises InvalidRequest (`url_not_allowed`, `media_invalid`), PayloadTooLarge (`media_too_large`), NotFound,
        Unreachable, InsufficientStorage and StoreUnavailable.
        """
        url = ref.url or ""
        if ref.file_id is not None:
            async with aclosing(self._stored.stream(project, ref.file_id, self._settings.bytes_max)) as pieces:
                async for piece in pieces:
                    await spool.write(piece)
        elif url[:5].lower() == "data:":
            await self._write_data(spool, url)
        else:
            await self._get(spool, url)
        await spool.flush()

    async def _write_data(self, spool: Spool, url: str) -> None:
        match = _DATA.match(url, 0, _DATA_HEAD_CHARS)
        if match is None:
            raise invalid("Write it as `data:audio/wav;base64,…`.")
        if (len(url) - match.end()) % 4:
            raise invalid(_NOT_BASE64)
        for start in range(match.end(), len(url), _BASE64_CHARS):
            end = start + _BASE64_CHARS
            try:
                data = binascii.a2b_base64(url[start:end].encode("ascii"), strict_mode=True)
            except ValueError:
                raise invalid(_NOT_BASE64) from None
            if end < len(url) and len(data) * 4 != _BASE64_CHARS * 3:
                raise invalid(_NOT_BASE64)  # padding inside it
            await spool.write(data)

    async def _get(self, spool: Spool, url: str) -> None:
        settings = self._settings
        self._check_fetches()
        answer = await self._outbound.download(
            url, spool.write, hosts=settings.fetch_hosts, timeout_seconds=settings.fetch_timeout_seconds
        )
        if answer.status == 429 or answer.status >= 500:
            raise Unreachable(f"The address of the recording answers with status {answer.status}.")
        if answer.status != 200:
            raise invalid(f"Its address answers with status {answer.status} and no recording.")
        if not answer.whole:
            raise Unreachable("The recording did not arrive whole.")

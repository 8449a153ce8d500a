"""The one way of a recording to an engine: taken from where it is into a private file, and decoded into another.

It refuses local paths, every scheme but `data:`, http and https, hosts that the settings do not name, and to hold a
recording in memory; no engine ever sees an address or a container.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from forebay.blobs.disk import in_thread
from forebay.clock import Clock
from forebay.config import AudioSettings
from forebay.dialects.speech import AudioRef
from forebay.media.decoder import Decoder
from forebay.media.medium import RECORDING
from forebay.media.private_file import PrivateFile, PrivateFiles
from forebay.media.sources import Sources, StoredFiles
from forebay.media.spool import Spool
from forebay.outbound import Outbound
from forebay.speech import SAMPLE_BYTES, SAMPLE_RATE


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
        self._sources = Sources(outbound, stored, settings.fetch_hosts, settings.fetch_timeout_seconds)
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
            yield Spool(file, RECORDING, self._settings.bytes_max)

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
            self._files.check_room()
            if on_progress is not None:
                on_progress(float(percent))

        await spool.flush()
        async with self._files.file() as file:
            await self._decoder.decode(spool.file.reader, file.writer, int(seconds * SAMPLE_RATE), on_percent)
            yield Recording(file)

    def check(self, ref: AudioRef) -> None:
        """Raise InvalidRequest (`url_not_allowed`) for an address from which nothing will ever be fetched."""
        if ref.url is not None:
            self._sources.check(RECORDING, ref.url, "url")

    async def fetch(self, spool: Spool, ref: AudioRef, project: str) -> None:
        """Write what `ref` refers to into the spool.

        Raises InvalidRequest (`url_not_allowed`, `media_invalid`), PayloadTooLarge (`media_too_large`), NotFound,
        Unreachable, InsufficientStorage and StoreUnavailable.
        """
        await self._sources.read(spool, project, url=ref.url, file_id=ref.file_id, bytes_max=self._settings.bytes_max)

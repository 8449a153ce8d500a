"""Recordings and pictures as the server has them, without a server: on a folder, with real uploads and a real way out."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from forebay.blobs.blobs import open_blobs
from forebay.clock import SystemClock
from forebay.config import AudioSettings, ImageSettings, MediaSettings, OutboundSettings, Settings
from forebay.media.files import UploadedFiles
from forebay.media.pictures import Pictures
from forebay.media.recordings import Recordings
from forebay.outbound import Outbound
from forebay.store.database import Database
from forebay.store.files import FileStore


@asynccontextmanager
async def recordings(folder: Path, *, free_bytes_min: int = 0, **settings: Any) -> AsyncIterator[Recordings]:
    """With further settings of `[audio]`. Files are those of the database in `folder`."""
    async with _ways(folder) as (way_out, stored):
        made = Recordings(
            AudioSettings(**settings), folder / "audio", way_out, stored, SystemClock(), free_bytes_min=free_bytes_min
        )
        async with _opened(made):
            yield made


@asynccontextmanager
async def pictures(
    folder: Path, *, free_bytes_min: int = 0, fetching: MediaSettings | None = None, **settings: Any
) -> AsyncIterator[Pictures]:
    """With further settings of `[images]`, and `fetching` as `[media]`. Files are those of the database in `folder`."""
    async with _ways(folder) as (way_out, stored):
        made = Pictures(
            ImageSettings(**settings),
            fetching or MediaSettings(),
            folder / "pictures",
            way_out,
            stored,
            SystemClock(),
            free_bytes_min=free_bytes_min,
        )
        async with _opened(made):
            yield made


@asynccontextmanager
async def _opened(made: Recordings | Pictures) -> AsyncIterator[None]:
    made.open()
    try:
        yield
    finally:
        await made.close()


@asynccontextmanager
async def _ways(folder: Path) -> AsyncIterator[tuple[Outbound, UploadedFiles]]:
    """To addresses, and to what was uploaded."""
    whole = Settings(data_dir=folder)
    database = await Database.open(whole)
    way_out = Outbound(OutboundSettings(allowed_networks=("127.0.0.1/32",)), SystemClock())
    try:
        yield way_out, UploadedFiles(FileStore(database, SystemClock()), open_blobs(whole))
    finally:
        await way_out.close()
        await database.close()


async def samples(recordings: Recordings, content: bytes, **options: Any) -> bytes:
    """All samples of a file."""
    async with recordings.spool() as spool:
        await spool.write(content)
        async with recordings.decode(spool, **options) as recording:
            return await recording.read(0, recording.samples)

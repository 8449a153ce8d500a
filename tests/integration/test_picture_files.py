"""Pictures that become files: of one whose caller leaves nothing stays, and large ones hold up nobody."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import pytest

from forebay.blobs.blobs import Blobs, open_blobs
from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.dialects.imaging import Painted
from forebay.jobs.picture_files import kept_files
from forebay.pixels import Size
from forebay.store.database import Database
from forebay.store.files import FileStore
from forebay.store.keys import KeyStore
from tests.support.picture_jobs import blobs_of_files

SECONDS = 3600
TRIES = 400
STEP_SECONDS = 0.00005


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = await Database.open(Settings(data_dir=tmp_path / "data"))
    yield opened
    await opened.close()


@pytest.fixture
def files(database: Database) -> FileStore:
    return FileStore(database, SystemClock())


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return open_blobs(Settings(data_dir=tmp_path / "data"))


@pytest.fixture
async def project(database: Database) -> str:
    return (await KeyStore(database, SystemClock()).get_or_create_project("default")).id


async def test_a_cancel_at_any_moment_leaves_no_file(
    tmp_path: Path, files: FileStore, blobs: Blobs, project: str
) -> None:
    """Not even while the row of the file is committed."""
    picture = Painted(b"picture", "image/png", Size(1, 1), {})

    async def keep_for_ever() -> None:
        async with kept_files(files, blobs, project, SECONDS) as keep:
            await keep(picture)
            await asyncio.Event().wait()

    for number in range(TRIES):
        keeping = asyncio.create_task(keep_for_ever())
        until = perf_counter() + number * STEP_SECONDS
        while perf_counter() < until:
            await asyncio.sleep(0)
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping
    assert await files.list(project) == ([], False)
    assert not blobs_of_files(tmp_path)


@pytest.mark.usefixtures("no_collections")
async def test_a_large_picture_holds_up_nobody(files: FileStore, blobs: Blobs, project: str) -> None:
    picture = Painted(bytes(200 * 2**20), "image/png", Size(1, 1), {})
    began = perf_counter()
    hashlib.sha256(picture.data)
    alone = perf_counter() - began
    for _ in range(10):  # a busy machine makes gaps as well, but not each time
        gap = await longest_gap(files, blobs, project, picture)
        if gap < alone / 2:
            break
    assert gap < alone / 2


async def longest_gap(files: FileStore, blobs: Blobs, project: str, picture: Painted) -> float:
    """For how long nothing else ran while a picture was kept."""
    gaps = [0.0]

    async def watch() -> None:
        before = perf_counter()
        while True:
            await asyncio.sleep(0)
            gaps.append(perf_counter() - before)
            before = perf_counter()

    watching = asyncio.create_task(watch())
    async with kept_files(files, blobs, project, SECONDS) as keep:
        await keep(picture)
    watching.cancel()
    return max(gaps)

"""The files of a batch, put together from segments in S3 and on disk."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forebay.blobs.blobs import Blobs
from forebay.blobs.local import LocalBlobs
from forebay.blobs.s3 import S3Blobs
from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.errors import NotFound
from forebay.inference import Usage
from forebay.jobs.joining import Joiner, output_file_id
from forebay.jobs.lines import Place, pack_numbers, pack_places
from forebay.store.batches import BATCH, CHUNK, Batch, BatchStore, NewBatch, Segment
from forebay.store.database import Database
from forebay.store.files import blob_key
from forebay.store.job_records import NewJob
from forebay.store.jobs import JobStore
from tests.support import s3

SEGMENTS = 24


@pytest.fixture
async def batches(tmp_path: Path) -> AsyncIterator[BatchStore]:
    database = await Database.open(Settings(data_dir=tmp_path / "data"))
    yield BatchStore(database, SystemClock())
    await database.close()


def content(number: int) -> bytes:
    """Small ones, and one of several pieces."""
    return b"%d\n" % number * (1 if number != 5 else 2_000_000)


async def written(batches: BatchStore, blobs: Blobs) -> Batch:
    """A batch whose segments are all there."""
    async with batches.database.begin() as transaction:
        new = [NewJob(BATCH, "default", id="batch_1"), NewJob(CHUNK, "default", id="chunk_1", parent_id="batch_1")]
        await JobStore(batches.database, SystemClock()).insert(transaction, new)
        await batches.insert(transaction, NewBatch("batch_1", "default", "/v1/x", "file_x", "24h", None, None, 0))
        places = pack_places(Place(number, 0, 0) for number in range(SEGMENTS))
        await batches.add_chunks(transaction, "batch_1", [("chunk_1", places)])
        for number in range(SEGMENTS):
            key, data = f"segments/batch_1/{number}", content(number)
            lines = pack_numbers([number])
            segment = Segment("chunk_1", number, "batch_1", lines, key, len(data), None, 0)
            await batches.add_segment(transaction, segment, Usage(1, 1, 0))
    for number in range(SEGMENTS):
        await blobs.put(f"segments/batch_1/{number}", content(number))
    return await batches.load("batch_1")


async def test_segments_far_away_are_fetched_together_and_kept_in_order(batches: BatchStore) -> None:
    async with s3.proxy() as proxy:
        blobs = S3Blobs(await s3.settings_for(await s3.new_bucket(), proxy.url))
        batch = await written(batches, blobs)
        proxy.delay_seconds = 0.05
        joined = await Joiner(batches, blobs, SystemClock()).join(batch)
        assert 4 <= proxy.reading_most <= 8, "a few at once, and no more than the bound"
        assert (joined.missing, joined.errors) == (0, None)
        assert joined.output is not None
        found = await blobs.read(blob_key(joined.output.file_id))
        assert (joined.output.size, found) == (len(found), b"".join(content(number) for number in range(SEGMENTS)))


async def test_a_segment_that_is_gone_leaves_no_file_and_no_read(batches: BatchStore, tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "blobs", 0)
    await blobs.check()
    batch = await written(batches, blobs)
    await blobs.delete("segments/batch_1/7")
    before = asyncio.all_tasks()
    with pytest.raises(NotFound):
        await Joiner(batches, blobs, SystemClock()).join(batch)
    assert asyncio.all_tasks() <= before, "what was fetched ahead has ended"
    with pytest.raises(NotFound):
        await blobs.read(blob_key(output_file_id(batch.id)))

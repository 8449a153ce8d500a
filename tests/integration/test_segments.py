"""The results of several chunks on their way to the store: never more than one segment of them is unwritten."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from forebay.blobs.local import LocalBlobs
from forebay.clock import SystemClock, new_id
from forebay.config import BatchSettings, Settings
from forebay.inference import Usage
from forebay.jobs.kinds import Run
from forebay.jobs.lines import Place, pack_places, unpack_numbers
from forebay.jobs.segments import Result, SegmentStore, SegmentWriter, Unwritten
from forebay.store.batches import BATCH, CHUNK, RUN, Batch, BatchStore, NewBatch
from forebay.store.database import Database
from forebay.store.dead_letters import DeadLetterStore
from forebay.store.job_records import NewJob, Verdict
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from tests.support.server import eventually
from tests.support.usage import job_meter

LINES = 8
SETTINGS = BatchSettings(segment_lines=LINES, segment_seconds=3600)
LEASE_SECONDS = 3600.0


class GatedBlobs(LocalBlobs):
    """A folder that takes nothing while its gate is shut."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 0)
        self.gate = asyncio.Event()
        self.waiting = 0

    async def put(self, key: str, data: bytes) -> None:
        """Write once the gate is open."""
        self.waiting += 1
        await self.gate.wait()
        await super().put(key, data)


@dataclass
class Chunks:
    """Two chunks of one batch, with a writer each."""

    blobs: GatedBlobs
    batches: BatchStore
    batch: Batch
    unwritten: Unwritten
    writers: list[SegmentWriter]
    writing: list[asyncio.Task[None]] = field(default_factory=list)

    async def segments(self) -> list[list[int]]:
        """The numbers of the lines in each segment."""
        return [sorted(unpack_numbers(each.lines)) for each in await self.batches.segments(self.batch.id)]


@pytest.fixture
async def chunks(tmp_path: Path) -> AsyncIterator[Chunks]:
    """The chunks, leased and being written."""
    database = await Database.open(Settings(data_dir=tmp_path))
    clock = SystemClock()
    jobs, batches = JobStore(database, clock), BatchStore(database, clock)
    blobs = GatedBlobs(tmp_path / "blobs")
    await blobs.check()
    store = SegmentStore(jobs, batches, DeadLetterStore(database, clock), blobs, job_meter(database, clock), clock)
    batch_id, ids = new_id("batch"), [new_id("chunk"), new_id("chunk")]
    async with database.begin() as transaction:
        await jobs.insert(transaction, [NewJob(BATCH, "default", id=batch_id)])
        await batches.insert(
            transaction, NewBatch(batch_id, "default", "/v1/x", "file_x", "24h", None, None, clock.now())
        )
    (held,) = await jobs.lease({BATCH: 1}, "desk", LEASE_SECONDS)
    async with database.begin() as transaction:
        await jobs.settle(transaction, held, Verdict(JobState.WAITING, jobs.now(), stage=RUN))
        await jobs.insert(transaction, [NewJob(CHUNK, "default", id=each, parent_id=batch_id) for each in ids])
        places = [pack_places(Place(number, 0, 0) for number in numbers) for numbers in (range(50), range(50, 100))]
        await batches.add_chunks(transaction, batch_id, list(zip(ids, places, strict=True)))
        await jobs.measure(transaction, batch_id, 100, "fake")
        await batches.begin(transaction, batch_id, "fake", jobs.now())
    batch, unwritten = await batches.load(batch_id), Unwritten(SETTINGS)
    leases = await jobs.lease({CHUNK: 2}, "node", LEASE_SECONDS)
    writers = [SegmentWriter(store, Run(lease), batch, 0, SETTINGS, clock, unwritten) for lease in leases]
    made = Chunks(blobs, batches, batch, unwritten, writers)
    made.writing = [asyncio.create_task(writer.write()) for writer in writers]
    yield made
    for task in made.writing:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    for writer in writers:
        await writer.abandon()
    await database.close()


def result(number: int) -> Result:
    """What became of a line."""
    return Result(number, f"{number}\n".encode(), Usage(1, 1, 0))


async def test_all_chunks_together_keep_no_more_than_a_segment(chunks: Chunks) -> None:
    first, second = chunks.writers
    for number in range(5):
        await first.add(result(number))
    for number in range(50, 53):
        await second.add(result(number))
    one_more = asyncio.create_task(second.add(result(53)))
    await eventually(lambda: chunks.blobs.waiting == 1, what="the first segment on its way")
    assert not one_more.done()
    assert first.lines + second.lines == LINES
    chunks.blobs.gate.set()
    await one_more
    await eventually(chunks.segments, what="a segment")
    assert (await chunks.segments())[0][: LINES // 2] == [0, 1, 2, 3]


async def test_the_chunk_that_has_most_writes_first(chunks: Chunks) -> None:
    first, second = chunks.writers
    chunks.blobs.gate.set()
    await first.add(result(0))
    for number in range(50, 53):
        await second.add(result(number))

    async def written() -> bool:
        return bool(await chunks.segments())

    await eventually(written, what="a segment")
    assert await chunks.segments() == [[50, 51, 52]]
    assert (first.lines, second.lines) == (1, 0)


async def test_a_chunk_that_is_given_up_makes_room_for_the_others(chunks: Chunks) -> None:
    first, second = chunks.writers
    for number in range(LINES):
        await first.add(result(number))
    one_more = asyncio.create_task(second.add(result(50)))
    await eventually(lambda: chunks.blobs.waiting == 1, what="the segment on its way")
    assert not one_more.done()
    chunks.writing[0].cancel()
    await first.abandon()
    await asyncio.wait_for(one_more, 5)
    assert (first.lines, second.lines) == (0, 1)
    assert await chunks.segments() == []


async def test_at_its_end_a_chunk_writes_what_it_has(chunks: Chunks) -> None:
    first, _ = chunks.writers
    chunks.blobs.gate.set()
    await first.add(result(7))
    first.close()
    await asyncio.wait_for(chunks.writing[0], 5)
    assert await chunks.segments() == [[7]]

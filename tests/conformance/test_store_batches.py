"""One suite for the batch store and the writing of segments, over SQLite and PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr

from forebay.blobs.local import LocalBlobs
from forebay.clock import new_id
from forebay.config import Settings
from forebay.errors import LeaseLost, NotFound
from forebay.inference import Usage
from forebay.jobs.kinds import Run
from forebay.jobs.lines import Place, pack_places, unpack_numbers
from forebay.jobs.outcome import Interruption
from forebay.jobs.segments import Result, SegmentStore, folder
from forebay.store.batches import BATCH, CHUNK, JOIN, LINES, RUN, Batch, BatchStore, NewBatch
from forebay.store.database import Database
from forebay.store.dead_letters import DeadLetterStore, LostLine
from forebay.store.job_records import Lease, NewJob, Verdict
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from forebay.store.keys import KeyStore
from tests.support import postgres
from tests.support.clock import FakeClock
from tests.support.usage import job_meter

LEASE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Office:
    """The stores of one test."""

    database: Database
    clock: FakeClock
    jobs: JobStore
    batches: BatchStore
    dead_letters: DeadLetterStore
    blobs: LocalBlobs
    segments: SegmentStore


@pytest.fixture(params=["sqlite", "postgres"])
async def office(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Office]:
    url = SecretStr(postgres.new_database()) if request.param == "postgres" else None
    database = await Database.open(Settings(data_dir=tmp_path / "data", database_url=url))
    clock = FakeClock()
    jobs, batches = JobStore(database, clock), BatchStore(database, clock)
    dead_letters, blobs = DeadLetterStore(database, clock), LocalBlobs(tmp_path / "blobs", 0)
    await blobs.check()
    segments = SegmentStore(jobs, batches, dead_letters, blobs, job_meter(database, clock), clock)
    yield Office(database, clock, jobs, batches, dead_letters, blobs, segments)
    await database.close()


async def make(office: Office, project: str = "default", *, lines: int = 4) -> Batch:
    """A batch that waits for one chunk."""
    batch_id, chunk_id = new_id("batch"), new_id("chunk")
    office.clock.advance(1)
    async with office.database.begin() as transaction:
        await office.jobs.insert(transaction, [NewJob(BATCH, project, id=batch_id)])
        new = NewBatch(batch_id, project, "/v1/x", "file_x", "24h", {"a": "b"}, None, office.clock.now())
        await office.batches.insert(transaction, new)
    held = (await office.jobs.lease({BATCH: 1}, "a", LEASE_SECONDS))[0]
    async with office.database.begin() as transaction:
        await office.jobs.settle(transaction, held, Verdict(JobState.WAITING, office.jobs.now(), stage=RUN))
        await office.jobs.insert(transaction, [NewJob(CHUNK, project, id=chunk_id, parent_id=batch_id)])
        places = pack_places(Place(number, 0, 0) for number in range(1, lines + 1))
        await office.batches.add_chunks(transaction, batch_id, [(chunk_id, places)])
        await office.jobs.measure(transaction, batch_id, lines, "fake")
        await office.batches.begin(transaction, batch_id, "fake", office.jobs.now())
    return await office.batches.load(batch_id)


async def lease_chunk(office: Office) -> Lease:
    return (await office.jobs.lease({CHUNK: 1}, "a", LEASE_SECONDS))[0]


async def settle(office: Office, held: Lease, state: JobState) -> None:
    async with office.database.begin() as transaction:
        await office.jobs.settle(transaction, held, Verdict(state, office.jobs.now()))


def answered(number: int) -> Result:
    return Result(number, f"answer {number}\n".encode(), Usage(10, 2, 3))


def lost(number: int) -> Result:
    letter = LostLine(f"id-{number}", number, 0, 5, "engine_error", "It failed.", [{"attempt": 1}])
    return Result(number, f"error {number}\n".encode(), lost=letter)


async def test_a_batch_is_seen_by_its_project_alone(office: Office) -> None:
    other = (await KeyStore(office.database, office.clock).get_or_create_project("other")).id
    batch = await make(office, other)
    assert (await office.batches.get(other, batch.id)).metadata == {"a": "b"}
    assert (batch.job.total, batch.model, batch.in_progress_at) == (4, "fake", batch.job.progress_at)
    with pytest.raises(NotFound):
        await office.batches.get("default", batch.id)
    assert await office.batches.page("default", after=None, limit=10) == ([], False)
    with pytest.raises(NotFound):
        await office.batches.page("default", after=batch.id, limit=10)


async def test_many_at_once_are_counted_one_after_the_other(office: Office) -> None:
    async def make_if_there_is_room(number: int) -> bool:
        async with office.database.begin() as transaction:
            room = await office.batches.unfinished(transaction, "default") < 3
            if room:
                await office.jobs.insert(transaction, [NewJob(BATCH, "default", id=f"batch_{number}")])
        return room

    assert sum(await asyncio.gather(*(make_if_there_is_room(number) for number in range(8)))) == 3
    async with office.database.begin() as transaction:
        assert await office.batches.unfinished(transaction, "default") == 3
        # Whoever writes about the project otherwise does not wait for those who count.
        async with asyncio.timeout(5):
            if not office.database.is_sqlite:  # there one writes at a time
                async with office.database.begin() as other:
                    await office.jobs.insert(other, [NewJob(CHUNK, "default", parent_id="batch_0")])


async def test_pages_go_back_in_time(office: Office) -> None:
    made = [(await make(office)).id for _ in range(5)]
    first, more = await office.batches.page("default", after=None, limit=3)
    assert ([batch.id for batch in first], more) == (made[:1:-1], True)
    second, more = await office.batches.page("default", after=first[-1].id, limit=3)
    assert ([batch.id for batch in second], more) == (made[1::-1], False)


async def test_a_segment_is_committed_with_counts_usage_and_dead_letters(office: Office) -> None:
    batch = await make(office)
    run = Run(await lease_chunk(office))
    await office.segments.write(run, batch, 0, [answered(1), lost(2), answered(4)])
    after = await office.batches.load(batch.id)
    assert (after.job.completed, after.job.failed) == (2, 1)
    assert (after.input_tokens, after.output_tokens, after.cached_tokens) == (20, 4, 6)
    (segment,) = await office.batches.segments(batch.id)
    assert unpack_numbers(segment.lines) == [1, 2, 4]
    assert segment.output_key is not None
    assert segment.error_key is not None
    assert await office.blobs.read(segment.output_key) == b"answer 1\nanswer 4\n"
    assert await office.blobs.read(segment.error_key) == b"error 2\n"
    (letter,) = await office.dead_letters.list("default")
    assert (letter.custom_id, letter.line, letter.source_file_id) == ("id-2", 2, "file_x")


async def test_a_segment_that_is_sent_again_counts_once(office: Office) -> None:
    batch = await make(office)
    run = Run(await lease_chunk(office))
    for _ in range(3):
        await office.segments.write(run, batch, 0, [answered(1), lost(2)])
    after = await office.batches.load(batch.id)
    assert (after.job.completed, after.job.failed, after.input_tokens) == (1, 1, 10)
    assert len(await office.batches.segments(batch.id)) == 1
    assert len(await office.dead_letters.list("default")) == 1


async def test_a_late_write_is_refused_whole(office: Office) -> None:
    batch = await make(office)
    late = Run(await lease_chunk(office))
    office.clock.advance(LEASE_SECONDS * 2)
    async with office.database.begin() as transaction:
        await office.jobs.take_back(transaction, [late.lease.job])
    current = Run(await lease_chunk(office))
    with pytest.raises(LeaseLost):
        await office.segments.write(late, batch, 0, [answered(1), lost(2)])
    assert (await office.batches.load(batch.id)).job.completed == 0
    assert await office.dead_letters.list("default") == []
    await office.segments.write(current, batch, 0, [answered(1)])
    with pytest.raises(LeaseLost):
        await office.segments.write(late, batch, 0, [answered(1)])
    assert (await office.batches.load(batch.id)).job.completed == 1


async def test_nothing_is_written_once_the_lease_is_known_to_be_lost(office: Office) -> None:
    batch = await make(office)
    run = Run(await lease_chunk(office), interruption=Interruption.LEASE_LOST)
    with pytest.raises(LeaseLost):
        await office.segments.write(run, batch, 0, [answered(1)])
    assert [key async for key in office.blobs.list(folder(batch.id))] == []


async def test_chunks_are_swept_when_their_batch_has_ended_and_not_before(office: Office) -> None:
    batch = await make(office)
    held = await lease_chunk(office)
    await office.segments.write(Run(held), batch, 0, [answered(1)])
    assert await office.batches.unswept(10) == []
    assert await office.batches.live([batch.id, "batch_none"]) == {batch.id}
    assert await office.batches.sweep(batch.id) == 0
    await settle(office, held, JobState.COMPLETED)
    async with office.database.begin() as transaction:
        await office.jobs.wake_parent(transaction, batch.id, CHUNK, JOIN)
    parent = (await office.jobs.lease({BATCH: 1}, "a", LEASE_SECONDS))[0]
    await settle(office, parent, JobState.COMPLETED)
    assert await office.batches.unswept(10) == [batch.id]
    assert await office.batches.live([batch.id]) == set()
    assert await office.batches.sweep(batch.id) == 1
    assert await office.batches.segments(batch.id) == []
    assert await office.batches.chunks(batch.id) == []
    assert await office.batches.unswept(10) == []
    assert (await office.batches.load(batch.id)).job.completed == 1


async def test_the_rate_of_a_model_is_blended(office: Office) -> None:
    assert await office.jobs.line_rate("fake") is None
    for rate in (10.0, 20.0):
        async with office.database.begin() as transaction:
            await office.batches.learn_rate(transaction, "fake", rate)
    assert await office.jobs.line_rate("fake") == pytest.approx(13.0)


async def test_the_rates_of_batches_that_end_at_once_are_blended(office: Office) -> None:
    async def learn() -> None:
        async with office.database.begin() as transaction:
            await office.batches.learn_rate(transaction, "fake", 10.0)

    for _ in range(5):
        await asyncio.gather(*(learn() for _ in range(8)))
    assert await office.jobs.line_rate("fake") == pytest.approx(10.0)


async def test_lines_in_line_are_those_that_have_not_ended_of_batches_that_live(office: Office) -> None:
    async def queued(project: str = "default") -> int:
        async with office.database.begin() as transaction:
            assert await office.batches.unfinished(transaction, project) >= 0
            return await office.batches.queued_lines(transaction, project)

    other = (await KeyStore(office.database, office.clock).get_or_create_project("other")).id
    assert await queued() == 0
    batch = await make(office, lines=7)
    await make(office, other, lines=9)
    assert await queued() == 7
    async with office.database.begin() as transaction:
        await office.jobs.count(transaction, batch.id, completed=2, failed=1)
        unchecked = NewJob(BATCH, "default", id="batch_unchecked", payload={LINES: 20})
        await office.jobs.insert(transaction, [unchecked, NewJob(BATCH, "default", id="batch_uncounted")])
    assert await queued() == 24
    held = await office.jobs.lease({BATCH: 2}, "a", LEASE_SECONDS)
    for each in held:
        await settle(office, each, JobState.FAILED)
    assert await queued() == 4

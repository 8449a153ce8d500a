"""Two who come at once to the same rows of PostgreSQL: the second one waits, and then goes by what the first one did."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sqlalchemy as sa
from fastapi import Request

from forebay.blobs.blobs import Blobs, open_blobs
from forebay.config import FileSettings, ResponseSettings, Settings
from forebay.errors import Conflict, InsufficientStorage
from forebay.gateway.auth import Principal
from forebay.gateway.dead_letters import _Taken
from forebay.store.batches import BATCH, CHUNK, BatchStore, NewBatch
from forebay.store.database import Database, Transaction
from forebay.store.dead_letters import DeadLetterStore
from forebay.store.files import FileStore
from forebay.store.idempotency import KEEP_SECONDS, Answered, IdempotencyStore
from forebay.store.intake import IntakeStore, Pushed
from forebay.store.job_records import Job, NewJob, Verdict
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from forebay.store.key_format import Role
from forebay.store.keys import DEFAULT_PROJECT
from forebay.store.media_jobs import TRANSCRIPTION, MediaJobStore, NewMediaJob, media_key
from forebay.store.responses import RESPONSE, NewResponse, ResponseStore
from forebay.store.tables import jobs as jobs_table
from forebay.store.tables import media_jobs as media_table
from tests.support.clock import FakeClock
from tests.support.server import eventually

pytestmark = pytest.mark.parametrize("database", ["postgres"], indirect=True)

WAITING = sa.text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
)
FAILED = Verdict(JobState.FAILED, 0, error=("x", "y"))


@pytest.fixture
def jobs(database: Database, clock: FakeClock) -> JobStore:
    return JobStore(database, clock)


@pytest.fixture
def media(database: Database, clock: FakeClock) -> MediaJobStore:
    return MediaJobStore(database, clock, "node")


@pytest.fixture
def cellar(tmp_path: Path) -> Blobs:
    return open_blobs(Settings(data_dir=tmp_path / "data"))


async def until_it_waits(database: Database, acting: asyncio.Task[Any]) -> None:
    """Until somebody waits for a lock, and that is `acting`."""

    async def waits() -> bool:
        async with database.read() as connection:
            return acting.done() or bool(await connection.scalar(WAITING))

    await eventually(waits, what="a wait for a lock")
    assert not acting.done(), f"it did not wait: {acting}"


# What is renewed is not pruned.


async def test_a_key_that_is_claimed_anew_is_not_pruned(database: Database, clock: FakeClock) -> None:
    store = IdempotencyStore(database, clock)
    for key in ("k", "old"):
        async with database.begin() as transaction:
            assert await store.claim(transaction, "p", key, "before") is None
    clock.advance(KEEP_SECONDS)
    async with database.begin() as transaction:
        assert await store.claim(transaction, "p", "k", "now") is None
        await store.keep(transaction, "p", "k", 200, "made")
        pruning = asyncio.create_task(store.prune(clock.now(), 10))
        await until_it_waits(database, pruning)
    assert await pruning == 1
    assert await store.find("p", "k") == Answered("now", 200, "made")


async def test_a_message_that_is_taken_anew_is_not_pruned(database: Database, clock: FakeClock) -> None:
    store = IntakeStore(database, clock, 100)
    message, old = (Pushed(DEFAULT_PROJECT, "s", each) for each in ("1", "2"))
    for each in (message, old):
        async with database.begin() as transaction:
            assert await store.claim(transaction, each, "before") is None
    clock.advance(100)
    async with database.begin() as transaction:
        assert await store.claim(transaction, message, "now") is None
        pruning = asyncio.create_task(store.prune(clock.now(), 10))
        await until_it_waits(database, pruning)
    assert await pruning == 1
    assert await store.find(message) == "now"


async def test_a_response_that_is_continued_is_not_pruned(database: Database, clock: FakeClock) -> None:
    store = ResponseStore(database, clock, ResponseSettings(keep_seconds=100))
    for name in ("r", "old"):
        await store.keep(_response(name, clock))
    clock.advance(100)
    async with database.begin() as transaction:
        await store.insert(transaction, _response("next", clock, previous_id="r", chain=["r"]))
        pruning = asyncio.create_task(store.prune(clock.now(), 10))
        await until_it_waits(database, pruning)
    assert await pruning == 1
    assert (await store.history(DEFAULT_PROJECT, "next")).ids == ("r", "next")


def _response(name: str, clock: FakeClock, status: str = "completed", **fields: Any) -> NewResponse:
    return NewResponse(name, DEFAULT_PROJECT, status, b"[]", b'{"output": []}', clock.now(), **fields)


# What a project has is counted by one at a time.


@pytest.mark.parametrize("what", [BATCH, RESPONSE, TRANSCRIPTION])
async def test_who_adds_one_more_counts_what_another_has_just_added(
    database: Database, clock: FakeClock, jobs: JobStore, media: MediaJobStore, what: str
) -> None:
    responses = ResponseStore(database, clock, ResponseSettings())

    async def count(transaction: Transaction) -> int:
        if what == BATCH:
            return await BatchStore(database, clock).unfinished(transaction, DEFAULT_PROJECT)
        if what == RESPONSE:
            return await responses.unfinished(transaction, DEFAULT_PROJECT)
        return await media.unfinished(transaction, DEFAULT_PROJECT, what)

    async def add(transaction: Transaction, name: str) -> int:
        before = await count(transaction)
        await jobs.insert(transaction, [NewJob(what, DEFAULT_PROJECT, id=name)])
        if what == RESPONSE:
            await responses.insert(transaction, _response(name, clock, "queued"))
        return before

    async def add_another() -> int:
        async with database.begin() as transaction:
            return await add(transaction, "second")

    async with database.begin() as first:
        assert await add(first, "first") == 0
        adding = asyncio.create_task(add_another())
        await until_it_waits(database, adding)
        async with database.begin() as other:  # who does not count does not wait
            await jobs.insert(other, [NewJob("noop", DEFAULT_PROJECT)])
    assert await adding == 1


async def test_two_files_at_once_do_not_take_the_room_for_one(database: Database, clock: FakeClock) -> None:
    files = FileStore(database, clock, FileSettings(project_bytes_max=100))
    first, second = [await files.begin(DEFAULT_PROJECT) for _ in range(2)]

    async def finish_another() -> None:
        async with database.begin() as transaction:
            await files.finish(transaction, second, 60, "digest")

    async with database.begin() as transaction:
        await files.finish(transaction, first, 60, "digest")
        finishing = asyncio.create_task(finish_another())
        await until_it_waits(database, finishing)
    with pytest.raises(InsufficientStorage):
        await finishing


# Many jobs are locked in the order of their ids.


async def _assert_goes_in_order(jobs: JobStore, acting: asyncio.Task[Any]) -> None:
    """That who waits for "b" holds "a" by then."""
    await until_it_waits(jobs.database, acting)
    async with jobs.database.begin() as third:
        query = sa.select(jobs_table.c.id).where(jobs_table.c.id == "a").with_for_update(skip_locked=True)
        assert (await third.execute(query)).one_or_none() is None, "the first row is held by now"


@pytest.mark.parametrize("names", ["ab", "ba"])  # the order in which they lie on the disk
async def test_chunks_are_swept_in_the_order_in_which_jobs_are_pruned(
    database: Database, clock: FakeClock, jobs: JobStore, names: str
) -> None:
    batches = BatchStore(database, clock)
    async with database.begin() as transaction:
        await jobs.insert(transaction, [NewJob(BATCH, DEFAULT_PROJECT, id="0")])
        await batches.insert(transaction, NewBatch("0", DEFAULT_PROJECT, "/v1/x", "file", "24h", None, None, 0))
        for name in names:
            await jobs.insert(transaction, [NewJob(CHUNK, DEFAULT_PROJECT, id=name, parent_id="0")])
            await _failed(jobs, transaction, name)
    async with database.begin() as other:
        await jobs.lock(other, "b")
        sweeping = asyncio.create_task(batches.sweep("0"))
        await _assert_goes_in_order(jobs, sweeping)
    assert await sweeping == 2


async def _failed(jobs: JobStore, transaction: Transaction, name: str) -> Job:
    job = await jobs.lock(transaction, name)
    assert job is not None
    query = sa.update(jobs_table).where(jobs_table.c.id == name)
    await transaction.execute(query.values(state=JobState.FAILED, finished_at=jobs.now()))
    return job


@pytest.mark.parametrize("names", ["ab", "ba"])  # the order of their dead letters
async def test_dead_letters_are_taken_up_in_the_order_of_their_jobs(
    database: Database, clock: FakeClock, jobs: JobStore, names: str
) -> None:
    letters = DeadLetterStore(database, clock)
    caller = Principal("key", DEFAULT_PROJECT, Role.MEMBER)
    state = SimpleNamespace(desk=jobs, dead_letters=letters)  # what it asks of a desk here, the store can do
    taken = _Taken(cast(Request, SimpleNamespace(app=SimpleNamespace(state=state))), caller)
    async with database.begin() as transaction:
        for name in names:
            await jobs.insert(transaction, [NewJob("noop", DEFAULT_PROJECT, id=name)])
            taken._jobs[name] = await _failed(jobs, transaction, name)
            await letters.add_job(transaction, taken._jobs[name], FAILED)
    for letter in await letters.list(DEFAULT_PROJECT):
        taken._letters[letter.job_id] = [letter]

    async def requeue() -> list[dict[str, Any]]:
        async with database.begin() as transaction:
            return await taken.requeue(transaction)

    async with database.begin() as other:
        await jobs.lock(other, "b")
        requeueing = asyncio.create_task(requeue())
        await _assert_goes_in_order(jobs, requeueing)
    assert [each["id"] for each in await requeueing] == ["a", "b"]


# A job is tried again with what came with it, or not at all.


async def _handed_in_and_failed(media: MediaJobStore, jobs: JobStore, cellar: Blobs) -> Job:
    new = NewMediaJob("t", TRANSCRIPTION, DEFAULT_PROJECT, "/v1/x", b"{}", b"[]", has_media=True)
    await media.begin(new)
    await cellar.put(media_key(TRANSCRIPTION, "t"), b"sound")
    async with media.database.begin() as transaction:
        await jobs.insert(transaction, [NewJob(TRANSCRIPTION, DEFAULT_PROJECT, id="t")])
        await media.submit(transaction, new, 5)
        return await _failed(jobs, transaction, "t")


async def _revive(jobs: JobStore, job: Job) -> bool:
    async with jobs.database.begin() as transaction:
        return await jobs.revive(transaction, job)


async def test_a_job_that_is_being_tried_again_keeps_its_media(
    media: MediaJobStore, jobs: JobStore, cellar: Blobs
) -> None:
    job = await _handed_in_and_failed(media, jobs, cellar)
    async with jobs.database.begin() as transaction:
        assert await jobs.revive(transaction, job)
        closing = asyncio.create_task(media.close(cellar, "t"))
        await until_it_waits(jobs.database, closing)
    await closing
    assert [key async for key in cellar.list("recordings/")] == [media_key(TRANSCRIPTION, "t")]
    assert not await media.without_media(["t"])
    assert (await jobs.get(DEFAULT_PROJECT, "t")).state is JobState.AVAILABLE


async def test_a_job_whose_media_are_being_removed_is_not_tried_again(
    media: MediaJobStore, jobs: JobStore, cellar: Blobs
) -> None:
    job = await _handed_in_and_failed(media, jobs, cellar)
    async with jobs.database.begin() as transaction:
        await jobs.lock(transaction, "t")  # as the one who removes them does
        await transaction.execute(sa.update(media_table).values(media="removing"))
        reviving = asyncio.create_task(_revive(jobs, job))
        await until_it_waits(jobs.database, reviving)
    with pytest.raises(Conflict) as refused:
        await reviving
    assert (refused.value.code, refused.value.status) == ("input_gone", 409)
    assert (await jobs.get(DEFAULT_PROJECT, "t")).state is JobState.FAILED

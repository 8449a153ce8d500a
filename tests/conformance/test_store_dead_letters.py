"""One suite for dead letters, over SQLite and PostgreSQL."""

import asyncio
import itertools
import time
from dataclasses import replace

import pytest

from forebay.clock import SystemClock
from forebay.errors import NotFound
from forebay.store.database import Database
from forebay.store.dead_letters import Chosen, DeadLetterStore, LostLine
from forebay.store.files import FileStore
from forebay.store.job_records import NewJob, Verdict
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from forebay.store.keys import KeyStore
from tests.support.clock import FakeClock

WAITING = Chosen(waiting=True)


@pytest.fixture
def store(database: Database, clock: FakeClock) -> DeadLetterStore:
    return DeadLetterStore(database, clock)


def lost(name: str, code: str = "engine_error") -> LostLine:
    return LostLine(name, 7, 2**33, 50, code, "It failed.", [{"at": 1.5, "status": 500, "code": code, "message": "ä"}])


async def add(
    store: DeadLetterStore, clock: FakeClock, *lines: LostLine, kind: str = "batch", file_id: str = "file-1"
) -> str:
    """A job with these lost lines; its id."""
    jobs = JobStore(store.database, clock)
    async with store.database.begin() as transaction:
        (job_id,) = await jobs.insert(transaction, [NewJob(kind, "default")])
    job = await jobs.get("default", job_id)
    async with store.database.begin() as transaction:
        await store.add_lines(transaction, job, "/v1/completions", file_id, lines)
    clock.advance(1)
    return job_id


async def test_a_lost_line_is_read_as_it_was_written(store: DeadLetterStore, clock: FakeClock) -> None:
    job_id = await add(store, clock, lost("a"))
    (letter,) = await store.list("default")
    assert (letter.kind, letter.job_id, letter.endpoint, letter.custom_id) == ("batch", job_id, "/v1/completions", "a")
    assert (letter.line, letter.source_file_id, letter.source_offset, letter.source_bytes) == (7, "file-1", 2**33, 50)
    assert letter.attempts == lost("a").attempts
    assert (letter.requeued_at, letter.requeued_as) == (None, None)
    assert await store.get("default", letter.id) == letter
    other = await KeyStore(store.database, clock).get_or_create_project("other")
    assert await store.list(other.id) == []
    for change in (store.get, store.delete):
        with pytest.raises(NotFound):
            await change(other.id, letter.id)


async def test_a_job_that_was_given_up_is_kept_with_its_attempts(store: DeadLetterStore, clock: FakeClock) -> None:
    job_id = await add(store, clock, kind="webhook")
    job = await JobStore(store.database, clock).get("default", job_id)
    async with store.database.begin() as transaction:
        await store.add_job(transaction, job, Verdict(JobState.FAILED, 0, error=("url_unreachable", "x" * 5000)))
    (letter,) = await store.list("default", Chosen(kind="webhook"))
    assert (letter.job_id, letter.error_code, letter.endpoint) == (job_id, "url_unreachable", None)
    assert len(letter.error_message) <= 2000
    assert [attempt["code"] for attempt in letter.attempts] == ["url_unreachable"]


async def test_they_are_chosen_paged_and_counted(store: DeadLetterStore, clock: FakeClock) -> None:
    first = await add(store, clock, lost("a"), lost("b", "request_timeout"))
    second = await add(store, clock, lost("c"), lost("d"), lost("e"))

    async def names(chosen: Chosen, after: str | None = None, limit: int = 100) -> list[str | None]:
        return [letter.custom_id for letter in await store.list("default", chosen, after=after, limit=limit)]

    assert set(await names(Chosen(job_id=first))) == {"a", "b"}
    assert await names(Chosen(code="request_timeout")) == ["b"]
    assert await names(Chosen(kind="webhook")) == []
    everything = await names(Chosen())
    assert set(everything[:3]) == {"c", "d", "e"}
    page = await store.list("default", limit=2)
    assert [letter.custom_id for letter in page] == everything[:2]
    assert await names(Chosen(), after=page[-1].id) == everything[2:]
    with pytest.raises(NotFound):
        await names(Chosen(), after="dead_none")
    async with store.database.begin() as transaction:
        counts = [
            await store.count(transaction, "default", chosen)
            for chosen in (Chosen(), Chosen(job_id=second), Chosen(job_id=second, code="request_timeout"))
        ]
    assert counts == [5, 3, 0]


async def test_those_that_can_be_taken_up_are_told_apart(store: DeadLetterStore, clock: FakeClock) -> None:
    files, jobs = FileStore(store.database, clock), JobStore(store.database, clock)
    other = (await KeyStore(store.database, clock).get_or_create_project("other")).id
    async with store.database.begin() as transaction:
        kept = {"filename": "x", "purpose": "batch", "size": 1, "sha256": ""}
        for file_id, project_id, seconds in (("file-1", "default", 60.0), ("file-2", other, None)):
            await files.create_ready(transaction, project_id, file_id=file_id, keep_seconds=seconds, **kept)  # type: ignore[arg-type]
    await add(store, clock, lost("readable"))
    await add(store, clock, lost("of another project"), file_id="file-2")
    await add(store, clock, lost("gone"), file_id="file-3")
    (webhook,) = [await jobs.get("default", await add(store, clock, kind="webhook"))]
    async with store.database.begin() as transaction:
        await store.add_job(transaction, webhook, Verdict(JobState.FAILED, 0, error=("url_unreachable", "x")))

    async def takeable() -> list[str | None]:
        chosen = Chosen(takeable=True)
        found = [letter.custom_id for letter in await store.list("default", chosen)]
        async with store.database.begin() as transaction:
            assert await store.count(transaction, "default", chosen) == len(found)
        return found

    assert await takeable() == ["readable"], "the webhook has not ended"
    (held,) = await jobs.lease({"webhook": 1}, "a", 60)
    async with store.database.begin() as transaction:
        await jobs.settle(transaction, held, Verdict(JobState.FAILED, 0, error=("url_unreachable", "x")))
    assert await takeable() == [None, "readable"]
    clock.advance(60)
    assert await takeable() == [None], "the input file has expired"


async def test_a_requeue_is_written_down_once_unless_on_purpose(store: DeadLetterStore, clock: FakeClock) -> None:
    await add(store, clock, lost("a"), lost("b"))
    ids = [letter.id for letter in await store.list("default")]

    async def mark(chosen: list[str], job_id: str, *, again: bool = False) -> int:
        async with store.database.begin() as transaction:
            return await store.mark_requeued(transaction, chosen, job_id, again=again)

    assert await mark(ids[:1], "batch_1") == 1
    assert [letter.id for letter in await store.list("default", WAITING)] == ids[1:]
    assert await mark(ids, "batch_2") == 1
    assert await store.list("default", WAITING) == []
    assert {letter.id: letter.requeued_as for letter in await store.list("default")} == {
        ids[0]: "batch_1", ids[1]: "batch_2",
    }  # fmt: skip
    assert await mark(ids, "batch_3", again=True) == 2
    assert {letter.requeued_as for letter in await store.list("default")} == {"batch_3"}


async def test_old_ones_are_pruned_a_few_at_a_time(store: DeadLetterStore, clock: FakeClock) -> None:
    await add(store, clock, lost("a"), lost("b"), lost("c"))
    before = clock.now()
    await add(store, clock, lost("d"))
    assert [await store.prune(before, 2) for _ in range(3)] == [2, 1, 0]
    (left,) = await store.list("default")
    assert left.custom_id == "d"
    await store.delete("default", left.id)
    assert await store.list("default") == []


async def test_a_message_that_quotes_a_nul_is_kept_without_it(store: DeadLetterStore, clock: FakeClock) -> None:
    await add(store, clock, replace(lost("a"), error_message="Unknown field `a\0b`."))
    (letter,) = await store.list("default")
    assert letter.error_message == "Unknown field `a\ufffdb`."


@pytest.mark.usefixtures("no_collections")
async def test_many_lost_lines_let_others_go_on(store: DeadLetterStore) -> None:
    real = DeadLetterStore(store.database, SystemClock())
    turns = [time.thread_time()]  # of this thread alone, whatever else the machine does

    async def others() -> None:
        while True:
            await asyncio.sleep(0)
            turns.append(time.thread_time())

    going = asyncio.create_task(others())
    try:
        await add(real, FakeClock(), *(lost(str(number)) for number in range(20_000)))
    finally:
        going.cancel()
    longest = max(later - earlier for earlier, later in itertools.pairwise(turns))
    assert longest < (turns[-1] - turns[0]) / 5
    async with store.database.read() as transaction:
        assert await store.count(transaction, "default", Chosen()) == 20_000

"""One suite for responses and their events, over SQLite and PostgreSQL."""

import json
from typing import Any

import pytest
import sqlalchemy as sa

from forebay.config import JobSettings, ResponseSettings
from forebay.errors import InvalidRequest, LeaseLost, NotFound
from forebay.jobs.response import ResponseEnds, as_it_is
from forebay.store.database import Database
from forebay.store.job_records import Lease, NewJob, Verdict
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from forebay.store.keys import DEFAULT_PROJECT, KeyStore
from forebay.store.responses import RESPONSE, EventBatch, NewResponse, ResponseStore
from tests.support.clock import FakeClock

SETTINGS = ResponseSettings(
    keep_seconds=100,
    per_project_max=5,
    project_bytes_max=10_000,
    bytes_max=4_000,
    turns_max=3,
    conversation_bytes_max=5_000,
)
BODY: dict[str, Any] = {"id": "x", "status": "completed", "output": [{"type": "message", "said": "x"}], "error": None}


@pytest.fixture
def store(database: Database, clock: FakeClock) -> ResponseStore:
    return ResponseStore(database, clock, SETTINGS)


@pytest.fixture
def jobs(database: Database, clock: FakeClock) -> JobStore:
    return JobStore(database, clock, JobSettings().log_lines_max)


def new(name: str, clock: FakeClock, *, size: int = 0, **fields: Any) -> NewResponse:
    values = {"project_id": DEFAULT_PROJECT, "status": "completed", **fields}
    body = json.dumps({**BODY, "id": name, "status": values["status"], "output": [{"said": name}]}).encode()
    return NewResponse(
        id=name, input=json.dumps([{"asked": name + "x" * size}]).encode(), body=body, created_at=clock.now(), **values
    )


async def leased(store: ResponseStore, jobs: JobStore, clock: FakeClock, name: str = "r") -> Lease:
    """A response in the background whose job somebody has."""
    async with store.database.begin() as transaction:
        await jobs.insert(transaction, [NewJob(RESPONSE, DEFAULT_PROJECT, id=name)])
        fields: Any = {"status": "queued", "background": True, "streamed": True, "request": b"{}"}
        await store.insert(transaction, new(name, clock, **fields))
    return await again(jobs)


async def again(jobs: JobStore) -> Lease:
    [lease] = await jobs.lease({RESPONSE: 1}, "node", 15)
    return lease


def batch(lease: Lease, first: int, *texts: str) -> EventBatch:
    events = [{"sequence_number": number, "text": text} for number, text in enumerate(texts, first)]
    return EventBatch(lease.attempt, first, first + len(texts) - 1, json.dumps(events).encode())


async def told(store: ResponseStore, after: int = -1, name: str = "r") -> list[tuple[int, str]]:
    found = []
    while events := await store.events(name, after):
        found += [(event["sequence_number"], event.get("text", event.get("type"))) for event in events]
        after = found[-1][0]
    return found


async def test_what_is_kept_is_read_by_its_project_alone(store: ResponseStore, clock: FakeClock) -> None:
    await store.keep(new("a", clock))
    kept = await store.get(DEFAULT_PROJECT, "a")
    assert (kept.status, kept.ended, kept.job_state) == ("completed", True, None)
    assert json.loads(kept.body)["output"] == [{"said": "a"}]
    for project, name in (("other", "a"), (DEFAULT_PROJECT, "b")):
        with pytest.raises(NotFound):
            await store.get(project, name)
        with pytest.raises(NotFound):
            await store.delete(project, name)
        with pytest.raises(NotFound):
            await store.history(project, name)
    await store.delete(DEFAULT_PROJECT, "a")
    with pytest.raises(NotFound):
        await store.get(DEFAULT_PROJECT, "a")


async def test_what_is_too_large_is_not_kept(store: ResponseStore, clock: FakeClock) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await store.keep(new("a", clock, size=5_000))
    assert caught.value.code == "response_too_large"


async def test_a_conversation_comes_back_in_order_and_bounded(store: ResponseStore, clock: FakeClock) -> None:
    names: list[str] = []
    for name in "abcd":
        if names:
            history = await store.history(DEFAULT_PROJECT, names[-1])
            assert list(history.ids) == names
            said = [text for one in names for text in ({"asked": one}, {"said": one})]
            assert list(history.items) == said
        await store.keep(new(name, clock, previous_id=names[-1] if names else None, chain=tuple(names)))
        names.append(name)
    with pytest.raises(InvalidRequest) as caught:
        await store.history(DEFAULT_PROJECT, "d")
    assert caught.value.code == "conversation_too_long"
    await store.delete(DEFAULT_PROJECT, "b")
    with pytest.raises(NotFound):
        await store.history(DEFAULT_PROJECT, "c")


async def test_a_conversation_is_bounded_in_bytes(store: ResponseStore, clock: FakeClock) -> None:
    await store.keep(new("a", clock, size=3_000))
    await store.keep(new("b", clock, size=3_000, previous_id="a", chain=("a",)))
    with pytest.raises(InvalidRequest) as caught:
        await store.history(DEFAULT_PROJECT, "b")
    assert caught.value.code == "conversation_too_long"


async def test_what_is_continued_stays_and_what_is_old_goes(store: ResponseStore, clock: FakeClock) -> None:
    await store.keep(new("a", clock))
    await store.keep(new("b", clock))
    clock.advance(60)
    await store.keep(new("c", clock, previous_id="a", chain=("a",)))
    clock.advance(60)
    with pytest.raises(NotFound):
        await store.get(DEFAULT_PROJECT, "b")
    assert await store.prune(clock.now(), 10) == 1
    for name in "ac":
        await store.get(DEFAULT_PROJECT, name)
    clock.advance(60)
    assert await store.prune(clock.now(), 1) == 1
    assert await store.prune(clock.now(), 10) == 1


@pytest.mark.parametrize(("size", "left"), [(0, 5), (2_500, 3)])
async def test_the_oldest_make_room(store: ResponseStore, clock: FakeClock, size: int, left: int) -> None:
    """By their number, and by their bytes; those of others and those that run are left alone."""
    await KeyStore(store.database, clock).create_key("other")
    async with store.database.read() as connection:
        other = await connection.scalar(sa.text("SELECT id FROM projects WHERE name = 'other'"))
    await store.keep(new("of-others", clock, project_id=other))
    async with store.database.begin() as transaction:
        await store.insert(transaction, new("running", clock, status="queued", background=True))
    for number in range(9):
        clock.advance(1)
        await store.keep(new(f"n{number}", clock, size=size))
    await store.prune(clock.now(), 10)
    kept = []
    for number in range(9):
        try:
            await store.get(DEFAULT_PROJECT, f"n{number}")
            kept.append(number)
        except NotFound:
            continue
    assert kept == list(range(9 - left, 9))
    await store.get(DEFAULT_PROJECT, "running")
    await store.get(other, "of-others")


async def test_events_are_written_by_the_attempt_that_has_the_job(
    store: ResponseStore, jobs: JobStore, clock: FakeClock
) -> None:
    first = await leased(store, jobs, clock)
    assert await store.begin_events(first) == 0
    await store.append(first, batch(first, 0, "a", "b"))
    await store.append(first, batch(first, 2, "c"))
    assert await told(store) == [(0, "a"), (1, "b"), (2, "c")]
    assert await told(store, 0) == [(1, "b"), (2, "c")]
    await store.append(first, batch(first, 2, "c"))  # nobody knew whether it was written
    assert await told(store, 1) == [(2, "c")]

    async with store.database.begin() as transaction:
        await jobs.settle(transaction, first, Verdict(JobState.AVAILABLE, clock.now()))
    second = await again(jobs)
    with pytest.raises(LeaseLost):
        await store.append(first, batch(first, 3, "late"))
    with pytest.raises(LeaseLost):
        await store.begin_events(first)
    assert await store.begin_events(second) == 3
    assert len(await told(store)) == 3
    await store.append(second, batch(second, 3, "A"))
    assert await told(store) == [(3, "A")]
    assert await told(store, 2) == [(3, "A")]


async def test_events_forgive_no_failure(store: ResponseStore, jobs: JobStore, clock: FakeClock) -> None:
    """An attempt begins anew, so what it has told is no progress that lets it try for ever."""
    lease = await leased(store, jobs, clock)
    failed = Verdict(JobState.AVAILABLE, clock.now(), error=("x", "y"), counts_as_failure=True)
    async with store.database.begin() as transaction:
        await jobs.settle(transaction, lease, failed)
    lease = await again(jobs)
    await store.append(lease, batch(lease, 0, "a"))
    assert (await jobs.get(DEFAULT_PROJECT, "r")).failures == 1


async def test_an_end_is_written_once(store: ResponseStore, jobs: JobStore, clock: FakeClock) -> None:
    lease = await leased(store, jobs, clock)
    await store.append(lease, batch(lease, 0, "a", "b"))
    assert await store.request("r") == b"{}"
    async with store.database.begin() as transaction:
        assert await store.finish(transaction, "r", "completed", json.dumps(BODY).encode())
        assert not await store.finish(transaction, "r", "failed", b"{}")
    assert await store.request("r") is None
    assert as_it_is(await store.get(DEFAULT_PROJECT, "r")) == BODY


async def test_the_state_is_that_of_the_job_until_the_end_is_written(
    store: ResponseStore, jobs: JobStore, clock: FakeClock
) -> None:
    ends = ResponseEnds(store)

    async def status() -> str:
        return str(as_it_is(await store.get(DEFAULT_PROJECT, "r"))["status"])

    async with store.database.begin() as transaction:
        await jobs.insert(transaction, [NewJob(RESPONSE, DEFAULT_PROJECT, id="r")])
        fields: Any = {"status": "queued", "background": True, "streamed": True, "request": b"{}"}
        await store.insert(transaction, new("r", clock, **fields))
    assert await status() == "queued"
    lease = await again(jobs)
    assert await status() == "in_progress"
    await store.append(lease, batch(lease, 0, "a"))
    async with store.database.begin() as transaction:
        await jobs.settle(transaction, lease, Verdict(JobState.AVAILABLE, clock.now()))
    assert await status() == "in_progress"
    assert await store.left_behind(10) == []
    assert not await ends.close(await store.get(DEFAULT_PROJECT, "r"))
    lease = await again(jobs)
    async with store.database.begin() as transaction:
        await jobs.settle(transaction, lease, Verdict(JobState.FAILED, clock.now(), error=("bad", "It went wrong.")))
    assert await status() == "failed"
    assert await ends.sweep(clock.now(), 10) == 0
    kept = await store.get(DEFAULT_PROJECT, "r")
    assert kept.ended
    assert as_it_is(kept)["error"] == {"code": "bad", "message": "It went wrong."}
    assert await told(store) == [(0, "a"), (1, "error"), (2, "response.failed")]
    await ends.sweep(clock.now(), 10)
    assert len(await told(store)) == 3

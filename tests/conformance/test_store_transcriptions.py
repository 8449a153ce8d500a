"""One suite for transcriptions, their recordings and their stretches, over SQLite and PostgreSQL."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from forebay.blobs.blobs import Blobs, open_blobs
from forebay.config import Settings
from forebay.errors import LeaseLost, NotFound
from forebay.store.database import Database
from forebay.store.files import LEFTOVER_SECONDS
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore, Lease, NewJob, Verdict
from forebay.store.keys import DEFAULT_PROJECT
from forebay.store.transcriptions import (
    TRANSCRIPTION,
    WHOLE,
    NewTranscription,
    Stretch,
    TranscriptionStore,
    recording_key,
)
from tests.support.clock import FakeClock

PATH = "/v1/audio/transcriptions"


@pytest.fixture
def store(database: Database, clock: FakeClock) -> TranscriptionStore:
    return TranscriptionStore(database, clock, "node")


@pytest.fixture
def jobs(database: Database, clock: FakeClock) -> JobStore:
    return JobStore(database, clock, 200)


@pytest.fixture
async def cellar(tmp_path: Path) -> Blobs:
    return open_blobs(Settings(data_dir=tmp_path / "data"))


async def recordings(cellar: Blobs) -> set[str]:
    return {key async for key in cellar.list("recordings/")}


async def handed_in(
    store: TranscriptionStore, jobs: JobStore, cellar: Blobs, name: str = "t", *, own: bool = True
) -> None:
    """A transcription with its job, whose recording came with it if `own`."""
    new = NewTranscription(name, DEFAULT_PROJECT, PATH, b"{}", b"[]", own)
    if own:
        await store.begin(new)
        await cellar.put(recording_key(name), b"sound")
    async with store.database.begin() as transaction:
        await jobs.insert(transaction, [NewJob(TRANSCRIPTION, DEFAULT_PROJECT, id=name, stage="queued")])
        await store.submit(transaction, new, 7 if own else None)


async def leased(jobs: JobStore) -> Lease:
    [lease] = await jobs.lease({TRANSCRIPTION: 1}, "node", 15)
    return lease


async def settled(jobs: JobStore, lease: Lease, state: JobState) -> None:
    async with jobs.database.begin() as transaction:
        await jobs.settle(transaction, lease, Verdict(state, 0, error=("x", "y") if state is JobState.FAILED else None))


async def names(store: TranscriptionStore, table: str = "transcriptions", column: str = "id") -> Iterable[str]:
    async with store.database.read() as connection:
        return list(await connection.scalars(sa.text(f"SELECT {column} FROM {table} ORDER BY 1")))


async def test_what_is_submitted_is_there_for_an_attempt(
    store: TranscriptionStore, jobs: JobStore, cellar: Blobs
) -> None:
    await handed_in(store, jobs, cellar, "own")
    await handed_in(store, jobs, cellar, "elsewhere", own=False)
    for name in ("own", "elsewhere"):
        found = await store.get(name)
        assert found is not None
        assert (found.path, found.request) == (PATH, b"{}")
    assert await store.get("nothing") is None
    async with store.database.begin() as transaction:
        assert await store.unfinished(transaction, DEFAULT_PROJECT) == 2
        assert await store.unfinished(transaction, "other") == 0


async def test_what_is_not_submitted_goes(store: TranscriptionStore, jobs: JobStore, cellar: Blobs) -> None:
    new = NewTranscription("t", DEFAULT_PROJECT, PATH, b"{}", b"[]", has_sound=True)
    await store.begin(new)
    await cellar.put(recording_key("t"), b"sound")
    await store.discard(cellar, "t")
    assert not await recordings(cellar)
    assert not await names(store)
    with pytest.raises(NotFound):
        async with store.database.begin() as transaction:
            await store.submit(transaction, new, 7)
    await handed_in(store, jobs, cellar)
    await store.discard(cellar, "t")
    assert await recordings(cellar)
    assert await names(store) == ["t"]


async def test_a_stretch_is_kept_by_the_attempt_that_has_the_job(
    store: TranscriptionStore, jobs: JobStore, cellar: Blobs
) -> None:
    await handed_in(store, jobs, cellar)
    first = await leased(jobs)
    for number, body in enumerate((b"a", b"b", b"b")):
        await store.keep(jobs, first, Stretch("transcribing", min(number, 1), body))
    await store.keep(jobs, first, Stretch("diarizing", 0, b"v"))
    await settled(jobs, first, JobState.AVAILABLE)
    second = await leased(jobs)
    with pytest.raises(LeaseLost):
        await store.keep(jobs, first, Stretch("transcribing", 2, b"late"))
    with pytest.raises(LeaseLost):
        await store.advance(first, "transcribing", 500)
    await store.keep(jobs, second, Stretch("transcribing", 2, b"c"))
    assert [(each.stage, each.number, each.body) for each in await store.stretches("t")] == [
        ("diarizing", 0, b"v"),
        ("transcribing", 0, b"a"),
        ("transcribing", 1, b"b"),
        ("transcribing", 2, b"c"),
    ]


async def test_progress_never_goes_back_and_forgives_nothing(
    store: TranscriptionStore, jobs: JobStore, cellar: Blobs, clock: FakeClock
) -> None:
    await handed_in(store, jobs, cellar)
    failed = Verdict(JobState.AVAILABLE, clock.now(), error=("x", "y"), counts_as_failure=True)
    lease = await leased(jobs)
    async with store.database.begin() as transaction:
        await jobs.settle(transaction, lease, failed)
    lease = await leased(jobs)
    for stage, done in (("decoding", 40), ("transcribing", 300), ("fetching", 10)):
        await store.advance(lease, stage, done)
    job = await jobs.get(DEFAULT_PROJECT, "t")
    assert (job.stage, job.completed, job.total, job.failures) == ("fetching", 300, WHOLE, 1)
    await store.keep(jobs, lease, Stretch("transcribing", 0, b"a"))
    assert (await jobs.get(DEFAULT_PROJECT, "t")).failures == 0


async def test_a_result_takes_the_place_of_its_stretches(
    store: TranscriptionStore, jobs: JobStore, cellar: Blobs
) -> None:
    await handed_in(store, jobs, cellar)
    lease = await leased(jobs)
    await store.keep(jobs, lease, Stretch("transcribing", 0, b"a"))
    assert await store.result(DEFAULT_PROJECT, "t") is None
    async with store.database.begin() as transaction:
        await jobs.settle(transaction, lease, Verdict(JobState.COMPLETED, 0))
        await store.finish(transaction, "t", 12.5, b"{}")
    found = await store.result(DEFAULT_PROJECT, "t")
    assert found is not None
    assert (found.shown, found.transcript) == (b"[]", b"{}")
    assert await store.result("other", "t") is None
    assert not await store.stretches("t")
    job = await jobs.get(DEFAULT_PROJECT, "t")
    assert (job.stage, job.completed, job.total) == ("finished", WHOLE, WHOLE)


@pytest.mark.parametrize("state", [JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED])
async def test_a_recording_goes_with_the_end_of_its_job(
    store: TranscriptionStore, jobs: JobStore, cellar: Blobs, state: JobState
) -> None:
    await handed_in(store, jobs, cellar)
    lease = await leased(jobs)
    await store.keep(jobs, lease, Stretch("transcribing", 0, b"a"))
    await store.close(cellar, "t")
    assert await recordings(cellar), "it is still worked on"
    await settled(jobs, lease, state)
    await store.close(cellar, "t")
    assert not await recordings(cellar)
    found = await store.get("t")
    assert found is not None
    assert found.request is None
    assert not await store.stretches("t")
    await store.close(cellar, "t")


async def test_a_sweep_does_what_a_crash_has_left_undone(
    store: TranscriptionStore, jobs: JobStore, cellar: Blobs, clock: FakeClock
) -> None:
    await handed_in(store, jobs, cellar, "ended")
    await settled(jobs, await leased(jobs), JobState.CANCELLED)
    await handed_in(store, jobs, cellar, "running")
    await handed_in(store, jobs, cellar, "elsewhere", own=False)
    assert await store.sweep(cellar, clock.now(), 10) == 1
    assert await recordings(cellar) == {recording_key("running")}
    async with store.database.begin() as transaction:
        await transaction.execute(sa.text("DELETE FROM jobs"))
    assert await store.sweep(cellar, clock.now(), 10) == 3
    assert not await recordings(cellar)
    assert not await names(store)


async def test_what_a_dead_process_has_begun_is_swept_by_the_next_of_its_name(
    store: TranscriptionStore, cellar: Blobs, clock: FakeClock
) -> None:
    for name in ("a", "b"):
        await store.begin(NewTranscription(name, DEFAULT_PROJECT, PATH, b"{}", b"[]", has_sound=True))
        await cellar.put(recording_key(name), b"sound")
    assert await store.sweep(cellar, clock.now(), 10) == 0
    clock.advance(1)
    stranger = TranscriptionStore(store.database, clock, "another")
    assert await stranger.sweep(cellar, clock.now(), 10) == 0
    heir = TranscriptionStore(store.database, clock, "node")
    assert await heir.sweep(cellar, clock.now(), 1) == 1
    assert await stranger.sweep(cellar, clock.now() + LEFTOVER_SECONDS, 10) == 1
    assert not await recordings(cellar)
    assert not await names(store)


async def test_what_was_too_late_has_its_time_again(
    store: TranscriptionStore, jobs: JobStore, clock: FakeClock
) -> None:
    began = jobs.now()
    async with store.database.begin() as transaction:
        [job_id] = await jobs.insert(transaction, [NewJob(TRANSCRIPTION, DEFAULT_PROJECT, deadline_at=began - 1)])
        created = await jobs.lock(transaction, job_id)
        assert created is not None
        await jobs.end_available(transaction, created, Verdict(JobState.EXPIRED, began))
        span = created.deadline_at - created.created_at
        await transaction.execute(sa.text(f"UPDATE jobs SET created_at = {created.created_at - 60}"))
        assert await jobs.revive(transaction, created)
    job = await jobs.get(DEFAULT_PROJECT, job_id)
    assert job.deadline_at - jobs.now() == pytest.approx(span + 60, abs=10)


async def test_a_database_of_the_version_before_keeps_what_it_has(database: Database) -> None:
    def downgraded(connection: sa.Connection) -> None:
        config = Config()
        config.set_main_option("script_location", "src/forebay/store/migrations")
        config.attributes["connection"] = connection
        command.downgrade(config, "0003")
        assert "transcriptions" not in sa.inspect(connection).get_table_names()
        connection.execute(sa.text("INSERT INTO projects (id, name, created_at) VALUES ('p', 'p', 0)"))
        command.upgrade(config, "head")
        assert "stretches" in sa.inspect(connection).get_table_names()

    async with database.begin() as transaction:
        await transaction.run_sync(downgraded)
        assert await transaction.scalar(sa.text("SELECT name FROM projects WHERE id = 'p'")) == "p"

"""One suite for jobs about media, what came with them, their parts and the files that they draft, over SQLite and PostgreSQL."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from forebay.blobs.blobs import Blobs, open_blobs
from forebay.config import Settings
from forebay.errors import Conflict, LeaseLost, NotFound
from forebay.store.database import Database
from forebay.store.files import LEFTOVER_SECONDS
from forebay.store.job_records import Lease, NewJob, Verdict
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from forebay.store.keys import DEFAULT_PROJECT
from forebay.store.media_jobs import (
    TRANSCRIPTION,
    WHOLE,
    MediaJobStore,
    NewMediaJob,
    Part,
    media_key,
)
from tests.support.clock import FakeClock

PATH = "/v1/audio/transcriptions"


@pytest.fixture
def store(database: Database, clock: FakeClock) -> MediaJobStore:
    return MediaJobStore(database, clock, "node")


@pytest.fixture
def jobs(database: Database, clock: FakeClock) -> JobStore:
    return JobStore(database, clock, 200)


@pytest.fixture
async def cellar(tmp_path: Path) -> Blobs:
    return open_blobs(Settings(data_dir=tmp_path / "data"))


async def recordings(cellar: Blobs) -> set[str]:
    return {key async for key in cellar.list("recordings/")}


async def handed_in(store: MediaJobStore, jobs: JobStore, cellar: Blobs, name: str = "t", *, own: bool = True) -> None:
    """A transcription with its job, whose recording came with it if `own`."""
    new = NewMediaJob(name, TRANSCRIPTION, DEFAULT_PROJECT, PATH, b"{}", b"[]", own)
    if own:
        await store.begin(new)
        await cellar.put(media_key(TRANSCRIPTION, name), b"sound")
    async with store.database.begin() as transaction:
        await jobs.insert(transaction, [NewJob(TRANSCRIPTION, DEFAULT_PROJECT, id=name, stage="queued")])
        await store.submit(transaction, new, 7 if own else None)


async def leased(jobs: JobStore) -> Lease:
    [lease] = await jobs.lease({TRANSCRIPTION: 1}, "node", 15)
    return lease


async def settled(jobs: JobStore, lease: Lease, state: JobState) -> None:
    async with jobs.database.begin() as transaction:
        await jobs.settle(transaction, lease, Verdict(state, 0, error=("x", "y") if state is JobState.FAILED else None))


async def names(store: MediaJobStore, table: str = "media_jobs", column: str = "id") -> Iterable[str]:
    async with store.database.read() as connection:
        return list(await connection.scalars(sa.text(f"SELECT {column} FROM {table} ORDER BY 1")))


async def test_what_is_submitted_is_there_for_an_attempt(store: MediaJobStore, jobs: JobStore, cellar: Blobs) -> None:
    await handed_in(store, jobs, cellar, "own")
    await handed_in(store, jobs, cellar, "elsewhere", own=False)
    for name in ("own", "elsewhere"):
        found = await store.get(name)
        assert found is not None
        assert (found.path, found.request) == (PATH, b"{}")
    assert await store.get("nothing") is None
    async with store.database.begin() as transaction:
        assert await store.unfinished(transaction, DEFAULT_PROJECT, TRANSCRIPTION) == 2
        assert await store.unfinished(transaction, "other", TRANSCRIPTION) == 0


async def test_what_is_not_submitted_goes(store: MediaJobStore, jobs: JobStore, cellar: Blobs) -> None:
    new = NewMediaJob("t", TRANSCRIPTION, DEFAULT_PROJECT, PATH, b"{}", b"[]", has_media=True)
    await store.begin(new)
    await cellar.put(media_key(TRANSCRIPTION, "t"), b"sound")
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
    store: MediaJobStore, jobs: JobStore, cellar: Blobs
) -> None:
    await handed_in(store, jobs, cellar)
    first = await leased(jobs)
    for number, body in enumerate((b"a", b"b", b"b")):
        await store.keep(jobs, first, Part("transcribing", min(number, 1), body))
    await store.keep(jobs, first, Part("diarizing", 0, b"v"))
    await settled(jobs, first, JobState.AVAILABLE)
    second = await leased(jobs)
    with pytest.raises(LeaseLost):
        await store.keep(jobs, first, Part("transcribing", 2, b"late"))
    with pytest.raises(LeaseLost):
        await store.advance(first, "transcribing", 500)
    await store.keep(jobs, second, Part("transcribing", 2, b"c"))
    assert [(each.stage, each.number, each.body) for each in await store.parts("t")] == [
        ("diarizing", 0, b"v"),
        ("transcribing", 0, b"a"),
        ("transcribing", 1, b"b"),
        ("transcribing", 2, b"c"),
    ]


async def test_progress_never_goes_back_and_forgives_nothing(
    store: MediaJobStore, jobs: JobStore, cellar: Blobs, clock: FakeClock
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
    await store.keep(jobs, lease, Part("transcribing", 0, b"a"))
    assert (await jobs.get(DEFAULT_PROJECT, "t")).failures == 0


async def test_a_result_takes_the_place_of_its_stretches(store: MediaJobStore, jobs: JobStore, cellar: Blobs) -> None:
    await handed_in(store, jobs, cellar)
    lease = await leased(jobs)
    await store.keep(jobs, lease, Part("transcribing", 0, b"a"))
    assert await store.result(DEFAULT_PROJECT, "t") is None
    async with store.database.begin() as transaction:
        await jobs.settle(transaction, lease, Verdict(JobState.COMPLETED, 0))
        await store.finish(transaction, "t", b"{}")
    found = await store.result(DEFAULT_PROJECT, "t")
    assert found is not None
    assert (found.shown, found.body) == (b"[]", b"{}")
    assert await store.result("other", "t") is None
    assert not await store.parts("t")
    job = await jobs.get(DEFAULT_PROJECT, "t")
    assert (job.stage, job.completed, job.total) == ("finished", WHOLE, WHOLE)


@pytest.mark.parametrize("state", [JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED])
async def test_a_recording_goes_with_the_end_of_its_job(
    store: MediaJobStore, jobs: JobStore, cellar: Blobs, state: JobState
) -> None:
    await handed_in(store, jobs, cellar)
    lease = await leased(jobs)
    await store.keep(jobs, lease, Part("transcribing", 0, b"a"))
    await store.close(cellar, "t")
    assert await recordings(cellar), "it is still worked on"
    await settled(jobs, lease, state)
    await store.close(cellar, "t")
    assert not await recordings(cellar)
    found = await store.get("t")
    assert found is not None
    assert found.request is None
    assert not await store.parts("t")
    await store.close(cellar, "t")


async def test_a_sweep_does_what_a_crash_has_left_undone(
    store: MediaJobStore, jobs: JobStore, cellar: Blobs, clock: FakeClock
) -> None:
    await handed_in(store, jobs, cellar, "ended")
    await settled(jobs, await leased(jobs), JobState.CANCELLED)
    await handed_in(store, jobs, cellar, "running")
    await handed_in(store, jobs, cellar, "elsewhere", own=False)
    assert await store.sweep(cellar, clock.now(), 10) == 1
    assert await recordings(cellar) == {media_key(TRANSCRIPTION, "running")}
    async with store.database.begin() as transaction:
        await transaction.execute(sa.text("DELETE FROM jobs"))
    assert await store.sweep(cellar, clock.now(), 10) == 3
    assert not await recordings(cellar)
    assert not await names(store)


async def test_what_a_dead_process_has_begun_is_swept_by_the_next_of_its_name(
    store: MediaJobStore, cellar: Blobs, clock: FakeClock
) -> None:
    for name in ("a", "b"):
        await store.begin(NewMediaJob(name, TRANSCRIPTION, DEFAULT_PROJECT, PATH, b"{}", b"[]", has_media=True))
        await cellar.put(media_key(TRANSCRIPTION, name), b"sound")
    assert await store.sweep(cellar, clock.now(), 10) == 0
    clock.advance(1)
    stranger = MediaJobStore(store.database, clock, "another")
    assert await stranger.sweep(cellar, clock.now(), 10) == 0
    heir = MediaJobStore(store.database, clock, "node")
    assert await heir.sweep(cellar, clock.now(), 1) == 1
    assert await stranger.sweep(cellar, clock.now() + LEFTOVER_SECONDS, 10) == 1
    assert not await recordings(cellar)
    assert not await names(store)


async def test_what_was_too_late_has_its_time_again(store: MediaJobStore, jobs: JobStore, clock: FakeClock) -> None:
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


async def test_a_job_is_not_tried_again_without_what_came_with_it(
    store: MediaJobStore, jobs: JobStore, cellar: Blobs
) -> None:
    await handed_in(store, jobs, cellar)
    lease = await leased(jobs)
    await settled(jobs, lease, JobState.FAILED)
    await store.close(cellar, "t")
    with pytest.raises(Conflict) as refused:
        async with store.database.begin() as transaction:
            await jobs.revive(transaction, lease.job)
    assert (refused.value.code, refused.value.status) == ("input_gone", 409)
    assert (await jobs.get(DEFAULT_PROJECT, "t")).state is JobState.FAILED


async def test_drafts_become_files_when_the_job_ends_well(
    store: MediaJobStore, jobs: JobStore, cellar: Blobs, clock: FakeClock
) -> None:
    await handed_in(store, jobs, cellar, own=False)
    await drafted(store, cellar, await leased(jobs), "lost")
    async with store.database.begin() as transaction:
        await jobs.take_back(transaction, await jobs.lost(1, "node"))
    lease = await leased(jobs)
    for _ in range(2):  # nobody knew whether it was announced
        await drafted(store, cellar, lease, "good")
    await store.keep(jobs, lease, Part("painting", 0, b"good"))
    assert await store.sweep(cellar, clock.now(), 10) == 0, "it is worked on"
    async with store.database.begin() as transaction:
        await jobs.settle(transaction, lease, Verdict(JobState.COMPLETED, 0))
        await store.finish(transaction, "t", b"{}", ["good"])
    await store.close(cellar, "t")
    assert {key async for key in cellar.list("files/")} == {"files/good"}
    assert not await names(store, "drafted_files")


@pytest.mark.parametrize("swept", [False, True])
async def test_drafts_of_a_job_that_ends_otherwise_go_with_what_names_them(
    store: MediaJobStore, jobs: JobStore, cellar: Blobs, clock: FakeClock, swept: bool
) -> None:
    await handed_in(store, jobs, cellar, own=False)
    lease = await leased(jobs)
    await drafted(store, cellar, lease, "vain")
    await store.keep(jobs, lease, Part("painting", 0, b"vain"))
    await store.close(cellar, "t")
    assert await names(store, "drafted_files") == ["vain"], "it is worked on"
    await settled(jobs, lease, JobState.FAILED)
    with pytest.raises(LeaseLost):
        await store.draft(lease, ["late"])
    if swept:
        assert await store.sweep(cellar, clock.now(), 10) == 1
    else:
        await store.close(cellar, "t")
    assert not [key async for key in cellar.list("files/")]
    assert not await names(store, "drafted_files")
    assert not await store.parts("t"), "it is painted again"
    assert not await store.without_media(["t"]), "it may be tried again"


async def drafted(store: MediaJobStore, cellar: Blobs, lease: Lease, name: str) -> None:
    await store.draft(lease, [name])
    await cellar.put(f"files/{name}", b"picture")


async def test_a_database_of_the_version_before_keeps_what_it_has(database: Database) -> None:
    columns = "id, project_id, node, submitted, sound, bytes, path, shown, duration, created_at"
    values = "'t', 'p', 'n', true, 'kept', 7, '/v1/audio/transcriptions', 'json', 1.5, 0"
    before = [
        "INSERT INTO projects (id, name, created_at) VALUES ('p', 'p', 0)",
        f"INSERT INTO transcriptions ({columns}) VALUES ({values})",
        "INSERT INTO stretches (transcription_id, stage, number, attempt, body) VALUES ('t', 's', 0, 1, 'body')",
    ]

    def moved(connection: sa.Connection) -> None:
        config = Config()
        config.set_main_option("script_location", "src/forebay/store/migrations")
        config.attributes["connection"] = connection
        for _ in range(2):
            command.downgrade(config, "0004")
            tables = sa.inspect(connection).get_table_names()
            assert {"transcriptions", "stretches"} <= set(tables)
            while before:
                connection.execute(sa.text(before.pop(0)))
            command.upgrade(config, "head")
            assert not {"transcriptions", "stretches"} & set(sa.inspect(connection).get_table_names())

    query = "SELECT kind, media, bytes, attempt, j.id FROM media_jobs j JOIN media_parts p ON p.job_id = j.id"
    async with database.begin() as transaction:
        await transaction.run_sync(moved)
        assert (await transaction.execute(sa.text(query))).one() == (TRANSCRIPTION, "kept", 7, 1, "t")
        await transaction.execute(sa.text("DELETE FROM media_jobs"))
        assert not (await transaction.execute(sa.text("SELECT 1 FROM media_parts"))).all()

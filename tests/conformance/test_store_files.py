"""One suite for the rows of files and uploads, over SQLite and PostgreSQL, with real blobs beside them."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from pydantic import SecretStr

from forebay.blobs.blobs import Blobs, open_blobs
from forebay.config import FileSettings, Settings
from forebay.errors import InsufficientStorage, InvalidRequest, NotFound, Overloaded, StoreUnavailable
from forebay.store import uploads as uploads_module
from forebay.store.database import Database
from forebay.store.files import LEFTOVER_SECONDS, File, FileStore, blob_key
from forebay.store.keys import DEFAULT_PROJECT, KeyStore
from forebay.store.uploads import Part, Upload, UploadStore
from tests.support import postgres
from tests.support.clock import FakeClock

DAY = 86_400.0
SMALL = FileSettings(project_bytes_max=1000, parts_max=3, upload_keep_seconds=3600)


class BlobsAway:
    """Blobs that cannot be reached."""

    async def delete(self, key: str) -> None:
        raise StoreUnavailable


@pytest.fixture(params=["sqlite", "postgres"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    url = SecretStr(postgres.new_database()) if request.param == "postgres" else None
    return Settings(data_dir=tmp_path / "data", database_url=url)


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    database = await Database.open(settings)
    await KeyStore(database, FakeClock()).get_or_create_project(DEFAULT_PROJECT)
    yield database
    await database.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def blobs(settings: Settings) -> Blobs:
    return open_blobs(settings)


@pytest.fixture
def files(database: Database, clock: FakeClock) -> FileStore:
    return FileStore(database, clock, SMALL)


@pytest.fixture
def uploads(database: Database, clock: FakeClock) -> UploadStore:
    return UploadStore(database, clock, SMALL)


@pytest.fixture
async def other(database: Database) -> str:
    return (await KeyStore(database, FakeClock()).get_or_create_project("other")).id


async def make(
    files: FileStore,
    blobs: Blobs,
    data: bytes = b"data",
    *,
    project: str = DEFAULT_PROJECT,
    purpose: str = "user_data",
    keep_seconds: float | None = None,
) -> File:
    begun = await files.begin(project, "a.txt", purpose)
    await blobs.put(begun.blob_key, data)
    async with files.database.begin() as transaction:
        return await files.finish(transaction, begun, len(data), hashlib.sha256(data).hexdigest(), keep_seconds)


async def make_upload(uploads: UploadStore, size: int = 4, *, project: str = DEFAULT_PROJECT) -> Upload:
    async with uploads.database.begin() as transaction:
        return await uploads.create(
            transaction, project, filename="a.bin", purpose="vision", mime_type="text/plain", size=size
        )


async def make_part(uploads: UploadStore, blobs: Blobs, upload: Upload, data: bytes = b"part") -> Part:
    begun = await uploads.begin_part(upload.project_id, upload.id)
    await blobs.put(begun.blob_key, data)
    async with uploads.database.begin() as transaction:
        return await uploads.finish_part(transaction, upload.project_id, begun, len(data))


async def complete(files: FileStore, uploads: UploadStore, blobs: Blobs, upload: Upload) -> tuple[Upload, File]:
    begun = await files.begin(upload.project_id, upload.filename, upload.purpose)
    await blobs.put(begun.blob_key, b"x" * upload.bytes)
    async with files.database.begin() as transaction:
        await uploads.release_parts(transaction, upload)
        file = await files.finish(transaction, begun, upload.bytes, "0" * 64)
        return await uploads.complete(transaction, upload, file), file


async def keys_of(blobs: Blobs) -> list[str]:
    return sorted([key async for key in blobs.list("")])


async def test_a_file_is_seen_once_it_is_ready(files: FileStore, blobs: Blobs, clock: FakeClock) -> None:
    begun = await files.begin(DEFAULT_PROJECT, "a.txt", "user_data")
    with pytest.raises(NotFound):
        await files.get(DEFAULT_PROJECT, begun.id)
    assert await files.list(DEFAULT_PROJECT) == ([], False)
    clock.advance(5)
    async with files.database.begin() as transaction:
        ready = await files.finish(transaction, begun, 7, "f" * 64, 3600)
    assert ready == await files.get(DEFAULT_PROJECT, begun.id)
    assert (ready.state, ready.bytes, ready.sha256, ready.filename) == ("ready", 7, "f" * 64, "a.txt")
    assert ready.created_at == clock.now()
    assert ready.expires_at == clock.now() + 3600
    assert ready.blob_key == blob_key(ready.id)


async def test_a_file_that_the_server_makes_is_there_with_its_transaction(files: FileStore, clock: FakeClock) -> None:
    async def create(identity: str) -> File:
        async with files.database.begin() as transaction:
            made = await files.create_ready(
                transaction,
                DEFAULT_PROJECT,
                file_id=identity,
                filename="out.jsonl",
                purpose="batch_output",
                size=10**9,
                sha256="0" * 64,
                keep_seconds=60,
            )
            if identity == "file_b":
                raise ZeroDivisionError
            return made

    made = await create("file_a")
    assert await files.get(DEFAULT_PROJECT, "file_a") == made
    assert (made.purpose, made.bytes, made.expires_at) == ("batch_output", 10**9, clock.now() + 60)
    with pytest.raises(ZeroDivisionError):
        await create("file_b")
    with pytest.raises(NotFound):
        await files.get(DEFAULT_PROJECT, "file_b")


async def test_another_project_sees_nothing(files: FileStore, blobs: Blobs, other: str) -> None:
    file = await make(files, blobs)
    for asking in (files.get(other, file.id), files.delete(blobs, other, file.id), files.list(other, after=file.id)):
        with pytest.raises(NotFound):
            await asking
    assert await files.list(other) == ([], False)
    assert await files.get(DEFAULT_PROJECT, file.id) == file


async def test_pages(files: FileStore, blobs: Blobs, clock: FakeClock) -> None:
    made = []
    for number in range(7):
        clock.advance(1)
        made.append(await make(files, blobs, purpose="batch" if number % 2 else "vision"))
    newest_first = made[::-1]
    assert await files.list(DEFAULT_PROJECT) == (newest_first, False)
    assert await files.list(DEFAULT_PROJECT, order="asc") == (made, False)
    assert await files.list(DEFAULT_PROJECT, limit=7) == (newest_first, False)
    assert await files.list(DEFAULT_PROJECT, limit=3) == (newest_first[:3], True)
    assert await files.list(DEFAULT_PROJECT, after=newest_first[2].id, limit=3) == (newest_first[3:6], True)
    assert await files.list(DEFAULT_PROJECT, after=newest_first[5].id, limit=3) == (newest_first[6:], False)
    assert await files.list(DEFAULT_PROJECT, after=made[4].id, order="asc") == (made[5:], False)
    assert await files.list(DEFAULT_PROJECT, purpose="batch", limit=2) == ([made[5], made[3]], True)
    with pytest.raises(NotFound):
        await files.list(DEFAULT_PROJECT, after="file_nope")


async def test_files_of_one_moment_are_each_on_one_page(files: FileStore, blobs: Blobs) -> None:
    made = {(await make(files, blobs)).id for _ in range(10)}
    seen: list[str] = []
    more, after = True, None
    while more:
        page, more = await files.list(DEFAULT_PROJECT, after=after, limit=3)
        seen += [file.id for file in page]
        after = seen[-1]
    assert len(seen) == 10
    assert set(seen) == made


async def test_deleting(files: FileStore, blobs: Blobs) -> None:
    file = await make(files, blobs)
    await files.delete(blobs, DEFAULT_PROJECT, file.id)
    assert await keys_of(blobs) == []
    for asking in (files.get(DEFAULT_PROJECT, file.id), files.delete(blobs, DEFAULT_PROJECT, file.id)):
        with pytest.raises(NotFound):
            await asking
    assert await files.list(DEFAULT_PROJECT) == ([], False)


async def test_what_could_not_be_removed_is_swept_later(files: FileStore, blobs: Blobs, clock: FakeClock) -> None:
    file = await make(files, blobs)
    await files.delete(BlobsAway(), DEFAULT_PROJECT, file.id)
    with pytest.raises(NotFound):
        await files.get(DEFAULT_PROJECT, file.id)
    assert await keys_of(blobs) == [file.blob_key]
    with pytest.raises(StoreUnavailable):
        await files.sweep(BlobsAway(), clock.now(), 100)
    assert await files.sweep(blobs, clock.now(), 100) == 1
    assert await keys_of(blobs) == []
    assert await files.sweep(blobs, clock.now(), 100) == 0


async def test_an_expired_file_is_gone_at_once_and_swept(files: FileStore, blobs: Blobs, clock: FakeClock) -> None:
    file, kept = await make(files, blobs, keep_seconds=60), await make(files, blobs)
    clock.advance(59)
    assert await files.get(DEFAULT_PROJECT, file.id) == file
    assert await files.sweep(blobs, clock.now(), 100) == 0
    clock.advance(1)
    for asking in (files.get(DEFAULT_PROJECT, file.id), files.delete(blobs, DEFAULT_PROJECT, file.id)):
        with pytest.raises(NotFound):
            await asking
    assert await files.list(DEFAULT_PROJECT) == ([kept], False)
    assert await files.sweep(blobs, clock.now(), 100) == 1
    assert await keys_of(blobs) == [kept.blob_key]


async def test_what_was_begun_and_left_is_swept_after_a_day(files: FileStore, blobs: Blobs, clock: FakeClock) -> None:
    without, with_blob = await files.begin(DEFAULT_PROJECT), await files.begin(DEFAULT_PROJECT)
    await blobs.put(with_blob.blob_key, b"left")
    clock.advance(LEFTOVER_SECONDS)
    assert await files.sweep(blobs, clock.now(), 100) == 0
    clock.advance(1)
    assert await files.sweep(blobs, clock.now(), 100) == 2
    assert await keys_of(blobs) == []
    async with files.database.begin() as transaction:
        with pytest.raises(NotFound):
            await files.finish(transaction, without, 1, "0" * 64)


async def test_discarding_spares_what_is_ready(files: FileStore, blobs: Blobs) -> None:
    ready, begun = await make(files, blobs), await files.begin(DEFAULT_PROJECT)
    await blobs.put(begun.blob_key, b"left")
    await files.discard(blobs, begun)
    await files.discard(blobs, ready)
    assert await keys_of(blobs) == [ready.blob_key]
    assert await files.get(DEFAULT_PROJECT, ready.id) == ready


async def test_a_sweep_is_bounded(files: FileStore, blobs: Blobs, clock: FakeClock) -> None:
    for _ in range(5):
        await make(files, blobs, keep_seconds=1)
    clock.advance(2)
    assert [await files.sweep(blobs, clock.now(), 2) for _ in range(4)] == [2, 2, 1, 0]
    assert await keys_of(blobs) == []


async def test_the_room_of_a_project_is_bounded(files: FileStore, blobs: Blobs, other: str) -> None:
    await make(files, blobs, b"x" * 600)
    begun = await files.begin(DEFAULT_PROJECT)
    with pytest.raises(InsufficientStorage):
        async with files.database.begin() as transaction:
            await files.finish(transaction, begun, 401, "0" * 64)
    await make(files, blobs, b"x" * 1000, project=other)
    async with files.database.begin() as transaction:
        file = await files.finish(transaction, begun, 400, "0" * 64)
    with pytest.raises(InsufficientStorage):
        await files.begin(DEFAULT_PROJECT)
    await files.delete(blobs, DEFAULT_PROJECT, file.id)
    await make(files, blobs, b"x" * 400)


async def test_the_room_is_bounded_for_those_who_come_at_once(files: FileStore) -> None:
    begun = [await files.begin(DEFAULT_PROJECT) for _ in range(6)]

    async def finish(file: File) -> bool:
        try:
            async with files.database.begin() as transaction:
                await files.finish(transaction, file, 300, "0" * 64)
        except InsufficientStorage:
            return False
        return True

    assert sorted(await asyncio.gather(*map(finish, begun))) == [False] * 3 + [True] * 3


async def test_an_upload_becomes_a_file(files: FileStore, uploads: UploadStore, blobs: Blobs) -> None:
    upload = await make_upload(uploads, 8)
    assert upload == await uploads.get(DEFAULT_PROJECT, upload.id)
    first, second = await make_part(uploads, blobs, upload), await make_part(uploads, blobs, upload)
    assert await uploads.parts(upload, [second.id, first.id]) == [second, first]
    completed, file = await complete(files, uploads, blobs, upload)
    assert (completed.status, completed.file_id) == ("completed", file.id)
    assert await uploads.get(DEFAULT_PROJECT, upload.id) == completed
    await uploads.remove_parts(blobs, completed)
    assert await keys_of(blobs) == [file.blob_key]


async def test_parts_have_to_be_there_and_named_once(uploads: UploadStore, blobs: Blobs) -> None:
    upload, elsewhere = await make_upload(uploads), await make_upload(uploads)
    part, foreign = await make_part(uploads, blobs, upload), await make_part(uploads, blobs, elsewhere)
    unfinished = await uploads.begin_part(DEFAULT_PROJECT, upload.id)
    for wrong in ([part.id, part.id], [foreign.id], [unfinished.id], [part.id, "part_nope"]):
        with pytest.raises(InvalidRequest):
            await uploads.parts(upload, wrong)


async def test_the_number_of_parts_is_bounded(uploads: UploadStore, blobs: Blobs) -> None:
    upload = await make_upload(uploads)
    for _ in range(3):
        last = await make_part(uploads, blobs, upload)
    with pytest.raises(InvalidRequest, match="at most 3 parts"):
        await uploads.begin_part(DEFAULT_PROJECT, upload.id)
    assert (await uploads.parts(upload, [last.id])) == [last]


async def test_parts_count_as_room_and_a_completed_upload_counts_once(
    files: FileStore, uploads: UploadStore, blobs: Blobs
) -> None:
    upload = await make_upload(uploads, 900)
    await make_part(uploads, blobs, upload, b"x" * 900)
    with pytest.raises(InsufficientStorage):
        await make(files, blobs, b"x" * 101)
    with pytest.raises(InsufficientStorage):
        await make_upload(uploads, 101)
    await complete(files, uploads, blobs, upload)
    await make(files, blobs, b"x" * 100)


async def test_the_number_of_unfinished_uploads_is_bounded(
    uploads: UploadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads_module, "PENDING_PER_PROJECT_MAX", 2)
    await make_upload(uploads)
    second = await make_upload(uploads)
    with pytest.raises(Overloaded):
        await make_upload(uploads)
    async with uploads.database.begin() as transaction:
        await uploads.cancel(transaction, DEFAULT_PROJECT, second.id)
    await make_upload(uploads)


async def _cancel(uploads: UploadStore, upload: Upload) -> None:
    async with uploads.database.begin() as transaction:
        await uploads.cancel(transaction, upload.project_id, upload.id)


async def _finish_part(uploads: UploadStore, part: Part) -> None:
    async with uploads.database.begin() as transaction:
        await uploads.finish_part(transaction, DEFAULT_PROJECT, part, 4)


async def _complete(uploads: UploadStore, upload: Upload, file: File) -> None:
    async with uploads.database.begin() as transaction:
        await uploads.complete(transaction, upload, file)


@pytest.mark.parametrize("how", ["cancelled", "expired", "completed"])
async def test_an_upload_that_is_over_takes_nothing(
    files: FileStore, uploads: UploadStore, blobs: Blobs, clock: FakeClock, how: str
) -> None:
    upload = await make_upload(uploads)
    await make_part(uploads, blobs, upload)
    late = await uploads.begin_part(DEFAULT_PROJECT, upload.id)
    await blobs.put(late.blob_key, b"late")
    file = await make(files, blobs)
    if how == "cancelled":
        await _cancel(uploads, upload)
        await _cancel(uploads, upload)  # twice is fine
    elif how == "completed":
        await complete(files, uploads, blobs, upload)
    else:
        clock.advance(3600)
    over = await uploads.get(DEFAULT_PROJECT, upload.id)
    assert over.status == how
    doings: list[Callable[[], Awaitable[object]]] = [
        lambda: uploads.begin_part(DEFAULT_PROJECT, upload.id),
        lambda: _finish_part(uploads, late),
        lambda: _complete(uploads, upload, file),
        lambda: uploads.parts(over, [late.id]),
    ]
    if how != "cancelled":
        doings.append(lambda: _cancel(uploads, upload))
    for doing in doings:
        with pytest.raises(InvalidRequest, match=how):
            await doing()
    await uploads.discard_part(blobs, late)
    await uploads.sweep(blobs, clock.now(), 100)
    assert not [key for key in await keys_of(blobs) if key.startswith("parts/")]


async def test_another_project_cannot_touch_an_upload(uploads: UploadStore, blobs: Blobs, other: str) -> None:
    upload = await make_upload(uploads)
    with pytest.raises(NotFound):
        await uploads.get(other, upload.id)
    with pytest.raises(NotFound):
        await uploads.begin_part(other, upload.id)
    async with uploads.database.begin() as transaction:
        with pytest.raises(NotFound):
            await uploads.cancel(transaction, other, upload.id)


async def test_a_part_that_may_still_be_written_keeps_its_row(
    uploads: UploadStore, blobs: Blobs, clock: FakeClock
) -> None:
    upload = await make_upload(uploads)
    late = await uploads.begin_part(DEFAULT_PROJECT, upload.id)
    await _cancel(uploads, upload)
    await uploads.sweep(blobs, clock.now(), 100)
    await blobs.put(late.blob_key, b"written after all, by somebody who died then")
    clock.advance(DAY + 1)
    assert await uploads.sweep(blobs, clock.now(), 100) == 1
    assert await keys_of(blobs) == []


async def test_old_uploads_are_forgotten(uploads: UploadStore, blobs: Blobs, clock: FakeClock) -> None:
    upload = await make_upload(uploads)
    clock.advance(31 * DAY)
    await uploads.sweep(blobs, clock.now(), 100)
    await uploads.sweep(blobs, clock.now(), 100)
    with pytest.raises(NotFound):
        await uploads.get(DEFAULT_PROJECT, upload.id)

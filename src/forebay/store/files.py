"""Files as rows: begun, ready, deleted, expired, swept.

It refuses to show a file before it is whole or after it has expired, and to forget a blob: a row outlives its blob at both
ends, so that whatever a crash leaves behind is found by `sweep`.

    uploading -> ready -> deleted -> (no row)
        `----------------^           its blob goes between the last two steps
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import sqlalchemy as sa

from forebay.clock import Clock, new_id
from forebay.config import FileSettings
from forebay.errors import Conflict, InsufficientStorage, NotFound, StoreUnavailable
from forebay.quotas import Resource, check_level
from forebay.store.database import Database, Transaction
from forebay.store.job_state import LIVE
from forebay.store.projects import hold_project
from forebay.store.tables import batches, files, jobs, upload_parts, uploads

Quota = Callable[[str], int | None]  # the bytes that a project may keep, where it is given fewer than all may

LEFTOVER_SECONDS = 86_400  # nobody writes one blob for longer
PAGE_SIZE_MAX = 10_000
FILES_PER_PROJECT_MAX = 100_000
_ROWS_AT_ONCE = 500  # then somebody else may go on: a page of 10,000 takes tens of milliseconds
_NO_SUCH_FILE = "There is no such file. GET /v1/files lists the ones there are."


@dataclass(frozen=True, slots=True)
class File:
    """A row of the table. Times are seconds since the epoch."""

    id: str
    project_id: str
    state: str
    filename: str
    purpose: str
    bytes: int
    sha256: str | None
    blob_key: str
    created_at: float
    expires_at: float | None


class Remover(Protocol):
    """What a sweep needs of the blobs."""

    async def delete(self, key: str) -> None:
        """Remove a blob; one that is not there is fine."""
        ...


def no_quota(_project_id: str) -> int | None:
    """Nobody is given fewer than all may."""
    return None


class FileStore:
    """Every statement about files."""

    def __init__(
        self, database: Database, clock: Clock, settings: FileSettings | None = None, quota: Quota = no_quota
    ) -> None:
        self.database = database
        self._clock = clock
        self._settings = settings or FileSettings()
        self._quota = quota

    async def begin(self, project_id: str, filename: str = "", purpose: str = "") -> File:
        """A file whose blob is about to be written: nobody sees it before `finish`.

        Raises InsufficientStorage or QuotaExceeded if the project has no room at all. Whoever fails calls `discard`.
        """
        file = _new(project_id, new_id("file"), filename, purpose, self._clock.now())
        async with self.database.begin() as transaction:
            await self._check(transaction, project_id, 1)
            await transaction.execute(sa.insert(files).values(_row(file)))
        return file

    async def finish(
        self, transaction: Transaction, file: File, size: int, sha256: str, keep_seconds: float | None = None
    ) -> File:
        """Make a begun file ready, with the name and purpose that `file` has by now.

        `keep_seconds` from now it expires; None keeps it. Raises InsufficientStorage or QuotaExceeded if the project has no
        room for it, NotFound if it was swept.
        """
        await self._check(transaction, file.project_id, size)
        values = _ready(file, size, sha256, self._clock.now(), keep_seconds)
        query = (
            sa.update(files).where(files.c.id == file.id, files.c.state == "uploading").values(values).returning(files)
        )
        row = (await transaction.execute(query)).one_or_none()
        if row is None:
            raise NotFound(_NO_SUCH_FILE)
        return _file(row)

    async def create_ready(
        self,
        transaction: Transaction,
        project_id: str,
        *,
        file_id: str,
        filename: str,
        purpose: str,
        size: int,
        sha256: str,
        keep_seconds: float | None = None,
    ) -> File:
        """The row of a file of the server's own, whose blob `blob_key(file_id)` is stored already.

        The caller sees to the blob if the transaction is never committed. A quota holds up no result that was worked for.
        """
        now = self._clock.now()
        begun = _new(project_id, file_id, filename, purpose, now)
        row = _row(begun) | _ready(begun, size, sha256, now, keep_seconds)
        await transaction.execute(sa.insert(files).values(row))
        return File(**row)

    async def get(self, project_id: str, file_id: str) -> File:
        """A file that can be read. Raises NotFound, also for the file of another project."""
        async with self.database.read() as transaction:
            row = (await transaction.execute(self._visible(project_id).where(files.c.id == file_id))).one_or_none()
        if row is None:
            raise NotFound(_NO_SUCH_FILE)
        return _file(row)

    async def find(self, file_id: str, purpose: str) -> File | None:
        """A file for `purpose` that can be read, whoever's it is; for who has shown that he may."""
        query = sa.select(files).where(
            files.c.id == file_id,
            files.c.purpose == purpose,
            files.c.state == "ready",
            _unexpired(self._clock.now()),
        )
        async with self.database.read() as transaction:
            row = (await transaction.execute(query)).one_or_none()
        return None if row is None else _file(row)

    async def list(
        self,
        project_id: str,
        *,
        after: str | None = None,
        limit: int = PAGE_SIZE_MAX,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> tuple[list[File], bool]:
        """One page of files by creation, and whether there are more. Raises NotFound if `after` is no file."""
        place = sa.tuple_(files.c.created_at, files.c.id)
        limit = max(1, min(limit, PAGE_SIZE_MAX))
        columns = (files.c.created_at, files.c.id)
        query = self._visible(project_id).limit(limit + 1)
        query = query.order_by(*(column.asc() if order == "asc" else column.desc() for column in columns))
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        async with self.database.read() as transaction:
            if after is not None:
                find = sa.select(*columns).where(files.c.id == after, files.c.project_id == project_id)
                row = (await transaction.execute(find)).one_or_none()
                if row is None:
                    raise NotFound("There is no such file to continue after.", param="after")
                before = sa.tuple_(*row)
                query = query.where(place > before if order == "asc" else place < before)
            rows = (await transaction.execute(query)).all()
        found: list[File] = []
        for start in range(0, min(limit, len(rows)), _ROWS_AT_ONCE):
            found += [_file(row) for row in rows[start : min(limit, start + _ROWS_AT_ONCE)]]
            await self._clock.sleep(0)
        return found, len(rows) > limit

    async def delete(self, blobs: Remover, project_id: str, file_id: str) -> None:
        """Remove a file for good. Raises NotFound, and Conflict while a batch reads it."""
        query = sa.update(files).where(
            files.c.id == file_id,
            files.c.project_id == project_id,
            files.c.state == "ready",
            _unexpired(self._clock.now()),
            ~_is_read(),
        )
        if not await self._mark(query):
            await self.get(project_id, file_id)
            raise Conflict(
                "A batch that has not ended reads this file. Wait for its end, or cancel it.", code="file_in_use"
            )
        try:
            await self._remove(blobs, file_id)
        except (StoreUnavailable, InsufficientStorage):
            return  # it is gone for everybody; the sweep takes the rest

    async def discard(self, blobs: Remover, file: File) -> None:
        """Remove a file that was begun and will not be finished; one that is ready stays."""
        if await self._mark(sa.update(files).where(files.c.id == file.id, files.c.state == "uploading")):
            await self._remove(blobs, file.id)

    async def sweep(self, blobs: Remover, now: float, rows_max: int) -> int:
        """Remove files that have expired, were deleted half-way or begun and left; how many, at most `rows_max`."""
        gone = sa.or_(
            sa.and_(files.c.state == "uploading", files.c.created_at < now - LEFTOVER_SECONDS),
            sa.and_(files.c.state == "ready", files.c.expires_at <= now, ~_is_read()),
        )
        chosen = sa.select(files.c.id).where(gone).limit(rows_max).scalar_subquery()
        await self._mark(sa.update(files).where(files.c.id.in_(chosen), gone))
        query = sa.select(files.c.id).where(files.c.state == "deleted").limit(rows_max)
        async with self.database.read() as transaction:
            found = list((await transaction.execute(query)).scalars())
        for file_id in found:
            await self._remove(blobs, file_id)
        return len(found)

    async def _check(self, transaction: Transaction, project_id: str, size: int) -> None:
        bytes_max = self._settings.project_bytes_max
        await check_quota(transaction, project_id, size, bytes_max, self._quota(project_id))

    def _visible(self, project_id: str) -> sa.Select[Any]:
        return sa.select(files).where(*_can_be_read(project_id, self._clock.now()))

    async def _mark(self, query: sa.Update) -> bool:
        """Mark as deleted; whether there was anything to mark."""
        async with self.database.begin() as transaction:
            return bool((await transaction.execute(query.values(state="deleted"))).rowcount)

    async def _remove(self, blobs: Remover, file_id: str) -> None:
        await blobs.delete(blob_key(file_id))
        async with self.database.begin() as transaction:
            await transaction.execute(sa.delete(files).where(files.c.id == file_id, files.c.state == "deleted"))


def blob_key(file_id: str) -> str:
    """Where the bytes of a file are."""
    return f"files/{file_id}"


async def check_quota(
    transaction: Transaction, project_id: str, size: int, bytes_max: int, quota: int | None = None
) -> None:
    """Raise unless the project may keep `size` more bytes; holds the project for the transaction.

    InsufficientStorage where that is more than any may, QuotaExceeded where it is more than its own quota.
    """
    await hold_project(transaction, project_id)
    kept = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(files.c.bytes), 0)).where(
        files.c.project_id == project_id
    )
    parts = (
        sa.select(sa.func.coalesce(sa.func.sum(upload_parts.c.bytes), 0))
        .select_from(upload_parts.join(uploads))
        .where(uploads.c.project_id == project_id)
    )
    count, used = (await transaction.execute(kept)).one()
    used += await transaction.scalar(parts) or 0
    if used + size > bytes_max or count > FILES_PER_PROJECT_MAX:
        raise InsufficientStorage("This project's files take all the room that it may have. Delete some of them.")
    check_level(Resource.STORED_BYTES, quota, int(used), size)


def _new(project_id: str, file_id: str, filename: str, purpose: str, now: float) -> File:
    return File(
        id=file_id,
        project_id=project_id,
        state="uploading",
        filename=filename,
        purpose=purpose,
        bytes=0,
        sha256=None,
        blob_key=blob_key(file_id),
        created_at=now,
        expires_at=None,
    )


def is_readable(file_id: sa.ColumnElement[Any], project_id: str, now: float) -> sa.ColumnElement[bool]:
    """That the file which a row of a project names can still be read."""
    return sa.exists().where(files.c.id == file_id, *_can_be_read(project_id, now))


def _can_be_read(project_id: str, now: float) -> Sequence[sa.ColumnElement[bool]]:
    return files.c.project_id == project_id, files.c.state == "ready", _unexpired(now)


def _ready(file: File, size: int, sha256: str, now: float, keep_seconds: float | None) -> dict[str, Any]:
    return {
        "state": "ready",
        "filename": file.filename,
        "purpose": file.purpose,
        "bytes": size,
        "sha256": sha256,
        "created_at": now,
        "expires_at": None if keep_seconds is None else now + keep_seconds,
    }


def _unexpired(now: float) -> sa.ColumnElement[bool]:
    return sa.or_(files.c.expires_at.is_(None), files.c.expires_at > now)


def _is_read() -> sa.ColumnElement[bool]:
    """Whether it is the input of a batch that has not ended: its lines are read until then."""
    reads = sa.select(batches.c.id).join(jobs, jobs.c.id == batches.c.id)
    return reads.where(batches.c.input_file_id == files.c.id, jobs.c.state.in_(LIVE)).exists()


def _row(file: File) -> dict[str, Any]:
    return {column.name: getattr(file, column.name) for column in files.columns}


def _file(row: sa.Row[Any]) -> File:
    return File(**row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name

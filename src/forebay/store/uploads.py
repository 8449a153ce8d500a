"""Uploads as rows: parts that come in any order and become one file.

It refuses a part for an upload that is over, and to forget a blob: the row of a part outlives its blob.

    pending -> completed | cancelled | expired
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from forebay.clock import Clock, new_id
from forebay.config import FileSettings
from forebay.errors import InsufficientStorage, InvalidRequest, NotFound, Overloaded, StoreUnavailable
from forebay.store.database import Database, Transaction
from forebay.store.files import LEFTOVER_SECONDS, File, Quota, Remover, check_quota, no_quota
from forebay.store.tables import upload_parts, uploads

PENDING_PER_PROJECT_MAX = 1000
_KEEP_SECONDS = 2_592_000  # how long the row of an upload that is over can be asked for


@dataclass(frozen=True, slots=True)
class Upload:
    """A row of the table. Times are seconds since the epoch."""

    id: str
    project_id: str
    status: str
    filename: str
    purpose: str
    mime_type: str
    bytes: int
    file_id: str | None
    file_expires_after_seconds: int | None
    created_at: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class Part:
    """A row of the table. Its states are those of a file."""

    id: str
    upload_id: str
    state: str
    bytes: int
    blob_key: str
    created_at: float


class UploadStore:
    """Every statement about uploads and their parts."""

    def __init__(
        self, database: Database, clock: Clock, settings: FileSettings | None = None, quota: Quota = no_quota
    ) -> None:
        self.database = database
        self._clock = clock
        self._settings = settings or FileSettings()
        self._quota = quota

    async def create(
        self,
        transaction: Transaction,
        project_id: str,
        *,
        filename: str,
        purpose: str,
        mime_type: str,
        size: int,
        file_expires_after_seconds: int | None = None,
    ) -> Upload:
        """A new upload. Raises InsufficientStorage or QuotaExceeded for want of room, Overloaded if there are too many."""
        await self._check(transaction, project_id, size)
        pending = sa.select(sa.func.count()).where(uploads.c.project_id == project_id, uploads.c.status == "pending")
        if (await transaction.scalar(pending) or 0) >= PENDING_PER_PROJECT_MAX:
            raise Overloaded("This project has too many unfinished uploads.", code="too_many_uploads")
        now = self._clock.now()
        upload = Upload(
            id=new_id("upload"),
            project_id=project_id,
            status="pending",
            filename=filename,
            purpose=purpose,
            mime_type=mime_type,
            bytes=size,
            file_id=None,
            file_expires_after_seconds=file_expires_after_seconds,
            created_at=now,
            expires_at=now + self._settings.upload_keep_seconds,
        )
        await transaction.execute(sa.insert(uploads).values(_row(uploads, upload)))
        return upload

    async def get(self, project_id: str, upload_id: str) -> Upload:
        """An upload; one whose time is over is `expired` at once. Raises NotFound."""
        async with self.database.read() as transaction:
            return await self._get(transaction, project_id, upload_id)

    async def cancel(self, transaction: Transaction, project_id: str, upload_id: str) -> Upload:
        """End an upload. Raises NotFound, or InvalidRequest if it is over; one that is cancelled already stays so."""
        upload = await self._get(transaction, project_id, upload_id)
        if upload.status == "cancelled":
            return upload
        _require_pending(upload)
        return await self._end(transaction, upload, {"status": "cancelled"})

    async def begin_part(self, project_id: str, upload_id: str) -> Part:
        """A part whose blob is about to be written. Whoever fails calls `discard_part`."""
        count = sa.select(sa.func.count()).where(upload_parts.c.upload_id == upload_id)
        identity = new_id("part")
        part = Part(identity, upload_id, "uploading", 0, f"parts/{upload_id}/{identity}", self._clock.now())
        async with self.database.begin() as transaction:
            upload = await self._get(transaction, project_id, upload_id)
            _require_pending(upload)
            await self._check(transaction, project_id, 1)
            if (await transaction.scalar(count) or 0) >= self._settings.parts_max:
                raise InvalidRequest(f"An upload has at most {self._settings.parts_max} parts.")
            await transaction.execute(sa.insert(upload_parts).values(_row(upload_parts, part)))
        return part

    async def finish_part(self, transaction: Transaction, project_id: str, part: Part, size: int) -> Part:
        """Make a part ready. Raises NotFound or InvalidRequest if its upload is over by now."""
        upload = await self._get(transaction, project_id, part.upload_id)
        _require_pending(upload)
        await self._check(transaction, project_id, size)
        query = (
            sa.update(upload_parts)
            .where(upload_parts.c.id == part.id, upload_parts.c.state == "uploading")
            .values(state="ready", bytes=size)
            .returning(upload_parts)
        )
        row = (await transaction.execute(query)).one_or_none()
        if row is None:
            raise NotFound("There is no such upload.")
        return Part(**row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name

    async def discard_part(self, blobs: Remover, part: Part) -> None:
        """Remove a part that was begun and will not be finished."""
        query = sa.update(upload_parts).where(upload_parts.c.id == part.id, upload_parts.c.state == "uploading")
        async with self.database.begin() as transaction:
            marked = (await transaction.execute(query.values(state="deleted"))).rowcount
        if marked:
            await self._remove(blobs, part)

    async def parts(self, upload: Upload, part_ids: Sequence[str]) -> list[Part]:
        """The parts by these ids, in this order. Raises InvalidRequest if one is missing or named twice, or all is over."""
        _require_pending(upload)
        async with self.database.read() as transaction:
            query = sa.select(upload_parts).where(
                upload_parts.c.upload_id == upload.id, upload_parts.c.state == "ready"
            )
            found = {row.id: Part(**row._mapping) for row in await transaction.execute(query)}  # noqa: SLF001
        if len(set(part_ids)) != len(part_ids):
            raise InvalidRequest("`part_ids` names a part twice.", param="part_ids")
        if missing := [part_id for part_id in part_ids if part_id not in found]:
            raise InvalidRequest(f"This upload has no part `{missing[0][:64]}`.", param="part_ids")
        return [found[part_id] for part_id in part_ids]

    async def release_parts(self, transaction: Transaction, upload: Upload) -> None:
        """Let go of the room that the parts take, for the file that takes their place in the same transaction."""
        ready = (upload_parts.c.upload_id == upload.id, upload_parts.c.state == "ready")
        await transaction.execute(sa.update(upload_parts).where(*ready).values(state="deleted", bytes=0))

    async def complete(self, transaction: Transaction, upload: Upload, file: File) -> Upload:
        """Bind the upload to its file. Raises InvalidRequest if it is over by now."""
        return await self._end(transaction, upload, {"status": "completed", "file_id": file.id})

    async def remove_parts(self, blobs: Remover, upload: Upload) -> None:
        """Remove the parts of an upload that is over, as far as the blobs can be reached; the sweep takes the rest."""
        query = sa.select(upload_parts).where(
            upload_parts.c.upload_id == upload.id, upload_parts.c.state != "uploading"
        )
        async with self.database.read() as transaction:
            found = [Part(**row._mapping) for row in await transaction.execute(query)]  # noqa: SLF001
        for part in found:
            try:
                await self._remove(blobs, part)
            except (StoreUnavailable, InsufficientStorage):
                return

    async def _check(self, transaction: Transaction, project_id: str, size: int) -> None:
        bytes_max = self._settings.project_bytes_max
        await check_quota(transaction, project_id, size, bytes_max, self._quota(project_id))

    async def sweep(self, blobs: Remover, now: float, rows_max: int) -> int:
        """Expire uploads, and remove the parts and the rows of those that are over; how many, at most `rows_max` each."""
        expired = sa.and_(uploads.c.status == "pending", uploads.c.expires_at <= now)
        # A part that is still being written by somebody keeps its row until nobody can be.
        idle = sa.or_(upload_parts.c.state != "uploading", upload_parts.c.created_at < now - LEFTOVER_SECONDS)
        over = sa.or_(uploads.c.status != "pending", upload_parts.c.state == "deleted")
        useless = sa.select(upload_parts).select_from(upload_parts.join(uploads)).where(over, idle).limit(rows_max)
        old = (
            sa.select(uploads.c.id)
            .where(
                uploads.c.status != "pending",
                uploads.c.expires_at < now - _KEEP_SECONDS,
                ~sa.exists().where(upload_parts.c.upload_id == uploads.c.id),
            )
            .limit(rows_max)
        )
        async with self.database.begin() as transaction:
            chosen = sa.select(uploads.c.id).where(expired).limit(rows_max).scalar_subquery()
            await transaction.execute(
                sa.update(uploads).where(uploads.c.id.in_(chosen), expired).values(status="expired")
            )
            removed = (await transaction.execute(sa.delete(uploads).where(uploads.c.id.in_(old)))).rowcount
            found = [Part(**row._mapping) for row in await transaction.execute(useless)]  # noqa: SLF001
        for part in found:
            await self._remove(blobs, part)
        return int(removed) + len(found)

    async def _get(self, transaction: Transaction, project_id: str, upload_id: str) -> Upload:
        query = sa.select(uploads).where(uploads.c.id == upload_id, uploads.c.project_id == project_id)
        row = (await transaction.execute(query)).one_or_none()
        if row is None:
            raise NotFound("There is no such upload.")
        values = dict(row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name
        if values["status"] == "pending" and values["expires_at"] <= self._clock.now():
            values["status"] = "expired"
        return Upload(**values)

    async def _end(self, transaction: Transaction, upload: Upload, values: dict[str, Any]) -> Upload:
        query = (
            sa.update(uploads)
            .where(uploads.c.id == upload.id, uploads.c.status == "pending", uploads.c.expires_at > self._clock.now())
            .values(values)
            .returning(uploads)
        )
        row = (await transaction.execute(query)).one_or_none()
        if row is None:
            _require_pending(await self._get(transaction, upload.project_id, upload.id))
            raise NotFound("There is no such upload.")
        return Upload(**row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name

    async def _remove(self, blobs: Remover, part: Part) -> None:
        await blobs.delete(part.blob_key)
        async with self.database.begin() as transaction:
            await transaction.execute(sa.delete(upload_parts).where(upload_parts.c.id == part.id))


def _require_pending(upload: Upload) -> None:
    if upload.status != "pending":
        raise InvalidRequest(f"This upload is {upload.status}. Create another one.", code="upload_not_pending")


def _row(table: sa.Table, record: Upload | Part) -> dict[str, Any]:
    return {column.name: getattr(record, column.name) for column in table.columns}

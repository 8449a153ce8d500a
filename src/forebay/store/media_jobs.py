"""Jobs about recordings and pictures as rows: taken in, submitted, worked on part after part, kept as long as their job.

It refuses to write for an attempt that no longer has the job, and to forget a blob: a row outlives its blob at both
ends, so that whatever a crash leaves behind is found by `sweep`.

    media, what came with the request: none, or kept -> removing -> removed
    a drafted file, which its job makes:     drafted -> removing -> (no row), or a file when the job ends well
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from forebay.clock import Clock
from forebay.errors import LeaseLost, NotFound
from forebay.store.database import Database, Transaction
from forebay.store.files import LEFTOVER_SECONDS, Remover, blob_key
from forebay.store.job_records import Lease
from forebay.store.job_state import FINISHED, LIVE, JobState
from forebay.store.jobs import HAS_LOST_MEDIA, REMOVED, REMOVING, JobStore
from forebay.store.projects import hold_project
from forebay.store.tables import drafted_files, jobs, media_jobs, media_parts

TRANSCRIPTION = "transcription"  # the kinds of jobs
IMAGE = "image"
FINISHED_STAGE = "finished"
WHOLE = 1000  # the total of such a job: progress is told in thousandths of all the work

_HAS_NONE, _KEPT = "none", "kept"
_DRAFTED = "drafted"
_FOLDERS = {TRANSCRIPTION: "recordings", IMAGE: "pictures"}


@dataclass(frozen=True, slots=True)
class NewMediaJob:
    """One that is handed in.

    `request` is JSON, what its attempts read, and `shown` what of it says how the result is written. With `has_media` what
    it is about is a blob of its own, or in the request: that goes when the job ends.
    """

    id: str
    kind: str
    project_id: str
    path: str
    request: bytes
    shown: bytes
    has_media: bool


@dataclass(frozen=True, slots=True)
class MediaJob:
    """What an attempt needs to know. There is no `request` any more if it brought media and the job had ended."""

    id: str
    project_id: str
    path: str
    request: bytes | None


@dataclass(frozen=True, slots=True)
class Part:
    """A finished part of a stage: a stretch of a recording, a picture. `body` is JSON."""

    stage: str
    number: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished job has found or made, as JSON, and how it was asked to be written."""

    shown: bytes
    body: bytes


class MediaJobStore:
    """Every statement about such jobs. `node` is who takes media in: a name that nobody else who lives has."""

    def __init__(self, database: Database, clock: Clock, node: str) -> None:
        self.database = database
        self._clock = clock
        self._node = node
        self._began_at = clock.now()

    # Making.

    async def begin(self, new: NewMediaJob) -> None:
        """A row for one whose media are about to be stored. Whoever does not submit it calls `discard`."""
        async with self.database.begin() as transaction:
            await transaction.execute(sa.insert(media_jobs).values(self._row(new, submitted=False)))

    async def submit(self, transaction: Transaction, new: NewMediaJob, size: int | None = None) -> None:
        """Say that there is a job, in the transaction that makes it. `size` is that of media that were begun and stored.

        Raises NotFound if it was swept.
        """
        if size is None:
            await transaction.execute(sa.insert(media_jobs).values(self._row(new, submitted=True)))
            return
        begun = (media_jobs.c.id == new.id, media_jobs.c.media == _KEPT)
        query = sa.update(media_jobs).where(*begun).values(submitted=True, bytes=size)
        if (await transaction.execute(query)).rowcount != 1:
            raise NotFound("What came with the request took too long to be stored. Send it again.")

    def _row(self, new: NewMediaJob, *, submitted: bool) -> dict[str, Any]:
        return {
            "id": new.id,
            "kind": new.kind,
            "project_id": new.project_id,
            "node": self._node,
            "submitted": submitted,
            "media": _KEPT if new.has_media else _HAS_NONE,
            "bytes": 0,
            "path": new.path,
            "request": new.request,
            "shown": new.shown,
            "created_at": self._clock.now(),
        }

    async def unfinished(self, transaction: Transaction, project_id: str, kind: str) -> int:
        """How many jobs of a kind a project has that have yet to end, for who adds one; holds the project."""
        await hold_project(transaction, project_id)
        query = sa.select(sa.func.count()).select_from(jobs)
        mine = (jobs.c.project_id == project_id, jobs.c.kind == kind, jobs.c.state.in_(LIVE))
        return int(await transaction.scalar(query.where(*mine)) or 0)

    async def discard(self, blobs: Remover, job_id: str) -> None:
        """Remove what was begun and will not be submitted; what is submitted stays."""
        begun = (media_jobs.c.id == job_id, ~media_jobs.c.submitted)
        if await self._mark(*begun):
            await self._remove(blobs, job_id)

    # Working.

    async def get(self, job_id: str) -> MediaJob | None:
        """What is to be done; none if it is gone."""
        query = sa.select(media_jobs).where(media_jobs.c.id == job_id)
        async with self.database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            return None
        request = None if row.media in {REMOVING, REMOVED} else row.request
        return MediaJob(row.id, row.project_id, row.path, request)

    async def parts(self, job_id: str) -> list[Part]:
        """What is finished of it, in order within each stage."""
        query = (
            sa.select(media_parts.c.stage, media_parts.c.number, media_parts.c.body)
            .where(media_parts.c.job_id == job_id)
            .order_by(media_parts.c.stage, media_parts.c.number)
        )
        async with self.database.read() as connection:
            return [Part(*row) for row in await connection.execute(query)]

    async def keep(self, work: JobStore, lease: Lease, part: Part) -> None:
        """Write down a finished part: progress that stays, so failures before it are forgiven. Raises LeaseLost.

        The same part may be written twice: nobody knew whether it was.
        """
        values = {"attempt": lease.attempt, "body": part.body}
        key = {"job_id": lease.id, "stage": part.stage, "number": part.number}
        same = [media_parts.c[name] == value for name, value in key.items()]
        async with self.database.begin() as transaction:
            await work.fence(transaction, lease)
            await transaction.execute(sa.delete(media_parts).where(*same))
            await transaction.execute(sa.insert(media_parts).values(**key, **values))

    async def draft(self, lease: Lease, file_ids: Sequence[str]) -> None:
        """Announce files that an attempt is about to store, and that are none before the job ends well. Raises LeaseLost.

        The same ones may be announced twice.
        """
        held = (jobs.c.id == lease.id, jobs.c.attempt == lease.attempt, jobs.c.state == JobState.RUNNING)
        async with self.database.begin() as transaction:
            if (await transaction.scalar(sa.select(jobs.c.id).where(*held).with_for_update())) is None:
                raise LeaseLost
            await transaction.execute(sa.delete(drafted_files).where(drafted_files.c.id.in_(file_ids)))
            rows = [{"id": each, "job_id": lease.id, "state": _DRAFTED} for each in file_ids]
            await transaction.execute(sa.insert(drafted_files), rows)

    async def advance(
        self, lease: Lease, stage: str, done: int, step: int | None = None, steps: int | None = None
    ) -> None:
        """Tell how far an attempt is, in thousandths, never less than before, and in steps of its stage. Raises LeaseLost.

        It forgives no failure: what is not kept is done again by the next attempt.
        """
        query = (
            sa.update(jobs)
            .where(jobs.c.id == lease.id, jobs.c.attempt == lease.attempt, jobs.c.state == JobState.RUNNING)
            .values(
                stage=stage,
                total=WHOLE if done else 0,  # nothing is no pace to go by
                completed=sa.case((jobs.c.completed < done, done), else_=jobs.c.completed),
                step=step,
                steps=steps,
                progress_at=self.database.now(self._clock),
            )
        )
        async with self.database.begin() as transaction:
            if (await transaction.execute(query)).rowcount != 1:
                raise LeaseLost

    async def finish(self, transaction: Transaction, job_id: str, result: bytes, file_ids: Sequence[str] = ()) -> None:
        """Keep the result, in the transaction that ends its job, in place of the parts; `file_ids` are no drafts any more."""
        await transaction.execute(sa.update(media_jobs).where(media_jobs.c.id == job_id).values(result=result))
        await transaction.execute(sa.delete(media_parts).where(media_parts.c.job_id == job_id))
        if file_ids:
            adopted = (drafted_files.c.id.in_(file_ids), drafted_files.c.job_id == job_id)
            found = (await transaction.execute(sa.delete(drafted_files).where(*adopted))).rowcount
            assert found == len(file_ids), "drafts go when their job has ended, and this one ends now"
        whole = {"stage": FINISHED_STAGE, "total": WHOLE, "completed": WHOLE, "step": None, "steps": None}
        await transaction.execute(sa.update(jobs).where(jobs.c.id == job_id).values(whole))

    # Reading.

    async def result(self, project_id: str, job_id: str) -> Result | None:
        """What a project's job has found or made; none if it has nothing yet, or never will."""
        query = sa.select(media_jobs).where(
            media_jobs.c.id == job_id, media_jobs.c.project_id == project_id, media_jobs.c.result.is_not(None)
        )
        async with self.database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else Result(row.shown, row.result)

    async def without_media(self, job_ids: Collection[str]) -> set[str]:
        """Those of `job_ids` that nobody can work on again: what came with them is removed, or will be."""
        query = sa.select(media_jobs.c.id).where(media_jobs.c.id.in_(sorted(job_ids)), HAS_LOST_MEDIA)
        return set(await self._ids(query))

    # Removing.

    async def close(self, blobs: Remover, job_id: str) -> None:
        """Remove what came with a job that has ended, and what it has drafted in vain; a sweep does so as well."""
        if await self._mark(media_jobs.c.id == job_id, _has_ended()):
            await self._remove(blobs, job_id)
        if await self._ids(sa.select(drafted_files.c.id).where(drafted_files.c.job_id == job_id).limit(1)):
            await self._give_up_drafts(job_id)
            await self._remove_drafts(blobs, drafted_files.c.job_id == job_id)

    async def sweep(self, blobs: Remover, now: float, rows_max: int) -> int:
        """Remove what jobs that have ended brought or drafted, rows of jobs that are gone, and what was begun and left.

        How many. What was begun under this node's name before this process was left by one that is dead.
        """
        for ended in (_has_ended(), self._is_left(now), _is_gone()):
            await self._mark(ended, limit=rows_max)
        query = sa.select(media_jobs.c.id).where(media_jobs.c.media == REMOVING).limit(rows_max)
        found = await self._ids(query)
        for each in found:
            await self._remove(blobs, each)
        drafts = await self._sweep_drafts(blobs, rows_max)
        useless = sa.select(media_jobs.c.id).where(
            media_jobs.c.media.in_((_HAS_NONE, REMOVED)), sa.or_(self._is_left(now), _is_gone())
        )
        old = await self._ids(useless.limit(rows_max))
        if old:
            async with self.database.begin() as transaction:
                await transaction.execute(sa.delete(media_jobs).where(media_jobs.c.id.in_(sorted(old))))
        return len({*found, *old}) + drafts

    def _is_left(self, now: float) -> sa.ColumnElement[bool]:
        dead = sa.and_(media_jobs.c.node == self._node, media_jobs.c.created_at < self._began_at)
        return sa.and_(~media_jobs.c.submitted, sa.or_(dead, media_jobs.c.created_at < now - LEFTOVER_SECONDS))

    async def _ids(self, query: sa.Select[Any]) -> Sequence[str]:
        async with self.database.read() as connection:
            return (await connection.scalars(query)).all()

    async def _mark(self, *conditions: sa.ColumnElement[bool], limit: int = 1) -> bool:
        """Say of those with media that these are to be removed; whether there were any."""
        chosen = sa.select(media_jobs.c.id).where(media_jobs.c.media == _KEPT, *conditions).limit(limit)
        if not (found := await self._ids(chosen)):
            return False
        query = sa.update(media_jobs).where(
            media_jobs.c.id.in_(sorted(found)), media_jobs.c.media == _KEPT, *conditions
        )
        held = sa.select(jobs.c.id).where(jobs.c.id.in_(sorted(found))).order_by(jobs.c.id).with_for_update()
        async with self.database.begin() as transaction:
            await transaction.execute(held)  # so that nobody tries a job again that `query` sees ended
            return bool((await transaction.execute(query.values(media=REMOVING))).rowcount)

    async def _remove(self, blobs: Remover, job_id: str) -> None:
        async with self.database.read() as connection:
            kind = await connection.scalar(sa.select(media_jobs.c.kind).where(media_jobs.c.id == job_id))
        if kind is None:
            return
        await blobs.delete(media_key(kind, job_id))
        mine = (media_jobs.c.id == job_id, media_jobs.c.media == REMOVING)
        async with self.database.begin() as transaction:
            await transaction.execute(sa.update(media_jobs).where(*mine).values(media=REMOVED, request=None))
            # Without what came with it nobody goes on with it.
            await transaction.execute(sa.delete(media_parts).where(media_parts.c.job_id == job_id))
            begun = (media_jobs.c.id == job_id, ~media_jobs.c.submitted)
            await transaction.execute(sa.delete(media_jobs).where(*begun))

    async def _sweep_drafts(self, blobs: Remover, rows_max: int) -> int:
        live = sa.exists().where(jobs.c.id == drafted_files.c.job_id, jobs.c.state.in_(LIVE))
        left = sa.select(drafted_files.c.job_id).where(drafted_files.c.state == _DRAFTED, ~live).distinct()
        for job_id in await self._ids(left.limit(rows_max)):
            await self._give_up_drafts(job_id)
        return await self._remove_drafts(blobs, limit=rows_max)

    async def _give_up_drafts(self, job_id: str) -> None:
        """Say of a job that has ended or is gone that its drafts are to be removed; if it is tried again it makes new ones."""
        async with self.database.begin() as transaction:
            # Held, so that nobody tries it again before its parts, which name the drafts, are gone.
            held = sa.select(jobs.c.state).where(jobs.c.id == job_id).with_for_update()
            state = await transaction.scalar(held)
            if state is None or JobState(state) in FINISHED:
                mine = sa.update(drafted_files).where(drafted_files.c.job_id == job_id)
                await transaction.execute(mine.values(state=REMOVING))
                await transaction.execute(sa.delete(media_parts).where(media_parts.c.job_id == job_id))

    async def _remove_drafts(
        self, blobs: Remover, *conditions: sa.ColumnElement[bool], limit: int | None = None
    ) -> int:
        query = sa.select(drafted_files.c.id).where(drafted_files.c.state == REMOVING, *conditions).limit(limit)
        found = await self._ids(query)
        for each in found:
            await blobs.delete(blob_key(each))
        if found:
            async with self.database.begin() as transaction:
                await transaction.execute(sa.delete(drafted_files).where(drafted_files.c.id.in_(sorted(found))))
        return len(found)


def media_key(kind: str, job_id: str) -> str:
    """Where that is which came with the request."""
    return f"{_FOLDERS[kind]}/{job_id}"


def _job_is(*conditions: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    return sa.exists().where(jobs.c.id == media_jobs.c.id, *conditions)


def _has_ended() -> sa.ColumnElement[bool]:
    return _job_is(jobs.c.state.in_(FINISHED))


def _is_gone() -> sa.ColumnElement[bool]:
    return sa.and_(media_jobs.c.submitted, ~_job_is())

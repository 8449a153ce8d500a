"""Transcriptions as rows: taken in, submitted, worked on stretch by stretch, kept as long as their job.

It refuses to write for an attempt that no longer has the job, and to forget what holds sound: a row outlives its blob at
both ends, so that whatever a crash leaves behind is found by `sweep`.

    sound: none, or kept -> removing -> removed
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from forebay.clock import Clock
from forebay.errors import LeaseLost, NotFound
from forebay.store.database import Database, Transaction
from forebay.store.files import LEFTOVER_SECONDS, Remover
from forebay.store.job_state import FINISHED, LIVE, JobState
from forebay.store.jobs import JobStore, Lease
from forebay.store.tables import jobs, stretches, transcriptions

TRANSCRIPTION = "transcription"  # the kind of its jobs
FINISHED_STAGE = "finished"
WHOLE = 1000  # the total of its jobs: progress is told in thousandths of all the work

_HAS_NONE, _KEPT, _REMOVING, _REMOVED = "none", "kept", "removing", "removed"
_HAS_LOST_SOUND = transcriptions.c.sound.in_((_REMOVING, _REMOVED))


@dataclass(frozen=True, slots=True)
class NewTranscription:
    """A transcription that is handed in.

    `request` is its JSON body, and `shown` what of it says how the result is written. With `has_sound` its recording is a
    blob of its own, or sound is in the request: that goes when the job ends.
    """

    id: str
    project_id: str
    path: str
    request: bytes
    shown: bytes
    has_sound: bool


@dataclass(frozen=True, slots=True)
class Transcription:
    """What an attempt needs to know. There is no `request` any more if it brought sound and its job had ended."""

    id: str
    project_id: str
    path: str
    request: bytes | None


@dataclass(frozen=True, slots=True)
class Stretch:
    """A finished stretch of a stage. `body` is JSON."""

    stage: str
    number: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished job has found: the transcript as JSON, and how it was asked to be written."""

    shown: bytes
    transcript: bytes


class TranscriptionStore:
    """Every statement about transcriptions. `node` is who takes recordings in: a name that nobody else who lives has."""

    def __init__(self, database: Database, clock: Clock, node: str) -> None:
        self.database = database
        self._clock = clock
        self._node = node
        self._began_at = clock.now()

    # Making.

    async def begin(self, new: NewTranscription) -> None:
        """A row for one whose recording is about to be stored. Whoever does not submit it calls `discard`."""
        async with self.database.begin() as transaction:
            await transaction.execute(sa.insert(transcriptions).values(self._row(new, submitted=False)))

    async def submit(self, transaction: Transaction, new: NewTranscription, size: int | None = None) -> None:
        """Say that there is a job, in the transaction that makes it. `size` is that of a recording that was begun and stored.

        Raises NotFound if it was swept.
        """
        if size is None:
            await transaction.execute(sa.insert(transcriptions).values(self._row(new, submitted=True)))
            return
        begun = (transcriptions.c.id == new.id, transcriptions.c.sound == _KEPT)
        query = sa.update(transcriptions).where(*begun).values(submitted=True, bytes=size)
        if (await transaction.execute(query)).rowcount != 1:
            raise NotFound("The recording took too long to be stored. Send it again.")

    def _row(self, new: NewTranscription, *, submitted: bool) -> dict[str, Any]:
        return {
            "id": new.id,
            "project_id": new.project_id,
            "node": self._node,
            "submitted": submitted,
            "sound": _KEPT if new.has_sound else _HAS_NONE,
            "bytes": 0,
            "path": new.path,
            "request": new.request,
            "shown": new.shown,
            "created_at": self._clock.now(),
        }

    async def unfinished(self, transaction: Transaction, project_id: str) -> int:
        """How many transcriptions of a project have yet to end."""
        query = sa.select(sa.func.count()).select_from(jobs)
        mine = (jobs.c.project_id == project_id, jobs.c.kind == TRANSCRIPTION, jobs.c.state.in_(LIVE))
        return int(await transaction.scalar(query.where(*mine)) or 0)

    async def discard(self, blobs: Remover, transcription_id: str) -> None:
        """Remove what was begun and will not be submitted; what is submitted stays."""
        begun = (transcriptions.c.id == transcription_id, ~transcriptions.c.submitted)
        if await self._mark(*begun):
            await self._remove(blobs, transcription_id)

    # Working.

    async def get(self, transcription_id: str) -> Transcription | None:
        """What is to be done; none if it is gone."""
        query = sa.select(transcriptions).where(transcriptions.c.id == transcription_id)
        async with self.database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            return None
        request = None if row.sound in {_REMOVING, _REMOVED} else row.request
        return Transcription(row.id, row.project_id, row.path, request)

    async def stretches(self, transcription_id: str) -> list[Stretch]:
        """What is finished of it, in order within each stage."""
        query = (
            sa.select(stretches.c.stage, stretches.c.number, stretches.c.body)
            .where(stretches.c.transcription_id == transcription_id)
            .order_by(stretches.c.stage, stretches.c.number)
        )
        async with self.database.read() as connection:
            return [Stretch(*row) for row in await connection.execute(query)]

    async def keep(self, work: JobStore, lease: Lease, stretch: Stretch) -> None:
        """Write down a finished stretch: progress that stays, so failures before it are forgiven. Raises LeaseLost.

        The same stretch may be written twice: nobody knew whether it was.
        """
        values = {"attempt": lease.attempt, "body": stretch.body}
        key = {"transcription_id": lease.id, "stage": stretch.stage, "number": stretch.number}
        same = [stretches.c[name] == value for name, value in key.items()]
        async with self.database.begin() as transaction:
            await work.fence(transaction, lease)
            await transaction.execute(sa.delete(stretches).where(*same))
            await transaction.execute(sa.insert(stretches).values(**key, **values))

    async def advance(self, lease: Lease, stage: str, done: int) -> None:
        """Tell how far an attempt is, in thousandths; never less than before. Raises LeaseLost.

        It forgives no failure: what is not kept is done again by the next attempt.
        """
        query = (
            sa.update(jobs)
            .where(jobs.c.id == lease.id, jobs.c.attempt == lease.attempt, jobs.c.state == JobState.RUNNING)
            .values(
                stage=stage,
                total=WHOLE if done else 0,  # nothing is no pace to go by
                completed=sa.case((jobs.c.completed < done, done), else_=jobs.c.completed),
                progress_at=self.database.now(self._clock),
            )
        )
        async with self.database.begin() as transaction:
            if (await transaction.execute(query)).rowcount != 1:
                raise LeaseLost

    async def finish(self, transaction: Transaction, transcription_id: str, duration: float, transcript: bytes) -> None:
        """Keep the result, in the transaction that ends its job, in place of the stretches."""
        mine = transcriptions.c.id == transcription_id
        await transaction.execute(sa.update(transcriptions).where(mine).values(duration=duration, result=transcript))
        await transaction.execute(sa.delete(stretches).where(stretches.c.transcription_id == transcription_id))
        whole = {"stage": FINISHED_STAGE, "total": WHOLE, "completed": WHOLE}
        await transaction.execute(sa.update(jobs).where(jobs.c.id == transcription_id).values(whole))

    # Reading.

    async def result(self, project_id: str, transcription_id: str) -> Result | None:
        """What a project's job has found; none if it has found nothing yet, or never will."""
        query = sa.select(transcriptions).where(
            transcriptions.c.id == transcription_id,
            transcriptions.c.project_id == project_id,
            transcriptions.c.result.is_not(None),
        )
        async with self.database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else Result(row.shown, row.result)

    async def without_sound(self, job_ids: Collection[str]) -> set[str]:
        """Those of `job_ids` that nobody can work on again: what held their sound is removed, or will be."""
        query = sa.select(transcriptions.c.id).where(transcriptions.c.id.in_(sorted(job_ids)), _HAS_LOST_SOUND)
        return set(await self._ids(query))

    # Removing.

    async def close(self, blobs: Remover, transcription_id: str) -> None:
        """Remove what holds sound of a job that has ended; a sweep does so as well."""
        if await self._mark(transcriptions.c.id == transcription_id, _has_ended()):
            await self._remove(blobs, transcription_id)

    async def sweep(self, blobs: Remover, now: float, rows_max: int) -> int:
        """Remove what holds sound of jobs that have ended, rows of jobs that are gone, and what was begun and left; how many.

        What was begun under this node's name before this process was left by one that is dead.
        """
        for ended in (_has_ended(), self._is_left(now), _is_gone()):
            await self._mark(ended, limit=rows_max)
        query = sa.select(transcriptions.c.id).where(transcriptions.c.sound == _REMOVING).limit(rows_max)
        found = await self._ids(query)
        for each in found:
            await self._remove(blobs, each)
        useless = sa.select(transcriptions.c.id).where(
            transcriptions.c.sound.in_((_HAS_NONE, _REMOVED)), sa.or_(self._is_left(now), _is_gone())
        )
        old = await self._ids(useless.limit(rows_max))
        if old:
            async with self.database.begin() as transaction:
                await transaction.execute(sa.delete(transcriptions).where(transcriptions.c.id.in_(sorted(old))))
        return len({*found, *old})

    def _is_left(self, now: float) -> sa.ColumnElement[bool]:
        dead = sa.and_(transcriptions.c.node == self._node, transcriptions.c.created_at < self._began_at)
        return sa.and_(~transcriptions.c.submitted, sa.or_(dead, transcriptions.c.created_at < now - LEFTOVER_SECONDS))

    async def _ids(self, query: sa.Select[Any]) -> Sequence[str]:
        async with self.database.read() as connection:
            return (await connection.scalars(query)).all()

    async def _mark(self, *conditions: sa.ColumnElement[bool], limit: int = 1) -> bool:
        """Say of those with sound that it is to be removed; whether there were any."""
        chosen = sa.select(transcriptions.c.id).where(transcriptions.c.sound == _KEPT, *conditions).limit(limit)
        if not (found := await self._ids(chosen)):
            return False
        query = sa.update(transcriptions).where(
            transcriptions.c.id.in_(sorted(found)), transcriptions.c.sound == _KEPT, *conditions
        )
        async with self.database.begin() as transaction:
            return bool((await transaction.execute(query.values(sound=_REMOVING))).rowcount)

    async def _remove(self, blobs: Remover, transcription_id: str) -> None:
        await blobs.delete(recording_key(transcription_id))
        mine = (transcriptions.c.id == transcription_id, transcriptions.c.sound == _REMOVING)
        async with self.database.begin() as transaction:
            await transaction.execute(sa.update(transcriptions).where(*mine).values(sound=_REMOVED, request=None))
            # Without its recording nobody goes on with it.
            await transaction.execute(sa.delete(stretches).where(stretches.c.transcription_id == transcription_id))
            begun = (transcriptions.c.id == transcription_id, ~transcriptions.c.submitted)
            await transaction.execute(sa.delete(transcriptions).where(*begun))


def recording_key(transcription_id: str) -> str:
    """Where the recording is that came with the request."""
    return f"recordings/{transcription_id}"


def _job_is(*conditions: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    return sa.exists().where(jobs.c.id == transcriptions.c.id, *conditions)


def _has_ended() -> sa.ColumnElement[bool]:
    return _job_is(jobs.c.state.in_(FINISHED))


def _is_gone() -> sa.ColumnElement[bool]:
    return sa.and_(transcriptions.c.submitted, ~_job_is())


def sound_is_lost(job_id: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """Whether the job of that id is a transcription that nobody can work on again."""
    return sa.exists().where(transcriptions.c.id == job_id, _HAS_LOST_SOUND)

"""Dead letters as rows: what was given up, with every attempt at it, until somebody reads, edits and requeues it.

It refuses to keep the input of a batch line twice: it keeps its place in the input file.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from forebay.clock import Clock, new_id
from forebay.errors import NotFound
from forebay.store.database import Database, Transaction, delete_some
from forebay.store.files import File, is_readable
from forebay.store.job_records import Job, Verdict
from forebay.store.job_state import FINISHED, JobState, sources
from forebay.store.jobs import ERRORS_MAX, media_are_lost
from forebay.store.tables import dead_letters, jobs

PAGE_SIZE_MAX = 100
MESSAGE = "message"  # the kind of a pushed message that cannot be used
_MESSAGE_CHARS_MAX = 2000
_ROWS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class LostLine:
    """A line of a batch that was given up. `attempts` has of each: at, status, code, message."""

    custom_id: str
    line: int
    source_offset: int
    source_bytes: int
    error_code: str
    error_message: str
    attempts: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class LostMessage:
    """A pushed message that cannot be used. `source` is the file that holds what was in it."""

    id: str
    project_id: str
    endpoint: str
    message_id: str
    source: File
    error_code: str
    error_message: str
    attempt: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A row of the table."""

    id: str
    project_id: str
    kind: str
    job_id: str
    endpoint: str | None
    custom_id: str | None
    line: int | None
    source_file_id: str | None
    source_offset: int | None
    source_bytes: int | None
    error_code: str
    error_message: str
    attempts: list[dict[str, Any]]
    created_at: float
    requeued_at: float | None
    requeued_as: str | None


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which dead letters are meant.

    `waiting` leaves out those that were requeued, `takeable` those of which nothing is left to take up: the input file
    is gone, or the job or what came with it is, or it does not stand still.
    """

    kind: str | None = None
    job_id: str | None = None
    code: str | None = None
    waiting: bool = False
    takeable: bool = False


EVERY = Chosen()


class DeadLetterStore:
    """Every statement about dead letters."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self.database = database
        self._clock = clock

    async def add_job(self, transaction: Transaction, job: Job, verdict: Verdict) -> None:
        """Keep a job that was given up."""
        code, message = verdict.error or ("internal_error", "")
        last = {"attempt": job.attempt, "at": self._clock.now(), "code": code, "message": message}
        await self._insert(
            transaction,
            [
                {
                    "project_id": job.project_id,
                    "kind": job.kind,
                    "job_id": job.id,
                    "error_code": code,
                    "error_message": _kept(message),
                    "attempts": [*job.errors, last][-ERRORS_MAX:],
                }
            ],
        )

    async def add_lines(
        self, transaction: Transaction, batch: Job, endpoint: str, source_file_id: str, lines: Sequence[LostLine]
    ) -> None:
        """Keep lines of a batch that were given up, a few at a time: all of a large batch would hold up requests."""
        for start in range(0, len(lines), _ROWS_AT_ONCE):
            some = lines[start : start + _ROWS_AT_ONCE]
            await self._insert(transaction, _line_rows(batch, endpoint, source_file_id, some))
            await self._clock.sleep(0)

    async def add_message(self, transaction: Transaction, lost: LostMessage) -> None:
        """Keep a pushed message that cannot be used."""
        row = {
            "id": lost.id,
            "project_id": lost.project_id,
            "kind": MESSAGE,
            "job_id": "",  # it never became one
            "endpoint": lost.endpoint,
            "custom_id": lost.message_id,
            "source_file_id": lost.source.id,
            "source_offset": 0,
            "source_bytes": lost.source.bytes,
            "error_code": lost.error_code,
            "error_message": _kept(lost.error_message),
            "attempts": [dict(lost.attempt)],
        }
        await self._insert(transaction, [row])

    async def _insert(self, transaction: Transaction, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            now = self._clock.now()
            known = [{"id": new_id("dead"), "created_at": now, **row} for row in rows]
            await transaction.execute(sa.insert(dead_letters), known)

    async def get(self, project_id: str, letter_id: str) -> DeadLetter:
        """A project's dead letter. Raises NotFound, also for another project's."""
        query = sa.select(dead_letters).where(dead_letters.c.id == letter_id, dead_letters.c.project_id == project_id)
        async with self.database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFound("There is no such dead letter.")
        return DeadLetter(**row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name

    async def list(
        self, project_id: str, chosen: Chosen = EVERY, *, after: str | None = None, limit: int = PAGE_SIZE_MAX
    ) -> list[DeadLetter]:
        """A page of a project's dead letters, newest first. Raises NotFound if there is none to continue after."""
        query = sa.select(dead_letters).where(*self._conditions(project_id, chosen))
        if after is not None:
            place = await self.get(project_id, after)
            key = sa.tuple_(dead_letters.c.created_at, dead_letters.c.id)
            query = query.where(key < sa.tuple_(place.created_at, place.id))
        query = query.order_by(dead_letters.c.created_at.desc(), dead_letters.c.id.desc()).limit(limit)
        async with self.database.read() as connection:
            return [DeadLetter(**row._mapping) for row in await connection.execute(query)]  # noqa: SLF001

    async def count(self, transaction: Transaction, project_id: str, chosen: Chosen) -> int:
        """How many of a project's dead letters are chosen."""
        query = sa.select(sa.func.count()).select_from(dead_letters)
        query = query.where(*self._conditions(project_id, chosen))
        return int(await transaction.scalar(query) or 0)

    async def mark_requeued(
        self, transaction: Transaction, ids: Collection[str], job_id: str, *, again: bool = False
    ) -> int:
        """Say that a job has taken these up again; how many of them, which had not been taken up unless `again`."""
        query = sa.update(dead_letters).where(dead_letters.c.id.in_(ids))
        query = query if again else query.where(dead_letters.c.requeued_at.is_(None))
        values = {"requeued_at": self._clock.now(), "requeued_as": job_id}
        return int((await transaction.execute(query.values(values))).rowcount)

    async def delete(self, project_id: str, letter_id: str) -> None:
        """Remove a dead letter. Raises NotFound."""
        await self.get(project_id, letter_id)
        async with self.database.begin() as transaction:
            await transaction.execute(sa.delete(dead_letters).where(dead_letters.c.id == letter_id))

    async def prune(self, created_before: float, limit: int) -> int:
        """Remove old dead letters; how many."""
        query = delete_some(dead_letters, dead_letters.c.created_at < created_before, limit=limit)
        async with self.database.begin() as transaction:
            return int((await transaction.execute(query)).rowcount)

    def _conditions(self, project_id: str, chosen: Chosen) -> Sequence[sa.ColumnElement[bool]]:
        columns = dead_letters.c
        pairs = ((columns.kind, chosen.kind), (columns.job_id, chosen.job_id), (columns.error_code, chosen.code))
        conditions = [
            columns.project_id == project_id,
            *(column == value for column, value in pairs if value is not None),
        ]
        if chosen.waiting:
            conditions.append(columns.requeued_at.is_(None))
        if chosen.takeable:
            conditions.append(
                sa.or_(is_readable(columns.source_file_id, project_id, self._clock.now()), _can_be_revived())
            )
        return conditions


def _can_be_revived() -> sa.ColumnElement[bool]:
    ended = jobs.c.state.in_(sources(JobState.AVAILABLE) & FINISHED)
    job = sa.exists().where(jobs.c.id == dead_letters.c.job_id, jobs.c.project_id == dead_letters.c.project_id, ended)
    return sa.and_(dead_letters.c.endpoint.is_(None), job, ~media_are_lost(dead_letters.c.job_id))


def _kept(message: str) -> str:
    """As much as there is room for, without NUL: a message may quote a caller, and PostgreSQL keeps no such text."""
    return message[:_MESSAGE_CHARS_MAX].replace("\0", "\N{REPLACEMENT CHARACTER}")


def _line_rows(batch: Job, endpoint: str, source_file_id: str, lines: Sequence[LostLine]) -> list[dict[str, Any]]:
    return [
        {
            "project_id": batch.project_id,
            "kind": batch.kind,
            "job_id": batch.id,
            "endpoint": endpoint,
            "custom_id": line.custom_id,
            "line": line.line,
            "source_file_id": source_file_id,
            "source_offset": line.source_offset,
            "source_bytes": line.source_bytes,
            "error_code": line.error_code,
            "error_message": _kept(line.error_message),
            "attempts": [dict(attempt) for attempt in line.attempts],
        }
        for line in lines
    ]

"""Batches as rows: the batch beside its job, its chunks, the segments of results, and how fast models work.

It refuses to count a segment twice: whoever is not sure that a transaction was committed may send it again. The state of a
batch is that of its job and is kept nowhere else.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from forebay.clock import Clock
from forebay.errors import NotFound
from forebay.inference import Usage
from forebay.store.database import Database, Transaction
from forebay.store.job_records import Job
from forebay.store.job_state import FINISHED, LIVE, JobState
from forebay.store.jobs import in_order
from forebay.store.projects import hold_project
from forebay.store.tables import batches, chunks, jobs, line_rates, segments

BATCH = "batch"  # the kinds of its jobs
CHUNK = "chunk"
RUN = "run"  # the stages of a batch after its check
JOIN = "join"
LINES = "lines"  # in the payload of a batch: how many there are in its file
PAGE_SIZE_MAX = 100
_SMOOTHING = 0.3
_JOB = "job_"


@dataclass(frozen=True, slots=True)
class NewBatch:
    """A batch to be made, beside its job of the same id."""

    id: str
    project_id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: Mapping[str, str] | None
    output_expires_after_seconds: int | None
    created_at: float


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch and its job. `errors` are those of the whole file; `model` is none where lines name several."""

    job: Job
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    output_expires_after_seconds: int | None
    errors: list[dict[str, Any]] | None
    model: str | None
    output_file_id: str | None
    error_file_id: str | None
    in_progress_at: float | None
    finalizing_at: float | None
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int

    @property
    def id(self) -> str:
        """The id of the batch and of its job."""
        return self.job.id


@dataclass(frozen=True, slots=True)
class Chunk:
    """Lines of one model that are leased together, and what has become of its job. `lines` are packed places."""

    id: str
    batch_id: str
    number: int
    lines: bytes
    state: JobState
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True, slots=True)
class Segment:
    """Results of a chunk that were written together. `lines` are packed line numbers."""

    chunk_id: str
    number: int
    batch_id: str
    lines: bytes
    output_key: str | None
    output_bytes: int
    error_key: str | None
    error_bytes: int


class BatchStore:
    """Every statement about batches, chunks and segments."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self.database = database
        self._clock = clock

    # Batches.

    async def insert(self, transaction: Transaction, new: NewBatch) -> None:
        """Add the row of a batch whose job is made in the same transaction."""
        values = {name: getattr(new, name) for name in NewBatch.__dataclass_fields__}
        await transaction.execute(sa.insert(batches).values(values))

    async def get(self, project_id: str, batch_id: str) -> Batch:
        """A project's batch. Raises NotFound, also for another project's."""
        return await self._one(sa.and_(batches.c.id == batch_id, batches.c.project_id == project_id))

    async def load(self, batch_id: str) -> Batch:
        """The batch of a job. Raises NotFound."""
        return await self._one(batches.c.id == batch_id)

    async def read(self, transaction: Transaction, batch_id: str) -> Batch:
        """A batch that was made in the same transaction."""
        return _batch((await transaction.execute(_joined().where(batches.c.id == batch_id))).one())

    async def page(self, project_id: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """A page of a project's batches, newest first, and whether there are more. Raises NotFound for `after`."""
        query = _joined().where(batches.c.project_id == project_id)
        if after is not None:
            await self.get(project_id, after)
            key = (batches.c.created_at, batches.c.id)
            place = sa.select(*key).where(batches.c.id == after).subquery()
            query = query.where(sa.tuple_(*key) < sa.tuple_(place.c.created_at, place.c.id))
        query = query.order_by(batches.c.created_at.desc(), batches.c.id.desc()).limit(limit + 1)
        async with self.database.read() as transaction:
            found = [_batch(row) for row in await transaction.execute(query)]
        return found[:limit], len(found) > limit

    async def _one(self, condition: sa.ColumnElement[bool]) -> Batch:
        async with self.database.read() as transaction:
            row = (await transaction.execute(_joined().where(condition))).one_or_none()
        if row is None:
            raise NotFound("There is no such batch. GET /v1/batches lists the ones there are.")
        return _batch(row)

    async def unfinished(self, transaction: Transaction, project_id: str) -> int:
        """How many batches of a project have not ended, for who is about to make one more; holds the project."""
        await hold_project(transaction, project_id)
        query = (
            sa.select(sa.func.count())
            .select_from(jobs)
            .where(jobs.c.project_id == project_id, jobs.c.kind == BATCH, jobs.c.state.in_(LIVE))
        )
        return int(await transaction.scalar(query) or 0)

    async def queued_lines(self, transaction: Transaction, project_id: str) -> int:
        """How many lines of a project's live batches have not ended, for who has held the project as `unfinished` does.

        Before the check of a batch that is what was counted when it came, if it was.
        """
        columns = (jobs.c.total, jobs.c.completed, jobs.c.failed, jobs.c.payload)
        live = (jobs.c.project_id == project_id, jobs.c.kind == BATCH, jobs.c.state.in_(LIVE))
        rows = await transaction.execute(sa.select(*columns).where(*live))
        return sum((row.total or row.payload.get(LINES, 0)) - row.completed - row.failed for row in rows)

    async def refuse(self, transaction: Transaction, batch_id: str, errors: Sequence[Mapping[str, Any]]) -> None:
        """Keep what is wrong with the whole file."""
        await self._set(transaction, batch_id, errors=[dict(error) for error in errors])

    async def begin(self, transaction: Transaction, batch_id: str, model: str | None, now: float) -> None:
        """The file is checked and its chunks are made."""
        await self._set(transaction, batch_id, model=model, in_progress_at=now)

    async def finalize(self, transaction: Transaction, batch_id: str, now: float) -> None:
        """Every chunk has ended; the first time counts."""
        await self._set(transaction, batch_id, finalizing_at=sa.func.coalesce(batches.c.finalizing_at, now))

    async def finish(
        self, transaction: Transaction, batch_id: str, output_file_id: str | None, error_file_id: str | None
    ) -> None:
        """Name the files of the results."""
        await self._set(transaction, batch_id, output_file_id=output_file_id, error_file_id=error_file_id)

    async def _set(self, transaction: Transaction, batch_id: str, **values: Any) -> None:
        await transaction.execute(sa.update(batches).where(batches.c.id == batch_id).values(values))

    # Chunks.

    async def add_chunks(self, transaction: Transaction, batch_id: str, new: Sequence[tuple[str, bytes]]) -> None:
        """Add the rows of chunks, (id of the job, packed places), whose jobs are made in the same transaction."""
        rows = [
            {"id": chunk_id, "batch_id": batch_id, "number": number, "lines": lines}
            for number, (chunk_id, lines) in enumerate(new)
        ]
        if rows:
            await transaction.execute(sa.insert(chunks), rows)

    async def chunk(self, chunk_id: str) -> Chunk:
        """The chunk of a job. Raises NotFound."""
        async with self.database.read() as transaction:
            row = (await transaction.execute(_chunks().where(chunks.c.id == chunk_id))).one_or_none()
        if row is None:
            raise NotFound("There is no such chunk.")
        return _chunk(row)

    async def chunks(self, batch_id: str) -> list[Chunk]:
        """The chunks of a batch in order."""
        query = _chunks().where(chunks.c.batch_id == batch_id).order_by(chunks.c.number)
        async with self.database.read() as transaction:
            return [_chunk(row) for row in await transaction.execute(query)]

    # Segments.

    async def add_segment(self, transaction: Transaction, segment: Segment, usage: Usage) -> None:
        """Add a segment and what its lines used."""
        values = {name: getattr(segment, name) for name in Segment.__dataclass_fields__}
        await self._set(
            transaction,
            segment.batch_id,
            input_tokens=batches.c.input_tokens + usage.prompt_tokens,
            cached_tokens=batches.c.cached_tokens + usage.cached_tokens,
            output_tokens=batches.c.output_tokens + usage.completion_tokens,
        )
        await transaction.execute(sa.insert(segments).values(values))

    async def has_segment(self, transaction: Transaction, segment: Segment) -> bool:
        """Whether this very segment was committed although nobody was told so."""
        query = sa.select(segments.c.output_key, segments.c.error_key).where(
            segments.c.chunk_id == segment.chunk_id, segments.c.number == segment.number
        )
        row = (await transaction.execute(query)).one_or_none()
        return row is not None and tuple(row) == (segment.output_key, segment.error_key)

    async def segments(self, batch_id: str, chunk_id: str | None = None) -> list[Segment]:
        """What is written of a batch, or of one chunk of it, in the order of its chunks."""
        query = sa.select(segments).join(chunks, chunks.c.id == segments.c.chunk_id)
        query = query.where(segments.c.batch_id == batch_id)
        if chunk_id is not None:
            query = query.where(segments.c.chunk_id == chunk_id)
        async with self.database.read() as transaction:
            rows = await transaction.execute(query.order_by(chunks.c.number, segments.c.number))
            return [Segment(**row._mapping) for row in rows]  # noqa: SLF001  # SQLAlchemy's documented name

    # Clearing up.

    async def unswept(self, limit: int) -> list[str]:
        """Batches that have ended and whose chunks are still there."""
        left = sa.exists().where(chunks.c.batch_id == jobs.c.id)
        query = sa.select(jobs.c.id).where(jobs.c.kind == BATCH, jobs.c.state.in_(FINISHED), left).limit(limit)
        async with self.database.read() as transaction:
            return list((await transaction.execute(query)).scalars())

    async def live(self, ids: Collection[str]) -> set[str]:
        """Which of these batches have not ended."""
        query = sa.select(jobs.c.id).where(jobs.c.id.in_(ids), jobs.c.state.in_(LIVE))
        async with self.database.read() as transaction:
            return set((await transaction.execute(query)).scalars())

    async def sweep(self, batch_id: str) -> int:
        """Remove the chunks and segments of a batch that has ended; how many chunks there were."""
        ended = sa.exists().where(batches.c.id == batch_id)
        theirs = (jobs.c.parent_id == batch_id, jobs.c.kind == CHUNK, jobs.c.state.in_(FINISHED), ended)
        query = sa.delete(jobs).where(*in_order(self.database, *theirs))
        async with self.database.begin() as transaction:
            return int((await transaction.execute(query)).rowcount)

    # How fast models work.

    async def learn_rate(self, transaction: Transaction, model: str, lines_per_second: float) -> None:
        """Blend a measured rate into that of the model. Batches of one model may end at once, in several workers."""
        now, before = self._clock.now(), line_rates.c.lines_per_second
        insert = sqlite.insert if self.database.is_sqlite else postgresql.insert
        query = (
            insert(line_rates)
            .values(model=model, lines_per_second=lines_per_second, updated_at=now)
            .on_conflict_do_update(
                index_elements=[line_rates.c.model],
                set_={"lines_per_second": before + _SMOOTHING * (lines_per_second - before), "updated_at": now},
            )
        )
        await transaction.execute(query)


def _joined() -> sa.Select[Any]:
    ours = [column for column in batches.columns if column.name not in ("id", "project_id", "created_at")]
    theirs = [column.label(_JOB + column.name) for column in jobs.columns]
    return sa.select(*ours, *theirs).join(jobs, jobs.c.id == batches.c.id)


def _chunks() -> sa.Select[Any]:
    return sa.select(chunks, jobs.c.state, jobs.c.error_code, jobs.c.error_message).join(jobs, jobs.c.id == chunks.c.id)


def _batch(row: sa.Row[Any]) -> Batch:
    values = dict(row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name
    job = {name.removeprefix(_JOB): values.pop(name) for name in list(values) if name.startswith(_JOB)}
    job["state"] = JobState(job["state"])
    return Batch(job=Job(**job), **values)


def _chunk(row: sa.Row[Any]) -> Chunk:
    values = dict(row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name
    return Chunk(**{**values, "state": JobState(values["state"])})

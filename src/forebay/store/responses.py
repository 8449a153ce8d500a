"""Responses as rows: kept, continued, read again, and the events of those that run in the background.

It refuses to write for an attempt that no longer has the job, and to keep more of a project than it may: the oldest go first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from pydantic_core import from_json

from forebay.clock import Clock
from forebay.config import ResponseSettings
from forebay.errors import InvalidRequest, LeaseLost, NotFound
from forebay.store.database import Database, Transaction, delete_some
from forebay.store.job_records import Lease
from forebay.store.job_state import LIVE, JobState
from forebay.store.projects import hold_project
from forebay.store.tables import jobs, response_events, responses

RESPONSE = "response"  # the kind of its jobs
UNFINISHED = ("queued", "in_progress")
_EVENT_ROWS = 64  # read at once
_TRIM_EVERY = 32  # responses of a project that are kept before the oldest are looked at
_TRIM_ROWS = 500
_CUT = "A response earlier in this conversation is no longer kept. Send the items as `input`."


@dataclass(frozen=True, slots=True)
class NewResponse:
    """A response to be kept. `request` is for one that has yet to run; `chain` the ids of the ones that it continues."""

    id: str
    project_id: str
    status: str
    input: bytes
    body: bytes
    created_at: float
    previous_id: str | None = None
    background: bool = False
    streamed: bool = False
    request: bytes | None = None
    chain: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """A response as it was written down last, and its job if it has one that is still there."""

    id: str
    project_id: str
    status: str
    background: bool
    streamed: bool
    input: bytes
    body: bytes
    job_state: JobState | None
    job_started: bool
    job_error: tuple[str, str] | None

    @property
    def ended(self) -> bool:
        """Whether it is written down how it ended."""
        return self.status not in UNFINISHED


@dataclass(frozen=True, slots=True)
class History:
    """What was said before: the responses, oldest first, and their items."""

    ids: tuple[str, ...] = ()
    items: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events of an attempt that are written together, as a JSON list, with the numbers of the first and the last one."""

    attempt: int
    first: int
    last: int
    events: bytes


class ResponseStore:
    """Every statement about responses."""

    def __init__(self, database: Database, clock: Clock, settings: ResponseSettings) -> None:
        self.database = database
        self._clock = clock
        self._settings = settings
        self._since_trim: dict[str, int] = {}

    # Keeping.

    async def keep(self, new: NewResponse) -> None:
        """Keep a response that has ended."""
        async with self.database.begin() as transaction:
            await self.insert(transaction, new)
        count = self._since_trim.get(new.project_id, 0) + 1
        self._since_trim[new.project_id] = count % _TRIM_EVERY
        if count >= _TRIM_EVERY:
            await self.trim(new.project_id)

    async def insert(self, transaction: Transaction, new: NewResponse) -> None:
        """The same in the caller's transaction. Those that it continues are kept as long as it is.

        Raises InvalidRequest for one that is too large.
        """
        size = len(new.input) + len(new.body) + len(new.request or b"")
        if size > self._settings.bytes_max:
            raise InvalidRequest(
                f"The request and its response are larger than the {self._settings.bytes_max} bytes that are kept. "
                "Set `store` to false.",
                param="store",
                code="response_too_large",
            )
        expires_at = new.created_at + self._settings.keep_seconds
        values = {
            "id": new.id,
            "project_id": new.project_id,
            "previous_id": new.previous_id,
            "background": new.background,
            "streamed": new.streamed,
            "status": new.status,
            "request": new.request,
            "input": new.input,
            "body": new.body,
            "bytes": size,
            "created_at": new.created_at,
            "expires_at": expires_at,
        }
        await transaction.execute(sa.insert(responses).values(values))
        if new.chain:
            longer = sa.update(responses).where(responses.c.id.in_(sorted(new.chain)), _of(new.project_id))
            await transaction.execute(longer.values(expires_at=expires_at))

    async def unfinished(self, transaction: Transaction, project_id: str) -> int:
        """How many responses of a project have yet to end, for who is about to make one more; holds the project."""
        await hold_project(transaction, project_id)
        query = sa.select(sa.func.count()).where(responses.c.status.in_(UNFINISHED), _of(project_id))
        return int(await transaction.scalar(query) or 0)

    async def finish(self, transaction: Transaction, response_id: str, status: str, body: bytes) -> bool:
        """Write down how a response in the background ended; whether that was not written down before."""
        events = sa.select(sa.func.coalesce(sa.func.sum(sa.func.length(response_events.c.events)), 0)).where(
            response_events.c.response_id == response_id
        )
        query = (
            sa.update(responses)
            .where(responses.c.id == response_id, responses.c.status.in_(UNFINISHED))
            .values(
                status=status,
                body=body,
                request=None,
                bytes=sa.func.length(responses.c.input) + len(body) + events.scalar_subquery(),
            )
        )
        return (await transaction.execute(query)).rowcount == 1

    # Reading.

    async def get(self, project_id: str, response_id: str) -> KeptResponse:
        """A project's response. Raises NotFound."""
        found = await self._find(responses.c.id == response_id, _of(project_id), self._is_visible())
        if not found:
            raise NotFound("There is no such response. It may have expired, or `store` was false.")
        return found[0]

    async def left_behind(self, limit: int, response_id: str | None = None) -> list[KeptResponse]:
        """Responses, or that one, that have not ended although no job will end them."""
        dead = sa.or_(jobs.c.state.is_(None), jobs.c.state.not_in(LIVE))
        of = sa.true() if response_id is None else responses.c.id == response_id
        return await self._find(responses.c.status.in_(UNFINISHED), dead, of, limit=limit)

    async def _find(self, *conditions: sa.ColumnElement[bool], limit: int = 1) -> list[KeptResponse]:
        own = [column for column in responses.c if column.name not in ("request", "previous_id")]
        job = [jobs.c.state.label("job_state"), jobs.c.started_at, jobs.c.error_code, jobs.c.error_message]
        beside = responses.outerjoin(jobs, jobs.c.id == responses.c.id)
        query = sa.select(*own, *job).select_from(beside).where(*conditions).limit(limit)
        async with self.database.read() as connection:
            return [_kept(row) for row in await connection.execute(query)]

    async def request(self, response_id: str) -> bytes | None:
        """What is to be run; none if the response has ended or is gone."""
        query = sa.select(responses.c.request).where(responses.c.id == response_id)
        async with self.database.read() as connection:
            return await connection.scalar(query)

    async def history(self, project_id: str, response_id: str) -> History:
        """The conversation up to and with a response. Raises NotFound, and InvalidRequest if it is too long or unfinished."""
        async with self.database.read() as connection:
            chain = (await connection.execute(self._chain(project_id, response_id))).all()
            self._check_chain(chain)
            query = sa.select(responses.c.id, responses.c.input, responses.c.body)
            rows = await connection.execute(query.where(responses.c.id.in_([row.id for row in chain])))
            found = {row.id: row for row in rows}
        if len(found) < len(chain):  # removed between the two looks, which PostgreSQL shows
            raise NotFound(_CUT)
        items: list[dict[str, Any]] = []
        for row in reversed(chain):
            items += from_json(found[row.id].input)
            items += from_json(found[row.id].body)["output"]
        return History(tuple(row.id for row in reversed(chain)), tuple(items))

    def _chain(self, project_id: str, response_id: str) -> sa.Select[Any]:
        """A response and those before it, newest first."""
        size = (sa.func.length(responses.c.input) + sa.func.length(responses.c.body)).label("size")
        columns = (responses.c.id, responses.c.previous_id, responses.c.status, size)
        visible = (_of(project_id), self._is_visible())
        first = sa.select(*columns, sa.literal(1).label("place")).where(responses.c.id == response_id, *visible)
        chain = first.cte("chain", recursive=True)
        before = (
            sa.select(*columns, chain.c.place + 1)
            .join(chain, responses.c.id == chain.c.previous_id)
            .where(*visible, chain.c.place <= self._settings.turns_max)
        )
        chain = chain.union_all(before)
        return sa.select(chain).order_by(chain.c.place)

    def _check_chain(self, chain: Sequence[sa.Row[Any]]) -> None:
        if not chain:
            raise NotFound("There is no such response. It may have expired, or `store` was false.")
        if chain[0].status in UNFINISHED:
            raise InvalidRequest("The previous response has not ended yet.", code="previous_response_unfinished")
        if len(chain) > self._settings.turns_max:
            raise InvalidRequest(
                f"The conversation has more than {self._settings.turns_max} responses. Send what matters as `input`.",
                code="conversation_too_long",
            )
        if chain[-1].previous_id is not None:
            raise NotFound(_CUT)
        if sum(row.size for row in chain) > self._settings.conversation_bytes_max:
            raise InvalidRequest(
                f"The conversation is larger than {self._settings.conversation_bytes_max} bytes. "
                "Send what matters as `input`.",
                code="conversation_too_long",
            )

    # Events.

    async def next_number(self, connection: Transaction, response_id: str) -> int:
        """The number after the last event that may have been told."""
        query = sa.select(sa.func.max(response_events.c.last)).where(response_events.c.response_id == response_id)
        last = await connection.scalar(query)
        return 0 if last is None else int(last) + 1

    async def begin_events(self, lease: Lease) -> int:
        """The number of the first event of an attempt: none that was told before has it. Raises LeaseLost."""
        async with self.database.begin() as transaction:
            await self._fence(transaction, lease)
            return await self.next_number(transaction, lease.id)

    async def append(self, lease: Lease, batch: EventBatch) -> None:
        """Write down events of an attempt, in place of those of earlier attempts. Raises LeaseLost."""
        async with self.database.begin() as transaction:
            await self._fence(transaction, lease)
            await self.add_events(transaction, lease.id, batch)

    async def add_events(self, transaction: Transaction, response_id: str, batch: EventBatch) -> None:
        """The same in the transaction of whoever holds the job. The same batch may be written twice."""
        old = sa.or_(response_events.c.attempt < batch.attempt, response_events.c.first >= batch.first)
        mine = response_events.c.response_id == response_id
        await transaction.execute(sa.delete(response_events).where(mine, old))
        values = {"first": batch.first, "last": batch.last, "attempt": batch.attempt, "events": batch.events}
        await transaction.execute(sa.insert(response_events).values(response_id=response_id, **values))
        await self.database.notify(transaction, channel_of(response_id))

    async def events(self, response_id: str, after: int) -> list[dict[str, Any]]:
        """The next events after number `after`, some at a time."""
        query = (
            sa.select(response_events.c.events)
            .where(response_events.c.response_id == response_id, response_events.c.last > after)
            .order_by(response_events.c.first)
            .limit(_EVENT_ROWS)
        )
        async with self.database.read() as connection:
            rows = (await connection.scalars(query)).all()
        found = (event for row in rows for event in from_json(row))
        return [event for event in found if event["sequence_number"] > after]

    async def _fence(self, transaction: Transaction, lease: Lease) -> None:
        """Hold the job. Unlike progress that stays, this forgives no failed attempt: the next one begins anew."""
        query = (
            sa.update(jobs)
            .where(jobs.c.id == lease.id, jobs.c.attempt == lease.attempt, jobs.c.state == JobState.RUNNING)
            .values(progress_at=self.database.now(self._clock))
        )
        if (await transaction.execute(query)).rowcount != 1:
            raise LeaseLost

    # Removing.

    async def delete(self, project_id: str, response_id: str) -> None:
        """Remove a response that has ended, with its events. Raises NotFound."""
        query = sa.delete(responses).where(responses.c.id == response_id, _of(project_id))
        async with self.database.begin() as transaction:
            if (await transaction.execute(query)).rowcount != 1:
                raise NotFound("There is no such response.")

    async def prune(self, now: float, limit: int) -> int:
        """Remove what has expired, and the oldest of projects that keep too much; how many."""
        expired = delete_some(responses, responses.c.expires_at <= now, _has_ended(), limit=limit)
        async with self.database.begin() as transaction:
            removed = int((await transaction.execute(expired)).rowcount)
        count, size = sa.func.count(), sa.func.sum(responses.c.bytes)
        too_much = sa.or_(count > self._settings.per_project_max, size > self._settings.project_bytes_max)
        query = sa.select(responses.c.project_id).group_by(responses.c.project_id).having(too_much)
        async with self.database.read() as connection:
            projects = (await connection.scalars(query)).all()
        for project_id in projects:
            removed += await self.trim(project_id)
        return removed

    async def trim(self, project_id: str) -> int:
        """Remove the oldest responses of a project that keeps too much; how many, which may be too few."""
        newest_first = (responses.c.created_at.desc(), responses.c.id.desc())
        placed = (
            sa.select(
                responses.c.id,
                responses.c.status,
                sa.func.row_number().over(order_by=newest_first).label("place"),
                sa.func.sum(responses.c.bytes).over(order_by=newest_first).label("size"),
            )
            .where(_of(project_id))
            .subquery()
        )
        beyond = sa.or_(
            placed.c.place > self._settings.per_project_max, placed.c.size > self._settings.project_bytes_max
        )
        query = sa.select(placed.c.id).where(beyond, placed.c.status.not_in(UNFINISHED))
        async with self.database.read() as connection:  # it may take a while, in which others can write
            ids = (await connection.scalars(query.order_by(placed.c.place.desc()).limit(_TRIM_ROWS))).all()
        if ids:
            async with self.database.begin() as transaction:
                await transaction.execute(sa.delete(responses).where(responses.c.id.in_(sorted(ids))))
        return len(ids)

    def _is_visible(self) -> sa.ColumnElement[bool]:
        return sa.or_(responses.c.expires_at > self._clock.now(), ~_has_ended())


def channel_of(response_id: str) -> str:
    """Where news of the events of a response are told."""
    return f"response:{response_id}"


def _of(project_id: str) -> sa.ColumnElement[bool]:
    return responses.c.project_id == project_id


def _has_ended() -> sa.ColumnElement[bool]:
    return responses.c.status.not_in(UNFINISHED)


def _kept(row: sa.Row[Any]) -> KeptResponse:
    return KeptResponse(
        id=row.id,
        project_id=row.project_id,
        status=row.status,
        background=row.background,
        streamed=row.streamed,
        input=row.input,
        body=row.body,
        job_state=None if row.job_state is None else JobState(row.job_state),
        job_started=row.started_at is not None,
        job_error=None if row.error_code is None else (row.error_code, row.error_message or ""),
    )

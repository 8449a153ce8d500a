"""Messages that were pushed to us, as rows: what each has become, so that one that is delivered again becomes nothing more.

It refuses to remember a message apart from what it has become: both are committed together or not at all.
"""

import math
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from forebay.clock import Clock
from forebay.store.database import Database, Transaction, delete_some
from forebay.store.tables import intake_messages


@dataclass(frozen=True, slots=True)
class Pushed:
    """A message: whose it is, the subscription that brought it, and its id there."""

    project_id: str
    source: str
    message_id: str


class IntakeStore:
    """Every statement about pushed messages. One counts for `keep_seconds` after it was first taken."""

    def __init__(self, database: Database, clock: Clock, keep_seconds: float) -> None:
        self.database = database
        self._clock = clock
        self._keep_seconds = keep_seconds

    async def find(self, message: Pushed) -> str | None:
        """The id of what a message has become, if it was taken: a job, or a dead letter."""
        async with self.database.read() as connection:
            return await self._find(connection, message, self._clock.now() - self._keep_seconds)

    async def _find(self, connection: Transaction, message: Pushed, after: float) -> str | None:
        messages = intake_messages.c
        query = sa.select(messages.job_id).where(
            messages.project_id == message.project_id,
            messages.source == message.source,
            messages.message_id == message.message_id,
            messages.created_at > after,
        )
        found: str | None = await connection.scalar(query)
        return found

    async def claim(self, transaction: Transaction, message: Pushed, made_id: str) -> str | None:
        """Say that a message becomes `made_id`, in the transaction that makes that; if it was taken before, what it became.

        The unique key decides between two deliveries at once: the second one waits here for the first.
        """
        now = self._clock.now()
        insert = sqlite.insert if self.database.is_sqlite else postgresql.insert
        key = {"project_id": message.project_id, "source": message.source, "message_id": message.message_id}
        values = {"job_id": made_id, "created_at": now}
        query = (
            insert(intake_messages)
            .values(**key, **values)
            .on_conflict_do_update(
                index_elements=[intake_messages.c[name] for name in key],
                set_=values,
                where=intake_messages.c.created_at <= now - self._keep_seconds,
            )
            .returning(intake_messages.c.job_id)
        )
        if await transaction.scalar(query) is not None:
            return None
        found = await self._find(transaction, message, -math.inf)
        assert found is not None, "The statement above holds the row."
        return found

    async def prune(self, now: float, limit: int) -> int:
        """Forget messages that no longer count; how many."""
        old = intake_messages.c.created_at <= now - self._keep_seconds
        query = delete_some(intake_messages, old, limit=limit)
        async with self.database.begin() as transaction:
            return int((await transaction.execute(query)).rowcount)

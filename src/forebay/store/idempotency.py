"""Answers by idempotency key: the first request with a key makes something, every later one gets the same answer.

It refuses to keep an answer apart from what it tells of: both are committed together or not at all.
"""

import math
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from forebay.clock import Clock
from forebay.store.database import Database, Transaction, delete_some
from forebay.store.tables import idempotency_keys

KEEP_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that was answered, and how. `fingerprint` tells it from another one with the same key."""

    fingerprint: str
    status: int
    body: str


class IdempotencyStore:
    """Every statement about idempotency keys. A key counts for `keep_seconds` after its first request."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self.database = database
        self._clock = clock

    async def find(self, project_id: str, key: str, keep_seconds: float = KEEP_SECONDS) -> Answered | None:
        """The answer that a project's key has, if it has one."""
        async with self.database.read() as connection:
            return await self._find(connection, project_id, key, self._clock.now() - keep_seconds)

    async def _find(self, connection: Transaction, project_id: str, key: str, after: float) -> Answered | None:
        keys = idempotency_keys.c
        query = sa.select(keys.fingerprint, keys.status, keys.body).where(
            keys.project_id == project_id, keys.key == key, keys.created_at > after
        )
        row = (await connection.execute(query)).one_or_none()
        return None if row is None else Answered(row.fingerprint, row.status, row.body)

    async def claim(
        self, transaction: Transaction, project_id: str, key: str, fingerprint: str, keep_seconds: float = KEEP_SECONDS
    ) -> Answered | None:
        """Take a key for the request of this transaction; if another request has it, that one's answer.

        The unique key decides between two at once: the second one waits here for the first. The answer counts once this
        transaction is committed, since the two may share a commit.
        """
        now = self._clock.now()
        insert = sqlite.insert if self.database.is_sqlite else postgresql.insert
        values = {"fingerprint": fingerprint, "status": 0, "body": "", "created_at": now}
        query = (
            insert(idempotency_keys)
            .values(project_id=project_id, key=key, **values)
            .on_conflict_do_update(
                index_elements=[idempotency_keys.c.project_id, idempotency_keys.c.key],
                set_=values,
                where=idempotency_keys.c.created_at <= now - keep_seconds,
            )
            .returning(idempotency_keys.c.key)
        )
        if await transaction.scalar(query) is not None:
            return None
        found = await self._find(transaction, project_id, key, -math.inf)
        assert found is not None, "The statement above holds the row."
        return found

    async def keep(self, transaction: Transaction, project_id: str, key: str, status: int, body: str) -> None:
        """Write down the answer to the request that has claimed the key in this transaction."""
        query = (
            sa.update(idempotency_keys)
            .where(idempotency_keys.c.project_id == project_id, idempotency_keys.c.key == key)
            .values(status=status, body=body)
        )
        await transaction.execute(query)

    async def prune(self, now: float, limit: int) -> int:
        """Remove keys that no longer count; how many."""
        old = idempotency_keys.c.created_at <= now - KEEP_SECONDS
        query = delete_some(idempotency_keys, old, limit=limit)
        async with self.database.begin() as transaction:
            return int((await transaction.execute(query)).rowcount)

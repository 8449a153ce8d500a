"""Keys that all nodes of one database share, made by whoever needs one first.

It refuses to make a second one by the same name, to change one, and to show one to anybody but the rooms that ask for it.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from forebay.clock import random_bytes
from forebay.store.database import Database
from forebay.store.tables import secrets

_BYTES = 32


class SecretStore:
    """Every statement about them. A key never changes, so each is read once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, bytes] = {}

    async def get(self, name: str) -> bytes:
        """The key by this name. Raises StoreUnavailable and InsufficientStorage."""
        if name not in self._known:
            self._known[name] = await self._find(name) or await self._make(name)
        return self._known[name]

    async def _find(self, name: str) -> bytes | None:
        async with self._database.read() as transaction:
            found: bytes | None = await transaction.scalar(_named(name))
        return found

    async def _make(self, name: str) -> bytes:
        """The name decides between two at once: the second one waits here for the first, and takes its key."""
        insert = sqlite.insert if self._database.is_sqlite else postgresql.insert
        async with self._database.begin() as transaction:
            await transaction.execute(
                insert(secrets).values(name=name, value=random_bytes(_BYTES)).on_conflict_do_nothing()
            )
            made: bytes | None = await transaction.scalar(_named(name))
        assert made is not None, "it is there, whoever has made it"
        return made


def _named(name: str) -> sa.Select[Any]:
    return sa.select(secrets.c.value).where(secrets.c.name == name)

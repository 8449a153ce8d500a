"""One suite for the keys that nodes share, over SQLite and PostgreSQL."""

import asyncio

from forebay.store.database import Database
from forebay.store.secrets import SecretStore


async def test_a_key_is_made_once_and_stays(database: Database) -> None:
    first = await SecretStore(database).get("a")
    assert len(first) == 32
    store = SecretStore(database)
    assert await store.get("a") == await store.get("a") == first
    assert await store.get("b") != first


async def test_all_who_ask_at_once_get_the_same(database: Database) -> None:
    found = await asyncio.gather(*(SecretStore(database).get("a") for _ in range(20)))
    assert len(set(found)) == 1

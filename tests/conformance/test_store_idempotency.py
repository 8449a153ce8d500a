"""One suite for idempotency keys, over SQLite and PostgreSQL."""

import asyncio

import pytest
import sqlalchemy as sa

from forebay.store.database import Database
from forebay.store.idempotency import KEEP_SECONDS, Answered, IdempotencyStore
from tests.support.clock import FakeClock

MAKE = sa.text("INSERT INTO projects VALUES (:id, :id, 0)")


@pytest.fixture
def store(database: Database, clock: FakeClock) -> IdempotencyStore:
    return IdempotencyStore(database, clock)


async def make(store: IdempotencyStore, key: str, made: str, *, project: str = "p", fingerprint: str = "f") -> bool:
    """Make `made` if nobody has the key; whether it was made."""
    async with store.database.begin() as transaction:
        if await store.claim(transaction, project, key, fingerprint) is not None:
            return False
        await transaction.execute(MAKE, {"id": made})
        await store.keep(transaction, project, key, 200, made)
    return True


async def ids(database: Database) -> set[str]:
    async with database.read() as connection:
        return set(await connection.scalars(sa.text("SELECT id FROM projects WHERE id <> 'default'")))


async def test_the_first_answer_stays(store: IdempotencyStore) -> None:
    assert await store.find("p", "k") is None
    assert await make(store, "k", "one")
    assert not await make(store, "k", "two", fingerprint="g")
    assert await store.find("p", "k") == Answered("f", 200, "one")
    assert await ids(store.database) == {"one"}


async def test_keys_are_per_project(store: IdempotencyStore) -> None:
    assert await make(store, "k", "one")
    assert await store.find("q", "k") is None
    assert await make(store, "k", "two", project="q")
    assert await ids(store.database) == {"one", "two"}


async def test_nothing_is_kept_of_what_was_rolled_back(store: IdempotencyStore) -> None:
    with pytest.raises(ZeroDivisionError):
        async with store.database.begin() as transaction:
            assert await store.claim(transaction, "p", "k", "f") is None
            await store.keep(transaction, "p", "k", 200, "x")
            raise ZeroDivisionError
    assert await store.find("p", "k") is None
    assert await make(store, "k", "one")


async def test_a_key_counts_for_a_day(store: IdempotencyStore, clock: FakeClock) -> None:
    assert await make(store, "k", "one")
    clock.advance(KEEP_SECONDS - 1)
    assert not await make(store, "k", "two")
    clock.advance(1)
    assert await store.find("p", "k") is None
    assert await make(store, "k", "three", fingerprint="g")
    assert await store.find("p", "k") == Answered("g", 200, "three")


async def test_a_shorter_time_can_be_asked_for(store: IdempotencyStore, clock: FakeClock) -> None:
    assert await make(store, "k", "one")
    clock.advance(10)
    assert await store.find("p", "k", 10) is None
    assert await store.find("p", "k", 11) is not None
    async with store.database.begin() as transaction:
        assert await store.claim(transaction, "p", "k", "f", 10) is None


async def test_old_keys_are_pruned_a_few_at_a_time(store: IdempotencyStore, clock: FakeClock) -> None:
    for number in range(3):
        assert await make(store, f"old{number}", f"old{number}")
    clock.advance(KEEP_SECONDS)
    assert await make(store, "new", "new")
    assert [await store.prune(clock.now(), 2) for _ in range(3)] == [2, 1, 0]
    assert await store.find("p", "new") is not None


async def test_of_many_at_once_one_wins(store: IdempotencyStore, prove: bool) -> None:
    keys, at_once = (100, 10) if prove else (5, 20)
    for key in range(keys):
        made = await asyncio.gather(*(make(store, f"k{key}", f"{key}-{number}") for number in range(at_once)))
        assert sum(made) == 1, key
        assert await store.find("p", f"k{key}") == Answered("f", 200, f"{key}-{made.index(True)}")
    assert len(await ids(store.database)) == keys

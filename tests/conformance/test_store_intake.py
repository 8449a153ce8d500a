"""One suite for pushed messages, over SQLite and PostgreSQL."""

import asyncio

import pytest
import sqlalchemy as sa

from forebay.store.database import Database
from forebay.store.intake import IntakeStore, Pushed
from tests.support.clock import FakeClock

WEEK = 604_800
MESSAGE = Pushed("default", "projects/p/subscriptions/s", "1")
MAKE = sa.text("INSERT INTO projects VALUES (:id, :id, 0)")


@pytest.fixture
def store(database: Database, clock: FakeClock) -> IntakeStore:
    return IntakeStore(database, clock, WEEK)


async def take(store: IntakeStore, made: str, message: Pushed = MESSAGE) -> str | None:
    """Make `made` of the message if it was not taken; otherwise what it has become."""
    async with store.database.begin() as transaction:
        before = await store.claim(transaction, message, made)
        if before is None:
            await transaction.execute(MAKE, {"id": made})
    return before


async def made_by(database: Database) -> set[str]:
    async with database.read() as connection:
        return set(await connection.scalars(sa.text("SELECT id FROM projects WHERE id <> 'default'")))


async def test_a_message_becomes_one_thing(store: IntakeStore) -> None:
    assert await store.find(MESSAGE) is None
    assert await take(store, "one") is None
    assert await take(store, "two") == "one"
    assert await store.find(MESSAGE) == "one"
    assert await made_by(store.database) == {"one"}


async def test_ten_at_once_become_one_thing(store: IntakeStore) -> None:
    found = await asyncio.gather(*(take(store, f"job_{n}") for n in range(10)))
    (winner,) = await made_by(store.database)
    assert sorted(each or "" for each in found) == ["", *[winner] * 9]


async def test_another_subscription_or_id_is_another_message(store: IntakeStore) -> None:
    assert await take(store, "one") is None
    assert await take(store, "two", Pushed("default", "other", "1")) is None
    assert await take(store, "three", Pushed("default", MESSAGE.source, "2")) is None
    assert await made_by(store.database) == {"one", "two", "three"}


async def test_projects_do_not_meet(store: IntakeStore) -> None:
    async with store.database.begin() as transaction:
        await transaction.execute(MAKE, {"id": "other"})
    assert await take(store, "one") is None
    other = Pushed("other", MESSAGE.source, MESSAGE.message_id)
    assert await store.find(other) is None
    assert await take(store, "two", other) is None


async def test_nothing_is_remembered_of_what_was_rolled_back(store: IntakeStore) -> None:
    with pytest.raises(ZeroDivisionError):
        async with store.database.begin() as transaction:
            assert await store.claim(transaction, MESSAGE, "one") is None
            raise ZeroDivisionError
    assert await store.find(MESSAGE) is None
    assert await take(store, "two") is None


async def test_a_message_counts_for_its_time_and_is_forgotten(store: IntakeStore, clock: FakeClock) -> None:
    assert await take(store, "one") is None
    clock.advance(WEEK - 1)
    assert await take(store, "two") == "one"
    assert await store.prune(clock.now(), 10) == 0
    clock.advance(1)
    assert await store.find(MESSAGE) is None
    assert await take(store, "three") is None
    assert await store.find(MESSAGE) == "three"
    clock.advance(WEEK)
    assert await take(store, "four", Pushed("default", "s", "2")) is None
    assert await store.prune(clock.now(), 10) == 1
    assert await store.find(Pushed("default", "s", "2")) == "four"

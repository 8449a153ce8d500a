"""One suite for transactions and signals, over SQLite and PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from forebay.config import Settings
from forebay.errors import StoreUnavailable
from forebay.store.database import Database
from tests.support import postgres
from tests.support.server import eventually

INSERT = sa.text("INSERT INTO projects VALUES (:id, :id, 0)")


@pytest.fixture(params=["sqlite", "postgres"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    url = SecretStr(postgres.new_database()) if request.param == "postgres" else None
    return Settings(data_dir=tmp_path / "data", database_url=url)


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    database = await Database.open(settings)
    yield database
    await database.close()


async def ids(database: Database) -> set[str]:
    async with database.read() as connection:
        return set(await connection.scalars(sa.text("SELECT id FROM projects")))


async def test_a_commit_wakes_who_listens(database: Database) -> None:
    with database.listen("jobs") as event, database.listen("jobs") as other, database.listen("files") as apart:
        for each in (event, other, apart):
            each.clear()
        async with database.begin() as transaction:
            await database.notify(transaction, "jobs")
            assert not event.is_set()
        assert event.is_set()
        assert other.is_set()


async def test_what_is_rolled_back_wakes_nobody(tmp_path: Path) -> None:
    database = await Database.open(Settings(data_dir=tmp_path))
    with database.listen("jobs") as event:
        with pytest.raises(ZeroDivisionError):
            async with database.begin() as transaction:
                await database.notify(transaction, "jobs")
                raise ZeroDivisionError
        async with database.begin() as transaction:
            await transaction.execute(INSERT, {"id": "p"})
        assert not event.is_set()
    await database.close()


async def test_postgres_wakes_other_processes_also_after_its_connection_was_cut(tmp_path: Path) -> None:
    url = postgres.new_database()
    settings = Settings(data_dir=tmp_path, database_url=SecretStr(url))
    near, far = await Database.open(settings), await Database.open(settings)
    with far.listen("jobs") as event, far.listen("files") as apart:
        async with asyncio.timeout(20):
            await event.wait()  # it listens now: it has woken everybody once
            for _ in range(3):
                event.clear()
                apart.clear()
                async with near.begin() as transaction:
                    await near.notify(transaction, "jobs")
                await event.wait()
                assert not apart.is_set()
                event.clear()
                postgres.cut_connections(url)
                await event.wait()  # what may have been missed meanwhile

                async def connected() -> bool:
                    try:
                        return await ids(near) is not None
                    except StoreUnavailable:
                        return False

                await eventually(connected)
    await near.close()
    await far.close()

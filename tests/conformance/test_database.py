"""One suite for transactions and signals, over SQLite and PostgreSQL."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.errors import InvalidRequest, StoreUnavailable
from forebay.store.database import Database
from tests.support import postgres
from tests.support.clock import FakeClock
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
        return set(await connection.scalars(sa.text("SELECT id FROM projects WHERE id <> 'default'")))


async def test_a_commit_wakes_who_listens(database: Database, settings: Settings) -> None:
    with database.listen("jobs") as event, database.listen("jobs") as other, database.listen("files") as apart:
        if settings.database_url is not None:
            async with asyncio.timeout(20):
                await event.wait()  # it has begun to hear the other processes, and wakes everybody once
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


async def add(database: Database, name: str) -> None:
    async with database.begin() as transaction:
        await transaction.execute(INSERT, {"id": name})


def added(name: str) -> Callable[[sa.Connection], int]:
    def insert(connection: sa.Connection) -> int:
        return connection.execute(INSERT, {"id": name}).rowcount

    return insert


async def held(database: Database, name: str, held: asyncio.Event, go_on: asyncio.Event) -> None:
    async with database.begin() as transaction:
        await transaction.execute(INSERT, {"id": name})
        held.set()
        await go_on.wait()


async def test_a_function_writes_and_returns(database: Database) -> None:
    assert await database.write(added("p")) == 1
    assert await ids(database) == {"p"}
    with pytest.raises(sa.exc.IntegrityError):
        await database.write(added("p"))
    with pytest.raises(ZeroDivisionError):
        await database.write(lambda connection: added("q")(connection) // 0)
    assert await ids(database) == {"p"}


async def test_a_function_wakes_who_listens(database: Database) -> None:
    with database.listen("jobs") as event:
        event.clear()
        await database.write(lambda connection: database.notify_sync(connection, "jobs"))
        assert event.is_set()


async def test_what_one_does_wrong_is_its_own_affair(database: Database) -> None:
    """Blocks and functions, good and bad, in one crowd: just the good ones are kept."""

    async def good(number: int) -> None:
        if number % 2:
            await add(database, f"good-{number}")
        else:
            assert await database.write(added(f"good-{number}")) == 1

    async def bad(number: int) -> None:
        async with database.begin() as transaction:
            await transaction.execute(INSERT, {"id": f"bad-{number}"})
            if number % 3 == 0:
                raise ZeroDivisionError
            if number % 3 == 1:
                await transaction.execute(sa.text("INSERT INTO nowhere VALUES (1)"))
            await transaction.execute(INSERT, {"id": f"bad-{number}"})

    def worse(connection: sa.Connection) -> None:
        added("worse")(connection)
        raise KeyError

    ways = [work(number) for number in range(40) for work in (good, bad)]
    ended = await asyncio.gather(*ways, *(database.write(worse) for _ in range(5)), return_exceptions=True)
    assert [outcome for outcome in ended[0:80:2] if outcome is not None] == []
    kinds = {type(outcome) for outcome in ended[1:80:2]}
    assert ZeroDivisionError in kinds
    assert sa.exc.IntegrityError in kinds
    assert len(kinds) == 3
    assert [type(outcome) for outcome in ended[80:]] == [KeyError] * 5
    assert await ids(database) == {f"good-{number}" for number in range(40)}


async def test_a_savepoint_inside_a_block_is_the_blocks_own(database: Database) -> None:
    async def work(number: int) -> None:
        async with database.begin() as transaction:
            await transaction.execute(INSERT, {"id": f"a-{number}"})
            with pytest.raises(sa.exc.IntegrityError):
                async with transaction.begin_nested():
                    await transaction.execute(INSERT, {"id": f"b-{number}"})
                    await transaction.execute(INSERT, {"id": f"a-{number}"})
            await transaction.execute(INSERT, {"id": f"c-{number}"})

    await asyncio.gather(*(work(number) for number in range(20)))
    assert await ids(database) == {f"{letter}-{number}" for letter in "ac" for number in range(20)}


async def test_a_connection_is_of_no_use_after_its_block(database: Database) -> None:
    async with database.begin() as transaction:
        kept = transaction
    with pytest.raises(sa.exc.ResourceClosedError):
        await kept.execute(INSERT, {"id": "late"})
    assert await ids(database) == set()


async def test_who_is_cancelled_in_a_block_is_rolled_back_alone(database: Database) -> None:
    inside, never = asyncio.Event(), asyncio.Event()
    cancelled = asyncio.create_task(held(database, "cancelled", inside, never))
    await inside.wait()
    others = [asyncio.create_task(add(database, f"other-{number}")) for number in range(10)]
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    async with asyncio.timeout(10):
        await asyncio.gather(*others)
    assert await ids(database) == {f"other-{number}" for number in range(10)}


async def test_cancelling_at_any_moment_hurts_nobody_else(database: Database) -> None:
    """Each round lets the doomed go a tenth of a millisecond further before they are cancelled."""

    async def doomed(name: str) -> None:
        async with database.begin() as transaction:
            await transaction.execute(INSERT, {"id": f"{name}-1"})
            await transaction.execute(sa.text("SELECT count(*) FROM projects"))
            await transaction.execute(INSERT, {"id": f"{name}-2"})

    expected = set()
    for steps in range(60):
        ends = [asyncio.create_task(doomed(f"doomed-{steps}-{number}")) for number in range(3)]
        stays = [asyncio.create_task(add(database, f"stays-{steps}-{number}")) for number in range(3)]
        for end in ends:
            asyncio.get_running_loop().call_later(steps * 0.0001, end.cancel)  # the moment of the fault
        async with asyncio.timeout(20):
            outcomes = await asyncio.gather(*ends, return_exceptions=True)
            await asyncio.gather(*stays)
        expected |= {f"stays-{steps}-{number}" for number in range(3)}
        found = {name for name in await ids(database) if name.startswith(f"doomed-{steps}-")}
        for number, outcome in enumerate(outcomes):
            mine = {name for name in found if name.startswith(f"doomed-{steps}-{number}-")}
            assert len(mine) in ((2,) if outcome is None else (0, 2)), "half of a transaction"
    assert {name for name in await ids(database) if name.startswith("stays")} == expected


async def test_who_comes_at_once_shares_commits(tmp_path: Path) -> None:
    database = await Database.open(Settings(data_dir=tmp_path))
    writer = database._writer
    assert writer is not None
    await asyncio.gather(*(add(database, f"a-{number}") for number in range(200)))
    assert 0 < writer.commits < 100
    blocks = writer.commits
    await asyncio.gather(*(database.write(added(f"b-{number}")) for number in range(200)))
    assert 0 < writer.commits - blocks < 20
    assert len(await ids(database)) == 400
    await database.close()


async def test_a_group_is_bounded(tmp_path: Path) -> None:
    """Whoever comes late to an endless stream of writers is answered all the same."""
    database = await Database.open(Settings(data_dir=tmp_path))
    stop = asyncio.Event()

    async def stream(name: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            await add(database, f"{name}-{number}")

    streams = [asyncio.create_task(stream(name)) for name in range(4)]
    async with asyncio.timeout(10):
        for number in range(10):
            await add(database, f"late-{number}")
    stop.set()
    await asyncio.gather(*streams)
    await database.close()


async def test_a_database_behind_a_link_goes_on_writing(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    await (await Database.open(settings)).close()
    file, elsewhere = tmp_path / "data" / "forebay.db", tmp_path / "larger-disk.db"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    database = await Database.open(settings)
    for name in ("one", "two"):
        await add(database, name)
    assert await ids(database) == {"one", "two"}
    await database.close()


async def test_a_log_that_somebody_removes_stops_no_writer(tmp_path: Path) -> None:
    database = await Database.open(Settings(data_dir=tmp_path))
    await add(database, "one")
    (tmp_path / "forebay.db-wal").unlink()
    for name in ("two", "three"):
        await add(database, name)
    await database.close()


async def test_nothing_of_a_group_is_seen_before_its_commit(tmp_path: Path) -> None:
    database = await Database.open(Settings(data_dir=tmp_path))
    inside, go_on = asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(held(database, "first", asyncio.Event(), asyncio.Event()))
    second = asyncio.create_task(held(database, "second", inside, go_on))
    await asyncio.sleep(0)
    first.cancel()
    await inside.wait()
    assert await ids(database) == set()
    go_on.set()
    await second
    assert await ids(database) == {"second"}
    await database.close()


async def test_a_commit_that_fails_fails_for_all(tmp_path: Path) -> None:
    database = await Database.open(Settings(data_dir=tmp_path))
    await add(database, "before")

    async def orphan() -> None:
        async with database.begin() as transaction:  # found out at the commit alone
            await transaction.execute(sa.text("PRAGMA defer_foreign_keys = ON"))
            row = "('k', 'nobody', 'p', '', '', '', 'admin', '', NULL, NULL, 0, NULL, NULL)"
            await transaction.execute(sa.text(f"INSERT INTO api_keys VALUES {row}"))

    with database.listen("jobs") as event:

        async def told() -> None:
            async with database.begin() as transaction:
                await transaction.execute(INSERT, {"id": "told"})
                await database.notify(transaction, "jobs")

        ended = await asyncio.gather(
            add(database, "one"), orphan(), told(), database.write(added("two")), return_exceptions=True
        )
        assert {type(outcome) for outcome in ended} == {StoreUnavailable}
        assert not event.is_set()
    assert await ids(database) == {"before"}
    await add(database, "after")
    assert await ids(database) == {"before", "after"}
    await database.close()


async def test_a_statement_that_ends_the_transaction_ends_the_group(tmp_path: Path) -> None:
    database = await Database.open(Settings(data_dir=tmp_path))
    await add(database, "before")

    async def treason() -> None:
        async with database.begin() as transaction:
            with pytest.raises(sa.exc.IntegrityError):
                await transaction.execute(sa.text("INSERT OR ROLLBACK INTO projects VALUES ('before', 'x', 0)"))
            await transaction.execute(INSERT, {"id": "after-the-end"})

    ended = await asyncio.gather(add(database, "one"), treason(), return_exceptions=True)
    assert [type(outcome) for outcome in ended] == [StoreUnavailable] * 2
    assert await ids(database) == {"before"}
    await add(database, "after")
    await database.close()


async def test_who_waits_when_the_database_is_closed_is_told(tmp_path: Path) -> None:
    database = await Database.open(Settings(data_dir=tmp_path))
    inside, go_on = asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(held(database, "first", inside, go_on))
    await inside.wait()
    waiting = [asyncio.create_task(add(database, "second")), asyncio.create_task(database.write(added("third")))]
    await asyncio.sleep(0)
    await database.close()
    go_on.set()
    ended = await asyncio.gather(first, *waiting, return_exceptions=True)
    assert [type(outcome) for outcome in ended] == [StoreUnavailable] * 3
    with pytest.raises(StoreUnavailable):
        await add(database, "fourth")


async def test_a_clash_of_transactions_may_be_tried_again(tmp_path: Path) -> None:
    database = await Database.open(Settings(data_dir=tmp_path, database_url=SecretStr(postgres.new_database())))
    await add(database, "p")
    change = sa.text("UPDATE projects SET created_at = created_at + 1")
    with pytest.raises(StoreUnavailable):
        async with database.begin() as transaction:
            await transaction.execute(sa.text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
            await transaction.execute(sa.text("SELECT * FROM projects"))
            async with database.begin() as other:
                await other.execute(change)
            await transaction.execute(change)
    await database.close()


async def test_the_clock_is_the_databases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    sqlite = await Database.open(Settings(data_dir=tmp_path))
    assert sqlite.now(clock) == clock.now()
    await sqlite.close()
    url = SecretStr(postgres.new_database())
    same = await Database.open(Settings(data_dir=tmp_path, database_url=url))
    assert same.now(clock) == clock.now()
    await same.close()
    monkeypatch.setattr(SystemClock, "now", lambda _: time.time() - 100)  # this machine's clock is slow
    slow = await Database.open(Settings(data_dir=tmp_path, database_url=url))
    assert slow.now(clock) == pytest.approx(clock.now() + 100, abs=1)
    monkeypatch.undo()  # and is set
    monkeypatch.setattr(SystemClock, "monotonic", lambda _: time.monotonic() + 61)
    await ids(slow)
    assert slow.now(clock) == clock.now()
    await slow.close()


async def test_a_text_that_cannot_be_kept_is_the_callers_mistake(tmp_path: Path) -> None:
    database = await Database.open(Settings(data_dir=tmp_path, database_url=SecretStr(postgres.new_database())))
    with pytest.raises(InvalidRequest):
        async with database.read() as transaction:
            await transaction.execute(sa.text("SELECT id FROM projects WHERE id = :id"), {"id": "a\0b"})
    await database.close()


async def test_a_read_that_is_cut_off_at_any_moment_gives_its_connection_back(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async def look() -> None:
        async with database.read() as connection:
            await connection.scalar(sa.text("SELECT 1"))

    await look()
    began = time.monotonic()
    await look()
    whole = time.monotonic() - began
    for moment in range(300):
        looking = asyncio.create_task(look())
        await asyncio.wait([looking], timeout=whole * moment / 250)
        while not looking.done():  # again and again, so that its way out is cut off too
            looking.cancel()
            await asyncio.sleep(0)
    await asyncio.gather(*(look() for _ in range(40)))
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("sqlalchemy")]

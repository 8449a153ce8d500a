"""What happens to the database when a process is killed, the disk is full, or somebody else holds the lock."""

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from forebay.config import Settings
from forebay.errors import InsufficientStorage, StoreUnavailable
from forebay.store import sqlite, upkeep
from forebay.store.database import Database
from tests.support import postgres
from tests.support.server import eventually

INSERT = sa.text("INSERT INTO projects VALUES (:id, :name, 0)")

# Writes rows as fast as it can, blocks and functions, and prints the id of each when it is acknowledged.
HAMMER = """
import asyncio, sys
from pathlib import Path
import sqlalchemy as sa
from forebay.config import Settings
from forebay.store.database import Database

INSERT = sa.text("INSERT INTO projects VALUES (:id, :id, 0)")

async def hammer(database, name):
    for number in range(int(sys.argv[4])):
        row = {"id": f"{sys.argv[3]}-{name}-{number}"}
        if name % 2:
            async with database.begin() as transaction:
                await transaction.execute(INSERT, row)
        else:
            await database.write(lambda connection: connection.execute(INSERT, row).rowcount)
        print(row["id"], flush=True)

async def main():
    database = await Database.open(Settings(data_dir=Path(sys.argv[1]), database_url=sys.argv[2] or None))
    await asyncio.gather(*(hammer(database, name) for name in range(8)))
    await database.close()

asyncio.run(main())
"""


def hammer(settings: Settings, name: str, rows_each: int = 1_000_000) -> "subprocess.Popen[str]":
    url = settings.database_url.get_secret_value() if settings.database_url else ""
    program = [sys.executable, "-c", HAMMER, str(settings.data_dir), url, name, str(rows_each)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, text=True)


async def ids(database: Database) -> set[str]:
    async with database.read() as connection:
        return set(await connection.scalars(sa.text("SELECT id FROM projects WHERE id <> 'default'")))


async def add(database: Database, name: str, text: str = "") -> None:
    async with database.begin() as transaction:
        await transaction.execute(INSERT, {"id": name, "name": text or name})


async def healthy(database: Database) -> bool:
    async with database.read() as connection:
        return bool(await connection.scalar(sa.text("PRAGMA integrity_check")) == "ok")


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_what_was_acknowledged_outlives_kill_9(kind: str, tmp_path: Path, prove: bool) -> None:
    url = SecretStr(postgres.new_database()) if kind == "postgres" else None
    settings = Settings(data_dir=tmp_path / "data", database_url=url)
    await (await Database.open(settings)).close()
    acknowledged: set[str] = set()
    rounds = 200 if prove else (20 if kind == "sqlite" else 3)
    for number in range(rounds):
        process = hammer(settings, f"round-{number}")
        assert process.stdout is not None
        for _ in range(10 + number * 7 % 100):  # the kill falls into another moment each time
            acknowledged.add(process.stdout.readline().strip())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")
        acknowledged |= {line for line in rest[:-1] if line}  # the last line may be cut
        process.wait()
        process.stdout.close()
    assert len(acknowledged) >= rounds * 10
    database = await Database.open(settings)
    missing = acknowledged - await ids(database)
    assert not missing
    assert kind == "postgres" or await healthy(database)
    await database.close()


async def test_processes_take_turns_at_one_file(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    database = await Database.open(settings)
    processes = [hammer(settings, name, rows_each=100) for name in ("one", "two")]
    number = 0
    while any(process.poll() is None for process in processes):
        number += 1
        await add(database, f"mine-{number}")
    outputs = [await asyncio.to_thread(process.communicate, timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [len(out.split()) for out, _ in outputs] == [800, 800]
    assert len(await ids(database)) == 1600 + number
    await database.close()


async def test_a_lock_that_is_not_let_go_is_said_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = await Database.open(Settings(data_dir=tmp_path))
    other = sqlite3.connect(tmp_path / "forebay.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(add(database, "patient"))
    threading.Timer(0.5, other.execute, ["COMMIT"]).start()
    await waiting

    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr("forebay.store.writer.BUSY_SECONDS", 0.3)
    ended = await asyncio.gather(
        add(database, "a"), database.write(lambda _: None), add(database, "b"), return_exceptions=True
    )
    assert [type(outcome) for outcome in ended] == [StoreUnavailable] * 3
    assert await ids(database) == {"patient"}  # readers do not mind
    other.execute("COMMIT")
    other.close()
    await add(database, "c")
    assert await ids(database) == {"patient", "c"}
    await database.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_a_full_disk_is_said_and_got_over(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_WAL_PAGES", 50)  # a log that is small beside this disk, as it is beside others
    database = await Database.open(Settings(data_dir=small_disk / "data"))
    fillers = [small_disk / "filler-0", small_disk / "filler-1"]
    for filler in fillers:
        filler.write_bytes(b"x" * (2 * 1024 * 1024))
    kept = set()

    async def fill(number: int) -> None:
        name = f"row-{number}"
        if number % 2:
            await add(database, name, name + "x" * 30_000)
        else:
            row = {"id": name, "name": name + "x" * 30_000}
            await database.write(lambda connection: connection.execute(INSERT, row).rowcount)
        kept.add(name)

    for start, filler in enumerate(fillers):
        refused: list[BaseException] = []
        for number in range(start * 1000, start * 1000 + 200, 10):
            crowd = (fill(number + place) for place in range(10))
            refused += filter(None, await asyncio.gather(*crowd, return_exceptions=True))
        assert refused
        assert {type(error) for error in refused} == {InsufficientStorage}
        assert await ids(database) == kept  # reading goes on, and nothing was acknowledged that is not there
        filler.unlink()
        await fill(start * 1000 + 500)  # and so does writing, by itself
        await fill(start * 1000 + 501)
        assert await ids(database) == kept
        assert await healthy(database)
    assert len(kept) > 20
    await database.close()


async def test_a_full_disk_of_postgres_is_said(tmp_path: Path) -> None:
    database = await Database.open(Settings(data_dir=tmp_path, database_url=SecretStr(postgres.new_database())))
    with pytest.raises(InsufficientStorage):
        async with database.begin() as transaction:
            await transaction.execute(sa.text("DO $$ BEGIN RAISE EXCEPTION 'full' USING ERRCODE = '53100'; END $$"))
    await add(database, "after")
    await database.close()


async def test_a_postgres_that_does_not_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data_dir=tmp_path, database_url=SecretStr(postgres.new_database()))
    await (await Database.open(settings)).close()  # its tables may take longer
    monkeypatch.setattr("forebay.store.connections._STATEMENT_SECONDS", 1)
    database = await Database.open(settings)
    with pytest.raises(StoreUnavailable):
        async with database.begin() as transaction:
            await transaction.execute(sa.text("SELECT pg_sleep(10)"))
    await add(database, "after")
    await database.close()


async def test_a_reader_that_holds_the_log_does_not_keep_it_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_WAL_BYTES_MAX", 256 * 1024)
    database = await Database.open(Settings(data_dir=tmp_path))
    log = tmp_path / "forebay.db-wal"

    def much(connection: sa.Connection) -> None:
        connection.execute(sa.text("DELETE FROM projects WHERE id = 'much'"))
        connection.execute(INSERT, {"id": "much", "name": os.urandom(50_000).hex()})

    async with database.read() as reader:
        await reader.execute(sa.text("SELECT count(*) FROM projects"))
        for _ in range(60):
            await database.write(much)
        assert log.stat().st_size > 3_000_000  # it holds what the reader may still look at

    async def small() -> bool:
        await database.write(much)
        return log.stat().st_size <= 1024 * 1024

    await eventually(small, what="a small log")
    assert await ids(database) == {"much"}
    await database.close()


async def test_a_backup_beside_a_busy_writer_is_whole(tmp_path: Path, prove: bool) -> None:
    """Each transaction writes a pair, so half of one would be seen."""
    settings = Settings(data_dir=tmp_path / "data")
    database = await Database.open(settings)
    stop = asyncio.Event()

    async def write(name: int) -> int:
        number = 0
        while not stop.is_set():
            number += 1
            async with database.begin() as transaction:
                for half in ("left", "right"):
                    await transaction.execute(
                        INSERT, {"id": f"{name}-{number}-{half}", "name": f"{half}-{name}-{number}"}
                    )
        return number

    writers = [asyncio.create_task(write(name)) for name in range(4)]
    sizes = []
    for number in range(50 if prove else 5):
        before = await ids(database)
        file = tmp_path / f"copy-{number}" / "forebay.db"
        file.parent.mkdir()
        sizes.append(await asyncio.to_thread(upkeep.backup, settings, file))
        assert [path.name for path in file.parent.iterdir()] == ["forebay.db"]
        copy = await Database.open(Settings(data_dir=file.parent))
        found = await ids(copy)
        assert before <= found
        lefts = {name.removesuffix("-left") for name in found if name.endswith("-left")}
        assert lefts == {name.removesuffix("-right") for name in found if name.endswith("-right")}
        assert await healthy(copy)
        await copy.close()
    stop.set()
    assert min(await asyncio.gather(*writers)) > 5
    assert all(sizes)
    await database.close()

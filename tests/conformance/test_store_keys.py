"""One suite for the key store and the schema, over SQLite and PostgreSQL."""

import asyncio
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from pydantic import SecretStr

from forebay.config import Settings
from forebay.errors import InsufficientStorage, InvalidRequest, NotFound, SetupError, StoreUnavailable
from forebay.inference import Capability
from forebay.store.database import Database
from forebay.store.key_format import Role, hash_key
from forebay.store.keys import KeyStore
from forebay.store.tables import metadata
from tests.support import postgres
from tests.support.clock import FakeClock

OPEN_AND_CREATE = """
import asyncio, sys
from pathlib import Path
from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.store.database import Database
from forebay.store.keys import KeyStore

async def main():
    database = await Database.open(Settings(data_dir=Path(sys.argv[1]), database_url=sys.argv[2] or None))
    record, _ = await KeyStore(database, SystemClock()).create_key("shared")
    await database.close()
    print(record.project_id)

print("ready", flush=True)
sys.stdin.readline()
asyncio.run(main())
"""


@pytest.fixture(params=["sqlite", "postgres"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    url = SecretStr(postgres.new_database()) if request.param == "postgres" else None
    return Settings(data_dir=tmp_path / "data", database_url=url)


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    database = await Database.open(settings)
    yield database
    await database.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def keys(database: Database, clock: FakeClock) -> KeyStore:
    return KeyStore(database, clock)


async def test_what_was_created_is_found(keys: KeyStore, clock: FakeClock) -> None:
    created, plain = await keys.create_key(
        "shop",
        name="till 1",
        role=Role.READ_ONLY,
        scopes=frozenset({Capability.CHAT, Capability.EMBEDDING}),
        expires_at=clock.now() + 60.25,
        requests_per_minute=7,
        tokens_per_minute=3_000_000_000,
    )
    found = await keys.find(created.prefix)
    assert found == created
    assert (found.project, found.name, found.role) == ("shop", "till 1", Role.READ_ONLY)
    assert found.scopes == {Capability.CHAT, Capability.EMBEDDING}
    assert (found.expires_at, found.revoked_at, found.created_at) == (clock.now() + 60.25, None, clock.now())
    assert (found.requests_per_minute, found.tokens_per_minute) == (7, 3_000_000_000)
    assert (found.hash, found.last4) == (hash_key(plain), plain[-4:])


async def test_a_key_needs_nothing_but_a_store(keys: KeyStore) -> None:
    assert not await keys.any_keys()
    created, _ = await keys.create_key()
    assert await keys.any_keys()
    assert (created.project, created.project_id, created.role) == ("default", "default", Role.MEMBER)
    assert (created.scopes, created.expires_at, created.requests_per_minute) == (frozenset(), None, None)


async def test_an_unknown_prefix_is_not_found(keys: KeyStore) -> None:
    for prefix in ("", "00000000000", "' OR 1=1 --", "x" * 5000):
        assert await keys.find(prefix) is None


async def test_one_project_for_all_who_ask_at_once(keys: KeyStore) -> None:
    found = await asyncio.gather(*(keys.get_or_create_project("shop") for _ in range(30)))
    assert len({project.id for project in found}) == 1
    assert (await keys.get_or_create_project("other")).id != found[0].id


async def test_concurrent_creates_all_last(keys: KeyStore) -> None:
    created = await asyncio.gather(*(keys.create_key(f"project-{number % 3}") for number in range(60)))
    assert len({record.prefix for record, _ in created}) == 60
    assert len({record.project_id for record, _ in created}) == 3
    listed = await keys.list()
    assert {record.id for record in listed} == {record.id for record, _ in created}


async def test_pages_are_in_order_without_gap_or_repeat(keys: KeyStore, clock: FakeClock) -> None:
    made = []
    for number in range(25):
        made.append((await keys.create_key("even" if number % 2 == 0 else "odd"))[0])
        clock.advance(number % 3)  # some share their time
    expected = sorted(made, key=lambda record: (record.created_at, record.id))
    seen = []
    after = None
    while page := await keys.list(after=after, limit=7):
        assert len(page) <= 7
        seen += page
        after = page[-1].id
    assert seen == expected
    assert await keys.list("odd") == [record for record in expected if record.project == "odd"]
    assert await keys.list("nobody") == []
    with pytest.raises(NotFound):
        await keys.list(after="key_none")


async def test_a_page_is_bounded(keys: KeyStore) -> None:
    await asyncio.gather(*(keys.create_key() for _ in range(101)))
    assert len(await keys.list(limit=1_000_000)) == 100
    assert len(await keys.list(limit=-5)) == 1


async def test_revoking_by_id_and_by_prefix_happens_once(keys: KeyStore, clock: FakeClock) -> None:
    first, second = [(await keys.create_key())[0] for _ in range(2)]
    assert (await keys.revoke(first.id)).revoked_at == clock.now()
    assert (await keys.revoke(second.prefix)).revoked_at == clock.now()
    clock.advance(10)
    assert (await keys.revoke(first.id)).revoked_at == clock.now() - 10
    found = await keys.find(first.prefix)
    assert found is not None
    assert found.revoked_at == clock.now() - 10
    with pytest.raises(NotFound):
        await keys.revoke("key_none")


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 65, "-x", "é"])
async def test_a_project_name_is_checked(keys: KeyStore, name: str) -> None:
    with pytest.raises(InvalidRequest):
        await keys.create_key(name)


async def test_a_key_name_and_its_rates_are_checked(keys: KeyStore) -> None:
    with pytest.raises(InvalidRequest):
        await keys.create_key(name="x" * 129)
    with pytest.raises(InvalidRequest):
        await keys.create_key(name="a\nb")
    with pytest.raises(InvalidRequest):
        await keys.create_key(requests_per_minute=0)
    assert not await keys.any_keys()


async def test_a_failed_transaction_leaves_nothing(database: Database, keys: KeyStore) -> None:
    with pytest.raises(ZeroDivisionError):
        async with database.begin() as connection:
            await connection.execute(sa.text("INSERT INTO projects VALUES ('p', 'p', 0)"))
            raise ZeroDivisionError
    async with database.read() as connection:
        assert await connection.scalar(sa.text("SELECT count(*) FROM projects WHERE id = 'p'")) == 0


async def test_a_key_of_no_project_is_refused_by_the_schema(database: Database) -> None:
    row = "('k', 'nobody', 'p', :hash, '', '', 'admin', '', NULL, NULL, 0, NULL, NULL)"
    with pytest.raises(sa.exc.IntegrityError):
        async with database.begin() as connection:
            await connection.execute(sa.text(f"INSERT INTO api_keys VALUES {row}"), {"hash": b"x" * 32})


async def test_the_plain_key_is_nowhere_on_disk(settings: Settings) -> None:
    database = await Database.open(settings)
    record, plain = await KeyStore(database, FakeClock()).create_key(name="findable-name")
    folder = settings.data_dir if settings.database_url is None else postgres.server().pgdata
    if settings.database_url is not None:
        async with database.begin() as connection:
            await connection.execute(sa.text("SELECT pg_switch_wal()"))
    await database.close()
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"findable-name" in content
    assert record.hash in content
    assert plain.encode() not in content
    assert plain.split("_")[2].encode() not in content
    assert plain not in repr(record)
    assert repr(record.hash) not in repr(record)


async def test_opening_twice_changes_nothing(settings: Settings) -> None:
    first = await Database.open(settings)
    record, _ = await KeyStore(first, FakeClock()).create_key()
    second = await Database.open(settings)
    assert await KeyStore(second, FakeClock()).find(record.prefix) == record
    await first.close()
    await second.close()


async def test_one_process_may_open_several_at_once(settings: Settings) -> None:
    opened = await asyncio.gather(*(Database.open(settings) for _ in range(5)))
    for database in opened:
        await database.close()


def test_processes_that_migrate_at_once_agree(settings: Settings) -> None:
    url = settings.database_url.get_secret_value() if settings.database_url else ""
    program = [sys.executable, "-c", OPEN_AND_CREATE, str(settings.data_dir), url]
    started = [
        subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        for _ in range(6)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
    ended = [(*process.communicate(timeout=60), process.returncode) for process in started]
    assert [code for _, _, code in ended] == [0] * 6, ended
    assert len({out for out, _, _ in ended}) == 1
    assert all(error == "" for _, error, _ in ended)  # Alembic says nothing


async def test_the_steps_lead_to_the_tables_as_declared(database: Database) -> None:
    def differences(connection: sa.Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata))

    async with database.read() as connection:
        assert await connection.run_sync(differences) == []


async def test_a_migration_that_breaks_off_leaves_nothing_behind(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade = command.upgrade

    def break_off(config: Config, revision: str) -> None:
        upgrade(config, revision)
        raise OSError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(command, "upgrade", break_off)
        with pytest.raises(SetupError, match="the power went"):
            await Database.open(settings)
        patch.setattr(command, "upgrade", lambda config, revision: None)
        untouched = await Database.open(settings)
        async with untouched.read() as connection:
            assert await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names()) == []
        await untouched.close()
    whole = await Database.open(settings)
    assert not await KeyStore(whole, FakeClock()).any_keys()
    await whole.close()


async def test_a_newer_schema_is_refused(settings: Settings) -> None:
    database = await Database.open(settings)
    async with database.begin() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    await database.close()
    with pytest.raises(SetupError, match=r"schema 9999, which is newer than this program\. Upgrade forebay"):
        await Database.open(settings)


async def test_sqlite_is_durable_and_private(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    database = await Database.open(Settings(data_dir=folder))
    async with database.begin() as connection:
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
            assert await connection.scalar(sa.text(f"PRAGMA {pragma}")) == value
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    await database.close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {"forebay.db", "forebay.db-wal"} <= set(modes)
    assert set(modes.values()) == {0o600}


async def test_a_full_disk_is_said_and_got_over(tmp_path: Path) -> None:
    database = await Database.open(Settings(data_dir=tmp_path))
    keys = KeyStore(database, FakeClock())
    record, _ = await keys.create_key()
    with pytest.raises(InsufficientStorage):
        async with database.begin() as connection:
            await connection.execute(sa.text("PRAGMA max_page_count = 1"))  # cut to what there is already
            for number in range(1000):
                row = {"id": f"p{number}", "name": f"n{number}"}
                await connection.execute(sa.text("INSERT INTO projects VALUES (:id, :name, 0)"), row)
    assert await keys.list() == [record]
    async with database.begin() as connection:
        await connection.execute(sa.text("PRAGMA max_page_count = 1000000"))
        assert await connection.scalar(sa.text("SELECT count(*) FROM projects")) == 1
        assert await connection.scalar(sa.text("PRAGMA integrity_check")) == "ok"
    await keys.create_key("other")
    await database.close()


async def test_a_sqlite_reader_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    database = await Database.open(Settings(data_dir=tmp_path))
    keys = KeyStore(database, FakeClock())
    record, _ = await keys.create_key()
    async with database.begin():
        async with asyncio.timeout(2):
            assert await keys.find(record.prefix) == record
    await database.close()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("postgresql+asyncpg://me:hunter2@127.0.0.1:1/x", r"postgresql://127\.0\.0\.1:1/x cannot be opened"),
        ("postgresql://me@127.0.0.1:1/x?password=hunter2", "cannot be opened"),
        ("mysql://me:hunter2@127.0.0.1/x", "no support for `mysql`"),
        ("postgresql+psycopg://me:hunter2@127.0.0.1/x", "Use postgresql"),
        ("hunter2", "cannot be read"),
        ("sqlite://", "has to be a file"),
        ("sqlite+aiosqlite:////proc/hunter2/x.db", "cannot be opened"),
    ],
)
async def test_a_database_that_cannot_be_opened_is_a_sentence(tmp_path: Path, url: str, sentence: str) -> None:
    with pytest.raises(SetupError, match=sentence) as refused:
        await Database.open(Settings(data_dir=tmp_path, database_url=SecretStr(url)))
    if "/proc" not in url:
        assert "hunter2" not in str(refused.value)


async def test_a_file_that_is_no_database_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "forebay.db").write_bytes(b"not a database, whatever its name says" * 100)
    with pytest.raises(SetupError, match="cannot be opened"):
        await Database.open(Settings(data_dir=tmp_path))


async def test_a_data_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="cannot be created"):
        await Database.open(Settings(data_dir=tmp_path / "file" / "data"))


async def test_postgres_going_away_is_said_and_coming_back_is_noticed(tmp_path: Path) -> None:
    url = postgres.new_database()
    database = await Database.open(Settings(data_dir=tmp_path, database_url=SecretStr(url)))
    keys = KeyStore(database, FakeClock())
    record, _ = await keys.create_key()
    postgres.take_away(url)
    with pytest.raises(StoreUnavailable):
        await keys.find(record.prefix)
    postgres.bring_back(url)
    assert await keys.find(record.prefix) == record
    postgres.cut_connections(url)
    assert await keys.find(record.prefix) == record
    await database.close()


async def test_postgres_lost_in_the_middle_of_a_transaction_is_said(tmp_path: Path) -> None:
    url = postgres.new_database()
    database = await Database.open(Settings(data_dir=tmp_path, database_url=SecretStr(url)))
    with pytest.raises(StoreUnavailable):
        async with database.begin() as connection:
            await connection.execute(sa.text("SELECT 1"))
            postgres.cut_connections(url)
            await connection.execute(sa.text("SELECT 1"))
    await database.close()

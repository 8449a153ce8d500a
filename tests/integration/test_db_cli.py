"""`forebay db` as a program."""

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from forebay.config import Settings
from forebay.store.database import Database
from tests.support import postgres


def forebay_db(folder: Path, *arguments: str, url: str | None = None) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}
    chosen = {"FOREBAY_DATABASE_URL": url} if url else {}
    return subprocess.run(
        [sys.executable, "-c", "from forebay.cli.db import app; app(prog_name='db')", *arguments],
        cwd=folder, env=kept | chosen, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after `forebay db upgrade`, to be copied."""
    folder = tmp_path_factory.mktemp("upgraded")
    result = forebay_db(folder, "upgrade")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def folder(upgraded: Path, tmp_path: Path) -> Path:
    """A folder of its own with an upgraded database in it."""
    shutil.copytree(upgraded, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refused(result: "subprocess.CompletedProcess[str]") -> str:
    assert (result.returncode, result.stdout) == (1, ""), result
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def execute(file: Path, *statements: str) -> None:
    connection = sqlite3.connect(file, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def test_upgrade_says_from_what_to_what(tmp_path: Path) -> None:
    first = forebay_db(tmp_path, "upgrade")
    assert (first.returncode, first.stdout.startswith("Brought the schema from nothing to 0")) == (0, True)
    again = forebay_db(tmp_path, "upgrade")
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_check_counts_what_is_there(kind: str, tmp_path: Path) -> None:
    url = postgres.new_database() if kind == "postgres" else None
    if url is None:
        assert "There is no database" in refused(forebay_db(tmp_path, "check"))
        assert not (tmp_path / "data").exists()
    else:
        assert "It has no schema" in refused(forebay_db(tmp_path, "check", url=url))
    assert forebay_db(tmp_path, "upgrade", url=url).returncode == 0
    result = forebay_db(tmp_path, "check", url=url)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "is well, with schema 0" in lines[0]
    assert "1  projects" in lines[1]


def test_check_finds_what_is_wrong(folder: Path) -> None:
    file = folder / "data" / "forebay.db"
    row = "('k', 'nobody', 'p', '', '', '', 'admin', '', NULL, NULL, 0, NULL, NULL)"
    execute(file, "PRAGMA foreign_keys = OFF", f"INSERT INTO api_keys VALUES {row}")
    assert "A row of api_keys belongs to a row of projects" in refused(forebay_db(folder, "check"))
    execute(file, "DELETE FROM api_keys", "UPDATE alembic_version SET version_num = '0001'")
    assert "It has schema 0001 and needs" in refused(forebay_db(folder, "check"))
    content = bytearray(file.read_bytes())
    content[4096:20480] = os.urandom(16384)
    file.write_bytes(content)
    assert refused(forebay_db(folder, "check"))


@pytest.mark.parametrize("command", [("upgrade",), ("check",)])
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_newer_schema_is_refused(kind: str, command: tuple[str, ...], tmp_path: Path) -> None:
    url = postgres.new_database() if kind == "postgres" else None

    async def age() -> None:
        database = await Database.open(Settings(data_dir=tmp_path / "data", database_url=url))  # which upgrades it
        async with database.begin() as transaction:
            await transaction.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
        await database.close()

    asyncio.run(age())
    sentence = refused(forebay_db(tmp_path, *command, url=url))
    assert "schema 9999, which is newer than this program. Upgrade forebay" in sentence


def test_backup_copies_and_replaces_only_when_told(folder: Path) -> None:
    assert forebay_db(folder, "backup", "copy.db").returncode == 0
    first = (folder / "copy.db").read_bytes()
    execute(folder / "data" / "forebay.db", "INSERT INTO projects VALUES ('p', 'p', 0)")
    assert "is there already" in refused(forebay_db(folder, "backup", "copy.db"))
    assert (folder / "copy.db").read_bytes() == first
    assert forebay_db(folder, "backup", "--force", "copy.db").returncode == 0
    connection = sqlite3.connect(folder / "copy.db")
    assert connection.execute("SELECT count(*) FROM projects WHERE id = 'p'").fetchone() == (1,)
    connection.close()
    assert (folder / "copy.db").stat().st_mode & 0o777 == 0o600
    assert not list(folder.glob(".*"))


def test_backup_never_overwrites_the_database_itself(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "data" / "forebay.db")
    for name in ("data/forebay.db", "link", "data"):
        assert "is there already" in refused(forebay_db(folder, "backup", "--force", name))
    assert forebay_db(folder, "check").returncode == 0


def test_backup_says_what_cannot_be_done(folder: Path) -> None:
    (folder / "empty").mkdir()
    assert "There is no database" in refused(forebay_db(folder / "empty", "backup", "copy.db"))
    assert "cannot be written" in refused(forebay_db(folder, "backup", "nowhere/copy.db"))
    url = "postgresql://me:hunter2@127.0.0.1:1/x"
    sentence = refused(forebay_db(folder, "backup", "copy.db", url=url))
    assert "pg_dump" in sentence
    assert "hunter2" not in refused(forebay_db(folder, "check", url=url))

"""The schema: brought to the newest step, or looked at.

It refuses a database whose schema is newer than this program.
"""

import asyncio
import logging
import os
import threading
from contextlib import nullcontext
from pathlib import Path

import filelock
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from forebay.config import Settings
from forebay.errors import SetupError
from forebay.store.connections import connect, is_sqlite, opening, parse, reason, shown

_LOCK_SECONDS = 60  # the longest wait for another process that migrates
_ADVISORY_LOCK = 0x666F7265626179  # "forebay"
_MIGRATIONS = Path(__file__).parent / "migrations"

# Alembic keeps what it works on in module globals, so one process migrates one database at a time.
_migrating = threading.Lock()


async def upgrade(settings: Settings) -> tuple[str | None, str]:
    """Create what is missing and take every step to the newest schema: the one before, none if new, and the one after.

    Any number of processes may do this at once. Raises SetupError with the remedy; the message has no password.
    """
    url = parse(settings.database_address)
    _create_folder(settings.data_dir)
    with opening(url):
        try:
            return await asyncio.to_thread(_migrate, url)
        except filelock.Timeout:
            raise SetupError(
                f"Another process has been migrating {shown(url)} for {_LOCK_SECONDS} s. Stop it and try again."
            ) from None
        except CommandError as error:
            raise OSError(reason(url, error)) from None


def newest() -> str:
    """The schema that this program needs."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def current(connection: sa.Connection) -> str | None:
    """The schema of a database; none if it is empty. Raises SetupError if it is newer than this program."""
    known = {step.revision for step in ScriptDirectory.from_config(_config()).walk_revisions()}
    heads = set(MigrationContext.configure(connection).get_current_heads())
    if unknown := heads - known:
        raise SetupError(
            f"The database has schema {', '.join(sorted(unknown))}, which is newer than this program. "
            "Upgrade forebay, or restore a backup of the database that this version made."
        )
    return next(iter(heads), None)


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"The data folder {folder} cannot be created: {error.strerror}. Choose another with FOREBAY_DATA_DIR."
        ) from None


def _migrate(url: URL) -> tuple[str | None, str]:
    """Bring the schema up to date. Blocks, so it has a thread and an event loop of its own."""
    with _migrating, _file_lock(url):
        return asyncio.run(_migrate_alone(url))


def _file_lock(url: URL) -> filelock.FileLock | nullcontext[None]:
    """SQLite may refuse two processes that both switch a new file to WAL, whatever its busy timeout."""
    if not is_sqlite(url):
        return nullcontext()
    path = Path(str(url.database))
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    return filelock.FileLock(path.with_name(path.name + ".lock"), timeout=_LOCK_SECONDS, mode=0o600)


async def _migrate_alone(url: URL) -> tuple[str | None, str]:
    engine = connect(url, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            if not is_sqlite(url):
                await connection.execute(sa.text(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS // 3}s'"))
                await connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
            return await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


def _upgrade(connection: sa.Connection) -> tuple[str | None, str]:
    """All missing steps in the caller's transaction: a crash half-way leaves the old schema whole."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    before = current(connection)
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    return before, newest()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config

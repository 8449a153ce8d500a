"""What an operator does to a database from outside: look whether it is well, and back it up.

It refuses to change it: neither makes a database, nor brings its schema up to date.
"""

import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import NullPool

from forebay.config import Settings
from forebay.errors import SetupError
from forebay.store import sqlite
from forebay.store.connections import READ, connect, is_sqlite, opening, parse, shown
from forebay.store.schema import current, newest
from forebay.store.tables import api_keys, batches, dead_letters, files, jobs, projects

_COUNTED = (projects, api_keys, jobs, batches, files, dead_letters)
_FAULTS_MAX = 5


@dataclass(frozen=True, slots=True)
class Checkup:
    """What was found. No `faults` means that it is well."""

    address: str
    schema: str | None
    counts: dict[str, int]
    faults: tuple[str, ...]


async def check(settings: Settings) -> Checkup:
    """Look at the schema, at the rows, and on SQLite at every page. Raises SetupError if it cannot be opened."""
    url = parse(settings.database_address)
    if is_sqlite(url):
        _existing(url)
    with opening(url):
        engine = connect(url, poolclass=NullPool)
        try:
            async with engine.connect() as connection:
                await connection.execution_options(**READ)
                async with connection.begin():
                    return await _look(url, connection)
        finally:
            await engine.dispose()


async def _look(url: URL, connection: AsyncConnection) -> Checkup:
    faults = await _file_faults(connection) if is_sqlite(url) else []
    schema = None if faults else await connection.run_sync(current)
    counts: dict[str, int] = {}
    if schema == newest():
        for table in _COUNTED:
            counts[table.name] = await connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
    elif not faults:
        had = f"schema {schema}" if schema else "no schema"
        faults.append(f"It has {had} and needs {newest()}: run `forebay db upgrade`.")
    return Checkup(shown(url), schema, counts, tuple(faults))


async def _file_faults(connection: AsyncConnection) -> list[str]:
    pages = (await connection.scalars(sa.text(f"PRAGMA integrity_check({_FAULTS_MAX})"))).all()
    faults = [f"The file is damaged: {page}. Restore a backup." for page in pages if page != "ok"]
    if not faults:
        rows = (await connection.execute(sa.text("PRAGMA foreign_key_check"))).fetchmany(_FAULTS_MAX)
        faults = [
            f"A row of {row[0]} belongs to a row of {row[2]} that is not there. Restore a backup." for row in rows
        ]
    return faults


def backup(settings: Settings, file: Path, *, overwrite: bool = False) -> int:
    """Copy a SQLite database to `file`, whole or not at all, while others use it; the size in bytes. Blocks.

    Raises SetupError.
    """
    url = parse(settings.database_address)
    if not is_sqlite(url):
        raise SetupError("This is a PostgreSQL database. Back it up with `pg_dump`.")
    source = _existing(url)
    try:
        if file.exists() and (not overwrite or not file.is_file() or file.samefile(source)):
            raise SetupError(f"{file} is there already. Name another file, or use --force to replace an older backup.")
        return _copy(source, file, overwrite)
    except FileExistsError:
        raise SetupError(f"{file} has appeared meanwhile. Name another file.") from None
    except (*sqlite.DRIVER_ERRORS, OSError) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise SetupError(f"The backup {file} cannot be written: {text}. Choose another place.") from None


def _copy(source: Path, file: Path, overwrite: bool) -> int:
    descriptor, name = tempfile.mkstemp(prefix=".forebay-", dir=file.parent)
    part = Path(name)
    try:
        sqlite.copy(source, part)
        os.fsync(descriptor)
        size = part.stat().st_size
        if overwrite:
            part.replace(file)
        else:
            file.hardlink_to(part)  # unlike a rename, it never replaces what somebody else put there
    finally:
        os.close(descriptor)
        part.unlink(missing_ok=True)
    _flush_folder(file.parent)
    return size


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing(url: URL) -> Path:
    """The file of the database. Raises SetupError if there is none, or none that this user may look at."""
    file = Path(str(url.database))
    try:
        there = stat.S_ISREG(os.stat(file).st_mode)
    except PermissionError:
        raise SetupError(
            f"{file} cannot be looked at: permission denied. Run this as the user that runs the server."
        ) from None
    except (OSError, ValueError):  # ValueError: a name that no file can have
        there = False
    if not there:
        raise SetupError(f"There is no database {file}. `forebay serve` makes one, and so does `forebay db upgrade`.")
    return file

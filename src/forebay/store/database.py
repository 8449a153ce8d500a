"""The database: SQLite or PostgreSQL behind one engine, its schema brought up to date when it is opened.

It refuses to know what is stored: tables and statements are kept beside their nouns. Only this file knows a driver.
"""

import asyncio
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, Self, TypeAlias, TypeVar

import filelock
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, StaticPool

from forebay.clock import Clock, SystemClock
from forebay.config import Settings
from forebay.errors import InsufficientStorage, SetupError, StoreUnavailable
from forebay.store import sqlite
from forebay.store.signals import PostgresEar, Signals, tell_others
from forebay.store.writer import Writer

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
_CONNECT_SECONDS = 5
_STATEMENT_SECONDS = 30
_SKEW_SECONDS = 60  # how long a comparison of clocks is good for
_SKEW_SECONDS_MIN = 0.1  # a smaller difference may be the network's
_DATABASE_TIME = sa.text("SELECT extract(epoch FROM clock_timestamp())::float8")
_LOCK_SECONDS = 60  # the longest wait for another process that migrates
_POOL_CONNECTIONS = 8
_POOL_SECONDS = 10
_ADVISORY_LOCK = 0x666F7265626179  # "forebay"
_READ = {"forebay_read": True}
_CHANNELS = "forebay_channels"  # the execution option that holds whom a transaction wakes when it commits
# PostgreSQL's SQLSTATE, from the front: connection lost, clash with another transaction, resources, operator, system;
# a standby that takes no writes; a lock that was not to be had.
_PASSING_STATES = ("08", "40", "53", "57", "58", "25006", "55P03")
_DISK_FULL_STATE = "53100"
_MIGRATIONS = Path(__file__).parent / "migrations"

Transaction: TypeAlias = AsyncConnection  # what `begin` and `read` give, for rooms that do not know the library
T = TypeVar("T")

# Alembic keeps what it works on in module globals, so one process migrates one database at a time.
_migrating = threading.Lock()


class Database:
    """An open database at the newest schema. `begin` writes, `read` only reads; both are one transaction."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        # The pool lets a newcomer overtake those who wait, who may then wait forever; a semaphore is a fair line.
        self._places = asyncio.Semaphore(_POOL_CONNECTIONS)
        self._signals = Signals()
        self._ear: asyncio.Task[None] | None = None
        self._skew = 0.0
        self._compared_at = float("-inf")
        self._writer: Writer | None = None
        self._writing: asyncio.Task[None] | None = None
        if self.is_sqlite:
            self._writer = Writer(_connect_writer(engine.url), _CHANNELS, self._signals.wake)
            self._writing = asyncio.create_task(self._writer.run())

    @classmethod
    async def open(cls, settings: Settings) -> Self:
        """Create what is missing, migrate to the newest schema, connect, and compare clocks.

        Any number of processes may do this at once. Raises SetupError with the remedy; the message has no password.
        """
        url = _parse(settings.database_address)
        _create_folder(settings.data_dir)
        try:
            await asyncio.to_thread(_migrate, url)
            return await cls._connected(url)
        except filelock.Timeout:
            raise SetupError(
                f"Another process has been migrating {_shown(url)} for {_LOCK_SECONDS} s. Stop it and try again."
            ) from None
        except (SQLAlchemyError, CommandError, OSError, TimeoutError, StoreUnavailable) as error:
            raise SetupError(
                f"The database {_shown(url)} cannot be opened: {_reason(url, error)}. "
                "Check FOREBAY_DATABASE_URL and FOREBAY_DATA_DIR, and that the database is running."
            ) from None

    @classmethod
    async def _connected(cls, url: URL) -> Self:
        database = cls(_connect(url, pool_size=_POOL_CONNECTIONS, max_overflow=0, pool_timeout=_POOL_SECONDS))
        if not database.is_sqlite:
            async with database.read():  # compares the clocks
                pass
        return database

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file, which other processes may write to without a word to this one."""
        return _is_sqlite(self._engine.url)

    async def close(self) -> None:
        """Close every connection; who still waits to write gets StoreUnavailable."""
        for running in filter(None, (self._ear, self._writing)):
            running.cancel()
            await asyncio.wait([running])
        await self._engine.dispose()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Transaction]:
        """A transaction that may write: committed and on disk when the block ends, rolled back when it raises.

        On SQLite blocks run one after the other and share their commits, see `store.writer`: do nothing in one but SQL.
        Raises StoreUnavailable when the database cannot be reached or is locked, and InsufficientStorage when it is
        full. After either, or a cancellation while the block ends, nobody knows whether the transaction was committed.
        """
        async with _available():
            if self._writer is not None:
                async with self._writer.begin() as connection:
                    yield connection
                return
            channels: set[str] = set()
            async with self._connection() as connection:
                await connection.execution_options(**{_CHANNELS: channels})
                async with connection.begin():
                    yield connection
                    if channels:
                        await connection.run_sync(tell_others, channels)
        self._signals.wake(channels)

    async def write(self, function: Callable[[sa.Connection], T]) -> T:
        """Run `function` in a transaction as `begin` does, and return what it returns.

        On SQLite it runs on the writer's thread, which is several times faster than `begin`: it may use nothing but
        its connection and what belongs to it alone.
        """
        if self._writer is not None:
            async with _available():
                return await self._writer.write(function)
        async with self.begin() as transaction:
            return await transaction.run_sync(function)

    def now(self, clock: Clock) -> float:
        """The time on the database's clock, which all machines that share it agree on."""
        return clock.now() + self._skew

    async def notify(self, transaction: Transaction, channel: str) -> None:
        """Wake those who listen to `channel` when `transaction` commits: here, and on PostgreSQL in every process.

        On SQLite other processes are not woken; they have to look from time to time.
        """
        assert transaction.sync_connection is not None
        self.notify_sync(transaction.sync_connection, channel)

    def notify_sync(self, connection: sa.Connection, channel: str) -> None:
        """The same for a function that `write` runs."""
        channels: set[str] = connection.get_execution_options()[_CHANNELS]
        channels.add(channel)

    def listen(self, channel: str) -> AbstractContextManager[asyncio.Event]:
        """An event that is set at each notify of `channel`, and sometimes without one; the listener clears it."""
        if self._ear is None and not self.is_sqlite:
            engine = _connect(self._engine.url, poolclass=NullPool)
            self._ear = asyncio.create_task(PostgresEar(engine, self._signals, _driver_errors()).run())
        return self._signals.listen(channel)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Transaction]:
        """A transaction that only reads; on SQLite it never waits for a writer."""
        async with self._connection() as connection, _available():
            await connection.execution_options(**_READ)
            async with connection.begin():
                if not self.is_sqlite and SystemClock().monotonic() - self._compared_at > _SKEW_SECONDS:
                    await self._compare_clocks(connection)
                yield connection

    async def _compare_clocks(self, connection: AsyncConnection) -> None:
        clock = SystemClock()
        self._compared_at = clock.monotonic()
        before = clock.now()
        theirs = float(await connection.scalar(_DATABASE_TIME))
        skew = theirs - (before + clock.now()) / 2
        self._skew = skew if abs(skew) >= _SKEW_SECONDS_MIN else 0.0

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncConnection]:
        try:
            async with asyncio.timeout(_POOL_SECONDS):
                await self._places.acquire()
        except TimeoutError:
            raise StoreUnavailable from None
        try:
            try:
                connection = await self._engine.connect()
            except (SQLAlchemyError, OSError) as error:  # whatever it is: without a connection there is no database
                raise StoreUnavailable from error
            try:
                yield connection
            finally:
                await connection.close()
        finally:
            self._places.release()


@asynccontextmanager
async def _available() -> AsyncIterator[None]:
    """Turn what the driver says of a database that is away or full into StoreUnavailable or InsufficientStorage."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        state = str(getattr(cause, "sqlstate", None) or "")
        if sqlite.is_full(cause) or state == _DISK_FULL_STATE:
            raise InsufficientStorage from error
        if isinstance(error, (OperationalError, InterfaceError, PoolTimeout)) or state.startswith(_PASSING_STATES):
            raise StoreUnavailable from error
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            raise StoreUnavailable from error
        raise


def _parse(address: str) -> URL:
    try:
        url = make_url(address)
    except ArgumentError:
        raise SetupError("The database URL cannot be read. Write it as postgresql+asyncpg://user@host/name.") from None
    family = url.drivername.partition("+")[0]
    if family not in _DRIVERS or url.drivername not in (family, _DRIVERS[family]):
        raise SetupError(f"There is no support for `{url.drivername}` databases. Use postgresql+asyncpg:// or SQLite.")
    url = url.set(drivername=_DRIVERS[family])
    if _is_sqlite(url) and url.database in (None, "", ":memory:"):
        raise SetupError("A SQLite database has to be a file. Write it as sqlite+aiosqlite:///path/to/file.db.")
    if not _is_sqlite(url) and importlib.util.find_spec("asyncpg") is None:
        raise SetupError("PostgreSQL needs a driver that is not installed. Run `pip install 'forebay[postgres]'`.")
    return url


def _driver_errors() -> tuple[type[Exception], ...]:
    asyncpg = importlib.import_module("asyncpg")
    return asyncpg.PostgresError, asyncpg.InterfaceError


def _is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _shown(url: URL) -> str:
    """The address without user, password and options."""
    return URL.create(
        url.drivername.partition("+")[0], host=url.host, port=url.port, database=url.database
    ).render_as_string()


def _reason(url: URL, error: BaseException) -> str:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    text = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
    secrets = [str(url.password or ""), *(str(value) for value in url.query.values())]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"The data folder {folder} cannot be created: {error.strerror}. Choose another with FOREBAY_DATA_DIR."
        ) from None


def _connect(url: URL, **options: Any) -> AsyncEngine:
    if _is_sqlite(url):
        arguments: dict[str, Any] = {"async_creator_fn": sqlite.ThreadConnection, "timeout": sqlite.BUSY_SECONDS}
        engine = create_async_engine(url, hide_parameters=True, connect_args=arguments, **options)
        sa.event.listen(engine.sync_engine, "connect", sqlite.prepare)
        sa.event.listen(engine.sync_engine, "begin", _begin_sqlite)
        return engine
    arguments = {"timeout": _CONNECT_SECONDS, "command_timeout": _STATEMENT_SECONDS}
    engine = create_async_engine(url, hide_parameters=True, pool_pre_ping=True, connect_args=arguments, **options)
    sa.event.listen(engine.sync_engine, "handle_error", _name_silence)
    return engine


def _connect_writer(url: URL) -> AsyncEngine:
    """One connection that everybody shares in turn, so nothing is reset in between."""
    arguments = {"async_creator_fn": sqlite.GroupConnection, "timeout": sqlite.BUSY_SECONDS}
    engine = create_async_engine(
        url, hide_parameters=True, connect_args=arguments, poolclass=StaticPool, pool_reset_on_return=None
    )
    sa.event.listen(engine.sync_engine, "connect", sqlite.prepare)
    sa.event.listen(engine.sync_engine, "connect", sqlite.prepare_writer)
    sa.event.listen(engine.sync_engine, "handle_error", sqlite.keep_connection)
    return engine


def _name_silence(context: sa.ExceptionContext) -> StoreUnavailable | None:
    """A statement that PostgreSQL does not answer, or whose connection breaks, ends in the plain errors of Python."""
    silent = context.connection is not None and isinstance(context.original_exception, (TimeoutError, OSError))
    return StoreUnavailable() if silent else None


def _begin_sqlite(connection: sa.Connection) -> None:
    # A writer takes the lock at once: a reader that turns into a writer half-way may be refused without waiting.
    reads = connection.get_execution_options().get("forebay_read")
    connection.exec_driver_sql("BEGIN DEFERRED" if reads else "BEGIN IMMEDIATE")


def _migrate(url: URL) -> None:
    """Bring the schema up to date. Blocks, so it has a thread and an event loop of its own."""
    with _migrating, _file_lock(url):
        asyncio.run(_migrate_alone(url))


def _file_lock(url: URL) -> filelock.FileLock | nullcontext[None]:
    """SQLite may refuse two processes that both switch a new file to WAL, whatever its busy timeout."""
    if not _is_sqlite(url):
        return nullcontext()
    path = Path(str(url.database))
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    return filelock.FileLock(path.with_name(path.name + ".lock"), timeout=_LOCK_SECONDS, mode=0o600)


async def _migrate_alone(url: URL) -> None:
    engine = _connect(url, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            if not _is_sqlite(url):
                await connection.execute(sa.text(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS // 3}s'"))
                await connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
            await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


def _upgrade(connection: sa.Connection) -> None:
    """All missing steps in the caller's transaction: a crash half-way leaves the old schema whole."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
    if unknown := set(MigrationContext.configure(connection).get_current_heads()) - known:
        raise SetupError(
            f"The database has schema {', '.join(sorted(unknown))}, which is newer than this program. "
            "Upgrade forebay, or restore a backup of the database that this version made."
        )
    command.upgrade(config, "head")

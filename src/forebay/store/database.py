"""The database: SQLite or PostgreSQL behind one door, its schema brought up to date when it is opened.

It refuses to know what is stored: tables and statements are kept beside their nouns.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from typing import Self, TypeAlias, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import NullPool

from forebay.clock import Clock, SystemClock
from forebay.config import Settings
from forebay.errors import StoreUnavailable
from forebay.store.connections import (
    APPLICATION,
    IDLE_SECONDS,
    READ,
    available,
    connect,
    connect_writer,
    driver_errors,
    is_sqlite,
    opening,
    parse,
)
from forebay.store.schema import upgrade
from forebay.store.signals import PostgresEar, Signals, tell_others
from forebay.store.writer import Writer

_POOL_CONNECTIONS = 8
_POOL_SECONDS = 10
_SKEW_SECONDS = 60  # how long a comparison of clocks is good for
_SKEW_SECONDS_MIN = 0.1  # a smaller difference may be the network's
_DATABASE_TIME = sa.text("SELECT extract(epoch FROM clock_timestamp())::float8")
# The driver has a statement parsed, and sends what belongs to it when that is answered. A process that stands still in
# between has a session that is not idle to PostgreSQL, however long it holds its locks.
_CUT_OFF = sa.text(
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database()"
    " AND usename = current_user AND application_name = :application AND backend_type = 'client backend'"
    " AND state = 'active' AND wait_event = 'ClientRead'"
    " AND state_change < clock_timestamp() - make_interval(secs => :seconds)"
)
_CHANNELS = "forebay_channels"  # the execution option that holds whom a transaction wakes when it commits

Transaction: TypeAlias = AsyncConnection  # what `begin` and `read` give, for rooms that do not know the library
T = TypeVar("T")


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
            self._writer = Writer(connect_writer(engine.url), _CHANNELS, self._signals.wake)
            self._writing = asyncio.create_task(self._writer.run())

    @classmethod
    async def open(cls, settings: Settings) -> Self:
        """Create what is missing, migrate to the newest schema, connect, and compare clocks.

        Any number of processes may do this at once. Raises SetupError with the remedy; the message has no password.
        """
        await upgrade(settings)
        url = parse(settings.database_address)
        database = cls(connect(url, pool_size=_POOL_CONNECTIONS, max_overflow=0, pool_timeout=_POOL_SECONDS))
        if not database.is_sqlite:
            with opening(url):
                async with database.read():  # compares the clocks
                    pass
        return database

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file, which other processes may write to without a word to this one."""
        return is_sqlite(self._engine.url)

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
        async with available():
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
            async with available():
                return await self._writer.write(function)
        async with self.begin() as transaction:
            return await transaction.run_sync(function)

    async def cut_off_standing(self) -> int:
        """End the sessions of processes that stand still in the middle of a statement; how many there were."""
        if self.is_sqlite:
            return 0
        async with self.begin() as transaction:
            values = {"application": APPLICATION, "seconds": IDLE_SECONDS}
            return int(await transaction.scalar(_CUT_OFF, values) or 0)

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
            engine = connect(self._engine.url, poolclass=NullPool)
            self._ear = asyncio.create_task(PostgresEar(engine, self._signals, driver_errors()).run())
        return self._signals.listen(channel)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Transaction]:
        """A transaction that only reads; on SQLite it never waits for a writer."""
        async with self._connection() as connection, available():
            await connection.execution_options(**READ)
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
        async with AsyncExitStack() as held:
            held.callback(self._places.release)
            try:
                # Its own way out goes on to its end, however often the caller is cut off there.
                connection = await held.enter_async_context(self._engine.connect())
            except (SQLAlchemyError, OSError) as error:  # whatever it is: without a connection there is no database
                raise StoreUnavailable from error
            yield connection


def delete_some(table: sa.Table, *conditions: sa.ColumnElement[bool], limit: int) -> sa.Delete:
    """Delete rows that meet the conditions, so many at most.

    They are asked of the row itself once more: on PostgreSQL somebody may renew it while this waits for it.
    """
    key = tuple(table.primary_key)
    some = sa.select(*key).where(*conditions).limit(limit)
    return sa.delete(table).where(sa.tuple_(*key).in_(some), *conditions)

"""How a database is addressed and connected to, and what the trouble that it reports means.

It refuses to show a password, and to know what is stored.
"""

import importlib
import importlib.util
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from forebay.errors import InsufficientStorage, InvalidRequest, SetupError, StoreUnavailable
from forebay.store import sqlite

APPLICATION = "forebay"  # what our sessions are called in PostgreSQL
READ = {"forebay_read": True}  # the execution option of a transaction that only reads
_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
_CONNECT_SECONDS = 5
_STATEMENT_SECONDS = 30
IDLE_SECONDS = 5  # in a transaction: a process that stands still must not hold its locks against the others
_LOCK_SECONDS = 4  # shorter, or the statements of such a process that wait for its own locks would get them in turn
# PostgreSQL's SQLSTATE, from the front: connection lost, clash with another transaction, resources, operator, system;
# a standby that takes no writes; a transaction that stood still; a lock that was not to be had.
_PASSING_STATES = ("08", "40", "53", "57", "58", "25006", "25P03", "55P03")
_DISK_FULL_STATE = "53100"
_NUL_STATE = "22021"  # PostgreSQL keeps no text with the character NUL; SQLite does


def parse(address: str) -> URL:
    """The address of a database that there is support for. Raises SetupError."""
    try:
        url = make_url(address)
    except ArgumentError:
        raise SetupError("The database URL cannot be read. Write it as postgresql+asyncpg://user@host/name.") from None
    family = url.drivername.partition("+")[0]
    if family not in _DRIVERS or url.drivername not in (family, _DRIVERS[family]):
        raise SetupError(f"There is no support for `{url.drivername}` databases. Use postgresql+asyncpg:// or SQLite.")
    url = url.set(drivername=_DRIVERS[family])
    if is_sqlite(url) and url.database in (None, "", ":memory:"):
        raise SetupError("A SQLite database has to be a file. Write it as sqlite+aiosqlite:///path/to/file.db.")
    if not is_sqlite(url) and importlib.util.find_spec("asyncpg") is None:
        raise SetupError("PostgreSQL needs a driver that is not installed. Run `pip install 'forebay[postgres]'`.")
    return url


def is_sqlite(url: URL) -> bool:
    """Whether it is a file of ours."""
    return url.get_backend_name() == "sqlite"


def shown(url: URL) -> str:
    """The address without user, password and options."""
    return URL.create(
        url.drivername.partition("+")[0], host=url.host, port=url.port, database=url.database
    ).render_as_string()


def reason(url: URL, error: BaseException) -> str:
    """What went wrong, on one line and without secrets."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    text = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
    secrets = [str(url.password or ""), *(str(value) for value in url.query.values())]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text


@contextmanager
def opening(url: URL) -> Iterator[None]:
    """Turn what goes wrong inside into a SetupError with the remedy; the message has no password."""
    try:
        yield
    except (SQLAlchemyError, OSError, TimeoutError, StoreUnavailable) as error:
        raise SetupError(
            f"The database {shown(url)} cannot be opened: {reason(url, error)}. "
            "Check FOREBAY_DATABASE_URL and FOREBAY_DATA_DIR, and that the database is running."
        ) from None


@asynccontextmanager
async def available() -> AsyncIterator[None]:
    """Turn what the driver says of a database that is away or full into StoreUnavailable or InsufficientStorage.

    What no text of the database can hold becomes InvalidRequest: it can only come from a caller.
    """
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        state = str(getattr(cause, "sqlstate", None) or "")
        if sqlite.is_full(cause) or state == _DISK_FULL_STATE:
            raise InsufficientStorage from error
        if state == _NUL_STATE:
            raise InvalidRequest("A text has the character NUL, which cannot be kept. Leave it out.") from error
        if isinstance(error, (OperationalError, InterfaceError, PoolTimeout)) or state.startswith(_PASSING_STATES):
            raise StoreUnavailable from error
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            raise StoreUnavailable from error
        raise


def connect(url: URL, **options: Any) -> AsyncEngine:
    """An engine whose transactions stand for themselves."""
    if is_sqlite(url):
        arguments: dict[str, Any] = {"async_creator_fn": sqlite.ThreadConnection, "timeout": sqlite.BUSY_SECONDS}
        engine = create_async_engine(url, hide_parameters=True, connect_args=arguments, **options)
        sa.event.listen(engine.sync_engine, "connect", sqlite.prepare)
        sa.event.listen(engine.sync_engine, "begin", _begin_sqlite)
        return engine
    session = {
        "application_name": APPLICATION,
        "idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s",
        "lock_timeout": f"{_LOCK_SECONDS}s",
    }
    arguments = {"timeout": _CONNECT_SECONDS, "command_timeout": _STATEMENT_SECONDS, "server_settings": session}
    engine = create_async_engine(url, hide_parameters=True, pool_pre_ping=True, connect_args=arguments, **options)
    sa.event.listen(engine.sync_engine, "handle_error", _name_silence)
    return engine


def connect_writer(url: URL) -> AsyncEngine:
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


def driver_errors() -> tuple[type[Exception], ...]:
    """What PostgreSQL's driver raises when it is used without the library."""
    asyncpg = importlib.import_module("asyncpg")
    return asyncpg.PostgresError, asyncpg.InterfaceError

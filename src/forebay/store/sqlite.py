"""SQLite as a file that one process reads on many connections and writes on one, and how its trouble is told apart.

It refuses to decide who writes when: that is the writer's business.
"""

import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite
import sqlalchemy as sa
from sqlalchemy.util import greenlet_spawn

BUSY_SECONDS = 5
DRIVER_ERRORS = (sqlite3.Error, ValueError)  # ValueError: aiosqlite's word for a connection that is closed
_WAL_PAGES = 1000  # after so many the log is carried over into the database
_WAL_BYTES_MAX = 64 * 2**20  # what is left of the log afterwards, and where the writer presses for it
_WAL_PATIENCE_MILLISECONDS = 200
_CHUNK_ROWS = 64
_MEMBER = "member"
_EXECUTES = {"execute", "executemany", "executescript"}

T = TypeVar("T")


def prepare(connection: Any, _record: object) -> None:
    """Set up a new connection: durable, foreign keys held, a log of bounded size."""
    connection.isolation_level = None  # so that the driver begins no transaction behind our back
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # NORMAL may lose acknowledged commits in a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
    cursor.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES_MAX}")
    cursor.close()


def prepare_writer(connection: Any, _record: object) -> None:
    """The writer waits for the lock by asking again and again: it is away less often than it is held."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout = 0")
    cursor.close()


def keep_connection(context: sa.ExceptionContext) -> None:
    """A cancelled caller has not broken the connection that it shares: its statement ends, and is rolled back."""
    if not isinstance(context.original_exception, Exception):
        context.is_disconnect = False


def is_busy(error: BaseException) -> bool:
    """Whether another process holds the lock."""
    return _primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_full(error: BaseException) -> bool:
    """Whether there is no space left."""
    return _primary_code(error) == sqlite3.SQLITE_FULL


def _primary_code(error: BaseException) -> int:
    return int(getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def copy(source: Path, target: Path) -> None:
    """Copy a database that others may be writing to, as it is at one moment. Blocks. The copy is not flushed.

    All pages are read in one transaction: page by page, a busy writer would make it begin again and again.
    """
    address = f"{source.resolve().as_uri()}?mode=rw"
    with closing(sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)) as reads:
        reads.execute("PRAGMA query_only = ON")
        with closing(sqlite3.connect(target)) as writes:
            writes.execute("PRAGMA journal_mode = OFF")
            writes.execute("PRAGMA synchronous = OFF")
            reads.backup(writes)


class ThreadConnection(aiosqlite.Connection):
    """A connection with a thread of its own, to which only calls go that may touch the disk.

    A hop to the thread and back costs more than most statements. Opening and closing a cursor touches memory alone,
    so that is done on the spot, unless the thread is still at work for a caller that was cancelled meanwhile.
    """

    def __init__(self, path: str, **options: Any) -> None:
        super().__init__(partial(self._open, path, options), _CHUNK_ROWS)
        self._thread.daemon = True  # nobody waits for it when the process ends
        self._thread_id = 0
        self._asked = 0  # counted by the callers
        self._answered = 0  # counted by the thread

    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        on_the_spot = self._asked == self._answered and self._connection is not None and self._is_light(fn)
        if on_the_spot or threading.get_ident() == self._thread_id:
            return self._call(fn, *args, **kwargs)
        self._asked += 1
        return await super()._execute(self._call_counted, fn, *args, **kwargs)  # type: ignore[no-untyped-call]

    def _open(self, path: str, options: dict[str, Any]) -> sqlite3.Connection:
        self._thread_id = threading.get_ident()
        connection: sqlite3.Connection = sqlite3.connect(path, **{**options, "check_same_thread": False})
        return connection

    def _is_light(self, function: Callable[..., Any]) -> bool:
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        return name == "cursor" or (name == "close" and isinstance(owner, sqlite3.Cursor))

    def _call_counted(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return self._call(function, *args, **kwargs)
        finally:
            self._answered += 1

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


class GroupConnection(ThreadConnection):
    """The writer's connection. Callers come in turn, as members of one transaction.

    A member's `commit` and `rollback` end its savepoint; only `commit_group` and `rollback_group` end the transaction.
    Methods that are not coroutines belong to the connection's thread, and `run` calls them there. On that thread the
    coroutines do not wait either, so that a whole row of functions runs in one hop.
    """

    def __init__(self, path: str, **options: Any) -> None:
        super().__init__(path, **options)
        self._log = f"{os.path.realpath(path)}-wal"  # SQLite follows links as well
        self._log_bytes_max = _WAL_BYTES_MAX
        self._in_group = False
        self._in_member = False
        self.lost: Exception | None = None  # why SQLite has rolled back the whole transaction

    async def run(self, function: Callable[[], T]) -> T:
        """Call `function` on the connection's thread."""
        result: T = await self._execute(function)
        return result

    async def commit(self) -> None:
        """Keep what the member has written, for the group's commit."""
        await self._execute(self._release)

    async def rollback(self) -> None:
        """Undo what the member has written."""
        await self._execute(self._undo)

    def _is_light(self, function: Callable[..., Any]) -> bool:
        # Savepoints of a transaction that has begun are kept in memory.
        return function in (self.begin_member, self._release) or super()._is_light(function)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A full disk may end the whole transaction; what comes after it must not be committed one by one."""
        if self.lost is not None and getattr(function, "__name__", "") in _EXECUTES:
            raise sqlite3.OperationalError("The transaction is gone.") from self.lost
        try:
            return function(*args, **kwargs)
        except sqlite3.Error as error:
            if self._in_group and self.lost is None and not self._conn.in_transaction:
                self.lost = error
            raise

    def begin_group(self) -> None:
        """Begin the transaction. Raises sqlite3.OperationalError at once if another process has the lock."""
        self.lost, self._in_member = None, False
        self._conn.execute("BEGIN IMMEDIATE")
        self._in_group = True

    def begin_member(self) -> None:
        """Begin the savepoint of the next member."""
        self._undo()  # of a member that was cancelled between its turn and its block
        self._check()
        self._conn.execute(f"SAVEPOINT {_MEMBER}")
        self._in_member = True

    def commit_group(self) -> None:
        """Put what all members have written on disk."""
        self._undo()
        self._check()
        self._conn.execute("COMMIT")
        self._in_group = False
        self._bound_log()

    def rollback_group(self) -> None:
        """Undo what all members have written."""
        self._in_group = self._in_member = False
        self.lost = None
        if self._conn.in_transaction:
            self._conn.execute("ROLLBACK")

    def run_here(self, function: Callable[[], T]) -> T:
        """Call a function that uses this connection through the library, on this thread and without waiting."""
        coroutine = greenlet_spawn(function)
        try:
            coroutine.send(None)
        except StopIteration as end:
            result: T = end.value
            return result
        coroutine.close()
        raise sqlite3.InterfaceError("A function on the writer's thread waited. This is a bug.")

    def _release(self) -> None:
        self._check()
        if self._in_member:
            self._conn.execute(f"RELEASE {_MEMBER}")
            self._in_member = False

    def _undo(self) -> None:
        if self._in_member and self.lost is None:
            self._conn.execute(f"ROLLBACK TO {_MEMBER}")
            self._conn.execute(f"RELEASE {_MEMBER}")
        self._in_member = False

    def _check(self) -> None:
        if self.lost is None and not self._conn.in_transaction:
            self.lost = sqlite3.OperationalError("A statement has ended the transaction.")
        if self.lost is not None:
            raise self.lost

    def _bound_log(self) -> None:
        """Readers that never all pause keep the log growing; then the writer waits for them a little."""
        try:
            size = os.path.getsize(self._log)
        except OSError:  # somebody has removed it: what the group wrote is kept all the same
            return
        if size <= _WAL_BYTES_MAX:
            self._log_bytes_max = _WAL_BYTES_MAX
        if size <= self._log_bytes_max:
            return
        self._conn.execute(f"PRAGMA busy_timeout = {_WAL_PATIENCE_MILLISECONDS}")
        blocked = self._conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        self._conn.execute("PRAGMA busy_timeout = 0")
        self._log_bytes_max = 2 * size if blocked else _WAL_BYTES_MAX

"""The one writer of a SQLite database: callers who come at the same time share one commit.

A commit to disk takes as long for a hundred changes as for one. So callers take turns inside one transaction, each in
a savepoint of its own, and all of them are answered after the one COMMIT that put everything on disk. The price:
inside the group a caller sees what those before it have written although it is not on disk yet. Outside of it nobody
does, and if the COMMIT fails, every caller of the group gets the error.

It refuses to hurry anybody: a block that dawdles holds up all who come after it, so a block does nothing but SQL.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from forebay.errors import InsufficientStorage, ServerError, StoreUnavailable
from forebay.store.sqlite import BUSY_SECONDS, DRIVER_ERRORS, GroupConnection, is_busy, is_full

_GROUP_MEMBERS_MAX = 128
_GROUP_SECONDS = 0.01  # then a group takes nobody else in
_TURN_SECONDS = 30  # the longest wait for those before
_LINE_MAX = 20_000
_ASK_SECONDS = 0.004  # between two attempts to get the lock from another process

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Member:
    """A caller in line. `settled` is its answer; the group's commit comes before it."""

    entered: float
    channels: set[str]
    settled: "asyncio.Future[Any]"
    kept: bool = False  # its savepoint was released

    def fail(self, error: ServerError) -> None:
        if not self.settled.done():
            self.settled.set_exception(error)


@dataclass(slots=True, eq=False)
class _Block(_Member):
    """A caller that works in its own coroutine: the writer grants it the connection and waits for its end."""

    granted: "asyncio.Future[None]" = field(default_factory=asyncio.Future)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def fail(self, error: ServerError) -> None:
        if not self.granted.done():
            self.granted.set_exception(error)
        elif self.kept:
            super(_Block, self).fail(error)


@dataclass(slots=True, eq=False)
class _Call(_Member):
    """A caller that has handed over a function for the writer's thread."""

    function: Callable[[sa.Connection], Any] = field(kw_only=True)
    result: Any = None
    error: BaseException | None = None


class Writer:
    """Owns the connection that writes. `run` is its only user; everybody else waits in line."""

    def __init__(self, engine: AsyncEngine, channels_option: str, wake: Callable[[Iterable[str]], None]) -> None:
        self._engine = engine
        self._channels_option = channels_option
        self._wake = wake
        self._line: deque[_Member] = deque()
        self._members: list[_Member] = []
        self._arrival = asyncio.Event()
        self._closed = False
        self.commits = 0

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """A turn at writing; see `Database.begin`."""
        loop = asyncio.get_running_loop()
        block = _Block(loop.time(), set(), loop.create_future())
        self._enter(block)
        try:
            await self._until_granted(block)
            connection = await self._engine.connect()
            try:
                await connection.execution_options(**{self._channels_option: block.channels})
                async with connection.begin():
                    yield connection
                block.kept = True
            finally:
                await connection.close()
        finally:
            block.granted.cancel()
            block.ended.set()
        if self._closed:
            raise StoreUnavailable
        await block.settled

    async def write(self, function: Callable[[sa.Connection], T]) -> T:
        """A turn at writing for a function; see `Database.write`."""
        loop = asyncio.get_running_loop()
        call = _Call(loop.time(), set(), loop.create_future(), function=function)
        self._enter(call)
        result: T = await call.settled
        return result

    async def run(self) -> None:
        """Serve the line until cancelled; whoever is still in it is told."""
        try:
            while True:
                await self._arrival.wait()
                self._arrival.clear()
                while self._line:
                    await self._group()
        finally:
            self._closed = True
            self._fail([*self._members, *self._line], None)
            self._line.clear()
            await self._engine.dispose()

    def _enter(self, member: _Member) -> None:
        if self._closed or len(self._line) >= _LINE_MAX:
            raise StoreUnavailable
        self._line.append(member)
        self._arrival.set()

    async def _until_granted(self, block: _Block) -> None:
        try:
            async with asyncio.timeout(_TURN_SECONDS):
                await block.granted
        except TimeoutError as error:
            raise StoreUnavailable from error

    async def _group(self) -> None:
        """Serve some of the line in one transaction and answer them."""
        connection = await self._begin()
        if connection is None:
            return
        self._members = []
        try:
            await self._serve(connection)
            await connection.run(connection.commit_group)
        except DRIVER_ERRORS as error:
            await self._give_up(connection)
            self._fail(self._members, error)
        else:
            self.commits += 1
            self._settle()
        self._members = []

    async def _begin(self) -> GroupConnection | None:
        """The connection with a transaction begun; None when nobody in line could wait so long."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        while self._line:
            try:
                connection = await self._connect()
                await connection.run(connection.begin_group)
                return connection
            except (SQLAlchemyError, *DRIVER_ERRORS) as error:
                cause = getattr(error, "orig", None) or error
                patience = BUSY_SECONDS if is_busy(cause) else 0
                if not patience:
                    await self._engine.dispose()
                late = [member for member in self._line if loop.time() >= max(member.entered, started) + patience]
                self._line = deque(member for member in self._line if member not in set(late))
                self._fail(late, cause)
            await asyncio.sleep(_ASK_SECONDS)
        return None

    async def _connect(self) -> GroupConnection:
        async with self._engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
        assert isinstance(driver, GroupConnection)
        return driver

    async def _serve(self, connection: GroupConnection) -> None:
        loop = asyncio.get_running_loop()
        ends = loop.time() + _GROUP_SECONDS
        while self._line and len(self._members) < _GROUP_MEMBERS_MAX and connection.lost is None:
            if isinstance(self._line[0], _Call):
                calls = self._take_calls()
                self._members += calls
                await connection.run(partial(connection.run_here, partial(self._run_calls, connection, calls)))
            else:
                await self._serve_block(connection)
            if loop.time() > ends:
                return

    async def _serve_block(self, connection: GroupConnection) -> None:
        block = self._line.popleft()
        assert isinstance(block, _Block)
        if block.granted.done():  # its caller has gone
            return
        self._members.append(block)
        await connection.run(connection.begin_member)
        if not block.granted.done():
            block.granted.set_result(None)
        await block.ended.wait()

    def _take_calls(self) -> list[_Call]:
        calls: list[_Call] = []
        while self._line and len(self._members) + len(calls) < _GROUP_MEMBERS_MAX:
            call = self._line[0]
            if not isinstance(call, _Call):
                break
            self._line.popleft()
            if not call.settled.done():
                calls.append(call)
        return calls

    def _run_calls(self, connection: GroupConnection, calls: list[_Call]) -> None:
        """On the writer's thread: each function in its savepoint; what one raises is for its caller alone."""
        for call in calls:
            connection.begin_member()
            try:
                with self._engine.sync_engine.connect() as member:
                    member = member.execution_options(**{self._channels_option: call.channels})
                    with member.begin():
                        call.result = call.function(member)
                call.kept = True
            except BaseException as error:  # noqa: BLE001  # it is raised again where it belongs, at the caller
                call.error = error

    async def _give_up(self, connection: GroupConnection) -> None:
        """Undo the group, and go on with a new connection: this one has seen trouble."""
        try:
            await connection.run(connection.rollback_group)
        except DRIVER_ERRORS:
            pass  # closing it undoes the same
        await self._engine.dispose()

    def _settle(self) -> None:
        for member in self._members:
            if member.kept:
                self._wake(member.channels)
            if member.settled.done():
                continue
            if isinstance(member, _Call) and member.error is not None:
                member.settled.set_exception(member.error)
            elif isinstance(member, _Call):
                member.settled.set_result(member.result)
            elif member.kept:
                member.settled.set_result(None)

    def _fail(self, members: Iterable[_Member], cause: BaseException | None) -> None:
        for member in members:
            error = InsufficientStorage() if cause is not None and is_full(cause) else StoreUnavailable()
            error.__cause__ = cause
            member.fail(error)

"""Programs that work on what strangers sent: started when one is needed, asked one thing at a time, ended when they hang.

It refuses to let a program or its child go on once nobody waits for what it does, and to blame a caller for one that
somebody else has killed.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from subprocess import DEVNULL
from typing import Any, Generic, Protocol, TypeVar

from forebay.clock import Clock
from forebay.config import environment_for_others
from forebay.errors import ServerError, ShuttingDown

_GRACE_SECONDS = 2.0


class Program(Protocol):
    """One running program."""

    @property
    def lives(self) -> bool:
        """Whether it has not ended, as far as is known."""
        ...

    def kill(self) -> None:
        """End it, and the child that works for it; whoever waits for its answer is told."""
        ...

    async def wait(self) -> None:
        """Wait until it has ended."""
        ...


P = TypeVar("P", bound=Program)
T = TypeVar("T")


class Places:
    """Places for work, of which batches leave one to the front door, where there is more than one."""

    def __init__(self, count: int) -> None:
        self._all = asyncio.Semaphore(count)
        self._patient = asyncio.Semaphore(max(1, count - 1))

    @contextlib.asynccontextmanager
    async def one(self, *, patient: bool) -> AsyncIterator[None]:
        """Hold one as long as the block lasts."""
        async with self._patient if patient else contextlib.nullcontext(), self._all:
            yield


class Programs(Generic[P]):
    """All programs of one kind; each is asked by one caller at a time, and kept for the next.

    `start` starts one, `seconds_max` is the processor time for one question, and `failed` what a caller is told when two
    programs have died of it, or when none can be started.
    """

    def __init__(self, start: Callable[[], Awaitable[P]], seconds_max: int, failed: str, clock: Clock) -> None:
        self._start = start
        self._seconds_max = seconds_max
        self._failed = failed
        self._clock = clock
        self._closed = False
        self.idle: list[P] = []
        self.busy: set[P] = set()

    async def close(self) -> None:
        """End every program, whatever it is at, and start none."""
        self._closed = True
        programs = [*self.idle, *self.busy]
        self.idle.clear()
        for program in programs:
            program.kill()
        for program in programs:
            await program.wait()

    async def ask(self, question: Callable[[P], Awaitable[T]]) -> T | None:
        """What `question` finds out; None if that takes too long. It raises OSError for a program that has died.

        Raises ServerError, ShuttingDown, and whatever else `question` does.
        """
        for program in (self._take(), None):  # one that was killed by somebody else is nobody's mistake, once
            if self._closed:
                raise ShuttingDown
            with contextlib.suppress(OSError):
                return await self._ask(program or await self._started(), question)
        raise ServerError(self._failed)

    async def _started(self) -> P:
        try:
            return await self._start()
        except OSError:
            raise ServerError(self._failed) from None

    async def _ask(self, program: P, question: Callable[[P], Awaitable[T]]) -> T | None:
        """One that has not answered is ended."""
        self.busy.add(program)
        whole = False
        try:
            async with self._clock.timeout(2 * self._seconds_max + _GRACE_SECONDS):
                answer = await question(program)
            whole = True
        except TimeoutError:
            return None
        finally:
            self.busy.discard(program)
            if whole:
                self.idle.append(program)
            else:
                program.kill()
        return answer

    def _take(self) -> P | None:
        """One that is idle, and has not died of something else meanwhile."""
        while self.idle:
            program = self.idle.pop()
            if program.lives:
                return program
            program.kill()
        return None


class SocketProgram:
    """A program at the other end of a socket, over which it is handed descriptors."""

    def __init__(self, process: asyncio.subprocess.Process, ours: socket.socket) -> None:
        self._process = process
        self._socket = ours
        self._asked = False

    @property
    def lives(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return self._process.returncode is None

    async def ask(self, question: bytes, descriptors: Sequence[int]) -> AsyncGenerator[bytes, None]:
        """What it says, piece by piece, until it ends or the caller has heard enough. Raises OSError if it has ended."""
        socket.send_fds(self._socket, [question], descriptors)
        loop = asyncio.get_running_loop()
        self._asked = True
        try:
            while said := await loop.sock_recv(self._socket, 4096):
                yield said
        finally:
            self._asked = False

    def kill(self) -> None:
        """End it, and the child that works for it; whoever waits for its answer is told."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if not self._asked:
            self._socket.close()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def wait(self) -> None:
        """Wait until it has ended."""
        await self._process.wait()


async def connect(module: str, limits: Mapping[str, Any]) -> SocketProgram:
    """Start `module` with its standard input as the socket. Raises OSError."""
    ours, its = socket.socketpair()
    try:
        ours.setblocking(False)
        return SocketProgram(await launch(module, limits, stdin=its.fileno(), stdout=DEVNULL), ours)
    except BaseException:
        ours.close()
        raise
    finally:
        its.close()


async def launch(module: str, limits: Mapping[str, Any], *, stdin: int, stdout: int) -> asyncio.subprocess.Process:
    """Start `module`, in a session of its own and with little of our environment. Raises OSError.

    It may end with the thread that calls this, as the kernel takes that for its parent: it has to be the main one.
    """
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module, json.dumps(limits), str(os.getpid())),
        stdin=stdin,
        stdout=stdout,
        env=environment_for_others(),
        start_new_session=True,
    )

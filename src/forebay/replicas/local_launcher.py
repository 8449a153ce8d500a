"""Starts engine processes on this machine, each under a guard that ends it when this server ends.

It refuses to hand an engine the server's own secrets: the environment is stripped of every `FOREBAY_*` variable.
"""

import asyncio
import contextlib
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import forebay
from forebay.errors import EngineUnavailable, SetupError
from forebay.replicas.launcher import ANNOUNCEMENT, EngineCommand

_GUARD = Path(forebay.__file__).parent / "engines" / "guard.py"
_READ_BYTES = 16_384
_PIPE_GRACE_SECONDS = 1.0
_PAUSE, _RESUME = b"P", b"R"  # as the guard knows them
_LEASH_SECONDS = 4.0  # the guard itself needs two at most


class LocalProcess:
    """An engine under its guard. The guard's standard input is the leash: a pull pauses the engine, closing it kills it."""

    def __init__(
        self,
        guard: asyncio.subprocess.Process,
        address: str | None,
        on_line: Callable[[str], None],
        lines_max: int,
        line_bytes_max: int,
    ) -> None:
        self._guard = guard
        self._on_line = on_line
        self._line_bytes_max = line_bytes_max
        self._lines: deque[str] = deque(maxlen=lines_max)
        self._last_resort: asyncio.TimerHandle | None = None
        self._address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if address:
            self._address.set_result(address)
        assert guard.stdout is not None
        assert guard.stderr is not None
        self._readers = [
            asyncio.create_task(self._read(guard.stdout, announces=True)),
            asyncio.create_task(self._read(guard.stderr, announces=False)),
        ]
        self._end = asyncio.create_task(self._watch())

    @property
    def pid(self) -> int:
        """Process id of the guard."""
        return self._guard.pid

    async def address(self) -> str:
        """Wait until the engine says where it listens."""
        either: set[asyncio.Future[Any]] = {self._address, self._end}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._address.done():
            return self._address.result()
        raise EngineUnavailable("The engine ended before it listened.")

    async def wait(self) -> int:
        """Wait for the end; the exit code, or minus the signal."""
        return await asyncio.shield(self._end)

    def tail(self) -> tuple[str, ...]:
        """The last lines that it printed."""
        return tuple(self._lines)

    def pause(self) -> None:
        """Stop it where it is, and all its children."""
        self._say(_PAUSE)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self._say(_RESUME)

    def terminate(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(ProcessLookupError):
            self._guard.terminate()

    def kill(self) -> None:
        """Let go of the leash: the guard kills the whole process group. One that does not even do that goes first."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        if self._last_resort is None and self._guard.returncode is None:
            self._last_resort = asyncio.get_running_loop().call_later(_LEASH_SECONDS, self._kill_guard)

    def _say(self, word: bytes) -> None:
        leash = self._guard.stdin
        if leash is not None and not leash.is_closing() and self._guard.returncode is None:
            leash.write(word)

    def _kill_guard(self) -> None:
        """It is stopped, or waits for an engine that hangs inside the kernel; the kernel kills its child with it."""
        with contextlib.suppress(ProcessLookupError):
            self._guard.kill()

    async def _watch(self) -> int:
        code = await self._guard.wait()
        self.kill()
        if self._last_resort is not None:
            self._last_resort.cancel()
        # A stray grandchild may hold the pipes open; its lines are not worth waiting for.
        await asyncio.wait(self._readers, timeout=_PIPE_GRACE_SECONDS)
        for reader in self._readers:
            reader.cancel()
        return code

    async def _read(self, stream: asyncio.StreamReader, *, announces: bool) -> None:
        rest = b""
        while data := await stream.read(_READ_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[: self._line_bytes_max]
            for line in lines:
                self._take(line[: self._line_bytes_max].decode("utf-8", "replace").rstrip(), announces=announces)
        if rest:
            self._take(rest.decode("utf-8", "replace").rstrip(), announces=announces)

    def _take(self, line: str, *, announces: bool) -> None:
        if announces and line.startswith(ANNOUNCEMENT):
            if not self._address.done():
                self._address.set_result(line.removeprefix(ANNOUNCEMENT).strip())
            return
        if line:
            self._lines.append(line)
            self._on_line(line)


class LocalLauncher:
    """Starts engines as child processes."""

    def __init__(self, environment: Mapping[str, str], lines_max: int, line_bytes_max: int) -> None:
        self._environment = {key: value for key, value in environment.items() if not key.startswith("FOREBAY_")}
        self._lines_max = lines_max
        self._line_bytes_max = line_bytes_max

    async def launch(self, command: EngineCommand, on_line: Callable[[str], None]) -> LocalProcess:
        """Start `command` under a guard, in a session of its own so that a terminal's Ctrl-C does not reach it."""
        pipe = asyncio.subprocess.PIPE
        try:
            guard = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_GUARD), "--", *command.argv),
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env={**self._environment, **command.environment},
                start_new_session=True,
            )
        except OSError as error:
            raise SetupError(f"The engine process cannot be started: {error.strerror}.") from None
        return LocalProcess(guard, command.address, on_line, self._lines_max, self._line_bytes_max)

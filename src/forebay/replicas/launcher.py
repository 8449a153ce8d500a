"""The port through which engine processes are started, here or on another machine.

It refuses to know what an engine is: it sees a command, an address and an exit status.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

EXIT_OUT_OF_MEMORY = 86
EXIT_WRONG_SETUP = 78
ANNOUNCEMENT = "FOREBAY_ENGINE_LISTENING "


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """What to run. With `address` None the program prints ANNOUNCEMENT and its address once it listens."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    address: str | None = None


class EngineProcess(Protocol):
    """A running engine process. It ends when this server does, however this server ends."""

    @property
    def pid(self) -> int:
        """Process id of the guard that holds the engine."""
        ...

    async def address(self) -> str:
        """Wait until the engine says where it listens. Raises EngineUnavailable if it exits first."""
        ...

    async def wait(self) -> int:
        """Wait for the end; the exit code, or minus the signal. May be awaited by several callers."""
        ...

    def tail(self) -> tuple[str, ...]:
        """The last lines that it printed."""
        ...

    def pause(self) -> None:
        """Stop it where it is, and all its children: they compute nothing until `resume`. Does not wait for that."""
        ...

    def resume(self) -> None:
        """Let it go on after `pause`."""
        ...

    def terminate(self) -> None:
        """Ask it to end (SIGTERM), also while it is paused."""
        ...

    def kill(self) -> None:
        """End it and all its children now."""
        ...


class Launcher(Protocol):
    """Starts engine processes."""

    async def launch(self, command: EngineCommand, on_line: Callable[[str], None]) -> EngineProcess:
        """Start `command`; `on_line` gets each line that it prints. Raises SetupError if there is no such program."""
        ...


async def end(process: EngineProcess, grace_seconds: float | None) -> int:
    """Ask it to end, and kill it after `grace_seconds`, or at once without them; its exit code."""
    if grace_seconds is not None:
        process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                return await process.wait()
    process.kill()
    return await process.wait()

"""A program on a terminal of its own: what it prints can be waited for, and keys can be pressed."""

import asyncio
import fcntl
import os
import re
import sys
import termios
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.server import eventually

CTRL_C, CTRL_D = b"\x03", b"\x04"


class Terminal:
    """The person's side. `text` is everything that was printed so far."""

    def __init__(self, process: asyncio.subprocess.Process, descriptor: int) -> None:
        self.process = process
        self.text = ""
        self._descriptor = descriptor
        self._seen = 0

    def read(self) -> None:
        """Take what the program has printed."""
        try:
            self.text += os.read(self._descriptor, 65_536).decode(errors="replace")
        except OSError:
            asyncio.get_running_loop().remove_reader(self._descriptor)

    def press(self, keys: bytes) -> None:
        """Type."""
        os.write(self._descriptor, keys)

    async def say(self, line: str) -> None:
        """Type a line."""
        self.press(line.encode() + b"\r")

    async def wait_for(self, pattern: str, within_seconds: float = 20.0) -> "re.Match[str]":
        """Wait until `pattern` is printed after what was waited for last."""

        def found() -> "re.Match[str] | None":
            return re.compile(pattern).search(self.text, self._seen)

        try:
            match: re.Match[str] = await eventually(found, within_seconds=within_seconds, what=repr(pattern))
        except AssertionError as error:
            message = f"{error}; the terminal shows:\n{self.text}"
            raise AssertionError(message) from None
        self._seen = match.end()
        return match

    async def ended(self) -> int:
        """Wait for the program's end; its status."""
        async with asyncio.timeout(20):
            return await self.process.wait()


@asynccontextmanager
async def on_terminal(*arguments: str, environment: Mapping[str, str], folder: Path) -> AsyncIterator[Terminal]:
    """Run `forebay` with `arguments` on a new terminal; it is gone after the block."""
    ours, theirs = os.openpty()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FOREBAY_", "OPENAI_"))}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "forebay.cli", *arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env={**kept, "TERM": "dumb", "PYTHONUNBUFFERED": "1", **environment},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    terminal = Terminal(process, ours)
    loop = asyncio.get_running_loop()
    loop.add_reader(ours, terminal.read)
    try:
        yield terminal
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        loop.remove_reader(ours)
        os.close(ours)

"""A program beside the server that is measured: it is asked with a line of JSON and answers with one.

It refuses to wait for ever, and to outlive the measurement.
"""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from forebay import config
from forebay.bench.processes import ended
from forebay.errors import SetupError

_ANSWER_SECONDS = 600.0
_ANSWER_BYTES_MAX = 1_048_576
_STOP_SECONDS = 10.0
_SHOWN_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Program:
    """A running one. `remedy` says what to do where it ends by itself."""

    name: str
    remedy: str
    _process: asyncio.subprocess.Process
    _said: BinaryIO

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    async def ask(self, what: Any) -> dict[str, Any]:
        """Its answer. Raises SetupError."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                process.stdin.write(json.dumps(what).encode() + b"\n")
                await process.stdin.drain()
                answer = await process.stdout.readline()
        except ConnectionError:
            answer = b""
        except TimeoutError:
            raise SetupError(f"{self.name} did not answer within {_ANSWER_SECONDS:g} s.") from None
        if not answer:
            self._said.seek(0)
            last = self._said.read().decode(errors="replace").strip()[-_SHOWN_BYTES:]
            raise SetupError(f"{self.name} ended too early. {self.remedy} It said last: {last}")
        found: dict[str, Any] = json.loads(answer)
        return found


@asynccontextmanager
async def running(command: Sequence[str], name: str, remedy: str) -> AsyncIterator[Program]:
    """Start one, without a way to a model hub, and end it. Raises SetupError."""
    kept = {name: value for name, value in config.environment().items() if not name.startswith("FOREBAY_")}
    with tempfile.TemporaryFile() as said:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                env={**kept, "HF_HUB_OFFLINE": "1"},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=said,
                limit=_ANSWER_BYTES_MAX,
            )
        except OSError as error:
            raise SetupError(f"The Python for {name} cannot be started: {error.strerror}. Check its path.") from None
        try:
            yield Program(name, remedy, process, said)
        finally:
            await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    await ended(process, _STOP_SECONDS)

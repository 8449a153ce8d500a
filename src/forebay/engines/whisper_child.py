"""The compute process of the whisper engine as its front process sees it: started, asked, killed.

It refuses to start it again by itself, and to judge why it ended: it says only how.
"""

import asyncio
import json
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forebay.engines.lived import Lived
from forebay.engines.whisper_options import Model

_LOAD_SECONDS_MAX = 900.0
_ANSWER_BYTES_MAX = 32 * 2**20


class Ended(Exception):
    """The process is no more; its exit code, or the negative number of the signal that ended it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Garbled(Exception):
    """The process said something that is no message."""


@dataclass(slots=True)
class Child:
    """One compute process that is ready, and what its model can."""

    process: asyncio.subprocess.Process
    model: Model
    killed: bool = False

    async def ask(self, head: Mapping[str, Any], data: bytes = b"") -> dict[str, Any]:
        """Have one step done; its answer. One at a time. Raises Ended."""
        assert self.process.stdin
        text = json.dumps(head).encode()
        try:
            self.process.stdin.write(struct.pack(">II", len(text), len(data)) + text)
            self.process.stdin.write(data)
            await self.process.stdin.drain()
        except (ConnectionError, RuntimeError):  # uvloop says so of a closed pipe
            raise Ended(await self.process.wait()) from None
        return await _answer(self.process)

    def kill(self) -> None:
        """End it, whatever it is doing."""
        self.killed = True
        if self.process.returncode is None:
            self.process.kill()


async def start(spec: Mapping[str, Any], lived: Lived) -> Child:
    """A new process with its model loaded. Raises Ended where it cannot."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "forebay.engines.whisper_compute", json.dumps(spec), str(os.getpid())),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    loading = asyncio.ensure_future(_answer(process))
    try:
        if not await lived.ended(loading, _LOAD_SECONDS_MAX):
            process.kill()
        told = await loading
    finally:
        loading.cancel()
    return Child(process, Model(told["multilingual"], tuple(told["languages"]), told["tokens"]))


async def _answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout
    try:
        head_bytes, data_bytes = struct.unpack(">II", await process.stdout.readexactly(8))
        if data_bytes or head_bytes > _ANSWER_BYTES_MAX:
            raise Garbled
        found: dict[str, Any] = json.loads(await process.stdout.readexactly(head_bytes))
    except (asyncio.IncompleteReadError, ConnectionError):
        raise Ended(await process.wait()) from None
    except (Garbled, ValueError):
        process.kill()
        raise Ended(await process.wait()) from None
    return found

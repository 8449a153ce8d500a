"""HTTP by hand: bytes out, an answer in, for what no client library would send."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.support.server import ADMIN_KEY

_WAIT_SECONDS = 30.0


@dataclass
class Reply:
    """One answer as it came."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        """The body, which has to be JSON."""
        return json.loads(self.body)


class Wire:
    """One connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes | str) -> None:
        """Write `data` as it is; a connection that is gone takes nothing."""
        try:
            self.writer.write(data if isinstance(data, bytes) else data.encode("latin-1"))
            await self.writer.drain()
        except ConnectionError:
            return

    async def send_slowly(self, data: bytes, bytes_per_second: int) -> None:
        """Write `data` at a rate, a twentieth of a second's worth at a time."""
        step = max(1, bytes_per_second // 20)
        for start in range(0, len(data), step):
            await self.send(data[start : start + step])
            await asyncio.sleep(0.05)

    async def reply(self, *, head_only: bool = False) -> Reply:
        """The next answer. Raises EOFError (IncompleteReadError) or ConnectionError if there is none."""
        async with asyncio.timeout(_WAIT_SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.split("\r\n")
            headers = {
                name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            reply = Reply(int(first.split(" ")[1]), headers)
            if not head_only and reply.status >= 200:
                reply.body = await self._body(headers)
            return reply

    async def rest(self) -> bytes:
        """Everything until the server closes; a reset is a close."""
        data = b""
        async with asyncio.timeout(_WAIT_SECONDS):
            try:
                while part := await self.reader.read(65536):
                    data += part
            except ConnectionError:
                pass
        return data

    async def _body(self, headers: dict[str, str]) -> bytes:
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        body = b""
        while size := int(await self.reader.readline() or b"0", 16):
            body += await self.reader.readexactly(size)
            await self.reader.readline()
        await self.reader.readline()
        return body


@asynccontextmanager
async def wire(url: str) -> AsyncIterator[Wire]:
    """A connection to the server at `url`."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()


def post(body: bytes, *headers: str, path: str = "/v1/chat/completions", key: str = ADMIN_KEY) -> bytes:
    """A POST with a length, a key, and `headers` as further lines."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body


def get(path: str = "/health", *headers: str, method: str = "GET", host: str = "x") -> bytes:
    """A request without a body."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode("latin-1")

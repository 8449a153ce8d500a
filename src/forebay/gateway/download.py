"""Bytes of a blob as an answer: whole or one range, sent as fast as they are read and no faster.

It refuses to wait for a reader who takes nothing, and to let a browser run what somebody uploaded.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from forebay.blobs.blobs import Blobs
from forebay.clock import Clock
from forebay.errors import ForebayError, InvalidRequest
from forebay.gateway.answers import error_answer
from forebay.telemetry import Log

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_PIECE_BYTES = 65_536


class Download(Response):
    """The answer that carries a blob of `size` bytes. A reader must take each piece in `stall_seconds`.

    `content_type` is for bytes that the server itself has made; nobody's upload is called more than bytes.
    """

    def __init__(
        self,
        blobs: Blobs,
        key: str,
        size: int,
        filename: str,
        stall_seconds: float,
        clock: Clock,
        content_type: str = "application/octet-stream",
    ) -> None:
        super().__init__()
        self._content_type = content_type
        self._blobs = blobs
        self._key = key
        self._size = size
        self._filename = filename
        self._stall_seconds = stall_seconds
        self._clock = clock
        self._head: Message | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. Where the store fails half-way the connection is closed short of the length that was told."""
        wanted = dict(scope["headers"]).get(b"range", b"").decode("latin-1")
        span = span_of(wanted, self._size)
        if span is None:
            wrong = InvalidRequest("The file has no such range.", code="range_not_satisfiable")
            wrong.status = 416
            await error_answer(wrong, {"content-range": f"bytes */{self._size}"})(scope, receive, send)
            return
        start, end = span
        gone = asyncio.create_task(_until_gone(receive))
        try:
            async with aclosing(self._blobs.stream(self._key, start, end - start)) as pieces:
                first = await anext(pieces, b"")  # before the head: a store that is away is still a proper error then
                self._head = self._fields(start, end)
                await self._send(send, first, pieces, gone)
        except ForebayError as error:
            if self._head is None:
                await error_answer(error)(scope, receive, send)
            else:
                Log().warning("request.failed", code=error.code, reason="The store failed in the middle of a download.")
        except TimeoutError:
            Log().warning("request.failed", code="client_closed_request", reason="The client stopped reading.")
        finally:
            gone.cancel()

    async def _send(self, send: Send, first: bytes, rest: AsyncIterator[bytes], gone: asyncio.Task[None]) -> None:
        assert self._head is not None
        await send(self._head)
        await self._pass_on(send, first)
        async for piece in rest:
            if gone.done():
                return
            await self._pass_on(send, piece)
        await send({"type": "http.response.body", "body": b""})

    async def _pass_on(self, send: Send, piece: bytes) -> None:
        for position in range(0, len(piece), _PIECE_BYTES):
            part = piece[position : position + _PIECE_BYTES]
            async with self._clock.timeout(self._stall_seconds):
                await send({"type": "http.response.body", "body": part, "more_body": True})

    def _fields(self, start: int, end: int) -> Message:
        """The message that begins the answer."""
        partial = (start, end) != (0, self._size)
        plain = re.sub(r"[^A-Za-z0-9._ -]", "_", self._filename)
        fields = {
            "content-type": self._content_type,
            "content-length": str(end - start),
            "content-disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(self._filename, safe='')}",
            "accept-ranges": "bytes",
            "x-content-type-options": "nosniff",
        }
        if partial:
            fields["content-range"] = f"bytes {start}-{end - 1}/{self._size}"
        headers = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
        return {"type": "http.response.start", "status": 206 if partial else 200, "headers": headers}


def span_of(wanted: str, size: int) -> tuple[int, int] | None:
    """The bytes that a `Range` header asks for, as (start, end); everything for one that is not understood.

    None if there are no such bytes.
    """
    match = _RANGE.fullmatch(wanted)
    if match is None or match[1] == match[2] == "":
        return 0, size
    if match[1] == "":
        last = min(int(match[2]), size)
        return (size - last, size) if last else None
    start = int(match[1])
    end = size if match[2] == "" else min(int(match[2]) + 1, size)
    if match[2] and int(match[2]) < start:
        return 0, size
    return (start, end) if start < size else None


async def _until_gone(receive: Receive) -> None:
    """Wait until the reader has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass

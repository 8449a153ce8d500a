"""A fast HTTP/1.1 client for measuring: requests as prepared bytes, answers as times and counts.

It refuses to understand answers: it sees where one begins, has content and ends, and what it counted.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from forebay.clock import SystemClock

_END_OF_CHUNKS = b"0\r\n\r\n"
_TAIL_BYTES = 4096
_HEAD_BYTES_MAX = 65_536
_CONTENT = re.compile(rb'"content": ?"[^"]')
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_PROMPT = re.compile(rb'"prompt_tokens": ?(\d+)')
_CACHED = re.compile(rb'"cached_tokens": ?(\d+)')
_WAIT_SECONDS = 120.0
_IDLE_SECONDS = 5.0  # a server closes what is idle for longer, perhaps just as a request is sent

now = SystemClock().monotonic  # the loop's own clock may count whole milliseconds only


@dataclass(slots=True)
class Reply:
    """One answer: its times in seconds, and what went wrong, if anything did."""

    sent: float
    first: float = 0.0
    ended: float = 0.0
    tokens: int = 0
    read_tokens: int = 0  # of the prompt, which the engine had not kept
    trouble: str = ""

    @property
    def seconds(self) -> float:
        """From the request to the last byte."""
        return self.ended - self.sent

    @property
    def first_token_seconds(self) -> float:
        """From the request to the first byte of content."""
        return self.first - self.sent

    @property
    def token_seconds(self) -> float:
        """From one token to the next, on average."""
        return (self.ended - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0


class Wire(asyncio.Protocol):
    """One connection, one request at a time. `counted` finds the tokens that an answer counts."""

    def __init__(self, counted: re.Pattern[bytes]) -> None:
        self.closed = False
        self._counted = counted
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._in_body = False
        self._left = -1  # bytes that the body still has; -1 when it comes in chunks
        self._tail = b""
        self._reply = Reply(0.0)
        self._whole: asyncio.Future[None] | None = None

    async def ask(self, request: bytes, sent: float) -> Reply:
        """Send `request` and wait for its whole answer. `sent` is when the caller wanted it to go."""
        assert self._transport is not None
        self._head, self._in_body, self._left, self._tail = b"", False, -1, b""
        self._reply = reply = Reply(sent)
        self._whole = self._loop.create_future()
        self._transport.write(request)
        await self._whole
        return reply

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._end("the connection was closed before the end")

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            data = self._read_head(data)
            if not self._in_body:
                return
        if not self._reply.first and _CONTENT.search(data):
            self._reply.first = now()
        self._tail = data if len(data) >= _TAIL_BYTES else (self._tail + data)[-_TAIL_BYTES:]
        if self._left < 0:
            if self._tail.endswith(_END_OF_CHUNKS):
                self._end("")
            return
        self._left -= len(data)
        if self._left <= 0:
            self._end("")

    def _read_head(self, data: bytes) -> bytes:
        """The part of `data` that is body."""
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            if len(self._head) > _HEAD_BYTES_MAX:
                self._end("the head of the answer has no end")
            return b""
        body, head = self._head[end + 4 :], self._head[:end]
        self._in_body = True
        length = _LENGTH.search(head)
        self._left = int(length[1]) if length else -1
        if head[9:12] != b"200":
            self._reply.trouble = f"status {head[9:12].decode(errors='replace')}"
        return body

    def _end(self, trouble: str) -> None:
        whole, self._whole = self._whole, None
        if whole is None or whole.done():
            return
        reply = self._reply
        reply.ended = now()
        counted = self._counted.search(self._tail)
        reply.tokens = int(counted[1]) if counted else 0
        prompt, cached = _PROMPT.search(self._tail), _CACHED.search(self._tail)
        reply.read_tokens = (int(prompt[1]) if prompt else 0) - (int(cached[1]) if cached else 0)
        reply.trouble = reply.trouble or trouble or ("" if reply.tokens else "no tokens were counted")
        whole.set_result(None)


class Target:
    """Somewhere to send requests: an address, a key, and how a prompt becomes a body there.

    `counted` is the field of the usage that counts. Without `keeps_alive` each request has a connection of its own, for an engine that closes it after an answer.
    """

    def __init__(
        self,
        name: str,
        url: str,
        key: str,
        body: Callable[[str, int, bool], bytes],
        *,
        keeps_alive: bool = True,
        path: str = "/v1/chat/completions",
        counted: str = "completion_tokens",
    ) -> None:
        self.name = name
        self._keeps_alive = keeps_alive
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._address = (parts.hostname, parts.port or 80)
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {key}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        ).encode()
        self._body = body
        self._counted = re.compile(rf'"{counted}": ?(\d+)'.encode())
        self._idle: list[tuple[Wire, float]] = []

    def request(self, prompt: str, tokens: int, *, stream: bool) -> bytes:
        """The bytes of the request for one prompt."""
        return self.post(self._body(prompt, tokens, stream))

    def post(self, body: bytes) -> bytes:
        """The bytes of a request with this body."""
        return b"%b%d\r\n\r\n%b" % (self._head, len(body), body)

    async def ask(self, request: bytes, sent: float | None = None) -> Reply:
        """Send `request` on an idle connection, or on a new one; the time to connect counts."""
        began = now() if sent is None else sent
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                wire = await self._connection()
                reply = await wire.ask(request, began)
        except (OSError, TimeoutError) as error:
            ended = now()
            return Reply(began, ended, ended, trouble=f"{self.name}: {type(error).__name__}: {error}")
        if reply.trouble:
            reply.trouble = f"{self.name}: {reply.trouble}"
        if not self._keeps_alive:
            wire.close()
        elif not wire.closed:
            self._idle.append((wire, reply.ended))
        return reply

    def close(self) -> None:
        """Close every idle connection."""
        for wire, _ in self._idle:
            wire.close()
        self._idle.clear()

    async def _connection(self) -> Wire:
        while self._idle:
            wire, since = self._idle.pop()
            if not wire.closed and now() - since < _IDLE_SECONDS:
                return wire
            wire.close()
        _, wire = await asyncio.get_running_loop().create_connection(lambda: Wire(self._counted), *self._address)
        return wire

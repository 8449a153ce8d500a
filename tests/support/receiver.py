"""Real receivers on loopback: one that answers as it is told, and a canary that counts whoever connects."""

import asyncio
import json
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.support.server import eventually


@dataclass(frozen=True)
class Received:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: bytes
    port: int

    @property
    def event(self) -> dict[str, Any]:
        """The body as JSON."""
        parsed: dict[str, Any] = json.loads(self.body)
        return parsed


@dataclass(frozen=True)
class Answer:
    """What to say: `never` says nothing at all, `drop` cuts the line, `endless` sends a body without end."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"ok"
    never: bool = False
    drop: bool = False
    endless: bool = False
    stalls: bool = False


class Receiver:
    """A web server that keeps what it gets. `answers` are given in their order; after them, `then` for ever."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.received: list[Received] = []
        self.answers: deque[Answer] = deque()
        self.then = Answer()
        self.sent_bytes = 0
        self.left = asyncio.Event()  # set when a body that never ends was cut by the other side

    async def until(self, count: int, within_seconds: float = 10) -> list[Received]:
        """Wait until `count` requests have come."""
        await eventually(
            lambda: len(self.received) >= count, within_seconds=within_seconds, what=f"{count} requests at the receiver"
        )
        return self.received

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Keep a request and answer it."""
        port = request.transport.get_extra_info("sockname")[1] if request.transport else 0
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(request.path_qs, headers, await request.read(), port))
        answer = self.answers.popleft() if self.answers else self.then
        if answer.never:
            await self._until_left(request)
        if answer.drop:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if answer.endless or answer.stalls:
            return await self._without_end(request, answer)
        return web.Response(status=answer.status, headers=answer.headers, body=answer.body)

    async def _until_left(self, request: web.Request) -> None:
        def gone() -> bool:
            return request.transport is None or request.transport.is_closing()

        try:
            await eventually(gone, within_seconds=30, what="the other side to leave")
        finally:  # or cancelled by then, which is how the server says the same
            self.left.set()

    async def _without_end(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        await response.prepare(request)
        try:
            if answer.stalls:
                await response.write(b"x")
                await self._until_left(request)
            while answer.endless:
                await response.write(b"x" * 65_536)
                self.sent_bytes += 65_536
        except (ConnectionError, asyncio.CancelledError):
            self.left.set()
        return response


@asynccontextmanager
async def receiving(
    host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Receiver]:
    """A receiver on a free port of `host`."""
    receiver = Receiver("")
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", receiver.serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, ssl_context=tls)
        await site.start()
        bound = runner.addresses[0][1]
        receiver.url = f"{'https' if tls else 'http'}://{host}:{bound}"
        yield receiver
    finally:
        await runner.cleanup()


@dataclass
class Canary:
    """Counts connections to one port of 127.0.0.1 and [::1]; there should be none."""

    port: int = 0
    connections: int = 0

    async def sing(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Somebody came."""
        self.connections += 1
        writer.close()


@asynccontextmanager
async def canary() -> AsyncIterator[Canary]:
    """A canary on every loopback address there is."""
    bird = Canary()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(await asyncio.start_server(bird.sing, "127.0.0.1", 0))
        bird.port = first.sockets[0].getsockname()[1]
        try:
            await stack.enter_async_context(await asyncio.start_server(bird.sing, "::1", bird.port))
        except OSError:
            pass  # a machine without IPv6
        yield bird

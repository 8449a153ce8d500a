"""A real HTTP server for one file, or for several by their paths, that can cut, stall, refuse, redirect and change its mind."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web


@dataclass(slots=True)
class FilesServer:
    """What it serves and how it misbehaves; a test sets these while it runs."""

    body: bytes
    etag: str | None = '"one"'
    ranges: bool = True
    status: int | None = None  # answer every request with it
    token: str | None = None  # demand it
    redirect_to: str | None = None
    cut_after: int | None = None  # close each answer after so many bytes
    stall_after: int | None = None  # stop sending after so many bytes, and never go on
    announce: bool = True  # Content-Length
    lie_range: int = 0  # add to the start that a range answer claims
    encoding: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)  # by path and query: what it has instead of the one body
    links: dict[str, str] = field(default_factory=dict)  # by path and query: the header `Link`
    url: str = ""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0
    stalled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.body).hexdigest()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.path, dict(request.headers)))
        if self.redirect_to is not None:
            return web.Response(status=302, headers={"Location": self.redirect_to})
        if self.status is not None:
            return web.Response(status=self.status)
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401)
        body = self.files.get(request.path_qs) if self.files else self.body
        return web.Response(status=404) if body is None else await self._send(request, self._start(request), body)

    def _start(self, request: web.Request) -> int:
        wanted = request.headers.get("Range")
        same = request.headers.get("If-Range", self.etag) == self.etag
        return int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted and self.ranges and same else 0

    async def _send(self, request: web.Request, start: int, body: bytes) -> web.StreamResponse:
        if start >= len(body) > 0:
            return web.Response(status=416)
        response = web.StreamResponse(status=206 if start else 200)
        if self.etag is not None:
            response.headers["ETag"] = self.etag
        if request.path_qs in self.links:
            response.headers["Link"] = self.links[request.path_qs]
        if self.encoding is not None:
            response.headers["Content-Encoding"] = self.encoding
        if start:
            claimed = start + self.lie_range
            response.headers["Content-Range"] = f"bytes {claimed}-{len(body) - 1}/{len(body)}"
        if self.announce:
            response.content_length = len(body) - start
        else:
            response.enable_chunked_encoding()
        await response.prepare(request)
        await self._write(request, response, body[start:])
        return response

    async def _write(self, request: web.Request, response: web.StreamResponse, rest: bytes) -> None:
        limit = self.cut_after if self.cut_after is not None else self.stall_after
        sending = rest if limit is None else rest[:limit]
        for position in range(0, len(sending), 65_536):
            await response.write(sending[position : position + 65_536])
            self.sent += len(sending[position : position + 65_536])
        if limit is None or limit >= len(rest):
            await response.write_eof()
        elif self.stall_after is not None:
            self.stalled.set()
            await asyncio.Event().wait()
        elif request.transport is not None:
            request.transport.close()


@asynccontextmanager
async def serve(body: bytes) -> AsyncIterator[FilesServer]:
    """Serve `body` at every path of a free port of 127.0.0.1."""
    server = FilesServer(body)
    app = web.Application()
    app.router.add_get("/{path:.*}", server.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()

"""A real S3 endpoint for the tests, and a proxy before it that refuses, fills up and falls silent."""

import asyncio
import functools
import itertools
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from moto.server import ThreadedMotoServer
from pydantic import SecretStr
from yarl import URL

from forebay.config import BlobSettings

KEY = "test-access-key"
SECRET = "test-secret-key-0123456789"
_numbers = itertools.count(1)
_HOP_HEADERS = {"transfer-encoding", "connection", "content-encoding", "content-length"}


@functools.cache
def endpoint() -> str:
    """The address of the endpoint, started on first use; its thread ends with the process."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


async def new_bucket() -> str:
    """The name of a new, empty bucket."""
    name = f"bucket-{next(_numbers)}"
    async with aiohttp.ClientSession() as session, session.put(f"{endpoint()}/{name}") as response:
        assert response.status == 200
    return name


async def settings_for(bucket: str, address: str | None = None, **more: float) -> BlobSettings:
    """The settings that reach `bucket`, at the endpoint or at a proxy before it."""
    return BlobSettings(
        url=f"s3://{bucket}/forebay",
        endpoint=address or endpoint(),
        region="us-east-1",
        access_key_id=KEY,
        secret_access_key=SecretStr(SECRET),
        allow_http=True,
        **more,  # type: ignore[arg-type]
    )


async def multipart_uploads(bucket: str) -> int:
    """How many unfinished multipart uploads the bucket holds."""
    async with aiohttp.ClientSession() as session, session.get(f"{endpoint()}/{bucket}?uploads") as response:
        return (await response.text()).count("<UploadId>")


@dataclass(slots=True)
class Proxy:
    """What stands before the endpoint; a test sets these while it runs."""

    url: str = ""
    refuse_share: float = 0.0  # of requests that get 503
    full: bool = False  # writes get 507
    silent: bool = False  # no answer at all
    delay_seconds: float = 0  # as from a store that is far away
    reading: int = 0  # at this moment
    reading_most: int = 0
    requests: int = 0
    refused: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(7))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        self.reading += request.method == "GET"
        self.reading_most = max(self.reading_most, self.reading)
        try:
            await asyncio.sleep(self.delay_seconds)
            return await self._pass_on(request)
        finally:
            self.reading -= request.method == "GET"

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if self.silent:
            await asyncio.Event().wait()
        if self.full and request.method in ("PUT", "POST"):
            return web.Response(status=507)
        if self.chance.random() < self.refuse_share:
            self.refused += 1
            return web.Response(status=503)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_HEADERS}
        address = endpoint() + request.raw_path
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(request.method, _exact(address), data=body, headers=headers) as answer,
        ):
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_HEADERS}
            content = await answer.read()
            response = web.Response(status=answer.status, body=content, headers=kept)
            if request.method == "HEAD":
                response.headers["Content-Length"] = answer.headers.get("Content-Length", "0")
            return response


def _exact(address: str) -> URL:
    return URL(address, encoded=True)


@asynccontextmanager
async def proxy() -> AsyncIterator[Proxy]:
    """A proxy on a free port of 127.0.0.1."""
    stands = Proxy()
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", stands.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    stands.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield stands
    finally:
        await runner.cleanup()

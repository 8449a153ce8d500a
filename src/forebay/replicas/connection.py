"""One request on its way through an engine: HTTP on loopback, bytes out as they come in, and a way to stop it.

It refuses to parse what it carries. Stopping is half-closing the connection; the end that the engine then sends is its
word that it has stopped computing.
"""

import asyncio
from collections.abc import Mapping
from contextvars import ContextVar

import aiohttp
from aiohttp.client_reqrep import ClientRequest
from aiohttp.connector import Connection
from aiohttp.tracing import Trace

from forebay.replicas.pauses import Pauses

_ERROR_BODY_BYTES_MAX = 65_536
_READ_BUFFER_BYTES = 65_536
_KEEP_ALIVE_SECONDS = 4.0  # shorter than the 5 s after which common servers close

_opening: ContextVar["EngineStream | None"] = ContextVar("opening", default=None)


class _Connector(aiohttp.TCPConnector):
    """Tells a stream which connection it got, so that it can be half-closed even before the engine answers."""

    async def connect(self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout) -> Connection:
        connection = await super().connect(req, traces, timeout)
        stream = _opening.get()
        if stream is not None:
            stream.connection = connection
        return connection


def open_session(*, reuses_connections: bool, connect_timeout_seconds: float = 10.0) -> aiohttp.ClientSession:
    """A session for engines. Its number of connections is bounded by permits, not here."""
    connector = (
        _Connector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS)
        if reuses_connections
        else _Connector(limit=0, force_close=True)
    )
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_seconds),
        read_bufsize=_READ_BUFFER_BYTES,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        skip_auto_headers=("User-Agent", "Accept-Encoding"),
    )


class EngineStream:
    """One answer of an engine. Owned by the replica that opened it; `stop` may be called once, at any time.

    `pauses`: those of the engine, if it ever stands still.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        pauses: Pauses | None = None,
    ) -> None:
        self.connection: Connection | None = None
        self.finished = False
        self._pauses = pauses or Pauses()
        self._reads_since: float | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._begin(session, url, headers, body)

    def _begin(self, session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], body: bytes) -> None:
        self._request = asyncio.create_task(self._send(session, url, headers, body))

    async def open(self) -> int:
        """Wait for the engine's answer to begin; its HTTP status. Raises aiohttp.ClientError."""
        self._response = response = await asyncio.shield(self._request)
        return response.status

    @property
    def silent_seconds(self) -> float:
        """How long nothing has come for who reads, or read when he was interrupted, while the engine did not stand still."""
        return 0.0 if self._reads_since is None else self._own_seconds() - self._reads_since

    def header(self, name: str) -> str | None:
        """A header of the answer, once it has begun."""
        return None if self._response is None else self._response.headers.get(name)

    async def read(self) -> bytes:
        """The next bytes, as many as there are; b"" at the end. Raises aiohttp.ClientError on a cut."""
        assert self._response is not None
        if self._reads_since is None:  # or he looks again after he was interrupted
            self._reads_since = self._own_seconds()
        data = await self._response.content.readany()
        self._reads_since = None
        if not data:
            self.finished = True
        return data

    async def read_error(self) -> bytes:
        """The body of an answer that is an error, cut at a bound."""
        body = b""
        while len(body) < _ERROR_BODY_BYTES_MAX and (data := await self.read()):
            body += data
        return body[:_ERROR_BODY_BYTES_MAX]

    def release(self) -> None:
        """Give the connection back after an answer that was read to its end."""
        if self._response is not None:
            self._response.release()

    async def stop(self, *, confirms_stop: bool) -> bool:
        """Tell the engine to stop and wait for its word; False if it cannot give one. To be bounded by the caller."""
        try:
            if not self._half_close(confirms_stop=confirms_stop):
                return False
            await self._read_to_end()
            return True
        finally:
            await self._close()

    def _own_seconds(self) -> float:
        """A time that does not pass while the engine stands still."""
        return asyncio.get_running_loop().time() - self._pauses.seconds

    def _half_close(self, *, confirms_stop: bool) -> bool:
        """Shut our side; False if there is nothing that could answer to it."""
        transport = self.connection.transport if self.connection is not None else None
        if transport is None or transport.is_closing() or not confirms_stop or not transport.can_write_eof():
            return False
        assert self.connection is not None
        assert self.connection.protocol is not None
        self.connection.protocol.force_close()  # or it would be reused if the answer came to its end just now
        transport.write_eof()
        return True

    async def _read_to_end(self) -> None:
        try:
            response = await asyncio.shield(self._request)
            while await response.content.readany():
                pass
        except (aiohttp.ClientError, OSError):
            return

    async def _close(self) -> None:
        if not self._request.done():
            self._request.cancel()
            await asyncio.wait([self._request])
        if not self._request.cancelled() and self._request.exception() is None:
            self._request.result().close()

    async def _send(
        self, session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], body: bytes
    ) -> aiohttp.ClientResponse:
        _opening.set(self)
        return await session.post(url, data=body, headers=headers, allow_redirects=False)

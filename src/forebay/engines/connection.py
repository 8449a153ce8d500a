"""HTTP/1.1 for engines of ours: one request at a time on a connection, and a half-closed one means: stop.

It refuses every request without the key, and it closes its own half only when the work of a request has really ended.
"""

import asyncio
import hmac
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import httptools

_BODY_BYTES_MAX = 64 * 2**20
_HEAD_BYTES_MAX = 64 * 2**10
_UNPRINTABLE = re.compile(r"[^\x21-\x7e]")
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 413: "Content Too Large"}
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
_RECORDS_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"


class Refused(Exception):
    """The answer to a request that cannot be served; `more` goes into the error object."""

    def __init__(
        self, status: int, message: str, code: str | None = None, kind: str = "invalid_request_error", **more: Any
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = json.dumps({"error": {"message": message, "type": kind, "code": code, **more}}).encode()


async def _at_once() -> None:
    """Where nobody has to be waited for."""


@dataclass(slots=True)
class Visit:
    """One request as its route sees it."""

    method: str
    path: str
    body: bytes
    headers: dict[bytes, bytes]
    keep_alive: bool
    proceed: Callable[[], None]
    """Sends a byte of white space before the JSON, so that whoever waits sees progress; no error can follow it."""
    tell: Callable[[bytes], None] = lambda _: None
    """Sends a record of an answer that is many, one JSON object on each line; the route then returns b"".

    An error that follows one is the last record, with the key `error`.
    """
    drained: Callable[[], Awaitable[object]] = _at_once
    """Returns when whoever reads the records has taken nearly all; for who has many megabytes of them to tell."""

    @property
    def ids(self) -> str:
        """The caller's names for the request and its trace, safe to log."""
        trace = self._printable(b"traceparent")
        return f"request_id={self._printable(b'x-request-id') or '-'}" + (f" traceparent={trace}" if trace else "")

    def _printable(self, name: bytes) -> str:
        return _UNPRINTABLE.sub("", self.headers.get(name, b"").decode("latin-1"))[:128]


Answer = bytes | str
"""A JSON body, or plain text."""

Route = Callable[[Visit], Awaitable[Answer]]


@dataclass(slots=True)
class Door:
    """What all connections share. Routes are called with the key checked and only while `ready`."""

    key: str
    ready: bool = False
    routes: Mapping[tuple[str, str], Route] = field(default_factory=dict)

    def route(self, visit: Visit) -> Route | None:
        """Where a request goes; None for the health check of an engine that is ready. Raises Refused."""
        given = visit.headers.get(b"authorization", b"")
        if visit.path != "/health" and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise Refused(401, "Invalid API key", kind="authentication_error")
        if not self.ready:
            raise Refused(503, "Loading model", kind="unavailable_error")
        if visit.path == "/health":
            return None
        route = self.routes.get((visit.method, visit.path))
        if route is None:
            raise Refused(404, "There is nothing here by that name.", kind="not_found_error")
        return route


class Connection(asyncio.Protocol):
    """One client. When it goes away or half-closes, its work stops; when that has stopped, the connection closes."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._running: asyncio.Task[Answer] | None = None
        self._pending: list[Visit] = []
        self._gone = False
        self._begun = False
        self._records = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._reset()

    def _reset(self) -> None:
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._body = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def eof_received(self) -> bool:
        self._leave()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        self._leave()

    def _leave(self) -> None:
        self._gone = True
        self._pending.clear()
        if self._running is None:
            self._transport.close()
        else:
            self._running.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except Refused as refused:
            self._end_with(refused)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._end_with(cause if isinstance(cause, Refused) else Refused(400, "Send HTTP/1.1."))

    def _end_with(self, refused: Refused) -> None:
        self._write(refused.status, refused.body)
        self._transport.close()

    # The parser calls these.

    def on_message_begin(self) -> None:
        self._reset()

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value
        self._count(len(name) + len(value))
        if name.lower() == b"content-length" and int(value) > _BODY_BYTES_MAX:
            raise Refused(413, "The body is too large.")

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > _HEAD_BYTES_MAX:
            raise Refused(431, "The headers are too large.")

    def on_body(self, body: bytes) -> None:
        if len(self._body) + len(body) > _BODY_BYTES_MAX:
            raise Refused(413, "The body is too large.")
        self._body += body

    def on_message_complete(self) -> None:
        path = self._url.decode("latin-1").partition("?")[0]
        method, keep_alive = self._parser.get_method().decode(), self._parser.should_keep_alive()
        visit = Visit(
            method,
            path,
            bytes(self._body),
            self._headers,
            keep_alive,
            self._proceed,
            self._tell,
            self._writable.wait,
        )
        self._pending.append(visit)
        self._body = bytearray()
        self._next()

    def _next(self) -> None:
        """Serve what has arrived, until one request has to be waited for."""
        while self._pending and self._running is None and not self._transport.is_closing():
            visit = self._pending.pop(0)
            try:
                route = self._door.route(visit)
            except Refused as refused:
                self._write(refused.status, refused.body)
                self._close_unless(visit)
                continue
            if route is None:
                self._write(200, b'{"status": "ok"}')
                self._close_unless(visit)
                continue
            self._begun = self._records = False
            self._running = asyncio.ensure_future(route(visit))
            self._running.add_done_callback(lambda running, visit=visit: self._ended(running, visit))  # type: ignore[misc]

    def _ended(self, running: "asyncio.Task[Answer]", visit: Visit) -> None:
        self._running = None
        error = None if running.cancelled() else running.exception()
        if isinstance(error, Refused) and self._records and not self._gone:
            self._tell(error.body)
            self._finish(b"")
        elif self._gone or running.cancelled() or (self._begun and error is not None):
            self._transport.close()
        elif isinstance(error, Refused):
            self._write(error.status, error.body)
        elif error is None:
            self._finish(running.result())
        if error is not None and not isinstance(error, Refused):
            self._transport.close()
            raise error
        self._close_unless(visit)
        self._next()

    def _close_unless(self, visit: Visit) -> None:
        if not visit.keep_alive:
            self._transport.close()

    def _proceed(self) -> None:
        if not self._transport.is_closing():
            self._transport.write((b"" if self._begun else _STREAM_HEAD) + b"1\r\n \r\n")
            self._begun = True

    def _tell(self, record: bytes) -> None:
        if not self._transport.is_closing():
            head = b"" if self._begun else _RECORDS_HEAD
            self._transport.write(b"%b%x\r\n%b\n\r\n" % (head, len(record) + 1, record))
            self._begun = self._records = True

    def _finish(self, answer: Answer) -> None:
        if not self._begun:
            kind = "text/plain" if isinstance(answer, str) else "application/json"
            self._write(200, answer.encode() if isinstance(answer, str) else answer, kind)
        elif not self._transport.is_closing():
            assert isinstance(answer, bytes)
            last = b"%x\r\n%b\r\n" % (len(answer), answer) if answer else b""
            self._transport.write(last + b"0\r\n\r\n")

    def _write(self, status: int, body: bytes, kind: str = "application/json") -> None:
        if not self._transport.is_closing():
            reason = _REASONS.get(status, "Error")
            head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
            self._transport.write(head.encode() + body)

"""The HTTP/1.1 connection: uvicorn's protocol with absolute deadlines, a bound on the head, and bounds on connections.

It refuses to wait for trickling clients: a deadline counts from the first byte of a request and no later byte moves it,
and a reader who does not take what was answered is cut off. Middleware would be too late: a request that never arrives
whole never reaches it, and an answer that was written is over for it.
"""

import asyncio
import socket
from asyncio.events import TimerHandle
from collections import Counter
from typing import Any

from pydantic_core import to_json
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from forebay.config import HttpSettings
from forebay.dialects.openai.errors import body_of
from forebay.errors import ForebayError, InvalidRequest
from forebay.telemetry import Metrics

_READER_CHECKS = 10  # for each write_stall_seconds
_READER_BYTES = 65_536  # what a reader must take in that time, or all that is left
_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class ConnectionLimits:
    """Counts open connections, in all and by address. Shared by all protocols of one server."""

    def __init__(self, settings: HttpSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self._open: Counter[str] = Counter()
        metrics.connections.set_function(self._open.total)

    def enter(self, address: str) -> str | None:
        """Count a connection from `address`; the reason if there is no room for it."""
        if self._open.total() >= self.settings.connections_max:
            return "connections_max"
        if self._open[address] >= self.settings.connections_per_address_max:
            return "connections_per_address_max"
        self._open[address] += 1
        return None

    def leave(self, address: str) -> None:
        """Forget a connection that was counted."""
        self._open[address] -= 1
        if self._open[address] <= 0:
            del self._open[address]


class _HeadTooLarge(Exception):
    """Leaves the parser; comes back as the error of its callback."""


class BoundedProtocol(HttpToolsProtocol):
    """One client connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ConnectionLimits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._address = ""
        self._counted = False
        self._head_bytes = 0
        self._head_done = False
        self._deadline: TimerHandle | None = None
        self._began = 0.0
        self._reader_check: TimerHandle | None = None
        self._left = 0
        self._left_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Count the connection, or close it if there is no room."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        reason = self._limits.enter(self._address)
        if reason is not None:
            self._limits.metrics.connections_closed.labels(reason).inc()
            transport.abort()
            return
        self._counted = True
        self._bound_kernel_buffer()
        self._arm(self._limits.settings.header_timeout_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Uncount the connection."""
        self._disarm()
        if self._reader_check is not None:
            self._reader_check.cancel()
        if self._counted:
            self._counted = False
            self._limits.leave(self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Start the clock at the first byte of a request, and bound its head."""
        if not self._counted or self.transport.is_closing():
            return
        self._begin()
        if not self._head_done:
            self._head_bytes += len(data)
            # One read may hold the end of the head and the start of a body: only what is surely head counts here.
            if self._head_bytes > self._limits.settings.header_bytes_max and b"\r\n\r\n" not in data:
                self._refuse_head()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """A request may begin in the packet that another one ends in."""
        self._begin()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Bound the head once it is known exactly, and go from its deadline to that of the body."""
        self._head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if self._head_bytes > self._limits.settings.header_bytes_max:
            raise _HeadTooLarge
        self._head_done = True
        self._arm(self._limits.settings.body_timeout_seconds - (self.loop.time() - self._began))
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole: no deadline until the next one."""
        self._disarm()
        self._began = 0.0
        self._head_bytes = 0
        self._head_done = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer rubbish in the shape of every other error."""
        if not self._head_done and self._head_bytes > self._limits.settings.header_bytes_max:
            self._refuse_head()
        else:
            self._refuse(400, InvalidRequest(msg, code="invalid_http"))

    def pause_writing(self) -> None:
        """The reader is slower than the answer: keep an eye on it."""
        super().pause_writing()
        self._watch_reader()

    def on_response_complete(self) -> None:
        """What is left of the answer must be taken in time too."""
        super().on_response_complete()
        self._watch_reader()

    def _bound_kernel_buffer(self) -> None:
        """Megabytes in the kernel would hide for half a minute whether the reader reads."""
        option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
        accepted = self.transport.get_extra_info("socket")
        if option is not None and accepted is not None:
            accepted.setsockopt(socket.IPPROTO_TCP, option, _READER_BYTES)

    def _begin(self) -> None:
        if self._began == 0.0:
            self._began = self.loop.time()
            self._arm(self._limits.settings.header_timeout_seconds)

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(max(0.0, seconds), self._expire)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._limits.metrics.connections_closed.labels("request_timeout").inc()
        if self._began == 0.0:
            self._close()
        else:
            self._refuse(408, InvalidRequest("The request did not arrive in time.", code="request_not_received"))

    def _refuse_head(self) -> None:
        self._refuse(431, InvalidRequest("The request head is too large.", code="header_too_large"))

    def _refuse(self, status: int, error: ForebayError) -> None:
        """Answer in place of the application, unless an answer of its own is under way on this connection."""
        if self.pipeline or not self._may_answer():
            self._close()
            return
        body = to_json(body_of(error))
        head = b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, _REASONS[status], len(body)) + body)
        self._close()

    def _may_answer(self) -> bool:
        cycle = self.cycle
        return cycle is None or cycle.response_complete or (cycle.more_body and not cycle.response_started)

    def _close(self) -> None:
        self.transport.close()
        self._watch_reader()

    def _watch_reader(self) -> None:
        if self._reader_check is None and self.transport.get_write_buffer_size():
            self._left = 0
            self._check_reader()

    def _check_reader(self) -> None:
        """Cut off a reader who does not take what is left; while an answer is being made, `online` sees to that."""
        self._reader_check = None
        left, now = self.transport.get_write_buffer_size(), self.loop.time()
        if not left:
            return
        complete = self.cycle is not None and self.cycle.response_complete
        stall_seconds = self._limits.settings.write_stall_seconds
        if not self._left or left <= self._left - _READER_BYTES or not (complete or self.transport.is_closing()):
            self._left, self._left_since = left, now
        elif now - self._left_since >= stall_seconds or not complete:
            self._limits.metrics.connections_closed.labels("write_stall").inc()
            self.transport.abort()
            return
        self._reader_check = self.loop.call_later(stall_seconds / _READER_CHECKS, self._check_reader)

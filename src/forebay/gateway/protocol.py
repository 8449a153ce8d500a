"""The HTTP/1.1 connection: uvicorn's protocol with absolute deadlines, a bound on the head, and bounds on connections.

It refuses to wait for trickling clients: a deadline counts from the first byte of a request and no later byte moves it,
and a reader who does not take what was answered is cut off. Middleware would be too late: a request that never arrives
whole never reaches it, and an answer that was written is over for it.
"""

import asyncio
import functools
import math
import socket
from asyncio.events import TimerHandle
from collections import Counter
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from forebay.dialects.openai.errors import body_of
from forebay.errors import ForebayError, InvalidRequest
from forebay.server_config import HttpSettings
from forebay.telemetry import Metrics

_READER_CHECKS = 10  # for each write_stall_seconds
_READER_BYTES = 65_536  # what a reader must take in that time, or all that is left
_DOOR_SECONDS = 2.0  # more than `online` needs to see by itself that a visit is stuck: it knows what to write down
_STEADY_BODY = "forebay.steady_body"  # an ASGI extension of ours
_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


def allow_steady_body(scope: MutableMapping[str, Any], bytes_per_second_min: int) -> None:
    """Let the body of this request take as long as its sender keeps to a rate, for a route that has checked the key."""
    allow: Callable[[int], None] | None = scope.get("extensions", {}).get(_STEADY_BODY, {}).get("allow")
    if allow is not None:
        allow(bytes_per_second_min)


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


class _TimedFlow(FlowControl):
    """Knows for how long the sender was told to wait, which is not the sender's fault."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(transport)
        self._loop = loop
        self._seconds = 0.0
        self._since = 0.0

    @property
    def paused_seconds(self) -> float:
        """In all, this very moment included."""
        return self._seconds + (self._loop.time() - self._since if self.read_paused else 0.0)

    def pause_reading(self) -> None:
        if not self.read_paused:
            self._since = self._loop.time()
        super().pause_reading()

    def resume_reading(self) -> None:
        self._seconds = self.paused_seconds
        super().resume_reading()


@dataclass(slots=True)
class _Pace:
    """How a sender keeps to its rate in one stretch of time."""

    bytes_per_second_min: int
    began: float
    paused_seconds: float
    received: int = 0

    def kept(self, now: float, paused_seconds: float) -> bool:
        """Whether enough has come since the stretch began."""
        own_seconds = now - self.began - (paused_seconds - self.paused_seconds)
        return self.received >= self.bytes_per_second_min * own_seconds


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
        self._pace: _Pace | None = None
        self._reader_check: TimerHandle | None = None
        self._left = 0
        self._idle_checks = 0
        self._answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Count the connection, or close it if there is no room."""
        super().connection_made(transport)
        self.flow: _TimedFlow = _TimedFlow(transport, self.loop)
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
        answering = self._answering
        if answering is not None and not answering.response_complete:
            # uvicorn tells it to the request that came last, which may only wait for this one.
            answering.disconnected = True
            answering.message_event.set()
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
        self.scope["extensions"] = {_STEADY_BODY: {"allow": functools.partial(self._allow_steady_body, self.scope)}}
        super().on_headers_complete()
        if not self.pipeline:
            self._answering = self.cycle

    def on_body(self, body: bytes) -> None:
        """Count what a sender with a rate has sent."""
        if self._pace is not None:
            self._pace.received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole: no deadline until the next one."""
        self._disarm()
        self._began = 0.0
        self._pace = None
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
        self._left = 0  # nothing is added from here on, so that it is from what is left now that a reader takes
        self._watch_reader()

    def resume_writing(self) -> None:
        """The reader has taken nearly all: it reads."""
        super().resume_writing()
        self._left = 0

    def on_response_complete(self) -> None:
        """What is left of the answer must be taken in time too."""
        self._answering = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        if self._pace is not None:  # answered before the end of the body: what still comes is for nobody
            self._pace = None
            self._arm(self._limits.settings.body_timeout_seconds)
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

    def _allow_steady_body(self, scope: object, bytes_per_second_min: int) -> None:
        if self._head_done and scope is self.scope and not self.transport.is_closing():
            self._pace = _Pace(bytes_per_second_min, self.loop.time(), self.flow.paused_seconds)
            self._arm(self._limits.settings.body_timeout_seconds)

    def _expire(self) -> None:
        pace = self._pace
        if pace is not None and pace.kept(self.loop.time(), self.flow.paused_seconds):
            self._pace = _Pace(pace.bytes_per_second_min, self.loop.time(), self.flow.paused_seconds)
            self._arm(self._limits.settings.body_timeout_seconds)
            return
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
        """Cut off a reader who does not take what is left, once the answer is whole or waits for it to go on.

        Checks are counted and no seconds: one that is late is late because of this server.
        """
        self._reader_check = None
        left = self.transport.get_write_buffer_size()
        if not left:
            return
        complete = self.cycle is not None and self.cycle.response_complete
        closing = self.transport.is_closing()
        check_seconds = self._limits.settings.write_stall_seconds / _READER_CHECKS
        checks = _READER_CHECKS + (0 if complete or closing else math.ceil(_DOOR_SECONDS / check_seconds))
        watched = complete or closing or self.flow.write_paused
        self._idle_checks += 1
        if not self._left or left <= self._left - _READER_BYTES or not watched:
            self._left, self._idle_checks = left, 0
        elif self._idle_checks >= checks or (closing and not complete):
            self._limits.metrics.connections_closed.labels("write_stall").inc()
            self.transport.abort()
            return
        self._reader_check = self.loop.call_later(check_seconds, self._check_reader)

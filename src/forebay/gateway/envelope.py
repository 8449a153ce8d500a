"""The outermost layer of every request: its id, its log line, and the trace of what nobody foresaw.

Pure ASGI, so that streamed bytes pass without an object each. It refuses to answer: that is the application's, bugs included.
"""

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forebay.clock import Clock, new_id
from forebay.gateway.answers import speaks_messages
from forebay.telemetry import Log, request_id

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class Envelope:
    """Wraps an ASGI application."""

    def __init__(self, app: ASGIApp, clock: Clock, *, access_log: bool) -> None:
        self._app = app
        self._clock = clock
        self._access_log = access_log
        self._log = Log()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        identity = given if _REQUEST_ID.fullmatch(given) else new_id("req")
        request_id.set(identity)
        scope["request_id"] = identity
        names = (b"x-request-id", b"request-id") if speaks_messages(scope["path"]) else (b"x-request-id",)
        began = self._clock.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *((name, identity.encode()) for name in names)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # noqa: BLE001  # the gateway's outermost: a bug was answered, and leaves a log line with its trace
            self._log.error("request.bug", exc_info=True, path=scope["path"])
        if self._access_log:
            milliseconds = round((self._clock.monotonic() - began) * 1000, 1)
            # A client that left before the answer began has no status; 499 is what proxies call it.
            self._log.info(
                "request.finished", method=scope["method"], path=scope["path"], status=status or 499, ms=milliseconds
            )

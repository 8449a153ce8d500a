"""The listening socket and what serves it: uvicorn with our protocol, and without its hands on signals.

It refuses to start on a port that is taken, in a sentence.
"""

import asyncio
import contextlib
import functools
import math
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from forebay.config import Settings
from forebay.errors import SetupError
from forebay.gateway.protocol import BoundedProtocol, ConnectionLimits
from forebay.telemetry import Metrics

_BACKLOG = 2048
_LAST_WORDS_SECONDS = 2.0


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to `forebay.app`."""
        yield


class Listener:
    """Serves an application on one socket."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._socket = _bind(settings.host, settings.port)
        limits = ConnectionLimits(settings.http, metrics)
        config = uvicorn.Config(
            app,
            http=functools.partial(BoundedProtocol, limits=limits),  # type: ignore[arg-type]  # a factory serves as well
            ws="none",
            lifespan="off",
            loop="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=max(1, round(settings.http.keep_alive_seconds)),
            # A second later than the drain, which ends what is left with an error of ours.
            timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + 1,
            ssl_certfile=settings.tls_certificate,
            ssl_keyfile=settings.tls_key,
        )
        _load(config)
        self._server = _Server(config)
        scheme = "https" if settings.tls_certificate else "http"
        host, port = self._socket.getsockname()[:2]
        self.address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def run(self) -> None:
        """Serve until `stop`; then let running requests end within the drain limit."""
        await self._server.serve(sockets=[self._socket])
        tasks = self._server.server_state.tasks
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST_WORDS_SECONDS)

    def stop(self) -> None:
        """Accept nothing more."""
        self._server.should_exit = True


def _load(config: uvicorn.Config) -> None:
    """Read the certificate and its key now, so that a wrong one is told in a sentence."""
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise SetupError(
            f"The TLS certificate {config.ssl_certfile} and key {config.ssl_keyfile} cannot be used: "
            f"{error.strerror or error}. Check tls_certificate and tls_key."
        ) from None


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(_BACKLOG)  # who comes before the server is built waits for it
    except OSError as error:
        raise SetupError(
            f"The server cannot listen on {host}:{port}: {error.strerror or error}. Choose another with --host or --port."
        ) from None
    return bound

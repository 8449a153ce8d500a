"""What the engine programs in Python share: how they say where they listen, load and warm up, serve and end.

It refuses to know what a model is: a program gives it a way to load one and the routes that answer requests.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import uvloop

from forebay.engines.connection import Connection, Door, Route
from forebay.engines.start import keep_stdout, run_out_of_memory

_BACKLOG = 4096


class Service(Protocol):
    """A loaded model and its routes."""

    @property
    def routes(self) -> Mapping[tuple[str, str], Route]:
        """What answers which method and path."""
        ...


class OutOfMemory(Exception):
    """The device has no memory left for what was asked of it."""


def run(key: str, load: Callable[[asyncio.AbstractEventLoop], Service]) -> None:
    """Listen, load, and answer until SIGTERM.

    `load` runs in a thread, so that the health check answers meanwhile; it ends the process itself when it cannot.
    """
    uvloop.run(_serve(key, load, keep_stdout()))


async def _serve(key: str, load: Callable[[asyncio.AbstractEventLoop], Service], out: int) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, os._exit, 0)  # a step that is being computed is not worth waiting for
    door = Door(key)
    server = await loop.create_server(lambda: Connection(door), "127.0.0.1", 0, backlog=_BACKLOG)
    port = server.sockets[0].getsockname()[1]
    os.write(out, f"FOREBAY_ENGINE_LISTENING http://127.0.0.1:{port}\n".encode())
    with ThreadPoolExecutor(1, "load") as thread:
        try:
            service = await loop.run_in_executor(thread, load, loop)
        except (OutOfMemory, MemoryError):
            run_out_of_memory("The model needs more memory than there is.")
    door.routes = service.routes
    door.ready = True
    await server.serve_forever()

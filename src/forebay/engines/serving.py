"""What every engine program of ours shares: how it starts, says where it listens, warms up, serves and ends.

It refuses to know what a model is: a program gives it a way to load one and the routes that answer requests.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any, NoReturn, Protocol, TypeVar

import uvloop

from forebay.engines.connection import Connection, Door, Route

OUT_OF_MEMORY = 86
CANNOT_START = 78
_BACKLOG = 4096


class Service(Protocol):
    """A loaded model and its routes."""

    @property
    def routes(self) -> Mapping[tuple[str, str], Route]:
        """What answers which method and path."""
        ...


class OutOfMemory(Exception):
    """The device has no memory left for what was asked of it."""


SpecT = TypeVar("SpecT")
_ACCEPTED: dict[type, Any] = {int: int, float: (int, float), str: str, bool: bool}


def read_spec(spec_type: Callable[..., SpecT]) -> tuple[SpecT, str]:
    """The spec and the key, taken out of the environment so that nothing else can read them."""
    text, key = os.environ.pop("FOREBAY_ENGINE_SPEC", "{}"), os.environ.pop("FOREBAY_ENGINE_KEY", "")
    try:
        spec = spec_type(**json.loads(text))
    except (ValueError, TypeError) as error:
        refuse_to_start(f"The engine's settings cannot be read: {error}.")
    if not key:
        refuse_to_start("The engine needs a key in FOREBAY_ENGINE_KEY.")
    return spec, key


def check_types(spec: Any) -> None:
    """Raise TypeError for a field of a spec whose value has another type than it declares."""
    for field in fields(spec):
        if isinstance(field.type, type) and not isinstance(getattr(spec, field.name), _ACCEPTED[field.type]):
            raise TypeError(f"{field.name} has to be of type {field.type.__name__}")


def refuse_to_start(reason: str) -> NoReturn:
    """Say why this can never start as configured."""
    _die(CANNOT_START, reason)


def run_out_of_memory(reason: str) -> NoReturn:
    """End as an engine ends when it cannot even hold its model."""
    _die(OUT_OF_MEMORY, reason)


def _die(code: int, reason: str) -> NoReturn:
    sys.stderr.write(f"{reason}\n")
    sys.stderr.flush()
    os._exit(code)


def run(key: str, load: Callable[[asyncio.AbstractEventLoop], Service]) -> None:
    """Listen, load, and answer until SIGTERM.

    `load` runs in a thread, so that the health check answers meanwhile; it ends the process itself when it cannot.
    """
    out = os.dup(1)  # whatever a library prints goes to standard error; only our one line goes out
    os.dup2(2, 1)
    uvloop.run(_serve(key, load, out))


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

"""The plan of the house: builds every room in order, runs it, and closes it in reverse.

It refuses to listen beyond loopback while there is no key, and to go on when a preloaded model cannot be loaded.
"""

import asyncio
import gc
import ipaddress
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from forebay.clock import SystemClock
from forebay.config import Settings, UpstreamModel
from forebay.errors import SetupError
from forebay.gateway.auth import Authenticator
from forebay.gateway.envelope import Envelope
from forebay.gateway.listener import Listener
from forebay.gateway.online import Door
from forebay.gateway.rates import Rates
from forebay.gateway.server import create_app
from forebay.replicas.calls import Calls
from forebay.replicas.catalog import Catalog
from forebay.replicas.local_launcher import LocalLauncher
from forebay.replicas.pull import Puller
from forebay.replicas.supervisor import Supervisor
from forebay.scheduler.scheduler import Limits, Scheduler
from forebay.store.database import Database
from forebay.store.idempotency import IdempotencyStore
from forebay.store.key_format import Role
from forebay.store.keys import DEFAULT_PROJECT, KeyStore
from forebay.telemetry import Log, Metrics

_DRAIN_TICK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a person is told when the server listens. `first_key` only at the first start."""

    address: str
    first_key: str | None
    models: tuple[str, ...]


class House:
    """One running server."""

    def __init__(self, settings: Settings, environment: Mapping[str, str], database: Database) -> None:
        self.settings = settings
        self.keys = KeyStore(database, SystemClock())
        self._clock = SystemClock()
        self._log = Log()
        self._stop = asyncio.Event()
        metrics = Metrics()
        catalog = Catalog(settings)
        launcher = LocalLauncher(
            _for_engines(settings, environment),
            settings.supervisor.log_lines_max,
            settings.supervisor.log_line_bytes_max,
        )
        puller = Puller(catalog, settings.pull, self._clock)
        self._supervisor = Supervisor(settings, catalog, puller, launcher, self._clock, metrics, environment)
        self._scheduler = Scheduler(
            self._supervisor,
            {name: _limits(catalog, name) for name in catalog.names()},
            settings.scheduler,
            settings.supervisor.cancel_grace_seconds,
            self._clock,
            metrics,
        )
        self._supervisor.on_change = self._scheduler.changed
        self._door = Door(self._scheduler, Rates(self._clock), settings, self._clock, metrics)
        app = create_app(settings)
        state = app.state
        state.catalog, state.supervisor, state.scheduler, state.door = (
            catalog,
            self._supervisor,
            self._scheduler,
            self._door,
        )
        state.calls = Calls(catalog)
        state.metrics, state.started_at = metrics, self._clock.now()
        state.authenticator = Authenticator(self.keys, settings.auth, settings.admin_key, self._clock)
        state.idempotency = IdempotencyStore(database, self._clock)
        self._state = state
        self._listener = Listener(Envelope(app, self._clock, access_log=settings.log.access), settings, metrics)

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._listener.address

    def preloaded(self) -> tuple[str, ...]:
        """The models that are loaded before the server calls itself ready."""
        return tuple(record.name for record in self._supervisor.records() if record.settings.preload)

    def stop(self) -> None:
        """Ask the server to stop."""
        self._stop.set()

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until `stop`. Raises SetupError if a preloaded model cannot be loaded."""
        supervising = asyncio.create_task(self._supervisor.run())
        sweeping = asyncio.create_task(self._door.run())
        listening = asyncio.create_task(self._listener.run())
        loading = asyncio.create_task(self._load(on_ready))
        stopping = asyncio.create_task(self._stop.wait())
        self._log.info("server.started", address=self.address)
        try:
            watched: set[asyncio.Task[Any]] = {supervising, sweeping, listening, stopping}
            await _first(watched, loading)
        finally:
            loading.cancel()
            stopping.cancel()
            await self._drain(listening)
            sweeping.cancel()
            supervising.cancel()
            await asyncio.wait([supervising, sweeping, loading])
            self._log.info("server.stopped")

    async def _load(self, on_ready: Callable[[], None]) -> None:
        for name in self.preloaded():
            await self._supervisor.wait_until_ready(name)
        self._log.info("server.ready", address=self.address)
        on_ready()

    async def _drain(self, listening: asyncio.Task[None]) -> None:
        """Accept nothing new, dismiss the line, let running requests end within the limit, then end them."""
        self._log.info("server.stopping", drain_seconds=self.settings.drain_seconds)
        self._state.stopping = True
        self._scheduler.close()
        self._listener.stop()
        deadline = self._clock.monotonic() + self.settings.drain_seconds
        while not self._door.empty and self._clock.monotonic() < deadline:
            await self._clock.sleep(_DRAIN_TICK_SECONDS)
        self._door.close()
        await asyncio.wait([listening])


async def _first(watched: set[asyncio.Task[Any]], loading: asyncio.Task[None]) -> None:
    """Wait until one of `watched` ends, or until loading fails; raise what it raised."""
    await asyncio.wait({*watched, loading}, return_when=asyncio.FIRST_COMPLETED)
    if loading.done() and loading.exception() is None and not any(task.done() for task in watched):
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
    for task in {*watched, loading}:
        if task.done() and not task.cancelled():
            error = task.exception()
            if error is not None:
                raise error


@asynccontextmanager
async def open_house(settings: Settings, environment: Mapping[str, str]) -> AsyncIterator[House]:
    """Open the store and build the rooms; close the store at the end."""
    database = await Database.open(settings)
    try:
        yield House(settings, environment, database)
    finally:
        await database.close()


async def serve(
    settings: Settings,
    environment: Mapping[str, str],
    on_listening: Callable[[Greeting], None],
    on_ready: Callable[[Greeting], None],
) -> None:
    """Run a server until SIGTERM or Ctrl-C. Raises SetupError with the reason if it cannot start."""
    async with open_house(settings, environment) as house:
        first_key = await first_key_for(house.keys, settings)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, house.stop)
        _settle_memory()
        greeting = Greeting(house.address, first_key, house.preloaded())
        on_listening(greeting)
        await house.run(lambda: on_ready(greeting))


def _settle_memory() -> None:
    """Take what was built so far out of every later search for garbage: it stays, and walking it stalls requests."""
    gc.collect()
    gc.freeze()


async def first_key_for(keys: KeyStore, settings: Settings) -> str | None:
    """On the first start, a key for the person who started it. Raises SetupError beyond loopback without a key."""
    if settings.admin_key is not None or await keys.any_keys():
        return None
    if not _is_loopback(settings.host):
        raise SetupError(
            f"There is no API key yet, so the server does not listen on {settings.host}. "
            "Create one with `forebay keys create --role admin`, or set FOREBAY_ADMIN_KEY."
        )
    record, plain = await keys.create_key(DEFAULT_PROJECT, name="first key", role=Role.ADMIN)
    Log().info("key.created", key=record.id)
    return plain


def _for_engines(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the keys of upstreams, which are no engine's business."""
    held = {model.options.key_env for model in settings.models.values() if isinstance(model, UpstreamModel)}
    return {name: value for name, value in environment.items() if name not in held}


def _limits(catalog: Catalog, name: str) -> Limits:
    model = catalog.get(name)
    return Limits(model.slots * model.replicas, model.queue_places, model.queue_timeout_seconds)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

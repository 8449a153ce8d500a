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

from forebay import commit_points
from forebay.blobs.blobs import open_blobs, open_objects
from forebay.clock import Clock, SystemClock
from forebay.config import Settings
from forebay.errors import SetupError
from forebay.gateway.auth import Authenticator
from forebay.gateway.envelope import Envelope
from forebay.gateway.hearing import Hearing
from forebay.gateway.listener import Listener
from forebay.gateway.online import Door
from forebay.gateway.painting import Easels
from forebay.gateway.places import Places, Room
from forebay.gateway.push_tokens import PushTokens
from forebay.gateway.rates import Rates
from forebay.gateway.server import create_app
from forebay.gateway.signed import Signer
from forebay.jobs.admission import Admission
from forebay.jobs.batch import BatchWork
from forebay.jobs.chunk import ChunkWork
from forebay.jobs.image import ImageWork, image_kind
from forebay.jobs.kinds import Kind
from forebay.jobs.line_runner import LineRunner
from forebay.jobs.media_work import MediaRooms
from forebay.jobs.node import Node
from forebay.jobs.office import Office
from forebay.jobs.picture_lines import PictureLines
from forebay.jobs.pruner import Sweep
from forebay.jobs.response import ResponseEnds, ResponseWork, response_kind
from forebay.jobs.retry import Delay, doubling
from forebay.jobs.segments import SegmentStore
from forebay.jobs.speech_lines import SpeechLines
from forebay.jobs.transcription import TranscriptionWork, transcription_kind
from forebay.jobs.webhook import webhook_kind
from forebay.media.files import UploadedFiles
from forebay.media.images import Images
from forebay.media.objects import Objects
from forebay.media.pictures import Pictures
from forebay.media.recordings import Recordings
from forebay.metering.books import Books
from forebay.metering.jobs import JobMeter
from forebay.metering.meter import Meter
from forebay.model_config import UpstreamModel
from forebay.outbound import Outbound
from forebay.quotas import Resource, day_of
from forebay.replicas.books import MeasuredBooks
from forebay.replicas.calls import Calls
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import device_of
from forebay.replicas.gauge import Gauge
from forebay.replicas.local_launcher import LocalLauncher
from forebay.replicas.nvml import Nvml
from forebay.replicas.pull import Puller
from forebay.replicas.supervisor import Supervisor
from forebay.scheduler.assembly import Assembler
from forebay.scheduler.hall import Limits
from forebay.scheduler.painter import Painter
from forebay.scheduler.scheduler import Scheduler
from forebay.scheduler.shares import Weights, equal
from forebay.scheduler.transcriber import Transcriber
from forebay.store.batches import BATCH, CHUNK, JOIN, BatchStore
from forebay.store.database import Database
from forebay.store.dead_letters import DeadLetterStore
from forebay.store.files import FileStore
from forebay.store.idempotency import IdempotencyStore
from forebay.store.intake import IntakeStore
from forebay.store.jobs import JobStore
from forebay.store.key_format import Role
from forebay.store.keys import DEFAULT_PROJECT, KeyStore
from forebay.store.media_jobs import MediaJobStore
from forebay.store.model_memory import ModelMemoryStore
from forebay.store.projects import ProjectStore
from forebay.store.responses import ResponseStore
from forebay.store.secrets import SecretStore
from forebay.store.uploads import UploadStore
from forebay.store.usage import UsageStore
from forebay.store.webhooks import WebhookStore
from forebay.telemetry import Log, Metrics

_DRAIN_TICK_SECONDS = 0.05
_DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a person is told when the server listens. `first_key` only at the first start."""

    address: str
    first_key: str | None
    models: tuple[str, ...]


class Stores:
    """Everything that lasts: the rooms of the filing room and the cellar. Shared by all of one process."""

    def __init__(self, settings: Settings, database: Database, clock: Clock, node: str) -> None:
        self.database = database
        self.node = node
        self.blobs = open_blobs(settings)
        self.keys = KeyStore(database, clock)
        self.meter = Meter(settings.quotas.parsed, clock)
        self.files = FileStore(database, clock, settings.files, self._stored_bytes)
        self.uploads = UploadStore(database, clock, settings.files, self._stored_bytes)
        self.jobs = JobStore(database, clock, settings.jobs.log_lines_max)
        self.webhooks = WebhookStore(database, clock, settings.webhooks)
        self.dead_letters = DeadLetterStore(database, clock)
        self.batches = BatchStore(database, clock)
        self.idempotency = IdempotencyStore(database, clock)
        self.responses = ResponseStore(database, clock, settings.responses)
        self.media_jobs = MediaJobStore(database, clock, node)
        self.secrets = SecretStore(database)
        self.intake = IntakeStore(database, clock, settings.intake.dedupe_seconds)
        self.objects = open_objects(settings)
        self.model_memory = ModelMemoryStore(database)
        self.usage = UsageStore(database, clock)
        self.projects = ProjectStore(database, clock)
        self.books = Books(
            self.usage, self.projects, self.meter, settings.data_dir / "usage", node, settings.usage, clock
        )
        self.job_meter = JobMeter(self.meter, self.usage)

    def _stored_bytes(self, project: str) -> int | None:
        return self.meter.level(project, Resource.STORED_BYTES)


class Speech:
    """What works on recordings, for both doors and for the lines of batches."""

    def __init__(self, settings: Settings, stores: Stores, outbound: Outbound, clock: Clock) -> None:
        folder = settings.data_dir / "recordings" / stores.node  # nobody else who lives has the name
        stored = UploadedFiles(stores.files, stores.blobs)
        self.recordings = Recordings(
            settings.audio, folder, outbound, stored, clock, free_bytes_min=settings.files.free_bytes_min
        )
        self.recordings.open()
        self.transcriber = Transcriber(self.recordings, settings.audio.stretch_seconds)


class Imaging:
    """What works on images, for both doors and for the lines of batches."""

    def __init__(self, settings: Settings, stores: Stores, outbound: Outbound, clock: Clock) -> None:
        self.pictures = Pictures(
            settings.images,
            settings.media,
            settings.data_dir / "pictures" / stores.node,  # nobody else who lives has the name
            outbound,
            UploadedFiles(stores.files, stores.blobs),
            clock,
            free_bytes_min=settings.files.free_bytes_min,
        )
        self.pictures.open()
        self.painter = Painter(self.pictures)


class Machine:
    """The machine room and the hallway: whatever runs models in this process."""

    def __init__(
        self,
        settings: Settings,
        environment: Mapping[str, str],
        clock: Clock,
        metrics: Metrics,
        weights: Weights = equal,
    ) -> None:
        self.catalog = Catalog(settings)
        launcher = LocalLauncher(
            _for_engines(settings, environment),
            settings.supervisor.log_lines_max,
            settings.supervisor.log_line_bytes_max,
        )
        puller = Puller(self.catalog, settings.pull, clock)
        gauge = Gauge(settings.memory, Nvml.open(visible=environment.get("CUDA_VISIBLE_DEVICES")))
        self.memory = MeasuredBooks(self.catalog, settings.memory, gauge, clock, metrics, Log())
        self.supervisor = Supervisor(settings, self.catalog, puller, launcher, self.memory, clock, metrics, environment)
        self.memory.keepers = self.supervisor.keepers
        self.scheduler = Scheduler(
            self.supervisor,
            {name: _limits(self.catalog, name) for name in self.catalog.names()},
            settings.scheduler,
            settings.supervisor.cancel_grace_seconds,
            clock,
            metrics,
            weights,
            pace=settings.pace,
        )
        self.supervisor.on_change = self.scheduler.changed
        self.scheduler.well = lambda: self.memory.gate.open
        self.memory.on_turn = self._look_again
        self.supervisor.residency.demand = self.scheduler.wanted
        self.supervisor.residency.on_leave = self.scheduler.clear_out
        self.assembler = Assembler(settings.embeddings.cache_bytes, clock, metrics)

    def _look_again(self) -> None:
        for name in self.catalog.names():
            self.scheduler.changed(name)

    async def run(self) -> None:
        """Keep engines alive and measure them, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.supervisor.run())
            group.create_task(self.memory.run())

    def preloaded(self) -> tuple[str, ...]:
        """The models that are loaded before the process calls itself ready."""
        return tuple(record.name for record in self.supervisor.records() if record.settings.preload)


def build_office(
    settings: Settings,
    stores: Stores,
    machine: Machine,
    outbound: Outbound,
    calls: Calls,
    speech: Speech,
    imaging: Imaging,
    clock: Clock,
    metrics: Metrics,
) -> Office:
    """The back office with every kind of job that there is."""
    batches = _batch_work(settings, stores, machine, clock)
    admission = Admission(machine.catalog, machine.scheduler, settings, clock)
    rooms = MediaRooms(stores.jobs, stores.media_jobs, stores.blobs, calls, admission, stores.job_meter, clock, metrics)
    transcriptions = TranscriptionWork(rooms, speech.recordings, speech.transcriber)
    objects = Objects(stores.objects)
    images = ImageWork(rooms, stores.files, imaging.pictures, imaging.painter, objects, settings.images)
    kinds: list[Kind] = [
        _batch_kind(batches, settings),
        _chunk_kind(settings, stores, machine, calls, admission, speech, imaging, clock, metrics),
        _response_kind(settings, stores, machine, calls, clock, metrics),
        transcription_kind(transcriptions, settings.audio, _delay(settings)),
        image_kind(images, settings.images, _delay(settings)),
        webhook_kind(stores.webhooks, outbound, settings, clock),
    ]

    return Office(
        stores.jobs,
        stores.webhooks,
        stores.dead_letters,
        kinds,
        _sweeps(settings, stores, batches),
        stores.node,
        settings.jobs,
        clock,
        metrics,
        works=settings.jobs.enabled,
        weights=stores.meter.weight,
        loaded=machine.supervisor.loaded,
    )


def _sweeps(settings: Settings, stores: Stores, batches: BatchWork) -> list[Sweep]:
    """What removes whatever has outlived its time."""
    keep = settings.jobs.keep_seconds

    async def finished_jobs(now: float, rows: int) -> int:
        return await stores.jobs.prune(now - keep, rows)

    async def old_dead_letters(now: float, rows: int) -> int:
        return await stores.dead_letters.prune(now - keep, rows)

    async def files(now: float, rows: int) -> int:
        return await stores.files.sweep(stores.blobs, now, rows)

    async def uploads(now: float, rows: int) -> int:
        return await stores.uploads.sweep(stores.blobs, now, rows)

    async def idempotency_keys(now: float, rows: int) -> int:
        return await stores.idempotency.prune(now, rows)

    async def messages(now: float, rows: int) -> int:
        return await stores.intake.prune(now, rows)

    async def segments(now: float, rows: int) -> int:
        return await batches.sweep(now, rows)

    async def responses(now: float, rows: int) -> int:
        return await ResponseEnds(stores.responses).sweep(now, rows)

    async def media(now: float, rows: int) -> int:
        return await stores.media_jobs.sweep(stores.blobs, now, rows)

    async def usage(now: float, rows: int) -> int:
        return await stores.usage.prune(day_of(now - settings.usage.keep_days * _DAY_SECONDS), rows)

    return [
        finished_jobs,
        old_dead_letters,
        files,
        uploads,
        segments,
        responses,
        media,
        idempotency_keys,
        messages,
        usage,
    ]


def _batch_work(settings: Settings, stores: Stores, machine: Machine, clock: Clock) -> BatchWork:
    return BatchWork(
        stores.jobs,
        stores.batches,
        stores.files,
        stores.dead_letters,
        stores.blobs,
        machine.catalog,
        settings,
        clock,
    )


def _batch_kind(work: BatchWork, settings: Settings) -> Kind:
    return Kind(
        BATCH,
        work.perform,
        settings.jobs.batches_at_once,
        _delay(settings),
        children=CHUNK,
        joins_at=JOIN,
        event=BATCH,
        takes_turns=True,
        after=work.after,
    )


def _chunk_kind(
    settings: Settings,
    stores: Stores,
    machine: Machine,
    calls: Calls,
    admission: Admission,
    speech: Speech,
    imaging: Imaging,
    clock: Clock,
    metrics: Metrics,
) -> Kind:
    recorded = SpeechLines(speech.recordings, speech.transcriber, settings.audio)
    painted = PictureLines(imaging.pictures, imaging.painter, stores.files, stores.blobs, settings, clock)
    segments = SegmentStore(stores.jobs, stores.batches, stores.dead_letters, stores.blobs, stores.job_meter, clock)
    lines = LineRunner(
        calls, admission, machine.assembler, recorded, painted, stores.job_meter, settings, clock, metrics
    )
    weights = stores.meter.weight
    work = ChunkWork(stores.batches, segments, stores.blobs, lines, machine.catalog, settings.batches, clock, weights)
    return Kind(
        CHUNK,
        work.perform,
        settings.jobs.chunks_at_once,
        _delay(settings),
        waits_for_it=True,
        takes_turns=True,
        groups_models=True,
        spare=1,
        after=work.after,
    )


def _response_kind(
    settings: Settings, stores: Stores, machine: Machine, calls: Calls, clock: Clock, metrics: Metrics
) -> Kind:
    work = ResponseWork(
        stores.responses, calls, machine.catalog, machine.scheduler, stores.job_meter, settings, clock, metrics
    )
    return response_kind(work, ResponseEnds(stores.responses), settings, _delay(settings))


def _delay(settings: Settings) -> Delay:
    jobs = settings.jobs
    return doubling(jobs.backoff_seconds_min, jobs.backoff_seconds_max, jobs.attempts_max)


class House:
    """One running server."""

    def __init__(self, settings: Settings, environment: Mapping[str, str], stores: Stores) -> None:
        self.settings = settings
        self.keys = stores.keys
        self._clock = SystemClock()
        self._log = Log()
        self._stop = asyncio.Event()
        metrics = Metrics()
        machine = Machine(settings, environment, self._clock, metrics, stores.meter.weight)
        self._machine = machine
        self._peaks = stores.model_memory
        self._outbound = Outbound(settings.outbound, self._clock)
        self._images = Images(settings.media, self._outbound, UploadedFiles(stores.files, stores.blobs), self._clock)
        calls = Calls(machine.catalog, self._images, settings.audio.diarization_model)
        self._speech = Speech(settings, stores, self._outbound, self._clock)
        self._imaging = Imaging(settings, stores, self._outbound, self._clock)
        self._office = build_office(
            settings, stores, machine, self._outbound, calls, self._speech, self._imaging, self._clock, metrics
        )
        self._books, meter = stores.books, stores.meter
        self._door = Door(
            machine.scheduler, machine.assembler, Rates(self._clock), meter, settings, self._clock, metrics
        )
        app = create_app(settings)
        state = app.state
        state.catalog, state.supervisor, state.scheduler = machine.catalog, machine.supervisor, machine.scheduler
        state.calls, state.door = calls, self._door
        state.files, state.uploads, state.blobs, state.jobs = stores.files, stores.uploads, stores.blobs, stores.jobs
        state.webhooks, state.dead_letters, state.outbound = stores.webhooks, stores.dead_letters, self._outbound
        state.idempotency, state.batches = stores.idempotency, stores.batches
        state.responses, state.response_ends = stores.responses, ResponseEnds(stores.responses)
        state.media_jobs, state.audio_places = stores.media_jobs, Places(settings.audio.uploads_at_once, "recordings")
        state.hearing = Hearing(self._speech.recordings, self._speech.transcriber, settings.audio)
        state.desk, state.clock = self._office.desk, self._clock
        state.signer = Signer(stores.secrets, self._clock)
        state.easels = Easels(
            self._imaging.pictures,
            self._imaging.painter,
            Room(settings.images.held_bytes_max, "pictures"),
            stores.files,
            stores.blobs,
            state.signer,
            settings.images,
        )
        state.image_places = Places(settings.images.requests_at_once, "pictures")
        state.intake = stores.intake
        state.usage, state.projects = stores.usage, stores.projects
        state.meter, state.books = stores.meter, stores.books
        state.push_tokens = PushTokens(settings.intake, self.keys, self._outbound, self._clock)
        state.metrics, state.started_at = metrics, self._clock.now()
        state.authenticator = Authenticator(self.keys, settings.auth, settings.admin_key, self._clock)
        self._state = state
        self._listener = Listener(Envelope(app, self._clock, access_log=settings.log.access), settings, metrics)

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._listener.address

    def preloaded(self) -> tuple[str, ...]:
        """The models that are loaded before the server calls itself ready."""
        return self._machine.preloaded()

    def stop(self) -> None:
        """Ask the server to stop."""
        self._stop.set()

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until `stop`. Raises SetupError if a preloaded model cannot be loaded."""
        await self._machine.memory.recall(self._peaks)
        supervising = asyncio.create_task(self._machine.run())
        working = asyncio.create_task(self._office.run())
        sweeping = asyncio.create_task(self._door.run())
        listening = asyncio.create_task(self._listener.run())
        folding = asyncio.create_task(self._books.run())
        loading = asyncio.create_task(self._load(on_ready))
        stopping = asyncio.create_task(self._stop.wait())
        self._log.info("server.started", address=self.address)
        try:
            watched: set[asyncio.Task[Any]] = {supervising, sweeping, listening, working, folding, stopping}
            await _first(watched, loading)
        finally:
            loading.cancel()
            stopping.cancel()
            self._office.stop()
            await self._drain(listening)
            await asyncio.wait([working])
            sweeping.cancel()
            folding.cancel()
            supervising.cancel()
            await asyncio.wait([supervising, sweeping, folding, loading])
            await self._imaging.pictures.close()
            await self._speech.recordings.close()
            await self._images.close()
            await self._outbound.close()
            self._log.info("server.stopped")

    async def _load(self, on_ready: Callable[[], None]) -> None:
        self._machine.supervisor.check_together(self.preloaded())
        for name in self.preloaded():
            await self._machine.supervisor.wait_until_ready(name)
        self._log.info("server.ready", address=self.address)
        on_ready()

    async def _drain(self, listening: asyncio.Task[None]) -> None:
        """Accept nothing new, dismiss the line, let running requests end within the limit, then end them."""
        self._log.info("server.stopping", drain_seconds=self.settings.drain_seconds)
        self._state.stopping = True
        self._machine.scheduler.close()
        self._listener.stop()
        deadline = self._clock.monotonic() + self.settings.drain_seconds
        while not self._door.empty and self._clock.monotonic() < deadline:
            await self._clock.sleep(_DRAIN_TICK_SECONDS)
        self._door.close()
        await asyncio.wait([listening])


async def _first(watched: set[asyncio.Task[Any]], loading: asyncio.Task[Any] | None = None) -> None:
    """Wait until one of `watched` ends, or until loading fails; raise what it raised."""
    all_of_them = watched if loading is None else {*watched, loading}
    await asyncio.wait(all_of_them, return_when=asyncio.FIRST_COMPLETED)
    if not any(task.done() for task in watched) and all(task.exception() is None for task in all_of_them - watched):
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
    for task in all_of_them:
        if task.done() and not task.cancelled():
            error = task.exception()
            if error is not None:
                raise error


@asynccontextmanager
async def open_stores(settings: Settings) -> AsyncIterator[Stores]:
    """Open what lasts under a name of this process alone; close it at the end. Raises SetupError."""
    problem = commit_points.arm(settings.rehearsal.kill_at)
    if problem is not None:
        raise SetupError(problem)
    database = await Database.open(settings)
    try:
        node = Node.claim(settings.data_dir)
        try:
            stores = Stores(settings, database, SystemClock(), node.name)
            await stores.blobs.check()
            if stores.objects is not None:
                await stores.objects.check()
            await stores.books.open()
            try:
                yield stores
            finally:
                await stores.books.close()
        finally:
            node.release()
    finally:
        await database.close()


@asynccontextmanager
async def open_house(settings: Settings, environment: Mapping[str, str]) -> AsyncIterator[House]:
    """Open what lasts and build the rooms of a server."""
    async with open_stores(settings) as stores:
        yield House(settings, environment, stores)


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


async def work(settings: Settings, environment: Mapping[str, str], on_ready: Callable[[str], None]) -> None:
    """Run a worker apart from any server until SIGTERM or Ctrl-C. Raises SetupError if it cannot start."""
    clock, metrics = SystemClock(), Metrics()
    async with open_stores(settings) as stores:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        machine = Machine(settings, environment, clock, metrics, stores.meter.weight)
        outbound = Outbound(settings.outbound, clock)
        images = Images(settings.media, outbound, UploadedFiles(stores.files, stores.blobs), clock)
        calls = Calls(machine.catalog, images, settings.audio.diarization_model)
        speech = Speech(settings, stores, outbound, clock)
        imaging = Imaging(settings, stores, outbound, clock)
        office = build_office(settings, stores, machine, outbound, calls, speech, imaging, clock, metrics)
        await machine.memory.recall(stores.model_memory)
        supervising = asyncio.create_task(machine.run())
        working = asyncio.create_task(office.run())
        folding = asyncio.create_task(stores.books.run())
        stopping = asyncio.create_task(stop.wait())
        on_ready(stores.node)
        try:
            await _first({supervising, working, folding, stopping})
        finally:
            stopping.cancel()
            office.stop()
            machine.scheduler.close()
            await asyncio.wait([working])
            folding.cancel()
            supervising.cancel()
            await asyncio.wait([supervising, folding])
            await imaging.pictures.close()
            await speech.recordings.close()
            await images.close()
            await outbound.close()


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
    """The environment without the keys of upstreams, which are no engine's business.

    CUDA counts GPUs as their driver does, unless somebody wants it otherwise: memory is measured by these numbers.
    """
    held = {model.options.key_env for model in settings.models.values() if isinstance(model, UpstreamModel)}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} | {name: text for name, text in environment.items() if name not in held}


def _limits(catalog: Catalog, name: str) -> Limits:
    model = catalog.get(name)
    slots = model.slots * model.replicas
    device = device_of(model)
    grace = model.cancel_grace_seconds
    return Limits(slots, model.queue_places, model.queue_timeout_seconds, grace, device, model.replicas)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""Desired against actual: starts engines, watches them, replaces the dead and the hung, stops them in order.

It owns the state of every model and replica; others read it. It refuses to start an engine whose file is not checked,
and to leave a process behind.

One keeper runs for each engine process that is wanted (see keeper.py) and has its memory (see residency.py).
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import aiohttp

from forebay.clock import Clock
from forebay.config import Settings
from forebay.errors import EngineUnavailable, ForebayError, ModelNotReady, ModelTooLarge, Quarantined, SetupError
from forebay.inference import Request
from forebay.model_config import Model, UpstreamModel
from forebay.replicas import figures
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import Traits
from forebay.replicas.connection import open_session
from forebay.replicas.keeper import Keeper, Workshop
from forebay.replicas.launcher import Launcher
from forebay.replicas.postmortem import Cause, Quarantine
from forebay.replicas.pull import Puller
from forebay.replicas.record import ModelRecord
from forebay.replicas.replica import Replica
from forebay.replicas.residency import Books, Residency
from forebay.replicas.state import ModelState
from forebay.replicas.upstream import Circuit
from forebay.telemetry import Log, Metrics

_PROBE_SECONDS = 0.05
_WAITING_TICK_SECONDS = 0.05  # while a model waits for memory
_CONNECT_SECONDS = 10.0
_PULL_RETRY_AFTER_SECONDS = 10.0
_PULL_PAUSE_SECONDS = 30.0
_NO_PULL = "The model {} could not be pulled; the server's log says why."


class Supervisor:
    """Keeps the engines that are wanted alive."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        puller: Puller,
        launcher: Launcher,
        books: Books,
        clock: Clock,
        metrics: Metrics,
        environment: Mapping[str, str],
    ) -> None:
        self._limits = settings.supervisor
        self._quarantine = Quarantine(self._limits.quarantine_seconds, self._limits.quarantine_entries_max, clock)
        self.on_change: Callable[[str], None] = lambda _name: None
        self._clock = clock
        self._log = Log()
        self._catalog = catalog
        self._puller = puller
        self._auto_pull = settings.pull.auto
        self._circuits = {
            name: Circuit(name, model.options, clock, metrics, partial(self._changed, name))
            for name in catalog.names()
            if isinstance(model := catalog.get(name), UpstreamModel)
        }
        self._shop = Workshop(
            self._limits,
            launcher,
            catalog,
            self._quarantine,
            clock,
            metrics,
            self._log,
            environment,
            self._session,
            self._changed,
            self._circuits,
            lambda name: books.closed() if books.need(name) else None,
        )
        self._books = books
        self.residency = Residency(books, settings.memory, clock, metrics, self._log)
        self.residency.on_verdict = self._changed
        self._models = {name: ModelRecord(name, catalog.get(name)) for name in catalog.names()}
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._wake = asyncio.Event()
        self._closing = False

    # What others ask.

    def replicas(self, model: str) -> list[Replica]:
        """The ready replicas of `model`."""
        return [keeper.replica for keeper in self._models[model].keepers if keeper.replica and keeper.replica.ready]

    def loaded(self) -> list[str]:
        """The models of which a replica is ready."""
        return [name for name in self._models if self.replicas(name)]

    def record(self, model: str) -> ModelRecord:
        """What is known of `model`; raises ModelNotFound."""
        self._catalog.get(model)
        return self._models[model]

    def records(self) -> list[ModelRecord]:
        """Every model of the catalogue."""
        return list(self._models.values())

    def keepers(self) -> list[tuple[str, Keeper]]:
        """Every keeper, and whose it is."""
        return [(record.name, keeper) for record in self._models.values() for keeper in record.keepers]

    def state(self, model: str) -> ModelState:
        """Where `model` is in its life."""
        record = self._models[model]
        states = {keeper.state for keeper in record.keepers}
        for state in (ModelState.READY, ModelState.STARTING, ModelState.DRAINING, ModelState.FAILED):
            if state in states:
                return state
        if record.waiting is not None:
            return ModelState.WAITING if record.wanted else ModelState.FAILED
        if ModelState.ASLEEP in states:
            return ModelState.ASLEEP
        if self._puller.pulling(model):
            return ModelState.PULLING
        if record.failure is not None:
            return ModelState.FAILED
        return ModelState.STOPPED if self._present(record) else ModelState.ABSENT

    def settled(self, model: str) -> bool:
        """Whether `model` is up, or has left its memory to others: it comes back when somebody asks for it, if it can."""
        return self._models[model].swapped or self.state(model) is ModelState.READY

    def circuit(self, model: str) -> str | None:
        """The state of the circuit of an upstream; None for what runs here."""
        circuit = self._circuits.get(model)
        return None if circuit is None else circuit.state.value

    def pull_progress(self, model: str) -> dict[str, int | None] | None:
        """Bytes done and in all while `model` is pulled."""
        if not self._puller.pulling(model):
            return None
        state = self._puller.state(model)
        return {"done_bytes": state.done_bytes, "total_bytes": state.total_bytes}

    async def engine_figures(self) -> bytes:
        """What ready engines count themselves, as text for Prometheus; without those that are paused or do not answer."""
        return await figures.gather(
            (replica, self._session(name, replica.traits, record.settings))
            for name, record in self._models.items()
            for replica in self.replicas(name)
            if replica.traits.metrics_path and not replica.paused
        )

    def summon(self, model: str) -> None:
        """Want `model` up. Returns if waiting for it makes sense; raises ModelNotReady or EngineUnavailable if not."""
        record = self._models[model]
        if record.failure is not None and self._clock.monotonic() - record.failed_at < _PULL_PAUSE_SECONDS:
            raise EngineUnavailable(_NO_PULL.format(model), retry_after_seconds=_PULL_PAUSE_SECONDS)
        if not record.wanted:
            self._wake.set()
        record.want(self._clock.monotonic())
        if not self._present(record):
            self._refuse_absent(record)
        trouble = self.trouble(model)
        if trouble is not None:
            raise trouble

    def trouble(self, model: str) -> ForebayError | None:
        """Why nobody should wait for `model`, if so."""
        record = self._models[model]
        refusal = self._circuits[model].refusal() if model in self._circuits else None
        if refusal is not None:
            return refusal
        too_large = self.residency.refusal(record, self.records())
        if too_large is not None:
            return ModelTooLarge(too_large)
        if not record.wanted and record.failure is None:
            return EngineUnavailable(f"The model {model} was unloaded. Try again to load it.", retry_after_seconds=1.0)
        keepers = [keeper for keeper in record.keepers if not keeper.ended]
        if any(keeper.hopeful for keeper in keepers) or not (keepers or record.failure):
            return None  # one may come up, or is about to be launched
        wait = self._seconds_to_retry(record)
        return EngineUnavailable(
            f"The model {model} could not be started; the server's log says why.", retry_after_seconds=wait
        )

    def waits(self, model: str) -> bool:
        """Whether `model` waits for memory: nothing of it runs or starts."""
        record = self._models[model]
        return record.waiting is not None and not record.awake

    def check(self, request: Request) -> None:
        """Raise Quarantined if engines died of this input."""
        if self._quarantine.holds(request):
            raise Quarantined

    # What operators ask.

    def load(self, model: str) -> None:
        """Want `model` up, although nobody asks for it."""
        record, now = self.record(model), self._clock.monotonic()
        record.want(now)
        if record.ordered_at is None:  # who orders it again has not waited less for that
            record.ordered_at = now
        self._wake.set()

    def unload(self, model: str) -> None:
        """Let `model` finish what it runs, then stop it."""
        record = self.record(model)
        record.let_go()
        record.swapped = False
        self._wake.set()
        self.on_change(model)

    def restart(self, model: str) -> None:
        """Replace every process of `model` once what it runs is finished; a failed model is tried again at once."""
        record = self.record(model)
        record.failure = None
        for keeper in record.keepers:
            (keeper.ask_stop if keeper.sleeps else keeper.ask_restart)()
        self.load(model)

    def condemn(self, replica: Replica) -> None:
        """Replace `replica`: it did not stop a request. What else runs on it may finish first."""
        for keeper in self._models[replica.model].keepers:
            if keeper.replica is replica:
                keeper.condemn(Cause.REFUSED_TO_STOP)

    # The loop.

    async def run(self) -> None:
        """Compare desired and actual on every tick, until cancelled; then stop every engine."""
        try:
            while True:
                self._wake.clear()
                for record in self._models.values():
                    self._reconcile(record)
                self._house()
                with contextlib.suppress(TimeoutError):
                    async with self._clock.timeout(self._tick_seconds):
                        await self._wake.wait()
        finally:
            await self._close()

    def check_together(self, models: Iterable[str]) -> None:
        """Raise SetupError if `models` cannot all be in memory at once."""
        self.residency.check_together([self.record(name) for name in models])

    async def wait_until_ready(self, model: str) -> None:
        """Want `model` and wait for it. Raises SetupError with the reason if it cannot be loaded.

        Where only what was learned of others keeps it out, it is not waited for: those who ask for it are told.
        """
        self.load(model)
        while not self.settled(model):
            record = self._models[model]
            if record.failure is not None:
                raise record.failure
            refusal = self.residency.refusal(record, self.records())
            if refusal is not None and self.residency.refusal(record, self.records(), least=True) is not None:
                raise SetupError(f"The model {model} cannot be loaded: {refusal}")
            if refusal is not None:
                self.residency.give_way(record, refusal)
                return
            for keeper in record.keepers:
                if keeper.failure is not None:
                    raise SetupError(f"The model {model} cannot be loaded: {keeper.failure}")
            await self._clock.sleep(_PROBE_SECONDS)

    def _changed(self, model: str) -> None:
        self.on_change(model)

    @property
    def _tick_seconds(self) -> float:
        waits = any(record.wanted and record.waiting is not None for record in self._models.values())
        return min(self._limits.tick_seconds, _WAITING_TICK_SECONDS) if waits else self._limits.tick_seconds

    def _reconcile(self, record: ModelRecord) -> None:
        """(1) not wanted: stop; (2) no file: pull; (3) cool-down over: restart when idle."""
        record.keepers = [keeper for keeper in record.keepers if not keeper.ended]
        if any(keeper.ready_at is not None and not keeper.leaving for keeper in record.keepers):
            record.swapped = False
        if not record.wanted:
            for keeper in record.keepers:
                if not (keeper.sleeps and record.swapped):
                    keeper.ask_stop()
            return
        if record.failure is not None:
            return
        if not self._present(record):
            self._pull(record)
            return
        record.pull_ordered = False
        if record.halvings and self._may_restore(record):
            self._restore(record)

    def _house(self) -> None:
        """Start what has its memory; have those leave who make room for others."""
        if self._closing:
            return
        for record in self.residency.review(self.records(), self._present):
            asleep = record.sleepers
            if asleep:
                asleep[0].wake()
            else:
                record.keepers.append(self._keeper(record))

    def _keeper(self, record: ModelRecord) -> Keeper:
        return Keeper(
            self._shop,
            record.name,
            record.settings,
            lambda: record.slots,
            lambda: self._halve(record),
            self._wake.set,
        )

    def _halve(self, record: ModelRecord) -> None:
        self._books.out_of_memory(record.name)
        record.halvings = min(record.halvings + 1, record.settings.slots.bit_length() - 1)
        record.halved_until = self._clock.monotonic() + self._limits.oom_cooldown_seconds

    def _may_restore(self, record: ModelRecord) -> bool:
        """Whether the cool-down is over and nobody is in the way; after a second one they are no reason any longer."""
        over = self._clock.monotonic() - record.halved_until
        idle = all(keeper.replica is None or keeper.replica.idle.is_set() for keeper in record.keepers)
        return over >= self._limits.oom_cooldown_seconds or (over >= 0 and idle)

    def _restore(self, record: ModelRecord) -> None:
        """Take back one halving; the next one, if there is one, after another cool-down."""
        record.halvings -= 1
        record.halved_until = self._clock.monotonic() + self._limits.oom_cooldown_seconds
        self._log.info("engine.slots_restored", model=record.name, slots=record.slots)
        for keeper in record.awake:
            if keeper.retry_at is None:  # one whose start is yet to come has all of them then
                keeper.ask_restart()

    def _present(self, record: ModelRecord) -> bool:
        return not self._catalog.needs_file(record.name) or self._catalog.present(record.name)

    def _pull(self, record: ModelRecord) -> None:
        if self._puller.pulling(record.name):
            return
        failed = self._puller.failure(record.name) if record.pull_ordered else None
        if not self._auto_pull:
            failed = f"this server does not pull by itself; run `forebay models pull {record.name}`."
        if failed is None:
            record.pull_ordered = True
            self._log.info("model.pulling", model=record.name)
            self._puller.start(record.name)
            return
        record.failure = SetupError(f"The model {record.name} cannot be pulled: {failed}")
        record.failed_at = self._clock.monotonic()
        record.pull_ordered = record.wanted = False
        self._log.error("model.pull_failed", model=record.name, reason=failed)
        self.on_change(record.name)

    def _refuse_absent(self, record: ModelRecord) -> None:
        if not self._auto_pull:
            record.wanted = False
            raise EngineUnavailable(
                f"The model {record.name} is not pulled, and this server does not pull by itself. "
                f"Ask its operator to run `forebay models pull {record.name}`.",
                retry_after_seconds=_PULL_RETRY_AFTER_SECONDS,
            )
        raise ModelNotReady(retry_after_seconds=_PULL_RETRY_AFTER_SECONDS)

    def _seconds_to_retry(self, record: ModelRecord) -> float:
        times = [keeper.retry_at for keeper in record.keepers if keeper.retry_at is not None]
        return max(1.0, min(times) - self._clock.monotonic()) if times else _PULL_RETRY_AFTER_SECONDS

    def _session(self, name: str, traits: Traits, model: Model) -> aiohttp.ClientSession:
        """The HTTP session of one model; its processes share it."""
        if name not in self._sessions:
            seconds = model.options.connect_timeout_seconds if isinstance(model, UpstreamModel) else _CONNECT_SECONDS
            reuse = traits.reuses_connections
            self._sessions[name] = open_session(reuses_connections=reuse, connect_timeout_seconds=seconds)
        return self._sessions[name]

    async def _close(self) -> None:
        self._closing = True
        keepers = [keeper for record in self._models.values() for keeper in record.keepers]
        for keeper in keepers:
            keeper.end_now()
        await asyncio.gather(*(keeper.finished() for keeper in keepers))
        await self._puller.close()
        for session in self._sessions.values():
            await session.close()

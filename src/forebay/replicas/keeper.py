"""Keeps one engine process alive: start, watch, bury, back off, again.

It is the only writer of its replica's state. It refuses to restart without a pause what keeps dying.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from forebay.clock import Clock, new_id, new_token
from forebay.config import upstream_key
from forebay.errors import EngineUnavailable, SetupError
from forebay.model_config import CommandModel, Model, UpstreamModel, VllmModel
from forebay.replicas import probes, sleep
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import Traits, command_for, traits_of
from forebay.replicas.launcher import EngineProcess, Launcher, end
from forebay.replicas.postmortem import Cause, Death, Quarantine, classify, kernel_oom_kills
from forebay.replicas.replica import Replica, ReplicaState
from forebay.replicas.state import ModelState
from forebay.replicas.upstream import Circuit, Upstream
from forebay.server_config import SupervisorSettings
from forebay.telemetry import Log, Metrics

_PROBE_SECONDS = 0.05
_LOOK_SECONDS = 1.0  # between two looks whether the machine is well enough again
_FAILED_STARTS_MAX = 3
_SLEEP_SECONDS_MAX = 60.0  # weights go to the host's memory meanwhile
_KEY_BYTES = 32
_LOGGED_LINES = 8

_Exit = asyncio.Future[int]  # the end of a process
_Hang = asyncio.Future[None]  # that it does not turn any longer


@dataclass(frozen=True, slots=True)
class Workshop:
    """What every keeper works with."""

    limits: SupervisorSettings
    launcher: Launcher
    catalog: Catalog
    quarantine: Quarantine
    clock: Clock
    metrics: Metrics
    log: Log
    environment: Mapping[str, str]
    session: Callable[[str, Traits, Model], aiohttp.ClientSession]
    on_change: Callable[[str], None]
    circuits: Mapping[str, Circuit]
    held_back: Callable[[str], str | None]  # why nothing of a model may be started now, if so


class Keeper:
    """One engine process that is wanted, dead or alive.

    `slots` says how many places the next process gets; `on_out_of_memory` is told before it is asked again, and `on_end`
    when nothing of it is left, or it has fallen asleep. It came up at `ready_at` (None while it is not up), `load_seconds`
    after its launch; it sleeps since `asleep_at`.
    """

    def __init__(
        self,
        shop: Workshop,
        name: str,
        model: Model,
        slots: Callable[[], int],
        on_out_of_memory: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self.id = new_id("keeper")
        self.replica: Replica | None = None
        self.ready_at: float | None = None
        self.asleep_at: float | None = None
        self.load_seconds = 0.0
        self.retry_at: float | None = None
        self.retry_at_epoch: float | None = None
        self.failure: str | None = None
        self._shop = shop
        self._name = name
        self._model = model
        self._slots = slots
        self._on_out_of_memory = on_out_of_memory
        self._failed_starts = 0
        self._deaths_in_a_row = 0
        self._leaving = asyncio.Event()
        self._stop_asked = False
        self._came_up = False
        self._launched_at = 0.0
        self._condemned: Cause | None = None
        self._sleep_asked = False
        self._on_end = on_end
        self._run = asyncio.create_task(self._keep())
        self._run.add_done_callback(lambda _run: on_end())

    @property
    def ended(self) -> bool:
        """Whether its work is over."""
        return self._run.done()

    @property
    def leaving(self) -> bool:
        """Whether it was told to end, or to sleep and does not yet."""
        return self._stop_asked or (self._sleep_asked and self.asleep_at is None)

    @property
    def sleeps(self) -> bool:
        """Whether it sleeps or is about to."""
        return self._sleep_asked and not self._stop_asked

    @property
    def sleep_level(self) -> int:
        """How its engine can sleep; 0 if it cannot now."""
        return self.replica.traits.sleep_level if self.ready_at is not None and self.replica is not None else 0

    @property
    def hopeful(self) -> bool:
        """Whether a request may wait for it."""
        return not self.ended and self._failed_starts < _FAILED_STARTS_MAX and self.failure is None

    @property
    def state(self) -> ModelState:
        """The state of its replica in the words of a model."""
        if self.replica is None or self.replica.state is ReplicaState.STOPPED:
            return ModelState.FAILED if self.failure else ModelState.STARTING
        return ModelState(self.replica.state.value)

    def ask_stop(self) -> None:
        """Drain, stop, and end."""
        self._stop_asked = True
        self._leave()

    def ask_sleep(self) -> None:
        """Drain, then give the device's memory back and keep the process; end if the engine does not."""
        self._sleep_asked = True
        self._leave()

    def wake(self) -> None:
        """Take the memory again, and serve. It has to be asleep."""
        self._sleep_asked, self.asleep_at = False, None
        self._leaving.set()

    def ask_restart(self) -> None:
        """Drain, stop, and start again; what failed gets a new chance."""
        self._failed_starts = 0
        self.failure = None
        self._leave()

    def condemn(self, cause: Cause) -> None:
        """Kill it once nothing but condemned work runs on it."""
        if self._condemned is None:
            self._condemned = cause
            self._shop.log.warning("engine.condemned", model=self._name, cause=cause.value)
        self._leave()

    def end_now(self) -> None:
        """End without draining."""
        self._stop_asked = True
        self._run.cancel()

    async def finished(self) -> None:
        """Wait until nothing of it is left."""
        await asyncio.wait([self._run])

    def _leave(self) -> None:
        if self.replica is not None and self.replica.ready:
            self.replica.state = ReplicaState.DRAINING
            self.replica.resume()
            self._changed()
        self._leaving.set()

    def _changed(self) -> None:
        self._shop.log.debug("model.state", model=self._name, state=self.state.value)
        self._shop.on_change(self._name)

    async def _keep(self) -> None:
        while not self._stop_asked:
            self._leaving.clear()
            self._sleep_asked = False
            self._condemned = None
            self._came_up = False
            began = self._shop.clock.monotonic()
            try:
                await self._live_once()
            except SetupError as error:
                self._fail(str(error))
            except asyncio.CancelledError:
                break
            except Exception:  # the supervisor's step: a bug here must not leave a model unwatched
                self._shop.log.error("supervisor.bug", exc_info=True, model=self._name)
                self._fail("the supervisor met a bug of its own; the server's log has it.")
            lived = self._shop.clock.monotonic() - began
            if lived >= self._shop.limits.healthy_seconds:
                self._deaths_in_a_row = 0
            self._changed()
            await self._back_off()

    async def _back_off(self) -> None:
        troubles = self._deaths_in_a_row + self._failed_starts
        if self._stop_asked or troubles == 0:
            return
        limits = self._shop.limits
        longest = min(limits.backoff_seconds_max, limits.backoff_seconds_min * 2.0 ** min(troubles - 1, 30))
        seconds = self._shop.clock.jitter(longest)
        self.retry_at = self._shop.clock.monotonic() + seconds
        self.retry_at_epoch = self._shop.clock.now() + seconds
        await self._left_alone(seconds)
        await self._held_back()
        self.retry_at = self.retry_at_epoch = None

    async def _held_back(self) -> None:
        """Wait while the machine is not well enough for another start: what died of it would only make it worse."""
        shop, reason = self._shop, self._shop.held_back(self._name)
        if reason is not None:
            shop.log.warning("engine.held_back", model=self._name, reason=reason)
        while shop.held_back(self._name) is not None and not self._leaving.is_set():
            self.retry_at, self.retry_at_epoch = (
                shop.clock.monotonic() + _LOOK_SECONDS,
                shop.clock.now() + _LOOK_SECONDS,
            )
            await self._left_alone(_LOOK_SECONDS)

    async def _left_alone(self, seconds: float) -> None:
        """Wait so long; an operator's restart or unload cuts it short."""
        with contextlib.suppress(TimeoutError):
            async with self._shop.clock.timeout(seconds):
                await self._leaving.wait()

    def _fail(self, reason: str) -> None:
        """Note a start that cannot work as configured: it is tried again only after the longest back-off."""
        self._failed_starts = max(self._failed_starts + 1, _FAILED_STARTS_MAX)
        self.failure = reason
        self._shop.log.error("model.state", model=self._name, state="failed", reason=reason)

    async def _live_once(self) -> None:
        """(1) launch, (2) wait until it answers, (3) serve, (4) drain, (5) stop, (6) bury."""
        replica = self._new_replica()
        self._launched_at, oom_before = self._shop.clock.monotonic(), kernel_oom_kills()
        replica.process = process = await self._launch(replica)
        self.replica = replica
        cause: Cause | None = None
        try:
            cause = await self._start(replica, process) or await self._work(replica, process)
        finally:
            replica.state, self.ready_at, self.asleep_at = ReplicaState.STOPPED, None, None
            replica.resume()
            self._changed()
            grace = None if cause is not None or self._condemned is not None else self._shop.limits.stop_grace_seconds
            exit_code = await end(process, grace) if process is not None else 0
            replica.process = None  # its number may be another one's from now on
            self._bury(replica, process, cause, exit_code, kernel_oom_kills() - oom_before)

    def _new_replica(self) -> Replica:
        shop, model, traits = self._shop, self._model, traits_of(self._model)
        session, identity = shop.session(self._name, traits, model), new_id("replica")
        if not isinstance(model, UpstreamModel):
            return Replica(identity, self._name, self._slots(), traits, session, shop.quarantine)
        return Upstream(
            identity,
            self._slots(),
            traits,
            session,
            shop.quarantine,
            model.options,
            shop.circuits[self._name],
            shop.limits.stall_seconds,
            shop.clock,
            shop.metrics,
        )

    async def _launch(self, replica: Replica) -> EngineProcess | None:
        shop, model = self._shop, self._model
        if isinstance(model, UpstreamModel):
            replica.address = model.options.base_url.removesuffix("/")
            key = upstream_key(model.options, shop.environment)
            replica.headers = {**model.options.headers, **({"Authorization": f"Bearer {key}"} if key else {})}
            return None
        key = new_token(_KEY_BYTES)
        replica.headers = {"Authorization": f"Bearer {key}"}
        path = shop.catalog.path(replica.model) if shop.catalog.needs_file(replica.model) else None
        port = _free_port() if isinstance(model, CommandModel | VllmModel) else 0
        cooldown = shop.limits.oom_cooldown_seconds
        command = command_for(replica.model, model, replica.slots, path, key, port, oom_cooldown_seconds=cooldown)
        process = await shop.launcher.launch(command, lambda line: self._line(replica, key, line))
        shop.metrics.engine_starts.labels(replica.model).inc()
        shop.log.info("engine.starting", model=replica.model, replica=replica.id, pid=process.pid)
        return process

    def _line(self, replica: Replica, key: str, line: str) -> None:
        requests = [request.id for request in list(replica.in_flight.values())[:8]]
        self._shop.log.debug(
            "engine.line", model=replica.model, replica=replica.id, requests=requests, line=line.replace(key, "***")
        )

    async def _start(self, replica: Replica, process: EngineProcess | None) -> Cause | None:
        """Wait until the engine answers; the cause if it does not."""
        if process is not None:
            try:
                async with self._shop.clock.timeout(self._shop.limits.start_timeout_seconds):
                    await self._come_up(replica, process)
            except TimeoutError:
                return Cause.FAILED_START
            except EngineUnavailable:
                return Cause.FAILED_START
        if self._leaving.is_set():
            return None
        if process is not None:
            replica.tools = await probes.supports_tools(self._session_of(replica), replica)
            if replica.tools is None:
                self._shop.log.debug("engine.no_tools_probe", model=self._name)
            if self._leaving.is_set():
                return None
        self._came_up = True
        self._serve_from_now(replica)
        self._failed_starts = 0
        self.failure = None
        self._shop.log.info("engine.ready", model=replica.model, replica=replica.id, slots=replica.slots)
        self._changed()
        return None

    def _serve_from_now(self, replica: Replica) -> None:
        self.ready_at = self._shop.clock.monotonic()
        self.load_seconds = self.ready_at - self._launched_at
        replica.state = ReplicaState.READY

    async def _come_up(self, replica: Replica, process: EngineProcess) -> None:
        """Wait until the engine answers or is to leave. Raises EngineUnavailable if it ends first."""
        address = asyncio.ensure_future(process.address())
        # Read in any case: it may end, and be told to leave, at the same moment.
        address.add_done_callback(lambda done: done.cancelled() or done.exception())
        leaving = asyncio.ensure_future(self._leaving.wait())
        try:
            await asyncio.wait([address, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not leaving.done():
                replica.address = address.result()
                await self._wait_healthy(replica, process)
        finally:
            address.cancel()
            leaving.cancel()

    async def _wait_healthy(self, replica: Replica, process: EngineProcess) -> None:
        exited = asyncio.ensure_future(process.wait())
        try:
            while not exited.done():
                if self._leaving.is_set() or await probes.answers(
                    self._session_of(replica), replica, replica.traits.health_path
                ):
                    return
                await asyncio.wait([exited], timeout=_PROBE_SECONDS)
        finally:
            exited.cancel()
        raise EngineUnavailable

    async def _work(self, replica: Replica, process: EngineProcess | None) -> Cause | None:
        """Serve and drain; the cause if the engine dies or hangs meanwhile. An upstream has nothing that could."""
        if process is None:
            await self._leaving.wait()
            await replica.idle.wait()
            return None
        exited = asyncio.ensure_future(process.wait())
        hung = asyncio.ensure_future(self._stalled(replica))  # one for both: to be told to leave is no sign of life
        try:
            while True:
                cause = await self._serve(exited, hung) or await self._drain(replica, exited, hung)
                if cause is not None or not self.sleeps or self._condemned is not None:
                    return cause
                for step in (self._fall_asleep, self._sleep):
                    cause = await step(replica, exited, hung)
                    if cause is not None or self._stop_asked:
                        return cause
        finally:
            exited.cancel()
            hung.cancel()

    async def _serve(self, exited: _Exit, hung: _Hang) -> Cause | None:
        """Watch until it is to leave (None) or has died or hung (the cause)."""
        leaving = asyncio.ensure_future(self._leaving.wait())
        watched: set[asyncio.Future[Any]] = {leaving, exited, hung}
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
        if self._leaving.is_set():
            return None
        return Cause.CRASH if exited.done() else Cause.STALL

    async def _attended(self, step: Coroutine[Any, Any, bool], exited: _Exit, hung: _Hang) -> Cause | None:
        """Have the engine do `step`; the cause if it dies, hangs or does not. Whoever is to leave waits for nothing."""
        doing, watch = asyncio.ensure_future(step), asyncio.ensure_future(self._serve(exited, hung))
        try:
            await asyncio.wait([doing, watch], return_when=asyncio.FIRST_COMPLETED)
            return watch.result() if watch.done() else None if doing.result() else Cause.FAILED_START
        finally:
            doing.cancel()
            watch.cancel()

    async def _fall_asleep(self, replica: Replica, exited: _Exit, hung: _Hang) -> Cause | None:
        """Have it sleep. One that was to, and does not, ends: others wait for its memory."""
        shop = self._shop
        self._leaving.clear()
        slept = sleep.fall_asleep(self._session_of(replica), replica, _SLEEP_SECONDS_MAX, shop.clock)
        cause = await self._attended(slept, exited, hung)
        if cause is not None or self._leaving.is_set():
            self._stop_asked = True
            if cause is Cause.FAILED_START:
                shop.log.warning("engine.sleepless", model=self._name, replica=replica.id)
            return cause if cause is not Cause.FAILED_START else None
        replica.state, self.ready_at, self.asleep_at = ReplicaState.ASLEEP, None, shop.clock.monotonic()
        shop.log.info("engine.asleep", model=self._name, replica=replica.id)
        self._changed()
        self._on_end()
        return None

    async def _sleep(self, replica: Replica, exited: _Exit, hung: _Hang) -> Cause | None:
        """Wait until it is woken or to end; the cause if it does not come up again, or dies, and then for good."""
        cause = await self._serve(exited, hung)
        if cause is not None or self._stop_asked:
            self._stop_asked = True  # nobody has reserved memory for another start
            return cause
        self._leaving.clear()
        shop, self.asleep_at, self._launched_at = self._shop, None, self._shop.clock.monotonic()
        replica.state = ReplicaState.STARTING
        self._changed()
        woken = sleep.wake(self._session_of(replica), replica, shop.limits.start_timeout_seconds, shop.clock)
        cause = await self._attended(woken, exited, hung)
        if cause is not None or self._leaving.is_set():
            return cause
        self._serve_from_now(replica)
        shop.log.info("engine.woken", model=self._name, replica=replica.id, seconds=round(self.load_seconds, 3))
        self._changed()
        return None

    async def _stalled(self, replica: Replica) -> None:
        shop = self._shop
        await probes.stalled(self._session_of(replica), replica, shop.limits.stall_seconds, shop.clock)

    def _session_of(self, replica: Replica) -> aiohttp.ClientSession:
        return self._shop.session(self._name, replica.traits, self._model)

    async def _drain(self, replica: Replica, exited: _Exit, hung: _Hang) -> Cause | None:
        """Let running requests end; the cause if the engine dies or hangs meanwhile.

        A request that refuses to stop does not hold up its own engine's end.
        """
        idle = asyncio.ensure_future(replica.idle.wait())
        watched: set[asyncio.Future[Any]] = {idle, exited, hung}
        try:
            while not replica.idle.is_set() and not (self._condemned and replica.only_refusals_left):
                await asyncio.wait(watched, timeout=_PROBE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if exited.done():
                    return Cause.CRASH
                if hung.done():
                    return Cause.STALL
            return None
        finally:
            idle.cancel()

    def _bury(
        self, replica: Replica, process: EngineProcess | None, cause: Cause | None, exit_code: int, oom_kills: int
    ) -> None:
        lines = process.tail() if process else ()
        # Who still waited on a condemned engine when it died or hung is told of that: it did not refuse to stop for him.
        cause = cause or self._condemned
        if cause is None:
            self._shop.log.info("engine.stopped", model=replica.model, replica=replica.id)
            self._deaths_in_a_row = 0
            replica.death.set_result(Death(Cause.CRASH, exit_code))
            return
        if cause in {Cause.CRASH, Cause.FAILED_START}:
            told = classify(exit_code, lines[-20:], oom_kills, log_is_clean=replica.traits.log_is_clean)
            cause = told if cause is Cause.CRASH or told is not Cause.CRASH else cause
        death = Death(cause, exit_code, lines)
        self._count(replica, death)
        self._blame(replica, death)
        replica.death.set_result(death)

    def _count(self, replica: Replica, death: Death) -> None:
        shop = self._shop
        shop.metrics.engine_deaths.labels(self._name, death.cause.value).inc()
        shop.log.error(
            "engine.died",
            model=self._name,
            replica=replica.id,
            cause=death.cause.value,
            exit_code=death.exit_code,
            last_lines=list(death.last_lines[-_LOGGED_LINES:]),
        )
        if death.cause is Cause.OUT_OF_MEMORY:
            self._on_out_of_memory()
            shop.log.warning("engine.slots_halved", model=self._name, slots=self._slots())
        if death.cause is Cause.WRONG_SETUP:
            self._fail(death.last_lines[-1] if death.last_lines else "the engine gave no reason.")
        elif not self._came_up:  # of whatever it died
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS_MAX:
                last = death.last_lines[-1].rstrip(".") if death.last_lines else "nothing"
                self.failure = f"its engine did not come up ({death.cause.value}); the last that it said was: {last}."
        else:
            self._deaths_in_a_row += 1

    def _blame(self, replica: Replica, death: Death) -> None:
        """Remember the inputs that were in flight; at their second death they are refused."""
        suspects = replica.in_flight if death.cause is not Cause.REFUSED_TO_STOP else replica.refusing
        for request in list(suspects.values()):
            if self._shop.quarantine.record(request):
                self._shop.metrics.quarantined.labels(request.model).inc()
                self._shop.log.warning("input.quarantined", model=request.model, request_id=request.id)


def _free_port() -> int:
    """A port that is free now; an engine that loses the race for it fails its start and gets another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

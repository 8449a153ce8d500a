"""A server that somebody else runs, as a replica: its own timeouts, retries where they are safe, and a circuit breaker.

It refuses to send anything twice once the upstream may have begun to work on it, and to go on asking one that fails.
"""

import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import aiohttp

from forebay.clock import Clock
from forebay.dialects.openai.errors import from_upstream, retry_after
from forebay.engine_options import UpstreamOptions
from forebay.errors import (
    CircuitOpen,
    EngineGarbled,
    EngineTimeout,
    EngineUnavailable,
    ForebayError,
    Overloaded,
    ServerError,
    UpstreamError,
)
from forebay.inference import Priority, Request
from forebay.replicas.breaker import Breaker, CircuitState
from forebay.replicas.commands import Traits
from forebay.replicas.connection import EngineStream
from forebay.replicas.postmortem import Quarantine
from forebay.replicas.replica import Replica
from forebay.telemetry import Log, Metrics

_RETRY_SECONDS_MIN = 0.25
_LEVELS = {CircuitState.CLOSED: 0, CircuitState.HALF_OPEN: 1, CircuitState.OPEN: 2}


class Circuit:
    """The breaker of one upstream with its clock, log and figures. It outlives the replicas."""

    def __init__(
        self, name: str, options: UpstreamOptions, clock: Clock, metrics: Metrics, on_change: Callable[[], None]
    ) -> None:
        self.name = name
        self._breaker = Breaker(options.circuit_failures, options.circuit_cooldown_seconds)
        self._clock = clock
        self._metrics = metrics
        self._on_change = on_change
        self._log = Log()
        self._told = CircuitState.CLOSED
        metrics.upstream_circuit.labels(name).set_function(lambda: _LEVELS[self.state])

    @property
    def state(self) -> CircuitState:
        """Where it is now."""
        return self._breaker.state(self._clock.monotonic())

    def refusal(self) -> CircuitOpen | None:
        """Why nobody may go now, if so."""
        seconds = self._breaker.refuses_for(self._clock.monotonic())
        return None if seconds is None else CircuitOpen(retry_after_seconds=seconds)

    def enter(self) -> int:
        """The round of a request. Raises CircuitOpen."""
        found = self._breaker.enter(self._clock.monotonic())
        if found is None:
            raise self.refusal() or CircuitOpen()
        return found

    def answered(self, round_number: int) -> None:
        """The first bytes are there."""
        self._breaker.answered(round_number)
        self._tell()

    def settle(self, round_number: int, *, reason: str | None, left: bool) -> None:
        """How the request ended: with a failure for `reason`, because its caller left, or well."""
        if left:
            self._breaker.left(round_number)
        elif reason is None:
            self._breaker.succeeded(round_number)
        else:
            self._metrics.upstream_failures.labels(self.name, reason).inc()
            self._breaker.failed(round_number, self._clock.monotonic())
        self._tell()

    def _tell(self) -> None:
        state = self.state
        if state is self._told or state is CircuitState.HALF_OPEN:
            return
        self._told = state
        if state is CircuitState.OPEN:
            self._log.warning("upstream.circuit_opened", model=self.name)
            self._on_change()
        else:
            self._log.info("upstream.circuit_closed", model=self.name)


class UpstreamStream(EngineStream):
    """An answer of an upstream: the first bytes are waited for before it is passed on, and no silence lasts for ever."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        stall_seconds: float,
        clock: Clock,
    ) -> None:
        self._what = (session, url, headers, body)
        self._stall_seconds = stall_seconds
        self._clock = clock
        self._first: bytes | None = None
        super().__init__(session, url, headers, body)

    async def look(self) -> None:
        """Wait for the first bytes of the answer; `read` gives them again."""
        self._first = await super().read()

    async def read(self) -> bytes:
        """The next bytes. Raises EngineTimeout after a silence."""
        if self._first is not None:
            data, self._first = self._first, None
            return data
        try:
            return await self._pauses.within(self._stall_seconds, self._clock, super().read)
        except TimeoutError:
            raise EngineTimeout("The provider behind this model stopped in the middle of its answer.") from None

    async def drop(self) -> None:
        """Let go of an answer that nobody saw."""
        await self._close()
        self.connection = None
        self.finished = False

    def again(self) -> None:
        """Send it once more after `drop`."""
        self._begin(*self._what)


class Upstream(Replica):
    """The one replica of an upstream."""

    def __init__(
        self,
        replica_id: str,
        slots: int,
        traits: Traits,
        session: aiohttp.ClientSession,
        quarantine: Quarantine,
        options: UpstreamOptions,
        circuit: Circuit,
        stall_seconds: float,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        super().__init__(replica_id, circuit.name, slots, traits, session, quarantine)
        self._options = options
        self._circuit = circuit
        self._stall_seconds = stall_seconds
        self._clock = clock
        self._retries = metrics.upstream_retries.labels(circuit.name)

    @asynccontextmanager
    async def run(
        self,
        request: Request,
        grace_seconds: float,
        on_refusal: Callable[[Replica], None],
        on_stopped: Callable[[], None],
    ) -> AsyncIterator[EngineStream]:
        """As for any replica. Raises CircuitOpen without a word to the upstream while it is left alone.

        Batch work is told so, too, when its own failure has opened the circuit: it is to wait, and not to blame.
        """
        try:
            round_number = self._circuit.enter()
        except CircuitOpen:
            on_stopped()
            raise
        left = True
        try:
            async with super().run(request, grace_seconds, on_refusal, on_stopped) as stream:
                self._circuit.answered(round_number)
                yield stream
            left = not stream.finished
        except ForebayError as error:
            reason = _failure(error)
            self._circuit.settle(round_number, reason=reason, left=False)
            refusal = self._circuit.refusal() if reason and request.priority is Priority.BATCH else None
            if refusal is not None:
                raise refusal from None
            raise
        except BaseException:
            self._circuit.settle(round_number, reason=None, left=True)
            raise
        else:
            self._circuit.settle(round_number, reason=None, left=left)

    def _stream_for(self, request: Request) -> EngineStream:
        base = self.address
        path = request.path.removeprefix("/v1") if request.path.startswith("/v1/") else request.path
        url = (base if path != request.path else base.removesuffix("/v1")) + path
        return UpstreamStream(
            self._session, url, self._headers_for(request), request.body, self._stall_seconds, self._clock
        )

    def _headers_for(self, request: Request) -> dict[str, str]:
        headers = super()._headers_for(request)
        if request.caller_key is not None:
            headers["Authorization"] = f"Bearer {request.caller_key}"
        return headers

    async def _open(self, stream: EngineStream, request: Request) -> None:
        """Wait for the first bytes; ask again where nothing can have been done yet, a few times."""
        assert isinstance(stream, UpstreamStream)
        for attempt in itertools.count(1):
            try:
                await self._try(stream, request)
            except (Overloaded, EngineUnavailable) as error:
                patient = request.priority is Priority.BATCH and isinstance(error, Overloaded)
                # All lines of a batch wait together, and none of them in a place.
                pause = None if patient else self._pause(error, attempt, reached=stream.connection is not None)
                if pause is None:
                    raise
            else:
                return
            self._retries.inc()
            await stream.drop()
            await self._clock.sleep(pause)
            stream.again()

    async def _try(self, stream: UpstreamStream, request: Request) -> None:
        try:
            async with self._clock.timeout(self._options.first_byte_timeout_seconds):
                status = await stream.open()
                if status == 200:
                    await stream.look()
                    return
                said = self._strike_out((await stream.read_error()).decode("utf-8", "replace"), request)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            raise EngineUnavailable("The provider behind this model cannot be reached. Try again later.") from None
        except TimeoutError:
            raise EngineTimeout("The provider behind this model did not begin to answer in time.") from None
        seconds = retry_after(stream.header("Retry-After"), self._clock.now())
        own = request.caller_key is not None
        raise from_upstream(status, said.encode(), retry_after_seconds=seconds, callers_key=own)

    def _pause(self, error: ForebayError, attempt: int, *, reached: bool) -> float | None:
        """How long to wait before asking again; None to give up."""
        if attempt > self._options.retries_max:
            return None
        if not reached:
            return self._clock.jitter(_RETRY_SECONDS_MIN * 2.0 ** min(attempt - 1, 10))
        seconds = error.retry_after_seconds
        return seconds if seconds is not None and seconds <= self._options.retry_wait_seconds_max else None

    async def _explain(self, request: Request, error: Exception) -> ForebayError:
        """What a broken connection meant; there is no process that could have died."""
        return UpstreamError("The provider behind this model broke off its answer.")


def _failure(error: ForebayError) -> str | None:
    """The word for what counts against the upstream; None for an answer, welcome or not."""
    match error:
        case CircuitOpen():
            return None
        case EngineTimeout():
            return "timeout"
        case EngineUnavailable():
            return "unavailable"
        case EngineGarbled():
            return "garbled"
        case UpstreamError() if error.code == "upstream_refused":
            return None
        case ServerError():
            return "error"
        case _:
            return None

"""The first story: one request, admitted, run and answered while its caller waits.

Reads like this: parse -> admit -> run -> relay or gather. It refuses to let work go on that nobody waits for: a caller
that goes away, stalls or cancels interrupts the visit, and leaving the permit's block stops the engine.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from forebay.clock import Clock
from forebay.config import Settings
from forebay.dialects.answer import Progress
from forebay.dialects.openai.call import Call
from forebay.errors import (
    EngineGarbled,
    EngineTimeout,
    ForebayError,
    NotFound,
    Overloaded,
    RateLimited,
    RequestCancelled,
    ServerError,
    ShuttingDown,
)
from forebay.gateway.answers import error_answer
from forebay.gateway.auth import Principal
from forebay.gateway.places import of_one_project
from forebay.gateway.rates import Rates
from forebay.gateway.streams import EVENT_STREAM, in_pieces
from forebay.metering.estimate import at_most
from forebay.metering.meter import Meter, Reservation
from forebay.quotas import Amounts, Use
from forebay.replicas.catalog import Catalog
from forebay.replicas.connection import EngineStream
from forebay.scheduler.assembly import Assembler
from forebay.scheduler.permit import Permit
from forebay.scheduler.scheduler import Scheduler
from forebay.telemetry import Log, Metrics

_SWEEP_SECONDS = 1.0
_SLOW_READER_SECONDS = 0.005  # what comes after a reader who took longer says nothing of the engine
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

ResultT = TypeVar("ResultT")
Keep = Callable[[Call], Awaitable[None]]  # writes the answer to a call down before its end is sent; raises ForebayError


class Waiting(StrEnum):
    """Whom a visit waits for."""

    LINE = "line"
    FIRST_BYTES = "first_bytes"
    ENGINE = "engine"
    CLIENT = "client"


class Visit:
    """One request at the front door. Written by its own answer; anybody may interrupt it."""

    def __init__(self, call: Call, principal: Principal, tokens_estimate: int, arrived_at: float) -> None:
        self.call = call
        self.tokens_estimate = tokens_estimate
        self.principal = principal
        self.arrived_at = arrived_at
        self.waiting = Waiting.LINE
        self.since = arrived_at
        self.admitted_at = 0.0
        self.first_content_at = 0.0
        self.progress = Progress()
        self.reservation: Reservation | None = None
        self.interruption: ForebayError | None = None
        self.interrupted_by = ""
        self._task = asyncio.current_task()

    def interrupt(self, error: ForebayError, by: str) -> None:
        """End the visit with `error`, once."""
        if self.interruption is None and self._task is not None:
            self.interruption = error
            self.interrupted_by = by
            self._task.cancel()

    @property
    def used(self) -> Use:
        """The tokens so far; where no engine has counted its prompt an estimate of that. To count tokens costs none."""
        usage = self.progress.used
        return Use(1, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)

    async def watch(self, receive: Receive) -> None:
        """Interrupt the visit when its caller goes away."""
        await _left(receive)
        self.interrupt(RequestCancelled("The client closed the connection."), "client_gone")


class Door:
    """The online visits of one server: who is here, who is stuck, and what they cost."""

    def __init__(
        self,
        scheduler: Scheduler,
        assembler: Assembler,
        rates: Rates,
        meter: Meter,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.scheduler = scheduler
        self.assembler = assembler
        self.rates = rates
        self.meter = meter
        self.clock = clock
        self.log = Log()
        self._metrics = metrics
        self._engine_stall_seconds = settings.supervisor.stall_seconds
        self._client_stall_seconds = settings.http.write_stall_seconds
        self._images_held_max = settings.media.held_bytes_max
        self._visits: set[Visit] = set()
        metrics.tasks.set_function(lambda: len(asyncio.all_tasks()))

    async def run(self) -> None:
        """Interrupt visits that make no progress, until cancelled; measure the event loop's lag by the way."""
        while True:
            before = self.clock.monotonic()
            await self.clock.sleep(_SWEEP_SECONDS)
            now = self.clock.monotonic()
            lag = max(0.0, now - before - _SWEEP_SECONDS)
            self._metrics.loop_lag.observe(lag)
            for visit in list(self._visits):
                visit.since = min(now, visit.since + lag)  # it waited for this server meanwhile, and for nobody else
                self._sweep(visit, now)

    async def require(self, caller: Principal, least: Amounts) -> None:
        """Raise RateLimited or QuotaExceeded if nothing is left, and take nothing: for work that comes before."""
        self.rates.require(caller)
        await self.meter.require(caller.project_id, least)

    def cancel(self, project: str, request_id: str) -> None:
        """Interrupt the project's visits with this request id. Raises NotFound if there are none."""
        found = [
            visit
            for visit in self._visits
            if visit.call.request.id == request_id and visit.principal.project_id == project
        ]
        if not found:
            raise NotFound("No request with this id is running or waiting.")
        for visit in found:
            visit.interrupt(RequestCancelled(), "cancel_call")

    def close(self) -> None:
        """End every visit that is left."""
        for visit in list(self._visits):
            visit.interrupt(ShuttingDown(), "shutdown")

    @property
    def empty(self) -> bool:
        """Whether nobody is here."""
        return not self._visits

    @contextmanager
    def visiting(self, visit: Visit) -> Iterator[None]:
        """Count `visit` while it lasts."""
        self._visits.add(visit)
        try:
            yield
        finally:
            self._visits.discard(visit)

    def check_room(self, visit: Visit) -> None:
        """Raise Overloaded where the images of the others, or of its project, leave no room for those of `visit`."""
        wanted, project = visit.call.image_chars, visit.principal.project_id
        if not wanted:
            return
        others = [other for other in self._visits if other is not visit]
        held = sum(other.call.image_chars for other in others)
        own = sum(other.call.image_chars for other in others if other.principal.project_id == project)
        most = self._images_held_max
        if (held and held + wanted > most) or (own and own + wanted > of_one_project(most)):
            raise Overloaded("Too many images are waiting for their models. Try again later.", retry_after_seconds=1)

    def settle(self, visit: Visit, error: ForebayError | None) -> None:
        """Write down how `visit` ended and what it used."""
        request, used, now = visit.call.request, visit.progress.used, self.clock.monotonic()
        code = error.code if error is not None else "ok"
        self._metrics.requests.labels(request.model, request.capability.value, code).inc()
        self._metrics.duration.labels(request.model).observe(now - visit.arrived_at)
        if visit.interrupted_by:
            self._metrics.cancellations.labels(request.model, visit.interrupted_by).inc()
        tokens = used.completion_tokens
        self._metrics.prompt_tokens.labels(request.model).inc(used.prompt_tokens)
        self._metrics.completion_tokens.labels(request.model).inc(tokens)
        if visit.first_content_at:
            self._metrics.first_token.labels(request.model).observe(visit.first_content_at - visit.admitted_at)
            if tokens > 1:
                gap = (now - visit.first_content_at) / (tokens - 1)
                self._metrics.token_time.labels(request.model).observe(gap)
        self.rates.settle(visit.principal, used.total_tokens, visit.tokens_estimate)
        if isinstance(error, ServerError):
            self.log.warning("request.failed", code=code, model=request.model, reason=str(error))

    def refuse(self, call: Call, error: ForebayError) -> None:
        """Write down that `call` was turned away before it became a visit."""
        request = call.request
        self._metrics.requests.labels(request.model, request.capability.value, error.code).inc()
        self._metrics.rejections.labels(request.model, error.code).inc()

    def note_fallback(self, call: Call, other: Call) -> None:
        """Write down that `other` takes the place of `call`."""
        self._metrics.fallbacks.labels(call.request.model, other.request.model).inc()

    def _sweep(self, visit: Visit, now: float) -> None:
        stuck = now - visit.since
        if visit.waiting is Waiting.ENGINE and stuck > self._engine_stall_seconds:
            visit.interrupt(EngineTimeout("The engine stopped making progress on this request."), "engine_stalled")
        elif visit.waiting is Waiting.CLIENT and stuck > self._client_stall_seconds:
            visit.interrupt(RequestCancelled("The client stopped reading."), "client_stalled")


class OnlineAnswer(Response):
    """The answer to one generation request, made while it is sent."""

    def __init__(
        self,
        door: Door,
        call: Call,
        principal: Principal,
        catalog: Catalog,
        tokens_estimate: int,
        rate_headers: Mapping[str, str],
        keep: Keep | None = None,
    ) -> None:
        super().__init__()
        self._tokens_estimate = tokens_estimate
        self._door = door
        self._call = call
        self._principal = principal
        self._catalog = catalog
        self._rate_headers = rate_headers
        self._arrived_at = door.clock.monotonic()
        self._started = False
        self._keep = keep
        self._held = b""
        self._quota_headers: Mapping[str, str] = {}
        self._place = {"x-queue-position": "0", "x-queue-wait-ms": "0"}  # of who waits for nothing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the call; every way that it can end comes out here."""
        visit = Visit(self._call, self._principal, self._tokens_estimate, self._arrived_at)
        watcher = asyncio.create_task(visit.watch(receive))
        error: ForebayError | None = ServerError(code="internal_error")  # what a bug of ours is written down as
        with self._door.visiting(visit):
            try:
                self._door.check_room(visit)
                await self._reserve(visit)
                await self._serve_by_any(visit, send)
                error = None
            except ForebayError as failure:
                error = failure
            except asyncio.CancelledError:
                # An interruption of ours ends here; a cancellation from outside is the server closing.
                error = visit.interruption or ShuttingDown()
                self._uncancel()
            finally:
                watcher.cancel()
                self._close_account(visit)
                self._door.settle(visit, error)
        if error is not None and visit.interrupted_by not in {"client_gone", "client_stalled"}:
            await self._send_error(error, scope, receive, send)

    async def _reserve(self, visit: Visit) -> None:
        """Take what the call may use at most, beside what is taken already for another model. Raises QuotaExceeded."""
        caller, call, meter = self._principal, visit.call, self._door.meter
        request = call.request
        if visit.reservation is None:
            visit.reservation = await meter.reserve(
                caller.project_id, caller.key_id, request.model, request.capability, lambda: at_most(call)
            )
        else:
            await visit.reservation.raise_to(lambda: at_most(call))
            visit.reservation.model = request.model
        self._quota_headers = meter.headers(caller.project_id)

    def _used(self, visit: Visit) -> Use:
        """What the answer has used so far."""
        return visit.used

    def _account_for(self, visit: Visit) -> None:
        """Write down what the answer has used, before its end is sent: a caller who has it all is counted."""
        if visit.reservation is not None:
            visit.reservation.settle(self._used(visit))

    def _close_account(self, visit: Visit) -> None:
        """A stream that its caller has cut counts as far as it came; of what failed nothing does."""
        if visit.reservation is None or not visit.reservation.open:
            return
        cut = visit.interrupted_by in {"client_gone", "client_stalled", "cancel_call"}
        if cut and self._started and self._call.stream:
            visit.reservation.settle(self._used(visit))
        visit.reservation.release()

    async def _serve_by_any(self, visit: Visit, send: Send) -> None:
        """Serve by the model that was asked for or, before anything is sent, by those that stand in for it."""
        while True:
            try:
                await self._serve(visit, send)
            except ForebayError as error:
                other = None if self._started or self._call.otherwise is None else self._call.otherwise(error)
                if other is None:
                    raise
                self._door.note_fallback(self._call, other)
                self._call = visit.call = other
                visit.progress, visit.first_content_at = Progress(), 0.0
                visit.waiting = Waiting.LINE
                await self._reserve(visit)  # without `max_tokens` it is the model that says how much may be written
            else:
                return

    async def _serve(self, visit: Visit, send: Send) -> None:
        call = self._call
        if call.items is None:
            body = await self._run(visit, call, send)
        else:
            made = await self._door.assembler.answer(call, lambda part: self._run(visit, part, send))
            body, visit.progress = made.body, Progress(made.usage)
        if self._keep is not None:
            await self._keep(call)
        self._account_for(visit)
        if call.stream:
            await self._send_events(visit, send, self._held)
            await self._send(visit, send, {"type": "http.response.body", "body": b""})
        else:
            await self._send_whole(visit, send, body)

    async def _send_whole(self, visit: Visit, send: Send, body: bytes, content_type: str = "application/json") -> None:
        size = (b"content-length", str(len(body)).encode())
        head = [(b"content-type", content_type.encode()), size, *self._head_fields()]
        await self._send(visit, send, {"type": "http.response.start", "status": 200, "headers": head})
        for message in in_pieces(body, ends=True):
            await self._send(visit, send, message)

    async def _run(self, visit: Visit, call: Call, send: Send, *, further: bool = False) -> bytes:
        """Admit and run `call`, which is that of the visit or a part of it; the body, if it is not a stream."""
        door, body, model = self._door, b"", self._catalog.get(call.request.model)
        visit.waiting = Waiting.LINE
        async with door.scheduler.admit(call.request, further=further) as permit:
            visit.admitted_at = visit.admitted_at or door.clock.monotonic()
            visit.waiting = Waiting.FIRST_BYTES
            self._note_place(permit)
            try:
                async with door.clock.timeout(model.request_timeout_seconds), permit.run() as stream:
                    if call.stream:
                        await self._relay(visit, permit, stream, send)
                    else:
                        body = await self._gather(visit, permit, call, stream, send)
            except TimeoutError:
                raise EngineTimeout from None
        visit.waiting = Waiting.LINE
        return body

    async def _run_part(self, visit: Visit, part: Call, send: Send) -> bytes:
        """Run one part. The first may be turned away; once one was let in, the others wait as long as a request may run."""
        while True:
            try:
                return await self._run(visit, part, send, further=bool(visit.admitted_at))
            except Overloaded:
                model = self._catalog.get(self._call.request.model)
                in_line = bool(visit.admitted_at) and visit.waiting is Waiting.LINE
                if not in_line or self._door.clock.monotonic() > visit.admitted_at + model.request_timeout_seconds:
                    raise

    async def _relay(self, visit: Visit, permit: Permit, stream: EngineStream, send: Send) -> None:
        clock = self._door.clock
        relay = self._call.shape.relay(self._call, rename=permit.replica.traits.remote_model is not None)
        visit.progress = relay.progress
        ear = permit.ear
        while data := await stream.read():
            out, read_at = relay.feed(data), clock.monotonic()
            if relay.progress.content_seen:
                visit.first_content_at = visit.first_content_at or read_at
                if ear is not None:
                    ear.hear(relay.progress.events, read_at)
            if relay.done and self._keep is not None:
                self._held += out
            else:
                if relay.done:
                    self._account_for(visit)
                await self._send_events(visit, send, out)
            visit.waiting, visit.since = Waiting.ENGINE, clock.monotonic()
            if ear is not None and visit.since - read_at > _SLOW_READER_SECONDS:
                ear.skip(relay.progress.events, visit.since)
        if not relay.done:
            raise EngineGarbled

    async def _send_events(self, visit: Visit, send: Send, events: bytes) -> None:
        if not events:
            return
        if not self._started:
            head = [*EVENT_STREAM, *self._head_fields()]
            await self._send(visit, send, {"type": "http.response.start", "status": 200, "headers": head})
        for message in in_pieces(events, ends=False):
            await self._send(visit, send, message)

    async def _gather(self, visit: Visit, permit: Permit, call: Call, stream: EngineStream, send: Send) -> bytes:
        clock = self._door.clock
        gatherer = call.shape.gatherer(call)
        visit.progress = gatherer.progress
        while data := await stream.read():
            gatherer.feed(data)
            read_at = clock.monotonic()
            visit.first_content_at = visit.first_content_at or read_at
            if permit.ear is not None:
                permit.ear.hear(gatherer.progress.events, read_at)
            await self._between_reads(visit, send)
            visit.waiting, visit.since = Waiting.ENGINE, clock.monotonic()
        return gatherer.body()

    async def _between_reads(self, visit: Visit, send: Send) -> None:
        """Send what an engine has said by the way; an answer that is gathered whole has nothing to send before its end."""

    async def _send(self, visit: Visit, send: Send, message: Message) -> None:
        visit.waiting, visit.since = Waiting.CLIENT, self._door.clock.monotonic()
        self._started = True
        await send(message)

    async def _send_error(self, error: ForebayError, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._started:
            await error_answer(error, self._rate_headers, self._call.shape)(scope, receive, send)
        elif self._call.stream:
            await send({"type": "http.response.body", "body": self._call.shape.error_event(error)})

    def _note_place(self, permit: Permit) -> None:
        waited = str(round(permit.waited_seconds * 1000))
        self._place = {"x-queue-position": str(permit.position), "x-queue-wait-ms": waited}

    def _head_fields(self) -> list[tuple[bytes, bytes]]:
        fields = {**self._place, "x-served-by": self._call.request.model, **self._rate_headers, **self._quota_headers}
        return [(name.encode(), value.encode()) for name, value in fields.items()]

    @staticmethod
    def _uncancel() -> None:
        task = asyncio.current_task()
        while task is not None and task.cancelling():
            task.uncancel()


async def _left(receive: Receive) -> None:
    """Wait until the caller has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def look(request: Request, caller: Principal, pictures: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The pictures of a caller who is there and within his rate and quotas; anybody else costs nobody a fetch or a check.

    Raises RateLimited, QuotaExceeded and StoreUnavailable, and RequestCancelled when the caller goes away.
    """
    try:
        await request.app.state.door.require(caller, Amounts(requests=1, tokens=1))
    except ForebayError:
        pictures.close()
        raise
    task, watcher = asyncio.create_task(pictures), asyncio.create_task(_left(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestCancelled("The client closed the connection.")
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # what it still runs into is nobody's business


def trace_of(request: Request) -> str | None:
    """The trace that a request belongs to, if it says so in the right form."""
    trace = request.headers.get("traceparent", "")
    return trace if _TRACEPARENT.fullmatch(trace) else None


def visit(request: Request, caller: Principal, call: Call, keep: Keep | None = None) -> Response:
    """The answer to `call`, or its refusal by the rates of its key; `keep` writes it down before its end is sent."""
    door: Door = request.app.state.door
    estimate = call.tokens_estimate
    try:
        headers = door.rates.check(caller, estimate)
    except RateLimited as error:
        door.refuse(call, error)
        return error_answer(error, door.rates.headers(caller), call.shape)
    return OnlineAnswer(door, call, caller, request.app.state.catalog, estimate, headers, keep)

"""The kind of job that runs one response in the background: prepare -> admit -> read events -> keep them and the answer.

It refuses to tell an event that is not written down, to write one number twice, and to go on for ever: a response that gets
no place in time fails. A new attempt begins anew: its events take the place of those of the attempt before.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from pydantic_core import from_json, to_json

from forebay.clock import Clock, new_id
from forebay.config import Settings
from forebay.dialects.openai.call import Call, Thread
from forebay.dialects.openai.responses_events import ResponseRelay, ResponseShape, joined, numbered, unwell
from forebay.dialects.openai.responses_writer import Event
from forebay.errors import (
    CircuitOpen,
    EngineGarbled,
    EngineTimeout,
    InsufficientStorage,
    InvalidRequest,
    LeaseLost,
    ModelNotReady,
    Overloaded,
    RequestCancelled,
    ServerError,
    ShuttingDown,
    StoreUnavailable,
)
from forebay.inference import Priority
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.outcome import Cancelled, Done, Failed, Outcome, Snoozed
from forebay.jobs.retry import Delay
from forebay.metering.estimate import at_most
from forebay.metering.jobs import JobMeter
from forebay.metering.meter import Reservation
from forebay.quotas import Use
from forebay.replicas.calls import RESPONSES, Calls
from forebay.replicas.catalog import Catalog
from forebay.replicas.connection import EngineStream
from forebay.replicas.pauses import Pauses
from forebay.scheduler.gather import read_on
from forebay.scheduler.permit import Permit
from forebay.scheduler.scheduler import Scheduler
from forebay.store.database import Transaction
from forebay.store.job_records import Job, Lease
from forebay.store.job_state import FINISHED, JobState
from forebay.store.responses import RESPONSE, UNFINISHED, EventBatch, KeptResponse, ResponseStore
from forebay.telemetry import Metrics

_PULLING_SECONDS = 10.0


def as_it_is(kept: KeptResponse) -> dict[str, Any]:
    """A response object with the status of now, which is that of its job until its end is written down."""
    body: dict[str, Any] = from_json(kept.body)
    if kept.ended:
        return body
    match kept.job_state:
        case JobState.AVAILABLE if not kept.job_started:
            return body | {"status": "queued"}
        case JobState.AVAILABLE | JobState.RUNNING | JobState.WAITING:
            return body | {"status": "in_progress"}
        case JobState.CANCELLED:
            return body | {"status": "cancelled"}
        case _:
            code, message = kept.job_error or ("job_removed", "The job of this response is gone.")
            return body | {"status": "failed", "error": {"code": code, "message": message}}


class ResponseEnds:
    """Writes down how responses ended whose jobs ended without an answer: cancelled, given up, removed."""

    def __init__(self, responses: ResponseStore) -> None:
        self._responses = responses

    async def close(self, kept: KeptResponse) -> bool:
        """Write it down, unless it is or has yet to end, with the last events of its stream; whether there was a need."""
        body = {} if kept.ended else as_it_is(kept)
        if kept.ended or body["status"] in UNFINISHED:
            return False
        async with self._responses.database.begin() as transaction:
            if await self._responses.finish(transaction, kept.id, body["status"], to_json(body)) and kept.streamed:
                first = await self._responses.next_number(transaction, kept.id)
                await self._responses.add_events(transaction, kept.id, _batch(unwell(body), first, 0))
        return True

    async def after(self, job: Job, state: JobState) -> None:
        """For the process in which an attempt has ended."""
        if state in FINISHED - {JobState.COMPLETED}:
            for kept in await self._responses.left_behind(1, job.id):
                await self.close(kept)

    async def sweep(self, now: float, rows: int) -> int:
        """What other processes have left; and remove what has outlived its time. How many are removed."""
        for kept in await self._responses.left_behind(rows):
            await self.close(kept)
        return await self._responses.prune(now, rows)


class ResponseWork:
    """Makes attempts at responses."""

    def __init__(
        self,
        responses: ResponseStore,
        calls: Calls,
        catalog: Catalog,
        scheduler: Scheduler,
        meter: JobMeter,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._responses = responses
        self._calls = calls
        self._catalog = catalog
        self._scheduler = scheduler
        self._meter = meter
        self._settings = settings
        self._clock = clock
        self._metrics = metrics

    async def perform(self, lease: Lease, run: Run) -> Outcome:
        """One attempt."""
        raw = await self._responses.request(lease.id)
        if raw is None:
            return Cancelled()  # it was deleted
        job = lease.job
        self._check_time(job)
        call = await self._calls.prepare(
            RESPONSES,
            raw,
            request_id=new_id("req"),
            project=job.project_id,
            thread=Thread(job.id, job.created_at, self._clock.now),
        )
        log = EventLog(self._responses, lease, self._settings, self._clock) if call.stream else None
        try:
            reservation = await self._meter.reserve_until(run.at_end, job, call)
            body = await self._by_any(lease, call, log, reservation)
            return self._done(lease, run, reservation, body, [] if log is None else log.rest())
        except (CircuitOpen, Overloaded) as trouble:  # of a provider, which says when to come again
            return Snoozed(trouble.retry_after_seconds or _PULLING_SECONDS)
        except (ModelNotReady, ShuttingDown) as trouble:
            return Snoozed(0 if isinstance(trouble, ShuttingDown) else _PULLING_SECONDS)

    def _done(
        self, lease: Lease, run: Run, reservation: Reservation, body: dict[str, Any], rest: Sequence[EventBatch]
    ) -> Outcome:
        content = to_json(body)
        if len(content) > self._settings.responses.bytes_max:
            return Failed(too_large(), retryable=False)
        usage = body["usage"]
        self._metrics.prompt_tokens.labels(body["model"]).inc(usage["input_tokens"])
        self._metrics.completion_tokens.labels(body["model"]).inc(usage["output_tokens"])
        cached = usage["input_tokens_details"]["cached_tokens"]
        used = Use(1, usage["input_tokens"], usage["output_tokens"], cached)
        reservation.model = body["model"]
        self._meter.settle_at(run.at_end, reservation, used)

        async def write(transaction: Transaction) -> None:
            for batch in rest:
                await self._responses.add_events(transaction, lease.id, batch)
            await self._responses.finish(transaction, lease.id, body["status"], content)
            await self._meter.write(transaction, [(reservation.account, used)])

        return Done(write, event=body["status"])

    def _check_time(self, job: Job) -> None:
        if self._clock.now() > job.created_at + self._settings.responses.background_seconds_max:
            raise RequestCancelled("The model had no room for this response in time.", code="response_expired")

    async def _by_any(
        self, lease: Lease, call: Call, log: "EventLog | None", reservation: Reservation
    ) -> dict[str, Any]:
        """Run by the model that was asked for or, before anything is written down, by those that stand in for it."""
        while True:
            try:
                return await self._admitted(lease, _behind(call), log)
            except (ServerError, Overloaded) as error:
                begun = log is not None and log.begun
                other = None if begun or call.otherwise is None else call.otherwise(error)
                if other is None:
                    raise
                self._metrics.fallbacks.labels(call.request.model, other.request.model).inc()
                call = other
                await self._meter.raise_to(reservation, at_most(call))  # this one may write more

    async def _admitted(self, lease: Lease, call: Call, log: "EventLog | None") -> dict[str, Any]:
        """Wait for a place, within the time that a response has, and run."""
        while True:
            admitted = False
            try:
                async with self._scheduler.admit(call.request) as permit:
                    admitted = True
                    return await self._run(permit, call, log)
            except Overloaded as error:
                if admitted:
                    raise  # that of an upstream
                pause = self._clock.jitter(error.retry_after_seconds or 1.0)
            await self._clock.sleep(pause)
            self._check_time(lease.job)

    async def _run(self, permit: Permit, call: Call, log: "EventLog | None") -> dict[str, Any]:
        assert isinstance(call.shape, ResponseShape)
        relay = call.shape.relay(call, rename=permit.replica.traits.remote_model is not None)
        model = self._catalog.get(call.request.model)
        pauses, seconds = permit.replica.pauses, model.request_timeout_seconds
        try:
            async with pauses.limit(self._clock.timeout(seconds)), permit.run() as stream:
                if log is None:
                    await self._read(stream, relay, None, pauses)
                else:
                    async with log:
                        await self._read(stream, relay, log, pauses)
        except TimeoutError:
            raise EngineTimeout from None
        if call.shape.result is None:
            raise EngineGarbled
        return call.shape.result

    async def _read(self, stream: EngineStream, relay: ResponseRelay, log: "EventLog | None", pauses: Pauses) -> None:
        """Read to the end. Before the first bytes only the limit of the whole counts: a long prompt looks like a hang."""
        data = await stream.read()
        while data:
            events = relay.take(data)
            if log is not None:
                log.add(events)
            data = await read_on(stream, pauses, self._settings.supervisor.stall_seconds, self._clock)


class EventLog:
    """The events of one attempt, written down every so often while its block lasts.

    A batch that was tried once is tried again as it is: it may have been written and told although nobody knows.
    """

    def __init__(self, responses: ResponseStore, lease: Lease, settings: Settings, clock: Clock) -> None:
        self._responses = responses
        self._lease = lease
        self._seconds = settings.responses.events_seconds
        self._bytes_left = settings.responses.bytes_max
        self._clock = clock
        self._pending: list[Event] = []
        self._frozen: EventBatch | None = None
        self._next = 0
        self._lost: LeaseLost | None = None
        self._ending = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._next = await self._responses.begin_events(self._lease)
        self._writing = asyncio.create_task(self._write())
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Let a write that has begun come to its end."""
        self._ending.set()
        if self._writing is not None:
            await self._writing

    @property
    def begun(self) -> bool:
        """Whether events of this attempt may have been told."""
        return self._writing is not None

    def add(self, events: Sequence[Event]) -> None:
        """Take in events. Raises LeaseLost if another attempt has the job, InvalidRequest if there are too many."""
        if self._lost is not None:
            raise self._lost
        if self._writing is not None and self._writing.done():
            self._writing.result()
        self._pending += events

    def rest(self) -> list[EventBatch]:
        """What is not written down yet, to be written in one transaction with the end."""
        self._freeze()
        first = [] if self._frozen is None else [self._frozen]
        self._frozen = None
        self._freeze()
        return first if self._frozen is None else [*first, self._frozen]

    def _freeze(self) -> None:
        if self._frozen is None and self._pending:
            self._frozen = _batch(joined(self._pending), self._next, self._lease.attempt)
            self._pending = []
            self._next = self._frozen.last + 1
            self._bytes_left -= len(self._frozen.events)
            if self._bytes_left < 0:
                raise too_large()

    async def _write(self) -> None:
        while not self._ending.is_set():
            try:
                async with self._clock.timeout(self._seconds):
                    await self._ending.wait()
            except TimeoutError:
                await self._flush()

    async def _flush(self) -> None:
        self._freeze()
        if self._frozen is None:
            return
        try:
            await self._responses.append(self._lease, self._frozen)
        except (StoreUnavailable, InsufficientStorage):
            return  # the same once more, next time
        except LeaseLost as lost:
            self._lost = lost
            self._ending.set()
        self._frozen = None


def _behind(call: Call) -> Call:
    """The call behind those at the door, where nobody waits for it."""
    if call.request.priority is Priority.HIGH:
        return call
    return replace(call, request=replace(call.request, priority=Priority.LOW))


def _batch(events: Sequence[Event], first: int, attempt: int) -> EventBatch:
    told = numbered(events, first)
    return EventBatch(attempt, first, first + len(told) - 1, to_json(told))


def too_large() -> InvalidRequest:
    """The error of a response that has grown too large to be kept."""
    return InvalidRequest("The response is larger than what is kept. Ask for less.", code="response_too_large")


def response_kind(work: ResponseWork, ends: ResponseEnds, settings: Settings, retry: Delay) -> Kind:
    """The kind, for the list of kinds."""
    return Kind(
        name=RESPONSE,
        perform=work.perform,
        at_once=settings.responses.background_at_once,
        retry=retry,
        event=RESPONSE,
        takes_turns=True,
        after=ends.after,
    )

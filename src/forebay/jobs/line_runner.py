"""Runs one line of a batch to its result: parse -> admit -> gather -> output line, with as many attempts as it may have.

It refuses to try again what was wrong from the start, and to try a line at whose attempt an engine died beside another
such line: otherwise the innocent would be taken for the guilty.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from forebay.clock import Clock, new_id
from forebay.config import Settings
from forebay.dialects.openai.batches import InputLine, answer_line, failure_line, line_id, parse_line, refusal_line
from forebay.dialects.openai.call import Call
from forebay.errors import (
    CallerError,
    CircuitOpen,
    EngineCrashed,
    EngineUnavailable,
    ForebayError,
    ModelNotReady,
    Overloaded,
    QuotaExceeded,
    ServerError,
    ShuttingDown,
    StoreUnavailable,
)
from forebay.inference import Priority
from forebay.jobs.admission import Admission
from forebay.jobs.continuation import Continuation
from forebay.jobs.lines import Place
from forebay.jobs.picture_lines import PictureLines
from forebay.jobs.retry import doubling
from forebay.jobs.segments import Result, Used
from forebay.jobs.speech_lines import SpeechLines
from forebay.metering.estimate import at_most
from forebay.metering.jobs import JobMeter
from forebay.metering.meter import Aside, Reservation
from forebay.quotas import Amounts
from forebay.replicas.calls import Calls
from forebay.scheduler.assembly import Assembler
from forebay.scheduler.gather import Gathered
from forebay.store.batches import Batch
from forebay.store.dead_letters import LostLine
from forebay.telemetry import Metrics

_BACKOFF_SECONDS_MAX = 30.0
_PROBES_MAX = 20  # times that a line may open the circuit of a provider before it is to blame after all
_AWAY = (EngineUnavailable, ModelNotReady, StoreUnavailable)

OnRead = Callable[[], None]


@dataclass(slots=True)
class _Line:
    """A line on its way to a result, and its failed attempts so far."""

    batch: Batch
    place: Place
    input: InputLine
    request_id: str
    aside: Aside
    failures: list[dict[str, Any]] = field(default_factory=list)
    reservation: Reservation | None = None
    short: Amounts | None = None  # what it takes, where that was not there
    suspect: bool = False
    probes: int = 0

    @property
    def id(self) -> str:
        return line_id(self.batch.id, self.place.number)

    async def take(self, amounts: Amounts) -> None:
        """What it takes is known. Raises QuotaExceeded: it waits for it without the places that it has by now."""
        if self.reservation is not None:
            try:
                await self.reservation.raise_to(lambda: amounts)
            except QuotaExceeded:
                self.short = amounts
                raise

    def opened(self) -> None:
        """Its attempt has opened the circuit of a provider once more."""
        self.probes += 1


class LineRunner:
    """Runs lines for all chunks of one worker."""

    def __init__(
        self,
        calls: Calls,
        admission: Admission,
        assembler: Assembler,
        speech: SpeechLines,
        pictures: PictureLines,
        meter: JobMeter,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._calls = calls
        self._admission = admission
        self._continuation = Continuation(admission, settings, metrics)
        self._assembler = assembler
        self._speech = speech
        self._pictures = pictures
        self._meter = meter
        self._clock = clock
        self._metrics = metrics
        limits = settings.batches
        self._backoff = doubling(limits.line_backoff_seconds, _BACKOFF_SECONDS_MAX, limits.line_attempts_max)
        self._suspects: dict[str, asyncio.Lock] = {}

    async def run(self, batch: Batch, place: Place, raw: bytes, on_read: OnRead, aside: Aside) -> Result:
        """The result of a line. Raises EngineUnavailable, ModelNotReady, StoreUnavailable or ShuttingDown if it has to wait."""
        line = _Line(batch, place, parse_line(raw, batch.endpoint), new_id("req"), aside)
        used = False
        try:
            result = await self._until_answered(line, on_read)
            used = result.used is not None
        except CallerError as error:
            self._note(line, error)
            body = refusal_line(line.id, line.input.custom_id, line.request_id, error)
            result = _lost(line, error, body)
        finally:
            if line.reservation is not None and not used:
                line.reservation.release()
        outcome = "completed" if result.lost is None else result.lost.error_code
        self._metrics.batch_lines.labels(line.input.model, outcome).inc()
        return result

    async def _until_answered(self, line: _Line, on_read: OnRead) -> Result:
        """Attempts until one brings an answer or there have been enough."""
        asked: Call | None = None
        other: Call | None = None
        while True:
            try:
                asked = asked or await self._prepare(line)
                call = other or asked
                await self._reserve(line, call)
                gathered = await self._attempt(line, call, on_read)
            except QuotaExceeded:
                if line.short is None:
                    raise
            except (CallerError, ShuttingDown):
                raise
            except (ServerError, Overloaded) as error:
                other = await self._stand_in(line, other or asked, error)
                if other is not None:
                    continue
                if isinstance(error, CircuitOpen) and asked is not None:  # all lines wait for it, and none is to blame
                    self._admission.pauses.hold(asked.request.model, error.retry_after_seconds)
                    if line.probes < _PROBES_MAX:
                        continue
                self._note(line, error)
                pause = self._backoff(len(line.failures))
                if pause is None and isinstance(error, _AWAY) and not isinstance(error, CircuitOpen):
                    raise  # the model, or the store, is away for all: the chunk waits
                if pause is None:
                    message = failure_line(line.id, line.input.custom_id, error.code, str(error))
                    return _lost(line, error, message)
                line.suspect = line.suspect or isinstance(error, EngineCrashed)
                await self._clock.sleep(self._clock.jitter(pause))
            else:
                return self._answered(line, (other or asked).request.model, gathered)

    async def _reserve(self, line: _Line, call: Call) -> None:
        """Take what the line may use, as soon as others of its project do not hold it. Raises QuotaExceeded.

        What a stand-in may use is more where it may write more.
        """
        if line.reservation is None:
            line.reservation = await self._meter.reserve(line.batch.job, call, line.aside)
        else:
            await line.reservation.raise_in_turn(lambda: at_most(call), line.aside)
        if line.short is not None:
            short, line.short = line.short, None
            await line.reservation.raise_in_turn(lambda: short, line.aside)

    async def _stand_in(self, line: _Line, call: Call | None, error: ForebayError) -> Call | None:
        """The call for another model that the quota allows; none for a full line, which batch work waits for."""
        if call is None or isinstance(error, Overloaded):
            return None
        other: Call | None = call
        while other is not None and other.otherwise is not None:
            other = other.otherwise(error)
            if other is not None and await self._allowed(line, other):
                self._metrics.fallbacks.labels(call.request.model, other.request.model).inc()
                return other
        return None

    async def _allowed(self, line: _Line, call: Call) -> bool:
        """Whether a stand-in may take what it needs; it is held for it then."""
        try:
            await self._reserve(line, call)
        except QuotaExceeded:
            return False
        return True

    async def _prepare(self, line: _Line) -> Call:
        return await self._calls.prepare(
            line.batch.endpoint,
            line.input.raw,
            request_id=line.request_id,
            project=line.batch.job.project_id,
            priority=Priority.BATCH,
        )

    async def _attempt(self, line: _Line, call: Call, on_read: OnRead) -> Gathered:
        line.request_id = new_id("req")
        named = replace(call, request=replace(call.request, id=line.request_id))
        if not line.suspect:
            return await self._answer(line, named, on_read)
        async with self._suspects.setdefault(line.input.model, asyncio.Lock()):
            return await self._answer(line, named, on_read)

    async def _answer(self, line: _Line, call: Call, on_read: OnRead) -> Gathered:
        if call.speech is not None:
            return await self._speech.answer(call, partial(self._part, line, on_read), line.take)
        if call.picture is not None:
            return await self._pictures.answer(call, partial(self._part, line, on_read), line.take)
        if call.items is None:
            return await self._admitted(line, call, on_read)

        async def compute(part: Call) -> bytes:
            return (await self._admitted(line, part, on_read)).body

        return await self._assembler.answer(call, compute)

    async def _part(self, line: _Line, on_read: OnRead, part: Call) -> bytes:
        """One stretch of a recording, or one picture. Raises Preempted."""
        named = replace(part, request=replace(part.request, id=new_id("req")))
        return (await self._admission.run(named, on_read=on_read, on_opened=line.opened)).body

    async def _admitted(self, line: _Line, call: Call, on_read: OnRead) -> Gathered:
        """Wait for a place as long as it takes, and run; on or anew whenever the place was taken back."""
        return await self._continuation.run(call, on_read=on_read, on_opened=line.opened)

    def _answered(self, line: _Line, model: str, gathered: Gathered) -> Result:
        if gathered.usage is not None:
            self._metrics.prompt_tokens.labels(line.input.model).inc(gathered.usage.prompt_tokens)
            self._metrics.completion_tokens.labels(line.input.model).inc(gathered.usage.completion_tokens)
        body = answer_line(line.id, line.input.custom_id, line.request_id, gathered.body)
        assert line.reservation is not None, "it was taken before the first attempt"
        line.reservation.model = model
        line.reservation.lower_to(gathered.use)
        return Result(line.place.number, body, gathered.usage, used=Used(line.reservation, gathered.use))

    def _note(self, line: _Line, error: ForebayError) -> None:
        number = len(line.failures) + 1
        entry = {"attempt": number, "at": self._clock.now(), "status": error.status}
        line.failures.append({**entry, "code": error.code, "message": str(error)})


def _lost(line: _Line, error: ForebayError, body: bytes) -> Result:
    lost = LostLine(
        custom_id=line.input.custom_id,
        line=line.place.number,
        source_offset=line.place.offset,
        source_bytes=line.place.length,
        error_code=error.code,
        error_message=str(error),
        attempts=line.failures,
    )
    return Result(line.place.number, body, lost=lost)

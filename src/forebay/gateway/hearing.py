"""Answers about a recording while its caller waits: fetch -> decode -> stretch after stretch -> write.

It refuses to work on for a caller who has gone, and to keep one waiting for a recording that is longer than that makes
sense: such a one becomes a job.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from starlette.responses import Response
from starlette.types import Send

from forebay.config import AudioSettings
from forebay.dialects.answer import Progress
from forebay.dialects.openai.audio_events import SpeechShape, TextEvents, usage_in_tokens
from forebay.dialects.openai.call import Call
from forebay.dialects.speech import AudioRef
from forebay.errors import CallerError, InvalidRequest, PayloadTooLarge
from forebay.gateway.auth import Principal
from forebay.gateway.online import Door, OnlineAnswer, Visit
from forebay.media.recordings import Recording, Recordings
from forebay.media.spool import Spool
from forebay.quotas import Amounts, Use, milliseconds
from forebay.replicas.catalog import Catalog
from forebay.scheduler.transcriber import Kept, Transcriber
from forebay.speech import Segment, Transcript

HandOver = Callable[[], Awaitable[Response]]  # makes a job of the request, whose recording is in its spool


@dataclass(frozen=True, slots=True)
class Hearing:
    """The rooms that work on recordings."""

    recordings: Recordings
    transcriber: Transcriber
    settings: AudioSettings


class _Told:
    """Collects the events of what was said until there is a moment to send them."""

    def __init__(self, events: TextEvents | None) -> None:
        self.events = events
        self.seconds = 0.0  # how far it is told
        self._waiting = b""

    def stage(self, _stage: str, _percent: float) -> None:
        """Nobody watches the progress of an online answer but by its events."""

    def segments(self, new: Sequence[Segment]) -> None:
        """Write down what was said next."""
        if self.events is not None:
            self._waiting += self.events.told(new)
        self.seconds = max([self.seconds, *(segment.end for segment in new)])

    async def kept(self, _stretch: Kept) -> None:
        """What is finished is kept by jobs alone."""

    def take(self) -> bytes:
        """The events that have not been sent."""
        taken, self._waiting = self._waiting, b""
        return taken


class SpeechAnswer(OnlineAnswer):
    """The answer to one request about a recording, made while it is sent. The recording is in `spool`, or will be."""

    def __init__(
        self,
        door: Door,
        call: Call,
        principal: Principal,
        catalog: Catalog,
        rate_headers: Mapping[str, str],
        hearing: Hearing,
        spool: Spool,
        hand_over: HandOver,
    ) -> None:
        super().__init__(door, call, principal, catalog, 0, rate_headers)
        self._hearing = hearing
        self._spool = spool
        self._hand_over = hand_over
        self._fetched = False
        self._told = _Told(None)

    async def _serve(self, visit: Visit, send: Send) -> None:
        shape = self._call.shape
        assert isinstance(shape, SpeechShape)
        async with AsyncExitStack() as stack:
            try:
                await self._fetch()
                recording = await self._decoded(stack)
            except CallerError as error:
                error.param = error.param or self._param()
                raise
            if recording is None:
                if self._call.stream:
                    raise self._too_long_to_stream()
                self._close_account(visit)  # that is the job's
                await self._pass_on(visit, send)
                return
            if visit.reservation is not None:
                await visit.reservation.raise_to(lambda: Amounts(1, audio_ms=milliseconds(recording.seconds)))
            if self._call.speech is not None:  # what comes last is not to be found missing after all the rest
                self._door.scheduler.expect(self._call.speech.further_models)
            self._told = _Told(shape.events() if self._call.stream else None)
            transcript = await self._hear(visit, recording, send)
        visit.progress = Progress(usage_in_tokens(transcript))
        self._told.seconds = transcript.duration
        if self._told.events is None:
            answer = await asyncio.to_thread(shape.written, transcript)  # thousands of words take their time
            self._account_for(visit)
            await self._send_whole(visit, send, answer.body, answer.content_type)
        else:
            ending = await asyncio.to_thread(self._told.events.ended, transcript)
            self._account_for(visit)
            await self._send_events(visit, send, self._told.take() + ending)
            await self._send(visit, send, {"type": "http.response.body", "body": b""})

    def _used(self, visit: Visit) -> Use:
        return Use(1, audio_ms=milliseconds(self._told.seconds))

    @property
    def _source(self) -> AudioRef | None:
        return None if self._call.speech is None else self._call.speech.source

    async def _fetch(self) -> None:
        """Have the recording in the spool, whoever of several models is to hear it."""
        source = self._source
        if source is not None and not self._fetched:
            await self._hearing.recordings.fetch(self._spool, source, self._principal.project_id)
        self._fetched = True

    def _param(self) -> str:
        """The field that the recording came in."""
        source = self._source
        return "file" if source is None else "url" if source.file_id is None else "file_id"

    async def _decoded(self, stack: AsyncExitStack) -> Recording | None:
        """The recording as samples until `stack` is left; none if it is too long to be waited for."""
        settings = self._hearing.settings
        most = min(settings.online_seconds_max, settings.seconds_max)
        try:
            return await stack.enter_async_context(self._hearing.recordings.decode(self._spool, seconds_max=most))
        except PayloadTooLarge:
            if most == settings.seconds_max:
                raise
            return None

    def _too_long_to_stream(self) -> InvalidRequest:
        """Whoever reads events would take a job for a stream without any."""
        return InvalidRequest(
            f"A recording of more than {self._hearing.settings.online_seconds_max} seconds is not streamed."
            " Send it with `background` in place of `stream`, and read the events of its job.",
            param="stream",
            code="invalid_value",
        )

    async def _pass_on(self, visit: Visit, send: Send) -> None:
        answer = await self._hand_over()
        head = {"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers}
        await self._send(visit, send, head)
        await self._send(visit, send, {"type": "http.response.body", "body": bytes(answer.body)})

    async def _hear(self, visit: Visit, recording: Recording, send: Send) -> Transcript:
        async def compute(part: Call) -> bytes:
            return await self._run_part(visit, replace(part, stream=False), send)

        return await self._hearing.transcriber.run(self._call, recording, compute, self._told)

    async def _between_reads(self, visit: Visit, send: Send) -> None:
        await self._send_events(visit, send, self._told.take())

"""The kind of job that works on one recording: fetch -> decode -> stretch after stretch -> keep the transcript.

It refuses to do a finished stretch again, and to keep a recording longer than its job. A new attempt fetches and decodes
anew, and goes on after the last stretch that was kept.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from pydantic_core import from_json, to_json

from forebay.blobs.blobs import Blobs
from forebay.clock import Clock, new_id
from forebay.commit_points import reach
from forebay.config import AudioSettings
from forebay.dialects.openai.audio_events import usage_in_tokens
from forebay.dialects.openai.call import Call
from forebay.dialects.speech import SpeechTask
from forebay.errors import (
    InsufficientStorage,
    InvalidRequest,
    LeaseLost,
    ModelNotReady,
    NotFound,
    Overloaded,
    Preempted,
    ShuttingDown,
    StoreUnavailable,
)
from forebay.inference import Priority
from forebay.jobs.admission import Admission
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.outcome import Cancelled, Done, Failed, Outcome, Snoozed
from forebay.jobs.retry import Delay
from forebay.media.recordings import Recording, Recordings, Spool
from forebay.replicas.calls import Calls
from forebay.scheduler.transcriber import (
    ALIGNING,
    DIARIZING,
    TRANSCRIBING,
    Kept,
    Transcriber,
    kept_from_wire,
    kept_to_wire,
)
from forebay.speech import Segment, Transcript, transcript_to_wire
from forebay.store.database import Transaction
from forebay.store.job_state import FINISHED, JobState
from forebay.store.jobs import Job, JobStore, Lease
from forebay.store.transcriptions import (
    TRANSCRIPTION,
    WHOLE,
    Stretch,
    Transcription,
    TranscriptionStore,
    recording_key,
)
from forebay.telemetry import Metrics

QUEUED = "queued"
FETCHING = "fetching"
DECODING = "decoding"
RESULT_BYTES_MAX = 128 * 2**20

_PULLING_SECONDS = 10.0
_BUSY_SECONDS = 5.0
_TELL_SECONDS = 0.5  # how often progress is written down at most
_KEEP_SECONDS = 1.0  # before a stretch is written again after the store was away
# About how long each takes beside the others.
_SHARES = {FETCHING: 1, DECODING: 4, TRANSCRIBING: 60, ALIGNING: 15, DIARIZING: 20}


def names_recording(body: Mapping[str, Any]) -> bool:
    """Whether the body of a request says where its recording is; otherwise that comes with it."""
    return any(body.get(name) is not None for name in ("file_id", "url"))


def _gone() -> InvalidRequest:
    return InvalidRequest(
        "The recording went when its job ended. Send it again as a new request.", code="recording_gone"
    )


class Plan:
    """The stages of one recording, and which part of all the work each is."""

    def __init__(self, task: SpeechTask) -> None:
        stages = [FETCHING, DECODING]
        stages += [TRANSCRIBING] if task.task in {"transcribe", "translate"} else []
        stages += [ALIGNING] if task.align is not None else []
        stages += [DIARIZING] if task.diarize is not None else []
        whole, before = sum(_SHARES[stage] for stage in stages), 0
        self._parts: dict[str, tuple[float, float]] = {}
        for stage in stages:
            self._parts[stage] = (before / whole, _SHARES[stage] / whole)
            before += _SHARES[stage]

    def done(self, stage: str, percent: float) -> int:
        """How much is done, of WHOLE; the rest is for the end."""
        before, share = self._parts[stage]
        return min(WHOLE - 1, int(WHOLE * (before + share * min(max(percent, 0.0), 100.0) / 100)))


class TranscriptionWork:
    """Makes attempts at recordings."""

    def __init__(
        self,
        jobs: JobStore,
        store: TranscriptionStore,
        blobs: Blobs,
        calls: Calls,
        recordings: Recordings,
        transcriber: Transcriber,
        admission: Admission,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._jobs = jobs
        self._store = store
        self._blobs = blobs
        self._calls = calls
        self._recordings = recordings
        self._transcriber = transcriber
        self._admission = admission
        self._clock = clock
        self._metrics = metrics

    async def perform(self, lease: Lease, run: Run) -> Outcome:
        """One attempt."""
        asked = await self._store.get(lease.id)
        if asked is None:
            return Cancelled()  # it was removed
        if asked.request is None:
            raise _gone()
        call = await self._calls.prepare(
            asked.path,
            asked.request,
            request_id=new_id("req"),
            project=asked.project_id,
            priority=Priority.BATCH,
            with_recording=not names_recording(from_json(asked.request)),
        )
        assert call.speech is not None, "these endpoints are about recordings"
        try:
            self._admission.expect([call.request.model, *call.speech.further_models])
            transcript = await self._worked_on(lease, run, asked, call)
        except ModelNotReady:  # others go on meanwhile, and the stretches that are kept stay
            return Snoozed(_PULLING_SECONDS)
        except Overloaded as trouble:
            return Snoozed(trouble.retry_after_seconds or _BUSY_SECONDS)
        except ShuttingDown:
            return Snoozed(0)
        return await self._done(lease, call.request.model, transcript)

    async def after(self, job: Job, state: JobState) -> None:
        """For the process in which an attempt has ended."""
        if state in FINISHED:
            reach("transcription.settled")
            await self._store.close(self._blobs, job.id)

    async def sweep(self, now: float, rows: int) -> int:
        """What other processes have left, and what has outlived its job; how many are removed."""
        return await self._store.sweep(self._blobs, now, rows)

    async def _done(self, lease: Lease, model: str, transcript: Transcript) -> Outcome:
        content = await asyncio.to_thread(lambda: to_json(transcript_to_wire(transcript)))
        if len(content) > RESULT_BYTES_MAX:
            error = InvalidRequest("The transcript is larger than what is kept. Send the recording in parts.")
            return Failed(error, retryable=False)

        used = usage_in_tokens(transcript)
        self._metrics.prompt_tokens.labels(model).inc(used.prompt_tokens)
        self._metrics.completion_tokens.labels(model).inc(used.completion_tokens)

        async def write(transaction: Transaction) -> None:
            await self._store.finish(transaction, lease.id, transcript.duration, content)

        return Done(write)

    async def _worked_on(self, lease: Lease, run: Run, asked: Transcription, call: Call) -> Transcript:
        assert call.speech is not None, "these endpoints are about recordings"
        ledger = Ledger(self._jobs, self._store, lease, run, Plan(call.speech), self._clock)
        async with ledger.telling():
            ledger.stage(FETCHING, 0)
            async with self._recordings.spool() as spool:
                await self._fetch(asked, call, spool)
                ledger.stage(DECODING, 0)
                decoding = self._recordings.decode(spool, on_progress=lambda percent: ledger.stage(DECODING, percent))
                async with decoding as recording:
                    ledger.done = [kept_from_wire(from_json(each.body)) for each in await self._kept(lease)]
                    return await self._transcribed(call, recording, ledger)

    async def _kept(self, lease: Lease) -> Sequence[Stretch]:
        return await self._store.stretches(lease.id)

    async def _fetch(self, asked: Transcription, call: Call, spool: Spool) -> None:
        if call.speech is not None and call.speech.source is not None:
            await self._recordings.fetch(spool, call.speech.source, asked.project_id)
            return
        try:
            async for piece in self._blobs.stream(recording_key(asked.id)):
                await spool.write(piece)
        except NotFound:
            raise _gone() from None

    async def _transcribed(self, call: Call, recording: Recording, ledger: "Ledger") -> Transcript:
        """Work on it; from the last kept stretch on whenever a place was taken back."""
        while True:
            try:
                return await self._transcriber.run(call, recording, self._compute, ledger, tuple(ledger.done))
            except Preempted:
                continue

    async def _compute(self, part: Call) -> bytes:
        named = replace(part, request=replace(part.request, id=new_id("req")))
        return (await self._admission.run(named)).body


class Ledger:
    """Writes down what an attempt has finished at once, and how far it is every so often."""

    def __init__(
        self, jobs: JobStore, store: TranscriptionStore, lease: Lease, run: Run, plan: Plan, clock: Clock
    ) -> None:
        self.done: list[Kept] = []
        self._jobs = jobs
        self._store = store
        self._lease = lease
        self._run = run
        self._plan = plan
        self._clock = clock
        self._stage, self._thousandths = QUEUED, lease.job.completed
        self._news = asyncio.Event()

    def stage(self, stage: str, percent: float) -> None:
        """So much of a stage is done."""
        done = max(self._thousandths, self._plan.done(stage, percent))
        if (stage, done) != (self._stage, self._thousandths):
            self._stage, self._thousandths = stage, done
            self._news.set()

    def segments(self, new: Sequence[Segment]) -> None:
        """Nobody hears them before the end."""

    async def kept(self, stretch: Kept) -> None:
        """Write down a finished stretch. Raises LeaseLost."""
        number = sum(kept.stage == stretch.stage for kept in self.done)
        row = Stretch(stretch.stage, number, to_json(kept_to_wire(stretch)))
        while True:
            try:
                await self._store.keep(self._jobs, self._lease, row)
                break
            except (StoreUnavailable, InsufficientStorage):  # it comes back, or the lease runs out
                await self._clock.sleep(self._clock.jitter(_KEEP_SECONDS))
        self._run.progressed = True
        reach("transcription.stretch_kept")
        self.done.append(stretch)

    @asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """Tell how far it is while the block lasts; a write that has begun comes to its end."""
        ending = asyncio.Event()
        telling = asyncio.create_task(self._tell(ending))
        try:
            yield
        finally:
            ending.set()
            self._news.set()
            await telling

    async def _tell(self, ending: asyncio.Event) -> None:
        while True:
            await self._news.wait()
            if ending.is_set():
                return
            self._news.clear()
            try:
                await self._store.advance(self._lease, self._stage, self._thousandths)
            except LeaseLost:
                return  # whoever keeps a stretch, or the lease, finds out
            except (StoreUnavailable, InsufficientStorage):
                self._news.set()  # told again, next time
            await self._pause(ending)

    async def _pause(self, ending: asyncio.Event) -> None:
        try:
            async with self._clock.timeout(_TELL_SECONDS):
                await ending.wait()
        except TimeoutError:
            pass  # time to tell again


def transcription_kind(work: TranscriptionWork, settings: AudioSettings, retry: Delay) -> Kind:
    """The kind, for the list of kinds."""
    return Kind(
        name=TRANSCRIPTION,
        perform=work.perform,
        at_once=settings.jobs_at_once,
        retry=retry,
        event=TRANSCRIPTION,
        has_dead_letter=True,
        takes_turns=True,
        after=work.after,
    )

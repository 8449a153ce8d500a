"""The kind of job that works on one recording: fetch -> decode -> stretch after stretch -> keep the transcript.

It refuses to do a finished stretch again, and to keep a recording longer than its job. A new attempt fetches and decodes
anew, and goes on after the last stretch that was kept.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json, to_json

from forebay.clock import new_id
from forebay.commit_points import reach
from forebay.config import AudioSettings
from forebay.dialects.openai.audio_events import usage_in_tokens
from forebay.dialects.openai.call import Call
from forebay.dialects.speech import SpeechTask
from forebay.errors import (
    InvalidRequest,
    NotFound,
    Preempted,
)
from forebay.inference import Priority
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.ledger import FETCHING, Ledger, Plan
from forebay.jobs.media_work import WAITS, MediaRooms, gone, later
from forebay.jobs.outcome import Cancelled, Done, Failed, Outcome
from forebay.jobs.retry import Delay
from forebay.media.recordings import Recording, Recordings
from forebay.media.spool import Spool
from forebay.metering.meter import Reservation
from forebay.quotas import Amounts, Use, milliseconds
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
from forebay.store.job_records import Job, Lease
from forebay.store.job_state import FINISHED, JobState
from forebay.store.media_jobs import TRANSCRIPTION, MediaJob, Part, media_key

DECODING = "decoding"
RESULT_BYTES_MAX = 128 * 2**20

# About how long each takes beside the others.
_SHARES = {FETCHING: 1, DECODING: 4, TRANSCRIBING: 60, ALIGNING: 15, DIARIZING: 20}


def names_recording(body: Mapping[str, Any]) -> bool:
    """Whether the body of a request says where its recording is; otherwise that comes with it."""
    return any(body.get(name) is not None for name in ("file_id", "url"))


def plan_of(task: SpeechTask) -> Plan:
    """The stages of one recording."""
    stages = [FETCHING, DECODING]
    stages += [TRANSCRIBING] if task.task in {"transcribe", "translate"} else []
    stages += [ALIGNING] if task.align is not None else []
    stages += [DIARIZING] if task.diarize is not None else []
    return Plan({stage: _SHARES[stage] for stage in stages})


class TranscriptionWork:
    """Makes attempts at recordings."""

    def __init__(self, rooms: MediaRooms, recordings: Recordings, transcriber: Transcriber) -> None:
        self._rooms = rooms
        self._recordings = recordings
        self._transcriber = transcriber

    async def perform(self, lease: Lease, run: Run) -> Outcome:
        """One attempt."""
        asked = await self._rooms.store.get(lease.id)
        if asked is None:
            return Cancelled()  # it was removed
        if asked.request is None:
            raise gone("recording")
        call = await self._rooms.calls.prepare(
            asked.path,
            asked.request,
            request_id=new_id("req"),
            project=asked.project_id,
            priority=Priority.BATCH,
            with_recording=not names_recording(from_json(asked.request)),
        )
        assert call.speech is not None, "these endpoints are about recordings"
        try:
            self._rooms.admission.expect([call.request.model, *call.speech.further_models])
            reservation = await self._rooms.meter.reserve_until(run.at_end, lease.job, call)
            transcript = await self._worked_on(lease, run, asked, call, reservation)
            return await self._done(lease, run, reservation, transcript)
        except WAITS as trouble:
            return later(trouble)

    async def after(self, job: Job, state: JobState) -> None:
        """For the process in which an attempt has ended."""
        if state in FINISHED:
            reach("transcription.settled")
            await self._rooms.close(job.id)

    async def _done(self, lease: Lease, run: Run, reservation: Reservation, transcript: Transcript) -> Outcome:
        content = await asyncio.to_thread(lambda: to_json(transcript_to_wire(transcript)))
        if len(content) > RESULT_BYTES_MAX:
            error = InvalidRequest("The transcript is larger than what is kept. Send the recording in parts.")
            return Failed(error, retryable=False)

        tokens, model = usage_in_tokens(transcript), reservation.model
        self._rooms.metrics.prompt_tokens.labels(model).inc(tokens.prompt_tokens)
        self._rooms.metrics.completion_tokens.labels(model).inc(tokens.completion_tokens)
        used = Use(1, audio_ms=milliseconds(transcript.duration))
        self._rooms.meter.settle_at(run.at_end, reservation, used)

        async def write(transaction: Transaction) -> None:
            await self._rooms.store.finish(transaction, lease.id, content)
            await self._rooms.meter.write(transaction, [(reservation.account, used)])

        return Done(write)

    async def _worked_on(
        self, lease: Lease, run: Run, asked: MediaJob, call: Call, reservation: Reservation
    ) -> Transcript:
        assert call.speech is not None, "these endpoints are about recordings"
        ledger = _Stretches(self._rooms, lease, run, plan_of(call.speech))
        async with ledger.telling():
            ledger.stage(FETCHING, 0)
            async with self._recordings.spool() as spool:
                await self._fetch(asked, call, spool)
                ledger.stage(DECODING, 0)
                decoding = self._recordings.decode(spool, on_progress=lambda percent: ledger.stage(DECODING, percent))
                async with decoding as recording:
                    seconds = recording.seconds
                    await self._rooms.meter.raise_to(reservation, Amounts(1, audio_ms=milliseconds(seconds)))
                    kept = await self._rooms.store.parts(lease.id)
                    ledger.done = tuple(kept_from_wire(from_json(each.body)) for each in kept)
                    return await self._transcribed(call, recording, ledger)

    async def _fetch(self, asked: MediaJob, call: Call, spool: Spool) -> None:
        if call.speech is not None and call.speech.source is not None:
            await self._recordings.fetch(spool, call.speech.source, asked.project_id)
            return
        try:
            async for piece in self._rooms.blobs.stream(media_key(TRANSCRIPTION, asked.id)):
                await spool.write(piece)
        except NotFound:
            raise gone("recording") from None

    async def _transcribed(self, call: Call, recording: Recording, ledger: "_Stretches") -> Transcript:
        """Work on it; from the last kept stretch on whenever a place was taken back."""
        while True:
            try:
                return await self._transcriber.run(call, recording, self._rooms.compute, ledger, ledger.done)
            except Preempted:
                continue


class _Stretches(Ledger):
    """Writes down each stretch that an attempt has finished."""

    done: tuple[Kept, ...] = ()

    def segments(self, new: Sequence[Segment]) -> None:
        """Nobody hears them before the end."""

    async def kept(self, stretch: Kept) -> None:
        """Write down a finished stretch. Raises LeaseLost."""
        number = sum(kept.stage == stretch.stage for kept in self.done)
        await self.keep(Part(stretch.stage, number, to_json(kept_to_wire(stretch))))
        reach("transcription.stretch_kept")
        self.done += (stretch,)


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

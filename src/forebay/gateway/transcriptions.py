"""Recordings that are worked on in the background: handed in as jobs, and their results in every format.

It refuses to hand in what cannot be kept whole: the recording is stored before there is a job, and removed if there is
none in the end.
"""

import asyncio
import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic_core import from_json, to_json
from starlette.responses import Response

from forebay.blobs.blobs import Blobs
from forebay.clock import new_id
from forebay.commit_points import reach
from forebay.config import Settings
from forebay.dialects.openai.audio_events import SpeechShape
from forebay.dialects.openai.audio_formats import Look, written
from forebay.dialects.openai.call import Call
from forebay.errors import Conflict, InvalidRequest, NotFound, Overloaded, RateLimited
from forebay.gateway.answers import error_answer
from forebay.gateway.auth import Principal, principal
from forebay.gateway.files import drafted
from forebay.gateway.idempotency import create, replayed
from forebay.gateway.jobs import job_object
from forebay.gateway.online import Door
from forebay.jobs.desk import UNKNOWN, Desk
from forebay.jobs.transcription import QUEUED
from forebay.media.recordings import Spool
from forebay.speech import Transcript, transcript_from_wire
from forebay.store.database import Transaction
from forebay.store.job_state import JobState
from forebay.store.jobs import Job, NewJob
from forebay.store.transcriptions import TRANSCRIPTION, NewTranscription, Result, TranscriptionStore, recording_key
from forebay.store.webhooks import new_secret

_ACCEPTED = 202
_FULL_SECONDS = 30.0
_OF_THE_DOOR = ("file_id", "url", "stream", "background", "webhook_url")


router = APIRouter(prefix="/v1/jobs", dependencies=[Depends(principal)])

Caller = Annotated[Principal, Depends(principal)]


@dataclass(slots=True)
class _Handed:
    """What is handed in. `size` is that of a recording of its own, none where it lies elsewhere."""

    new: NewTranscription
    model: str
    webhook_url: str | None
    file_id: str | None
    size: int | None = None


async def in_background(
    request: Request,
    caller: Principal,
    call: Call,
    path: str,
    raw: bytes,
    spool: Spool | None,
    *,
    counted: bool = False,
) -> Response:
    """Make a job of a request about a recording, once for each Idempotency-Key: 202, the job, and where it is.

    `raw` is the JSON body that was asked at `path`, and `call` what it was made into. `spool` holds the recording; with
    none it lies where the body says; with `counted` the key's rate knows of the request. Raises InvalidRequest, NotFound,
    Overloaded, InsufficientStorage and StoreUnavailable.
    """
    door: Door = request.app.state.door
    handed = _handed(caller, call, path, raw, spool)
    if handed.webhook_url is not None:
        request.app.state.outbound.check(handed.webhook_url, param="webhook_url")
    if call.speech is not None and call.speech.source is not None:
        request.app.state.hearing.recordings.check(call.speech.source)
    try:
        return await _hand_in(request, caller, handed, raw, spool, counted=counted)
    except RateLimited as error:
        door.refuse(call, error)
        return error_answer(error, door.rates.headers(caller))


def _handed(caller: Principal, call: Call, path: str, raw: bytes, spool: Spool | None) -> _Handed:
    """The request as an attempt will read it: the work alone, and where the recording is if it does not come with it."""
    body: dict[str, Any] = from_json(raw)
    webhook_url = body.get("webhook_url")
    kept = {name: value for name, value in body.items() if name not in _OF_THE_DOOR}
    if spool is None:
        kept |= {name: body[name] for name in ("file_id", "url") if body.get(name) is not None}
    shape = call.shape
    assert isinstance(shape, SpeechShape)
    shown = {"response_format": shape.form, "look": asdict(shape.look)}
    new = NewTranscription(
        new_id("job"),
        caller.project_id,
        path,
        to_json(kept),
        to_json(shown),
        has_sound=spool is not None or _brings_sound(kept),
    )
    return _Handed(new, call.request.model, webhook_url, kept.get("file_id"))


def _brings_sound(body: dict[str, Any]) -> bool:
    """Whether there is sound in the body itself."""
    return bool(body.get("known_speaker_references")) or str(body.get("url", ""))[:5].lower() == "data:"


async def _hand_in(
    request: Request, caller: Principal, handed: _Handed, raw: bytes, spool: Spool | None, *, counted: bool
) -> Response:
    state = request.app.state
    store: TranscriptionStore = state.transcriptions
    blobs: Blobs = state.blobs
    desk: Desk = state.desk

    async def check() -> None:
        if not counted:
            state.door.rates.check(caller, 0)
        await desk.check_room()
        if handed.file_id is not None:
            await state.files.get(caller.project_id, handed.file_id)  # a mistake that is known early spares the job
        if spool is not None:
            await store.begin(handed.new)
            handed.size = await _store(blobs, handed.new.id, spool)
            reach("transcription.recording_stored")

    async def perform(transaction: Transaction) -> dict[str, Any]:
        return await _submit(state.settings, desk, store, transaction, handed)

    fingerprint = raw if spool is None else raw + await _digest(spool)
    async with drafted(lambda: store.discard(blobs, handed.new.id)) as draft:
        answer = await create(request, caller, fingerprint, perform, before=check, retries=True)
        draft.kept = not replayed(answer)
    if draft.kept:
        reach("transcription.created")
    answer.status_code = _ACCEPTED
    answer.headers["location"] = f"/v1/jobs/{from_json(bytes(answer.body))['id']}"
    return answer


async def _submit(
    settings: Settings, desk: Desk, store: TranscriptionStore, transaction: Transaction, handed: _Handed
) -> dict[str, Any]:
    """Make the job and its transcription. Raises Overloaded if the project has too many."""
    audio, new = settings.audio, handed.new
    if await store.unfinished(transaction, new.project_id) >= audio.live_per_project_max:
        raise Overloaded(
            "This project has too many unfinished transcriptions. Wait for one to end, or cancel one.",
            code="transcription_limit_reached",
            retry_after_seconds=_FULL_SECONDS,
        )
    secret = None if handed.webhook_url is None else new_secret()
    job = NewJob(
        TRANSCRIPTION,
        new.project_id,
        id=new.id,
        stage=QUEUED,
        model=handed.model,
        deadline_at=desk.jobs.now() + audio.background_seconds_max,
        webhook_url=handed.webhook_url,
        webhook_secret=secret,
    )
    await desk.submit(transaction, [job])
    await store.submit(transaction, new, handed.size)
    made = await desk.jobs.lock(transaction, new.id)
    assert made is not None, "it was made in this transaction"
    shown = job_object(made, UNKNOWN)
    return shown if secret is None else shown | {"webhook_secret": secret}


async def _store(blobs: Blobs, transcription_id: str, spool: Spool) -> int:
    size = 0
    async with blobs.write(recording_key(transcription_id)) as writer:
        async for piece in spool.pieces():
            await writer.write(piece)
            size += len(piece)
    return size


async def _digest(spool: Spool) -> bytes:
    digest = hashlib.sha256()
    async for piece in spool.pieces():
        digest.update(piece)
    return digest.digest()


@router.get("/{job_id}/result")
async def show_result(
    request: Request,
    job_id: str,
    caller: Caller,
    form: Annotated[str | None, Query(alias="format", max_length=32)] = None,
) -> Response:
    """What a finished transcription has found, in any format; without one in that of its request."""
    desk: Desk = request.app.state.desk
    job = await desk.get(caller.project_id, job_id)
    found = await _result(request.app.state.transcriptions, job)
    try:
        content_type, body = await asyncio.to_thread(_rendered, found, form)
    except InvalidRequest as error:
        error.param = "format"
        raise
    return Response(body, media_type=content_type)


async def _result(store: TranscriptionStore, job: Job) -> Result:
    """Raises NotFound for a job without such a result, and Conflict while it is not finished."""
    if job.kind != TRANSCRIPTION:
        raise NotFound(f"A {job.kind} has no result of this kind. What it has made is told where it was asked for.")
    if job.state is not JobState.COMPLETED:
        raise Conflict(
            f"The job is {job.state.value}, so it has no result."
            + ("" if job.finished else " Ask again once it is completed."),
            code="job_not_completed",
        )
    found = await store.result(job.project_id, job.id)
    if found is None:
        raise NotFound("The result of this job is no longer kept.")
    return found


def _rendered(found: Result, form: str | None) -> tuple[str, bytes]:
    """Hours of speech take their time, so this runs in a thread."""
    asked: dict[str, Any] = from_json(found.shown)
    transcript = transcript_from_wire(from_json(found.transcript))
    own: str = asked["response_format"]
    shown = written(transcript, form or own, _look(asked, transcript, as_asked=form in {None, own}))
    return shown.content_type, shown.body


def _look(asked: dict[str, Any], transcript: Transcript, *, as_asked: bool) -> Look:
    """What was asked for is shown as online, another format with all that it has."""
    look = Look(**asked["look"])
    if as_asked:
        return look
    return replace(look, words=any(segment.words for segment in transcript.segments), segments=True)

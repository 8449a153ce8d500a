"""Recordings that are worked on in the background: what of a request its job reads, and its result in every format.

It refuses formats that show nothing of what was found.
"""

from dataclasses import asdict, replace
from typing import Any

from fastapi import Request
from pydantic_core import from_json, to_json
from starlette.responses import Response

from forebay.clock import new_id
from forebay.config import Settings
from forebay.dialects.openai.audio_events import SpeechShape
from forebay.dialects.openai.audio_formats import Look, written
from forebay.dialects.openai.call import Call
from forebay.gateway.auth import Principal
from forebay.gateway.background import OF_THE_DOOR, Handed, Limits, hand_in
from forebay.media.sources import is_address
from forebay.media.spool import Spool
from forebay.speech import Transcript, transcript_from_wire
from forebay.store.media_jobs import TRANSCRIPTION, NewMediaJob, Result


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
    """Make a job of a request about a recording: 202, the job, and where it is.

    `raw` is the JSON body that was asked at `path`, and `call` what it was made into. `spool` holds the recording; with
    none it lies where the body says. Raises what `hand_in` does.
    """
    handed = _handed(request.app.state.settings, caller, call, path, raw, spool)
    if call.speech is not None and call.speech.source is not None:
        request.app.state.hearing.recordings.check(call.speech.source)
    return await hand_in(request, caller, call, handed, raw, counted=counted)


def _handed(settings: Settings, caller: Principal, call: Call, path: str, raw: bytes, spool: Spool | None) -> Handed:
    """The request as an attempt will read it: the work alone, and where the recording is if it does not come with it."""
    body: dict[str, Any] = from_json(raw)
    of_the_door = OF_THE_DOOR if spool is None else (*OF_THE_DOOR, "file_id", "url")
    kept = {name: value for name, value in body.items() if name not in of_the_door}
    shape = call.shape
    assert isinstance(shape, SpeechShape)
    shown = {"response_format": shape.form, "look": asdict(shape.look)}
    new = NewMediaJob(
        new_id("job"),
        TRANSCRIPTION,
        caller.project_id,
        path,
        to_json(kept),
        to_json(shown),
        has_media=spool is not None or _brings_sound(kept),
    )
    audio = settings.audio
    return Handed(
        new,
        Limits(audio.live_per_project_max, audio.background_seconds_max),
        call.request.model,
        body.get("webhook_url"),
        tuple(filter(None, [kept.get("file_id")])),
        None if spool is None else spool.pieces,
    )


def _brings_sound(body: dict[str, Any]) -> bool:
    """Whether there is sound in the body itself."""
    return bool(body.get("known_speaker_references")) or not is_address(str(body.get("url", "")))


def rendered(found: Result, form: str | None) -> tuple[str, bytes]:
    """The type and the bytes of a result. Hours of speech take their time, so this runs in a thread.

    Raises InvalidRequest for a format that is none.
    """
    asked: dict[str, Any] = from_json(found.shown)
    transcript = transcript_from_wire(from_json(found.body))
    own: str = asked["response_format"]
    shown = written(transcript, form or own, _look(asked, transcript, as_asked=form in {None, own}))
    return shown.content_type, shown.body


def _look(asked: dict[str, Any], transcript: Transcript, *, as_asked: bool) -> Look:
    """What was asked for is shown as online, another format with all that it has."""
    look = Look(**asked["look"])
    if as_asked:
        return look
    return replace(look, words=any(segment.words for segment in transcript.segments), segments=True)

"""The routes of recordings: transcribe, translate, align, tell speakers apart.

A recording comes in a form, or a JSON body says where it is. It refuses to hold one in memory: its bytes go to a private
file as they come. More than a bounded number of requests about recordings at once get 429.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from forebay.config import Settings
from forebay.dialects.openai.audio_events import SpeechShape
from forebay.dialects.openai.audio_forms import AUDIO_FORM
from forebay.dialects.openai.call import Call
from forebay.errors import CallerError, InvalidRequest, RateLimited
from forebay.gateway.answers import error_answer, read_body
from forebay.gateway.auth import Principal, may_create, principal, upstream_key
from forebay.gateway.hearing import Hearing, SpeechAnswer
from forebay.gateway.multipart import FilePart, Form, Rules, is_form, read_form
from forebay.gateway.online import Door, trace_of
from forebay.gateway.places import Places
from forebay.gateway.protocol import allow_steady_body
from forebay.gateway.transcriptions import in_background
from forebay.inference import Capability
from forebay.media.spool import Spool
from forebay.quotas import Amounts
from forebay.replicas.calls import ALIGNMENTS, DIARIZATIONS, ENDPOINTS, TRANSCRIPTIONS, TRANSLATIONS
from forebay.replicas.catalog import Catalog

_FORM_FIELDS_MAX = 1536  # a list is as many fields as it has items; the longest are tokens that are not to be said
_FILE = "file"
_WITHOUT_SPEAKERS = frozenset({"json", "text"})

router = APIRouter(prefix="/v1/audio", dependencies=[Depends(principal)])

CanTranscribe = Annotated[Principal, Depends(may_create(Capability.TRANSCRIPTION))]
CanTranslate = Annotated[Principal, Depends(may_create(Capability.TRANSLATION))]
CanAlign = Annotated[Principal, Depends(may_create(Capability.ALIGNMENT))]
CanDiarize = Annotated[Principal, Depends(may_create(Capability.DIARIZATION))]


def _takes(path: str) -> dict[str, Any]:
    """The OpenAPI description of both bodies that a route takes."""
    schema = ENDPOINTS[path].body.model_json_schema()
    properties = {_FILE: {"type": "string", "format": "binary"}, **schema["properties"]}
    form = {**schema, "properties": properties}
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/transcriptions", openapi_extra=_takes(TRANSCRIPTIONS))
async def create_transcription(request: Request, caller: CanTranscribe) -> Response:
    """Write down what is said in a recording."""
    return RecordingAnswer(request.app.state, caller, TRANSCRIPTIONS)


@router.post("/translations", openapi_extra=_takes(TRANSLATIONS))
async def create_translation(request: Request, caller: CanTranslate) -> Response:
    """Write down in English what is said in a recording."""
    return RecordingAnswer(request.app.state, caller, TRANSLATIONS)


@router.post("/alignments", openapi_extra=_takes(ALIGNMENTS))
async def create_alignment(request: Request, caller: CanAlign) -> Response:
    """Tell when each word of a transcript is said."""
    return RecordingAnswer(request.app.state, caller, ALIGNMENTS)


@router.post("/diarizations", openapi_extra=_takes(DIARIZATIONS))
async def create_diarization(request: Request, caller: CanDiarize) -> Response:
    """Tell who speaks when."""
    return RecordingAnswer(request.app.state, caller, DIARIZATIONS)


class RecordingAnswer(Response):
    """Receives a request about a recording and answers it; what was received is gone afterwards."""

    def __init__(self, state: Any, caller: Principal, path: str) -> None:
        super().__init__()
        self._state = state
        self._caller = caller
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Receive, and answer."""
        places: Places = self._state.audio_places
        hearing: Hearing = self._state.hearing
        with places.entered(self._caller.project_id):
            async with hearing.recordings.spool() as spool:
                answer = await self._answer(Request(scope, receive), spool)
                await answer(scope, receive, send)

    async def _answer(self, request: Request, spool: Spool) -> Response:
        state, caller = self._state, self._caller
        door: Door = state.door
        try:
            await door.require(caller, Amounts(requests=1, audio_ms=1))  # before anything is received
            raw, with_recording = await self._receive(request, spool)
            call = await state.calls.prepare(
                self._path,
                raw,
                request_id=request.scope["request_id"],
                project=caller.project_id,
                traceparent=trace_of(request),
                caller_key=upstream_key(request),
                with_recording=with_recording,
            )
            if call.speech.background:
                return await in_background(request, caller, call, self._path, raw, spool if with_recording else None)
            _check_shown(call)
            headers = door.rates.check(caller, 0)  # how long it is, nobody knows yet
        except RateLimited as error:
            return error_answer(error, door.rates.headers(caller))

        async def hand_over() -> Response:
            return await in_background(request, caller, call, self._path, raw, spool, counted=True)

        catalog: Catalog = state.catalog
        return SpeechAnswer(door, call, caller, catalog, headers, state.hearing, spool, hand_over)

    async def _receive(self, request: Request, spool: Spool) -> tuple[bytes, bool]:
        """The JSON body, and whether a recording came with it."""
        settings: Settings = self._state.settings
        if not is_form(request):
            return await read_body(request, settings.http.body_bytes_max), False
        catalog: Catalog = self._state.catalog
        allow_steady_body(request.scope, settings.files.receive_bytes_per_second_min)

        async def take(form: Form, _part: FilePart, data: bytes) -> None:
            if "model" in form.fields:
                catalog.get(form.fields["model"])  # a mistake that is known early spares the rest
            try:
                await spool.write(data)
            except CallerError as error:
                error.param = _FILE
                raise

        names = AUDIO_FORM.names(ENDPOINTS[self._path].body)
        form = await read_form(request, {_FILE: 1}, names, take, _rules(names, settings))
        return AUDIO_FORM.json_of([*form.fields.items(), *form.repeated]), bool(form.files)


def _check_shown(call: Call) -> None:
    """Refuse to tell speakers apart for an answer that shows none; what a job has found can be read in other formats."""
    speech, shape = call.speech, call.shape
    assert speech is not None
    assert isinstance(shape, SpeechShape)
    if speech.diarize is not None and speech.task != "diarize" and shape.form in _WITHOUT_SPEAKERS:
        raise InvalidRequest(
            f"`diarize` tells speakers apart, and the response format `{shape.form}` shows none. "
            "Ask for `verbose_json`, `srt` or `vtt`, or have a transcription written as `diarized_json`.",
            param="response_format",
            code="invalid_value",
        )


def _rules(names: frozenset[str], settings: Settings) -> Rules:
    repeated = {name for name in names if name.endswith("[]")}
    return Rules(
        repeated=repeated | {name.removesuffix("[]") for name in repeated},
        large={name for name in names if name.removesuffix("[]") in AUDIO_FORM.large},
        fields_max=_FORM_FIELDS_MAX,
        bytes_max=settings.http.body_bytes_max,
        needs_file=False,
    )

"""Pictures that are made in the background: what of a request its job reads, and its result as OpenAI answers.

It refuses to send more bytes in one answer than fit into memory beside others: files are read one by one, and what is held
until a reader has it counts.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, get_args

from fastapi import Request
from pydantic_core import from_json, to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from forebay.clock import new_id
from forebay.config import Settings
from forebay.dialects.imaging import Delivery, OutputPlan, Painted
from forebay.dialects.openai.call import Call
from forebay.dialects.openai.image_events import Delivered, PictureShape, written
from forebay.dialects.pubsub import ObjectNames
from forebay.errors import InvalidRequest, NotFound
from forebay.gateway.auth import Principal
from forebay.gateway.background import Handed, Limits, hand_in
from forebay.gateway.places import Room
from forebay.gateway.signed import Signer, beginning_of
from forebay.gateway.streams import in_pieces
from forebay.jobs.image import Asked, KeptPicture
from forebay.media.pictures import Inputs
from forebay.media.sources import is_address
from forebay.store.job_records import Job
from forebay.store.media_jobs import IMAGE, NewMediaJob, Result

ANSWER_BYTES_MAX = 64 * 2**20  # of all pictures of one answer
BYTES_OF_ANSWER = 3  # for each of a picture in an answer: itself, and its base64 while that is put together
_USUAL: Delivery = "file_id"


async def in_background(
    request: Request, caller: Principal, call: Call, path: str, raw: bytes, inputs: Inputs
) -> Response:
    """Make a job of a request for pictures: 202, the job, and where it is.

    `raw` is the JSON body that was asked at `path`, and `call` what it was made into. `inputs` is what came with it. Raises
    what `hand_in` does.
    """
    state, task = request.app.state, call.picture
    assert task is not None, "these endpoints are about pictures"
    for ref in task.refs:
        state.easels.pictures.check(ref)
    handed = handed_of(state.settings, caller.project_id, call, path, raw, inputs)
    return await hand_in(request, caller, call, handed, raw)


def handed_of(
    settings: Settings,
    project_id: str,
    call: Call,
    path: str,
    raw: bytes,
    inputs: Inputs,
    objects: ObjectNames | None = None,
) -> Handed:
    """The request as an attempt will read it: its body, how much came with it, and what lies in the intake's store."""
    body: dict[str, Any] = from_json(raw)
    shape, task = call.shape, call.picture
    assert isinstance(shape, PictureShape)
    assert task is not None
    mask = None if inputs.mask is None else inputs.mask.bytes
    asked = Asked(raw, tuple(each.bytes for each in inputs.images), mask, objects)
    shown = {
        "task": task.task,
        "format": task.output.format,
        "backdrop": task.output.backdrop,
        "quality": shape.quality,
        "delivery": body.get("response_format") or _USUAL,
    }
    brings = any(not is_address(ref.url or "") for ref in task.refs)
    new = NewMediaJob(
        new_id("job"),
        IMAGE,
        project_id,
        path,
        asked.written(),
        to_json(shown),
        has_media=bool(inputs.spools) or brings,
    )

    async def parcel() -> AsyncIterator[bytes]:
        for spool in inputs.spools:
            async for piece in spool.pieces():
                yield piece

    images = settings.images
    return Handed(
        new,
        Limits(images.live_per_project_max, images.background_seconds_max),
        call.request.model,
        body.get("webhook_url"),
        tuple(ref.file_id for ref in task.refs if ref.file_id is not None),
        parcel if inputs.spools else None,
    )


class PictureResult(Response):
    """The result of a job as OpenAI answers, with the file of each preview; made while it is sent.

    Sending it raises InvalidRequest for a format that is none, NotFound for files that are gone, and Overloaded where other
    answers hold the memory.
    """

    media_type = "application/json"

    def __init__(self, job: Job, found: Result, form: str | None) -> None:
        super().__init__()
        self._job = job
        self._found = found
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make it, and send it piece by piece, so that its memory is given back when a reader has it and not before."""
        request = Request(scope, receive)
        room: Room = request.app.state.easels.room
        asked, made = from_json(self._found.shown), from_json(self._found.body)
        delivery: Delivery = asked["delivery"] if self._form is None else _delivery(self._form)
        pictures = [KeptPicture.read(each) for each in made["pictures"]]
        size = sum(each.picture.bytes for each in pictures) if delivery == "b64_json" else 0
        if size > ANSWER_BYTES_MAX:
            raise InvalidRequest(
                "These pictures are too many bytes for one answer. Ask for `file_id`, and read the files one by one.",
                param="format",
                code="answer_too_long",
            )
        with room.held(BYTES_OF_ANSWER * size, self._job.project_id) if size else nullcontext():
            body = await _rendered(request, self._job, asked, made, pictures, delivery)
            self.headers["content-length"] = str(len(body))
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for message in in_pieces(body, ends=False):
                await send(message)
            await send({"type": "http.response.body", "body": b""})


async def _rendered(
    request: Request,
    job: Job,
    asked: Mapping[str, Any],
    made: Mapping[str, Any],
    pictures: Sequence[KeptPicture],
    delivery: Delivery,
) -> bytes:
    output = OutputPlan(asked["format"], backdrop=asked["backdrop"])
    shape = PictureShape(asked["task"], output, delivery, asked["quality"])
    delivered = [await _delivered(request, job.project_id, each, delivery) for each in pictures]
    answer = shape.answer(delivered, made["created"])
    for shown, picture in zip(answer["data"], pictures, strict=True):
        if picture.preview is not None:
            shown["preview_file_id"] = picture.preview.id
        shown.update(made.get("objects", {}))
    return await asyncio.to_thread(written, answer)


def _delivery(form: str) -> Delivery:
    for known in get_args(Delivery):
        if form == known:
            return form  # type: ignore[return-value]  # it is one of these
    raise InvalidRequest(
        f"The `format` of pictures is one of {', '.join(get_args(Delivery))}.", param="format", code="invalid_value"
    )


async def _address(request: Request, file_id: str) -> str:
    settings: Settings = request.app.state.settings
    signer: Signer = request.app.state.signer
    return await signer.address(beginning_of(request, settings.http.public_url), file_id, settings.images.url_seconds)


async def _delivered(request: Request, project_id: str, kept: KeptPicture, delivery: Delivery) -> Delivered:
    file_id = kept.picture.id
    known = Painted(b"", kept.picture.content_type, kept.size, kept.used)
    if delivery == "file_id":
        return Delivered(known, file_id=file_id)
    state = request.app.state
    file = await state.files.get(project_id, file_id)
    if delivery == "url":
        return Delivered(known, url=await _address(request, file_id))
    try:
        data = await state.blobs.read(file.blob_key)
    except NotFound:  # removed in this moment
        raise NotFound("The file of a picture is gone.") from None
    return Delivered(Painted(data, known.content_type, known.size, known.used))

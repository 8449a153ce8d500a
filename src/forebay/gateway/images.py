"""The routes of pictures: edit images, and make new ones.

Images and masks come in a form, or a JSON body says where they are. It refuses to hold one in memory: its bytes go to a
private file as they come. More than a bounded number of requests for pictures at once get 429.
"""

from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from forebay.config import Settings
from forebay.dialects.openai.images import IMAGE_FORM, IMAGES_MAX
from forebay.errors import CallerError, RateLimited
from forebay.gateway.answers import error_answer, read_body
from forebay.gateway.auth import Principal, may_create, principal, upstream_key
from forebay.gateway.multipart import FilePart, Form, Rules, is_form, read_form
from forebay.gateway.online import Door, trace_of
from forebay.gateway.painting import Easels, PictureAnswer
from forebay.gateway.picture_jobs import in_background
from forebay.gateway.places import Places
from forebay.gateway.protocol import allow_steady_body
from forebay.gateway.signed import beginning_of
from forebay.inference import Capability
from forebay.media.pictures import Inputs, Pictures
from forebay.media.spool import Spool
from forebay.quotas import Amounts
from forebay.replicas.calls import ENDPOINTS, IMAGE_EDITS, IMAGE_GENERATIONS
from forebay.replicas.catalog import Catalog

_IMAGE, _MASK = "image", "mask"
_FILES = {_IMAGE: IMAGES_MAX, _MASK: 1}
_FORM_FIELDS_MAX = 64

router = APIRouter(prefix="/v1/images", dependencies=[Depends(principal)])

CanEdit = Annotated[Principal, Depends(may_create(Capability.IMAGE_EDIT))]
CanGenerate = Annotated[Principal, Depends(may_create(Capability.IMAGE_GENERATION))]


def _takes(path: str, *, form: bool) -> dict[str, Any]:
    """The OpenAPI description of the bodies that a route takes."""
    schema = ENDPOINTS[path].body.model_json_schema()
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if form:
        file = {"type": "string", "format": "binary"}
        fields = {name: each for name, each in schema["properties"].items() if name not in IMAGE_FORM.left_out}
        properties = {**fields, _IMAGE: {"type": "array", "items": file, "maxItems": IMAGES_MAX}, _MASK: file}
        content["multipart/form-data"] = {"schema": {**schema, "properties": properties}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/edits", openapi_extra=_takes(IMAGE_EDITS, form=True))
async def create_edit(request: Request, caller: CanEdit) -> Response:
    """Change what a mask marks in an image, or all of it."""
    return PictureRequest(request.app.state, caller, IMAGE_EDITS, takes_form=True)


@router.post("/generations", openapi_extra=_takes(IMAGE_GENERATIONS, form=False))
async def create_generation(request: Request, caller: CanGenerate) -> Response:
    """Make new pictures."""
    return PictureRequest(request.app.state, caller, IMAGE_GENERATIONS, takes_form=False)


class PictureRequest(Response):
    """Receives a request for pictures and answers it; what was received is gone afterwards."""

    def __init__(self, state: Any, caller: Principal, path: str, *, takes_form: bool) -> None:
        super().__init__()
        self._state = state
        self._caller = caller
        self._path = path
        self._takes_form = takes_form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Receive, and answer."""
        places: Places = self._state.image_places
        with places.entered(self._caller.project_id):
            async with AsyncExitStack() as stack:
                answer = await self._answer(Request(scope, receive), stack)
                await answer(scope, receive, send)

    async def _answer(self, request: Request, stack: AsyncExitStack) -> Response:
        state, caller = self._state, self._caller
        door: Door = state.door
        try:
            await door.require(caller, Amounts(requests=1, pixel_steps=1))  # before anything is received
            raw, inputs = await self._receive(request, stack)
            call = await state.calls.prepare(
                self._path,
                raw,
                request_id=request.scope["request_id"],
                project=caller.project_id,
                traceparent=trace_of(request),
                caller_key=upstream_key(request),
                pictures=len(inputs.images),
                with_mask=inputs.mask is not None,
            )
            if call.picture.background:
                return await in_background(request, caller, call, self._path, raw, inputs)
            delivery = call.picture.delivery
            beginning = beginning_of(request, state.settings.http.public_url) if delivery == "url" else ""
            headers = door.rates.check(caller, 0)  # how much it is, nobody knows yet
        except RateLimited as error:
            return error_answer(error, door.rates.headers(caller))
        return PictureAnswer(door, call, caller, state.catalog, headers, state.easels, inputs, stack, beginning)

    async def _receive(self, request: Request, stack: AsyncExitStack) -> tuple[bytes, Inputs]:
        """The JSON body, and what came with it."""
        settings: Settings = self._state.settings
        if not (self._takes_form and is_form(request)):
            return await read_body(request, settings.http.body_bytes_max), Inputs()
        easels: Easels = self._state.easels
        catalog: Catalog = self._state.catalog
        allow_steady_body(request.scope, settings.files.receive_bytes_per_second_min)
        received = _Received(easels.pictures, stack)

        async def take(form: Form, part: FilePart, data: bytes) -> None:
            if "model" in form.fields:
                catalog.get(form.fields["model"])  # a mistake that is known early spares the rest
            await received.take(part, data)

        names = IMAGE_FORM.names(ENDPOINTS[self._path].body)
        rules = Rules(
            large=IMAGE_FORM.large,
            fields_max=_FORM_FIELDS_MAX,
            bytes_max=settings.http.body_bytes_max,
            needs_file=False,
        )
        form = await read_form(request, _FILES, names, take, rules)
        inputs = await received.inputs(form)
        return IMAGE_FORM.json_of(form.fields.items()), inputs


class _Received:
    """Writes the files of a form into spools of their own, which are there until `stack` is left."""

    def __init__(self, pictures: Pictures, stack: AsyncExitStack) -> None:
        self._pictures = pictures
        self._stack = stack
        self._spools: dict[FilePart, Spool] = {}

    async def take(self, part: FilePart, data: bytes) -> None:
        """Write a piece. Raises PayloadTooLarge (`media_too_large`), InsufficientStorage and StoreUnavailable."""
        spool = await self._spool(part)
        try:
            await spool.write(data)
            self._pictures.check_bytes(Inputs(tuple(self._spools.values())))
        except CallerError as error:
            error.param = part.field
            raise

    async def inputs(self, form: Form) -> Inputs:
        """All files of the form in their order, the empty ones too."""
        spools = [(part.field, await self._spool(part)) for part in form.files]
        masks = [spool for field, spool in spools if field == _MASK]
        return Inputs(tuple(spool for field, spool in spools if field == _IMAGE), masks[0] if masks else None)

    async def _spool(self, part: FilePart) -> Spool:
        if part not in self._spools:
            spool = self._pictures.spool(mask=part.field == _MASK)
            self._spools[part] = await self._stack.enter_async_context(spool)
        return self._spools[part]

"""The route of pushed messages: each becomes one job, however often it is delivered.

It refuses what no job can be made of until the platform has tried often enough; then it is kept as a dead letter, so that
the platform lets go of it. It waits for no work: an answer says that a message is kept, and nothing more.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic_core import to_json
from starlette.responses import Response

from forebay.blobs.blobs import Blobs
from forebay.blobs.key import is_object_name
from forebay.clock import new_id
from forebay.commit_points import reach
from forebay.config import Settings
from forebay.dialects.openai.call import parse
from forebay.dialects.pubsub import Defaults, Envelope, Message, data_of, order_of, within
from forebay.errors import CallerError, InvalidRequest, NotFound, RateLimited, Unauthorized
from forebay.gateway.answers import error_answer, json_answer, read_body
from forebay.gateway.auth import Authenticator, Principal, address_of, bearer, role_at_least
from forebay.gateway.background import Handed, submit
from forebay.gateway.files import drafted
from forebay.gateway.online import Door
from forebay.gateway.picture_jobs import handed_of
from forebay.gateway.push_tokens import PushTokens, looks_like_token
from forebay.inference import Capability
from forebay.jobs.desk import Desk
from forebay.media.pictures import Inputs
from forebay.replicas.calls import IMAGE_EDITS
from forebay.store.dead_letters import DeadLetterStore, LostMessage
from forebay.store.files import FileStore
from forebay.store.intake import IntakeStore, Pushed
from forebay.store.key_format import Role

_PATH = "/v1/intake/pubsub"
_member = role_at_least(Role.MEMBER)
_DATA = "message.data"
_FILE_NAME, _PURPOSE = "message.json", "user_data"
_TAKES = {"requestBody": {"required": True, "content": {"application/json": {"schema": Envelope.model_json_schema()}}}}


async def pusher(request: Request) -> Principal:
    """Who pushes: the owner of an API key or, where the settings say so, a platform with a signed token."""
    tokens: PushTokens = request.app.state.push_tokens
    token = bearer(request.headers)
    if token is None or not tokens.accepted or not looks_like_token(token):
        return await _member(request)
    try:
        return await tokens.principal(token)
    except Unauthorized:
        authenticator: Authenticator = request.app.state.authenticator
        authenticator.refuse(address_of(request))


router = APIRouter(prefix="/v1/intake", dependencies=[Depends(pusher)])

Pusher = Annotated[Principal, Depends(pusher)]


@router.post("/pubsub", openapi_extra=_TAKES)
async def take_message(request: Request, caller: Pusher) -> Response:
    """Take a message: what it has become, which is the same each time it is delivered."""
    state = request.app.state
    settings: Settings = state.settings
    check_open(settings)
    caller.require_scope(Capability.IMAGE_EDIT)
    await state.push_tokens.check_project(caller)
    door: Door = state.door
    try:
        door.rates.check(caller, 0)
    except RateLimited as error:
        return error_answer(error, door.rates.headers(caller))
    envelope = parse(Envelope, await read_body(request, settings.intake.message_bytes_max))
    message = Pushed(caller.project_id, envelope.subscription, envelope.message.message_id)
    made = await state.intake.find(message)
    if made is not None:
        return _receipt(message, made, again=True)
    try:
        handed = await order_in(request, caller, data_of(envelope.message), envelope.message.attributes or {})
    except CallerError as error:
        within(error, _DATA)
        if (envelope.delivery_attempt or 0) <= settings.intake.attempts_max:
            raise
        return await _bury(request, message, envelope, error)
    handed.key_id = caller.key_id
    return await _submit(request, message, handed)


def check_open(settings: Settings) -> None:
    """Raise NotFound where the settings name no store of objects."""
    if settings.intake.url is None:
        raise NotFound(
            "This server takes no pushed messages. Its operator opens that with the setting `intake.url`.",
            code="intake_closed",
        )


async def order_in(request: Request, caller: Principal, data: bytes, attributes: Mapping[str, str]) -> Handed:
    """What the data of a message asks for, ready to become a job.

    Raises InvalidRequest and ModelNotFound, which name the field of the data, and PermissionDenied.
    """
    state = request.app.state
    settings: Settings = state.settings
    check_open(settings)
    await state.push_tokens.check_project(caller)
    intake = settings.intake
    defaults = Defaults(intake.model, intake.output_name, intake.preview_name, intake.output_compression)
    order = order_of(data, attributes, defaults)
    for field, name in order.names.by_field.items():
        if not is_object_name(name):
            raise InvalidRequest(
                f"`{field}` is the name of an object: printable, without backslashes and without a slash at either end, "
                "and no part of it between slashes is empty or begins with a dot.",
                param=field,
                code="invalid_value",
            )
    raw = to_json(order.body)
    call = await state.calls.prepare(
        IMAGE_EDITS,
        raw,
        request_id=request.scope["request_id"],
        project=caller.project_id,
        pictures=1,
        with_mask=order.names.mask is not None,
    )
    return handed_of(settings, caller.project_id, call, IMAGE_EDITS, raw, Inputs(), order.names)


async def _submit(request: Request, message: Pushed, handed: Handed) -> Response:
    """Make the job of a message, unless another delivery of it has."""
    state = request.app.state
    desk: Desk = state.desk
    store: IntakeStore = state.intake
    await desk.check_room()
    async with store.database.begin() as transaction:
        made = await store.claim(transaction, message, handed.new.id)
        if made is None:
            await submit(desk, state.media_jobs, transaction, handed)
    if made is None:
        reach("intake.taken")
    return _receipt(message, made or handed.new.id, again=made is not None)


async def _bury(request: Request, message: Pushed, envelope: Envelope, error: CallerError) -> Response:
    """Keep a message that cannot be used as a dead letter, unless another delivery of it has become something."""
    state = request.app.state
    settings: Settings = state.settings
    files: FileStore = state.files
    blobs: Blobs = state.blobs
    letters: DeadLetterStore = state.dead_letters
    store: IntakeStore = state.intake
    content, letter_id = _content(envelope.message), new_id("dead")
    file = await files.begin(message.project_id, _FILE_NAME, _PURPOSE)
    async with drafted(lambda: files.discard(blobs, file)) as draft:
        await blobs.put(file.blob_key, content)
        async with store.database.begin() as transaction:
            made = await store.claim(transaction, message, letter_id)
            if made is None:
                digest = hashlib.sha256(content).hexdigest()
                kept = await files.finish(transaction, file, len(content), digest, settings.jobs.keep_seconds)
                attempt = _attempt(envelope, error, state.clock.now())
                lost = LostMessage(
                    letter_id, message.project_id, _PATH, message.message_id, kept, error.code, str(error), attempt
                )
                await letters.add_message(transaction, lost)
        draft.kept = made is None
    return _receipt(message, made or letter_id, again=made is not None)


def _content(message: Message) -> bytes:
    """What was in a message, as far as it can be read."""
    try:
        return data_of(message) or b"{}"
    except InvalidRequest:
        return message.data.encode()


def _attempt(envelope: Envelope, error: CallerError, now: float) -> dict[str, Any]:
    return {
        "attempt": envelope.delivery_attempt,
        "at": now,
        "status": error.status,
        "code": error.code,
        "message": str(error),
        "param": error.param,
    }


def _receipt(message: Pushed, made: str, *, again: bool) -> Response:
    lost = made.startswith("dead_")
    return json_answer(
        {
            "object": "intake.receipt",
            "message_id": message.message_id,
            "job_id": None if lost else made,
            "dead_letter_id": made if lost else None,
            "duplicate": again,
        }
    )

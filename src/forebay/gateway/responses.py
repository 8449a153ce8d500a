"""The routes of responses: create, in the background or not, read, watch, cancel, delete.

It refuses to continue a response of another project, and to stream events of one that was not made for it.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic_core import from_json, to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from forebay.clock import Clock, new_id
from forebay.config import Settings
from forebay.dialects.openai.call import Call, Thread, parse
from forebay.dialects.openai.responses import ResponseBody, continued
from forebay.dialects.openai.responses_events import ResponseShape, rendered
from forebay.dialects.openai.responses_items import items_of, listed
from forebay.errors import Conflict, ForebayError, InvalidRequest, NotFound, Overloaded, RateLimited
from forebay.gateway.answers import error_answer, json_answer, read_body
from forebay.gateway.auth import Principal, may_create, principal, role_at_least, upstream_key
from forebay.gateway.idempotency import create
from forebay.gateway.jobs import Watchers, page_of
from forebay.gateway.online import Door, look, trace_of, visit
from forebay.gateway.streams import send_while_there
from forebay.inference import Capability, Priority
from forebay.jobs.desk import Desk
from forebay.jobs.response import ResponseEnds, as_it_is
from forebay.replicas.calls import RESPONSES
from forebay.store.database import Transaction
from forebay.store.job_records import NewJob
from forebay.store.key_format import Role
from forebay.store.responses import RESPONSE, History, KeptResponse, NewResponse, ResponseStore, channel_of

_FULL_SECONDS = 30.0
_CANCEL_SECONDS = 5.0  # the longest wait for an engine to stop before the answer to a cancel
_LOOK_SECONDS = 0.05
_QUIET_SECONDS = 10.0  # without an event, before a comment keeps the connection alive
_ITEMS_PAGE_MAX = 100
_PRIORITIES = {Priority.HIGH: -1, Priority.LOW: 1}

router = APIRouter(prefix="/v1/responses", dependencies=[Depends(principal)])

Caller = Annotated[Principal, Depends(principal)]
Member = Annotated[Principal, Depends(role_at_least(Role.MEMBER))]
CanChat = Annotated[Principal, Depends(may_create(Capability.CHAT))]
_TAKES = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": ResponseBody.model_json_schema()}}}
}


@router.post("", openapi_extra=_TAKES)
async def create_response(request: Request, caller: CanChat) -> Response:
    """Answer a conversation, now or in the background."""
    state = request.app.state
    raw = await read_body(request, state.settings.http.body_bytes_max)
    body = parse(ResponseBody, raw)
    responses: ResponseStore = state.responses
    history = History()
    if body.previous_response_id is not None:
        history = await _history(responses, caller, body.previous_response_id)
    thread = Thread(new_id("resp"), responses.database.now(state.clock), state.clock.now)
    whole = continued(raw, history.items) if history.items else raw
    try:
        call = await state.calls.prepare(
            RESPONSES,
            whole,
            request_id=request.scope["request_id"],
            project=caller.project_id,
            traceparent=trace_of(request),
            thread=thread,
            caller_key=None if body.background else upstream_key(request),
            watch=partial(look, request, caller),
        )
    except RateLimited as error:
        return error_answer(error, state.door.rates.headers(caller))
    new = NewResponse(
        thread.id,
        caller.project_id,
        "queued",
        input=to_json(listed(items_of(body.input), thread.id)),
        body=b"",
        created_at=thread.created_at,
        previous_id=body.previous_response_id,
        chain=history.ids,
    )
    if body.background:
        return await _in_background(request, caller, call, new, raw, whole)
    if not body.kept:
        return visit(request, caller, call)

    async def keep(served: Call) -> None:
        result = _shape(served).result
        assert result is not None, "a response that is sent has ended"
        await responses.keep(_as_kept(new, result))

    return visit(request, caller, call, keep)


async def _history(responses: ResponseStore, caller: Principal, response_id: str) -> History:
    try:
        return await responses.history(caller.project_id, response_id)
    except (NotFound, InvalidRequest) as error:
        code = "previous_response_not_found" if isinstance(error, NotFound) else error.code
        raise InvalidRequest(str(error), param="previous_response_id", code=code) from None


def _shape(call: Call) -> ResponseShape:
    assert isinstance(call.shape, ResponseShape)
    return call.shape


def _as_kept(new: NewResponse, result: dict[str, Any]) -> NewResponse:
    return replace(new, status=result["status"], body=to_json(result))


async def _in_background(
    request: Request, caller: Principal, call: Call, new: NewResponse, raw: bytes, whole: bytes
) -> Response:
    """Make the response and its job; once for each Idempotency-Key."""
    state = request.app.state
    settings: Settings = state.settings
    desk: Desk = state.desk
    door: Door = state.door
    queued = _shape(call).queued()

    async def check() -> None:
        door.rates.check(caller, call.tokens_estimate)
        await desk.check_room()

    async def perform(transaction: Transaction) -> dict[str, Any]:
        responses: ResponseStore = state.responses
        if await responses.unfinished(transaction, caller.project_id) >= settings.responses.live_per_project_max:
            raise Overloaded(
                "This project has too many unfinished responses. Wait for one to end, or cancel one.",
                code="response_limit_reached",
                retry_after_seconds=_FULL_SECONDS,
            )
        job = NewJob(
            RESPONSE,
            caller.project_id,
            id=new.id,
            priority=_PRIORITIES.get(call.request.priority, 0),
            model=call.request.model,
            key_id=caller.key_id,
        )
        await desk.submit(transaction, [job])
        kept = replace(new, background=True, streamed=call.stream, request=whole, body=to_json(queued))
        await responses.insert(transaction, kept)
        return queued

    try:
        answer = await create(request, caller, raw, perform, before=check, retries=True)
    except RateLimited as error:
        door.refuse(call, error)
        return error_answer(error, door.rates.headers(caller))
    if not call.stream:
        return answer
    made = from_json(bytes(answer.body))["id"]  # that of the first request with this key
    return _events(request, await state.responses.get(caller.project_id, made), -1)


@router.get("/{response_id}")
async def show_response(
    request: Request,
    response_id: str,
    caller: Caller,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=-1, le=2**31 - 1)] = None,
) -> Response:
    """A response that is kept; or its events from some number on, if it was made in the background with a stream."""
    kept = await _get(request, caller, response_id)
    if not stream:
        if starting_after is not None:
            raise InvalidRequest("`starting_after` needs `stream` to be true.", param="starting_after")
        return json_answer(as_it_is(kept))
    if not kept.streamed:
        raise InvalidRequest(
            "Only a response that was made with `background` and `stream` can be streamed again.",
            param="stream",
            code="stream_not_supported",
        )
    return _events(request, kept, -1 if starting_after is None else starting_after)


@router.get("/{response_id}/input_items")
async def list_input_items(
    request: Request,
    response_id: str,
    caller: Caller,
    after: Annotated[str | None, Query(max_length=256)] = None,
    limit: Annotated[int, Query(ge=1, le=_ITEMS_PAGE_MAX)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """What a response was an answer to, without the conversation before."""
    kept = await _get(request, caller, response_id)
    items: list[dict[str, Any]] = from_json(kept.input)
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [place for place, item in enumerate(items, 1) if item["id"] == after]
        if not places:
            raise NotFound("There is no such item to continue after.", param="after")
        items = items[places[0] :]
    return json_answer(page_of(items[:limit], more=len(items) > limit))


@router.post("/{response_id}/cancel")
async def cancel_response(request: Request, response_id: str, caller: Member) -> Response:
    """Stop a response that runs in the background; one that has ended stays as it is."""
    state = request.app.state
    desk: Desk = state.desk
    kept = await _get(request, caller, response_id)
    if not kept.background:
        raise InvalidRequest("Only a response in the background can be cancelled.", code="not_cancellable")
    if not kept.ended:
        await _stop(desk, state.clock, caller, response_id)
        kept = await _get(request, caller, response_id)
    return json_answer(as_it_is(kept))


async def _stop(desk: Desk, clock: Clock, caller: Principal, response_id: str) -> None:
    """Cancel its job, and wait a little until it has stopped."""
    job = await desk.cancel(caller.project_id, response_id)
    until = clock.monotonic() + _CANCEL_SECONDS
    while not job.finished and clock.monotonic() < until:
        await clock.sleep(_LOOK_SECONDS)
        job = await desk.get(caller.project_id, response_id)


@router.delete("/{response_id}")
async def delete_response(request: Request, response_id: str, caller: Member) -> Response:
    """Remove a response that has ended, with its job."""
    state = request.app.state
    desk: Desk = state.desk
    kept = await _get(request, caller, response_id)
    if not kept.ended:
        raise Conflict("The response has not ended. Cancel it, and delete it then.")
    if kept.background:
        try:
            await desk.delete(caller.project_id, response_id)
        except NotFound:
            pass  # it has been removed before
    await state.responses.delete(caller.project_id, response_id)
    return json_answer({"id": response_id, "object": "response", "deleted": True})


async def _get(request: Request, caller: Principal, response_id: str) -> KeptResponse:
    """A project's response; what its job says of its end is written down by the way. Raises NotFound."""
    responses: ResponseStore = request.app.state.responses
    ends: ResponseEnds = request.app.state.response_ends
    kept = await responses.get(caller.project_id, response_id)
    if await ends.close(kept):
        kept = await responses.get(caller.project_id, response_id)
    return kept


def _events(request: Request, kept: KeptResponse, after: int) -> Response:
    state = request.app.state
    return EventsAnswer(state.responses, state.response_ends, state.desk, kept, after, state.watchers, state.clock)


class EventsAnswer(Response):
    """The events of a response in the background after some number, sent while somebody reads them."""

    def __init__(
        self,
        responses: ResponseStore,
        ends: ResponseEnds,
        desk: Desk,
        kept: KeptResponse,
        after: int,
        watchers: Watchers,
        clock: Clock,
    ) -> None:
        super().__init__()
        self._responses = responses
        self._ends = ends
        self._desk = desk
        self._kept = kept
        self._after = after
        self._watchers = watchers
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the last one is sent, the reader is gone or the server stops."""
        try:
            with (
                self._watchers.watching(self._desk.jobs, self._clock, self._kept.id, self._kept.project_id) as news,
                self._responses.database.listen(channel_of(self._kept.id)) as told,
            ):
                await send_while_there(self._told(news, told), receive, send)
        except Overloaded as error:
            await error_answer(error)(scope, receive, send)

    async def _told(self, news: asyncio.Event, told: asyncio.Event) -> AsyncIterator[bytes]:
        while not self._watchers.stopping():
            news.clear()
            told.clear()
            try:
                # The state first: what is written down before the end is found when the end is known.
                kept = await self._responses.get(self._kept.project_id, self._kept.id)
                if await self._ends.close(kept):
                    continue
                while events := await self._responses.events(kept.id, self._after):
                    self._after = events[-1]["sequence_number"]
                    yield rendered(events)
                if kept.ended:
                    return
            except NotFound:  # it was deleted
                return
            except ForebayError:  # the database is away, and comes back
                yield b": no news\n\n"
            if not await self._heard(news, told):
                yield b": still here\n\n"

    async def _heard(self, news: asyncio.Event, told: asyncio.Event) -> bool:
        """Wait for either, but not for ever; whether there was any."""
        waits = [asyncio.create_task(event.wait()) for event in (news, told)]
        try:
            done, _ = await asyncio.wait(waits, timeout=_QUIET_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return bool(done)

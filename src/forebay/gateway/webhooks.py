"""The routes of webhooks: endpoints, their secrets, and what was delivered to them.

It refuses an address that the server may not reach, and to show a secret again once it was given out.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic_core import from_json
from starlette.responses import Response

from forebay.dialects.openai.call import Wire, parse
from forebay.dialects.openai.webhooks import WebhookBody, WebhookChanges
from forebay.gateway.answers import json_answer, read_body
from forebay.gateway.auth import Principal, principal, role_at_least
from forebay.gateway.idempotency import create
from forebay.jobs.desk import Desk
from forebay.outbound import Outbound
from forebay.store.database import Transaction
from forebay.store.job_state import JobState
from forebay.store.key_format import Role
from forebay.store.webhooks import PAGE_SIZE_MAX, Delivery, Endpoint, WebhookStore

router = APIRouter(prefix="/v1", dependencies=[Depends(principal)])

Caller = Annotated[Principal, Depends(principal)]
Member = Annotated[Principal, Depends(role_at_least(Role.MEMBER))]
_PAGE_SIZE = 20


def _takes(body: type[Wire]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}}}


def endpoint_object(endpoint: Endpoint, *, with_secret: bool = False) -> dict[str, Any]:
    """An endpoint as its project sees it."""
    shown: dict[str, Any] = {
        "id": endpoint.id,
        "object": "webhook",
        "url": endpoint.url,
        "events": endpoint.events,
        "description": endpoint.description,
        "enabled": endpoint.disabled_at is None,
        "disabled_at": _seconds(endpoint.disabled_at),
        "disabled_reason": endpoint.disabled_reason,
        "previous_secret_expires_at": _seconds(endpoint.previous_secret_expires_at),
        "created_at": int(endpoint.created_at),
    }
    return shown | {"secret": endpoint.secret} if with_secret else shown


def delivery_object(delivery: Delivery) -> dict[str, Any]:
    """A delivery with its attempts."""
    return {
        "id": delivery.id,
        "object": "webhook.delivery",
        "webhook_id": delivery.endpoint_id,
        "url": delivery.url,
        "event": from_json(delivery.body),
        "status": delivery.state.value,
        "next_attempt_at": _seconds(delivery.run_at) if delivery.state is JobState.AVAILABLE else None,
        "created_at": int(delivery.created_at),
        "attempts": [
            {
                "number": attempt.number,
                "at": attempt.at,
                "duration_seconds": round(attempt.duration_seconds, 3),
                "status_code": attempt.status,
                "error": attempt.error,
            }
            for attempt in delivery.attempts
        ],
    }


@router.post("/webhooks", openapi_extra=_takes(WebhookBody))
async def create_webhook(request: Request, caller: Member) -> Response:
    """Make an endpoint; the only answer, but that of a rotation, that has a secret."""
    raw = await _read(request)
    body = parse(WebhookBody, raw)
    _outbound(request).check(body.url)

    async def perform(transaction: Transaction) -> dict[str, Any]:
        made = await _store(request).create_endpoint(
            transaction, caller.project_id, url=body.url, events=body.events, description=body.description
        )
        return endpoint_object(made, with_secret=True)

    return await create(request, caller, raw, perform)


@router.get("/webhooks")
async def list_webhooks(request: Request, caller: Caller) -> Response:
    """Every endpoint of the project, oldest first."""
    return _page([endpoint_object(each) for each in await _store(request).list_endpoints(caller.project_id)])


@router.get("/webhooks/{webhook_id}")
async def show_webhook(request: Request, caller: Caller, webhook_id: str) -> Response:
    """One endpoint."""
    return json_answer(endpoint_object(await _store(request).get_endpoint(caller.project_id, webhook_id)))


@router.post("/webhooks/{webhook_id}", openapi_extra=_takes(WebhookChanges))
async def update_webhook(request: Request, caller: Member, webhook_id: str) -> Response:
    """Change an endpoint, or enable it again."""
    body = parse(WebhookChanges, await _read(request))
    if body.url is not None:
        _outbound(request).check(body.url)
    changed = await _store(request).update_endpoint(
        caller.project_id,
        webhook_id,
        url=body.url,
        events=body.events,
        description=body.description,
        enabled=body.enabled,
    )
    return json_answer(endpoint_object(changed))


@router.delete("/webhooks/{webhook_id}")
async def delete_webhook(request: Request, caller: Member, webhook_id: str) -> Response:
    """Forget an endpoint; what is on its way to it is not sent any more."""
    await _store(request).delete_endpoint(caller.project_id, webhook_id)
    return json_answer({"id": webhook_id, "object": "webhook", "deleted": True})


@router.post("/webhooks/{webhook_id}/rotate")
async def rotate_webhook(request: Request, caller: Member, webhook_id: str) -> Response:
    """A new secret; the old one signs on for a while."""

    async def perform(transaction: Transaction) -> dict[str, Any]:
        rotated = await _store(request).rotate(transaction, caller.project_id, webhook_id)
        return endpoint_object(rotated, with_secret=True)

    return await create(request, caller, b"", perform)


@router.post("/webhooks/{webhook_id}/test")
async def test_webhook(request: Request, caller: Member, webhook_id: str) -> Response:
    """Send a `webhook.test` event."""
    await _desk(request).check_room()

    async def perform(transaction: Transaction) -> dict[str, Any]:
        return delivery_object(await _store(request).send_test(transaction, caller.project_id, webhook_id))

    return await create(request, caller, b"", perform)


@router.get("/webhooks/{webhook_id}/deliveries")
async def list_deliveries(
    request: Request,
    caller: Caller,
    webhook_id: str,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)] = _PAGE_SIZE,
) -> Response:
    """What was sent to an endpoint and what came of it, newest first."""
    found = await _store(request).list_deliveries(caller.project_id, webhook_id, after=after, limit=limit + 1)
    return _page([delivery_object(each) for each in found[:limit]], has_more=len(found) > limit)


@router.post("/webhooks/deliveries/{delivery_id}/replay")
async def replay_delivery(request: Request, caller: Member, delivery_id: str) -> Response:
    """Send the same event once more, with the same event id."""
    await _desk(request).check_room()

    async def perform(transaction: Transaction) -> dict[str, Any]:
        return delivery_object(await _store(request).replay(transaction, caller.project_id, delivery_id))

    return await create(request, caller, b"", perform)


def _store(request: Request) -> WebhookStore:
    store: WebhookStore = request.app.state.webhooks
    return store


def _outbound(request: Request) -> Outbound:
    outbound: Outbound = request.app.state.outbound
    return outbound


def _desk(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


async def _read(request: Request) -> bytes:
    return await read_body(request, request.app.state.settings.http.body_bytes_max)


def _page(data: list[dict[str, Any]], *, has_more: bool = False) -> Response:
    page = {
        "object": "list",
        "data": data,
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
    return json_answer(page)


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)

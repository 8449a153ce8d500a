"""Requests with media that are worked on in the background: handed in as jobs, once for each Idempotency-Key.

It refuses to hand in what cannot be kept whole: what comes with a request is stored before there is a job, and removed if
there is none in the end.
"""

import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic_core import from_json
from starlette.responses import Response

from forebay.blobs.blobs import Blobs
from forebay.commit_points import reach
from forebay.dialects.openai.call import Call
from forebay.errors import Overloaded, RateLimited
from forebay.gateway.answers import error_answer
from forebay.gateway.auth import Principal
from forebay.gateway.files import drafted
from forebay.gateway.idempotency import create, replayed
from forebay.gateway.jobs import job_object
from forebay.gateway.online import Door
from forebay.jobs.desk import UNKNOWN, Desk
from forebay.jobs.ledger import QUEUED
from forebay.store.database import Transaction
from forebay.store.job_records import NewJob
from forebay.store.media_jobs import MediaJobStore, NewMediaJob, media_key
from forebay.store.webhooks import new_secret

OF_THE_DOOR = ("stream", "background", "webhook_url")  # what of a body is not about the work

_ACCEPTED = 202
_FULL_SECONDS = 30.0

Parcel = Callable[[], AsyncIterator[bytes]]  # what came with a request, from its beginning


@dataclass(frozen=True, slots=True)
class Limits:
    """What one project may have of a kind at once, and how long one may take."""

    live_max: int
    seconds_max: float


@dataclass(slots=True)
class Handed:
    """What is handed in: `parcel` is what came with it, none where all of it lies elsewhere; `file_ids` is where.

    `key_id` is whose key asks for it.
    """

    new: NewMediaJob
    limits: Limits
    model: str
    webhook_url: str | None
    file_ids: tuple[str, ...] = ()
    parcel: Parcel | None = None
    key_id: str | None = None
    size: int | None = None


async def hand_in(
    request: Request, caller: Principal, call: Call, handed: Handed, raw: bytes, *, counted: bool = False
) -> Response:
    """Make a job of a request, whose JSON body is `raw`: 202, the job, and where it is.

    With `counted` the key's rate knows of the request. Raises InvalidRequest, NotFound, Overloaded, InsufficientStorage and
    StoreUnavailable.
    """
    door: Door = request.app.state.door
    if handed.webhook_url is not None:
        request.app.state.outbound.check(handed.webhook_url, param="webhook_url")
    try:
        return await _hand_in(request, caller, handed, raw, counted=counted)
    except RateLimited as error:
        door.refuse(call, error)
        return error_answer(error, door.rates.headers(caller))


async def _hand_in(request: Request, caller: Principal, handed: Handed, raw: bytes, *, counted: bool) -> Response:
    state = request.app.state
    store: MediaJobStore = state.media_jobs
    blobs: Blobs = state.blobs
    desk: Desk = state.desk
    new = handed.new
    handed.key_id = caller.key_id

    async def check() -> None:
        if not counted:
            state.door.rates.check(caller, 0)
        await desk.check_room()
        for file_id in handed.file_ids:
            await state.files.get(caller.project_id, file_id)  # a mistake that is known early spares the job
        if handed.parcel is not None:
            await store.begin(new)
            handed.size = await _store(blobs, media_key(new.kind, new.id), handed.parcel)
            reach(f"{new.kind}.media_stored")

    async def perform(transaction: Transaction) -> dict[str, Any]:
        return await submit(desk, store, transaction, handed)

    fingerprint = raw if handed.parcel is None else raw + new.request + await _digest(handed.parcel)
    async with drafted(lambda: store.discard(blobs, new.id)) as draft:
        answer = await create(request, caller, fingerprint, perform, before=check, retries=True)
        draft.kept = not replayed(answer)
    if draft.kept:
        reach(f"{new.kind}.created")
    answer.status_code = _ACCEPTED
    answer.headers["location"] = f"/v1/jobs/{from_json(bytes(answer.body))['id']}"
    return answer


async def submit(desk: Desk, store: MediaJobStore, transaction: Transaction, handed: Handed) -> dict[str, Any]:
    """Make the job and what belongs to it. Raises Overloaded if the project has too many."""
    new = handed.new
    if await store.unfinished(transaction, new.project_id, new.kind) >= handed.limits.live_max:
        raise Overloaded(
            f"This project has too many unfinished {new.kind} jobs. Wait for one to end, or cancel one.",
            code=f"{new.kind}_limit_reached",
            retry_after_seconds=_FULL_SECONDS,
        )
    secret = None if handed.webhook_url is None else new_secret()
    job = NewJob(
        new.kind,
        new.project_id,
        id=new.id,
        stage=QUEUED,
        model=handed.model,
        deadline_at=desk.jobs.now() + handed.limits.seconds_max,
        webhook_url=handed.webhook_url,
        webhook_secret=secret,
        key_id=handed.key_id,
    )
    await desk.submit(transaction, [job])
    await store.submit(transaction, new, handed.size)
    made = await desk.jobs.lock(transaction, new.id)
    assert made is not None, "it was made in this transaction"
    shown = job_object(made, UNKNOWN)
    return shown if secret is None else shown | {"webhook_secret": secret}


async def _store(blobs: Blobs, key: str, parcel: Parcel) -> int:
    size = 0
    async with blobs.write(key) as writer:
        async for piece in parcel():
            await writer.write(piece)
            size += len(piece)
    return size


async def _digest(parcel: Parcel) -> bytes:
    digest = hashlib.sha256()
    async for piece in parcel():
        digest.update(piece)
    return digest.digest()

"""The routes of batches: create, list, look at, cancel.

It refuses an input file that is not the project's own, and more unfinished batches of one project than it may have. What is
in the file is checked later, by whoever works on the batch.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from forebay.clock import new_id
from forebay.commit_points import reach
from forebay.config import Settings
from forebay.dialects.openai.batches import BatchBody, window_seconds
from forebay.dialects.openai.call import parse
from forebay.errors import InvalidRequest, NotFound, Overloaded
from forebay.gateway.answers import json_answer, read_body
from forebay.gateway.auth import Principal, principal, role_at_least
from forebay.gateway.idempotency import create, replayed
from forebay.gateway.jobs import page_of
from forebay.jobs.desk import UNKNOWN, Desk, Outlook
from forebay.jobs.estimate import count_lines, guess
from forebay.metering.meter import Meter
from forebay.quotas import Resource
from forebay.replicas.calls import BATCH_ENDPOINTS, ENDPOINTS
from forebay.store.batches import BATCH, JOIN, LINES, PAGE_SIZE_MAX, Batch, BatchStore, NewBatch
from forebay.store.database import Transaction
from forebay.store.files import File, FileStore
from forebay.store.job_records import NewJob
from forebay.store.job_state import FINISHED, JobState
from forebay.store.key_format import Role
from forebay.store.webhooks import new_secret

_FULL_SECONDS = 30.0
_PURPOSE = "batch"

router = APIRouter(prefix="/v1/batches", dependencies=[Depends(principal)])

Caller = Annotated[Principal, Depends(principal)]
Member = Annotated[Principal, Depends(role_at_least(Role.MEMBER))]
_TAKES = {"requestBody": {"required": True, "content": {"application/json": {"schema": BatchBody.model_json_schema()}}}}


def status_of(batch: Batch) -> str:
    """OpenAI's word for where a batch is: it follows from the job and is kept nowhere."""
    job = batch.job
    if job.state in FINISHED:
        return job.state.value
    if job.cancel_requested_at is not None:
        return "cancelling"
    if job.stage == JOIN:
        return "finalizing"
    return "in_progress" if job.stage else "validating"


def batch_object(batch: Batch, outlook: Outlook) -> dict[str, Any]:
    """A batch as its project sees it. `queue_position` and `eta_seconds` are ours."""
    job = batch.job
    ended = {f"{state.value}_at": _whole(job.finished_at) if job.state is state else None for state in sorted(FINISHED)}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": _errors(batch),
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": status_of(batch),
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": int(job.created_at),
        "in_progress_at": _whole(batch.in_progress_at),
        "expires_at": int(job.deadline_at),
        "finalizing_at": _whole(batch.finalizing_at),
        "cancelling_at": _whole(job.cancel_requested_at),
        **ended,
        "request_counts": {"total": job.total, "completed": job.completed, "failed": job.failed},
        "usage": {
            "input_tokens": batch.input_tokens,
            "input_tokens_details": {"cached_tokens": batch.cached_tokens},
            "output_tokens": batch.output_tokens,
            "output_tokens_details": {"reasoning_tokens": batch.reasoning_tokens},
            "total_tokens": batch.input_tokens + batch.output_tokens,
        },
        "metadata": batch.metadata,
        "priority": -job.priority,
        "queue_position": outlook.queue_position,
        "eta_seconds": None if outlook.eta_seconds is None else round(outlook.eta_seconds, 1),
    }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def _errors(batch: Batch) -> dict[str, Any] | None:
    """What is wrong with the file; or, for a batch that failed otherwise, why."""
    if batch.errors:
        return {"object": "list", "data": batch.errors}
    job = batch.job
    if job.state is not JobState.FAILED:
        return None
    own = {"code": job.error_code, "message": job.error_message, "param": None, "line": None}
    return {"object": "list", "data": [own]}


@router.post("", openapi_extra=_TAKES)
async def create_batch(request: Request, caller: Member) -> Response:
    """Hand in a file of requests. The answer tells that it is kept; the check of the file comes after."""
    state = request.app.state
    settings: Settings = state.settings
    raw = await read_body(request, settings.http.body_bytes_max)
    body = parse(BatchBody, raw)
    seconds = window_seconds(body.completion_window, settings.batches.window_seconds_min)
    if body.endpoint not in BATCH_ENDPOINTS:
        known = ", ".join(f"`{path}`" for path in BATCH_ENDPOINTS)
        raise InvalidRequest(f"`endpoint` is one of {known}.", param="endpoint", code="invalid_value")
    if body.webhook_url is not None:
        state.outbound.check(body.webhook_url, param="webhook_url")
    desk: Desk = state.desk

    outlook, lines = UNKNOWN, None

    async def check() -> None:
        nonlocal outlook, lines
        file = await _input_file(state.files, caller, body.input_file_id)
        _check_file(file, settings)
        await desk.check_room()
        if state.door.meter.level(caller.project_id, Resource.QUEUED_LINES) is not None:
            lines = await count_lines(state.blobs, file, settings.batches, state.door.clock)
        found = await guess(state.blobs, file, body.endpoint)
        if found is not None:
            outlook = await desk.estimate(BATCH, found.model, found.lines, -body.priority)

    async def perform(transaction: Transaction) -> dict[str, Any]:
        await check_live(state.batches, transaction, caller, settings.batches.live_per_project_max)
        if lines is not None:
            await check_lines(state.batches, transaction, caller, state.door.meter, lines)
        return await insert_batch(state.batches, desk, transaction, caller, body, seconds, outlook, lines=lines)

    answer = await create(request, caller, raw, perform, before=check, retries=True)
    if not replayed(answer):
        reach("batch.created")
    return answer


async def _input_file(files: FileStore, caller: Principal, file_id: str) -> File:
    try:
        return await files.get(caller.project_id, file_id)
    except NotFound:
        raise InvalidRequest(
            "There is no such file. Upload it with POST /v1/files.", param="input_file_id", code="file_not_found"
        ) from None


def _check_file(file: File, settings: Settings) -> None:
    if file.purpose != _PURPOSE:
        raise InvalidRequest(
            f"The purpose of the file is `{file.purpose}`. Upload it with purpose `{_PURPOSE}`.",
            param="input_file_id",
            code="invalid_file_purpose",
        )
    if file.bytes > settings.batches.bytes_max:
        raise InvalidRequest(
            f"The input file of a batch has {settings.batches.bytes_max} bytes at most. Split it.",
            param="input_file_id",
            code="file_too_large",
        )


async def check_live(batches: BatchStore, transaction: Transaction, caller: Principal, most: int) -> None:
    """Raise Overloaded if the project has `most` unfinished batches."""
    if await batches.unfinished(transaction, caller.project_id) >= most:
        raise Overloaded(
            f"This project has {most} unfinished batches already. Wait for one to end, or cancel one.",
            code="batch_limit_reached",
            retry_after_seconds=_FULL_SECONDS,
        )


async def check_lines(
    batches: BatchStore, transaction: Transaction, caller: Principal, meter: Meter, lines: int
) -> None:
    """Raise QuotaExceeded if the project may not have so many lines more in line; after `check_live`."""
    held = await batches.queued_lines(transaction, caller.project_id)
    meter.check_level(caller.project_id, Resource.QUEUED_LINES, held, lines)


async def insert_batch(
    batches: BatchStore,
    desk: Desk,
    transaction: Transaction,
    caller: Principal,
    body: BatchBody,
    seconds: int,
    outlook: Outlook = UNKNOWN,
    *,
    lines: int | None = None,
) -> dict[str, Any]:
    """Make the job and the batch, and show them as they will be read. `lines` is how many there are, if that is known.

    Raises PermissionDenied where the key's scopes do not have the endpoint: its lines are run as its requests would be.
    """
    caller.require_scope(ENDPOINTS[body.endpoint].capability)
    now = desk.jobs.now()
    secret = None if body.webhook_url is None else new_secret()
    job = NewJob(
        BATCH,
        caller.project_id,
        payload={} if lines is None else {LINES: lines},
        id=new_id("batch"),
        priority=-body.priority,
        deadline_at=now + seconds,
        webhook_url=body.webhook_url,
        webhook_secret=secret,
        key_id=caller.key_id,
    )
    await desk.submit(transaction, [job])
    new = NewBatch(
        id=job.id,
        project_id=caller.project_id,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        metadata=body.metadata,
        output_expires_after_seconds=None if body.output_expires_after is None else body.output_expires_after.seconds,
        created_at=now,
    )
    await batches.insert(transaction, new)
    shown = batch_object(await batches.read(transaction, job.id), outlook)
    return shown if secret is None else shown | {"webhook_secret": secret}


@router.get("")
async def list_batches(
    request: Request,
    caller: Caller,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)] = 20,
) -> Response:
    """The project's batches, newest first. Their places in line are not worked out here: look at one for that."""
    batches: BatchStore = request.app.state.batches
    desk: Desk = request.app.state.desk
    found, more = await batches.page(caller.project_id, after=after, limit=limit)
    return json_answer(page_of([batch_object(batch, desk.own_pace(batch.job)) for batch in found], more=more))


@router.get("/{batch_id}")
async def show_batch(request: Request, batch_id: str, caller: Caller) -> Response:
    """One batch, with its place in line and how long it will still take."""
    return await _show(request, caller, batch_id)


@router.post("/{batch_id}/cancel")
async def cancel_batch(request: Request, batch_id: str, caller: Member) -> Response:
    """Stop a batch. Lines that are finished are kept; the others become error lines."""
    batches: BatchStore = request.app.state.batches
    desk: Desk = request.app.state.desk
    await batches.get(caller.project_id, batch_id)
    await desk.cancel(caller.project_id, batch_id)
    return await _show(request, caller, batch_id)


async def _show(request: Request, caller: Principal, batch_id: str) -> Response:
    batches: BatchStore = request.app.state.batches
    desk: Desk = request.app.state.desk
    batch = await batches.get(caller.project_id, batch_id)
    return json_answer(batch_object(batch, await desk.outlook(batch.job)))

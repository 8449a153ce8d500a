"""Jobs for those whose jobs they are: list, look, watch, stop, try again, remove.

It refuses to tell of the jobs of others, and more streams of events at once than there is room for.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from forebay.clock import Clock
from forebay.dialects.openai.errors import body_of
from forebay.errors import ForebayError, NotFound, Overloaded
from forebay.gateway.answers import error_answer, json_answer
from forebay.gateway.auth import Principal, principal, role_at_least
from forebay.jobs.desk import Desk, Outlook
from forebay.store.job_state import FINISHED, JobState
from forebay.store.jobs import PAGE_SIZE_MAX, Job
from forebay.store.key_format import Role

_REFRESH_SECONDS = 5.0  # how often there is an event although nothing has changed but the outlook
_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

router = APIRouter(prefix="/v1/jobs", dependencies=[Depends(principal)])

Caller = Annotated[Principal, Depends(principal)]
Member = Annotated[Principal, Depends(role_at_least(Role.MEMBER))]


def job_object(job: Job, outlook: Outlook) -> dict[str, Any]:
    """A job as callers see it."""
    return {
        "id": job.id,
        "object": "job",
        "kind": job.kind,
        "status": job.state.value,
        "created_at": int(job.created_at),
        "started_at": _whole(job.started_at),
        "finished_at": _whole(job.finished_at),
        "cancel_requested_at": _whole(job.cancel_requested_at),
        "priority": -job.priority,  # for callers, more is more urgent
        "model": job.model,
        "queue_position": outlook.queue_position,
        "eta_seconds": None if outlook.eta_seconds is None else round(outlook.eta_seconds, 1),
        "progress": {
            "total": job.total,
            "completed": job.completed,
            "failed": job.failed,
            "stage": job.stage,
            "percent": _percent(job),
        },
        "attempts": job.errors,
        "error": _error(job),
    }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def _percent(job: Job) -> float | None:
    if job.state is JobState.COMPLETED:
        return 100.0
    return round(100 * (job.completed + job.failed) / job.total, 1) if job.total else None


def _error(job: Job) -> dict[str, Any] | None:
    if job.error_code is None or job.state not in FINISHED - {JobState.COMPLETED}:
        return None
    return {"code": job.error_code, "message": job.error_message}


@router.get("")
async def list_jobs(
    request: Request,
    caller: Caller,
    kind: Annotated[str | None, Query(max_length=32)] = None,
    state: JobState | None = None,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)] = 20,
) -> Response:
    """The project's jobs, newest first. Their places in line are not worked out here: look at one job for that."""
    desk: Desk = request.app.state.desk
    states = [] if state is None else [state]
    found = await desk.page(caller.project_id, kind=kind, states=states, after=after, limit=limit + 1)
    data = [job_object(job, desk.own_pace(job)) for job in found[:limit]]
    return json_answer(page_of(data, more=len(found) > limit))


def page_of(data: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """One page of a list, as OpenAI's clients go through it."""
    return {
        "object": "list",
        "data": data,
        "has_more": more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


@router.get("/{job_id}")
async def show_job(request: Request, job_id: str, caller: Caller) -> Response:
    """One job, with its place in line and how long it will still take."""
    desk: Desk = request.app.state.desk
    return await _show(desk, await desk.get(caller.project_id, job_id))


@router.get("/{job_id}/log")
async def show_log(request: Request, job_id: str, caller: Caller) -> Response:
    """What happened to a job, oldest first."""
    desk: Desk = request.app.state.desk
    job = await desk.get(caller.project_id, job_id)
    return json_answer({"object": "list", "data": await desk.jobs.log(job.id)})


@router.get("/{job_id}/events")
async def watch_job(request: Request, job_id: str, caller: Caller) -> Response:
    """Server-sent events: the job whenever it changes, until it is done."""
    state = request.app.state
    desk: Desk = state.desk
    job = await desk.get(caller.project_id, job_id)
    return WatchAnswer(desk, job, state.watchers, state.settings.jobs.watch_seconds, state.clock)


@router.post("/{job_id}/cancel")
async def cancel_job(request: Request, job_id: str, caller: Member) -> Response:
    """Stop a job; one that has ended stays as it is."""
    desk: Desk = request.app.state.desk
    return await _show(desk, await desk.cancel(caller.project_id, job_id))


@router.post("/{job_id}/retry")
async def retry_job(request: Request, job_id: str, caller: Member) -> Response:
    """Try a job again that did not end well."""
    desk: Desk = request.app.state.desk
    return await _show(desk, await desk.retry(caller.project_id, job_id))


@router.delete("/{job_id}")
async def delete_job(request: Request, job_id: str, caller: Member) -> Response:
    """Remove a finished job."""
    desk: Desk = request.app.state.desk
    await desk.delete(caller.project_id, job_id)
    return json_answer({"id": job_id, "object": "job", "deleted": True})


async def _show(desk: Desk, job: Job) -> Response:
    return json_answer(job_object(job, await desk.outlook(job)))


class Watchers:
    """Counts open streams of events, which end when the server is `stopping`."""

    def __init__(self, watchers_max: int, stopping: Callable[[], bool]) -> None:
        self.stopping = stopping
        self._watchers_max = watchers_max
        self._open = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count a stream while it lasts. Raises Overloaded if there are too many."""
        if self._open >= self._watchers_max:
            raise Overloaded(
                "Too many streams of job events are open. Ask for the job itself from time to time instead.",
                code="too_many_watchers",
            )
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1


class WatchAnswer(Response):
    """The events of one job, looked for and sent while somebody reads them."""

    def __init__(self, desk: Desk, job: Job, watchers: Watchers, watch_seconds: float, clock: Clock) -> None:
        super().__init__()
        self._desk = desk
        self._job = job
        self._watchers = watchers
        self._watch_seconds = watch_seconds
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the job is done, the reader is gone or the server stops."""
        try:
            with self._watchers.watching():
                await self._send_while_there(receive, send)
        except Overloaded as error:
            await error_answer(error)(scope, receive, send)

    async def _send_while_there(self, receive: Receive, send: Send) -> None:
        leaving = asyncio.create_task(_gone(receive))
        telling = asyncio.create_task(self._tell(send))
        try:
            await asyncio.wait({leaving, telling}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            telling.cancel()
            await asyncio.wait({leaving, telling})
        if not telling.cancelled():
            telling.result()

    async def _tell(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
        async for event in self._events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        told: Job | None = None
        told_at = self._clock.monotonic()
        while not self._watchers.stopping():
            late = self._clock.monotonic() - told_at >= _REFRESH_SECONDS
            try:
                job = await self._desk.get(self._job.project_id, self._job.id)
                if told is None or _seen(job) != _seen(told) or late:
                    shown = job_object(job, await self._desk.outlook(job))
                    told_at = self._clock.monotonic()
                    yield _event(_name(job, told), shown)
                    told = job
                if job.finished:
                    return
            except NotFound as error:  # it was deleted
                yield _event("error", body_of(error))
                return
            except ForebayError:  # the database is away, and comes back
                if late:
                    told_at = self._clock.monotonic()
                    yield b": no news\n\n"
            await self._clock.sleep(self._watch_seconds)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _seen(job: Job) -> tuple[object, ...]:
    return job.state, job.stage, job.attempt, job.total, job.completed, job.failed, job.cancel_requested_at


def _name(job: Job, told: Job | None) -> str:
    if job.finished:
        return "done"
    return "state" if told is None or (job.state, job.stage) != (told.state, told.stage) else "progress"


def _event(name: str, content: Mapping[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json(content))

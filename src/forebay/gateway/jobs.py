"""Jobs for those whose jobs they are: list, look, watch, stop, try again, remove.

It refuses to tell of the jobs of others, and more streams of events at once than there is room for.
"""

import asyncio
from collections import Counter
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
from forebay.gateway.places import of_one_project
from forebay.gateway.streams import send_while_there
from forebay.jobs.desk import Desk, Outlook
from forebay.store.job_records import Job
from forebay.store.job_state import FINISHED, JobState
from forebay.store.jobs import PAGE_SIZE_MAX, JobStore
from forebay.store.key_format import Role

_REFRESH_SECONDS = 10.0  # how often there is an event although nothing has changed but the outlook

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
            "step": job.step,
            "steps": job.steps,
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
    return WatchAnswer(desk, job, state.watchers, state.clock)


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
    """The open streams of events, and the one look at the database for all of them."""

    def __init__(self, watchers_max: int, watch_seconds: float, stopping: Callable[[], bool]) -> None:
        self.stopping = stopping
        self._watchers_max = watchers_max
        self._watch_seconds = watch_seconds
        self._watched: dict[str, set[asyncio.Event]] = {}
        self._of_projects: Counter[str] = Counter()
        self._looking: asyncio.Task[None] | None = None

    @contextmanager
    def watching(self, jobs: JobStore, clock: Clock, job_id: str, project_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when there is news of a job, or the server stops. Raises Overloaded if there are too many.

        One project leaves a quarter to the others.
        """
        own, in_all = self._of_projects[project_id], self._of_projects.total()
        if in_all >= self._watchers_max or own >= of_one_project(self._watchers_max):
            raise Overloaded(
                "Too many streams of job events are open. Ask for the job itself from time to time instead.",
                code="too_many_watchers",
            )
        news = asyncio.Event()
        self._watched.setdefault(job_id, set()).add(news)
        self._of_projects[project_id] += 1
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(jobs, clock))
        try:
            yield news
        finally:
            self._of_projects[project_id] -= 1
            if not self._of_projects[project_id]:
                del self._of_projects[project_id]
            self._watched[job_id].discard(news)
            if not self._watched[job_id]:
                del self._watched[job_id]

    async def _look(self, jobs: JobStore, clock: Clock) -> None:
        """Look until nobody watches. It ends by itself: cut off in the middle of a look, the driver would complain."""
        known: dict[str, tuple[Any, ...]] = {}
        while self._watched:
            try:
                found = await jobs.marks(list(self._watched))
            except ForebayError:  # the database is away, and comes back
                found = known
            for job_id, events in self._watched.items():
                if self.stopping() or job_id not in known or found.get(job_id) != known[job_id]:
                    for news in events:
                        news.set()
            known = {job_id: found.get(job_id, ()) for job_id in self._watched}
            await clock.sleep(self._watch_seconds)
        self._looking = None


class WatchAnswer(Response):
    """The events of one job, sent while somebody reads them."""

    def __init__(self, desk: Desk, job: Job, watchers: Watchers, clock: Clock) -> None:
        super().__init__()
        self._desk = desk
        self._job = job
        self._watchers = watchers
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the job is done, the reader is gone or the server stops."""
        try:
            with self._watchers.watching(self._desk.jobs, self._clock, self._job.id, self._job.project_id) as news:
                await send_while_there(self._events(news), receive, send)
        except Overloaded as error:
            await error_answer(error)(scope, receive, send)

    async def _events(self, news: asyncio.Event) -> AsyncIterator[bytes]:
        told: Job | None = None
        late = False
        while not self._watchers.stopping():
            news.clear()
            try:
                job = await self._desk.get(self._job.project_id, self._job.id)
                if late or job != told:
                    yield _event(_name(job, told), job_object(job, await self._desk.outlook(job)))
                    told = job
                if job.finished:
                    return
            except NotFound as error:  # it was deleted
                yield _event("error", body_of(error))
                return
            except ForebayError:  # the database is away, and comes back
                yield b": no news\n\n"
            late = not await self._heard(news)

    async def _heard(self, news: asyncio.Event) -> bool:
        """Wait for news, but not for ever; whether there was any."""
        try:
            async with self._clock.timeout(_REFRESH_SECONDS):
                await news.wait()
        except TimeoutError:
            return False
        return True


def _name(job: Job, told: Job | None) -> str:
    if job.finished:
        return "done"
    return "state" if told is None or (job.state, job.stage) != (told.state, told.stage) else "progress"


def _event(name: str, content: Mapping[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json(content))

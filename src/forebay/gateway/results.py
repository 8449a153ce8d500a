"""The route of results: what a job about a recording has found, and what one about pictures has made, in every format.

It refuses to tell of a job that is not completed.
"""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from forebay.errors import Conflict, InvalidRequest, NotFound
from forebay.gateway import picture_jobs, transcriptions
from forebay.gateway.auth import Principal, principal
from forebay.jobs.desk import Desk
from forebay.store.job_records import Job
from forebay.store.job_state import JobState
from forebay.store.media_jobs import IMAGE, TRANSCRIPTION, MediaJobStore, Result

router = APIRouter(prefix="/v1/jobs", dependencies=[Depends(principal)])

Caller = Annotated[Principal, Depends(principal)]


@router.get("/{job_id}/result")
async def show_result(
    request: Request,
    job_id: str,
    caller: Caller,
    form: Annotated[str | None, Query(alias="format", max_length=32)] = None,
) -> Response:
    """What a finished job has found or made, in any format of its kind; without one in that of its request."""
    desk: Desk = request.app.state.desk
    job = await desk.get(caller.project_id, job_id)
    found = await _result(request.app.state.media_jobs, job)
    if job.kind == IMAGE:
        return picture_jobs.PictureResult(job, found, form)
    try:
        content_type, body = await asyncio.to_thread(transcriptions.rendered, found, form)
    except InvalidRequest as error:
        error.param = "format"
        raise
    return Response(body, media_type=content_type)


async def _result(store: MediaJobStore, job: Job) -> Result:
    """Raises NotFound for a job without such a result, and Conflict while it is not finished."""
    if job.kind not in {IMAGE, TRANSCRIPTION}:
        raise NotFound(f"A {job.kind} has no result of this kind. What it has made is told where it was asked for.")
    if job.state is not JobState.COMPLETED:
        raise Conflict(
            f"The job is {job.state.value}, so it has no result."
            + ("" if job.finished else " Ask again once it is completed."),
            code="job_not_completed",
        )
    found = await store.result(job.project_id, job.id)
    if found is None:
        raise NotFound("The result of this job is no longer kept.")
    return found

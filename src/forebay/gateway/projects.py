"""The routes of projects, for administrators: their shares, their quotas, and what they have used of these.

It refuses a share or a quota out of bounds, and to make or remove a project.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field
from starlette.responses import Response

from forebay.dialects.openai.call import Wire, parse
from forebay.gateway.answers import json_answer, read_body
from forebay.gateway.auth import role_at_least
from forebay.metering.books import Books
from forebay.metering.meter import Meter
from forebay.quotas import QUOTAS_MAX, Counted, Period, Quota, day_of, parse_quotas, parts_of
from forebay.store.key_format import Role
from forebay.store.projects import PAGE_SIZE_MAX, LimitedProject, ProjectStore

router = APIRouter(prefix="/admin", dependencies=[Depends(role_at_least(Role.ADMIN))])


class LimitsBody(Wire):
    """What is to change; the rest stays. `reset` takes all of a project's own away."""

    weight: Annotated[float, Field(gt=0)] | None = None
    quotas: Annotated[tuple[Annotated[str, Field(max_length=64)], ...], Field(max_length=QUOTAS_MAX)] = ()
    reset: bool = False


_TAKES = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": LimitsBody.model_json_schema()}}}
}


@router.get("/projects")
async def list_projects(
    request: Request,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)] = 20,
) -> Response:
    """A page of projects by name, behind the name `after`."""
    found, more = await _store(request).list(after=after, limit=limit)
    data = await _shown(request, found)
    return json_answer({"object": "list", "data": data, "has_more": more, "last_id": found[-1].name if found else None})


@router.get("/projects/{project}")
async def show_project(request: Request, project: str) -> Response:
    """One project by name."""
    return await _answer(request, await _store(request).get(project))


@router.post("/projects/{project}", openapi_extra=_TAKES)
async def change_project(request: Request, project: str) -> Response:
    """Change the share or the quotas of a project; other servers follow within `usage.fold_seconds`."""
    body = parse(LimitsBody, await read_body(request, request.app.state.settings.http.body_bytes_max))
    quotas, store = parse_quotas(body.quotas), _store(request)
    changed = await store.set(project, weight=body.weight, quotas=quotas, reset=body.reset)
    books: Books = request.app.state.books
    await books.refresh()
    return await _answer(request, changed)


def _store(request: Request) -> ProjectStore:
    store: ProjectStore = request.app.state.projects
    return store


async def _answer(request: Request, project: LimitedProject) -> Response:
    (shown,) = await _shown(request, [project])
    return json_answer(shown)


async def _shown(request: Request, found: list[LimitedProject]) -> list[dict[str, Any]]:
    state = request.app.state
    meter: Meter = state.meter
    counted = await state.usage.counted([project.id for project in found], day_of(state.clock.now()))
    return [_project(project, project.limits.over(meter.defaults), counted[project.id]) for project in found]


def _project(project: LimitedProject, quotas: tuple[Quota, ...], counted: Counted) -> dict[str, Any]:
    return {
        "id": project.id,
        "object": "project",
        "name": project.name,
        "created_at": int(project.created_at),
        "weight": project.limits.weight,
        "quotas": [_quota(quota, counted) for quota in quotas],
    }


def _quota(quota: Quota, counted: Counted) -> dict[str, Any]:
    used = None
    if quota.period is not None:
        amounts = counted.of_day if quota.period is Period.DAY else counted.of_month
        used = amounts.of(quota.resource) / parts_of(quota.resource)
    return {
        "quota": str(quota),
        "resource": quota.resource.value,
        "limit": quota.limit,
        "period": quota.period.value if quota.period else None,
        "used": used,
    }

"""Is it alive, is it ready, and its figures.

Liveness and readiness answer anybody with a status alone; details and metrics need a key of an administrator.
"""

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from forebay.errors import ForebayError
from forebay.gateway.admin import describe
from forebay.gateway.answers import json_answer
from forebay.gateway.auth import principal, role_at_least
from forebay.replicas.supervisor import Supervisor
from forebay.store.key_format import Role

open_router = APIRouter()
router = APIRouter()


@open_router.get("/health")
async def health() -> Response:
    """The process answers."""
    return json_answer({"status": "ok"})


@open_router.get("/ready")
async def ready(request: Request) -> Response:
    """Every preloaded model is up, or has left its memory to another, and the server is not stopping; 503 until then. Details for administrators."""
    supervisor: Supervisor = request.app.state.supervisor
    preloaded = [record for record in supervisor.records() if record.settings.preload]
    up = all(supervisor.settled(record.name) for record in preloaded)
    stopping = request.app.state.stopping
    word = "stopping" if stopping else "ready" if up else "loading"
    content: dict[str, object] = {"status": word}
    if await _may_see_details(request):
        scheduler = request.app.state.scheduler
        content["models"] = [describe(record, supervisor, scheduler) for record in supervisor.records()]
    return json_answer(content, 200 if word == "ready" else 503)


@router.get("/metrics", dependencies=[Depends(role_at_least(Role.ADMIN))])
async def metrics(request: Request) -> Response:
    """Prometheus exposition: the server's own figures, and those that engines count themselves."""
    supervisor: Supervisor = request.app.state.supervisor
    text = request.app.state.metrics.render() + await supervisor.engine_figures()
    return Response(text, media_type="text/plain; version=0.0.4")


async def _may_see_details(request: Request) -> bool:
    if not {"authorization", "x-api-key"} & set(request.headers.keys()):
        return False
    try:
        (await principal(request)).require_role(Role.ADMIN)
    except ForebayError:
        return False
    return True

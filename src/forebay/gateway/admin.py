"""What operators see and do: models and their engines, load, unload, restart.

It reads the supervisor, as the one exception to the rule that the hallway is the only way there. It refuses to show
keys, addresses, paths or command lines.
"""

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from forebay.gateway.answers import json_answer
from forebay.gateway.auth import role_at_least
from forebay.replicas.record import ModelRecord
from forebay.replicas.supervisor import Supervisor
from forebay.scheduler.scheduler import Scheduler
from forebay.store.key_format import Role

router = APIRouter(prefix="/admin", dependencies=[Depends(role_at_least(Role.ADMIN))])


def describe(record: ModelRecord, supervisor: Supervisor, scheduler: Scheduler) -> dict[str, Any]:
    """One model for people: state, reason, places, processes."""
    running, waiting = scheduler.load(record.name)
    return {
        "id": record.name,
        "object": "model_state",
        "engine": record.settings.engine,
        "description": record.settings.description,
        "state": supervisor.state(record.name).value,
        "reason": record.reason,
        "retry_at": record.retry_at,
        "circuit": supervisor.circuit(record.name),
        "wanted": record.wanted,
        "preload": record.settings.preload,
        "slots": record.slots,
        "running": running,
        "waiting": waiting,
        "queue_places": record.settings.queue_places,
        "pull": supervisor.pull_progress(record.name),
        "replicas": [
            {
                "id": replica.id,
                "state": replica.state.value,
                "slots": replica.slots,
                "in_flight": len(replica.in_flight),
            }
            for keeper in record.keepers
            if (replica := keeper.replica) is not None
        ],
    }


def _answer(request: Request, name: str) -> Response:
    supervisor: Supervisor = request.app.state.supervisor
    return json_answer(describe(supervisor.record(name), supervisor, request.app.state.scheduler))


@router.get("/models")
async def list_models(request: Request) -> Response:
    """Every model of the catalogue with its state."""
    supervisor: Supervisor = request.app.state.supervisor
    data = [describe(record, supervisor, request.app.state.scheduler) for record in supervisor.records()]
    return json_answer({"object": "list", "data": data})


@router.get("/models/{name}")
async def show_model(request: Request, name: str) -> Response:
    """One model with its state."""
    return _answer(request, name)


@router.post("/models/{name}/load")
async def load_model(request: Request, name: str) -> Response:
    """Want a model up; it is pulled first if it has to be."""
    request.app.state.supervisor.load(name)
    return _answer(request, name)


@router.post("/models/{name}/unload")
async def unload_model(request: Request, name: str) -> Response:
    """Let a model finish what it runs, then stop it."""
    request.app.state.supervisor.unload(name)
    return _answer(request, name)


@router.post("/models/{name}/restart")
async def restart_model(request: Request, name: str) -> Response:
    """Replace a model's engines once what they run is finished."""
    request.app.state.supervisor.restart(name)
    return _answer(request, name)

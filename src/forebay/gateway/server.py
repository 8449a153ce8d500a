"""The route table: every URL of the server and who may use it.

It refuses whatever has no key: authentication is a dependency of every router but those for liveness and readiness, and for
pictures by their signed addresses.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from forebay.config import Settings
from forebay.dialects.openai.errors import sanitise
from forebay.errors import ForebayError, InvalidRequest, NotFound, RateLimited, ServerError
from forebay.gateway import (
    admin,
    audio,
    batches,
    dead_letters,
    files,
    health,
    images,
    intake,
    jobs,
    projects,
    responses,
    results,
    signed,
    uploads,
    usage,
    webhooks,
)
from forebay.gateway.answers import error_answer, json_answer, read_body, shape_at
from forebay.gateway.auth import Principal, may_create, principal, role_at_least, upstream_key
from forebay.gateway.online import Door, look, trace_of, visit
from forebay.inference import Capability
from forebay.replicas.calls import (
    CHAT_COMPLETIONS,
    COHERE_RERANK,
    COMPLETIONS,
    COUNT_TOKENS,
    DETOKENIZE,
    EMBEDDINGS,
    ENDPOINTS,
    MESSAGES,
    RERANK,
    TOKENIZE,
)
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import capabilities_of
from forebay.store.key_format import Role

_BUG = "The server met a bug of its own. Report it with this request's id."

router = APIRouter(prefix="/v1", dependencies=[Depends(principal)])
unversioned = APIRouter(dependencies=[Depends(principal)])

CanChat = Annotated[Principal, Depends(may_create(Capability.CHAT))]
CanComplete = Annotated[Principal, Depends(may_create(Capability.COMPLETION))]
CanEmbed = Annotated[Principal, Depends(may_create(Capability.EMBEDDING))]
CanRerank = Annotated[Principal, Depends(may_create(Capability.RERANK))]
Member = Annotated[Principal, Depends(role_at_least(Role.MEMBER))]


def _takes(path: str) -> dict[str, Any]:
    """The OpenAPI description of a body that the route parses by itself."""
    schema = ENDPOINTS[path].body.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def create_app(settings: Settings) -> FastAPI:
    """The application. `app.state` is filled in by `forebay.app`, which builds the rooms."""
    app = FastAPI(title="Forebay", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.settings = settings
    app.state.stopping = False
    app.state.receiving = files.Receiving()
    app.state.watchers = jobs.Watchers(
        settings.jobs.watchers_max, settings.jobs.watch_seconds, lambda: bool(app.state.stopping)
    )
    app.include_router(router)  # first what is asked most: the search goes from here to the end
    app.include_router(health.open_router)
    app.include_router(health.router)
    app.include_router(unversioned)
    app.include_router(files.router)
    app.include_router(uploads.router)
    app.include_router(admin.router)
    app.include_router(batches.router)
    app.include_router(jobs.router)
    app.include_router(dead_letters.router)
    app.include_router(webhooks.router)
    app.include_router(responses.router)
    app.include_router(audio.router)
    app.include_router(images.router)
    app.include_router(intake.router)
    app.include_router(signed.open_router)
    app.include_router(results.router)
    app.include_router(usage.router)
    app.include_router(projects.router)
    app.add_exception_handler(ForebayError, _forebay_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _bug)  # which goes on to the envelope
    return app


@router.post("/chat/completions", openapi_extra=_takes(CHAT_COMPLETIONS))
async def chat_completions(request: Request, caller: CanChat) -> Response:
    """Answer a conversation."""
    return await _answer(request, caller, CHAT_COMPLETIONS)


@router.post("/completions", openapi_extra=_takes(COMPLETIONS))
async def completions(request: Request, caller: CanComplete) -> Response:
    """Continue a text."""
    return await _answer(request, caller, COMPLETIONS)


@router.post("/messages", openapi_extra=_takes(MESSAGES))
async def messages(request: Request, caller: CanChat) -> Response:
    """Answer a conversation in the shape of Anthropic."""
    return await _answer(request, caller, MESSAGES)


@router.post("/messages/count_tokens", openapi_extra=_takes(COUNT_TOKENS))
async def count_tokens(request: Request, caller: CanChat) -> Response:
    """Count what a model would read, without an answer."""
    return await _answer(request, caller, COUNT_TOKENS)


@unversioned.post("/tokenize", openapi_extra=_takes(TOKENIZE))
async def tokenize(request: Request, caller: CanComplete) -> Response:
    """Turn a text into the model's tokens."""
    return await _answer(request, caller, TOKENIZE)


@unversioned.post("/detokenize", openapi_extra=_takes(DETOKENIZE))
async def detokenize(request: Request, caller: CanComplete) -> Response:
    """Turn tokens into text."""
    return await _answer(request, caller, DETOKENIZE)


@router.post("/embeddings", openapi_extra=_takes(EMBEDDINGS))
async def create_embeddings(request: Request, caller: CanEmbed) -> Response:
    """Turn texts into vectors."""
    return await _answer(request, caller, EMBEDDINGS)


@unversioned.post("/rerank", openapi_extra=_takes(RERANK))
@router.post("/rerank", openapi_extra=_takes(RERANK))
async def rerank(request: Request, caller: CanRerank) -> Response:
    """Put documents in the order in which they answer a query."""
    return await _answer(request, caller, RERANK)


@unversioned.post("/v2/rerank", openapi_extra=_takes(COHERE_RERANK))
async def rerank_for_cohere(request: Request, caller: CanRerank) -> Response:
    """The same in the shape of Cohere."""
    return await _answer(request, caller, COHERE_RERANK)


@router.post("/requests/{request_id}/cancel")
async def cancel_request(request: Request, request_id: str, caller: Member) -> Response:
    """Stop the project's running or waiting request whose answer carries this X-Request-ID."""
    door: Door = request.app.state.door
    door.cancel(caller.project_id, request_id)
    return json_answer({"id": request_id, "object": "request", "cancelled": True})


@router.get("/models")
async def list_models(request: Request) -> Response:
    """Every model of the catalogue."""
    catalog: Catalog = request.app.state.catalog
    return json_answer({"object": "list", "data": [_model(request, name) for name in catalog.names()]})


@router.get("/models/{name:path}")
async def show_model(request: Request, name: str) -> Response:
    """One model."""
    return json_answer(_model(request, name))


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """This table as an OpenAPI document."""
    return json_answer(request.app.openapi())


def _model(request: Request, name: str) -> dict[str, Any]:
    model = request.app.state.catalog.get(name)
    supervisor = request.app.state.supervisor
    reason = supervisor.record(name).reason
    return {
        "id": name,
        "object": "model",
        "created": int(request.app.state.started_at),
        "owned_by": "forebay",
        "capabilities": sorted(each.value for each in capabilities_of(model)),
        "state": supervisor.state(name).value,
        "reason": sanitise(reason) if reason else None,  # paths are for operators
        "circuit": supervisor.circuit(name),
    }


async def _answer(request: Request, caller: Principal, path: str) -> Response:
    try:
        call = await request.app.state.calls.prepare(
            path,
            await read_body(request, request.app.state.settings.http.body_bytes_max),
            request_id=request.scope["request_id"],
            project=caller.project_id,
            traceparent=trace_of(request),
            caller_key=upstream_key(request),
            watch=partial(look, request, caller),
        )
    except RateLimited as error:
        return _refusal(request, error, request.app.state.door.rates.headers(caller))
    return visit(request, caller, call)


async def _forebay_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ForebayError)
    return _refusal(request, error)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router itself refuses: unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        wrong = InvalidRequest("This path does not take that method.", code="method_not_allowed")
        wrong.status = 405
        return _refusal(request, wrong, error.headers)
    if error.status_code == 404:
        return _refusal(request, NotFound("No such path. See docs/api.md for the ones there are."))
    return _refusal(request, InvalidRequest(str(error.detail)))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _refusal(request, InvalidRequest("A path or query parameter of this request is not valid."))


async def _bug(request: Request, _error: Exception) -> Response:
    return _refusal(request, ServerError(_BUG, code="internal_error"))


def _refusal(request: Request, error: ForebayError, headers: Mapping[str, str] | None = None) -> Response:
    """`error` in the dialect of the path that was asked."""
    return error_answer(error, headers, shape_at(request.scope["path"], request.scope["request_id"]))

"""From a wire body to a call, as both doors do it."""

import json
from typing import Any

import pytest

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.engine_options import LlamaCppOptions
from forebay.errors import InvalidRequest, ModelNotFound, NotFound
from forebay.inference import Capability, Priority
from forebay.media.images import Images
from forebay.model_config import FakeModel, LlamaCppModel, Model
from forebay.outbound import Outbound
from forebay.replicas.calls import (
    CHAT_COMPLETIONS,
    COHERE_RERANK,
    COMPLETIONS,
    EMBEDDINGS,
    ENDPOINTS,
    RERANK,
    Calls,
)
from forebay.replicas.catalog import Catalog

MESSAGES = [{"role": "user", "content": "Hello."}]
RANKING = {"query": "Hello?", "documents": ["Hello.", "Bye."]}
# What is sent where, and where it goes on to.
BODIES: dict[str, tuple[dict[str, Any], str]] = {
    CHAT_COMPLETIONS: ({"messages": MESSAGES}, CHAT_COMPLETIONS),
    COMPLETIONS: ({"prompt": "Hello."}, COMPLETIONS),
    EMBEDDINGS: ({"input": "Hello."}, EMBEDDINGS),
    RERANK: (RANKING, RERANK),
    COHERE_RERANK: (RANKING, RERANK),
}


class NoFiles:
    """Where nobody has uploaded anything."""

    async def read(self, project: str, file_id: str, bytes_max: int) -> bytes:
        raise NotFound


@pytest.fixture(scope="module")
def calls() -> Calls:
    embedder = LlamaCppModel(engine="llama.cpp", source="file:/m.gguf", options=LlamaCppOptions(embeddings=True))
    models: dict[str, Model] = {"fake": FakeModel(engine="fake", slots=2), "embedder": embedder}
    settings, clock = Settings(default_models=False, models=models), SystemClock()
    return Calls(
        Catalog(settings),
        Images(settings.media, Outbound(settings.outbound, clock), NoFiles(), clock),
        settings.audio.diarization_model,
    )


async def prepare(calls: Calls, path: str, body: dict[str, Any], **options: Any) -> Any:
    return await calls.prepare(path, json.dumps(body).encode(), request_id="req_1", project="web", **options)


@pytest.mark.parametrize("path", BODIES)
async def test_every_endpoint_makes_a_request_for_the_engine(calls: Calls, path: str) -> None:
    body, engine_path = BODIES[path]
    made = await prepare(calls, path, {"model": "fake", **body}, traceparent="trace")
    request = made.request
    assert (request.id, request.project, request.traceparent) == ("req_1", "web", "trace")
    assert (request.path, request.capability) == (engine_path, ENDPOINTS[path].capability)
    assert request.priority is Priority.DEFAULT


async def test_a_priority_that_is_given_goes_before_the_tier(calls: Calls) -> None:
    body = {"model": "fake", "messages": MESSAGES, "service_tier": "priority"}
    assert (await prepare(calls, CHAT_COMPLETIONS, body)).request.priority is Priority.HIGH
    batch = await prepare(calls, CHAT_COMPLETIONS, body, priority=Priority.BATCH)
    assert (batch.request.priority, batch.tier) == (Priority.BATCH, "priority")


async def test_what_the_model_cannot_do_is_refused(calls: Calls) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await prepare(calls, COMPLETIONS, {"model": "embedder", "prompt": "Hello."})
    assert (refused.value.code, refused.value.param) == ("capability_not_supported", "model")
    assert Capability.COMPLETION.value in str(refused.value)
    with pytest.raises(ModelNotFound):
        await prepare(calls, COMPLETIONS, {"model": "nobody", "prompt": "Hello."})
    with pytest.raises(InvalidRequest):
        await prepare(calls, CHAT_COMPLETIONS, {"model": "fake", "messages": MESSAGES, "n": 3})


async def test_images_for_a_model_that_sees_none_are_refused_before_anybody_looks(calls: Calls) -> None:
    parts = [{"type": "text", "text": "Look."}, {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}]
    with pytest.raises(InvalidRequest) as refused:
        await prepare(calls, CHAT_COMPLETIONS, {"model": "fake", "messages": [{"role": "user", "content": parts}]})
    assert (refused.value.code, refused.value.param) == (
        "capability_not_supported",
        "messages[0].content[1].image_url.url",
    )


async def test_an_embedder_ranks_when_it_is_asked_to_by_name(calls: Calls) -> None:
    body = {"model": "embedder", **RANKING}
    with pytest.raises(InvalidRequest, match="bi-encoder"):
        await prepare(calls, RERANK, body)
    made = await prepare(calls, RERANK, {**body, "mode": "bi-encoder"})
    assert (made.request.path, made.request.capability) == (EMBEDDINGS, Capability.RERANK)
    assert made.items is not None
    assert len(list(made.items.contents.digests())) == 3

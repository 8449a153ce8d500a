"""From a wire body to a call, as both doors do it."""

import json
from typing import Any

import pytest

from forebay.config import FakeModel, LlamaCppModel, LlamaCppOptions, Settings
from forebay.errors import InvalidRequest, ModelNotFound
from forebay.inference import Capability, Priority
from forebay.replicas.calls import CHAT_COMPLETIONS, COMPLETIONS, ENDPOINTS, Calls
from forebay.replicas.catalog import Catalog

MESSAGES = [{"role": "user", "content": "Hello."}]


@pytest.fixture(scope="module")
def calls() -> Calls:
    embedder = LlamaCppModel(engine="llama.cpp", source="file:/m.gguf", options=LlamaCppOptions(embeddings=True))
    models = {"fake": FakeModel(engine="fake", slots=2), "embedder": embedder}
    return Calls(Catalog(Settings(default_models=False, models=models)))


def prepare(calls: Calls, path: str, body: dict[str, Any], **options: Any) -> Any:
    return calls.prepare(path, json.dumps(body).encode(), request_id="req_1", project="web", **options)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_endpoint_makes_a_request_for_its_own_path(calls: Calls, path: str) -> None:
    body = {"messages": MESSAGES} if path == CHAT_COMPLETIONS else {"prompt": "Hello."}
    made = prepare(calls, path, {"model": "fake", **body}, traceparent="trace")
    request = made.request
    assert (request.id, request.project, request.traceparent) == ("req_1", "web", "trace")
    assert (request.path, request.capability) == (path, ENDPOINTS[path].capability)
    assert request.priority is Priority.DEFAULT


def test_a_priority_that_is_given_goes_before_the_tier(calls: Calls) -> None:
    body = {"model": "fake", "messages": MESSAGES, "service_tier": "priority"}
    assert prepare(calls, CHAT_COMPLETIONS, body).request.priority is Priority.HIGH
    batch = prepare(calls, CHAT_COMPLETIONS, body, priority=Priority.BATCH)
    assert (batch.request.priority, batch.tier) == (Priority.BATCH, "priority")


def test_what_the_model_cannot_do_is_refused(calls: Calls) -> None:
    with pytest.raises(InvalidRequest) as refused:
        prepare(calls, COMPLETIONS, {"model": "embedder", "prompt": "Hello."})
    assert (refused.value.code, refused.value.param) == ("capability_not_supported", "model")
    assert Capability.COMPLETION.value in str(refused.value)
    with pytest.raises(ModelNotFound):
        prepare(calls, COMPLETIONS, {"model": "nobody", "prompt": "Hello."})
    with pytest.raises(InvalidRequest):
        prepare(calls, CHAT_COMPLETIONS, {"model": "fake", "messages": MESSAGES, "n": 3})

"""Clients of Cohere and of Jina, unmodified: the official client of the one, the requests and the types of the other."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import cohere
import pytest
import pytest_asyncio
from cohere.core.api_error import ApiError
from pydantic import BaseModel, ConfigDict

from tests.support.items import RANKER
from tests.support.server import Server, serving

QUERY = "what does a panda eat"
DOCUMENTS = ["a panda does eat bamboo", "the sky is blue", "what a panda does is eat what a panda eat", "panda"]
ORDER = [2, 0, 3, 1]
ONCE: Any = {"max_retries": 0}

pytestmark = pytest.mark.asyncio(loop_scope="module")


class JinaDocument(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str


class JinaResult(BaseModel):
    model_config = ConfigDict(extra="forbid")
    index: int
    relevance_score: float
    document: JinaDocument | None = None


class JinaUsage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    total_tokens: int
    prompt_tokens: int


class JinaAnswer(BaseModel):
    """What Jina documents of an answer."""

    model_config = ConfigDict(extra="forbid")
    model: str
    object: str
    usage: JinaUsage
    results: list[JinaResult]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(f"default_models = false\n{RANKER}") as running:
        yield running
        assert "request.bug" not in running.log


def cohere_of(server: Server, key: str | None = None) -> cohere.AsyncClientV2:
    return cohere.AsyncClientV2(api_key=key or server.key, base_url=server.url)


async def jina(server: Server, key: str | None = None, **fields: Any) -> tuple[int, Any]:
    """Send what LangChain's and LlamaIndex' sessions send: these headers, and the body as JSON."""
    headers = {
        "Authorization": f"Bearer {key or server.key}",
        "Accept-Encoding": "identity",
        "Content-type": "application/json",
        "User-Agent": "langchain",
    }
    data = json.dumps({"query": QUERY, "documents": DOCUMENTS, "model": "ranker", **fields})
    async with server.session.post(f"{server.url}/v1/rerank", data=data, headers=headers) as response:
        return response.status, await response.json()


async def test_the_client_of_cohere_ranks(server: Server) -> None:
    answer = await cohere_of(server).rerank(model="ranker", query=QUERY, documents=DOCUMENTS)
    assert [each.index for each in answer.results] == ORDER
    scores = [each.relevance_score for each in answer.results]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert answer.id
    assert answer.meta
    assert answer.meta.api_version
    assert answer.meta.api_version.version == "2"
    assert answer.meta.billed_units
    assert answer.meta.billed_units.search_units == 1
    fewer = await cohere_of(server).rerank(
        model="ranker", query=QUERY, documents=DOCUMENTS, top_n=2, max_tokens_per_doc=4096, priority=1
    )
    assert [each.index for each in fewer.results] == ORDER[:2]
    assert [each.relevance_score for each in fewer.results] == scores[:2]


async def test_the_blocking_client_of_cohere_ranks_too(server: Server) -> None:
    client = cohere.ClientV2(api_key=server.key, base_url=server.url)
    answer = await asyncio.to_thread(client.rerank, model="ranker", query=QUERY, documents=DOCUMENTS, top_n=1)
    assert [each.index for each in answer.results] == ORDER[:1]


async def test_refusals_are_the_classes_of_coheres_client(server: Server) -> None:
    limited = await server.create_key("limited", "member", "--requests-per-minute", "1")
    await cohere_of(server, limited).rerank(model="ranker", query=QUERY, documents=DOCUMENTS)
    cases: list[tuple[type[ApiError], int, str | None, dict[str, Any]]] = [
        (cohere.UnauthorizedError, 401, "fb_wrong", {}),
        (cohere.NotFoundError, 404, None, {"model": "nobody"}),
        (cohere.BadRequestError, 400, None, {"documents": []}),
        (cohere.TooManyRequestsError, 429, limited, {}),
    ]
    for expected, status, key, fields in cases:
        with pytest.raises(expected) as caught:
            await cohere_of(server, key).rerank(
                **{"model": "ranker", "query": QUERY, "documents": DOCUMENTS, **fields}, request_options=ONCE
            )
        assert caught.value.status_code == status
        assert set(caught.value.body["error"]) == {"message", "type", "param", "code"}
        assert caught.value.headers
        assert ("retry-after" in caught.value.headers) == (status == 429)


@pytest.mark.parametrize("fields", [{}, {"top_n": None}, {"return_documents": False}])
async def test_a_client_of_jina_ranks(server: Server, fields: dict[str, Any]) -> None:
    status, body = await jina(server, **fields)
    assert status == 200, body
    answer = JinaAnswer.model_validate(body)
    assert (answer.model, answer.object) == ("ranker", "list")
    assert [each.index for each in answer.results] == ORDER
    assert all(each.document is None for each in answer.results)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0


async def test_a_client_of_jina_gets_its_documents_back(server: Server) -> None:
    texts: list[Any] = [{"text": text} for text in DOCUMENTS]
    for documents in (DOCUMENTS, texts):
        status, body = await jina(server, documents=documents, top_n=3, return_documents=True)
        assert status == 200, body
        found = JinaAnswer.model_validate(body).results
        assert [each.document.text for each in found if each.document] == [DOCUMENTS[place] for place in ORDER[:3]]


async def test_a_client_of_jina_is_refused_by_status(server: Server) -> None:
    for status, key, fields in (
        (401, "fb_wrong", {}),
        (404, None, {"model": "nobody"}),
        (400, None, {"documents": []}),
    ):
        found, body = await jina(server, key, **fields)
        assert found == status
        assert "results" not in body, "that is how these clients know a refusal"

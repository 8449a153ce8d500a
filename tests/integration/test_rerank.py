"""POST /v1/rerank, /rerank and /v2/rerank over HTTP on the fake engine, and rankings by embeddings where they are asked for."""

import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.batches import content, create, finished, jsonl, upload
from tests.support.items import EMBEDDER, RANKER, RERANK, cosine, embed, outcomes, rerank, send, vectors
from tests.support.server import Server, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUERY = "what does a panda eat"
DOCUMENTS = ["a panda does eat bamboo", "the sky is blue", "what a panda does is eat what a panda eat", "panda"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(EMBEDDER + RANKER) as running:
        yield running
        assert "request.bug" not in running.log


async def test_the_shape_of_jina(server: Server) -> None:
    for path in ("/v1/rerank", "/rerank"):
        answer = await rerank(server, QUERY, DOCUMENTS, path=path)
        assert (answer["model"], answer["object"]) == ("ranker", "list")
        scores = [each["relevance_score"] for each in answer["results"]]
        assert scores == sorted(scores, reverse=True)
        assert all(0 <= score <= 1 for score in scores)
        assert [each["index"] for each in answer["results"]] == [2, 0, 3, 1]
        assert set(answer["usage"]) == {"prompt_tokens", "total_tokens"}
        assert all(set(each) == {"index", "relevance_score"} for each in answer["results"])


async def test_the_shape_of_cohere(server: Server) -> None:
    answer = await rerank(server, QUERY, DOCUMENTS, path="/v2/rerank", top_n=2, max_tokens_per_doc=4096)
    assert set(answer) == {"id", "results", "meta"}
    assert [each["index"] for each in answer["results"]] == [2, 0]
    assert answer["meta"]["api_version"] == {"version": "2"}
    assert answer["meta"]["billed_units"] == {"search_units": 1}
    many = await rerank(server, QUERY, [f"{number}" for number in range(101)], path="/v2/rerank")
    assert many["meta"]["billed_units"] == {"search_units": 2}


async def test_documents_as_objects_come_back_when_asked_for(server: Server) -> None:
    documents = [{"text": text} for text in DOCUMENTS]
    answer = await rerank(server, QUERY, documents, return_documents=True, top_n=3)
    assert [each["document"]["text"] for each in answer["results"]] == [DOCUMENTS[2], DOCUMENTS[0], DOCUMENTS[3]]
    assert await rerank(server, QUERY, DOCUMENTS, return_documents=True, top_n=3) == answer


async def test_raw_scores_are_the_logits(server: Server) -> None:
    smooth = await rerank(server, QUERY, DOCUMENTS)
    raw = await rerank(server, QUERY, DOCUMENTS, raw_scores=True)
    for one, other in zip(smooth["results"], raw["results"], strict=True):
        assert one["index"] == other["index"]
        assert one["relevance_score"] == pytest.approx(1 / (1 + math.exp(-other["relevance_score"])))
    assert raw["results"][0]["relevance_score"] > 1


async def test_equal_documents_are_scored_once_and_keep_their_order(server: Server) -> None:
    before = await outcomes(server, "ranker")
    answer = await rerank(server, "a fresh query", ["same", "other", "same", "same"])
    places = [each["index"] for each in answer["results"]]
    assert [place for place in places if place != 1] == [0, 2, 3]
    after = await outcomes(server, "ranker")
    assert (after[1] - before[1], after[2] - before[2]) == (2, 2)
    assert await rerank(server, "a fresh query", ["same", "other", "same", "same"]) == answer
    assert (await outcomes(server, "ranker"))[2] == after[2]
    await rerank(server, "another query", ["same"])
    assert (await outcomes(server, "ranker"))[2] == after[2] + 1, "a score belongs to its query"


async def test_a_bi_encoder_has_to_be_asked_for(server: Server) -> None:
    body = {"model": "embedder", "query": QUERY, "documents": DOCUMENTS}
    status, answer = await send(server, RERANK, body)
    assert (status, answer["error"]["code"]) == (400, "capability_not_supported")
    assert "bi-encoder" in answer["error"]["message"]
    status, answer = await send(server, RERANK, {**body, "model": "ranker", "mode": "bi-encoder"})
    assert (status, answer["error"]["code"]) == (400, "capability_not_supported")
    by_hand = vectors(await embed(server, [QUERY, *DOCUMENTS]))
    raw = await rerank(server, QUERY, DOCUMENTS, model="embedder", mode="bi-encoder", raw_scores=True)
    smooth = await rerank(server, QUERY, DOCUMENTS, model="embedder", mode="bi-encoder")
    for one, other in zip(raw["results"], smooth["results"], strict=True):
        expected = cosine(by_hand[0], by_hand[1 + one["index"]])
        assert one["relevance_score"] == pytest.approx(expected, abs=1e-6)
        assert other["relevance_score"] == pytest.approx((1 + expected) / 2, abs=1e-6)
    assert raw["usage"]["prompt_tokens"] == sum(len(text.split()) for text in [QUERY, *DOCUMENTS])


async def test_vectors_are_shared_between_embeddings_and_bi_encoder(server: Server) -> None:
    texts = ["shared query words", "shared document words"]
    await embed(server, texts)
    before = await outcomes(server)
    await rerank(server, texts[0], texts[1:], model="embedder", mode="bi-encoder")
    after = await outcomes(server)
    assert (after[0] - before[0], after[2] - before[2]) == (2, 0)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"documents": []}, "documents", "invalid_value"),
        ({"documents": "one"}, "documents", "invalid_value"),
        ({"documents": ["a"] * 10_001}, "documents", "invalid_value"),
        ({"documents": [{"text": 7}]}, "documents[0].text", "invalid_value"),
        ({"documents": [{"title": "x", "text": "y"}]}, "documents[0].title", "invalid_request"),
        ({"query": ""}, "query", "invalid_value"),
        ({"top_n": 0}, "top_n", "invalid_value"),
        ({"mode": "magic"}, "mode", "invalid_value"),
        ({"raw_scores": 1}, "raw_scores", "invalid_value"),
        ({"return_text": True}, "return_text", "invalid_request"),
        ({"model": "nobody"}, None, "model_not_found"),
    ],
)
async def test_what_is_wrong_is_named(server: Server, body: dict[str, Any], param: str, code: str) -> None:
    whole = {"model": "ranker", "query": QUERY, "documents": DOCUMENTS, **body}
    for path in ("/v1/rerank", "/v2/rerank"):
        status, answer = await send(server, path, whole)
        assert status in {400, 404}
        assert (answer["error"]["param"], answer["error"]["code"]) == (param, code), answer


async def test_long_documents_are_cut_for_cohere_and_refused_for_jina(server: Server) -> None:
    long = ["word " * 3000]
    status, answer = await send(server, RERANK, {"model": "ranker", "query": QUERY, "documents": long})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert answer["error"]["param"] == "documents"
    assert (await rerank(server, QUERY, long, truncate=True))["usage"]["prompt_tokens"] == 2048
    assert (await rerank(server, QUERY, long, path="/v2/rerank"))["results"]


@pytest.mark.parametrize(
    ("query", "documents", "mode", "param"),
    [
        (QUERY, ["known", "new", "long"], None, "documents[2]"),
        (QUERY, ["known", "long", "new"], "bi-encoder", "documents[1]"),
        ("long", ["known", "new"], "bi-encoder", "query"),
    ],
)
async def test_what_is_too_long_is_named(
    server: Server, query: str, documents: list[str], mode: str | None, param: str
) -> None:
    fields = {"model": "embedder" if mode else "ranker", **({"mode": mode} if mode else {})}
    await rerank(server, QUERY, ["known"], **fields)
    asked, *texts = ["word " * 3000 if each == "long" else each for each in (query, *documents)]
    status, answer = await send(server, RERANK, {"query": asked, "documents": texts, **fields})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", param)
    assert "holds 2048 tokens, and the input has 3000." in answer["error"]["message"]


async def test_ten_thousand_documents(server: Server) -> None:
    documents = [f"document {number}" for number in range(10_000)]
    answer = await rerank(server, "document 77", documents, top_n=3)
    assert answer["results"][0]["index"] == 77
    assert len(answer["results"]) == 3


async def test_a_batch_of_rankings(server: Server) -> None:
    def line(number: int) -> dict[str, Any]:
        body = {"model": "ranker", "query": f"panda {number % 5}", "documents": DOCUMENTS}
        return {"custom_id": f"c{number}", "method": "POST", "url": RERANK, "body": body}

    before = await outcomes(server, "ranker")
    file = await upload(server, jsonl(line(number) for number in range(40)))
    status, batch = await create(server, file["id"], endpoint=RERANK)
    assert status == 200, batch
    batch = await finished(server, batch["id"])
    assert batch["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    found = {each["custom_id"]: each["response"]["body"] for each in await content(server, batch["output_file_id"])}
    for number in range(5):
        assert found[f"c{number}"] == found[f"c{number + 35}"]
        assert found[f"c{number}"] == await rerank(server, f"panda {number}", DOCUMENTS)
    assert (await outcomes(server, "ranker"))[2] - before[2] == 5 * len(DOCUMENTS)

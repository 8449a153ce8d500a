"""Embeddings of a real model through llama.cpp, which tells no tokens of each input and cuts nothing."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.items import EMBEDDINGS, cosine, embed, outcomes, rerank, send, vectors
from tests.support.models import smollm2_path
from tests.support.server import Server, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONFIG = """
default_models = false
[models.embedder]
engine = "llama.cpp"
source = "file:{path}"
preload = true
slots = 4
options = {{ context = 256, embeddings = true, pooling = "mean" }}
"""
TEXTS = ["A cat sits on the mat.", "A kitten sits on a rug.", "Stock prices fell sharply on Monday."]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG.format(path=smollm2_path())) as running:
        yield running
        assert "request.bug" not in running.log


async def test_vectors_say_what_is_alike_however_they_are_sent(server: Server) -> None:
    plain = await embed(server, TEXTS, encoding_format="float")
    assert vectors(plain) == vectors(await embed(server, TEXTS, encoding_format="base64"))
    cat, kitten, stocks = vectors(plain)
    assert cosine(cat, kitten) > cosine(cat, stocks)
    ranked = await rerank(server, TEXTS[0], TEXTS[1:], model="embedder", mode="bi-encoder")
    assert [each["index"] for each in ranked["results"]] == [0, 1]


async def test_each_input_of_many_requests_gets_its_own_vector(server: Server) -> None:
    texts = [[f"request {number} input {index}" for index in range(4)] for number in range(8)]
    answers = await asyncio.gather(*[embed(server, each) for each in texts])
    for each, answer in zip(texts[::3], answers[::3], strict=True):
        alone = await embed(server, each[2])
        assert cosine(vectors(alone)[0], vectors(answer)[2]) > 0.9999
    assert answers[0]["usage"]["prompt_tokens"] > 4 * 4


async def test_only_what_has_its_own_count_is_kept(server: Server) -> None:
    before = await outcomes(server)
    for _ in range(2):
        one = await embed(server, "one input alone")
        many = await embed(server, ["several at", "once here"])
    hit, _, miss = [after - earlier for after, earlier in zip(await outcomes(server), before, strict=True)]
    assert (hit, miss) == (1, 5)
    assert one["usage"]["prompt_tokens"] > 0
    assert many["usage"]["prompt_tokens"] > one["usage"]["prompt_tokens"]


async def test_what_the_engine_cannot_do_is_the_callers_business(server: Server) -> None:
    for fields, param, code in (
        ({"input": "word " * 600}, "input", "context_length_exceeded"),
        ({"input": "x", "dimensions": 8}, "dimensions", "capability_not_supported"),
        ({"input": "x", "truncate": True}, "truncate", "capability_not_supported"),
        ({"input": [[2**31 - 1]]}, None, "invalid_request"),
    ):
        status, answer = await send(server, EMBEDDINGS, {"model": "embedder", **fields})
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, code), answer
    assert len(vectors(await embed(server, "word " * 200))) == 1

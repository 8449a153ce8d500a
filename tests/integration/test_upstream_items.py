"""Embeddings and rankings of a server that somebody else runs: here one of ours stands in for it."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.items import EMBEDDER, RANKER, RERANK, embed, outcomes, rerank, send, vectors
from tests.support.server import ADMIN_KEY, Server, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONFIG = """
default_models = false
[models.embedder]
engine = "upstream"
options = {{ base_url = "{url}/v1", key_env = "THEIR_KEY", capabilities = ["embedding"] }}
[models.ranker]
engine = "upstream"
options = {{ base_url = "{url}/v1", key_env = "THEIR_KEY", capabilities = ["rerank"] }}
"""
DOCUMENTS = ["a panda does eat bamboo", "the sky is blue", "panda", "the sky is blue"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def theirs() -> AsyncIterator[Server]:
    async with serving(EMBEDDER + RANKER) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ours(theirs: Server) -> AsyncIterator[Server]:
    async with serving(CONFIG.format(url=theirs.url), environment={"THEIR_KEY": ADMIN_KEY}) as running:
        yield running
        assert "request.bug" not in running.log


async def test_vectors_come_through_to_the_bit(theirs: Server, ours: Server) -> None:
    texts = ["one text", "another text", "one text"]
    for form in ("float", "base64"):
        there = await embed(theirs, texts, encoding_format=form)
        here = await embed(ours, texts, encoding_format=form)
        assert here["data"] == there["data"]
        assert here["usage"]["prompt_tokens"] == 4, (
            "what is twice in a request is counted once without counts of its own"
        )
    assert [len(vector) for vector in vectors(await embed(ours, "short", dimensions=8))] == [8]


async def test_what_is_asked_for_alone_is_kept(ours: Server) -> None:
    first = await embed(ours, "asked for alone")
    before = await outcomes(ours)
    assert await embed(ours, "asked for alone") == first
    after = await outcomes(ours)
    assert (after[0] - before[0], after[2] - before[2]) == (1, 0)


async def test_rankings_come_through_and_are_no_logits(theirs: Server, ours: Server) -> None:
    query = "what does a panda eat"
    there = await rerank(theirs, query, DOCUMENTS)
    here = await rerank(ours, query, DOCUMENTS)
    assert here["results"] == there["results"]
    body = {"model": "ranker", "query": query, "documents": DOCUMENTS, "raw_scores": True}
    status, answer = await send(ours, RERANK, body)
    assert (status, answer["error"]["param"]) == (400, "raw_scores")

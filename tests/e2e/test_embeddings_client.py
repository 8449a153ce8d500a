"""The official client asks for embeddings as it does by itself, which is as base64."""

from collections.abc import AsyncIterator

import openai
import pytest
import pytest_asyncio

from tests.support.items import EMBEDDER, cosine
from tests.support.server import Server, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(EMBEDDER) as running:
        yield running


async def test_what_the_client_unpacks_is_what_it_gets_as_numbers(server: Server) -> None:
    async with server.client() as client:
        texts = ["The food was delicious.", "The service was slow.", "The food was delicious."]
        packed = await client.embeddings.create(model="embedder", input=texts)
        plain = await client.embeddings.create(model="embedder", input=texts, encoding_format="float")
    assert [each.embedding for each in packed.data] == [each.embedding for each in plain.data]
    assert [each.index for each in packed.data] == [0, 1, 2]
    assert packed.data[0].embedding == packed.data[2].embedding
    assert cosine(packed.data[0].embedding, packed.data[1].embedding) < 0.99
    assert packed.model == "embedder"
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == 12


async def test_tokens_dimensions_and_refusals(server: Server) -> None:
    async with server.client() as client:
        made = await client.embeddings.create(model="embedder", input=[[1, 2, 3], [4]], dimensions=8)
        assert [len(each.embedding) for each in made.data] == [8, 8]
        with pytest.raises(openai.BadRequestError) as refused:
            await client.embeddings.create(model="embedder", input="")
        assert refused.value.param == "input"
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="nobody", input="x")

"""A tiny random model that sees, in a real llama.cpp: image tokens reach it, and what it says depends on the image."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.batches import finished, line, results, submit
from tests.support.images import data_url, message, part, picture
from tests.support.server import Server, serving
from tests.support.tiny_vision import IMAGE_TOKENS, write

CONFIG = """
default_models = false
[models.tiny]
engine = "llama.cpp"
source = "file:{model}"
preload = true
slots = 4
[models.tiny.options]
context = 512
mmproj_file = "{encoder}"
"""
RED, BLUE = data_url(picture(32, 32, "red")), data_url(picture(32, 32, "blue"))

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    model, encoder = write(tmp_path_factory.mktemp("tiny"))
    async with serving(CONFIG.format(model=model, encoder=encoder)) as one:
        yield one


async def look(server: Server, *urls: str) -> tuple[int, list[tuple[str, float]]]:
    """Prompt tokens, and what the first token might have been, through the official client."""
    answer = await server.client().chat.completions.create(
        model="tiny",
        messages=[message([part(url) for url in urls], "What is this?")],  # type: ignore[list-item]
        temperature=0,
        max_tokens=1,
        logprobs=True,
        top_logprobs=5,
    )
    assert answer.usage is not None
    assert answer.choices[0].logprobs is not None
    (first,) = answer.choices[0].logprobs.content or []
    return answer.usage.prompt_tokens, [(each.token, round(each.logprob, 4)) for each in first.top_logprobs]


async def test_image_tokens_reach_the_model_and_the_image_decides_what_it_says(server: Server) -> None:
    blind, without = await look(server)
    tokens, red = await look(server, RED)
    assert tokens == blind + IMAGE_TOKENS
    assert (await look(server, RED)) == (tokens, red)
    _, blue = await look(server, BLUE)
    assert (await look(server, RED, BLUE))[0] == blind + 2 * IMAGE_TOKENS
    assert len({repr(each) for each in (without, red, blue)}) == 3
    assert await look(server, data_url(picture(32, 32, "red", "GIF"), "gif")) == (tokens, red), (
        "the type does not matter"
    )


async def test_the_order_of_images_matters(server: Server) -> None:
    assert (await look(server, RED, BLUE))[1] != (await look(server, BLUE, RED))[1]


async def test_a_stream_and_a_line_of_a_batch_see_the_same(server: Server) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "seed": 1}
    shown = [message([part(RED)], "What is this?")]
    stream = await server.client().chat.completions.create(
        model="tiny",
        messages=shown,
        stream=True,
        **fields,  # type: ignore[arg-type]
    )
    text = "".join([event.choices[0].delta.content or "" async for event in stream if event.choices])
    one = line("one", "", model="tiny", **fields)
    one["body"]["messages"] = shown
    batch = await finished(server, (await submit(server, [one]))["id"])
    ((answer,), _) = await results(server, batch)
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == text


async def test_without_its_encoder_the_engine_does_not_start(tmp_path: Path) -> None:
    model, encoder = write(tmp_path)
    encoder.unlink()
    config = CONFIG.format(model=model, encoder=encoder).replace("preload = true", "")
    async with serving(config) as server:
        async with await server.chat("hello", model="tiny") as response:
            assert response.status == 503
        assert "image encoder" in (await server.model("tiny"))["reason"]

"""The official client: a scratch in a real photograph by a real engine, new pictures and streams by the fake one."""

import base64
import io
from collections.abc import AsyncIterator

import aiohttp
import numpy as np
import openai
import pytest
import pytest_asyncio
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
)
from PIL import Image

from tests.support.images import encoded, picture
from tests.support.photographs import cat, psnr, scratches
from tests.support.picture_jobs import IMAGE, SIZE, mask
from tests.support.server import FAKE, Server, serving

CONFIG = FAKE + '[models.telea]\nengine = "opencv"\n'

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with server.client() as one:
        yield one


def opened(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


async def test_scratches_in_a_photograph_are_gone_and_the_rest_is_as_it_was(client: openai.AsyncOpenAI) -> None:
    photograph = cat()
    there = scratches(*photograph.shape[:2], seed=3)
    scratched = photograph.copy()
    scratched[there > 0] = 255
    hole = np.dstack([np.zeros_like(photograph), 255 - there])
    made = await client.images.edit(
        model="telea",
        image=("cat.png", encoded(Image.fromarray(scratched))),
        mask=("mask.png", encoded(Image.fromarray(hole))),
        prompt="no scratches",
        extra_body={"mask_dilation": 0, "mask_feather": 0},
    )
    assert isinstance(made, ImagesResponse)
    assert made.data is not None
    repaired = np.asarray(opened(made.data[0].b64_json).convert("RGB"))
    assert (made.size, made.output_format) == ("451x300", "png")
    assert (repaired[there == 0] == scratched[there == 0]).all(), "not one pixel outside has changed"
    assert psnr(repaired[there > 0], photograph[there > 0]) >= 25


async def test_a_list_of_images(client: openai.AsyncOpenAI) -> None:
    one, two = IMAGE, picture(*SIZE, "blue")
    made = await client.images.edit(
        model="fake", image=[("a.png", one), ("b.png", two)], mask=mask(), prompt="both", n=2, output_format="webp",
        output_compression=90, background="opaque", quality="low", input_fidelity="high", size="64x48", user="me",
    )  # fmt: skip
    assert made.data is not None
    assert [opened(each.b64_json).format for each in made.data] == ["WEBP", "WEBP"]
    assert (made.background, made.quality, made.output_format) == ("opaque", "low", "webp")


async def test_new_pictures(client: openai.AsyncOpenAI) -> None:
    made = await client.images.generate(model="fake", prompt="a cat", size="64x64", extra_body={"seed": 1, "steps": 2})
    assert made.data is not None
    assert opened(made.data[0].b64_json).size == (64, 64)
    by_address = await client.images.generate(
        model="fake", prompt="a cat", size="64x64", response_format="url", extra_body={"seed": 1, "steps": 2}
    )
    assert by_address.data is not None
    assert by_address.data[0].url is not None
    async with aiohttp.ClientSession() as session, session.get(by_address.data[0].url) as response:
        assert base64.b64encode(await response.read()).decode() == made.data[0].b64_json


async def test_streams_of_edits(client: openai.AsyncOpenAI) -> None:
    stream = await client.images.edit(
        model="fake", image=IMAGE, mask=mask(), prompt="a cat", stream=True, partial_images=2
    )
    events = [event async for event in stream]
    assert [type(event) for event in events if "progress" not in event.type] == [
        ImageEditPartialImageEvent,
        ImageEditPartialImageEvent,
        ImageEditCompletedEvent,
    ]
    assert [event.type for event in events].count("image_edit.progress") == 4  # type: ignore[comparison-overlap]
    last = events[-1]
    assert isinstance(last, ImageEditCompletedEvent)
    assert opened(last.b64_json).size == SIZE
    assert (last.usage.total_tokens, last.size, last.background) == (0, "64x48", "auto")


async def test_streams_of_new_pictures(client: openai.AsyncOpenAI) -> None:
    stream = await client.images.generate(model="fake", prompt="a cat", size="64x64", stream=True, partial_images=1)
    events = [event async for event in stream if "progress" not in event.type]
    assert [type(event) for event in events] == [ImageGenPartialImageEvent, ImageGenCompletedEvent]


async def test_refusals(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        await client.images.edit(model="fake", image=b"no image", prompt="a")
    assert (error.value.code, error.value.param) == ("media_invalid", "image")
    with pytest.raises(openai.BadRequestError) as error:
        await client.images.edit(model="telea", image=IMAGE, mask=mask(), prompt="a", extra_body={"steps": 3})
    assert error.value.param == "steps"
    with pytest.raises(openai.BadRequestError) as error:
        await client.images.generate(model="telea", prompt="a")
    assert error.value.code == "capability_not_supported"
    with pytest.raises(openai.APIError) as broken:
        stream = await client.images.generate(model="fake", prompt="[[fake garbage_at=1]]", size="64x64", stream=True)
        _ = [event async for event in stream]
    assert broken.value.code == "engine_garbled"

"""A diffusion model from the repository of a hub to pictures through the official client; a tiny one, with random weights."""

import base64
import io
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import openai
import pytest
import pytest_asyncio
from openai.types import ImagesResponse
from PIL import Image

from tests.support.hub import fetched, hub
from tests.support.images import encoded
from tests.support.photographs import Array, cat
from tests.support.server import Server, serving
from tests.support.tiny_pipelines import folder

CONFIG = """
default_models = false
[pull]
hub_url = "{hub}"
[models.painter]
engine = "diffusion"
source = "hf:owner/painter@main"
preload = true
options = {{ guidance = 2.0, steps = 3, edge_max = 64, edge_factor = 8, threads = 1 }}
"""
OTHERS = {"unet/diffusion_pytorch_model.bin": b"pickle", "painter.safetensors": b"in one file", "README.md": b"words"}
SIZE = (64, 48)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    """A server that pulls its model when it starts."""
    model = folder("sd")
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    async with hub({**files, **OTHERS}) as its_hub:
        async with serving(CONFIG.format(hub=its_hub.url)) as running:
            yield running
        assert set(fetched(its_hub)) == set(files), "what no part of the model needs stays where it is"


def pixels(picture: Any) -> Array:
    with Image.open(io.BytesIO(base64.b64decode(picture.b64_json))) as image:
        return np.asarray(image.convert("RGB"))


async def made(pending: Any) -> Any:
    answer = await pending
    assert isinstance(answer, ImagesResponse)
    assert answer.data
    return answer.data[0]


async def test_what_a_hub_has_paints_new_pictures_and_into_others(server: Server) -> None:
    client: openai.AsyncOpenAI = server.client()
    new: dict[str, Any] = {"model": "painter", "prompt": "a cat", "size": "64x48", "extra_body": {"seed": 7}}
    first = await made(client.images.generate(**new))
    assert pixels(first).shape == (48, 64, 3)
    used = first.model_extra["used"]
    assert (used["engine"], used["pipeline"]) == ("diffusion", "StableDiffusionPipeline")
    assert (used["seed"], used["steps"], used["guidance"], used["device"]) == (7, 3, 2.0, "cpu")
    assert (await made(client.images.generate(**new))).b64_json == first.b64_json, "the same seed, the same picture"

    photograph = np.asarray(Image.fromarray(cat()).resize(SIZE))
    hole = np.dstack([np.zeros_like(photograph), np.full(SIZE[::-1], 255, np.uint8)])
    hole[16:32, 16:40, 3] = 0
    edit: dict[str, Any] = {"model": "painter", "prompt": "a dog", "extra_body": {"seed": 7}}
    image, mask = encoded(Image.fromarray(photograph)), encoded(Image.fromarray(hole, "RGBA"))
    edited = await made(client.images.edit(image=("a.png", image), mask=("m.png", mask), **edit))
    assert edited.model_extra["used"]["pipeline"] == "StableDiffusionInpaintPipeline"
    outside = hole[..., 3] > 0
    assert np.array_equal(pixels(edited)[outside], photograph[outside])
    assert not np.array_equal(pixels(edited)[~outside], photograph[~outside])


def odd_images() -> dict[str, tuple[bytes, Image.Image]]:
    """Files of images, and what is to be seen in them."""
    photograph = Image.fromarray(cat()).resize((90, 70))
    ramp = Image.linear_gradient("L").resize(photograph.size)
    through = photograph.copy()
    through.putalpha(ramp)
    palette = photograph.quantize(64)
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 2**16, (70, 90), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, high = io.BytesIO(), Image.fromarray((np.asarray(wide) >> 8).astype(np.uint8))
    photograph.save(turned, "JPEG", exif=exif)
    seen = Image.open(turned).transpose(Image.Transpose.ROTATE_270)
    of_palette = palette.convert("RGBA")
    of_palette.putalpha(Image.fromarray(np.where(np.asarray(palette) == 3, 0, 255).astype(np.uint8)))
    return {
        "one can see through": (encoded(through), through),
        "palette": (encoded(palette, transparency=3), of_palette),
        "grey of 16 bits": (encoded(wide), high.convert("RGB")),
        "on its side": (turned.getvalue(), seen),
    }


@pytest.mark.parametrize("name", odd_images())
async def test_whatever_an_image_is_nothing_outside_the_mask_changes(server: Server, name: str) -> None:
    """None of them has sides that the model paints, and all are larger than it paints."""
    client: openai.AsyncOpenAI = server.client()
    data, seen = odd_images()[name]
    hole = np.full((seen.height, seen.width), 255, np.uint8)
    hole[11:43, 17:52] = 0
    mask = encoded(Image.merge("LA", (Image.new("L", seen.size), Image.fromarray(hole))))
    more = {"seed": 7, "mask_feather": 5}
    for form in ("png", "webp"):
        asked: dict[str, Any] = {"output_format": form, "extra_body": more}
        found = await made(
            client.images.edit(model="painter", prompt="a dog", image=("a", data), mask=("m", mask), **asked)
        )
        with Image.open(io.BytesIO(base64.b64decode(found.b64_json))) as image:
            assert (image.mode, image.size) == (seen.mode, seen.size)
            painted, before = np.asarray(image), np.asarray(seen)
        assert np.array_equal(painted[hole > 0], before[hole > 0]), form
        inside = hole == 0
        assert (painted[inside] != before[inside]).any(axis=-1).mean() > 0.9
        if image.mode == "RGBA":
            assert (painted[inside][:, 3] == 255).all(), "what was painted is not seen through"


async def test_what_the_model_cannot_do_is_refused_before_it_computes(server: Server) -> None:
    client: openai.AsyncOpenAI = server.client()
    refusals = [("steps", 101), ("guidance", 31), ("strength", 1.5), ("strength", 0.001)]
    for field, value in refusals:  # the last by the engine: it leaves no step
        with pytest.raises(openai.BadRequestError) as refused:
            await client.images.edit(
                model="painter", prompt="a dog", image=encoded(Image.new("RGB", SIZE)), extra_body={field: value}
            )
        assert refused.value.param == field

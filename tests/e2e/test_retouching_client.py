"""Scratches in a photograph taken away through the official client, with what everybody has: OpenCV and a CPU."""

import base64
import io

import numpy as np
import openai
import pytest
from PIL import Image

from tests.support.images import encoded
from tests.support.photographs import Array, cat, psnr, scratches
from tests.support.server import serving

CONFIG = """
default_models = false
[models.opencv-telea]
engine = "opencv"
preload = true
[models.opencv-ns]
engine = "opencv"
options.method = "ns"
"""
PSNR_MIN = 25.0


def mask_file(mask: Array) -> bytes:
    """As OpenAI has it: what is transparent is to be something new."""
    image = np.zeros((*mask.shape, 4), np.uint8)
    image[..., 3] = 255 - mask
    return encoded(Image.fromarray(image, "RGBA"))


async def test_scratches_are_gone_and_every_other_pixel_stays() -> None:
    """Class 8 of what may be lost: nothing outside the mask, to the last bit."""
    original = cat()
    async with serving(CONFIG) as server:
        client = server.client()
        for seed, model in enumerate(("opencv-telea", "opencv-ns")):
            mask = scratches(*original.shape[:2], seed)
            scratched = original.copy()
            scratched[mask > 0] = 255
            answer = await client.images.edit(
                model=model,
                image=("photograph.png", encoded(Image.fromarray(scratched))),
                mask=("mask.png", mask_file(mask)),
                prompt="Take the scratches away.",
            )
            assert answer.data
            assert answer.data[0].b64_json
            with Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))) as image:
                assert (image.format, image.mode) == ("PNG", "RGB")
                found = np.asarray(image)
            inside = mask > 0
            assert np.array_equal(found[~inside], original[~inside])
            assert psnr(found[inside], original[inside]) >= PSNR_MIN, model
            used = (answer.data[0].model_extra or {})["used"]
            assert (used["engine"], used["pipeline"]) == ("opencv", f"inpaint-{model.removeprefix('opencv-')}")
            assert "follows no prompt" in used["notices"][0]
        with pytest.raises(openai.BadRequestError, match="mask"):
            await client.images.edit(model="opencv-telea", image=encoded(Image.fromarray(original)), prompt="Hm.")

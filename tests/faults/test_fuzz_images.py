"""Mutated requests for pictures, as forms and as JSON: the server neither dies nor grows, and no fault is ours."""

import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import pytest

from tests.faults.test_fuzz import CONTENT_TYPES, fuzzed, send_apart, swarm
from tests.support.images import data_url, picture
from tests.support.mutate import BOUNDARY, damaged, spoiled, spoiled_form
from tests.support.picture_jobs import EDITS, GENERATIONS, mask
from tests.support.recordings import form_of
from tests.support.server import FAKE, serving

CONFIG = (
    FAKE
    + """
[http]
body_bytes_max = 250000
[images]
image_bytes_max = 30000
pixels_max = 40000
"""
)
IMAGES = (
    picture(64, 48),
    picture(64, 48),
    picture(64, 48, kind="JPEG"),
    picture(64, 48, kind="WEBP"),
    picture(500, 400),
    bytes(40_000),
)
MASKS = (mask(), mask(), mask(0, 0, 64, 48), mask(0, 0, 0, 0))
TEXTS = ("a cat", "ünïcödé \U0001f600", "\u0000", "[[fake token_ms=1]]")


def valid(chance: random.Random, path: str) -> dict[str, Any]:
    """A body for one of the routes, without its images."""
    options: dict[str, Any] = {
        "n": 2, "size": chance.choice(("64x48", "auto", "32x200")), "quality": "low", "seed": 7, "steps": 2,
        "background": chance.choice(("opaque", "transparent", True)), "output_compression": 70, "guidance": 2.5,
        "output_format": chance.choice(("png", "jpeg", "webp")), "negative_prompt": chance.choice(TEXTS),
        "response_format": chance.choice(("b64_json", "url", "file_id")), "user": "u",
    }  # fmt: skip
    if path == EDITS:
        options |= {"strength": 0.4, "mask_feather": 3, "mask_dilation": 2, "mask_specks": 4, "input_fidelity": "high"}
        options |= {"mask_mode": chance.choice(("alpha", "white"))}
    streamed = {"stream": True, "partial_images": chance.randrange(4)} if chance.random() < 0.3 else {}
    some = {name: value for name, value in options.items() if chance.random() < 0.2}
    fixed = {"size": "64x64"} if path == GENERATIONS else {}
    return {"model": "fake", "prompt": chance.choice(TEXTS), **fixed, **some, **streamed}


def files(chance: random.Random) -> list[tuple[str, bytes]]:
    """Images and perhaps a mask, or what were such."""
    count = chance.choice((0, *[1] * 12, 2, 5, 18))
    found = [(chance.choice(("image", "image[]")), perhaps_damaged(chance, IMAGES)) for _ in range(count)]
    drawn = [("mask", perhaps_damaged(chance, MASKS)) for _ in range(chance.choice((0, 1, 1, 2)))]
    return found + drawn


def perhaps_damaged(chance: random.Random, contents: Sequence[bytes]) -> bytes:
    """One of them, often as it was."""
    content = chance.choice(contents)
    return damaged(chance, content) if chance.random() < 0.4 else content


def references(chance: random.Random) -> dict[str, Any]:
    """The same in JSON."""
    found = [{"image_url": data_url(content)} for _, content in files(chance)[:6]]
    found += [{"file_id": chance.choice(("file_1", "../x", ""))}] if chance.random() < 0.1 else []
    drawn = {"mask": {"image_url": data_url(perhaps_damaged(chance, MASKS))}} if chance.random() < 0.5 else {}
    return {"images": found, **drawn}


@pytest.mark.timeout(900)
async def test_mutated_requests(prove: bool) -> None:
    count = 20_000 if prove else 600
    chance = random.Random(20265)
    async with serving(CONFIG) as server:

        def make() -> Callable[[], Awaitable[str]]:
            path = EDITS if chance.random() < 0.75 else GENERATIONS
            body = valid(chance, path)
            if path == EDITS and chance.random() < 0.6:
                data, kind = (
                    spoiled_form(chance, form_of(body), files(chance)),
                    f"multipart/form-data; boundary={BOUNDARY}",
                )
            else:
                data = spoiled(chance, {**body, **(references(chance) if path == EDITS else {})})
                kind = chance.choice(CONTENT_TYPES)
            return partial(send_apart, server, path, data, kind, chance)

        large = b'{"model": "fake", "prompt": "a", "n": 2, "size": "auto", "stream": true, "partial_images": 3}'
        await swarm(
            [partial(send_apart, server, GENERATIONS, large, "application/json", chance)] * 16, 8
        )  # as it comes below
        outcomes = await fuzzed(server, count, make)
        assert {"ok", "streamed", "media_invalid", "media_too_large", "invalid_value", "invalid_multipart"} <= set(
            outcomes
        )
        assert await server.load() == (0, 0)

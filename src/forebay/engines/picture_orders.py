"""What the bodies of requests for pictures ask for, and the records of the answer, whichever engine paints.

It refuses what is too much, what is no number and what does not have the pixels that it tells of, naming the field.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from forebay.engines.connection import Refused
from forebay.engines.parted import Check, flag, number, parted, whole
from forebay.pixels import MASK_BYTES, RGB_BYTES, Size

EDITS = "/v1/images/edits"
GENERATIONS = "/v1/images/generations"
SEED_MAX = 2**32 - 1

_HEADER_BYTES_MAX = 2**20
_PROMPT_CHARS_MAX = 32_000
_EDGE_MAX = 16_384
_IMAGES_MAX = 16
_PICTURES_MAX = 10
_PARTIALS_MAX = 3
_STEPS_MAX = 1000
_GUIDANCE_MAX = 100.0
_ROWS_BYTES_MAX = 2**20

_edge = whole(1, _EDGE_MAX)
_seed = whole(0, SEED_MAX)


@dataclass(frozen=True, slots=True)
class Image:
    """One that came with a request: RGB, row after row."""

    size: Size
    pixels: memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class Order:
    """A request for pictures. `mask` has 255 where there is to be something new; a number is none where the model decides.

    `seeds` has one for each picture. Where it is `reproducible`, no other request may be in its batches.
    """

    prompt: str
    negative_prompt: str | None
    steps: int | None
    guidance: float | None
    strength: float | None
    seeds: tuple[int, ...]
    reproducible: bool
    partial_images: int
    size: Size
    images: tuple[Image, ...]
    mask: memoryview | None = field(repr=False)


def read_order(body: bytes) -> Order:
    """The body of a request for pictures. Raises Refused."""
    header, pixels = parted(body, _HEADER_BYTES_MAX)
    size = _size(header)
    sizes = [_size(each) for each in _list(header, "images", _IMAGES_MAX)]
    seeds = tuple(_seed("seeds", each) for each in _list(header, "seeds", _PICTURES_MAX))
    if not seeds:
        raise Refused(400, "There has to be a seed for each picture.", param="seeds")
    masked = flag(header, "mask")
    if len(pixels) != RGB_BYTES * sum(each.pixels for each in sizes) + MASK_BYTES * size.pixels * masked:
        raise Refused(400, "There are more or fewer pixels than those that are told of.", param="images")
    images, place = [], 0
    for each in sizes:
        images.append(Image(each, pixels[place : place + RGB_BYTES * each.pixels]))
        place += RGB_BYTES * each.pixels
    return Order(
        prompt=_text(header, "prompt") or "",
        negative_prompt=_text(header, "negative_prompt"),
        steps=_maybe(header, "steps", whole(1, _STEPS_MAX)),
        guidance=_maybe(header, "guidance", number(0, _GUIDANCE_MAX)),
        strength=_maybe(header, "strength", number(0, 1)),
        seeds=seeds,
        reproducible=flag(header, "reproducible"),
        partial_images=whole(0, _PARTIALS_MAX)("partial_images", header.get("partial_images", 0)),
        size=size,
        images=tuple(images),
        mask=pixels[place:] if masked else None,
    )


def rows(image: int, pixels: bytes | memoryview, width: int, partial: int | None = None) -> Iterator[bytes]:
    """The records that bring a picture, whole rows in each."""
    at_once = max(1, _ROWS_BYTES_MAX // (RGB_BYTES * width)) * RGB_BYTES * width
    which = {"image": image} if partial is None else {"image": image, "partial": partial}
    for place in range(0, len(pixels), at_once):
        encoded = base64.b64encode(pixels[place : place + at_once]).decode()
        yield json.dumps({"type": "rows", **which, "pixels": encoded}).encode()


def step(image: int, finished: int, steps: int) -> bytes:
    """The record of a finished step, the first being 1."""
    return json.dumps({"type": "step", "image": image, "step": finished, "steps": steps}).encode()


def finished(image: int, **used: Any) -> bytes:
    """The record that ends a picture."""
    return json.dumps({"type": "image", "image": image, "used": used}).encode()


def done(**used: Any) -> bytes:
    """The last record."""
    return json.dumps({"type": "done", "used": used}).encode()


def _size(said: Any) -> Size:
    if not isinstance(said, dict):
        raise Refused(400, "Each of `images` has to be a `width` and a `height`.", param="images")
    return Size(_edge("width", said.get("width")), _edge("height", said.get("height")))


def _list(header: Mapping[str, Any], name: str, most: int) -> list[Any]:
    said = header.get(name, [])
    if not isinstance(said, list) or len(said) > most:
        raise Refused(400, f"`{name}` has to be a list of at most {most}.", param=name)
    return said


def _text(header: Mapping[str, Any], name: str) -> str | None:
    said = header.get(name)
    if said is not None and (not isinstance(said, str) or len(said) > _PROMPT_CHARS_MAX):
        raise Refused(400, f"`{name}` has to be a text of at most {_PROMPT_CHARS_MAX} characters.", param=name)
    return said


def _maybe(header: Mapping[str, Any], name: str, check: Check) -> Any:
    said = header.get(name)
    return None if said is None else check(name, said)

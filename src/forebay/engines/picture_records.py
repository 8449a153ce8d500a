"""The records in which an engine tells the pictures that it has painted.

It refuses to put a row of pixels into two of them: whoever gathers them counts rows.
"""

import base64
import json
from collections.abc import Iterator
from typing import Any

from forebay.pixels import RGB_BYTES

_ROWS_BYTES_MAX = 2**20


def rows(image: int, pixels: bytes | memoryview, width: int, partial: int | None = None) -> Iterator[bytes]:
    """The records that bring a picture of RGB pixels, from its first row to its last."""
    at_once = max(1, _ROWS_BYTES_MAX // (RGB_BYTES * width)) * RGB_BYTES * width
    which = {"image": image} if partial is None else {"image": image, "partial": partial}
    for place in range(0, len(pixels), at_once):
        encoded = base64.b64encode(pixels[place : place + at_once]).decode()
        yield json.dumps({"type": "rows", **which, "pixels": encoded}).encode()


def step(image: int, number: int, steps: int) -> bytes:
    """The record of a finished step, the first being 1."""
    return json.dumps({"type": "step", "image": image, "step": number, "steps": steps}).encode()


def ended(image: int, **used: Any) -> bytes:
    """The record behind the last row of a picture."""
    return json.dumps({"type": "image", "image": image, "used": used}).encode()


def done(**used: Any) -> bytes:
    """The last record."""
    return json.dumps({"type": "done", "used": used}).encode()

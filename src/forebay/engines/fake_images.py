"""What the fake engine paints: pixels that nothing but the seed, the prompt and the images decide.

Every pixel of an image that it edits becomes another one, whatever the mask says: an engine is not trusted with what is to
stay. It refuses what a real engine would: too few or too many bytes for the sizes that are told.

The prompt may hold a directive of `fake_answers`, in which a step counts as a token.
"""

import hashlib
import json
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from forebay.engines.fake_answers import Directive, Refused, read_directive

PATHS = {"/v1/images/edits": "image_edit", "/v1/images/generations": "image_generation"}

_RGB, _MASK = 3, 1
_EDGE_MAX = 16_384
_PICTURES_MAX = 10
_STEPS_MAX = 10_000
_ROWS_BYTES = 1_048_576
_USED = {"engine": "fake", "pipeline": "Fake", "notices": []}


@dataclass(slots=True)
class Canvas:
    """One request for pictures, read. It has the parts of a job that the engine asks for; its words are its steps."""

    directive: Directive
    prompt: str
    seeds: list[int]
    steps: int
    partials: int
    width: int
    height: int
    before: bytes = field(repr=False)
    """The image that is edited, empty where there is none of that size."""
    choices: int = 1
    stream: bool = True
    kind: str = "application/x-ndjson"

    @property
    def words(self) -> list[str]:
        """The number of each picture and of its step."""
        return [f"{image} {step}" for image in range(len(self.seeds)) for step in range(1, self.steps + 1)]

    def begin(self) -> bytes:
        """Nothing comes before the first step."""
        return b""

    def token(self, word: str) -> bytes:
        """What is told after a step: that it is done, how it looks, and after the last one the picture."""
        image, step = map(int, word.split())
        records: list[dict[str, Any]] = [{"type": "step", "image": image, "step": step, "steps": self.steps}]
        for partial in range(self.partials):
            if step == max(1, self.steps * (partial + 1) // (self.partials + 1)):
                records += self._rows(image, step, partial=partial)
        if step == self.steps:
            records += self._rows(image, step)
            records.append({"type": "image", "image": image, "used": {}})
        return b"".join(json.dumps(each).encode() + b"\n" for each in records)

    def end(self) -> bytes:
        """What is told when all pictures are there."""
        return json.dumps({"type": "done", "used": _USED}).encode() + b"\n"

    def _rows(self, image: int, step: int, **more: int) -> Iterator[dict[str, Any]]:
        pixels = paint(self.prompt, self.seeds[image], step, self.steps, self.width, self.height, self.before)
        at_once = max(1, _ROWS_BYTES // (_RGB * self.width)) * _RGB * self.width
        for place in range(0, len(pixels), at_once):
            rows = b64encode(pixels[place : place + at_once]).decode()
            yield {"type": "rows", "image": image, "pixels": rows, **more}


def paint(prompt: str, seed: int, step: int, steps: int, width: int, height: int, before: bytes = b"") -> bytes:
    """A picture after a step of it: stripes, which change every value of the image where there is one."""
    said = f"{seed} {step} of {steps} {prompt}".encode("utf-8", "surrogatepass")
    row = hashlib.shake_128(said).digest(_RGB * width).replace(b"\0", b"\1") * 2
    stripes = b"".join(row[_RGB * (line % width) :][: _RGB * width] for line in range(height))
    if not before:
        return stripes
    return (int.from_bytes(before) ^ int.from_bytes(stripes)).to_bytes(len(stripes))


def read_canvas(path: str, body: bytes) -> Canvas:
    """Check the request, or raise Refused."""
    head, _, data = body.partition(b"\n")
    try:
        header = json.loads(head)
        prompt = str(header["prompt"])
        width, height = _size(header)
        sizes = [_size(each) for each in header["images"]]
        seeds = [int(seed) for seed in header["seeds"]]
        steps, partials = int(header.get("steps") or 1), int(header["partial_images"])
        mask = _MASK * width * height if header["mask"] else 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused(400, "The body is not a request for a picture.") from None
    directive = read_directive(prompt)
    if directive.status:
        raise Refused(directive.status, f"Asked to answer {directive.status}.", "server_error")
    if len(data) != sum(_RGB * wide * high for wide, high in sizes) + mask:
        raise Refused(400, "There are other pixels than those that are told of.")
    if bool(sizes) != (path == "/v1/images/edits"):
        raise Refused(400, "To edit takes an image, and to make one takes none.")
    if not (0 < len(seeds) <= _PICTURES_MAX and 0 < steps <= _STEPS_MAX and 0 <= partials <= 3):
        raise Refused(400, "That is more than can be painted.")
    before = data[: _RGB * width * height] if sizes[:1] == [(width, height)] else b""
    return Canvas(directive, prompt, seeds, steps, partials, width, height, before)


def _size(said: dict[str, Any]) -> tuple[int, int]:
    width, height = int(said["width"]), int(said["height"])
    if not (0 < width <= _EDGE_MAX and 0 < height <= _EDGE_MAX):
        raise ValueError("no size of a picture")
    return width, height

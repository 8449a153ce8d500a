"""The shape of answers that are pictures: one JSON body, or the events of a stream.

It refuses to count tokens, which pictures have none of: where OpenAI's events must have a usage, it is 0.
"""

import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import to_json

from forebay.dialects.imaging import Delivery, OutputPlan, Painted, Task
from forebay.dialects.openai.events import Generation

Quality = Literal["high", "medium", "low"]

_PREFIX: Mapping[Task, str] = {"edit": "image_edit", "generate": "image_generation"}
_INLINE = "b64_json"
_PIECE_BYTES = 3 * 2**18  # a multiple of three, so that the pieces together are the base64 of the whole
_NO_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


@dataclass(frozen=True, slots=True)
class Delivered:
    """A picture, and how it gets to its caller: in the answer, by `url`, or as the file `file_id`."""

    picture: Painted
    url: str | None = None
    file_id: str | None = None

    def where(self) -> dict[str, Any]:
        """The one field that says it; bytes stand for their base64, as `written` has it."""
        if self.url is not None:
            return {"url": self.url}
        if self.file_id is not None:
            return {"file_id": self.file_id}
        return {_INLINE: self.picture.data}


@dataclass(frozen=True, slots=True)
class PictureShape(Generation):
    """How the answer to one request for pictures is written."""

    task: Task
    output: OutputPlan
    delivery: Delivery
    quality: Quality

    def answer(self, pictures: Sequence[Delivered], created: int) -> dict[str, Any]:
        """The whole answer, for `written`; `background` is left out where nobody has said what it is to be."""
        shown: dict[str, Any] = {
            "created": created,
            "data": [{**each.where(), "used": dict(each.picture.used)} for each in pictures],
            "output_format": self.output.format,
            "quality": self.quality,
            "size": _size(pictures[0].picture),
        }
        return shown if self.output.backdrop == "auto" else shown | {"background": self.output.backdrop}

    def progress(self, image: int, step: int, steps: int) -> bytes:
        """That an engine has finished a step of a picture."""
        event = {"image": image, "step": step, "steps": steps, "percent": round(100 * step / steps, 1)}
        return self._event("progress", event)

    def partial(self, image: int, index: int, picture: Painted, created: int) -> bytes:
        """How a picture looks that is not finished."""
        event = {_INLINE: picture.data, "partial_image_index": index, "image": image}
        return self._event("partial_image", {**event, **self._told(picture, created)})

    def completed(self, image: int, picture: Delivered, created: int) -> bytes:
        """A picture that is finished."""
        event = {**picture.where(), "image": image, **self._told(picture.picture, created)}
        return self._event("completed", {**event, "usage": _NO_USAGE, "used": dict(picture.picture.used)})

    def _told(self, picture: Painted, created: int) -> dict[str, Any]:
        return {
            "created_at": created,
            "size": _size(picture),
            "quality": self.quality,
            "background": self.output.backdrop,
            "output_format": self.output.format,
        }

    def _event(self, name: str, fields: Mapping[str, Any]) -> bytes:
        kind = f"{_PREFIX[self.task]}.{name}"
        head = f"event: {kind}\ndata: ".encode()
        return b"".join([head, *_pieces({"type": kind, **fields}), b"\n\n"])


def written(answer: Mapping[str, Any]) -> bytes:
    """An answer as JSON; call it in a thread."""
    pieces = [to_json({name: value for name, value in answer.items() if name != "data"})[:-1], b',"data":[']
    for number, shown in enumerate(answer["data"]):
        pieces += [b"," if number else b"", *_pieces(shown)]
    return b"".join([*pieces, b"]}"])


def _pieces(shown: Mapping[str, Any]) -> list[bytes]:
    """An object as JSON. Base64 needs no escapes and is put in by hand: one call over megabytes holds up every thread."""
    rest = to_json({name: value for name, value in shown.items() if name != _INLINE})
    if _INLINE not in shown:
        return [rest]
    data: bytes = shown[_INLINE]
    encoded = (
        binascii.b2a_base64(data[at : at + _PIECE_BYTES], newline=False) for at in range(0, len(data), _PIECE_BYTES)
    )
    return [b'{"%b":"' % _INLINE.encode(), *encoded, b'",', rest[1:]]


def _size(picture: Painted) -> str:
    return f"{picture.size.width}x{picture.size.height}"

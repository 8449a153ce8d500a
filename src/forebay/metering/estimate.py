"""What a call may use at most, before anybody has counted: pure.

Tokenizers make no more tokens of a text than it has bytes (a rare ligature aside, which some write out), and engines write no
more than they are allowed to. What a model adds of its own nobody here knows: for that there is a margin. It refuses to be
clever: an estimate that is too low lets a project go beyond its quota, by what it is too low.
"""

import re
import struct
from base64 import b64decode

from pydantic_core import from_json, to_json

from forebay.dialects.items import Contents
from forebay.dialects.openai.call import Call
from forebay.quotas import Amounts

_TOKENS_OF_TEMPLATE = 256  # a system prompt that nobody sent: most have none or a few dozen tokens
_TOKENS_OF_ITEM = 8  # what stands around a text that is read for itself
_TOKENS_OF_IMAGE = 4224  # some models make 64 rows of 64 patches and a break of every image
_TILE_PIXELS = 448  # models that cut images up fill the last tile of a row too
_TILE_TOKENS = 16  # on a side: 28 pixels each, the finest grid of the models that are told the full size
# As our own encoder writes it, in base64: a comment of 64 KiB may stand before the size. In a text the quotes are escaped.
_IMAGE = re.compile(rb'"url":"data:image/(?:png|jpeg);base64,((?:[A-Za-z0-9+/]{4}){0,24576})')
_PNG = b"\x89PNG"
_JPEG_FRAMES = {0xFFC0, 0xFFC1, 0xFFC2}


def at_most(call: Call) -> Amounts:
    """A request, and its tokens. How long a recording is and how large pictures are is known only later."""
    if call.items is not None:
        return Amounts(requests=1, tokens=_of_items(call.items.contents))
    if call.kind in {"chat", "completion"}:
        return Amounts(requests=1, tokens=_of_text(call))
    return Amounts(requests=1)


def _of_text(call: Call) -> int:
    request = call.request
    written = from_json(request.body).get("max_tokens")
    if written is None:  # it asks how many tokens there are, and for none
        return 0
    read = len(request.body) - call.image_chars
    if call.kind == "chat":
        read += _TOKENS_OF_TEMPLATE
    if call.image_chars:
        read += _of_images(call)
    return (read + int(written)) * request.places


def _of_images(call: Call) -> int:
    """By their sizes. One that tells none has no more tokens than characters: 28 x 28 pixels are three of them at least."""
    total = 0
    for head in _IMAGE.findall(call.request.body):
        size = _size(b64decode(head))
        total += call.image_chars if size is None else max(_TOKENS_OF_IMAGE, _of_tiles(*size))
    return total


def _of_tiles(width: int, height: int) -> int:
    """The image in tiles, with a break behind each row of tokens, and the whole once more in one tile."""
    columns, rows = (_TILE_TOKENS * -(-side // _TILE_PIXELS) for side in (width, height))
    return rows * (columns + 1) + _TILE_TOKENS * (_TILE_TOKENS + 1) + 2


def _size(head: bytes) -> tuple[int, int] | None:
    """Width and height, as the beginning of a PNG or JPEG file tells them."""
    if head.startswith(_PNG) and len(head) >= 24:
        width, height = struct.unpack_from(">II", head, 16)
        return width, height
    place = 2
    while place + 9 <= len(head):
        marker, length, _, height, width = struct.unpack_from(">HHBHH", head, place)
        if marker in _JPEG_FRAMES:
            return width, height
        place += 2 + length
    return None


def _of_items(contents: Contents) -> int:
    around = _TOKENS_OF_ITEM + len(to_json(contents.fields))  # the query of a score is read with each document
    sizes = sum(len(each.encode()) if isinstance(each, str) else len(each) for each in contents.all)
    return sizes + around * len(contents.all)

"""Files of images written byte by byte: as an encoder would not, or as ours cannot."""

import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tests.support.images import chunk

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
_ORIENTATION = 0x0112


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG as it is written here: `rows` begin each with their filter."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + body + chunk(b"IEND", b"")


def stored_png(values: npt.NDArray[Any], depth: int, colour: int, *extra: bytes) -> bytes:
    """A PNG of samples: height x width x channels, each of `depth` bits."""
    height, width = values.shape[:2]
    flat = values.reshape(height, -1)
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in flat]
    elif depth == 8:
        rows = [row.astype(np.uint8).tobytes() for row in flat]
    else:
        bits = (flat[..., np.newaxis] >> np.arange(depth - 1, -1, -1) & 1).reshape(height, -1)
        rows = [np.packbits(row.astype(np.uint8)).tobytes() for row in bits]
    return raw_png(width, height, depth, colour, b"".join(b"\0" + row for row in rows), *extra)


def raw_webp(kind: bytes, content: bytes) -> bytes:
    """A WebP with one piece."""
    body = b"WEBP" + kind + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


def held_as(orientation: int) -> bytes:
    """EXIF that says how a camera was held."""
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    return exif.tobytes()


def profile(size: int, space: bytes = b"RGB ", signature: bytes = b"acsp", told: int | None = None) -> bytes:
    """As much of an ICC profile as is looked at."""
    head = struct.pack(">I", size if told is None else told) + bytes(12) + space + bytes(16) + signature
    return (head + bytes(size))[:size]

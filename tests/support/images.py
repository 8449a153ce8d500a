"""Images, sound and otherwise, written byte by byte where an encoder would refuse, and messages that hold them."""

import base64
import io
import struct
import zlib
from collections.abc import Iterable
from typing import Any

from PIL import Image

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><image href="file:///etc/passwd"/></svg>'


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(width: int = 64, height: int = 48, colour: str = "red", kind: str = "PNG", **options: Any) -> bytes:
    """A file of one colour."""
    return encoded(Image.new("RGB", (width, height), colour), kind, **options)


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def part(url: str, **more: Any) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "image_url", "image_url": {"url": url, **more}}


def message(parts: Iterable[dict[str, Any]], text: str = "[[fake images=1]]") -> dict[str, Any]:
    """What a user says and shows."""
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def chunk(kind: bytes, data: bytes) -> bytes:
    """One piece of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, rows: int | None = None) -> bytes:
    """A grey PNG written row by row, with `extra` pieces before its data."""
    packed = zlib.compressobj(9)
    row = b"\0" + bytes((width + 7) // 8)
    body = b"".join(packed.compress(row) for _ in range(height if rows is None else rows)) + packed.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def gif(frames: int) -> bytes:
    """An animation of that many frames."""
    one = encoded(Image.new("P", (2, 2)), "GIF")
    start = one.index(b"\x2c")  # after the colours, which are all black
    return one[:start] + (b"\x21\xf9\x04\x04\x01\0\0\0" + one[start:-1]) * frames + b"\x3b"


def bombs() -> dict[str, tuple[str, str]]:
    """Hostile images by name: the URL, and the code of the refusal."""
    big = zlib.compress(bytes(200 * 2**20), 9)
    bomb = chunk(b"zTXt", b"Comment\0\0" + big)
    profile = chunk(b"iCCP", b"icc\0\0" + big)
    good = picture(200, 200)
    zipped = b"PK\x03\x04" + bytes(60)
    invalid, large = "media_invalid", "media_too_large"
    return {
        "60k x 60k PNG": (data_url(png(60_000, 60_000, rows=1)), large),
        "60k x 60k PNG with all its rows": (data_url(png(60_000, 60_000)), large),
        "dimensions of 2^31": (data_url(png(2**31 - 1, 2**31 - 1, rows=0)), large),
        "no width": (data_url(png(0, 10, rows=0)), invalid),
        "100,000-frame GIF": (data_url(gif(100_000), "gif"), large),
        "two frames": (data_url(gif(2), "gif"), large),
        "animated WebP": (data_url(_webp(), "webp"), large),
        "bomb in zTXt": (data_url(png(100, 100, bomb)), invalid),
        "bomb in iCCP": (data_url(png(100, 100, profile)), invalid),
        "truncated": (data_url(good[: len(good) // 2]), invalid),
        "truncated JPEG": (data_url(picture(200, 200, kind="JPEG")[:-400], "jpeg"), invalid),
        "a JPEG that says PNG": (data_url(picture(kind="JPEG")), invalid),
        "a PNG that says JPEG": (data_url(good, "jpeg"), invalid),
        "zip": (data_url(zipped), invalid),
        "gzip": (data_url(b"\x1f\x8b\x08\0" + bytes(60)), invalid),
        "SVG": (data_url(SVG, "svg+xml"), invalid),
        "SVG that says PNG": (data_url(SVG), invalid),
        "BMP": (data_url(picture(kind="BMP"), "bmp"), invalid),
        "TIFF": (data_url(picture(kind="TIFF"), "tiff"), invalid),
        "HTML": ("data:text/html;base64,PGI+", invalid),
        "no base64": ("data:image/png;base64,!!!!", invalid),
        "base64 that is not ASCII": ("data:image/png;base64,é", invalid),
        "empty": ("data:image/png;base64,", invalid),
        "only a signature": (data_url(b"\x89PNG\r\n\x1a\n"), invalid),
        "a line": (data_url(png(10_000, 1)), invalid),
    }


def _webp() -> bytes:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])

"""Looks at images that strangers sent, each in a forked child with little memory, little time and no files.

It answers with a picture that our own encoder has written, or with the reason why there is none; it opens no address and
no file, and no image is decoded in the process that talks to the server.

On standard input, again and again: `>II` lengths, a JSON head `{"declared", "base64", "edge"}` and the image. On standard
output, for each: `>BI` verdict and length, and for verdict 0 a `data:` URL. Limits come as JSON in the first argument, the
id of the server's process in the second.
"""

import base64
import io
import json
import struct
import sys
import warnings
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image

from forebay.engines import fence, image_formats
from forebay.engines.fence import BROKEN, OK, Refused
from forebay.engines.image_formats import (
    NOT_AN_IMAGE,
    TOO_MANY_FRAMES,
    check_size,
    on_white,
    plain,
    turned,
)

NOT_BASE64 = 7
_SIDES_RATIO_MAX = 200  # some engines fall over a picture that is nothing but a line
_PNG_BYTES_MAX = 4 * 2**20  # a photograph is no loss as JPEG, and a quarter of the size
_JPEG_QUALITY = 92
_OUT_BYTES_MAX = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one image may be and cost."""

    pixels_max: int
    frames_max: int
    memory_bytes_max: int
    seconds_max: int


@dataclass(frozen=True, slots=True)
class Task:
    """One image: `declared` is the type that its sender claims, `edge` the longest side that is wanted."""

    data: bytes
    declared: str | None
    base64: bool
    edge: int


def main() -> None:
    """Serve until the server closes standard input or ends."""
    limits = Limits(**json.loads(sys.argv[1]))
    libc = fence.begin(int(sys.argv[2]))
    warnings.simplefilter("error")
    Image.preinit()  # a child can import nothing
    while _serve(limits, libc):
        pass


def _serve(limits: Limits, libc: Any) -> bool:
    """Look at one image; whether there was one."""
    task = _read_task(sys.stdin.buffer)
    if task is None:
        return False
    verdict, picture = _run(task, limits, libc)
    sys.stdout.buffer.write(struct.pack(">BI", verdict, len(picture)) + picture)
    sys.stdout.buffer.flush()
    return True


def _read_task(source: BinaryIO) -> Task | None:
    lengths = source.read(8)
    if len(lengths) < 8:
        return None
    head_bytes, data_bytes = struct.unpack(">II", lengths)
    head, data = source.read(head_bytes), source.read(data_bytes)
    return Task(data=data, **json.loads(head)) if len(data) == data_bytes else None


def _run(task: Task, limits: Limits, libc: Any) -> tuple[int, bytes]:
    """Look at one image in a child; this process only passes bytes on."""
    cost = fence.Cost(limits.memory_bytes_max, limits.seconds_max)
    verdict, out = fence.told(
        lambda writer: fence.write(writer, _picture(task, limits)),
        cost,
        libc,
        highest=NOT_BASE64,
        bytes_max=_OUT_BYTES_MAX,
    )
    if verdict != OK or not out:
        return verdict or BROKEN, b""
    return OK, out


def _picture(task: Task, limits: Limits) -> bytes:
    """The `data:` URL of the picture that an engine may see. Raises Refused, and whatever Pillow raises."""
    data = _decoded(task.data) if task.base64 else task.data
    kind = _kind(data)
    if kind is None or (task.declared is not None and task.declared != kind.lower()):
        raise Refused(NOT_AN_IMAGE)
    Image.MAX_IMAGE_PIXELS = None  # ours is the limit, and it is lower
    image = Image.open(io.BytesIO(data), formats=[kind])
    check_size(*image.size, image_formats.Limits(limits.pixels_max, _SIDES_RATIO_MAX))
    if kind != "JPEG":  # a second picture inside a JPEG is a preview or a depth map
        _check_frames(image, limits)
    else:
        image.draft("RGB", (task.edge, task.edge))
    shown = plain(image)
    turn = turned(image)
    shown.thumbnail((task.edge, task.edge), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if turn is not None:
        shown = shown.transpose(turn)
    return _encode(on_white(shown), lossless=kind in {"PNG", "GIF"})


def _decoded(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise Refused(NOT_BASE64) from None


def _kind(data: bytes) -> str | None:
    """What the first bytes say that it is."""
    return "GIF" if data.startswith((b"GIF87a", b"GIF89a")) else image_formats.kind(data)


def _check_frames(image: Image.Image, limits: Limits) -> None:
    try:
        image.seek(limits.frames_max)
    except EOFError:
        image.seek(0)
        return
    raise Refused(TOO_MANY_FRAMES)


def _encode(image: Image.Image, *, lossless: bool) -> bytes:
    if lossless:
        out = io.BytesIO()
        image.save(out, "PNG", compress_level=3)
        if out.tell() <= _PNG_BYTES_MAX:
            return b"data:image/png;base64," + base64.b64encode(out.getbuffer())
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_JPEG_QUALITY)
    return b"data:image/jpeg;base64," + base64.b64encode(out.getbuffer())


if __name__ == "__main__":
    main()

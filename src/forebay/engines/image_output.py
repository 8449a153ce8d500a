"""How a finished picture is written: PNG, JPEG or WebP, with the colour profile of the image it was made of.

It refuses a side that the format has no number for, and another shape than that of the image; nothing else of what came
with the image is written: no camera, no place, no words.
"""

import zlib
from dataclasses import dataclass
from typing import IO, Any, Literal, Protocol, cast

from PIL import Image

from forebay.engines.fence import TOO_COSTLY, Refused
from forebay.engines.image_formats import on_white
from forebay.engines.image_steps import resized
from forebay.pixels import Size

OTHER_SHAPE, TOO_LONG_SIDE = 13, 14
_SIDES_MAX = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}
_SHAPE_DIFFERENCE_MAX = 0.02  # as much as the sides of a small picture are rounded
_JPEG_QUALITY = 95
_FINE_JPEG_QUALITY = 90  # from there on colours are as sharp as light
_PREVIEW_QUALITY = 85
_PROGRAM_BYTES = 300 * 2**20  # of address space: this program and its libraries
_LOSSLESS_WEBP_BYTES = 33  # for each pixel: the picture, and what its encoder takes at most
_WEBP_EFFORT = {"quality": 20, "method": 0}  # 25 megapixels in seconds and not in minutes


class Writable(Protocol):
    """Where bytes go."""

    def write(self, data: bytes) -> int:
        """Add them all."""
        ...


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """How a picture is written. `size` is none for that of the image, `compression` 0 to 100, the latter for the best."""

    format: Literal["png", "jpeg", "webp"] = "png"
    compression: int | None = None
    backdrop: Literal["auto", "opaque", "transparent"] = "auto"
    size: Size | None = None

    @property
    def is_lossless_webp(self) -> bool:
        """Whether it is what takes most memory of all."""
        return self.format == "webp" and self.compression in {None, 100}


def size_of(source: Size, plan: OutputPlan, memory_bytes_max: int) -> Size:
    """The size of the picture that is made of an image. Raises Refused for one that cannot be written in so much memory."""
    size = plan.size or source
    one, other = size.width * source.height, size.height * source.width
    if abs(one - other) > _SHAPE_DIFFERENCE_MAX * max(one, other):
        raise Refused(OTHER_SHAPE)
    if max(size.width, size.height) > _SIDES_MAX[plan.format]:
        raise Refused(TOO_LONG_SIDE)
    if plan.is_lossless_webp and _PROGRAM_BYTES + size.pixels * _LOSSLESS_WEBP_BYTES > memory_bytes_max:
        raise Refused(TOO_COSTLY)
    return size


def encode(image: Image.Image, plan: OutputPlan, profile: bytes | None, out: Writable) -> None:
    """Write a picture (RGB or RGBA) in its own size. Raises Refused where there is too little memory for it."""
    try:
        _save(image, plan, profile, out)
    except (OSError, ValueError):  # what comes from Pillow's encoders, and none of it from the picture
        raise Refused(TOO_COSTLY) from None


def _save(image: Image.Image, plan: OutputPlan, profile: bytes | None, out: Writable) -> None:
    if plan.format == "jpeg" or plan.backdrop == "opaque":
        image = on_white(image)
    kept: dict[str, Any] = {"icc_profile": profile} if profile else {}
    image.info.clear()
    file = cast("IO[bytes]", out)
    match plan.format:
        case "png":
            # Runs alone are looked for: a photograph has nothing else, and is written in a fifth of the time.
            image.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE, **kept)
        case "jpeg":
            quality = _JPEG_QUALITY if plan.compression is None else max(1, plan.compression)
            subsampling = 0 if quality >= _FINE_JPEG_QUALITY else 2
            image.save(file, "JPEG", quality=quality, subsampling=subsampling, **kept)
        case "webp" if plan.is_lossless_webp:
            image.save(file, "WEBP", lossless=True, exact=True, **_WEBP_EFFORT, **kept)
        case "webp":
            image.save(file, "WEBP", quality=plan.compression, **kept)


def preview(image: Image.Image, edge: int, profile: bytes | None, out: Writable) -> None:
    """Write a small JPEG of a picture, no side of which is longer than `edge`."""
    scale = min(1.0, edge / max(image.size))
    small = resized(image, Size(*(max(1, round(side * scale)) for side in image.size)))
    kept: dict[str, Any] = {"icc_profile": profile} if profile else {}
    on_white(small).save(cast("IO[bytes]", out), "JPEG", quality=_PREVIEW_QUALITY, **kept)

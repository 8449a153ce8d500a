"""What files of images say that they are, and what they show: upright, in 8 bits, with what one can see through apart.

It refuses every format but PNG, JPEG and WebP, animations, and what is larger than its header may say; nothing is decoded
before that is known.
"""

import struct
from dataclasses import dataclass
from typing import IO, Protocol, cast

from PIL import Image, ImageFile, MpoImagePlugin, WebPImagePlugin

from forebay.engines.fence import BROKEN, Refused
from forebay.pixels import Size

NOT_AN_IMAGE, TOO_MANY_PIXELS, TOO_MANY_FRAMES, TOO_NARROW = 1, 3, 4, 6
_LOADED = (MpoImagePlugin, WebPImagePlugin)  # by this import, beside those that `preinit` loads
_HEAD_BYTES = 32
_PROFILE_BYTES_MAX = 2 * 2**20
_PROFILE_HEAD = struct.Struct(">I12s4s16s4s")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HIGH_BYTES = [value >> 8 for value in range(65_536)]
_GREYS = {"L;2": 85, "L;4": 17}  # what Pillow multiplies grey of few bits with, but not the value that is transparent


class Readable(Protocol):
    """Where the bytes of a file come from."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes, at most `size` of them where it is not negative."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go elsewhere."""
        ...

    def tell(self) -> int:
        """Where it is."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What one image may be, by its header."""

    pixels_max: int
    ratio_max: float


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image as it is meant to be seen: RGB, or RGBA where one can see through it."""

    pixels: Image.Image
    profile: bytes | None = None

    @property
    def size(self) -> Size:
        """Its size, upright."""
        return Size(*self.pixels.size)


def decode(source: Readable, limits: Limits) -> Decoded:
    """The one picture in a file. Raises Refused, and whatever Pillow raises for a damaged one."""
    image = opened(source, limits)
    shown = plain(image)
    turn, profile = turned(image), _profile(image)
    del image  # large, and there may be no room for three of them
    return Decoded(shown if turn is None else shown.transpose(turn), profile)


def opened(source: Readable, limits: Limits) -> ImageFile.ImageFile:
    """An image of which only the header has been read. Raises Refused, and whatever Pillow raises."""
    head = source.read(_HEAD_BYTES)
    found = kind(head)
    if found is None:
        raise Refused(NOT_AN_IMAGE)
    if found == "WEBP":
        check_size(*_webp_size(head), limits)  # opening it takes memory for all that it says to be
    source.seek(0)
    Image.MAX_IMAGE_PIXELS = None  # ours is the limit, and it is lower
    image = Image.open(cast("IO[bytes]", source), formats=[found])
    check_size(*image.size, limits)
    if found != "JPEG" and getattr(image, "n_frames", 1) > 1:  # in a JPEG it is a preview or a depth map
        raise Refused(TOO_MANY_FRAMES)
    return image


def kind(data: bytes) -> str | None:
    """What the first bytes say that it is."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def turned(image: Image.Image) -> Image.Transpose | None:
    """How it is made upright, if it is not; that is none where it cannot be read. It may load the image."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, EOFError, OSError, struct.error):
        return None
    return _TURNS.get(value) if isinstance(value, int) else None


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height, as the first piece of a WebP file tells them. Raises Refused."""
    if len(head) < _HEAD_BYTES - 2:
        raise Refused(BROKEN)
    match head[12:16]:
        case b"VP8X":
            return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(head[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", head, 26)
            return width & 0x3FFF, height & 0x3FFF
        case _:
            raise Refused(BROKEN)


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raise Refused for a size that is none or beyond the limits."""
    if width < 1 or height < 1:
        raise Refused(BROKEN)
    if width * height > limits.pixels_max:
        raise Refused(TOO_MANY_PIXELS)
    if max(width, height) > limits.ratio_max * min(width, height):
        raise Refused(TOO_NARROW)


def plain(image: ImageFile.ImageFile) -> Image.Image:
    """The same picture as RGB, or as RGBA where one can see through it. It loads the image."""
    stored = image.tile[0].args if image.format == "PNG" and image.tile else ""  # how a PNG holds its values
    image.load()
    through = image.info.get("transparency")
    if image.mode.startswith("I"):
        return _of_16_bits(image, through)
    if image.mode == "L" and isinstance(through, int):
        image.info["transparency"] = min(through * _GREYS.get(str(stored), 1), 255)
    elif stored == "RGB;16B" and isinstance(through, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in through)
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or through is not None:
        return image if image.mode == "RGBA" else image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _of_16_bits(image: Image.Image, through: object) -> Image.Image:
    """Grey of 16 bits in 8 of them; `through` is the value that is transparent, if one is."""
    wide = image.convert("I")
    grey = wide.point(_HIGH_BYTES, "L")
    if not isinstance(through, int):
        return grey.convert("RGB")
    opaque = [255] * 65_536
    opaque[through & 0xFFFF] = 0
    return Image.merge("RGBA", (grey, grey, grey, wide.point(opaque, "L")))


def _profile(image: Image.Image) -> bytes | None:
    """Its ICC profile, where that is one of RGB: what an image of grey or CMYK brings says nothing of what we make of it."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not _PROFILE_HEAD.size <= len(profile) <= _PROFILE_BYTES_MAX:
        return None
    size, _, space, _, signature = _PROFILE_HEAD.unpack_from(profile)
    return profile if (size, space, signature) == (len(profile), b"RGB ", b"acsp") else None


def on_white(image: Image.Image) -> Image.Image:
    """The same, with nothing to see through."""
    if image.mode == "RGB":
        return image
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, (0, 0), image)
    return paper

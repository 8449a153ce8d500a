"""Three hundred images and masks that are bad or odd, each with what must become of it."""

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tests.support.images import SVG, chunk, encoded, gif, picture, png
from tests.support.raw_images import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGBA,
    held_as,
    profile,
    raw_png,
    raw_webp,
    stored_png,
)

Array = npt.NDArray[np.uint8]

WIDTH, HEIGHT = 40, 32
HOLE = (4, 6, 16, 14)  # left, top, right, bottom
INVALID, LARGE = "media_invalid", "media_too_large"
_TRUNCATIONS, _FLIPS = 12, 12
_BOMB_BYTES = 50 * 2**20


@dataclass(frozen=True, slots=True)
class Case:
    """An image and perhaps a mask. `codes` are those of the refusals that are right, none of them an answer.

    Where the answer can be told, `pixels` is what the image shows, up to `near` on average, and `marked` what is painted.
    `profile` is the colour profile that the answer has, where that matters.
    """

    name: str
    image: bytes = field(repr=False)
    mask: bytes | None = field(repr=False)
    codes: frozenset[str | None] = frozenset({None})
    param: str | None = "image"
    mode: Any = "alpha"
    pixels: Array | None = field(default=None, repr=False)
    marked: npt.NDArray[np.bool_] | None = field(default=None, repr=False)
    near: float = 0.0
    profile: bytes | None = None
    profile_matters: bool = False


def bad_images(seed: int) -> Iterator[Case]:
    """All of them."""
    yield from truncated(seed)
    yield from flipped(seed)
    yield from nothing(seed)
    yield from bombs()
    yield from stored_otherwise()
    yield from turned()
    yield from with_profiles()
    yield from sizes()
    yield from masks()
    yield from animations()


def _refused(name: str, image: bytes, *codes: str | None, mask: bytes | None = None, **more: Any) -> Case:
    return Case(name, image, mask or hole(), frozenset(codes or (INVALID,)), **more)


def _bad_mask(name: str, mask: bytes, *codes: str | None, **more: Any) -> Case:
    return Case(name, good(), mask, frozenset(codes or (INVALID,)), **{"param": "mask", **more})


def _right(name: str, image: bytes, pixels: Array, **more: Any) -> Case:
    """An image that is well, with a mask of its own."""
    height, width = pixels.shape[:2]
    marked = _marked(width, height)
    return Case(name, image, hole(width, height), pixels=pixels, **{"marked": marked, **more})


def _marked(width: int = WIDTH, height: int = HEIGHT) -> npt.NDArray[np.bool_]:
    bits = np.zeros((height, width), np.bool_)
    bits[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = True
    return bits


@cache
def hole(width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A good mask: transparent in the hole."""
    return encoded(_through(_marked(width, height)))


def _through(marked: npt.NDArray[np.bool_]) -> Image.Image:
    pixels = np.zeros((*marked.shape, 4), np.uint8)
    pixels[..., 3] = np.where(marked, 0, 255)
    return Image.fromarray(pixels)


@cache
def _slope(width: int = WIDTH, height: int = HEIGHT) -> Array:
    """What shows itself well however it is stored, and is not the same from any other side."""
    across, down = np.linspace(20, 230, width), np.linspace(30, 210, height)[:, np.newaxis]
    red, green = np.broadcast_to(across, (height, width)), np.broadcast_to(down, (height, width))
    return np.stack((red, green, (red + green) / 2), axis=-1).astype(np.uint8)


@cache
def good(kind: str = "PNG", width: int = WIDTH, height: int = HEIGHT) -> bytes:
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    return encoded(Image.fromarray(_slope(width, height)), kind, **options)


def truncated(seed: int) -> Iterator[Case]:
    """Cut off at some place."""
    chance = random.Random(seed)
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = good(kind, 300, 200)
        early, late = chance.sample(range(1, 60), 4), chance.sample(range(60, len(whole) * 9 // 10), _TRUNCATIONS - 4)
        for at in early + late:
            yield _refused(f"{kind} cut at {at}", whole[:at], mask=hole(300, 200))
    whole = encoded(Image.fromarray(np.dstack((_slope(), _slope()[..., 0]))))
    for at in chance.sample(range(1, len(whole) * 9 // 10), _TRUNCATIONS):
        yield _bad_mask(f"mask cut at {at}", whole[:at])


def flipped(seed: int) -> Iterator[Case]:
    """With some bits the other way round: what a check sum does not find may show anything."""
    chance = random.Random(seed)
    for kind in ("PNG", "JPEG", "WEBP"):
        for number in range(_FLIPS):
            whole = bytearray(good(kind, 64, 48))
            for _ in range(3):
                whole[chance.randrange(12, min(200, len(whole)) if number % 2 else len(whole))] ^= (
                    1 << chance.randrange(8)
                )
            allowed: list[str | None] = [INVALID, LARGE, None]
            # A flip may change the size, so that the mask is the wrong one.
            yield _refused(f"{kind} with flips {number}", bytes(whole), *allowed, mask=hole(64, 48), param=None)


def nothing(seed: int) -> Iterator[Case]:
    """No image at all, or one of a kind that is not taken."""
    small = Image.fromarray(_slope())
    other = {
        "nothing": b"",
        "one byte": b"\x89",
        "text": b"This is no picture.\n" * 100,
        "SVG": SVG,
        "HTML": b"<html><img src=x></html>",
        "JSON": b'{"a": 1}',
        "PDF": b"%PDF-1.7\n" + bytes(200),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n" + bytes(200),
        "zip": b"PK\x03\x04" + bytes(200),
        "gzip": b"\x1f\x8b\x08\0" + bytes(200),
        "HEIC": b"\0\0\0\x18ftypheic" + bytes(200),
        "AVIF": b"\0\0\0\x1cftypavif" + bytes(200),
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(200),
        "Photoshop": b"8BPS\0\x01" + bytes(200),
        "wave": b"RIFF\x24\0\0\0WAVEfmt " + bytes(200),
        "RIFF of WebP with nothing in it": b"RIFF\x04\0\0\0WEBP",
        "WebP of an unknown piece": b"RIFF\x20\0\0\0WEBPVP9 " + bytes(40),
        "PNG's first bytes": b"\x89PNG\r\n\x1a\n",
        "JPEG's first bytes": b"\xff\xd8\xff",
        "JPEG that ends at once": b"\xff\xd8\xff\xd9",
        "PNG that ends at once": b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""),
        "a PNG after text": b"\n" + good(),
        **{kind: encoded(small, kind) for kind in ("TIFF", "BMP", "GIF", "PPM", "TGA", "ICO", "PCX", "DDS")},
    }
    chance = random.Random(seed)
    other |= {f"noise {number}": chance.randbytes(500) for number in range(4)}
    for name, content in other.items():
        yield _refused(name, content)
    for name in ("nothing", "text", "SVG", "TIFF", "GIF", "PNG's first bytes", "JPEG that ends at once", "noise 1"):
        yield _bad_mask(f"mask: {name}", other[name] or b"")


def bombs() -> Iterator[Case]:
    """Little that asks for much."""
    packed = zlib.compress(bytes(_BOMB_BYTES), 1)
    wide, text = png(60_000, 60_000, rows=1), b"Comment\0\0" + packed
    yield _refused("PNG of 60,000 x 60,000", wide, LARGE)
    yield _refused("PNG of 2^31 x 2^31", png(2**31 - 1, 2**31 - 1, rows=0), LARGE)
    yield _refused("PNG of 5001 x 5000", png(5001, 5000, rows=1), LARGE)
    yield _refused("PNG without width", png(0, 10, rows=0))
    yield _refused("PNG without height", png(10, 0, rows=0))
    yield _refused("PNG of 2^32 - 1", raw_png(2**32 - 1, 2**32 - 1, 8, RGB, b""), INVALID, LARGE)
    yield _refused("WebP of 16,777,216 x 256", raw_webp(b"VP8X", b"\0\0\0\0\xff\xff\xff\xff\0\0"), LARGE)
    yield _refused("WebP of 65,536 x 65,536", raw_webp(b"VP8X", b"\x12\0\0\0\xff\xff\0\xff\xff\0"), LARGE)
    yield _refused("WebP of 16,384 x 16,384", raw_webp(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(20)), LARGE)
    yield _refused(
        "WebP of 16,383 x 16,383", raw_webp(b"VP8 ", b"\x30\1\0\x9d\1\x2a\xff\x3f\xff\x3f" + bytes(9)), LARGE
    )
    yield _refused("JPEG of 65,500 x 65,500", _resized_jpeg(65_500, 65_500), LARGE)
    yield _refused("JPEG of 65,535 x 1", _resized_jpeg(65_535, 1))
    yield _refused("JPEG of 4990 x 4990 without them", _resized_jpeg(4990, 4990), INVALID, None, mask=hole(4990, 4990))
    yield _refused("zTXt", _with(chunk(b"zTXt", text)))
    yield _refused("iTXt", _with(chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed)))
    yield _refused("iCCP", _with(chunk(b"iCCP", b"icc\0\0" + packed)), INVALID, None)
    piece = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**20 - 1), 9))
    yield _refused("100 x zTXt of a megabyte", _with(piece * 100))
    yield _right("50,000 x tEXt", _with(chunk(b"tEXt", b"a\0b") * 50_000), _slope())
    yield _right(
        "a row after the last", raw_png(8, 64, 8, GREY, bytes(9 * 64) + bytes(_BOMB_BYTES // 8)), _black(8, 64)
    )
    yield _refused("rows that are missing", raw_png(64, 64, 8, GREY, bytes(65 * 32)), INVALID, None, mask=hole(64, 64))
    yield _refused("another zTXt after the data", _with(b"", chunk(b"zTXt", text)), INVALID, None)
    yield _refused("piece of 2 GB", good()[:33] + b"\x7f\xff\xff\xffIDAT" + bytes(100))
    yield _refused("JPEG of a thousand scans", _scans(1000), INVALID, LARGE, None, mask=hole(800, 600))
    yield _refused("ten thousand empty segments", _segments(10_000), INVALID, LARGE, None)
    for name, mask in {"60,000 x 60,000": wide, "zTXt": _with(chunk(b"zTXt", text))}.items():
        yield _bad_mask(f"mask: {name}", mask, LARGE if mask is wide else INVALID)


def _black(width: int, height: int) -> Array:
    return np.zeros((height, width, 3), np.uint8)


def _with(before: bytes, after: bytes = b"") -> bytes:
    """A good PNG with pieces before its data, and after."""
    whole = good()
    at, end = whole.index(b"IDAT") - 4, whole.index(b"IEND") - 4
    return whole[:at] + before + whole[at:end] + after + whole[end:]


def _resized_jpeg(width: int, height: int) -> bytes:
    """One that says that it is larger than it is."""
    whole = bytearray(good("JPEG"))
    struct.pack_into(">HH", whole, whole.index(b"\xff\xc0") + 5, height, width)
    return bytes(whole)


def _scans(count: int) -> bytes:
    """A progressive JPEG that draws its last scan again and again."""
    whole = encoded(Image.fromarray(_slope(800, 600)), "JPEG", progressive=True, quality=20)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * count + whole[-2:]


def _segments(count: int) -> bytes:
    whole = good("JPEG")
    return whole[:2] + b"\xff\xee\0\x02" * count + whole[2:]


def stored_otherwise() -> Iterator[Case]:
    """The same, or nearly, as files hold it that are not RGB of 8 bits."""
    yield from _greys()
    yield from _palettes()
    yield from _colours()
    yield from _photographs()


def _greys() -> Iterator[Case]:
    for depth in (1, 2, 4, 8, 16):
        most = 2**depth - 1
        values = (
            (_slope()[..., 0].astype(np.uint32) * most // 255) if depth != 16 else _slope()[..., 0] * np.uint32(257) - 9
        )
        shown = (values >> 8 if depth == 16 else values * (255 // most)).astype(np.uint8)
        grey = np.stack((shown,) * 3, axis=-1)
        yield _right(f"grey of {depth} bits", stored_png(values[..., np.newaxis], depth, GREY), grey)
        clear = int(values[20, 20])
        file = stored_png(values[..., np.newaxis], depth, GREY, chunk(b"tRNS", struct.pack(">H", clear)))
        alpha = np.where(values == clear, 0, 255).astype(np.uint8)
        yield _right(f"grey of {depth} bits with one that is clear", file, np.dstack((grey, alpha)))


def _palettes() -> Iterator[Case]:
    for depth in (1, 2, 4, 8):
        count = 2**depth
        colours = np.random.default_rng(depth).integers(0, 256, (count, 3), np.uint8)
        number = (_slope()[..., 0].astype(np.uint32) * (count - 1) // 255).astype(np.uint8)
        plte = chunk(b"PLTE", colours.tobytes())
        yield _right(
            f"palette of {depth} bits", stored_png(number[..., np.newaxis], depth, PALETTE, plte), colours[number]
        )
        for name, clear in {
            "one": 255 * (np.arange(count) != 1),
            "half": np.arange(count) * 255 // (count - 1),
        }.items():
            trns = chunk(b"tRNS", clear.astype(np.uint8).tobytes())
            shown = np.dstack((colours[number], clear.astype(np.uint8)[number]))
            file = stored_png(number[..., np.newaxis], depth, PALETTE, plte, trns)
            yield _right(f"palette of {depth} bits with {name} clear", file, shown)
    yield _refused("palette without one", stored_png(_slope()[..., :1], 8, PALETTE), INVALID, None)
    yield _refused(
        "palette that is too short", stored_png(_slope()[..., :1], 8, PALETTE, chunk(b"PLTE", bytes(6))), None, INVALID
    )


def _colours() -> Iterator[Case]:
    slope, alpha = _slope(), np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 1), np.uint8)
    wide, wide_alpha = slope * np.uint16(257) - 9, alpha * np.uint16(257)
    grey, seen = slope[..., :1], np.concatenate((slope, alpha), axis=2)
    on_grey = np.concatenate((grey, grey, grey, alpha), axis=2)
    narrow = (wide >> 8).astype(np.uint8)
    yield _right("RGB of 16 bits", stored_png(wide, 16, RGB), narrow)
    yield _right("RGBA", stored_png(seen, 8, RGBA), seen)
    file = stored_png(np.concatenate((wide, wide_alpha), axis=2), 16, RGBA)
    yield _right("RGBA of 16 bits", file, np.concatenate((narrow, alpha), axis=2))
    yield _right("grey with alpha", stored_png(np.concatenate((grey, alpha), axis=2), 8, GREY_ALPHA), on_grey)
    file = stored_png(np.concatenate((grey * np.uint16(257), wide_alpha), axis=2), 16, GREY_ALPHA)
    yield _right("grey with alpha, of 16 bits", file, on_grey)
    one = slope[20, 20]
    trns = chunk(b"tRNS", struct.pack(">HHH", *(int(value) for value in one)))
    clear = np.where((slope == one).all(axis=2), 0, 255).astype(np.uint8)
    yield _right("RGB with one that is clear", stored_png(slope, 8, RGB, trns), np.dstack((slope, clear)))
    trns = chunk(b"tRNS", struct.pack(">HHH", *(int(value) for value in wide[20, 20])))
    clear = np.where((narrow == narrow[20, 20]).all(axis=2), 0, 255).astype(np.uint8)
    yield _right("RGB of 16 bits with one that is clear", stored_png(wide, 16, RGB, trns), np.dstack((narrow, clear)))
    yield _refused("RGB of 3 bits", raw_png(WIDTH, HEIGHT, 3, RGB, bytes(500)))
    yield _refused("colours of a kind that is none", raw_png(WIDTH, HEIGHT, 8, 5, bytes(5000)))
    yield _refused("a tRNS that is too short", stored_png(slope, 8, RGB, chunk(b"tRNS", b"\0")), INVALID, None)


def _photographs() -> Iterator[Case]:
    slope = Image.fromarray(_slope())
    grey = np.stack((np.asarray(slope.convert("L")),) * 3, axis=-1)
    for progressive in (False, True):
        how = "progressive " if progressive else ""
        options = {"quality": 95, "progressive": progressive}
        yield _right(f"{how}JPEG of CMYK", encoded(slope.convert("CMYK"), "JPEG", **options), _slope(), near=3)
        yield _right(f"{how}JPEG of grey", encoded(slope.convert("L"), "JPEG", **options), grey, near=3)
        for subsampling in (0, 1, 2):
            file = encoded(slope, "JPEG", subsampling=subsampling, **options)
            yield _right(f"{how}JPEG, colours of kind {subsampling}", file, _slope(), near=3)
    yield _right("JPEG with restarts", encoded(slope, "JPEG", quality=95, restart_marker_blocks=2), _slope(), near=3)
    alpha = np.dstack((_slope(), _slope()[..., 1]))
    yield _right("WebP without loss", encoded(slope, "WEBP", lossless=True), _slope())
    yield _right("WebP", encoded(slope, "WEBP", quality=95), _slope(), near=3)
    file = encoded(Image.fromarray(alpha), "WEBP", lossless=True, exact=True)
    yield _right("WebP one sees through", file, alpha)


def turned() -> Iterator[Case]:
    """As a camera was held, and as a mask was."""
    upright: dict[int, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {
        1: lambda array: array,
        2: lambda array: array[:, ::-1],
        3: lambda array: array[::-1, ::-1],
        4: lambda array: array[::-1],
        5: lambda array: array.swapaxes(0, 1),
        6: lambda array: np.rot90(array, -1),
        7: lambda array: np.rot90(array, 2).swapaxes(0, 1),
        8: lambda array: np.rot90(array, 1),
    }
    for orientation, make in upright.items():
        exif = held_as(orientation)
        for kind, options, near in (
            ("PNG", {}, 0),
            ("WEBP", {"lossless": True}, 0),
            ("JPEG", {"quality": 95, "subsampling": 0}, 3),
        ):
            file = encoded(Image.fromarray(_slope()), kind, exif=exif, **options)
            yield _right(f"{kind} held as {orientation}", file, make(_slope()), near=near)
        marked = make(_marked())
        base = make(_slope())
        mask = encoded(_through(_marked()), exif=exif)
        image = encoded(Image.fromarray(np.ascontiguousarray(base)))
        yield Case(f"mask held as {orientation}", image, mask, pixels=base, marked=marked)
    both = encoded(Image.fromarray(_slope()), exif=held_as(6)), encoded(_through(_marked()), exif=held_as(6))
    yield Case("both held as 6", *both, pixels=upright[6](_slope()), marked=upright[6](_marked()))
    yield Case("image held as 6, its mask not", both[0], hole(), frozenset({INVALID}), "mask")
    for value in (0, 9, 65_535):
        yield _right(f"held as {value}", encoded(Image.fromarray(_slope()), exif=held_as(value)), _slope())
    for number, exif in enumerate(
        (b"Exif\0\0" + bytes(20), b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + bytes(90), b"x" * 99)
    ):
        file = encoded(Image.fromarray(_slope()), "WEBP", lossless=True, exif=exif)
        yield _right(f"EXIF that is none {number}", file, _slope())


def with_profiles() -> Iterator[Case]:
    """What belongs to the picture stays with it, and what makes no sense does not."""
    for name, icc, kept in (
        ("small", profile(128), True),
        ("of 1,001 bytes", profile(1001), True),
        ("of 65,520 bytes", profile(65_520), True),
        ("of a megabyte", profile(2**20 - 100), True),
        ("of no bytes but one", b"x", False),
        ("of 127 bytes", profile(127, told=128), False),
        ("that is none", b"n" * 500, False),
        ("that says it is longer", profile(500, told=501), False),
        ("of CMYK", profile(500, b"CMYK"), False),
        ("of grey", profile(500, b"GRAY"), False),
        ("without its sign", profile(500, signature=b"psca"), False),
    ):
        more = {"profile": icc if kept else None, "profile_matters": True}
        image = Image.fromarray(_slope())
        yield _right(f"profile {name}", encoded(image, icc_profile=icc), _slope(), **more)
        if kept:
            file = encoded(image, "JPEG", quality=95, subsampling=0, icc_profile=icc)
            yield _right(f"JPEG with a profile {name}", file, _slope(), near=3, **more)
    large = encoded(Image.fromarray(_slope()), "WEBP", lossless=True, icc_profile=profile(3 * 2**20))
    yield _right("profile of 3 megabytes", large, _slope(), profile_matters=True)
    gone = encoded(Image.fromarray(_slope()).convert("CMYK"), "JPEG", quality=95, icc_profile=profile(500, b"CMYK"))
    yield _right("CMYK with its profile", gone, _slope(), near=3, profile_matters=True)


def sizes() -> Iterator[Case]:
    """At the edges of what is taken."""
    for width, height, code in (
        *((1, 20_000, INVALID), (20_000, 1, INVALID), (3, 25, INVALID), (9, 1, INVALID), (8, 65, INVALID)),
        *((1, 1, INVALID), (1, 8, INVALID), (3, 5, INVALID)),
        *((4, 4, None), (2, 16, None), (16, 2, None), (8, 64, None), (17, 131, None), (127, 16, None), (5, 4, None)),
    ):
        all_of_it = np.ones((height, width), np.bool_)
        mask = encoded(_through(all_of_it))
        small = width * height < 16 and max(width, height) <= 8 * min(width, height)
        case = Case(
            f"{width} x {height}", good("PNG", width, height), mask, frozenset({code}), "mask" if small else "image"
        )
        yield case if code else replace(case, pixels=_slope(width, height), marked=all_of_it)


def masks() -> Iterator[Case]:
    """Of another size, of another kind, without anything, and those that are well however they are stored."""
    for width, height in ((1, 1), (WIDTH, HEIGHT + 1), (WIDTH - 1, HEIGHT), (HEIGHT, WIDTH), (200, 160)):
        yield _bad_mask(f"mask of {width} x {height}", encoded(_through(np.ones((height, width), np.bool_))))
    plain = Image.new("L", (WIDTH, HEIGHT))
    plain.paste(255, HOLE)
    for kind, image in {"PNG": plain, "JPEG": plain, "WEBP": plain.convert("RGB")}.items():
        yield _bad_mask(f"{kind} mask without alpha", encoded(image, kind))
    nowhere = np.zeros((HEIGHT, WIDTH), np.bool_)
    yield _bad_mask("mask one cannot see through", encoded(_through(nowhere)))
    faint = np.full((HEIGHT, WIDTH, 4), 1, np.uint8)
    yield _bad_mask("mask one can nearly see through", encoded(Image.fromarray(faint)))
    yield _bad_mask("white mask that is black", encoded(Image.new("L", (WIDTH, HEIGHT))), mode="white")
    for count, code in ((1, INVALID), (15, INVALID), (16, None)):
        few = nowhere.copy()
        few.reshape(-1)[:count] = True
        case = _bad_mask(f"mask of {count} pixels", encoded(_through(few)), code)
        yield case if code else replace(case, pixels=_slope(), marked=few)
    yield from _good_masks(plain)
    yield from _holes()


def _good_masks(plain: Image.Image) -> Iterator[Case]:
    marked = _marked()
    wide = np.where(marked, 65_535, 0)[..., np.newaxis]
    clear = np.where(marked, 1, 0)[..., np.newaxis]
    black_and_white, trns = chunk(b"PLTE", bytes(3) + b"\xff" * 3), chunk(b"tRNS", b"\xff\0")
    grey = np.zeros((HEIGHT, WIDTH, 2), np.uint8)
    grey[..., 1] = np.where(marked, 0, 255)
    for name, mode, mask in (
        ("white", "white", encoded(plain)),
        ("white JPEG", "white", encoded(plain, "JPEG", quality=60)),
        ("white WebP", "white", encoded(plain.convert("RGB"), "WEBP", lossless=True)),
        ("white, of 1 bit", "white", stored_png(clear, 1, GREY)),
        ("white, of 16 bits", "white", stored_png(wide, 16, GREY)),
        ("white palette", "white", stored_png(clear, 1, PALETTE, black_and_white)),
        ("white RGBA", "white", encoded(plain.convert("RGBA"))),
        ("clear palette", "alpha", stored_png(clear, 1, PALETTE, black_and_white, trns)),
        ("clear palette of 8 bits", "alpha", stored_png(clear, 8, PALETTE, black_and_white, trns)),
        ("clear colour", "alpha", stored_png(clear, 8, GREY, chunk(b"tRNS", b"\0\x01"))),
        ("grey with alpha", "alpha", encoded(Image.fromarray(grey, "LA"))),
        ("clear WebP", "alpha", encoded(_through(marked), "WEBP", lossless=True)),
        ("clear WebP with loss", "alpha", encoded(_through(marked), "WEBP", quality=50)),
    ):
        yield Case(f"mask: {name}", good(), mask, mode=mode, pixels=_slope(), marked=marked)


def _holes() -> Iterator[Case]:
    """Images that are their own masks, or should be."""
    seen = np.dstack((_slope(), np.where(_marked(), 0, 255).astype(np.uint8)))
    for kind in ("PNG", "WEBP"):
        options = {} if kind == "PNG" else {"lossless": True, "exact": True}
        file = encoded(Image.fromarray(seen), kind, **options)
        yield Case(f"{kind} with a hole", file, None, pixels=seen, marked=_marked())
    for name, file in {"PNG": good(), "JPEG": good("JPEG"), "PNG that is faint": stored_png(seen | 1, 8, RGBA)}.items():
        yield Case(f"{name} without a hole", file, None, frozenset({INVALID}), "mask")
    tiny = np.dstack((_slope(), np.full((HEIGHT, WIDTH), 255, np.uint8)))
    tiny[0, :3, 3] = 0
    yield Case("a hole of 3 pixels", stored_png(tiny, 8, RGBA), None, frozenset({INVALID}), "image")


def animations() -> Iterator[Case]:
    """More than one picture."""
    frames = [Image.new("RGBA", (WIDTH, HEIGHT), colour) for colour in ("red", "#00800000", "blue")]
    moving = {"save_all": True, "append_images": frames[1:]}
    files = {"WebP": encoded(frames[0], "WEBP", **moving), "PNG": encoded(frames[0], "PNG", **moving)}
    for name, file in files.items():
        yield _refused(f"animated {name}", file, LARGE)
        yield _bad_mask(f"animated {name} as mask", file, LARGE)
    yield _refused("animated GIF", gif(1000))
    head = chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    yield _refused("PNG that says it has 2^31 frames", _with(head), LARGE, INVALID, None)
    two = encoded(Image.fromarray(_slope()), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))], quality=95)
    yield _right("JPEG with another behind it", two, _slope(), near=3)
    yield _refused(
        "a colour picture for a mask of another", picture(WIDTH, HEIGHT), INVALID, mask=picture(9, 9), param="mask"
    )

"""What is done to an image and its mask before a model paints, and after: every step a function of its own.

It refuses to change a pixel that the mask does not cover, and to hold a large image more often than it must.
"""

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from forebay.engines.fence import Refused
from forebay.engines.image_formats import on_white
from forebay.pixels import RGB_BYTES, Size

MASK_SIZE, MASK_NO_ALPHA, MASK_EMPTY, MASK_TOO_SMALL, MASK_TOO_LARGE = 8, 9, 10, 11, 12
_WHITE_MIN = 128
_BAND_PIXELS = 2**19
_COUNTED_PIXELS = 2**22

Bits = NDArray[np.uint8]
"""1 where something holds, else 0."""


class Unfit(Refused):
    """There will be nothing of it, for a reason that has figures."""

    def __init__(self, verdict: int, **facts: Any) -> None:
        super().__init__(verdict)
        self.facts = facts


@dataclass(frozen=True, slots=True)
class MaskPlan:
    """How a mask is read and cleaned up: spots of at most `specks` pixels are dropped, the rest grows by `dilation`.

    `feather` is the width of the seam, inside what it has grown to.
    """

    mode: Literal["alpha", "white"] = "alpha"
    specks: int = 0
    dilation: int = 0
    feather: int = 0


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much of an image a mask may cover once it is cleaned up."""

    pixels_min: int = 1
    coverage_max: float = 1.0


@dataclass(frozen=True, slots=True)
class Weights:
    """How much of each pixel is painted, 255 for all of it. Outside of `values`, which begin at `left` and `top`: nothing."""

    size: Size
    left: int
    top: int
    values: NDArray[np.uint8]


def chosen(mask: Image.Image, mode: str) -> Bits:
    """Where a mask says that something is to change. Raises Unfit."""
    has_alpha = mask.mode == "RGBA"
    if mode == "alpha":
        if not has_alpha:
            raise Unfit(MASK_NO_ALPHA)
        return transparent(mask)
    bits = (np.asarray(mask.convert("L")) >= _WHITE_MIN).view(np.uint8)
    if has_alpha:
        bits &= np.asarray(mask.getchannel("A")) >= _WHITE_MIN
    return bits


def transparent(image: Image.Image) -> Bits:
    """Where one sees through it entirely."""
    if image.mode != "RGBA":
        return np.zeros((image.height, image.width), np.uint8)
    unseen: Bits = (np.asarray(image.getchannel("A")) == 0).view(np.uint8)
    return unseen


def cleaned(bits: Bits, plan: MaskPlan, bounds: Bounds) -> Weights:
    """The mask as pixels are put together by. Raises Unfit for one that is empty, too small or too large."""
    size = Size(bits.shape[1], bits.shape[0])
    left, top, bits = _cropped(bits, plan.dilation + 1)
    if plan.specks:
        bits = without_specks(bits, plan.specks)
    if plan.dilation:
        bits = grown(bits, plan.dilation)
    pixels = int(np.count_nonzero(bits))
    if pixels < bounds.pixels_min:
        raise Unfit(MASK_TOO_SMALL, pixels=pixels)
    if pixels > bounds.coverage_max * size.pixels:
        raise Unfit(MASK_TOO_LARGE, coverage=round(pixels / size.pixels, 4))
    values = feathered(bits, plan.feather) if plan.feather else bits * np.uint8(255)
    return Weights(size, left, top, values)


def _cropped(bits: Bits, margin: int) -> tuple[int, int, Bits]:
    """The part of a mask that is not empty, with a margin where there is room: most masks are small."""
    rows, columns = np.flatnonzero(bits.any(axis=1)), np.flatnonzero(bits.any(axis=0))
    if not rows.size:
        raise Unfit(MASK_EMPTY)
    top, bottom = max(0, int(rows[0]) - margin), int(rows[-1]) + 1 + margin
    left, right = max(0, int(columns[0]) - margin), int(columns[-1]) + 1 + margin
    return left, top, np.ascontiguousarray(bits[top:bottom, left:right])


def without_specks(bits: Bits, area: int) -> Bits:
    """The same without spots of at most `area` pixels; pixels that touch at a corner are one spot."""
    count, labels = cv2.connectedComponents(bits, connectivity=8)
    flat = labels.reshape(-1)
    areas = np.zeros(count, np.int64)
    for start in range(0, flat.size, _COUNTED_PIXELS):  # counting takes 8 bytes for each
        areas += np.bincount(flat[start : start + _COUNTED_PIXELS], minlength=count)
    kept: Bits = (areas > area).view(np.uint8)
    kept[0] = 0
    left: Bits = kept[labels]
    return left


def grown(bits: Bits, by: int) -> Bits:
    """With every pixel that is at most `by` away."""
    if bits.all():
        return bits
    return (_to_nearest_zero(1 - bits) <= by).view(np.uint8)


def feathered(bits: Bits, width: int) -> NDArray[np.uint8]:
    """Weights that rise from the rim inwards over `width` pixels; outside, and at the edge of the image, no seam is needed."""
    if bits.all():
        return np.full_like(bits, 255)
    slope = _to_nearest_zero(bits)
    slope *= np.float32(255 / (width + 1))
    slope += np.float32(0.5)
    np.minimum(slope, np.float32(255), out=slope)
    return slope.astype(np.uint8)


def _to_nearest_zero(bits: Bits) -> NDArray[np.float32]:
    found: NDArray[np.float32] = cv2.distanceTransform(bits, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return found


def covering(weights: Weights, to: Size) -> bytes:
    """The mask in the size of what is painted: 255 wherever a pixel of it reaches one that counts, else 0."""
    bits = np.zeros((weights.size.height, weights.size.width), np.uint8)
    height, width = weights.values.shape
    bits[weights.top : weights.top + height, weights.left : weights.left + width] = weights.values > 0
    bits = _covering(_covering(bits, to.height).T, to.width).T
    return (bits * np.uint8(255)).tobytes()


def _covering(bits: Bits, rows: int) -> Bits:
    """The same in so many rows, each the most of all that it stands for."""
    before = bits.shape[0]
    if before == rows:
        return bits
    number = np.arange(rows, dtype=np.int64)
    spans = np.empty(2 * rows, np.int64)
    spans[::2] = number * before // rows
    spans[1::2] = -(-(number + 1) * before // rows)
    with_end = np.concatenate((bits, np.zeros((1, bits.shape[1]), np.uint8)))  # spans end before a row that exists
    return np.maximum.reduceat(with_end, spans, axis=0)[::2]


def shown(image: Image.Image, to: Size, *, hidden: bool = False) -> Image.Image:
    """What a model is given of an image: RGB, on white where one can see through it.

    With `hidden` it is the colours that are stored there: what is to be painted over is wanted, not its paper.
    """
    if hidden and image.mode == "RGBA":
        image = image.convert("RGB")
    return on_white(resized(image, to))


def resized(image: Image.Image, to: Size) -> Image.Image:
    """The same in another size."""
    wanted = (to.width, to.height)
    return image if image.size == wanted else image.resize(wanted, Image.Resampling.LANCZOS)


def canvas(data: bytes, size: Size) -> Image.Image:
    """What an engine has painted. Raises ValueError for another number of bytes."""
    if len(data) != size.pixels * RGB_BYTES:
        raise ValueError(size)
    return Image.frombytes("RGB", (size.width, size.height), data)


def put_in(image: Image.Image, painted: Image.Image, weights: Weights) -> None:
    """Put what was painted, in whatever size, into an image where the mask says so, band after band.

    What is painted over hides what is behind it, however little it weighs.
    """
    height, width = weights.values.shape
    rows = max(1, _BAND_PIXELS // width)
    columns = _columns(painted, weights)
    for first in range(0, height, rows):
        part = weights.values[first : first + rows]
        if not part.any():
            continue
        top, bottom = weights.top + first, weights.top + first + part.shape[0]
        box = (weights.left, top, weights.left + width, bottom)
        new = np.asarray(_rows(columns, weights.size.height, top, bottom))
        image.paste(Image.fromarray(blended(np.asarray(image.crop(box)), new, part)), box)


def _columns(painted: Image.Image, weights: Weights) -> Image.Image:
    """The columns of what was painted that are wanted, as many as the image has there."""
    left, right = weights.left, weights.left + weights.values.shape[1]
    if painted.width == weights.size.width:
        return painted.crop((left, 0, right, painted.height))
    scale = painted.width / weights.size.width
    box = (left * scale, 0, min(right * scale, painted.width), painted.height)
    return painted.resize((right - left, painted.height), Image.Resampling.LANCZOS, box=box)


def _rows(columns: Image.Image, height: int, top: int, bottom: int) -> Image.Image:
    """Rows of it, were it as high as `height`."""
    if columns.height == height:
        return columns.crop((0, top, columns.width, bottom))
    scale = columns.height / height
    box = (0, top * scale, columns.width, min(bottom * scale, columns.height))
    return columns.resize((columns.width, bottom - top), Image.Resampling.LANCZOS, box=box)


def blended(old: NDArray[np.uint8], new: NDArray[np.uint8], weights: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`old` (RGB or RGBA) where nothing weighs, `new` (RGB) where all does, and what is between in between.

    Of an old pixel as much counts as can be seen of it; a new one is never seen through.
    """
    share = weights[..., np.newaxis].astype(np.uint32)
    of_old = 255 - share
    if old.shape[2] == RGB_BYTES:
        return ((old * of_old + new * share + 127) // 255).astype(np.uint8)
    of_old *= old[..., 3:]
    share *= 255
    whole = np.maximum(of_old + share, 1)
    colours = (old[..., :3] * of_old + new * share + whole // 2) // whole
    made = np.concatenate((colours, np.full_like(share, 255)), axis=2).astype(np.uint8)
    return np.where(weights[..., np.newaxis] > 0, made, old)

"""Fills holes in a picture from what is around them, with OpenCV: fast marching (Telea) or Navier-Stokes.

It refuses to look at more than the surroundings of a hole, and to begin a step that takes longer than a few seconds: nothing
can break one off. A hole for which that does not suffice is filled at a smaller scale.
"""

from collections.abc import Iterator

import cv2
import numpy as np
import numpy.typing as npt

from forebay.engines.serving import OutOfMemory
from forebay.engines.threads import Unwanted, Wanted

Array = npt.NDArray[np.uint8]
Box = tuple[slice, slice]
Chosen = npt.NDArray[np.bool_]

_METHODS = {"telea": cv2.INPAINT_TELEA, "ns": cv2.INPAINT_NS}
METHODS = frozenset(_METHODS)

_BLOCK = 64  # holes that are nearer to each other belong together
_MARGIN = 8  # around a hole, beside the radius: fronts that come from further away do not matter
_STEP_COST_MAX = 25_000_000  # in looks at pixels: some seconds
_FIXED_COST = 3  # of each pixel, in looks at others
_SHRINK = 1.2


def fill(image: Array, mask: Array, method: str, radius: float, wanted: Wanted) -> tuple[Array, bool]:
    """`image` with everything new where `mask` is not 0, and whether some of it was filled at a smaller scale.

    Raises Unwanted when nobody waits any more, and OutOfMemory.
    """
    filled, shrunk = image.copy(), False
    try:
        for box, hole in _holes(mask, round(radius) + _MARGIN):
            if wanted.gone:
                raise Unwanted
            new, smaller = _fill_box(np.ascontiguousarray(image[box]), mask[box], method, radius)
            filled[box][hole] = new[hole]
            shrunk |= smaller
    except cv2.error as error:
        if error.code != cv2.Error.StsNoMem:
            raise
        raise OutOfMemory from None
    return filled, shrunk


def _holes(mask: Array, margin: int) -> Iterator[tuple[Box, Chosen]]:
    """Each hole with its surroundings: where that is, and which pixels of it are of the hole."""
    height, width = mask.shape
    rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
    padded = np.zeros((rows * _BLOCK, columns * _BLOCK), np.uint8)
    padded[:height, :width] = mask
    blocks = padded.reshape(rows, _BLOCK, columns, _BLOCK).max(axis=(1, 3))
    _, labels, found, _ = cv2.connectedComponentsWithStats((blocks > 0).astype(np.uint8), connectivity=8)
    for label, (left, top, wide, high, _) in list(enumerate(found))[1:]:
        mine = np.kron(labels[top : top + high, left : left + wide] == label, np.ones((_BLOCK, _BLOCK), np.bool_))
        y, x = int(top) * _BLOCK, int(left) * _BLOCK
        mine = mine[: height - y, : width - x] & (mask[y : y + len(mine), x : x + mine.shape[1]] > 0)
        below, beside = np.flatnonzero(mine.any(axis=1)), np.flatnonzero(mine.any(axis=0))
        box = _around(y, below, margin, height), _around(x, beside, margin, width)
        hole = np.zeros((box[0].stop - box[0].start, box[1].stop - box[1].start), np.bool_)
        inner = mine[below[0] : below[-1] + 1, beside[0] : beside[-1] + 1]
        down, right = y + int(below[0]) - box[0].start, x + int(beside[0]) - box[1].start
        hole[down : down + inner.shape[0], right : right + inner.shape[1]] = inner
        yield box, hole


def _around(begin: int, places: npt.NDArray[np.intp], margin: int, length: int) -> slice:
    return slice(max(0, begin + int(places[0]) - margin), min(length, begin + int(places[-1]) + 1 + margin))


def _fill_box(image: Array, mask: Array, method: str, radius: float) -> tuple[Array, bool]:
    """One step. What else is masked nearby is no surroundings either."""
    scale = _scale(int(np.count_nonzero(mask)), radius)
    if scale == 1:
        return _inpaint(image, mask, method, radius), False
    height, width = mask.shape
    size = max(1, round(width / scale)), max(1, round(height / scale))
    small_mask = (cv2.resize((mask > 0).astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0).astype(np.uint8)
    small = _inpaint(cv2.resize(image, size, interpolation=cv2.INTER_AREA), small_mask, method, max(1, radius / scale))
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8), True


def _scale(pixels: int, radius: float) -> float:
    """By how much a hole has to be smaller to be filled in one step."""
    scale = 1.0
    while pixels / scale**2 * (max(1, radius / scale) ** 2 + _FIXED_COST) > _STEP_COST_MAX:
        scale *= _SHRINK
    return scale


def _inpaint(image: Array, mask: Array, method: str, radius: float) -> Array:
    return np.asarray(cv2.inpaint(image, np.ascontiguousarray(mask), radius, _METHODS[method]), np.uint8)

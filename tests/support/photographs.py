"""A photograph for tests that look at pictures, scratches to put on it, and how near a picture comes to another."""

from functools import cache

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from tests.support.models import pulled

Array = npt.NDArray[np.uint8]

_SCRATCHES = 20


@cache
def cat() -> Array:
    """Chelsea, with fur and whiskers: RGB, 451 x 300, by Stéfan van der Walt and in the public domain."""
    path = pulled(
        "pypi:scikit-image==0.26.0/skimage/data/chelsea.png",
        "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    )
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def scratches(height: int, width: int, seed: int) -> Array:
    """A mask of twenty scratches, two to four pixels wide, each from somewhere to somewhere."""
    chance, mask = np.random.default_rng(seed), np.zeros((height, width), np.uint8)
    for _ in range(_SCRATCHES):
        one, two = ((int(chance.integers(width)), int(chance.integers(height))) for _ in range(2))
        cv2.line(mask, one, two, 255, int(chance.integers(2, 5)))
    return mask


def psnr(one: Array, two: Array) -> float:
    """Peak signal to noise in decibels."""
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - two.astype(float)) ** 2)))

"""Photographs for tests that look at pictures, from the wheel of scikit-image."""

from functools import cache
from pathlib import Path

from tests.support.models import pulled

_DATA = "pypi:scikit-image==0.26.0/skimage/data"


@cache
def cat() -> Path:
    """Chelsea, with fur and whiskers: PNG, RGB, 451 x 300, by Stéfan van der Walt and in the public domain."""
    return pulled(f"{_DATA}/chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb")

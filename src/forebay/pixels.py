"""The nouns of pictures that every room shares: a size in pixels, and what a model is given of it.

It holds values and arithmetic alone, and refuses to know formats and libraries of images.
"""

from dataclasses import dataclass

RGB_BYTES = 3  # of one pixel as engines are given it, and give it: red, green, blue, row after row from the top
MASK_BYTES = 1  # of one pixel of a mask: 255 where there is to be something new, else 0


@dataclass(frozen=True, slots=True)
class Size:
    """Pixels."""

    width: int
    height: int

    @property
    def pixels(self) -> int:
        """How many there are in all."""
        return self.width * self.height


def fit(size: Size, edge_max: int, factor: int) -> Size:
    """What a model is given of an image of `size`: no side longer than `edge_max`, each a multiple of `factor`."""
    scale = min(1.0, edge_max / max(size.width, size.height))
    width, height = (max(factor, int(side * scale) // factor * factor) for side in (size.width, size.height))
    return Size(width, height)

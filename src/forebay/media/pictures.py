"""The one way of an image to a model that paints, and of what it paints back into the image.

It refuses local paths, every scheme but `data:`, http and https, hosts that the settings do not name, and to decode
anything in this process; no engine ever sees an address, a file format, or what it is not asked to change.
"""

from dataclasses import dataclass, field

from forebay.dialects.imaging import ImageTask, Painted
from forebay.media.spool import Spool
from forebay.pixels import Size


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of a request as they were sent, on the disk. The mask is that of the first image."""

    images: tuple[Spool, ...] = ()
    mask: Spool | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What an engine is given. `size` is that of what it is to paint, and of the first image and its mask.

    `data` is every image as RGB, one after the other, and then the mask, if there is one.
    """

    size: Size
    image_sizes: tuple[Size, ...] = ()
    has_mask: bool = False
    data: bytes = field(default=b"", repr=False)


class Pictures:
    """Makes requests ready for engines, and answers of what they paint. Shared by both doors and the lines of batches."""

    async def prepare(self, inputs: Inputs, task: ImageTask) -> Prepared:
        """What the engine is given for `task`."""
        raise NotImplementedError

    async def finish(self, inputs: Inputs, task: ImageTask, size: Size, pixels: bytes, *, preview: bool) -> Painted:
        """The picture as its caller gets it; `used` is left empty."""
        raise NotImplementedError

"""The two orders about images: make them ready for a model, and put what it has painted where it belongs.

It refuses whatever is wrong with an image or its mask before a model is asked, and to remember anything from one order to
the other: both decode the same files by the same steps.
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
from PIL import Image

from forebay.engines.descriptors import Sink, Source
from forebay.engines.fence import Refused
from forebay.engines.image_formats import Decoded, Limits, decode, opened
from forebay.engines.image_output import OutputPlan, encode, preview, size_of
from forebay.engines.image_steps import (
    MASK_EMPTY,
    MASK_SIZE,
    Bits,
    Bounds,
    MaskPlan,
    Unfit,
    Weights,
    canvas,
    chosen,
    cleaned,
    covering,
    put_in,
    resized,
    shown,
    transparent,
)
from forebay.pixels import Size, fit

NO_MASK, NO_ROOM = 7, 15

Tell = Callable[[Mapping[str, Any]], None]
"""Is told facts, each time all that are known; the last of them are those of the answer."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What images, masks and orders may be and cost."""

    pixels_max: int
    ratio_max: float
    mask_pixels_min: int
    mask_coverage_max: float
    preview_pixels: int
    memory_bytes_max: int
    seconds_max: int

    @property
    def limits(self) -> Limits:
        """What one image may be."""
        return Limits(self.pixels_max, self.ratio_max)


@dataclass(frozen=True, slots=True)
class Order:
    """Files and what is to be done with them; `head` is as the server has sent it."""

    head: Mapping[str, Any]
    images: tuple[int, ...]
    mask: int | None
    painted: int | None
    out: int

    @property
    def mask_plan(self) -> MaskPlan:
        """How the mask is read and cleaned up."""
        return MaskPlan(**self.head["mask_plan"])

    @property
    def output(self) -> OutputPlan:
        """How the picture is written."""
        plan = dict(self.head["output"])
        return OutputPlan(**{**plan, "size": Size(*plan["size"]) if plan["size"] else None})


def read_order(head: bytes, descriptors: list[int]) -> Order:
    """An order and its files. Raises ValueError where these are not as many as it names."""
    told = json.loads(head)
    count, has_mask, finishing = told["images"], bool(told["mask"]), told["order"] == "finish"
    if len(descriptors) != count + has_mask + finishing + 1:
        raise ValueError(count)
    rest = iter(descriptors[count:])
    mask = next(rest) if has_mask else None
    painted = next(rest) if finishing else None
    return Order(told, tuple(descriptors[:count]), mask, painted, next(rest))


def warm_up() -> None:
    """Load what is loaded at the first use: a child can import nothing, and has no threads."""
    cv2.setNumThreads(1)
    Image.preinit()
    limits, size = Limits(256, 1.0), Size(16, 16)
    for name in ("png", "jpeg", "webp"):
        file = io.BytesIO()
        encode(Image.new("RGBA", (16, 16)), OutputPlan(name), b"profile", file)
        file.seek(0)
        image = decode(file, limits).pixels
        bits = transparent(Image.new("RGBA", (16, 8))).repeat(2, axis=0)
        bits[4:12, 4:12] = 1
        weights = cleaned(bits, MaskPlan(specks=1, dilation=1, feather=1), Bounds())
        put_in(image, shown(image, Size(8, 8)), weights)
        covering(weights, size)
        preview(image, 8, None, file)


def carry_out(order: Order, settings: Settings, tell: Tell) -> None:
    """Do what is ordered. Raises Refused, and whatever Pillow raises for a damaged image."""
    work = _finish if order.head["order"] == "finish" else _prepare
    try:
        work(order, settings, tell)
    except Unfit as unfit:
        tell({"file": "image" if order.mask is None else "mask", "number": 0, **unfit.facts})
        raise


def _prepare(order: Order, settings: Settings, tell: Tell) -> None:
    head, out = order.head, Sink(order.out, NO_ROOM)
    first, weights = _first(order, settings, tell)
    tell({"file": "output"})
    size_of(first.size, order.output, settings.memory_bytes_max)
    sizes = [fit(first.size, head["edge_max"], head["edge_factor"])]
    out.write(shown(first.pixels, sizes[0], hidden=weights is not None and order.mask is None).tobytes())
    del first
    for number, image in enumerate(order.images[1:], 1):
        tell({"file": "image", "number": number})
        further = decode(Source(image), settings.limits)
        sizes.append(fit(further.size, head["edge_max"], head["edge_factor"]))
        out.write(shown(further.pixels, sizes[-1]).tobytes())
    if weights is not None:
        out.write(covering(weights, sizes[0]))
    wire = [[size.width, size.height] for size in sizes]
    tell({"size": wire[0], "images": wire, "mask": weights is not None})


def _finish(order: Order, settings: Settings, tell: Tell) -> None:
    out = Sink(order.out, NO_ROOM)
    picture, profile = _finished(order, settings, tell)
    tell({})
    encode(picture, order.output, profile, out)
    picture_bytes = out.bytes
    if order.head["preview"]:
        preview(picture, settings.preview_pixels, profile, out)
    tell({"size": list(picture.size), "picture": picture_bytes, "preview": out.bytes - picture_bytes})


def _finished(order: Order, settings: Settings, tell: Tell) -> tuple[Image.Image, bytes | None]:
    """The picture in its final size, and its profile."""
    assert order.painted is not None
    painted = canvas(Source(order.painted).read(), Size(*order.head["painted"]))
    if not order.images:
        return resized(painted, order.output.size or Size(*painted.size)), None
    first, weights = _first(order, settings, tell)
    size = size_of(first.size, order.output, settings.memory_bytes_max)
    if weights is None:
        return resized(painted, size), first.profile
    put_in(first.pixels, painted, weights)
    return resized(first.pixels, size), first.profile


def _first(order: Order, settings: Settings, tell: Tell) -> tuple[Decoded, Weights | None]:
    """The image that is edited, and its mask where there is one. Raises Refused."""
    limits, plan = settings.limits, order.mask_plan
    bounds = Bounds(settings.mask_pixels_min, settings.mask_coverage_max)
    weights = None
    if order.mask is not None:
        bits = _mask(order, order.mask, limits, tell)
        weights = cleaned(bits, plan, bounds)  # before there is a whole image beside it
        del bits
    tell({"file": "image", "number": 0})
    first = decode(Source(order.images[0]), limits)
    if weights is not None and weights.size != first.size:
        raise _other_size(first.size, weights.size)
    if order.mask is None and order.head["needs_mask"]:
        bits = transparent(first.pixels)
        if not bits.any():
            raise Refused(NO_MASK)
        weights = cleaned(bits, plan, bounds)
    return first, weights


def _mask(order: Order, mask: int, limits: Limits, tell: Tell) -> Bits:
    """Where a mask of its own says that something is to change."""
    tell({"file": "image", "number": 0})
    size = Size(*opened(Source(order.images[0]), limits).size)
    tell({"file": "mask"})
    bits = chosen(decode(Source(mask), limits).pixels, order.mask_plan.mode)
    found = Size(bits.shape[1], bits.shape[0])
    if sorted((found.width, found.height)) != sorted((size.width, size.height)):  # one of them may lie on its side
        raise _other_size(size, found)
    if not bits.any():
        raise Unfit(MASK_EMPTY)
    return bits


def _other_size(image: Size, mask: Size) -> Unfit:
    return Unfit(MASK_SIZE, sizes=[[image.width, image.height], [mask.width, mask.height]])

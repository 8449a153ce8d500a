"""The cutting out and putting together of images, a few at once, by programs that are handed descriptors.

It refuses to decode anything itself, and to believe a program further than that its facts fit what it has written.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from forebay.blobs.disk import in_thread
from forebay.clock import Clock
from forebay.config import ImageSettings
from forebay.dialects.imaging import ImageTask
from forebay.errors import ForebayError, InsufficientStorage, InvalidRequest, ServerError
from forebay.media.medium import IMAGE, MASK
from forebay.media.private_file import PrivateFile
from forebay.media.programs import Places, Programs, SocketProgram, connect
from forebay.pixels import MASK_BYTES, RGB_BYTES, Size

_HEAD = struct.Struct(">BI")
_FACTS_BYTES_MAX = 65_536
_FAILED = "The program that works on images failed. Try again."


class _Verdict(IntEnum):
    """What the program says; its own numbers."""

    OK = 0
    NOT_AN_IMAGE = 1
    BROKEN = 2
    TOO_MANY_PIXELS = 3
    TOO_MANY_FRAMES = 4
    TOO_COSTLY = 5
    TOO_NARROW = 6
    NO_MASK = 7
    MASK_SIZE = 8
    MASK_NO_ALPHA = 9
    MASK_EMPTY = 10
    MASK_TOO_SMALL = 11
    MASK_TOO_LARGE = 12
    OTHER_SHAPE = 13
    TOO_LONG_SIDE = 14
    NO_ROOM = 15


@dataclass(frozen=True, slots=True)
class Files:
    """What a program reads, as descriptors."""

    images: Sequence[int]
    mask: int | None


@dataclass(frozen=True, slots=True)
class Cut:
    """What it has made ready: images as RGB, the first of `size`, and then its mask if there is one."""

    size: Size
    image_sizes: tuple[Size, ...]
    has_mask: bool

    @property
    def bytes(self) -> int:
        """How many it has written."""
        mask = self.size.pixels * MASK_BYTES if self.has_mask else 0
        return sum(size.pixels for size in self.image_sizes) * RGB_BYTES + mask


@dataclass(frozen=True, slots=True)
class Made:
    """What it has put together, in bytes of the file that it has written: the picture, and then its preview."""

    size: Size
    picture_bytes: int
    preview_bytes: int


class Editor:
    """Prepares images for models, and finishes what they paint. Both take as long as their turn takes to come."""

    def __init__(self, settings: ImageSettings, clock: Clock) -> None:
        self._settings = settings
        self._places = Places(settings.prepares_at_once)
        self._programs = Programs(self._start, settings.prepare_seconds_max, _FAILED, clock)

    async def close(self) -> None:
        """End every program, whatever it is at, and start none."""
        await self._programs.close()

    async def prepare(self, files: Files, task: ImageTask, out: PrivateFile, *, patient: bool) -> Cut:
        """Write what a model is given into `out`.

        Raises InvalidRequest and PayloadTooLarge with the field of the image or the mask (`media_invalid`,
        `media_too_large`), InsufficientStorage, ServerError and ShuttingDown.
        """
        order = {
            **_order("prepare", files, task),
            "edge_max": task.rules.edge_max,
            "edge_factor": task.rules.edge_factor,
        }
        facts = await self._carry_out(order, files, task, None, out, patient=patient)
        try:
            cut = Cut(_size(facts["size"]), tuple(_size(each) for each in facts["images"]), bool(facts["mask"]))
        except (KeyError, TypeError, ValueError):
            raise ServerError(_FAILED) from None
        if cut.image_sizes[:1] != (cut.size,) or len(cut.image_sizes) != len(files.images):
            raise ServerError(_FAILED)
        await _check_bytes(cut.bytes, out)
        return cut

    async def finish(
        self, files: Files, task: ImageTask, painted: int, size: Size, out: PrivateFile, *, preview: bool, patient: bool
    ) -> Made:
        """Write the picture into `out`, and a preview if one is wanted. `painted` is RGB of `size`. Raises as `prepare`."""
        order = {
            **_order("finish", files, task),
            "painted": [size.width, size.height],
            "preview": preview,
        }
        facts = await self._carry_out(order, files, task, painted, out, patient=patient)
        try:
            made = Made(_size(facts["size"]), int(facts["picture"]), int(facts["preview"]))
        except (KeyError, TypeError, ValueError):
            raise ServerError(_FAILED) from None
        if made.picture_bytes < 1 or preview != bool(made.preview_bytes):
            raise ServerError(_FAILED)
        await _check_bytes(made.picture_bytes + made.preview_bytes, out)
        return made

    async def _carry_out(
        self,
        order: Mapping[str, Any],
        files: Files,
        task: ImageTask,
        painted: int | None,
        out: PrivateFile,
        *,
        patient: bool,
    ) -> Mapping[str, Any]:
        others = [each for each in (files.mask, painted) if each is not None]
        given = [*files.images, *others, out.writer]
        head = json.dumps(order).encode()
        async with self._places.one(patient=patient):
            answer = await self._programs.ask(lambda program: _answer(program, head, given, out))
        verdict, facts = (_Verdict.TOO_COSTLY, {}) if answer is None else answer
        if verdict != _Verdict.OK:
            raise _refusal(verdict, facts, task, self._settings)
        return facts

    async def _start(self) -> SocketProgram:
        settings = self._settings
        limits = {
            "pixels_max": settings.pixels_max,
            "ratio_max": settings.ratio_max,
            "mask_pixels_min": settings.mask_pixels_min,
            "mask_coverage_max": settings.mask_coverage_max,
            "preview_pixels": settings.preview_pixels,
            "memory_bytes_max": settings.prepare_memory_bytes_max,
            "seconds_max": settings.prepare_seconds_max,
        }
        return await connect("forebay.engines.image_work", limits)


def _order(name: str, files: Files, task: ImageTask) -> dict[str, Any]:
    size = task.output.size
    return {
        "order": name,
        "images": len(files.images),
        "mask": files.mask is not None,
        "needs_mask": task.rules.needs_mask,
        "mask_plan": asdict(task.mask_plan),
        "output": {**asdict(task.output), "size": None if size is None else [size.width, size.height]},
    }


async def _answer(
    program: SocketProgram, head: bytes, descriptors: Sequence[int], out: PrivateFile
) -> tuple[int, Mapping[str, Any]]:
    """Its verdict and facts. Raises OSError if it has ended, and ServerError if it talks nonsense."""
    os.ftruncate(out.writer, 0)  # another may have begun
    os.lseek(out.writer, 0, os.SEEK_SET)
    said = bytearray()
    async with aclosing(program.ask(struct.pack(">I", len(head)) + head, descriptors)) as pieces:
        async for piece in pieces:
            said += piece
            if len(said) < _HEAD.size:
                continue
            verdict, length = _HEAD.unpack_from(said)
            if length > _FACTS_BYTES_MAX:
                raise ServerError(_FAILED)
            if len(said) >= _HEAD.size + length:
                return verdict, _facts(bytes(said[_HEAD.size :]))
    raise ConnectionResetError


def _facts(said: bytes) -> Mapping[str, Any]:
    try:
        facts = json.loads(said)
    except ValueError:
        raise ServerError(_FAILED) from None
    if not isinstance(facts, dict):
        raise ServerError(_FAILED)
    return facts


def _size(told: Sequence[int]) -> Size:
    width, height = (int(side) for side in told)
    if width < 1 or height < 1:
        raise ValueError("no size of a picture")
    return Size(width, height)


async def _check_bytes(count: int, out: PrivateFile) -> None:
    """Raise ServerError unless so many were written."""
    if await in_thread(out.size) != count:
        raise ServerError(_FAILED)


def _refusal(verdict: int, facts: Mapping[str, Any], task: ImageTask, settings: ImageSettings) -> ForebayError:
    """What the caller is told, with the field that it is about."""
    try:
        error = _of_a_file(verdict, facts, settings) or _of_a_mask(verdict, facts, task, settings)
    except (KeyError, TypeError, ValueError):  # a refusal without its facts
        return ServerError(_FAILED)
    error = error or _of_the_rest(verdict)
    error.param = error.param or _param(facts, task)
    return error


def _of_a_file(verdict: int, facts: Mapping[str, Any], settings: ImageSettings) -> ForebayError | None:
    medium = MASK if facts.get("file") == "mask" else IMAGE
    match verdict:
        case _Verdict.NOT_AN_IMAGE:
            return medium.invalid("It is no PNG, JPEG or WebP.")
        case _Verdict.BROKEN:
            return medium.invalid("It is damaged.")
        case _Verdict.TOO_MANY_PIXELS:
            return medium.too_large(f"It has more than {settings.pixels_max} pixels. Scale it down.")
        case _Verdict.TOO_MANY_FRAMES:
            return medium.too_large("It is an animation. Send one frame.")
        case _Verdict.TOO_COSTLY:
            return medium.too_large("It takes too much time or memory to work on. Scale it down.")
        case _Verdict.TOO_NARROW:
            return medium.invalid(f"One of its sides is more than {settings.ratio_max:g} times as long as the other.")
        case _:
            return None


def _of_a_mask(verdict: int, facts: Mapping[str, Any], task: ImageTask, settings: ImageSettings) -> ForebayError | None:
    white = task.mask_plan.mode == "white" and facts.get("file") == "mask"
    marked = "white" if white else "transparent"
    match verdict:
        case _Verdict.NO_MASK:
            return InvalidRequest(
                "This model changes what a mask marks. Send one as `mask`, or an image that is transparent there.",
                param="mask",
                code="media_invalid",
            )
        case _Verdict.MASK_SIZE:
            image, mask = (f"{width}x{height}" for width, height in facts["sizes"])
            return MASK.invalid(f"It has {mask} pixels and its image {image}. Send one of the same size.")
        case _Verdict.MASK_NO_ALPHA:
            return MASK.invalid(
                "It has no alpha channel. Make transparent what is to change, or send `mask_mode` `white` for a mask "
                "that is white there."
            )
        case _Verdict.MASK_EMPTY:
            return MASK.invalid(f"Nothing of it is {marked}. Make {marked} what is to change.")
        case _Verdict.MASK_TOO_SMALL:
            return MASK.invalid(
                f"It marks {facts['pixels']} pixels, not counting specks, and at least {settings.mask_pixels_min} are needed."
            )
        case _Verdict.MASK_TOO_LARGE:
            return MASK.invalid(
                f"It marks {facts['coverage']:.1%} of the image, and at most {settings.mask_coverage_max:.1%} may be."
            )
        case _:
            return None


def _of_the_rest(verdict: int) -> ForebayError:
    match verdict:
        case _Verdict.OTHER_SHAPE:
            return InvalidRequest(
                "The `size` has another shape than the image. Leave it out, or keep the ratio of the sides.",
                param="size",
                code="invalid_value",
            )
        case _Verdict.TOO_LONG_SIDE:
            return InvalidRequest(
                "The format cannot hold a side that long. Ask for `png`, or for a smaller `size`.",
                param="output_format",
                code="invalid_value",
            )
        case _Verdict.NO_ROOM:
            return InsufficientStorage()
        case _:
            return ServerError(_FAILED)


def _param(facts: Mapping[str, Any], task: ImageTask) -> str | None:
    """The field that a file came in."""
    if facts.get("file") == "mask":
        return "mask" if task.mask is None else task.mask.param
    number = facts.get("number")
    if facts.get("file") != "image" or not isinstance(number, int):
        return None
    return image_param(task, number)


def image_param(task: ImageTask, number: int) -> str:
    """The field of the `number`-th image, the first being 0."""
    if task.images:
        return task.images[number].param if number < len(task.images) else "images"
    return "image" if number == 0 else f"image[{number}]"

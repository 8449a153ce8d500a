"""Works on a picture in three steps: made ready for the model, painted by it, and put together with what stays.

Both doors bring their own way to run a request to an engine, through a permit of its own. It refuses to let an engine
near what the mask does not cover, and to paint again what a job has finished before.
"""

import binascii
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from forebay import __version__
from forebay.clock import random_bytes
from forebay.dialects.imaging import ImageTask, Painted
from forebay.dialects.openai.call import Call
from forebay.dialects.speech import Records, part_body
from forebay.errors import EngineGarbled
from forebay.inference import Priority
from forebay.media.pictures import Inputs, Pictures, Prepared
from forebay.pixels import RGB_BYTES, Size

PREPARING = "preparing"
PAINTING = "painting"
FINISHING = "finishing"

SEED_MAX = 2**32 - 1
_HELD_BYTES_MAX = 64 * 2**20  # of pictures that one request to an engine paints, until they are finished

Compute = Callable[[Call], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Pixels:
    """A picture as an engine has painted it: RGB, row after row. `partial` counts those that are not finished, from 0."""

    image: int
    size: Size
    data: bytes = field(repr=False)
    partial: int | None = None
    used: Mapping[str, Any] = field(default_factory=dict)


class Listener(Protocol):
    """Who wants to know how it goes on."""

    def stage(self, stage: str, percent: float) -> None:
        """So much of a stage is done."""
        ...

    def step(self, image: int, step: int, steps: int) -> None:
        """An engine has finished `step` of `steps` of the `image`-th picture, the first being 0."""
        ...

    def partial(self, pixels: Pixels) -> None:
        """How a picture looks that is not finished."""
        ...

    async def kept(self, image: int, picture: Painted) -> None:
        """A picture is finished, and held by nobody else; nothing goes on before this returns."""
        ...


class Painter:
    """Owns nothing: everything is the caller's."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures

    async def prepare(self, call: Call, inputs: Inputs, *, preview: bool = False) -> "Painting":
        """Make what came with `call` ready, so that whatever is wrong with it is said before anything is computed.

        Raises what `Pictures.prepare` does.
        """
        task = call.picture
        assert task is not None, "only a call for a picture is worked on"
        prepared = await self._pictures.prepare(inputs, task, patient=_patient(call))
        return Painting(self._pictures, call, task, inputs, prepared, preview=preview)


class Painting:
    """The work on one request, made ready."""

    def __init__(
        self, pictures: Pictures, call: Call, task: ImageTask, inputs: Inputs, prepared: Prepared, *, preview: bool
    ) -> None:
        self._pictures = pictures
        self._call = call
        self._task = task
        self._inputs = inputs
        self._prepared = prepared
        self._preview = preview
        first = int.from_bytes(random_bytes(4), "big") if task.seed is None else task.seed
        self._seeds = [(first + number) % (SEED_MAX + 1) for number in range(task.n)]

    @property
    def pixel_bytes(self) -> int:
        """How much memory its pixels take, those that are given and those that are painted at once."""
        one = self._prepared.size.pixels * RGB_BYTES
        return len(self._prepared.data) + min(self._task.n * one, max(one, _HELD_BYTES_MAX))

    @property
    def pixel_steps(self) -> int:
        """What one of its pictures counts for: its pixels as they are painted, times the steps that are asked for."""
        return self._prepared.size.pixels * (self._task.steps or 1)

    async def run(
        self, compute: Compute, listener: Listener, done: Collection[int] = (), *, each_alone: bool = False
    ) -> None:
        """Every picture of the request but those that are `done`: `listener` keeps them, one after the other.

        With `each_alone` every picture is a request of its own to an engine, so that each is kept when it is finished;
        large ones are never asked for all at once.
        Raises whatever `compute`, `finish` and `listener.kept` do.
        """
        left = [image for image in range(self._task.n) if image not in done]
        at_once = 1 if each_alone else max(1, _HELD_BYTES_MAX // (self._prepared.size.pixels * RGB_BYTES))
        for images in (left[place : place + at_once] for place in range(0, len(left), at_once)):
            await self.paint(images, compute, listener)

    async def paint(self, images: Sequence[int], compute: Compute, listener: Listener) -> None:
        """The `images`-th pictures of the request, by one request to an engine. Raises what `run` does."""
        easel = _Easel(self._prepared.size, images, self._task, listener)
        listener.stage(PAINTING, 0.0)
        await compute(self._part(images, easel))
        for number, pixels in enumerate(easel.finished()):
            listener.stage(FINISHING, 100 * number / len(images))
            await listener.kept(pixels.image, await self.finish(pixels))

    async def finish(self, pixels: Pixels) -> Painted:
        """The picture as the caller gets it. Raises what `Pictures.finish` does."""
        request, task = self._call.request, self._task
        made = await self._pictures.finish(
            self._inputs,
            task,
            pixels.size,
            pixels.data,
            preview=self._preview and pixels.partial is None,
            patient=_patient(self._call),
        )
        used = {
            "model": request.model,
            "model_fingerprint": task.rules.fingerprint,
            "prompt": task.prompt,
            "negative_prompt": task.negative_prompt,
            "steps": task.steps,
            "guidance": task.guidance,
            "strength": task.strength,
            "seed": self._seeds[pixels.image],
            "width": pixels.size.width,
            "height": pixels.size.height,
            "output_compression": task.output.compression,
            "forebay_version": __version__,
        }
        if self._prepared.has_mask:
            used |= {f"mask_{name}": value for name, value in asdict(task.mask_plan).items()}
        told = {name: value for name, value in {**used, **pixels.used}.items() if value is not None}
        return replace(made, used=told)

    def _part(self, images: Sequence[int], easel: "_Easel") -> Call:
        """The request to the engine for the `images`-th pictures."""
        task, prepared = self._task, self._prepared
        header = {
            "prompt": task.prompt,
            "negative_prompt": task.negative_prompt,
            "steps": task.steps,
            "guidance": task.guidance,
            "strength": task.strength,
            "seeds": [self._seeds[image] for image in images],
            "reproducible": task.seed is not None,
            "partial_images": task.partial_images,
            "width": prepared.size.width,
            "height": prepared.size.height,
            "images": [{"width": size.width, "height": size.height} for size in prepared.image_sizes],
            "mask": prepared.has_mask,
        }
        request = replace(self._call.request, body=part_body(header, prepared.data))
        return replace(self._call, request=request, shape=Records(easel.take), stream=False)


def _patient(call: Call) -> bool:
    """Whether nobody waits for it at the front door."""
    return call.request.priority is Priority.BATCH


class _Easel:
    """Puts together the pictures of one request to an engine from the records that it sends."""

    def __init__(self, size: Size, images: Sequence[int], task: ImageTask, listener: Listener) -> None:
        self._size = size
        self._images = images
        self._task = task
        self._listener = listener
        self._canvases: dict[tuple[int, int | None], bytearray] = {}
        self._finished: dict[int, Pixels] = {}
        self._engine: dict[str, Any] = {}
        self._steps_done = dict.fromkeys(images, 0)

    def take(self, record: dict[str, Any]) -> None:
        """One record. Raises EngineGarbled, KeyError, TypeError and ValueError for what is none."""
        match record["type"]:
            case "step":
                self._step(self._image(record), _whole(record["step"]), _whole(record["steps"]))
            case "rows":
                self._rows(record)
            case "image":
                self._end(record)
            case "done":
                self._engine = dict(record.get("used", {}))
                if len(self._finished) != len(self._images):
                    raise EngineGarbled

    def finished(self) -> list[Pixels]:
        """All of them, in order."""
        return [replace(pixels, used={**self._engine, **pixels.used}) for _, pixels in sorted(self._finished.items())]

    def _image(self, record: Mapping[str, Any]) -> int:
        """Which picture of the whole request a record is about: an engine counts those of its own."""
        number = _whole(record["image"])
        if not 0 <= number < len(self._images):
            raise EngineGarbled
        return self._images[number]

    def _step(self, image: int, step: int, steps: int) -> None:
        if not 0 < step <= steps:
            raise EngineGarbled
        self._listener.step(image, step, steps)
        self._steps_done[image] = step
        self._listener.stage(PAINTING, 100 * sum(self._steps_done.values()) / (steps * len(self._images)))

    def _rows(self, record: Mapping[str, Any]) -> None:
        partial = None if record.get("partial") is None else _whole(record["partial"])
        if partial is not None and not 0 <= partial < self._task.partial_images:
            raise EngineGarbled
        image = self._image(record)
        canvas = self._canvases.setdefault((image, partial), bytearray())
        canvas += binascii.a2b_base64(record["pixels"], strict_mode=True)
        whole = self._size.pixels * RGB_BYTES
        if len(canvas) > whole:
            raise EngineGarbled
        if partial is not None and len(canvas) == whole:
            del self._canvases[image, partial]
            self._listener.partial(Pixels(image, self._size, bytes(canvas), partial))

    def _end(self, record: Mapping[str, Any]) -> None:
        image = self._image(record)
        canvas = self._canvases.pop((image, None), bytearray())
        if len(canvas) != self._size.pixels * RGB_BYTES or image in self._finished:
            raise EngineGarbled
        self._finished[image] = Pixels(image, self._size, bytes(canvas), used=dict(record.get("used", {})))


def _whole(value: object) -> int:
    """A number of something. Raises EngineGarbled."""
    if not isinstance(value, int):
        raise EngineGarbled
    return value

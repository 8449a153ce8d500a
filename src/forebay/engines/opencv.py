"""Holes in pictures filled by OpenCV, behind HTTP, in a process of its own.

It refuses to make pictures of nothing, to follow a prompt, and more than one image; it opens no files: it is given pixels.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import cv2
import numpy as np

from forebay.engines import reports
from forebay.engines.connection import Answer, Refused, Route, Visit
from forebay.engines.inpainting import METHODS, Array, fill
from forebay.engines.parted import flag, parted, whole
from forebay.engines.picture_records import done, ended, rows
from forebay.engines.reports import one_line
from forebay.engines.serving import OutOfMemory, Service, run
from forebay.engines.start import check_types, read_spec, refuse_to_start
from forebay.engines.threads import Threads, Wanted, all_ended, cores
from forebay.pixels import MASK_BYTES, RGB_BYTES, Size

_HEADER_BYTES_MAX = 2**20
_EDGE_MAX = 3840
_RADIUS_MAX = 32
_PICTURES_MAX = 10
_LIFE_SECONDS = 5.0
_NOTICE = "This model fills the mask from what is around it, and follows no prompt."
_SMALLER = "A large part of the mask was filled at a smaller scale."

_say = partial(reports.say, "opencv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How this engine is set up, from FOREBAY_ENGINE_SPEC."""

    name: str
    slots: int = 1
    method: str = "telea"
    radius: float = 3.0
    threads: int = 0
    edge_max: int = _EDGE_MAX

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(slots=True)
class _Figures:
    """Sums since the start."""

    requests: int = 0
    images: int = 0
    step_seconds: float = 0.0
    out_of_memory: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True)
class _Order:
    """What a request asks for: `count` times the same, since chance has no part in it."""

    count: int
    image: Array = field(repr=False)
    mask: Array = field(repr=False)


class Engine:
    """The routes. They run in the event loop, the work in threads."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._threads = Threads(spec.threads or cores())
        self._figures = _Figures()
        self._running = 0
        cv2.setNumThreads(1)  # what is parallel is the requests
        fill(np.zeros((32, 32, 3), np.uint8), np.eye(32, dtype=np.uint8), spec.method, spec.radius, Wanted())

    @property
    def routes(self) -> Mapping[tuple[str, str], Route]:
        """What this engine answers."""
        return {
            ("GET", "/slots"): self._slots,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/v1/images/edits"): self._edit,
        }

    async def _edit(self, visit: Visit) -> Answer:
        with self._noted(visit) as note:
            order = _read_order(visit.body, self._spec.edge_max)
            height, width = order.mask.shape
            note["width"], note["height"], note["masked"] = width, height, int(np.count_nonzero(order.mask))
            filled, shrunk = await self._filled(visit, order)
            pixels = filled.tobytes()
            for image in range(order.count):
                for record in rows(image, pixels, width):
                    visit.tell(record)
                    await visit.drained()
                visit.tell(ended(image))
            self._figures.images += order.count
        visit.tell(done(**self._used(), notices=[_NOTICE, *([_SMALLER] if shrunk else [])]))
        return b""

    async def _filled(self, visit: Visit, order: _Order) -> tuple[Array, bool]:
        """The work, with a sign of life every few seconds. Cancelled, it returns when the step at hand has ended."""
        wanted = Wanted()
        step = partial(fill, order.image, order.mask, self._spec.method, self._spec.radius, wanted)
        work = asyncio.ensure_future(self._threads.run(partial(self._timed, step), wanted))
        try:
            while not (await asyncio.wait([work], timeout=_LIFE_SECONDS))[0]:
                visit.tell(b"")
            return await work
        except (OutOfMemory, MemoryError):
            self._figures.out_of_memory += 1
            message = "This image needs more memory than there is. Send a smaller one."
            raise Refused(500, message, "out_of_memory", "server_error") from None
        finally:
            work.cancel()
            await all_ended([work])

    def _timed(self, step: partial[tuple[Array, bool]]) -> tuple[Array, bool]:
        begun = time.monotonic()
        try:
            return step()
        finally:
            self._figures.step_seconds += time.monotonic() - begun

    def _used(self) -> dict[str, Any]:
        return {
            "engine": "opencv",
            "engine_version": cv2.__version__,
            "pipeline": f"inpaint-{self._spec.method}",
            "radius": self._spec.radius,
            "dtype": "uint8",
            "device": "cpu",
        }

    @contextmanager
    def _noted(self, visit: Visit) -> Iterator[dict[str, Any]]:
        """Count a request, and say in the log how it has ended; what is put into the dictionary is said as well."""
        note: dict[str, Any] = {}
        begun, end = time.monotonic(), "cancelled"
        self._figures.requests += 1
        self._running += 1
        try:
            yield note
            end = "finished"
        except Refused as refused:
            end = "refused" if refused.status < 500 else "failed"
            note["reason"] = one_line(str(refused))
            raise
        finally:
            self._running -= 1
            self._figures.cancelled += end == "cancelled"
            more = "".join(f" {name}={value}" for name, value in note.items())
            _say(f"event={end} {visit.ids} path={visit.path} seconds={time.monotonic() - begun:.4f}{more}")

    async def _slots(self, visit: Visit) -> Answer:
        return reports.slots(self._spec.slots, self._running)

    async def _metrics(self, visit: Visit) -> Answer:
        return reports.metrics(asdict(self._figures), requests_running=self._running)


def _read_order(body: bytes, edge_max: int) -> _Order:
    """The body of a request. Raises Refused."""
    header, pixels = parted(body, _HEADER_BYTES_MAX)
    edge = whole(1, edge_max)
    size = Size(*(edge(side, header.get(side)) for side in ("width", "height")))
    if header.get("images") != [{"width": size.width, "height": size.height}]:
        raise Refused(400, "This model edits one image, of the size that is painted.", param="images")
    if not flag(header, "mask"):
        raise Refused(400, "This model fills in a mask. Send one.", param="mask")
    if len(pixels) != (RGB_BYTES + MASK_BYTES) * size.pixels:
        raise Refused(400, "There are other pixels than those that are told of.", param="images")
    seeds = header.get("seeds")
    if not isinstance(seeds, list) or not 0 < len(seeds) <= _PICTURES_MAX:
        raise Refused(400, f"`seeds` has to be a list of 1 to {_PICTURES_MAX} numbers.", param="seeds")
    both = np.frombuffer(pixels, np.uint8)
    image, mask = both[: RGB_BYTES * size.pixels], both[RGB_BYTES * size.pixels :]
    if mask.all():
        raise Refused(400, "The mask covers everything; there is nothing left to fill it from.", param="mask")
    shape = size.height, size.width
    return _Order(len(seeds), image.reshape(*shape, RGB_BYTES), mask.reshape(shape))


def main() -> None:
    """Serve until SIGTERM."""
    spec, key = read_spec(Spec, "The opencv engine")
    if spec.slots < 1 or spec.method not in METHODS:
        refuse_to_start(f"{spec.name} needs at least 1 slot, and a `method` of {' and '.join(sorted(METHODS))}.")
    if not 1 <= spec.radius <= _RADIUS_MAX or not 1 <= spec.edge_max <= _EDGE_MAX:
        refuse_to_start(
            f"{spec.name} needs a `radius` from 1 to {_RADIUS_MAX}, and an `edge_max` from 1 to {_EDGE_MAX}."
        )

    def load(loop: asyncio.AbstractEventLoop) -> Service:
        engine = Engine(spec)
        _say(f"event=ready model={spec.name}")
        return engine

    run(key, load)


if __name__ == "__main__":
    main()

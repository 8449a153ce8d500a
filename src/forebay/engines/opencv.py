"""Holes in pictures filled by OpenCV, behind HTTP, in a process of its own.

It refuses to make pictures of nothing, to follow a prompt, and more than one image; it opens no files: it is given pixels.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np

from forebay.engines import reports
from forebay.engines.connection import Answer, Refused, Route, Visit
from forebay.engines.diffusion_order import Order, Rules, read_order
from forebay.engines.inpainting import METHODS, Array, fill
from forebay.engines.picture_records import done, ended, rows
from forebay.engines.serving import OutOfMemory, Service, run
from forebay.engines.start import check_types, read_spec, refuse_to_start
from forebay.engines.threads import Threads, Wanted, all_ended, cores
from forebay.pipelines import EDIT
from forebay.pixels import RGB_BYTES

_EDGE_MAX = 3840
_RADIUS_MAX = 32
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

    pictures: int = 0
    paint_seconds: float = 0.0
    out_of_memory: int = 0


class Engine:
    """The routes. They run in the event loop, the work in threads."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._threads = Threads(spec.threads or cores())
        self._figures = _Figures()
        self._visits = reports.Visits("opencv")
        self._rules = _rules(spec.edge_max)
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
        with self._visits.noted(visit) as note:
            order = read_order(visit.body, self._rules, edits=True)
            image, mask = _pixels(order)
            height, width = mask.shape
            note["width"], note["height"], note["masked"] = width, height, int(np.count_nonzero(mask))
            filled, shrunk = await self._filled(visit, image, mask)
            pixels = filled.tobytes()
            for place in range(len(order.seeds)):  # chance has no part in it: they are all the same
                for record in rows(place, pixels, width):
                    visit.tell(record)
                    await visit.drained()
                visit.tell(ended(place))
            self._figures.pictures += len(order.seeds)
        visit.tell(done(**self._used(), notices=[_NOTICE, *([_SMALLER] if shrunk else [])]))
        return b""

    async def _filled(self, visit: Visit, image: Array, mask: Array) -> tuple[Array, bool]:
        """The work, with a sign of life every few seconds. Cancelled, it returns when the step at hand has ended."""
        wanted = Wanted()
        step = partial(fill, image, mask, self._spec.method, self._spec.radius, wanted)
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
            self._figures.paint_seconds += time.monotonic() - begun

    def _used(self) -> dict[str, Any]:
        return {
            "engine": "opencv",
            "engine_version": cv2.__version__,
            "pipeline": f"inpaint-{self._spec.method}",
            "radius": self._spec.radius,
            "dtype": "uint8",
            "device": "cpu",
        }

    async def _slots(self, visit: Visit) -> Answer:
        return reports.slots(self._spec.slots, self._visits.running)

    async def _metrics(self, visit: Visit) -> Answer:
        return reports.metrics({**asdict(self._figures), **self._visits.sums}, requests_running=self._visits.running)


def _rules(edge_max: int) -> Rules:
    return Rules(
        kinds=frozenset({EDIT}),
        strength_kinds=frozenset(),
        factor=1,
        edge_max=edge_max,
        steps=1,
        steps_max=1,
        guidance=None,
        guidance_max=0,
        strength=None,
        takes_negative=True,  # and it is not followed, as a prompt is not
        rounds_down=False,
    )


def _pixels(order: Order) -> tuple[Array, Array]:
    """The image and its mask. Raises Refused."""
    if order.image is None or order.mask is None:
        raise Refused(400, "This model fills in a mask. Send an image and one.", param="mask")
    height, width = order.settings.size.height, order.settings.size.width
    mask = np.frombuffer(order.mask, np.uint8).reshape(height, width)
    if mask.all():
        raise Refused(400, "The mask covers everything; there is nothing left to fill it from.", param="mask")
    return np.frombuffer(order.image, np.uint8).reshape(height, width, RGB_BYTES), mask


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

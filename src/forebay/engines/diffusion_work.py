"""Pictures that wait, and the one thread that paints them: in order of arrival, several at once where they have all but
prompt and seed in common.

It refuses to paint on for who has gone: a picture that waits is dropped at once, and a batch that nobody wants any more
stops after the step that is running. A picture that has to be the same every time is painted alone. Short of memory, it
paints the pictures of a batch one by one, then with ways to save memory, one more each time; they are kept for a cool-down.

All of it but the `stepped` and `partial` of a batch belongs to the event loop's thread.
"""

import asyncio
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from forebay.engines import reports
from forebay.engines.compute import Failed, StepFailed
from forebay.engines.diffusion_order import Order, Result, Row, Watch
from forebay.engines.lived import Lived
from forebay.engines.serving import OutOfMemory
from forebay.engines.threads import Threads, Unwanted, Wanted

_ALIVE_SECONDS = 2.0

_say = partial(reports.say, "diffusion")


class Easel(Protocol):
    """Who has asked for pictures and is told how they come along; the pictures are counted from 0."""

    def step(self, image: int, step: int, steps: int) -> None:
        """A step of a picture is done."""
        ...

    def rows(self, image: int, pixels: bytes, partial: int | None = None) -> None:
        """How a picture looks; `partial` counts those that are not finished."""
        ...

    def finished(self, image: int, steps: int, notices: Sequence[str]) -> None:
        """A picture is done, in so many steps; `notices` is what there is to say about it."""
        ...

    def alive(self) -> None:
        """Something is being computed."""
        ...


class Painter(Protocol):
    """What paints, in a thread."""

    @property
    def savings(self) -> Sequence[str]:
        """The ways in which it does with less memory now."""
        ...

    def paint(self, rows: Sequence[Row], watch: Watch) -> list[Result]:
        """The pictures of a batch. Raises OutOfMemory, StepFailed and Unwanted."""
        ...

    def save(self) -> str | None:
        """Do with less memory; the way in which, none where there is no other."""
        ...

    def spend(self, but: Sequence[str] = ()) -> None:
        """Do with as much memory as there was; `but` are savings that stay."""
        ...


@dataclass(slots=True)
class Figures:
    """What the metrics show; sums since the start."""

    requests: int = 0
    pictures: int = 0
    batches: int = 0
    steps: int = 0
    picture_steps: int = 0
    wait_seconds: float = 0.0
    paint_seconds: float = 0.0
    out_of_memory: int = 0
    savings: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass(slots=True)
class _Request:
    order: Order
    easel: Easel
    left: int
    since: float
    busy: int = 0
    gone: bool = False
    error: Exception | None = None
    savings: Sequence[str] | None = None
    """Those that were on before there was too little memory for one of its pictures alone."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    wait: float | None = None


@dataclass(slots=True, eq=False)
class _Picture:
    request: _Request
    image: int
    alone: bool = False
    short: bool = False  # of memory when it was tried before
    partials: int = 0  # that were told already, in case it is begun again

    @property
    def row(self) -> Row:
        return Row(self.request.order, self.request.order.seeds[self.image])


class Work:
    """The line of pictures and the thread. `seconds_max` is the longest that a step may take and still be a sign of life."""

    def __init__(self, painter: Painter, batch_images: int, cooldown_seconds: float, seconds_max: float) -> None:
        self.figures = Figures()
        self._lived = Lived()
        self._painter = painter
        self._batch_images = batch_images
        self._cooldown_seconds = cooldown_seconds
        self._seconds_max = seconds_max
        self._line: deque[_Picture] = deque()
        self._requests: list[_Request] = []
        self._batch: list[_Picture] = []
        self._moved = 0.0
        self._one_by_one = False
        self._saved_at = 0.0
        self._arrived = asyncio.Event()
        self._thread = Threads(1)
        self._loop = asyncio.get_running_loop()
        self._running = [asyncio.create_task(self._work()), asyncio.create_task(self._live())]
        for each in self._running:
            each.add_done_callback(_die)

    @property
    def waiting(self) -> int:
        """Pictures that are not begun."""
        return len(self._line)

    @property
    def painting(self) -> int:
        """Pictures that are painted now."""
        return len(self._batch)

    @property
    def savings(self) -> int:
        """Ways in which it does with less memory now."""
        return self._one_by_one + len(self._painter.savings)

    async def run(self, order: Order, easel: Easel) -> None:
        """Paint all pictures of a request. Cancelled, it returns when none is worked on for it. Raises Failed."""
        request = _Request(order, easel, len(order.seeds), self._lived.seconds())
        self._requests.append(request)
        self._line.extend(_Picture(request, image) for image in range(request.left))
        self._arrived.set()
        try:
            await self._until(request, lambda: not request.left or request.error is not None)
        finally:
            request.gone = True
            self._line = deque(each for each in self._line if each.request is not request)
            self.figures.cancelled += bool(request.left and request.error is None)
            try:
                await self._until(request, lambda: not request.busy, whatever=True)
            finally:  # it raises when whoever waits is cancelled again
                self._requests.remove(request)
        if request.error is not None:
            raise request.error

    async def _until(self, request: _Request, done: Callable[[], bool], *, whatever: bool = False) -> None:
        """Wait for a change of a request; `whatever` is for waiting on however often that is cancelled."""
        cancelled = False
        while not done():
            request.changed.clear()
            try:
                await request.changed.wait()
            except asyncio.CancelledError:
                if not whatever:
                    raise
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError

    async def _live(self) -> None:
        """Tell all who wait that something is computed, unless it takes longer than anything should; sleep by the clock."""
        while True:
            await self._lived.sleep(_ALIVE_SECONDS)
            if self._batch and self._lived.seconds() - self._moved <= self._seconds_max:
                for request in self._requests:
                    if not request.gone:
                        request.easel.alive()

    async def _work(self) -> None:
        while True:
            await self._recover()
            batch = self._take()
            if not batch:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            self._begin(batch)
            try:
                rows, watch = [each.row for each in batch], _Follower(self, batch, self._loop)
                results = await self._in_thread(partial(self._painter.paint, rows, watch))
            except OutOfMemory:
                await self._short(batch)
            except StepFailed as error:
                self._refused(batch, str(error))
            except Unwanted:
                pass
            else:
                self._finish(batch, results)
            finally:
                self._end(batch)

    def _take(self) -> list[_Picture]:
        """The next batch, out of line."""
        if not self._line:
            return []
        first = self._line.popleft()
        batch = [first]
        if not self._is_alone(first):
            settings = first.request.order.settings
            fit = [each for each in self._line if each.request.order.settings == settings and not self._is_alone(each)]
            batch += fit[: self._batch_images - 1]
            taken = set(map(id, batch))
            self._line = deque(each for each in self._line if id(each) not in taken)
        return batch

    def _is_alone(self, picture: _Picture) -> bool:
        return picture.alone or self._one_by_one or picture.request.order.reproducible

    def _begin(self, batch: list[_Picture]) -> None:
        self._batch, self._moved = list(batch), self._lived.seconds()
        self.figures.batches += 1
        for each in batch:
            request = each.request
            request.busy += 1
            if request.wait is None:
                request.wait = self._moved - request.since
                self.figures.wait_seconds += request.wait
                self.figures.requests += 1

    def _end(self, batch: list[_Picture]) -> None:
        """Nothing is computed for the batch any more."""
        for each in self._batch:
            self._let_go(each)
        self._batch = []

    def _let_go(self, picture: _Picture) -> None:
        picture.request.busy -= 1
        picture.request.changed.set()

    def stepped(self, batch: list[_Picture], step: int, steps: int) -> None:
        """A step of a batch is done: tell of it, and let go who have left others to it."""
        now = self._lived.seconds()
        figures = self.figures
        figures.steps += 1
        figures.picture_steps += len(batch)
        figures.paint_seconds += now - self._moved
        self._moved = now
        wanted = [each for each in self._batch if not each.request.gone]
        for each in wanted:
            each.request.easel.step(each.image, step, steps)
        if wanted:  # else the batch itself ends, and only then they have been let go
            for each in self._batch:
                if each.request.gone:
                    self._let_go(each)
            self._batch = wanted

    def partial(self, batch: list[_Picture], number: int, pixels: Sequence[bytes]) -> None:
        """Tell how the pictures of a batch look."""
        self._moved = self._lived.seconds()
        for each, now in zip(batch, pixels, strict=True):
            if not each.request.gone and number >= each.partials:
                each.partials = number + 1
                each.request.easel.rows(each.image, now, number)

    def _finish(self, batch: list[_Picture], results: Sequence[Result]) -> None:
        self.figures.paint_seconds += self._lived.seconds() - self._moved
        for each, result in zip(batch, results, strict=True):
            request = each.request
            if request.gone or request.error is not None:
                continue
            self.figures.pictures += 1
            request.left -= 1
            request.easel.rows(each.image, result.pixels)
            notices = [*result.notices, *(_NOTICES[way] for way in self._painter.savings if way in _NOTICES)]
            notices += [_SHARED] if len(batch) > 1 else []
            request.easel.finished(each.image, result.steps, notices)

    def _refused(self, batch: list[_Picture], reason: str) -> None:
        """The library has refused a batch: each picture is tried alone, and fails its request if that is refused too."""
        if len(batch) > 1:
            self._again(batch, alone=True)
        else:
            self._fail(batch[0].request, Failed("The engine failed on this picture.", "engine_error", reason))

    async def _short(self, batch: list[_Picture]) -> None:
        """There was not enough memory for a batch: try it again with less, or fail it."""
        self.figures.out_of_memory += 1
        self._saved_at = self._lived.seconds()
        for each in batch:
            each.short = True
        if len(batch) > 1:
            self._one_by_one = True
            _say("event=saving_memory way=one_by_one")
            self._again(batch)
            return
        request = batch[0].request
        if request.savings is None:
            request.savings = tuple(self._painter.savings)
        way = await self._in_thread(self._painter.save)
        if way is None:
            await self._in_thread(partial(self._painter.spend, request.savings))  # they were of no use
            message = "This picture needs more memory than there is. Ask for a smaller one."
            self._fail(request, Failed(message, "out_of_memory", "out of memory"))
            return
        self.figures.savings += 1
        _say(f"event=saving_memory way={way}")
        self._again(batch)

    async def _recover(self) -> None:
        """Do with as much memory as there was when nothing has been short of it for a while."""
        if self._line and self._line[0].short:
            return
        if self.savings and self._lived.seconds() - self._saved_at >= self._cooldown_seconds:
            self._one_by_one = False
            await self._in_thread(self._painter.spend)
            _say("event=saving_no_memory")

    def _again(self, batch: list[_Picture], *, alone: bool = False) -> None:
        """Let pictures that are still wanted wait again, in front of all others."""
        for each in reversed(batch):
            each.alone |= alone
            if not each.request.gone and each.request.error is None:
                self._line.appendleft(each)

    def _fail(self, request: _Request, error: Failed) -> None:
        self.figures.failed += 1
        request.error = error
        self._line = deque(each for each in self._line if each.request is not request)

    async def _in_thread(self, step: Callable[[], Any]) -> Any:
        return await self._thread.run(step, Wanted())


class _Follower(Watch):
    """Follows a batch from the thread that paints it."""

    def __init__(self, work: Work, batch: list[_Picture], loop: asyncio.AbstractEventLoop) -> None:
        self._work = work
        self._batch = batch
        self._loop = loop

    def stepped(self, step: int, steps: int) -> bool:
        self._loop.call_soon_threadsafe(self._work.stepped, self._batch, step, steps)
        return not all(each.request.gone for each in self._batch)

    def partial(self, number: int, pixels: Sequence[bytes]) -> None:
        self._loop.call_soon_threadsafe(self._work.partial, self._batch, number, pixels)


_SHARED = "It was painted in one batch with others; alone, the same seed may give slightly other pixels."
_NOTICES = {"tiles": "The picture was decoded in tiles for want of memory; faint seams are possible."}


def _die(running: "asyncio.Task[None]") -> None:
    """End the process: an engine whose worker has ended would let everybody wait for ever."""
    if not running.cancelled():
        running.print_stack(file=sys.stderr)
        os._exit(1)

"""Runs batches in worker threads, one at a time in each, and gives every request its results when all are there.

It refuses to compute on for who has gone: what waits is dropped at once, and a request counts as ended only when no step
holds anything of it. When memory runs out, no batch may have more than half of the largest that was in it; the budget grows
back after a cool-down. A batch that was not alone is computed again alone before its size is blamed.

All of it but `step` belongs to the event loop's thread.
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from forebay.engines.batcher import Batcher, Item
from forebay.engines.connection import Refused
from forebay.engines.serving import OutOfMemory

Step = Callable[[Sequence[Item]], Sequence[Any]]
"""Computes a batch in a thread; one result for each item. Raises OutOfMemory and StepFailed."""

_PROGRESS_SECONDS = 5.0


class StepFailed(Exception):
    """The model's library refused a batch, in its own words."""


class Failed(Refused):
    """The answer to a request that could not be computed; `reason` is for the log alone."""

    def __init__(self, message: str, code: str, reason: str) -> None:
        super().__init__(500, message, code, "server_error")
        self.reason = reason


@dataclass(slots=True)
class Figures:
    """What the metrics show; sums since the start."""

    batches: int = 0
    items: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    requests: int = 0
    wait_seconds: float = 0.0
    step_seconds: float = 0.0
    out_of_memory: int = 0
    cancelled: int = 0


@dataclass(slots=True)
class _Request:
    """One request: its results so far, and how many of its items are in steps right now."""

    results: list[Any]
    left: int
    since: float
    in_steps: int = 0
    error: Exception | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    wait: float | None = None
    gone: bool = False


@dataclass(slots=True, eq=False)
class _Step:
    """A batch in a thread: the padded tokens of the largest that was in memory with it or is it itself."""

    padded: int
    largest: int
    alone: bool = True


class Compute:
    """The worker threads and what waits for them. One of them serves small requests alone, beside whatever runs."""

    def __init__(self, step: Step, batch_tokens: int, workers: int, small_tokens: int, cooldown_seconds: float) -> None:
        self.figures = Figures()
        self._step = step
        self._batch_tokens = batch_tokens
        self.budget_tokens = batch_tokens
        self._cooldown_seconds = cooldown_seconds
        self._halved_at = 0.0
        self._batcher = Batcher()
        self._requests: dict[int, _Request] = {}
        self._sequence = 0
        self._arrived = asyncio.Event()
        self._steps: set[_Step] = set()
        self._step_ended = asyncio.Event()
        self._one_alone = asyncio.Lock()
        self._threads = ThreadPoolExecutor(workers + 1, "step")
        lanes = [None] * workers + [small_tokens]
        self._workers = [asyncio.create_task(self._work(lane)) for lane in lanes]
        for worker in self._workers:
            worker.add_done_callback(_die)

    @property
    def waiting(self) -> int:
        """Items that no step has taken yet."""
        return self._batcher.waiting

    @property
    def running(self) -> int:
        """Requests that are not finished."""
        return len(self._requests)

    async def run(
        self, items: Sequence[tuple[Sequence[int], tuple[int, ...]]], proceed: Callable[[], object]
    ) -> list[Any]:
        """The results of `items` (tokens and their kinds), in order. Cancelled, it returns when no step has any of them.

        `proceed` is called every few seconds in which something was computed. Raises Failed.
        """
        self._sequence += 1
        number = self._sequence
        request = self._requests[number] = _Request([None] * len(items), len(items), time.monotonic())
        self._batcher.add(number, (Item(number, index, *item) for index, item in enumerate(items)))
        self._arrived.set()
        try:
            await self._all_there(request, proceed)
        finally:
            request.gone = True
            self._batcher.drop(number)
            if request.left and request.error is None:
                self.figures.cancelled += 1
            try:
                await self._out_of_steps(request)
            finally:  # it raises when whoever waits is cancelled again
                del self._requests[number]
        if request.error is not None:
            raise request.error
        return request.results

    async def _all_there(self, request: _Request, proceed: Callable[[], object]) -> None:
        last, left = time.monotonic(), request.left
        while request.left and request.error is None:
            request.changed.clear()
            await request.changed.wait()
            now = time.monotonic()
            if now - last > _PROGRESS_SECONDS and request.left < left:
                last, left = now, request.left
                proceed()

    async def _out_of_steps(self, request: _Request) -> None:
        """Wait until no step holds an item of the request, however often whoever waits is cancelled."""
        cancelled = False
        while request.in_steps:
            request.changed.clear()
            try:
                await request.changed.wait()
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError

    async def _work(self, small_tokens_max: int | None) -> None:
        while True:
            await self._turn()
            batch = self._batcher.take(self._budget(), small_tokens_max)
            if not batch:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            await self._compute(batch)

    def _budget(self) -> int:
        """How many padded tokens a batch may have now; after a shortage it doubles once in each cool-down."""
        now = time.monotonic()
        if self.budget_tokens < self._batch_tokens and now - self._halved_at >= self._cooldown_seconds:
            self.budget_tokens = min(2 * self.budget_tokens, self._batch_tokens)
            self._halved_at = now
        return self.budget_tokens

    async def _turn(self) -> None:
        """Wait while a batch is computed alone."""
        while self._one_alone.locked():
            async with self._one_alone:
                pass

    async def _compute(self, batch: list[Item], *, alone: bool = False) -> None:
        """Nothing may be awaited between `_turn` and this, unless `alone`."""
        begun = time.monotonic()
        self._note(batch, begun)
        step = _Step(padded := _padded(batch), padded)
        try:
            with self._in_memory(step):
                results = await asyncio.get_running_loop().run_in_executor(self._threads, self._step, batch)
        except OutOfMemory:
            self._shrink(step.largest)
            if step.alone:
                self._divide(batch)
            else:
                await self._again_alone(batch)
            return
        except StepFailed as error:
            await self._search(batch, str(error), alone=alone)
            return
        self.figures.step_seconds += time.monotonic() - begun
        for item, result in zip(batch, results, strict=True):
            request = self._requests[item.request]
            request.results[item.index] = result
            request.left -= 1
            request.in_steps -= 1
            request.changed.set()

    def _note(self, batch: list[Item], begun: float) -> None:
        figures = self.figures
        figures.batches += 1
        figures.items += len(batch)
        figures.tokens += sum(item.length for item in batch)
        figures.padded_tokens += _padded(batch)
        for item in batch:
            request = self._requests[item.request]
            request.in_steps += 1
            if request.wait is None:
                request.wait = begun - request.since
                figures.wait_seconds += request.wait
                figures.requests += 1

    @contextmanager
    def _in_memory(self, step: _Step) -> Iterator[None]:
        """`step` and all that run meanwhile know of each other."""
        for other in self._steps:
            step.alone = other.alone = False
            step.largest = max(step.largest, other.padded)
            other.largest = max(other.largest, step.padded)
        self._steps.add(step)
        try:
            yield
        finally:
            self._steps.discard(step)
            self._step_ended.set()

    def _shrink(self, largest: int) -> None:
        """Let no batch have more than half of the largest of those for which there was not enough memory."""
        self.figures.out_of_memory += 1
        self._halved_at = time.monotonic()
        budget = max(1, min(self.budget_tokens, largest // 2))
        if budget < self.budget_tokens:
            self.budget_tokens = budget
            sys.stderr.write(f"event=batch_halved budget_tokens={budget}\n")

    def _divide(self, batch: list[Item]) -> None:
        """Let a batch that was too much by itself wait again, for smaller ones; one item alone has failed."""
        if len(batch) == 1:
            message = "This input needs more memory than there is. Send a shorter one."
            self._fail(batch, Failed(message, "out_of_memory", "out of memory"))
            return
        self._take_out(batch)
        self._batcher.put_back(item for item in batch if not self._requests[item.request].gone)
        self._arrived.set()

    async def _again_alone(self, batch: list[Item]) -> None:
        """Compute a batch once more when nothing else is in memory."""
        self._take_out(batch)
        async with self._one_alone:
            while self._steps:
                self._step_ended.clear()
                await self._step_ended.wait()
            wanted = [item for item in batch if self._waits(item)]
            if wanted:
                await self._compute(wanted, alone=True)

    async def _search(self, batch: list[Item], reason: str, *, alone: bool) -> None:
        """Compute a batch that was refused in halves, until the item is alone that is to blame: it fails its request."""
        if len(batch) == 1:
            self._fail(batch, Failed("The engine failed on this input.", "engine_error", reason))
            return
        self._take_out(batch)
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            if not alone:
                await self._turn()
            wanted = [item for item in half if self._waits(item)]
            if wanted:
                await self._compute(wanted, alone=alone)

    def _take_out(self, batch: list[Item]) -> None:
        """Note that no step has the items of a batch any more."""
        for item in batch:
            self._requests[item.request].in_steps -= 1
            self._requests[item.request].changed.set()

    def _waits(self, item: Item) -> bool:
        request = self._requests.get(item.request)
        return request is not None and not request.gone and request.error is None

    def _fail(self, batch: list[Item], error: Failed) -> None:
        for item in batch:
            request = self._requests[item.request]
            request.in_steps -= 1
            request.error = error
            request.changed.set()


def _padded(batch: Sequence[Item]) -> int:
    return len(batch) * max(item.length for item in batch)


def _die(worker: "asyncio.Task[None]") -> None:
    """End the process: an engine whose worker has ended would let everybody wait for ever."""
    if not worker.cancelled():
        worker.print_stack(file=sys.stderr)
        os._exit(1)

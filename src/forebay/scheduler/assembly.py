"""Puts answers together from items: what is known is not computed again, and what two want at once is computed once.

Both doors bring their own way to compute. It refuses to make anybody wait for work that is less urgent or much larger than
his own, and to let one who fails or leaves take others along: another one computes, and in the end each for himself.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TypeVar

from forebay.clock import Clock, Slices
from forebay.dialects.items import PART_ITEMS_MAX, Item, Items
from forebay.dialects.openai.call import Call
from forebay.errors import InvalidRequest
from forebay.inference import Priority, Usage
from forebay.scheduler.gather import Gathered
from forebay.scheduler.item_cache import ItemCache
from forebay.telemetry import Metrics

_TIMES_LARGER_MAX = 8  # nobody waits for a request of more than so many times his own items
_SHARED_ROUNDS = 2  # whoever waited in vain so often computes for himself
T = TypeVar("T")
Compute = Callable[[Call], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class _Flight:
    """An item that is being computed, with `together - 1` others; None in the end if nothing came of it for others."""

    priority: Priority
    together: int
    done: "asyncio.Future[Item | None]"

    def suits(self, priority: Priority, wanted: int) -> bool:
        """Whether one who wants so many items waits for it."""
        return self.priority <= priority and self.together <= wanted * _TIMES_LARGER_MAX


@dataclass(slots=True)
class _Work:
    """One answer on its way. `places` has the first place of each content; `uncounted` are tokens of no item's own."""

    call: Call
    items: Items
    compute: Compute
    places: dict[bytes, int]
    found: dict[bytes, Item] = field(default_factory=dict)
    uncounted: int = 0

    @property
    def missing(self) -> list[bytes]:
        return [digest for digest in self.places if digest not in self.found]

    def part(self, digests: Sequence[bytes], *, whole: bool) -> Call:
        """The call for some contents; the call itself if it is for all of them."""
        if whole and len(digests) == len(self.places):
            return self.call
        body = self.items.contents.body_for([self.places[digest] for digest in digests])
        return replace(self.call, request=replace(self.call.request, body=body))

    def usage(self, digests: Iterable[bytes]) -> Usage:
        return Usage(self.uncounted + sum(self.found[digest].tokens or 0 for digest in digests))


class Assembler:
    """Owns the cache and the flights of one process."""

    def __init__(self, cache_bytes: int, clock: Clock, metrics: Metrics) -> None:
        self._cache = ItemCache(cache_bytes)
        self._flights: dict[bytes, _Flight] = {}
        self._clock = clock
        self._metrics = metrics
        metrics.embedding_cache_bytes.set_function(lambda: self._cache.bytes)

    async def answer(self, call: Call, compute: Compute) -> Gathered:
        """The answer to `call`; `compute` brings the engine's body for it, or for a part of it.

        Raises whatever `compute` does.
        """
        items = call.items
        assert items is not None, "only an answer that is made of items is put together"
        digests = await self._paced(items.contents.digests())
        places: dict[bytes, int] = {}
        for place, digest in enumerate(digests):
            places.setdefault(digest, place)
        work = _Work(call, items, compute, places)
        for turn in range(_SHARED_ROUNDS):
            flights = self._look_up(work)
            if turn == 0:
                self._count(work, len(digests), len(flights))
            await self._compute(work, [digest for digest in work.missing if digest not in flights], len(digests))
            await self._receive(work, flights)
        await self._compute(work, work.missing, len(digests))
        usage = work.usage(digests)
        body = b"".join(await self._paced(items.render([work.found[digest] for digest in digests], usage)))
        return Gathered(body, usage)

    def _look_up(self, work: _Work) -> dict[bytes, _Flight]:
        """Take what is known, and find out who computes what is not."""
        flights = {}
        for digest in work.missing:
            item = self._cache.get(digest)
            if item is not None:
                work.found[digest] = item
                continue
            flight = self._flights.get(digest)
            if flight is not None and flight.suits(work.call.request.priority, len(work.places)):
                flights[digest] = flight
        return flights

    async def _receive(self, work: _Work, flights: dict[bytes, _Flight]) -> None:
        """Wait for what others compute. Of those who waited in vain, one computes for all in the next round."""
        for digest, flight in flights.items():
            if not flight.done.done():
                await asyncio.wait([flight.done])
            item = flight.done.result()
            if item is not None:
                work.found[digest] = item

    def _count(self, work: _Work, wanted: int, shared: int) -> None:
        known, model = len(work.found), work.call.request.model
        repeated = wanted - len(work.places)
        outcomes = {"hit": known, "shared": shared + repeated, "miss": len(work.places) - known - shared}
        for outcome, number in outcomes.items():
            if number:
                self._metrics.embedding_items.labels(model, outcome).inc(number)

    async def _compute(self, work: _Work, digests: list[bytes], wanted: int) -> None:
        """Have the engine compute these, so many at a time."""
        if not digests:
            return
        flights = self._take_off(work, digests)
        try:
            for _, group in groupby(digests, lambda digest: work.items.contents.group(work.places[digest])):
                together = list(group)
                for start in range(0, len(together), PART_ITEMS_MAX):
                    await self._compute_part(work, together[start : start + PART_ITEMS_MAX], flights, wanted)
        finally:
            for digest, flight in flights.items():
                self._land(digest, flight, None)

    async def _compute_part(
        self, work: _Work, digests: list[bytes], flights: dict[bytes, _Flight], wanted: int
    ) -> None:
        whole = wanted == len(work.places)
        try:
            part = work.items.read(await work.compute(work.part(digests, whole=whole)), len(digests))
        except InvalidRequest as error:
            if error.param in {"messages", work.items.contents.field}:
                error.param = self._param(work, digests, error.index)
            raise
        items = await self._paced(part.items)
        if items[0].tokens is None and part.usage is not None:
            work.uncounted += part.usage.prompt_tokens
        for digest, item in zip(digests, items, strict=True):
            work.found[digest] = item
            if item.tokens is not None:
                self._cache.put(digest, item)
                if digest in flights:
                    self._land(digest, flights[digest], item)

    def _param(self, work: _Work, digests: list[bytes], index: int | None) -> str:
        """What an engine refused, as the caller knows it: the engine was sent these contents alone."""
        if len(digests) == 1:
            index = 0
        named = index is not None and index < len(digests)
        return work.items.param_of(work.places[digests[index or 0]] if named else None)

    def _take_off(self, work: _Work, digests: list[bytes]) -> dict[bytes, _Flight]:
        """Let others know what is being computed, where they could use it: without its tokens nobody can be charged."""
        if not work.items.contents.rules.counted and len(digests) > 1:
            return {}
        loop, flights, priority = asyncio.get_running_loop(), {}, work.call.request.priority
        for digest in digests:
            before = self._flights.get(digest)
            if before is None or not before.suits(priority, len(work.places)):
                flights[digest] = self._flights[digest] = _Flight(priority, len(digests), loop.create_future())
        return flights

    def _land(self, digest: bytes, flight: _Flight, item: Item | None) -> None:
        if not flight.done.done():
            flight.done.set_result(item)
        if self._flights.get(digest) is flight:
            del self._flights[digest]

    async def _paced(self, work: Iterable[T]) -> list[T]:
        """Do `work` in slices, so that streams go on in between."""
        slices, done = Slices(self._clock), []
        for each in work:
            done.append(each)
            await slices.pause()
        return done

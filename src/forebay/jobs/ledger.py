"""How far an attempt at a job about media is: what it has finished is written down at once, the rest every so often.

It refuses to hold up the work for news that nobody is waiting for, and to write anything once the lease is lost.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from forebay.errors import InsufficientStorage, LeaseLost, StoreUnavailable
from forebay.jobs.kinds import Run
from forebay.jobs.media_work import MediaRooms
from forebay.store.job_records import Lease
from forebay.store.media_jobs import WHOLE, Part

QUEUED = "queued"
FETCHING = "fetching"

_TELL_SECONDS = 0.5  # how often progress is written down at most
_KEEP_SECONDS = 1.0  # before something is written again after the store was away


class Plan:
    """The stages of one job in their order, and which part of all the work each is, by `shares` of any size."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        whole, before = sum(shares.values()), 0.0
        self._parts: dict[str, tuple[float, float]] = {}
        for stage, share in shares.items():
            self._parts[stage] = (before / whole, share / whole)
            before += share

    def done(self, stage: str, percent: float) -> int:
        """How much is done, of WHOLE; the rest is for the end."""
        before, share = self._parts[stage]
        return min(WHOLE - 1, int(WHOLE * (before + share * min(max(percent, 0.0), 100.0) / 100)))


class Ledger:
    """Tells how far one attempt is."""

    def __init__(self, rooms: MediaRooms, lease: Lease, run: Run, plan: Plan) -> None:
        self._rooms = rooms
        self._lease = lease
        self._run = run
        self._plan = plan
        self._stage, self._thousandths = QUEUED, lease.job.completed
        self._steps: tuple[int, int] | None = None
        self._news = asyncio.Event()

    def stage(self, stage: str, percent: float) -> None:
        """So much of a stage is done."""
        self.tell(stage, self._plan.done(stage, percent))

    def tell(self, stage: str, done: int, steps: tuple[int, int] | None = None) -> None:
        """So much of all the work is done, and so many steps of how many of this stage."""
        done = max(self._thousandths, done)
        if (stage, done, steps) != (self._stage, self._thousandths, self._steps):
            self._stage, self._thousandths, self._steps = stage, done, steps
            self._news.set()

    async def keep(self, part: Part) -> None:
        """Write down a finished part. Raises LeaseLost."""
        await self.insist(lambda: self._rooms.store.keep(self._rooms.jobs, self._lease, part))
        self._run.progressed = True

    async def insist(self, write: Callable[[], Awaitable[None]]) -> None:
        """Write, again and again while the store is away or full: it comes back, or the lease runs out."""
        while True:
            try:
                await write()
            except (StoreUnavailable, InsufficientStorage):
                await self._rooms.clock.sleep(self._rooms.clock.jitter(_KEEP_SECONDS))
            else:
                return

    @asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """Tell how far it is while the block lasts; a write that has begun comes to its end."""
        ending = asyncio.Event()
        telling = asyncio.create_task(self._tell(ending))
        try:
            yield
        finally:
            ending.set()
            self._news.set()
            await telling

    async def _tell(self, ending: asyncio.Event) -> None:
        while True:
            await self._news.wait()
            if ending.is_set():
                return
            self._news.clear()
            try:
                await self._rooms.store.advance(self._lease, self._stage, self._thousandths, *(self._steps or ()))
            except LeaseLost:
                return  # whoever keeps a part, or the lease, finds out
            except (StoreUnavailable, InsufficientStorage):
                self._news.set()  # told again, next time
            await self._pause(ending)

    async def _pause(self, ending: asyncio.Event) -> None:
        try:
            async with self._rooms.clock.timeout(_TELL_SECONDS):
                await ending.wait()
        except TimeoutError:
            pass  # time to tell again

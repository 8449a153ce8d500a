"""Whatever is killed, and whenever: every acknowledged batch ends with each of its lines answered once."""

import asyncio
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import SecretStr

from forebay import commit_points
from forebay.blobs.local import LocalBlobs
from forebay.clock import SystemClock, seeded
from forebay.config import Settings
from forebay.store.database import Database
from forebay.store.files import LEFTOVER_SECONDS, FileStore
from forebay.store.uploads import UploadStore
from tests.support import invariants, postgres
from tests.support.invariants import Customer, Found
from tests.support.receiver import Receiver, receiving
from tests.support.server import eventually
from tests.support.worker import SEGMENT_LINES, SLOTS, Life, Site, holds_a_lease

SEED = 20261121
LINES, LINES_LONG = 4_000, 10_000
LEFT_SECONDS, LEFT_SECONDS_LONG = 1, 2  # of work, by each kill: the lines are to last for the run
IN_FLIGHT = SLOTS + 2  # what the engine is at, and what waits for it
SMALL = 20
PAUSE_SECONDS = 0.5  # at most, between two small batches
RESUME_SECONDS_MAX = 10.0
NAMES = tuple(
    name for name in commit_points.NAMES if not name.startswith(("transcription.", "image.", "intake.", "usage."))
)
OF_THE_SERVER = frozenset({"file.blob_written", "file.row_committed", "upload.joined", "batch.created"})
REPEATED = ("chunk.leased", "chunk.segment_written", "chunk.segment_committed", "chunk.finished", "chunk.settled")


@dataclass(frozen=True)
class End:
    """How a life ends: at the `point`, or by kill -9 `after_seconds` from its start, or from its engine's return."""

    point: str | None = None
    after_seconds: float = 0.0
    engine: bool = False


@dataclass
class Figures:
    """What was measured."""

    kills: Counter[str] = field(default_factory=Counter)
    resumed: list[float] = field(default_factory=list)  # from the start of the process to its first lease
    idle: list[float] = field(default_factory=list)  # the part of it after the process had said that it is there
    engine_resumed: list[float] = field(default_factory=list)


@dataclass
class Matrix:
    """One run over one database."""

    site: Site
    database: Database
    customer: Customer
    receiver: Receiver
    chance: random.Random
    lines: int  # of the large batch
    figures: Figures = field(default_factory=Figures)
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def live(self, place: str, end: End) -> None:
        """One life of a place, to its end."""
        async with self.starting:  # as many at once as a machine with two cores can bear
            life = await self.site.start(place, end.point)
            resuming = asyncio.create_task(self._resumed(life))
            with suppress(TimeoutError):
                async with asyncio.timeout(None if end.point or end.engine else end.after_seconds):
                    await self.site.until_up(life)
        if end.point is not None:
            async with asyncio.timeout(60):
                code = await life.process.wait()
            assert code == -signal.SIGKILL, f"{end}: ended by {code}\n{life.log[-2000:]}"
            self.figures.kills[end.point.partition(":")[0]] += 1
        else:
            since = life.began
            if end.engine:
                await self._kill_engine(life)
                since = time.time()
            await asyncio.sleep(max(0.0, since + end.after_seconds - time.time()))  # the moment is the fault
            assert life.process.returncode is None, f"it ended by itself\n{life.log[-2000:]}"
            await life.kill()
            self.figures.kills["server" if place == "server" else "worker"] += 1
        resuming.cancel()
        with suppress(asyncio.CancelledError):
            await resuming

    async def _resumed(self, life: Life) -> None:
        """How long it takes until a started process works on something."""
        first = len([one for lives in self.site.lives.values() for one in lives]) <= len(self.site.lives)
        await self.site.until_up(life)
        up = time.time()
        while not await holds_a_lease(self.database, life):
            await asyncio.sleep(0.02)
        if not first:
            self.figures.resumed.append(time.time() - life.began)
            self.figures.idle.append(time.time() - up)

    async def _kill_engine(self, life: Life) -> None:
        pid = await eventually(life.engine_pid, within_seconds=30, what="an engine at work")
        before = {one.pid for one in life.engines()}
        await asyncio.sleep(self.chance.uniform(0, 1.0))
        os.kill(pid, signal.SIGKILL)
        began = time.time()
        self.figures.kills["engine"] += 1

        def again() -> bool:
            return any(one.begun for one in life.engines() if one.pid not in before)

        await eventually(again, within_seconds=30, what="an engine that works again")
        self.figures.engine_resumed.append(time.time() - began)

    async def keep_busy(self, stop: asyncio.Event) -> None:
        """Small batches beside the large one, and polls of all."""
        number = 0
        while not stop.is_set():
            await self.customer.submit(SMALL, by_parts=number % 2 == 1, priority=1)
            await self.customer.look_at_all()
            if all(each.ended for each in self.customer.submitted if each.lines == self.lines):
                await self.customer.submit(self.lines)
            number += 1
            await asyncio.sleep(self.chance.uniform(0, PAUSE_SECONDS))

    async def run(self, ends: Mapping[str, Sequence[End]]) -> None:
        """Every place lives its lives one after the other, all places at once, while the customer goes on."""

        async def lives(place: str) -> None:
            for end in ends[place]:
                await self.live(place, end)
            await self.site.start(place)

        stop = asyncio.Event()

        async def kill() -> None:
            async with asyncio.TaskGroup() as group:
                for place in self.site.lives:
                    group.create_task(lives(place))
            stop.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(kill())
            await self.customer.post("/v1/webhooks", "hook", lambda: {"json": {"url": self.receiver.url}})
            await self.customer.submit(self.lines)
            group.create_task(self.keep_busy(stop))

    async def check(self) -> Found:
        """Wait for the end of all and check every invariant."""
        found = Found()
        await eventually(self.customer.look_at_all, within_seconds=240, what="the end of every batch")
        await eventually(
            lambda: invariants.all_told(self.customer, self.receiver.received), within_seconds=60, what="every webhook"
        )
        await invariants.check_batches(self.customer, found)
        invariants.check_events(self.customer, self.receiver.received, found)
        await self._until_swept()
        for lives in self.site.lives.values():
            lives[-1].process.terminate()
            assert await lives[-1].process.wait() == 0
        await eventually(lambda: not self.site.processes(), what="the end of every process")
        await self._sweep_after_a_day()
        await invariants.check_rows(self.database, self.customer)
        await invariants.check_blobs(self.database, self.site.blobs)
        return found

    async def _until_swept(self) -> None:
        async def swept() -> bool:
            return await invariants.settled(self.database)

        await eventually(swept, within_seconds=20, what="the sweep of chunks and webhooks")

    async def _sweep_after_a_day(self) -> None:
        """What was begun and never finished is swept when nobody can be at it any more."""
        settings, clock = Settings(), SystemClock()
        blobs, later = LocalBlobs(self.site.blobs, 0), clock.now() + LEFTOVER_SECONDS + 60
        await FileStore(self.database, clock, settings.files).sweep(blobs, later, 1000)
        await UploadStore(self.database, clock, settings.files).sweep(blobs, later, 1000)
        await blobs.check()

    def wasted(self, kept: set[str]) -> tuple[list[int], list[int]]:
        """Of each process that was killed, and of each engine, how many lines had to be run again for it.

        An answer that is in no result file was lost with the process; a request without an answer, with whatever died.
        """
        by_process, by_engine = [], []
        for life in (life for lives in self.site.lives.values() for life in lives[:-1]):
            engines = life.engines()
            lost = set[str]().union(*(one.answered for one in engines), *(one.cut_off for one in engines[-1:]))
            by_process.append(len(lost - kept))
            by_engine += [len(one.cut_off) for one in engines[:-1]]
        return by_process, by_engine


@asynccontextmanager
async def matrix(
    folder: Path, url: str | None, places: Sequence[str], kills: int, *, prove: bool
) -> AsyncIterator[Matrix]:
    """Everything that a run needs."""
    lines, left_seconds = (LINES_LONG, LEFT_SECONDS_LONG) if prove else (LINES, LEFT_SECONDS)
    site = Site(folder, url, places)
    secret = None if url is None else SecretStr(url)
    database = await Database.open(Settings(data_dir=site.data("server"), database_url=secret))
    customer = Customer(site.url, delay_ms=max(10, kills * left_seconds * SLOTS * 1000 // lines))
    try:
        async with receiving("127.0.0.2") as receiver:
            yield Matrix(site, database, customer, receiver, seeded(SEED), lines)
    finally:
        await customer.close()
        await database.close()
        await site.close()


def plan(chance: random.Random, points: Sequence[str], rounds: int, moments: int, engines: int) -> list[End]:
    """The ends of one place, in an order by chance."""
    ends = [
        End(f"{point}:{chance.randint(1, 3) if point in REPEATED else 1}") for point in points for _ in range(rounds)
    ]
    ends += [End(after_seconds=chance.uniform(0.2, 5.0)) for _ in range(moments)]
    ends += [End(after_seconds=chance.uniform(0.0, 1.5), engine=True) for _ in range(engines)]
    chance.shuffle(ends)
    return ends


def report(name: str, run: Matrix, found: Found) -> None:
    """Print the figures, and hold them against the claims."""
    figures, (killed, by_engine) = run.figures, run.wasted(found.request_ids)
    print(f"\n{name}: {figures.kills.total()} kills: {dict(sorted(figures.kills.items()))}")
    measured = {"a process": figures.resumed, "it is up": figures.idle, "an engine": figures.engine_resumed}
    for what, times in measured.items():
        print(f"resume after {what}: {len(times)}, median {statistics.median(times):.2f} s, max {max(times):.2f} s")
    print(f"run again per life: mean {statistics.mean(killed):.1f}, max {max(killed)} of {sorted(killed)}")
    print(f"run again per engine kill: {sorted(by_engine)}")
    print(f"{found}".partition(", request_ids")[0], f"requests sent again: {run.customer.sent_again}")
    assert set(figures.kills) >= {*NAMES, "server", "engine"}
    assert max(figures.resumed) <= RESUME_SECONDS_MAX
    assert max(figures.idle) <= RESUME_SECONDS_MAX
    assert max(figures.engine_resumed) <= RESUME_SECONDS_MAX
    # A segment of answers for each kill, and what the engine was at.
    assert max(killed) <= SEGMENT_LINES + IN_FLIGHT
    assert max(by_engine) <= IN_FLIGHT


@pytest.mark.timeout(1800)
async def test_on_sqlite(tmp_path: Path, prove: bool) -> None:
    chance = seeded(SEED)
    ends = plan(chance, list(NAMES), *((4, 10, 15) if prove else (1, 2, 2)))
    async with matrix(tmp_path, None, ["server"], len(ends), prove=prove) as run:
        await run.run({"server": ends})
        report("SQLite", run, await run.check())
        assert run.figures.kills.total() >= (100 if prove else 20)


@pytest.mark.timeout(1800)
async def test_on_postgres(tmp_path: Path, prove: bool) -> None:
    chance = seeded(SEED + 1)
    rounds, moments, engines = (4, 6, 7) if prove else (1, 1, 1)
    of_workers = [point for point in NAMES if point not in OF_THE_SERVER]
    half = len(of_workers) // 2
    ends = {
        "server": plan(chance, sorted(OF_THE_SERVER), rounds, 2 * moments, 0),
        "first": plan(chance, of_workers[:half], rounds, moments, engines),
        "second": plan(chance, of_workers[half:], rounds, moments, engines),
    }
    async with matrix(tmp_path, postgres.new_database(), list(ends), max(map(len, ends.values())), prove=prove) as run:
        await run.run(ends)
        report("PostgreSQL", run, await run.check())
        assert run.figures.kills.total() >= (100 if prove else 20)

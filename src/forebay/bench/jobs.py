"""What the back office itself costs: jobs that do nothing, through the real worker and the real database (P8, P10).

It refuses to count a job before its end is committed.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr

from forebay.bench.report import Measure, Report, percentile
from forebay.bench.wire import now
from forebay.clock import SystemClock
from forebay.config import JobSettings, Settings
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.office import Office
from forebay.jobs.outcome import Done, Outcome
from forebay.jobs.retry import doubling
from forebay.store.database import Database
from forebay.store.dead_letters import DeadLetterStore
from forebay.store.job_records import Lease, NewJob
from forebay.store.jobs import JobStore
from forebay.store.webhooks import WebhookStore
from forebay.telemetry import Metrics

_AT_ONCE = 256
_SQLITE_GOAL, _POSTGRES_GOAL = 10_000, 3_100
_SUBMITTERS = 64
_LOOK_SECONDS = 0.02
_TELLING_SHARE = 5


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure for each seed."""

    jobs: int
    starts: int


def measures(goal: float) -> dict[str, Measure]:
    """What a run fills in, with the `goal` for completed jobs per second."""
    found = [
        Measure("P8", "no-op jobs completed per second", "/s", floor=1000, goal=goal, more_is_better=True),
        Measure("P8", "no-op jobs that tell of their end, completed per second", "/s"),
        Measure("P8", f"jobs submitted per second, one commit each, {_SUBMITTERS} submitters", "/s"),
        Measure("P10", "submit to start when idle, p50", "ms", floor=50, goal=5),
        Measure("P10", "submit to start when idle, max", "ms", goal=20),
    ]
    return {measure.name: measure for measure in found}


@dataclass(slots=True)
class _Noop:
    """A kind that does nothing but note when it starts."""

    started: dict[str, float] = field(default_factory=dict)
    began: asyncio.Event = field(default_factory=asyncio.Event)

    async def perform(self, lease: Lease, _run: Run) -> Outcome:
        self.started[lease.id] = now()
        self.began.set()
        return Done()


async def run(database_url: str | None, seeds: int, size: Size, say: Callable[[str], None]) -> Report:
    """Measure everything once for each seed, on SQLite in a folder of its own or on `database_url`."""
    on_sqlite = database_url is None
    name = "jobs-sqlite" if on_sqlite else "jobs-postgres"
    report = Report(name, seeds, measures(_SQLITE_GOAL if on_sqlite else _POSTGRES_GOAL))
    for seed in range(1, seeds + 1):
        say(f"seed {seed}: {size.jobs} jobs")
        with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
            secret = None if database_url is None else SecretStr(database_url)
            settings = Settings(data_dir=Path(folder), database_url=secret)
            database = await Database.open(settings)
            try:
                await _throughput(database, size, report)
                await _starts(database, size, report)
            finally:
                await database.close()
    report.notes += [
        f"A worker of this process runs up to {_AT_ONCE} jobs at once; each end is committed and flushed before it counts.",
        "Jobs are submitted before the worker starts, so that the two figures do not share the machine.",
        "Jobs that end well are settled many at once, each with its event: a transaction for all that have ended meanwhile.",
    ]
    return report


async def _throughput(database: Database, size: Size, report: Report) -> None:
    jobs = JobStore(database, SystemClock())

    async def submit(count: int) -> None:
        for _ in range(count):
            async with database.begin() as transaction:
                await jobs.insert(transaction, [NewJob("noop", "default")])

    began = now()
    await asyncio.gather(*(submit(size.jobs // _SUBMITTERS) for _ in range(_SUBMITTERS)))
    submitted = _SUBMITTERS * (size.jobs // _SUBMITTERS)
    report.add(f"jobs submitted per second, one commit each, {_SUBMITTERS} submitters", submitted / (now() - began))
    began = now()
    async with _office(database, _Noop()):
        await _until_none_is_left(jobs)
        seconds = now() - began
    report.add("no-op jobs completed per second", submitted / seconds)
    await _telling(jobs, size, report)
    report.count([""] * submitted)


async def _telling(jobs: JobStore, size: Size, report: Report) -> None:
    """Jobs that look for webhooks when they end, as a batch does."""
    new = [NewJob("noop", "default") for _ in range(size.jobs // _TELLING_SHARE)]
    async with jobs.database.begin() as transaction:
        await jobs.insert(transaction, new)
    began = now()
    async with _office(jobs.database, _Noop(), event="noop"):
        await _until_none_is_left(jobs)
        report.add("no-op jobs that tell of their end, completed per second", len(new) / (now() - began))


async def _starts(database: Database, size: Size, report: Report) -> None:
    noop, waits = _Noop(), []
    jobs = JobStore(database, SystemClock())
    async with _office(database, noop):
        for _ in range(size.starts):
            noop.began.clear()
            asked = now()
            async with database.begin() as transaction:
                (job_id,) = await jobs.insert(transaction, [NewJob("noop", "default")])
            await noop.began.wait()
            waits.append(noop.started[job_id] - asked)
            await _until_none_is_left(jobs)
    report.add("submit to start when idle, p50", 1000 * percentile(waits, 0.5))
    report.add("submit to start when idle, max", 1000 * max(waits))


async def _until_none_is_left(jobs: JobStore) -> None:
    while await jobs.counts():  # noqa: ASYNC110  # it is the database's word that counts, and it sets no event here
        await asyncio.sleep(_LOOK_SECONDS)


@asynccontextmanager
async def _office(database: Database, noop: _Noop, event: str | None = None) -> AsyncIterator[None]:
    clock = SystemClock()
    kind = Kind("noop", noop.perform, _AT_ONCE, doubling(1, 10, 3), event=event)
    stores = JobStore(database, clock), WebhookStore(database, clock), DeadLetterStore(database, clock)
    office = Office(*stores, [kind], [], "node_bench", JobSettings(), clock, Metrics(), works=True)
    running = asyncio.create_task(office.run())
    try:
        yield
    finally:
        office.stop()
        await running

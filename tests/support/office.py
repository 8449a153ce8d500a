"""A back office over a real database, with kinds of job that a test makes up: the extension point, not a stand-in."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from forebay.clock import Clock, SystemClock
from forebay.config import JobSettings, Settings
from forebay.jobs.kinds import Kind
from forebay.jobs.office import Office
from forebay.jobs.retry import doubling
from forebay.jobs.worker import Loaded, nothing_loaded
from forebay.store.database import Database
from forebay.store.dead_letters import DeadLetterStore
from forebay.store.job_records import Job, NewJob
from forebay.store.jobs import JobStore
from forebay.store.webhooks import WebhookStore
from forebay.telemetry import Metrics
from tests.support.server import eventually

RETRY = doubling(0.01, 0.05, 3)
# Its lease outlasts any pause of this process, so that nobody rescues a job that is at work.
QUICK = JobSettings(lease_seconds=30, poll_seconds=0.05, backoff_seconds_min=0.01, prune_seconds=60)


@dataclass
class Back:
    """A running office and its stores."""

    office: Office
    jobs: JobStore
    metrics: Metrics

    async def submit(self, *new: NewJob) -> list[str]:
        async with self.jobs.database.begin() as transaction:
            return await self.office.desk.submit(transaction, new)

    async def until_finished(self, job_id: str, within_seconds: float = 20) -> Job:
        async def finished() -> Job | None:
            job = await self.jobs.get("default", job_id)
            return job if job.finished else None

        found: Job = await eventually(finished, within_seconds=within_seconds, what=f"the end of {job_id}")
        return found


def settings_for(folder: Path, url: str | None = None) -> Settings:
    """SQLite in `folder`, or PostgreSQL at `url`."""
    return Settings(data_dir=folder / "data", database_url=None if url is None else SecretStr(url))


@asynccontextmanager
async def back_office(
    database: Database,
    kinds: Sequence[Kind],
    *,
    node: str = "node_a",
    settings: JobSettings = QUICK,
    clock: Clock | None = None,
    works: bool = True,
    loaded: Loaded = nothing_loaded,
) -> AsyncIterator[Back]:
    """An office that works until the block ends."""
    clock = clock or SystemClock()
    full = Settings()
    jobs = JobStore(database, clock)
    metrics = Metrics()
    office = Office(
        jobs,
        WebhookStore(database, clock, full.webhooks),
        DeadLetterStore(database, clock),
        kinds,
        [],
        node,
        settings,
        clock,
        metrics,
        works=works,
        loaded=loaded,
    )
    running = asyncio.create_task(office.run())
    try:
        yield Back(office, jobs, metrics)
    finally:
        office.stop()
        await running

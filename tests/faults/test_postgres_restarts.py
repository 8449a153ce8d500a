"""A PostgreSQL that is restarted under work: what was accepted is done, and then work goes on as fast as before."""

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forebay.clock import SystemClock
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.outcome import Done, Outcome
from forebay.jobs.retry import doubling
from forebay.store.database import Database
from forebay.store.job_records import Lease, NewJob
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from tests.support import postgres as shared_postgres
from tests.support.logs import unforeseen
from tests.support.office import back_office, settings_for
from tests.support.postgres_chaos import OwnPostgres, WorkerProcess, own_postgres, worker_beside
from tests.support.server import Server, serving
from tests.support.steady_load import NETWORK, SteadyLoad, steady_load

POLL_SECONDS = 10
CONFIG = f"""
default_models = false
[batches]
live_per_project_max = 10_000
chunk_lines = 2
[jobs]
lease_seconds = 10
poll_seconds = {POLL_SECONDS}
[outbound]
allowed_networks = ["{NETWORK}/32"]
[models.fake]
engine = "fake"
preload = true
slots = 4
"""
LINES = 5
JOBS_EACH = 5  # a batch, three chunks, a webhook
LINE = "[[fake echo=1 token_ms=100]]"  # 0.4 s: an engine does 2 batches a second, whatever the processor does
PACE = 405 / 180  # 2,025 jobs in three minutes, little more than half of what two engines do
JOBS_MIN = 2000 / 180  # a second
BACKLOG, BACKLOG_LONG = 40, 88  # 10 and 22 s for two engines
RATE_MIN = 0.95
WOKEN_SECONDS = 4  # a worker that nobody wakes looks again after half its poll at the earliest
APART, APART_LONG = (3, 8), (5, 40)  # seconds from one restart to the next
SEED, SEED_LONG = 204, 190  # the first three restarts are of all kinds


@dataclass
class Site:
    """A server, a worker beside it, and the PostgreSQL that they share."""

    postgres: OwnPostgres
    server: Server
    worker: WorkerProcess
    load: SteadyLoad
    backlog: int

    def unharmed(self) -> None:
        """No process has ended, and nothing was logged that nobody foresaw."""
        for process, log in ((self.server.process, self.server.log), (self.worker.process, self.worker.log)):
            assert process.returncode is None, log
            assert not unforeseen(log), unforeseen(log)


@asynccontextmanager
async def site(
    folder: Path, *, server_works: bool, backlog: int = BACKLOG, connections: int = 100
) -> AsyncIterator[Site]:
    async with own_postgres(connections) as postgres:
        environment = {"FOREBAY_DATABASE_URL": postgres.url, "FOREBAY_LOG_FORMAT": "json"}
        share = 1 if server_works else 2
        own = {**environment, "FOREBAY_JOBS_ENABLED": str(server_works).lower()}
        async with (
            serving(CONFIG, folder=folder, environment=own) as server,
            worker_beside(server, "worker", environment) as worker,
            steady_load(server, PACE / share, LINES, LINE) as load,
        ):
            yield Site(postgres, server, worker, load, backlog // share)


async def as_fast_after(place: Site, before: float, chaos: Coroutine[Any, Any, None]) -> float:
    """Work during `chaos`, and then at the rate that it had before; batches a second."""
    await place.load.offer_during(chaos)
    place.unharmed()
    after = await place.load.drain_as_fast(place.backlog, RATE_MIN * before)
    for _ in range(3):
        woken = 1 / WOKEN_SECONDS
        assert await place.load.drain_as_fast(1, woken) >= woken, "an idle worker hears of work"
    place.unharmed()
    assert after >= RATE_MIN * before, (before, after)
    return after


async def test_a_database_that_is_away_uses_up_no_attempt(tmp_path: Path) -> None:
    url = shared_postgres.new_database()
    database = await Database.open(settings_for(tmp_path, url))
    asked = asyncio.Event()

    async def perform(lease: Lease, _run: Run) -> Outcome:
        if lease.attempt == 1:
            shared_postgres.take_away(url)
        try:
            await JobStore(database, SystemClock()).get("default", lease.id)
        finally:
            asked.set()
        return Done()

    async with back_office(database, [Kind("job", perform, 1, doubling(60, 60, 3))]) as back:
        [job_id] = await back.submit(NewJob("job", "default"))
        await asyncio.wait_for(asked.wait(), 10)
        shared_postgres.bring_back(url)
        found = await back.until_finished(job_id)
        assert (found.state, found.attempt, found.failures, found.errors) == (JobState.COMPLETED, 2, 0, [])
    await database.close()


@pytest.mark.timeout(1200)
async def test_restarts(tmp_path: Path, prove: bool) -> None:
    seconds, backlog, apart, seed = (24, BACKLOG, APART, SEED)
    if prove:
        seconds, backlog, apart, seed = (600, BACKLOG_LONG, APART_LONG, SEED_LONG)
    async with site(tmp_path, server_works=True, backlog=backlog) as place:
        before = await place.load.drain(place.backlog)
        after = await as_fast_after(place, before, place.postgres.restart_often(seconds, apart, random.Random(seed)))
        jobs = len(place.load.batches) * JOBS_EACH
        _tell(f"restarts={dict(place.postgres.restarts)} jobs={jobs}", place.load, before, after)
        await place.load.check()
        assert place.postgres.restarts.total() >= max(3, seconds / 45)
        assert jobs >= JOBS_MIN * seconds


@pytest.mark.timeout(300)
async def test_a_storm_that_ends_every_connection_and_a_crowd_that_takes_them_all(tmp_path: Path) -> None:
    """The crowd is three hundred idle connections, and for seconds there is none to be had."""
    async with site(tmp_path, server_works=False, connections=320) as place:
        before = await place.load.drain(place.backlog)
        after = await as_fast_after(place, before, place.postgres.storm(10))
        _tell(f"ended={place.postgres.connections_ended}", place.load, before, after)
        assert place.postgres.connections_ended > 100
        felt = place.load.errors["503 store_unavailable"]
        after = await as_fast_after(place, before, place.postgres.starve(8))
        _tell(f"left={place.postgres.connections_left_min}", place.load, before, after)
        assert place.postgres.connections_left_min == 0
        assert place.load.errors["503 store_unavailable"] > felt, "the others felt it"
        await place.load.check()


def _tell(what: str, load: SteadyLoad, before: float, after: float) -> None:
    print(f"\n{what} errors={dict(load.errors)} before={before:.2f}/s after={after:.2f}/s")

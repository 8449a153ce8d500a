"""A PostgreSQL that is restarted under work: what was accepted is done, and then work goes on as fast as before."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from forebay.clock import SystemClock
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.outcome import Done, Outcome
from forebay.jobs.retry import doubling
from forebay.store.database import Database
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore, Lease, NewJob
from tests.support import postgres as shared_postgres
from tests.support.office import back_office, settings_for
from tests.support.postgres_chaos import STOPS, OwnPostgres, WorkerProcess, own_postgres, worker_beside
from tests.support.server import Server, serving
from tests.support.steady_load import NETWORK, SteadyLoad, steady_load

CONFIG = f"""
default_models = false
[batches]
live_per_project_max = 10_000
chunk_lines = 2
[jobs]
lease_seconds = 10
poll_seconds = 10
[outbound]
allowed_networks = ["{NETWORK}/32"]
[models.fake]
engine = "fake"
preload = true
slots = 8
"""
LINES = 5
JOBS_EACH = 5  # a batch, three chunks, a webhook
PACE = 405 / 180  # 2,025 jobs in three minutes
STEADY = 46  # batches, in 20 s
RATE_MIN = 0.95
SEED = 3


@dataclass
class Site:
    """A server, a worker beside it, and the PostgreSQL that they share."""

    postgres: OwnPostgres
    server: Server
    worker: WorkerProcess
    load: SteadyLoad

    def unharmed(self) -> None:
        """No process has ended, and nothing was logged that nobody foresaw."""
        for process, log in ((self.server.process, self.server.log), (self.worker.process, self.worker.log)):
            assert process.returncode is None, log
            for trouble in (".bug", "Traceback", "never retrieved"):
                assert trouble not in log, log[max(0, log.index(trouble) - 2000) :][:6000]


@asynccontextmanager
async def site(folder: Path, *, server_works: bool, connections: int = 100) -> AsyncIterator[Site]:
    async with own_postgres(connections) as postgres:
        environment = {"FOREBAY_DATABASE_URL": postgres.url, "FOREBAY_LOG_FORMAT": "json"}
        own = {**environment, "FOREBAY_JOBS_ENABLED": str(server_works).lower()}
        async with (
            serving(CONFIG, folder=folder, environment=own) as server,
            worker_beside(server, "worker", environment) as worker,
            steady_load(server, PACE, LINES) as load,
        ):
            yield Site(postgres, server, worker, load)


async def as_fast_after(place: Site, chaos: Callable[[], Awaitable[None]], batches: int) -> dict[str, float]:
    """Work before, during and after `chaos`; the rates."""
    before = await place.load.offer(STEADY)
    async with asyncio.TaskGroup() as group:
        group.create_task(place.load.offer(batches))
        await chaos()
    place.unharmed()
    after = await place.load.offer(STEADY)
    place.unharmed()
    await place.load.check()
    assert after >= RATE_MIN * before, (before, after)
    return {"rate_before": before, "rate_after": after}


async def restart(postgres: OwnPostgres, chance: random.Random, seconds: float) -> Counter[str]:
    """Restart it every 5 to 40 s; how often in which way."""
    done: Counter[str] = Counter()
    until = time.monotonic() + seconds
    while (pause := chance.uniform(5, 40)) < until - time.monotonic():
        await asyncio.sleep(pause)
        how = chance.choice(sorted(STOPS))
        await postgres.stop(how)
        await asyncio.sleep(chance.uniform(0, 2))
        await postgres.start()
        done[how] += 1
    return done


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
    seconds = 600 if prove else 180
    async with site(tmp_path, server_works=True) as place:
        done: Counter[str] = Counter()

        async def chaos() -> None:
            done.update(await restart(place.postgres, random.Random(SEED), seconds))

        rates = await as_fast_after(place, chaos, round(seconds * PACE))
        assert done.total() >= seconds / 45
        jobs = len(place.load.batches) * JOBS_EACH
        print(f"\nrestarts={dict(done)} jobs={jobs} errors={dict(place.load.errors)} {rates}")


@pytest.mark.timeout(300)
async def test_a_storm_that_ends_every_connection(tmp_path: Path) -> None:
    async with site(tmp_path, server_works=False) as place:
        ended = 0

        async def chaos() -> None:
            nonlocal ended
            until = time.monotonic() + 10
            while time.monotonic() < until:
                ended += await place.postgres.end_connections()
                await asyncio.sleep(0.2)

        rates = await as_fast_after(place, chaos, round(12 * PACE))
        assert ended > 100, ended
        print(f"\nended={ended} errors={dict(place.load.errors)} {rates}")


@pytest.mark.timeout(300)
async def test_a_crowd_that_takes_every_connection(tmp_path: Path) -> None:
    async with site(tmp_path, server_works=False, connections=320) as place:
        fewest = 320

        async def chaos() -> None:
            nonlocal fewest
            async with place.postgres.idle(280):
                fewest = await place.postgres.starve(8)

        rates = await as_fast_after(place, chaos, round(12 * PACE))
        assert fewest == 0, fewest
        assert place.load.errors["503 store_unavailable"], place.load.errors
        print(f"\nleft={fewest} errors={dict(place.load.errors)} {rates}")

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
STEADY = 60  # batches, in 27 s
RATE_MIN = 0.95
CONNECTIONS = 100
SEED = 3


@dataclass
class Site:
    """A server that works itself, a worker beside it, and the PostgreSQL that they share."""

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
async def site(folder: Path) -> AsyncIterator[Site]:
    async with own_postgres(CONNECTIONS) as postgres:
        environment = {"FOREBAY_DATABASE_URL": postgres.url, "FOREBAY_LOG_FORMAT": "json"}
        async with (
            serving(CONFIG, folder=folder, environment=environment) as server,
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


@pytest.mark.timeout(1200)
async def test_restarts(tmp_path: Path, prove: bool) -> None:
    seconds = 600 if prove else 180
    async with site(tmp_path) as place:
        done: Counter[str] = Counter()

        async def chaos() -> None:
            done.update(await restart(place.postgres, random.Random(SEED), seconds))

        rates = await as_fast_after(place, chaos, round(seconds * PACE))
        assert done.total() >= seconds / 45
        jobs = len(place.load.batches) * JOBS_EACH
        print(f"\nrestarts={dict(done)} jobs={jobs} errors={dict(place.load.errors)} {rates}")

"""Two workers on one PostgreSQL, of which one is killed again and again: the other takes over, and nothing is lost."""

import random
import statistics
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.logs import unforeseen
from tests.support.postgres_chaos import OwnPostgres, WorkerProcess, own_postgres, start_worker
from tests.support.processes import family, lives
from tests.support.server import Server, eventually, serving
from tests.support.steady_load import NETWORK, steady_load

LEASE_SECONDS = 3
LEASE_SECONDS_LONG = 15  # the default
CONFIG = f"""
default_models = false
[batches]
live_per_project_max = 10_000
chunk_lines = 8
[jobs]
lease_seconds = %d
[outbound]
allowed_networks = ["{NETWORK}/32"]
[models.fake]
engine = "fake"
slots = 8
"""
LINES = 24  # in three chunks
LINE = "[[fake echo=1 token_ms=50]]"  # 0.2 s: one worker does 1.7 batches a second, whatever the processor does
PACE = 1.0  # well below that
BACKLOG, BACKLOG_LONG = 20, 40
KILLS, KILLS_LONG = 4, 10
RESCUE_SECONDS = 5.0
RATE_MIN = 0.95
SEED = 8
HELD = "SELECT id, attempt FROM jobs WHERE state = 'running' AND node = $1"
WAITING = """
SELECT count(*) FROM jobs JOIN unnest($1::text[], $2::int[]) AS held (id, attempt) USING (id)
WHERE jobs.attempt = held.attempt AND state IN ('running', 'available')
"""


async def rescue_seconds(postgres: OwnPostgres, worker: WorkerProcess) -> float | None:
    """Kill a worker; how long it takes until others have leased all that it held, None if it held nothing."""

    async def busy() -> bool:
        return len(await postgres.fetch(HELD, worker.node)) > 0

    await eventually(busy, within_seconds=30, what="work for the one that is to be killed")
    engines = family(worker.process.pid)
    await worker.kill()
    killed_at = time.monotonic()
    held = await postgres.fetch(HELD, worker.node)

    async def leased_again() -> bool:
        [row] = await postgres.fetch(WAITING, [row["id"] for row in held], [row["attempt"] for row in held])
        return int(row["count"]) == 0

    await eventually(leased_again, within_seconds=60, what="the rescue")
    took = time.monotonic() - killed_at
    await eventually(lambda: not any(map(lives, engines)), what="the end of its engines")
    return took if held else None


class Pair:
    """Two workers, one of which dies again and again."""

    def __init__(self, postgres: OwnPostgres, server: Server, environment: Mapping[str, str]) -> None:
        self.workers: list[WorkerProcess] = []
        self.rescues: list[float] = []
        self.kills = 0
        self._postgres = postgres
        self._server = server
        self._environment = environment
        self._chance = random.Random(SEED)

    async def complete(self, count: int) -> None:
        """Start workers until there are so many."""
        while len(self.workers) < count:
            name = f"worker-{self.kills}-{len(self.workers)}"
            self.workers.append(await start_worker(self._server, name, self._environment))

    async def kill(self, count: int) -> None:
        """Kill one of them, see the other take over, and start it again: until that was seen `count` times."""
        while len(self.rescues) < count:
            await self.complete(2)
            assert self.kills < 2 * count, "most of the killed held jobs"
            victim = self.workers.pop(self._chance.randrange(2))
            took = await rescue_seconds(self._postgres, victim)
            self.kills += 1
            self.rescues += [] if took is None else [took]

    def unharmed(self) -> None:
        """Nobody else has ended, and nothing was logged that nobody foresaw."""
        living: list[Server | WorkerProcess] = [self._server, *self.workers]
        for each in living:
            assert each.process.returncode is None, each.log
            assert not unforeseen(each.log), unforeseen(each.log)

    async def close(self) -> None:
        """End those that live."""
        for worker in self.workers:
            await worker.kill()


@asynccontextmanager
async def pair(postgres: OwnPostgres, server: Server, environment: Mapping[str, str]) -> AsyncIterator[Pair]:
    """One worker beside a server; the other comes when the killing begins."""
    workers = Pair(postgres, server, environment)
    try:
        await workers.complete(1)
        yield workers
    finally:
        await workers.close()


@pytest.mark.timeout(900)
async def test_one_of_two_is_killed(tmp_path: Path, prove: bool) -> None:
    lease_seconds, backlog, kills = (LEASE_SECONDS, BACKLOG, KILLS)
    if prove:
        lease_seconds, backlog, kills = (LEASE_SECONDS_LONG, BACKLOG_LONG, KILLS_LONG)
    async with own_postgres() as postgres:
        environment = {"FOREBAY_DATABASE_URL": postgres.url, "FOREBAY_LOG_FORMAT": "json"}
        idle = {**environment, "FOREBAY_JOBS_ENABLED": "false"}
        async with (
            serving(CONFIG % lease_seconds, folder=tmp_path, environment=idle) as server,
            pair(postgres, server, environment) as workers,
            steady_load(server, PACE, LINES, LINE) as load,
        ):
            before = await load.drain(backlog)
            await load.offer_during(workers.kill(kills))
            assert len(workers.workers) == 1
            after = await load.drain_as_fast(backlog, RATE_MIN * before)
            workers.unharmed()
            await load.check()
            print(
                f"\nkills={workers.kills} median={statistics.median(workers.rescues):.2f}"
                f" max={max(workers.rescues):.2f} batches={len(load.batches)} errors={dict(load.errors)}"
                f" before={before:.2f} after={after:.2f}"
            )
            assert max(workers.rescues) <= lease_seconds + RESCUE_SECONDS
            assert after >= RATE_MIN * before

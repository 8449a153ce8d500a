"""Transcriptions in the background over HTTP: handing in, waiting, reading results, and what is left of them."""

import json
import random
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import sqlalchemy as sa
from pydantic import SecretStr

from forebay.config import Settings
from forebay.store.database import Database
from tests.support.recordings import RATE, form_of
from tests.support.server import Server, eventually

TRANSCRIPTIONS = "/v1/audio/transcriptions"
ENDED = {"completed", "failed", "cancelled", "expired"}


def speech(seconds: float, seed: int = 1) -> bytes:
    """A recording in which no two seconds are alike, as WAV."""
    samples = random.Random(seed).randbytes(round(seconds * RATE) * 2)
    size = len(samples).to_bytes(4, "little")
    fields = (16).to_bytes(4, "little") + bytes((1, 0, 1, 0)) + RATE.to_bytes(4, "little")
    fields += (2 * RATE).to_bytes(4, "little") + bytes((2, 0, 16, 0))
    whole = (len(samples) + 36).to_bytes(4, "little")
    return b"RIFF" + whole + b"WAVEfmt " + fields + b"data" + size + samples


async def post(
    server: Server,
    content: bytes | None,
    *,
    path: str = TRANSCRIPTIONS,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> tuple[int, dict[str, Any], str]:
    """POST a recording in a form, or with none a JSON body; status, JSON and Location."""
    body = {"model": "whisper", "background": True, **fields}
    sent: dict[str, Any] = {"json": body}
    if content is not None:
        form = aiohttp.FormData()
        for name, value in form_of(body):
            form.add_field(name, value)
        form.add_field("file", content, filename="talk.wav", content_type="audio/wav")
        sent = {"data": form}
    named = {"Authorization": f"Bearer {key or server.key}", **(headers or {})}
    async with server.session.post(server.url + path, headers=named, **sent) as response:
        return response.status, await response.json(), response.headers.get("Location", "")


async def handed_in(server: Server, content: bytes | None, **fields: Any) -> str:
    """Hand a recording in; the id of its job."""
    status, job, location = await post(server, content, **fields)
    assert status == 202, job
    assert location == f"/v1/jobs/{job['id']}"
    return str(job["id"])


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


async def text_of(server: Server, job_id: str) -> str:
    """The text that a job has found, once it has ended."""
    job = await until_ended(server, job_id, 120)
    assert job["status"] == "completed", job
    status, body = await result(server, job_id, "text")
    assert status == 200
    return body.decode()


async def rows(server: Server, query: str, url: str | None = None) -> list[Any]:
    """What the server's database says."""
    secret = None if url is None else SecretStr(url)
    database = await Database.open(Settings(data_dir=server.folder / "data", database_url=secret))
    try:
        async with database.read() as connection:
            return [tuple(row) for row in await connection.execute(sa.text(query))]
    finally:
        await database.close()


def kept_recordings(folder: Path) -> list[str]:
    """The blobs and private files of recordings below a server's folder."""
    places = (folder / "data" / "blobs" / "recordings", folder / "data" / "recordings")
    return [path.name for place in places for path in place.rglob("*") if path.is_file()]


async def until_nothing_is_left(server: Server, model: str = "whisper", within_seconds: float = 5) -> None:
    """Wait until no recording is kept and no place of the engine is taken."""

    async def clear() -> bool:
        return not kept_recordings(server.folder) and await server.load(model) == (0, 0)

    await eventually(clear, within_seconds=within_seconds, what="an empty cellar and an idle engine")

"""Transcriptions in the background over HTTP: handing in, waiting, reading results, and what is left of them."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.jobs import result, until_ended
from tests.support.recordings import RATE, form_of
from tests.support.server import Server, eventually

TRANSCRIPTIONS = "/v1/audio/transcriptions"


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


async def text_of(server: Server, job_id: str) -> str:
    """The text that a job has found, once it has ended."""
    job = await until_ended(server, job_id, 120)
    assert job["status"] == "completed", job
    status, body = await result(server, job_id, "text")
    assert status == 200
    return body.decode()


def kept_recordings(folder: Path) -> list[str]:
    """The blobs and private files of recordings below a server's folder."""
    places = (folder / "data" / "blobs" / "recordings", folder / "data" / "recordings")
    return [path.name for place in places for path in place.rglob("*") if path.is_file()]


async def until_nothing_is_left(server: Server, model: str = "whisper", within_seconds: float = 5) -> None:
    """Wait until no recording is kept and no place of the engine is taken."""

    async def clear() -> bool:
        return not kept_recordings(server.folder) and await server.load(model) == (0, 0)

    await eventually(clear, within_seconds=within_seconds, what="an empty cellar and an idle engine")

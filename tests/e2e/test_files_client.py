"""Files and Uploads with the official client, unmodified."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
import pytest_asyncio

from tests.support.server import Server, serving

MIB = 2**20

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving("default_models = false\n") as running:
        yield running
        assert "request.bug" not in running.log


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with server.client() as client:
        yield client


async def test_the_life_of_a_file(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(b'{"custom_id": "1"}\n')
    made = await client.files.create(file=path, purpose="batch")
    assert (made.filename, made.bytes, made.purpose, made.status) == ("input.jsonl", 19, "batch", "processed")
    assert made.expires_at == made.created_at + 2_592_000
    assert await client.files.retrieve(made.id) == made
    assert await client.files.wait_for_processing(made.id) == made
    assert (await client.files.content(made.id)).read() == path.read_bytes()
    assert made in [file async for file in client.files.list(purpose="batch")]
    assert (await client.files.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(made.id)


async def test_an_expiry(client: openai.AsyncOpenAI) -> None:
    made = await client.files.create(
        file=("a.txt", b"data"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at == made.created_at + 3600
    assert (await client.files.create(file=b"data", purpose="vision")).expires_at is None
    with pytest.raises(openai.BadRequestError, match="3600"):
        await client.files.create(
            file=("a.txt", b"data"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 60}
        )


async def test_the_client_walks_through_all_pages(client: openai.AsyncOpenAI) -> None:
    made = [(await client.files.create(file=("a.txt", b"x"), purpose="evals")).id for _ in range(7)]
    async with asyncio.timeout(10):
        walked = [file.id async for file in client.files.list(purpose="evals", limit=2, order="asc")]
    assert walked == made
    page = await client.files.list(purpose="evals", limit=7)
    assert not page.has_next_page()


async def test_a_download_that_is_streamed(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    data = os.urandom(5 * MIB)
    made = await client.files.create(file=("a.bin", data), purpose="user_data")
    async with client.files.with_streaming_response.content(made.id) as response:
        await response.stream_to_file(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data


async def test_an_upload_in_parts(client: openai.AsyncOpenAI) -> None:
    pieces = [os.urandom(MIB) for _ in range(8)]
    whole = b"".join(pieces)
    upload = await client.uploads.create(
        bytes=len(whole), filename="big.bin", mime_type="application/octet-stream", purpose="user_data"
    )
    assert upload.status == "pending"
    backwards = await asyncio.gather(
        *(client.uploads.parts.create(upload.id, data=piece) for piece in reversed(pieces))
    )
    part_ids = [part.id for part in reversed(backwards)]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.uploads.complete(upload.id, part_ids=part_ids, md5=hashlib.md5(b"other").hexdigest())
    assert caught.value.code == "checksum_mismatch"
    completed = await client.uploads.complete(upload.id, part_ids=part_ids, md5=hashlib.md5(whole).hexdigest())
    assert completed.status == "completed"
    assert completed.file is not None
    assert (await client.files.content(completed.file.id)).read() == whole


async def test_a_file_that_the_client_cuts_itself(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(os.urandom(10 * MIB))
    upload = await client.uploads.upload_file_chunked(
        file=path, mime_type="application/octet-stream", purpose="user_data", part_size=3 * MIB
    )
    assert upload.status == "completed"
    assert upload.file is not None
    assert upload.file.filename == "large.bin"
    assert (await client.files.content(upload.file.id)).read() == path.read_bytes()


async def test_a_cancelled_upload(client: openai.AsyncOpenAI) -> None:
    upload = await client.uploads.create(bytes=4, filename="a.txt", mime_type="text/plain", purpose="vision")
    assert (await client.uploads.cancel(upload.id)).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        await client.uploads.parts.create(upload.id, data=b"data")

"""Idempotency-Key on a running server, over SQLite and PostgreSQL: whatever is sent again is made once."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
import pytest_asyncio
from pydantic import SecretStr

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.store.database import Database
from forebay.store.keys import KeyStore
from tests.support import postgres
from tests.support.batches import CHAT, jsonl, line, upload
from tests.support.server import FAKE, Server, serving

CONFIG = FAKE + "[jobs]\nenabled = false\n[batches]\nlive_per_project_max = 5000\n"
RETRY = {"X-Stainless-Retry-Count": "1"}
LINES = jsonl([line("a", "Hello.")])

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str | None:
    """The database: none is SQLite in the data folder."""
    return postgres.new_database() if request.param == "postgres" else None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(url: str | None) -> AsyncIterator[Server]:
    async with serving(CONFIG, environment={} if url is None else {"FOREBAY_DATABASE_URL": url}) as running:
        yield running
        assert "request.bug" not in running.log


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stranger(server: Server, url: str | None) -> str:
    """A key of another project."""
    secret = None if url is None else SecretStr(url)
    database = await Database.open(Settings(data_dir=server.folder / "data", database_url=secret))
    _, plain = await KeyStore(database, SystemClock()).create_key("stranger")
    await database.close()
    return plain


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def file_id(server: Server) -> str:
    return str((await upload(server, LINES))["id"])


class Reply:
    """An answer: status, whether it is that of an earlier request, its bytes and what they mean."""

    def __init__(self, response: aiohttp.ClientResponse, raw: bytes, json: dict[str, Any]) -> None:
        self.status = response.status
        self.replayed = response.headers.get("Idempotency-Replayed") == "true"
        self.raw = raw
        self.json = json

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])


async def post(
    server: Server, path: str, *, key: str | None = None, project: str | None = None, **content: Any
) -> Reply:
    headers = {"Authorization": f"Bearer {project or server.key}", **content.pop("headers", {})}
    if key is not None:
        headers["Idempotency-Key"] = key
    async with server.session.post(f"{server.url}/v1/{path}", headers=headers, **content) as response:
        return Reply(response, await response.read(), await response.json())


def batch_body(file_id: str, **fields: Any) -> dict[str, Any]:
    return {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **fields}


def form(content: bytes = LINES, name: str = "input.jsonl", **fields: str) -> aiohttp.FormData:
    data = aiohttp.FormData()
    for field, value in {"purpose": "batch", **fields}.items():
        data.add_field(field, value)
    data.add_field("file", content, filename=name, content_type="application/jsonl")
    return data


@asynccontextmanager
async def cutting(server: Server) -> AsyncIterator[str]:
    """The address of a proxy that cuts its first connection when the answer to it comes."""
    address = urlsplit(server.url)
    connections = 0

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, cut: bool = False) -> None:
        while data := await reader.read(65_536):
            if cut:
                break
            writer.write(data)
            await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        there = await asyncio.open_connection(address.hostname, address.port)
        cut = connections == 1
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer, cut=cut), return_exceptions=True)

    listener = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        assert connections > 1
    finally:
        listener.close()


async def batches(server: Server) -> int:
    """How many there are."""
    return len(await pages(server, "/v1/batches?limit=100"))


async def pages(server: Server, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    page = await server.get(path)
    found += page["data"]
    while page["has_more"]:
        page = await server.get(f"{path}&after={page['last_id']}")
        found += page["data"]
    return found


async def test_a_hundred_at_once_make_one_batch(server: Server, file_id: str) -> None:
    before = await batches(server)
    body = batch_body(file_id, metadata={"try": "hundred"})
    replies = await asyncio.gather(*(post(server, "batches", key="hundred", json=body) for _ in range(100)))
    assert {reply.status for reply in replies} == {200}
    assert len({reply.raw for reply in replies}) == 1
    assert [reply.replayed for reply in replies].count(False) == 1
    assert await batches(server) == before + 1
    other = await post(server, "batches", key="hundred", json=batch_body(file_id, metadata={"try": "other"}))
    assert (other.status, other.code) == (409, "idempotency_conflict")
    assert await batches(server) == before + 1


async def test_many_keys_make_one_batch_each(server: Server, file_id: str, prove: bool) -> None:
    count = 1000 if prove else 60
    before = await batches(server)
    chance = random.Random(10)
    sends = [f"many-{number}" for number in range(count)] * 4
    chance.shuffle(sends)
    room = asyncio.Semaphore(100)
    ids: dict[str, set[str]] = {}

    async def send(key: str) -> None:
        async with room:
            reply = await post(server, "batches", key=key, json=batch_body(file_id, metadata={"key": key}))
            assert reply.status == 200, reply.raw
            ids.setdefault(key, set()).add(reply.json["id"])
            if chance.random() < 0.1:
                other = await post(server, "batches", key=key, json=batch_body(file_id))
                assert (other.status, other.code) == (409, "idempotency_conflict")

    await asyncio.gather(*(send(key) for key in sends))
    assert {len(made) for made in ids.values()} == {1}
    assert len({name for made in ids.values() for name in made}) == count
    assert await batches(server) == before + count


async def test_a_file_is_stored_once(server: Server) -> None:
    folder = server.folder / "data" / "blobs" / "files"
    before = {path.name for path in folder.iterdir()}
    replies = await asyncio.gather(*(post(server, "files", key="file", data=form()) for _ in range(10)))
    assert {reply.status for reply in replies} == {200}
    assert len({reply.raw for reply in replies}) == 1
    assert {path.name for path in folder.iterdir()} - before == {replies[0].json["id"]}  # the losers left no blob
    for data in (form(b"other"), form(name="other.jsonl"), form(purpose="user_data")):
        other = await post(server, "files", key="file", data=data)
        assert (other.status, other.code) == (409, "idempotency_conflict")
    again = await post(server, "files", key="file", data=form())
    assert again.replayed
    assert len(list(folder.iterdir())) == len(before) + 1


async def test_an_upload_and_its_parts_are_made_once(server: Server) -> None:
    body = {"bytes": 4, "filename": "a.jsonl", "mime_type": "application/jsonl", "purpose": "batch"}
    first, again = [await post(server, "uploads", key="upload", json=body) for _ in range(2)]
    assert (first.status, again.raw, again.replayed) == (200, first.raw, True)
    path = f"uploads/{first.json['id']}"
    parts = []
    for _ in range(2):
        data = aiohttp.FormData()
        data.add_field("data", b"abcd", filename="part")
        parts.append(await post(server, f"{path}/parts", key="part", data=data))
    assert (parts[0].status, parts[1].raw, parts[1].replayed) == (200, parts[0].raw, True)
    ends = [
        await post(server, f"{path}/complete", key="complete", json={"part_ids": [parts[0].json["id"]]})
        for _ in range(2)
    ]
    assert (ends[0].status, ends[0].json["status"]) == (200, "completed")
    assert (ends[1].raw, ends[1].replayed) == (ends[0].raw, True)
    other = await post(server, f"{path}/complete", key="complete", json={"part_ids": ["part_x"]})
    assert (other.status, other.code) == (409, "idempotency_conflict")


async def test_a_webhook_is_made_once_with_its_secret(server: Server) -> None:
    body = {"url": "https://example.com/hook", "events": ["batch.completed"]}
    replies = await asyncio.gather(*(post(server, "webhooks", key="hook", json=body) for _ in range(5)))
    assert {reply.status for reply in replies} == {200}
    assert len({reply.raw for reply in replies}) == 1
    assert replies[0].json["secret"].startswith("whsec_")
    assert len((await server.get("/v1/webhooks"))["data"]) == 1


async def test_a_key_belongs_to_one_route_and_one_project(server: Server, file_id: str) -> None:
    body = batch_body(file_id)
    assert (await post(server, "batches", key="mine", json=body)).status == 200
    other = await post(server, "webhooks", key="mine", json={"url": "https://example.com/", "events": []})
    assert (other.status, other.code) == (409, "idempotency_conflict")
    request = {"model": "fake", "messages": [{"role": "user", "content": "Hello."}]}
    first, again = [await post(server, "chat/completions", key="mine", json=request) for _ in range(2)]
    assert (first.status, again.status) == (200, 200)
    assert not first.replayed
    assert not again.replayed


async def test_another_project_may_use_the_same_key(server: Server, file_id: str, stranger: str) -> None:
    theirs = (await upload(server, LINES, key=stranger))["id"]
    ours = await post(server, "batches", key="shared", json=batch_body(file_id))
    others = await post(server, "batches", key="shared", project=stranger, json=batch_body(theirs))
    assert (ours.status, others.status, others.replayed) == (200, 200, False)
    assert ours.json["id"] != others.json["id"]


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\there", "ümlaut"])
async def test_a_key_has_bounds(server: Server, file_id: str, key: str) -> None:
    before = await batches(server)
    reply = await post(server, "batches", key=key, json=batch_body(file_id))
    assert reply.status == 400
    assert await batches(server) == before


async def test_the_longest_key_is_taken(server: Server, file_id: str) -> None:
    key = "~ " * 127 + "x"
    first, again = [await post(server, "batches", key=key, json=batch_body(file_id)) for _ in range(2)]
    assert (first.status, again.json["id"]) == (200, first.json["id"])


async def test_what_was_refused_may_be_tried_again(server: Server) -> None:
    gone = await post(server, "batches", key="refused", json=batch_body("file-none"))
    assert gone.status == 400
    file = await upload(server, LINES)
    right = await post(server, "batches", key="refused", json=batch_body(file["id"]))
    assert (right.status, right.replayed) == (200, False)


async def test_the_answer_stays_when_what_it_needed_has_gone(server: Server) -> None:
    file = await upload(server, LINES)
    body = batch_body(file["id"])
    first = await post(server, "batches", key="stays", json=body)
    assert (await server.post(f"/v1/batches/{first.json['id']}/cancel"))[0] == 200
    async with server.session.delete(f"{server.url}/v1/files/{file['id']}", headers=server.headers) as response:
        assert response.status == 200
    again = await post(server, "batches", key="stays", json=body)
    assert (first.status, again.raw, again.replayed) == (200, first.raw, True)


async def test_a_clients_own_retry_makes_no_second_batch(server: Server, file_id: str) -> None:
    body = batch_body(file_id, metadata={"try": "retry"})
    before = await batches(server)
    first = await post(server, "batches", json=body)
    retries = await asyncio.gather(*(post(server, "batches", json=body, headers=RETRY) for _ in range(5)))
    assert {reply.raw for reply in retries} == {first.raw}
    assert await batches(server) == before + 1
    for count in ("0", "", "x", "-1"):  # a first try makes a batch
        made = await post(server, "batches", json=body, headers={"X-Stainless-Retry-Count": count})
        assert (made.status, made.replayed) == (200, False)
    other = await post(server, "batches", json=batch_body(file_id, metadata={"try": "else"}), headers=RETRY)
    assert not other.replayed
    assert await batches(server) == before + 6


async def test_the_official_client_that_tries_again_gets_its_batch(server: Server, file_id: str) -> None:
    """Its connection breaks after the answer was on its way, as behind a proxy; it sends the same again."""
    before = await batches(server)
    async with cutting(server) as url:
        client = server.client(base_url=f"{url}/v1", max_retries=2)
        batch = await client.batches.create(
            input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        await client.close()
    assert await batches(server) == before + 1
    assert (await server.get("/v1/batches?limit=1"))["data"][0]["id"] == batch.id


async def test_a_server_killed_before_its_answer_gives_it_after_its_start(url: str | None, tmp_path: Path) -> None:
    database = {} if url is None else {"FOREBAY_DATABASE_URL": postgres.new_database()}
    killed = {**database, "FOREBAY_REHEARSAL_KILL_AT": "batch.created"}
    async with serving(CONFIG, folder=tmp_path, environment=database) as server:
        body = batch_body((await upload(server, LINES))["id"])
    async with serving(CONFIG, folder=tmp_path, environment=killed) as server:
        with pytest.raises(aiohttp.ClientError):
            await post(server, "batches", key="killed", json=body)
        assert await server.process.wait() == -9
    async with serving(CONFIG, folder=tmp_path, environment=database) as server:
        (kept,) = await pages(server, "/v1/batches?limit=100")
        reply = await post(server, "batches", key="killed", json=body)
        assert (reply.status, reply.replayed, reply.json["id"]) == (200, True, kept["id"])
        assert await batches(server) == 1

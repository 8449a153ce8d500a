"""A customer who writes down whatever was acknowledged to them, and what must hold of it whatever was killed meanwhile.

I1 every acknowledged batch is there and finished. I2 every custom_id is on one line, with its own answer. I3 counts only
grow. I4 nothing changes after the end. I5 one event for each end, delivered. I6 nothing is left over.
"""

import asyncio
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import sqlalchemy as sa

from forebay.clock import new_id
from forebay.store.database import Database
from tests.support.batches import CHAT, LIVE, jsonl, line
from tests.support.processes import command_line
from tests.support.receiver import Received
from tests.support.server import ADMIN_KEY, eventually

_PATIENCE_SECONDS = 90.0
_CALL_SECONDS = 20.0


@dataclass
class Submitted:
    """A batch that was acknowledged, and all that was seen of it since."""

    name: str
    lines: int
    id: str
    file_id: str
    polls: list[tuple[int, int, int]] = field(default_factory=list)
    ended: dict[str, Any] | None = None
    contents: dict[str, str] = field(default_factory=dict)  # by file id the digest of the first reading

    def note(self, batch: dict[str, Any]) -> None:
        """I3, as far as one more poll can tell."""
        counts = batch["request_counts"]
        now = (counts["total"], counts["completed"], counts["failed"])
        before = self.polls[-1] if self.polls else (0, 0, 0)
        assert all(old <= new for old, new in zip(before, now, strict=True)), (self.name, before, now)
        assert now[0] in (0, self.lines), (self.name, now)
        assert now[1] + now[2] <= now[0], (self.name, now)
        self.polls.append(now)


class Customer:
    """Sends every request again until it is answered, under one Idempotency-Key, to wherever the server is by then."""

    def __init__(self, url: Callable[[], str], delay_ms: int) -> None:
        self.submitted: list[Submitted] = []
        self.sent_again = 0
        self._url = url
        self._delay_ms = delay_ms
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=_CALL_SECONDS), headers={"Authorization": f"Bearer {ADMIN_KEY}"}
        )

    async def close(self) -> None:
        """Hang up."""
        await self._session.close()

    async def submit(self, lines: int, *, by_parts: bool = False, **fields: Any) -> Submitted:
        """Upload a file, in one piece or in parts, and make a batch of it."""
        name = new_id("name")
        data = jsonl(line(f"{name}-{i}", self.question(name, i)) for i in range(lines))
        file_id = await (self._upload_by_parts(name, data) if by_parts else self._upload(name, data))
        body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **fields}
        batch = await self.post("/v1/batches", f"{name}-batch", lambda: {"json": body})
        again = await self.post("/v1/batches", f"{name}-batch", lambda: {"json": body})
        assert again["id"] == batch["id"], "one key made two batches"
        submitted = Submitted(name, lines, batch["id"], file_id)
        self.submitted.append(submitted)
        return submitted

    def question(self, name: str, number: int) -> str:
        """What is asked; the answer is all of it but the directive."""
        return f"{_answer(name, number)} [[fake echo=1 delay_ms={self._delay_ms}]]"

    async def _upload(self, name: str, data: bytes) -> str:
        file = await self.post("/v1/files", f"{name}-file", lambda: {"data": _form(data, purpose="batch")})
        return str(file["id"])

    async def _upload_by_parts(self, name: str, data: bytes) -> str:
        begin = {"filename": "input.jsonl", "purpose": "batch", "bytes": len(data), "mime_type": "application/jsonl"}
        upload = await self.post("/v1/uploads", f"{name}-upload", lambda: {"json": begin})
        path, middle = f"/v1/uploads/{upload['id']}", len(data) // 2
        parts = []
        for number, piece in enumerate((data[:middle], data[middle:])):
            form = _form_of("data", piece)
            part = await self.post(f"{path}/parts", f"{name}-part-{number}", form)
            parts.append(part["id"])
        done = await self.post(f"{path}/complete", f"{name}-complete", lambda: {"json": {"part_ids": parts}})
        return str(done["file"]["id"])

    async def post(self, path: str, key: str, content: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """POST until there is an answer."""
        answer: dict[str, Any] = json.loads(await self._until_answered("POST", path, content, {"Idempotency-Key": key}))
        return answer

    async def get(self, path: str) -> bytes:
        """GET until there is an answer."""
        return await self._until_answered("GET", path, dict, {})

    async def look(self, submitted: Submitted) -> bool:
        """One poll; whether the batch has ended. The end and the files are kept when they are first seen."""
        batch = json.loads(await self.get(f"/v1/batches/{submitted.id}"))
        submitted.note(batch)
        if batch["status"] in LIVE:
            return False
        for file_id in filter(None, (batch["output_file_id"], batch["error_file_id"])):
            content = await self.get(f"/v1/files/{file_id}/content")
            submitted.contents[file_id] = hashlib.sha256(content).hexdigest()
        submitted.ended = batch
        return True

    async def look_at_all(self) -> bool:
        """Poll what has not ended; whether everything has."""
        left = [each for each in self.submitted if each.ended is None]
        return all([await self.look(each) for each in left])

    async def _until_answered(
        self, method: str, path: str, content: Callable[[], dict[str, Any]], headers: dict[str, str]
    ) -> bytes:
        deadline = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
        while True:
            assert asyncio.get_running_loop().time() < deadline, f"no answer to {method} {path}"
            url = await eventually(self._url, within_seconds=_PATIENCE_SECONDS, what="a server")
            try:
                async with self._session.request(method, url + path, headers=headers, **content()) as response:
                    body = await response.read()
                    if response.status == 200:
                        return body
                    assert response.status in (429, 500, 503), (method, path, response.status, body)
                    assert response.status != 500, (method, path, body)
            except (aiohttp.ClientError, TimeoutError, ConnectionError):
                pass
            self.sent_again += 1
            await asyncio.sleep(0.02)


def _answer(name: str, number: int) -> str:
    return f"Line {number} of {name}."


def _form_of(field_name: str, data: bytes) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        form = aiohttp.FormData()
        form.add_field(field_name, data, filename="part", content_type="application/octet-stream")
        return {"data": form}

    return make


def _form(data: bytes, **fields: str) -> aiohttp.FormData:
    form = aiohttp.FormData()
    for name, value in fields.items():
        form.add_field(name, value)
    form.add_field("file", data, filename="input.jsonl", content_type="application/jsonl")
    return form


@dataclass
class Found:
    """What the checks have counted."""

    batches: int = 0
    lines: int = 0
    lost: int = 0
    duplicates: int = 0
    polls: int = 0
    events: int = 0
    deliveries: int = 0
    request_ids: set[str] = field(default_factory=set)  # of the answers that were kept


async def check_batches(customer: Customer, found: Found) -> None:
    """I1 to I4."""
    listed = set()
    after = ""
    while True:
        page = json.loads(await customer.get(f"/v1/batches?limit=100{after}"))
        listed |= {each["id"] for each in page["data"]}
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    acknowledged = {each.id for each in customer.submitted}
    assert len(acknowledged) == len(customer.submitted), "two submits were answered with one batch"
    assert listed == acknowledged, f"lost: {acknowledged - listed}; made twice: {listed - acknowledged}"
    for submitted in customer.submitted:
        await _check_batch(customer, submitted, found)


async def _check_batch(customer: Customer, submitted: Submitted, found: Found) -> None:
    batch = json.loads(await customer.get(f"/v1/batches/{submitted.id}"))
    assert batch == submitted.ended, "it has changed after its end"
    assert batch["status"] == "completed", batch
    submitted.note(batch)
    counts = batch["request_counts"]
    names: Counter[str] = Counter()
    sizes = []
    for file_id in (batch["output_file_id"], batch["error_file_id"]):
        content = b"" if file_id is None else await customer.get(f"/v1/files/{file_id}/content")
        if file_id is not None:
            assert hashlib.sha256(content).hexdigest() == submitted.contents[file_id], "a file was overwritten"
        rows = [json.loads(each) for each in content.splitlines()]
        sizes.append(len(rows))
        for row in rows:
            names[row["custom_id"]] += 1
            _check_row(submitted, row, found)
    found.duplicates += sum(count - 1 for count in names.values())
    found.lost += sum(1 for i in range(submitted.lines) if f"{submitted.name}-{i}" not in names)
    assert names.total() == len(names) == submitted.lines, (submitted.name, names.most_common(3))
    assert (counts["completed"], counts["failed"]) == tuple(sizes)
    assert (counts["total"], counts["completed"] + counts["failed"]) == (submitted.lines, submitted.lines)
    found.batches += 1
    found.lines += submitted.lines
    found.polls += len(submitted.polls)


def _check_row(submitted: Submitted, row: dict[str, Any], found: Found) -> None:
    """An answer is that of its own line; nothing here is wrong, so none may fail."""
    name, _, number = row["custom_id"].rpartition("-")
    assert name == submitted.name, row
    assert 0 <= int(number) < submitted.lines
    assert row["error"] is None, row
    text = row["response"]["body"]["choices"][0]["message"]["content"]
    assert text.strip() == _answer(name, int(number)), row
    found.request_ids.add(row["response"]["request_id"])


def all_told(customer: Customer, received: list[Received]) -> bool:
    """Whether the end of every batch was delivered."""
    return {each.id for each in customer.submitted} <= {each.event["data"]["id"] for each in received}


def check_events(customer: Customer, received: list[Received], found: Found) -> None:
    """I5."""
    ids: dict[str, set[str]] = defaultdict(set)
    bodies: dict[str, set[bytes]] = defaultdict(set)
    for each in received:
        assert each.event["type"] == "batch.completed", each.event
        ids[each.event["data"]["id"]].add(each.headers["webhook-id"])
        bodies[each.headers["webhook-id"]].add(each.body)
    assert set(ids) == {submitted.id for submitted in customer.submitted}
    assert all(len(event) == 1 for event in ids.values()), "two events for one end"
    assert all(len(body) == 1 for body in bodies.values())
    found.events, found.deliveries = len(bodies), len(received)


async def settled(database: Database) -> bool:
    """Whether no job goes on and no chunk is left."""
    query = "SELECT count(*) FROM jobs WHERE kind = 'chunk' OR finished_at IS NULL"
    async with database.read() as connection:
        return not await connection.scalar(sa.text(query))


async def check_rows(database: Database, customer: Customer) -> None:
    """I6 of the tables: what served to work is gone, what was asked for is there, nobody holds anything."""
    queries = {
        "segments": "SELECT count(*) FROM segments",
        "chunks": "SELECT count(*) FROM jobs WHERE kind = 'chunk'",
        "live jobs": "SELECT count(*) FROM jobs WHERE finished_at IS NULL OR node IS NOT NULL",
        "half files": "SELECT count(*) FROM files WHERE state <> 'ready'",
        "dead letters": "SELECT count(*) FROM dead_letters",
        "parts": "SELECT count(*) FROM upload_parts",
    }
    async with database.read() as connection:
        left = {name: await connection.scalar(sa.text(query)) for name, query in queries.items()}
        inputs = set((await connection.execute(sa.text("SELECT id FROM files WHERE purpose = 'batch'"))).scalars())
    assert not any(left.values()), left
    assert inputs == {each.file_id for each in customer.submitted}, "a file was made twice"


async def check_blobs(database: Database, folder: Path) -> None:
    """I6 of the blobs: there are those of ready files, whole, and no others."""
    async with database.read() as connection:
        rows = await connection.execute(sa.text("SELECT blob_key, bytes FROM files"))
        wanted = {row.blob_key: row.bytes for row in rows}
    there = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert there == wanted, {"orphans": set(there) - set(wanted), "missing": set(wanted) - set(there)}


def describe(processes: list[psutil.Process]) -> list[str]:
    """For a message about orphans."""
    return [command_line(process) for process in processes]

"""The routes of files, through a real server: forms of every kind, limits, ranges, tenants, and what a cut leaves behind."""

import asyncio
import json
import os
import random
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from forebay.blobs.blobs import open_blobs
from forebay.config import Settings
from forebay.store.database import Database
from forebay.store.files import FileStore
from forebay.store.uploads import UploadStore
from tests.support import s3
from tests.support.clock import FakeClock
from tests.support.memory import growth
from tests.support.server import Server, eventually, serving, serving_well
from tests.support.wire import Reply, get, post, wire

MIB = 2**20
CONFIG = f"""
default_models = false
[http]
body_timeout_seconds = 2
write_stall_seconds = 2
[files]
bytes_max = {5 * MIB}
part_bytes_max = {2 * MIB}
[batches]
bytes_max = {MIB}
"""
TYPE = "Content-Type: multipart/form-data; boundary=b0undary"
Field = tuple[str, str | None, bytes]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving_well(CONFIG) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def patient() -> AsyncIterator[Server]:
    """One that waits longer for the rest of a body."""
    async with serving_well(CONFIG.replace("body_timeout_seconds = 2", "body_timeout_seconds = 60")) as running:
        yield running


def form(*fields: Field, end: bytes = b"--b0undary--\r\n") -> bytes:
    """A form by hand, with its fields in just this order."""
    body = b""
    for name, filename, data in fields:
        label = f'; filename="{filename}"' if filename is not None else ""
        head = f'--b0undary\r\nContent-Disposition: form-data; name="{name}"{label}\r\n\r\n'
        body += head.encode() + data + b"\r\n"
    return body + end


def upload(data: bytes, purpose: str = "user_data", filename: str = "a.txt", **more: str) -> bytes:
    others = [(name, None, value.encode()) for name, value in more.items()]
    return form(("purpose", None, purpose.encode()), *others, ("file", filename, data))


async def send(server: Server, body: bytes, *headers: str, path: str = "/v1/files", **options: Any) -> Reply:
    async with wire(server.url) as line:
        await line.send(post(body, *(headers or (TYPE,)), path=path, **options))
        return await line.reply()


async def ask(server: Server, path: str, *headers: str, method: str = "GET", key: str | None = None) -> Reply:
    async with wire(server.url) as line:
        await line.send(get(path, f"Authorization: Bearer {key or server.key}", *headers, method=method))
        return await line.reply()


async def make(server: Server, data: bytes, **options: Any) -> dict[str, Any]:
    reply = await send(server, upload(data, **options))
    assert reply.status == 200, reply
    found: dict[str, Any] = reply.json
    return found


def refused(reply: Reply, status: int, code: str) -> None:
    assert (reply.status, reply.json["error"]["code"]) == (status, code), reply
    assert "blobs" not in reply.json["error"]["message"]


def blobs_of(server: Server) -> list[Path]:
    """Every file in the blob folder, half-written ones too."""
    return sorted(path for path in (server.folder / "data" / "blobs").rglob("*") if path.is_file())


def rows_of(server: Server, table: str = "files") -> list[tuple[Any, ...]]:
    with sqlite3.connect(server.folder / "data" / "forebay.db") as database:
        return database.execute(f"SELECT id, state FROM {table}").fetchall()


def again(server: Server, environment: dict[str, str] | None = None) -> AbstractAsyncContextManager[Server]:
    """The server once more, after it has ended, on the same data."""
    (server.folder / "server.log").unlink()
    return serving(CONFIG, folder=server.folder, environment=environment)


async def sweep_later(server: Server) -> None:
    """What the sweep does two days later, in this process."""
    settings = Settings(data_dir=server.folder / "data")
    clock = FakeClock()
    clock.advance(2 * 86_400)
    database = await Database.open(settings)
    try:
        await FileStore(database, clock).sweep(open_blobs(settings), clock.now(), 1000)
        await UploadStore(database, clock).sweep(open_blobs(settings), clock.now(), 1000)
    finally:
        await database.close()


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 3 * MIB])
async def test_what_is_sent_comes_back(server: Server, size: int) -> None:
    data = os.urandom(size)
    made = await make(server, data, filename="name.bin")
    assert set(made) == {
        *("id", "object", "bytes", "created_at", "filename", "purpose", "status", "status_details"),
    }  # fmt: skip
    assert (made["object"], made["bytes"], made["filename"], made["status"]) == ("file", size, "name.bin", "processed")
    reply = await ask(server, f"/v1/files/{made['id']}/content")
    assert (reply.status, reply.body) == (200, data)
    assert reply.headers["content-length"] == str(size)
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["content-disposition"].startswith('attachment; filename="name.bin"')
    assert (await ask(server, f"/v1/files/{made['id']}")).json == made
    deleted = await ask(server, f"/v1/files/{made['id']}", method="DELETE")
    assert deleted.json == {"id": made["id"], "object": "file", "deleted": True}
    for path in (f"/v1/files/{made['id']}", f"/v1/files/{made['id']}/content"):
        refused(await ask(server, path), 404, "not_found")


@pytest.mark.parametrize(
    "data", [b"\r\n--b0undar", b"--b0undary", b"\r\n--b0undarx\r\n" * 999, b"\r" * 99_999, b"\n-" * 9]
)
async def test_bytes_that_look_like_a_boundary_come_back(server: Server, data: bytes) -> None:
    made = await make(server, data)
    assert (await ask(server, f"/v1/files/{made['id']}/content")).body == data


async def test_the_fields_come_in_any_order(server: Server) -> None:
    reply = await send(
        server,
        form(
            ("expires_after[seconds]", None, b"3600"),
            ("file", "x.txt", b"data"),
            ("expires_after[anchor]", None, b"created_at"),
            ("purpose", None, b"vision"),
        ),
    )
    assert reply.status == 200, reply
    assert reply.json["expires_at"] - reply.json["created_at"] == 3600
    assert reply.json["purpose"] == "vision"


@pytest.mark.parametrize("cut", [1, 7, 60, 200])
async def test_a_form_that_comes_in_small_pieces(server: Server, cut: int) -> None:
    body = upload(b"0123456789" * 30, filename="pieces.txt")
    async with wire(server.url) as line:
        await line.send(post(b"", TYPE, path="/v1/files").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
        for start in range(0, len(body), cut):
            piece = body[start : start + cut]
            await line.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        await line.send(b"0\r\n\r\n")
        reply = await line.reply()
    assert (reply.status, reply.json["bytes"]) == (200, 300)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\\\evil\\\\name.txt", "name.txt"),
        ("a\x00b\x1b[31m.txt", "ab[31m.txt"),
        ("", "file"),
        ("..", "file"),
        ("/", "file"),
        ("x" * 400 + ".txt", "x" * 251 + ".txt"),
        ("naïve – 名前.txt", "naïve – 名前.txt"),
    ],
)
async def test_a_name_is_a_label_and_nothing_more(server: Server, given: str, kept: str) -> None:
    made = await make(server, b"data", filename=given)
    assert made["filename"] == kept
    reply = await ask(server, f"/v1/files/{made['id']}/content")
    assert (reply.status, reply.body) == (200, b"data")
    assert not [path for path in blobs_of(server) if not path.name.startswith("file_")]


async def test_files_for_batches(server: Server) -> None:
    made = await make(server, b"{}", purpose="batch", filename="in.JSONL")
    assert made["expires_at"] - made["created_at"] == 2_592_000
    refused(await send(server, upload(b"{}", "batch", "in.json")), 400, "invalid_value")
    refused(await send(server, upload(bytes(MIB + 1), "batch", "in.jsonl")), 413, "payload_too_large")
    last = form(("file", "in.jsonl", bytes(MIB + 1)), ("purpose", None, b"batch"))
    refused(await send(server, last), 413, "payload_too_large")
    assert (await send(server, upload(bytes(MIB), "batch", "in.jsonl"))).status == 200


@pytest.mark.parametrize(
    ("anchor", "seconds", "param"),
    [
        ("created_at", "3599", "expires_after[seconds]"),
        ("created_at", "2592001", "expires_after[seconds]"),
        ("created_at", "-1", "expires_after[seconds]"),
        ("created_at", "1e4", "expires_after[seconds]"),
        ("created_at", "٣٦٠٠", "expires_after[seconds]"),
        ("created_at", "9" * 5000, "expires_after[seconds]"),
        ("created_at", None, "expires_after[seconds]"),
        ("last_used", "3600", "expires_after[anchor]"),
        (None, "3600", "expires_after[anchor]"),
    ],
)
async def test_an_expiry_has_bounds(server: Server, anchor: str | None, seconds: str | None, param: str) -> None:
    fields: list[Field] = [("purpose", None, b"vision"), ("file", "a", b"data")]
    fields += [("expires_after[anchor]", None, anchor.encode())] if anchor else []
    fields += [("expires_after[seconds]", None, seconds.encode())] if seconds else []
    reply = await send(server, form(*fields))
    refused(reply, 400, "invalid_value")
    assert reply.json["error"]["param"] == param


PURPOSE: Field = ("purpose", None, b"vision")
FILE: Field = ("file", "a.txt", b"data")
BAD: dict[str, tuple[bytes, str, int, str]] = {
    "no boundary": (form(PURPOSE, FILE), "Content-Type: multipart/form-data", 400, "invalid_multipart"),
    "another boundary": (form(PURPOSE, FILE), TYPE + "x", 400, "invalid_multipart"),
    "a boundary beyond measure": (b"", "Content-Type: multipart/form-data; boundary=" + "b" * 300, 400, "invalid_multipart"),
    "json": (b"{}", "Content-Type: application/json", 400, "invalid_multipart"),
    "no type": (b"{}", "X-None: 1", 400, "invalid_multipart"),
    "nothing": (b"", TYPE, 400, "invalid_multipart"),
    "no last boundary": (form(PURPOSE, FILE, end=b""), TYPE, 400, "invalid_multipart"),
    "cut in a header": (form(PURPOSE) [:-20] + b"\r\n--b0undary\r\nContent-Dis", TYPE, 400, "invalid_multipart"),
    "two files": (form(PURPOSE, FILE, FILE), TYPE, 400, "invalid_multipart"),
    "no file": (form(PURPOSE), TYPE, 400, "missing_required_parameter"),
    "no purpose": (form(FILE), TYPE, 400, "missing_required_parameter"),
    "purpose twice": (form(PURPOSE, PURPOSE, FILE), TYPE, 400, "invalid_value"),
    "purpose as a file": (form(("purpose", "p.txt", b"vision"), FILE), TYPE, 400, "invalid_value"),
    "file as a text": (form(PURPOSE, ("file", None, b"data")), TYPE, 400, "invalid_value"),
    "wrong purpose": (form(("purpose", None, b"batch_output"), FILE), TYPE, 400, "invalid_value"),
    "unknown field": (form(PURPOSE, ("model", None, b"x"), FILE), TYPE, 400, "invalid_value"),
    "1,000 fields": (form(*[("purpose", None, b"x")] * 1000, FILE), TYPE, 400, "invalid_value"),
    "1,000 files": (form(PURPOSE, *[FILE] * 1000), TYPE, 400, "invalid_multipart"),
    "a huge field": (form(("purpose", None, b"x" * 10_000), FILE), TYPE, 413, "payload_too_large"),
    "a huge header": (form(PURPOSE, ("file", "n" * 70_000, b"x")), TYPE, 400, "invalid_multipart"),
    "many headers": (
        b"--b0undary\r\n" + b"X-A: b\r\n" * 500 + b"\r\nx\r\n--b0undary--", TYPE, 400, "invalid_multipart",
    ),
    "a part without a name": (b"--b0undary\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b0undary--", TYPE, 400, "invalid_multipart"),
    "a part that is an attachment": (
        b'--b0undary\r\nContent-Disposition: attachment; name="file"\r\n\r\nx\r\n--b0undary--', TYPE, 400, "invalid_multipart",
    ),
    "base64": (
        b'--b0undary\r\nContent-Disposition: form-data; name="file"\r\nContent-Transfer-Encoding: base64\r\n\r\neA==', TYPE, 400, "invalid_multipart",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
async def test_what_is_no_such_form_is_refused_and_leaves_nothing(server: Server, name: str) -> None:
    body, kind, status, code = BAD[name]
    before = blobs_of(server)
    refused(await send(server, body, kind), status, code)
    assert blobs_of(server) == before
    assert {state for _, state in rows_of(server)} <= {"ready"}


async def test_mutilated_forms_do_no_harm(server: Server, prove: bool) -> None:
    """A form with bytes changed, cut out and doubled is taken or refused, and nothing of it stays behind."""
    chance = random.Random(20261121)
    whole = form(PURPOSE, ("file", "a.txt", b"data\r\n--b0undar"))
    statuses = set()
    for _ in range(3000 if prove else 300):
        body = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            place, length = chance.randrange(len(body)), chance.randint(0, 12)
            other = chance.choice(
                (chance.randbytes(length), body[place : place + length] * 2, b"\r\n", b"--", b'"', b"")
            )
            body[place : place + length] = other
        reply = await send(server, bytes(body))
        statuses.add(reply.status)
        assert reply.status in {200, 400}, (bytes(body), reply)
    assert statuses == {200, 400} or not prove
    assert {state for _, state in rows_of(server)} <= {"ready"}
    assert not [path for path in blobs_of(server) if ".partial" in path.parts]


async def test_a_file_above_the_limit_is_refused_while_it_is_sent(server: Server) -> None:
    body = upload(bytes(5 * MIB + 1))
    refused(await send(server, body), 413, "payload_too_large")
    async with wire(server.url) as line:  # the answer comes although the body never ends
        await line.send(post(body, TYPE, path="/v1/files").replace(f": {len(body)}".encode(), b": 999999999999"))
        refused(await line.reply(), 413, "payload_too_large")
    assert (await send(server, upload(bytes(5 * MIB)))).status == 200
    assert not [path for path in blobs_of(server) if ".partial" in path.parts]


async def test_a_connection_goes_on_after_a_refusal(server: Server) -> None:
    async with wire(server.url) as line:
        await line.send(post(upload(bytes(5 * MIB + 1)), TYPE, path="/v1/files"))
        assert (await line.reply()).status == 413
        await line.send(post(upload(b"small"), TYPE, path="/v1/files"))
        assert (await line.reply()).status == 200


async def test_a_sender_without_a_key_is_answered_before_the_body(server: Server) -> None:
    async with wire(server.url) as line:
        await line.send(post(b"", TYPE, path="/v1/files", key="wrong").replace(b"Length: 0", b"Length: 999999999"))
        assert (await line.reply()).status == 401
        began = asyncio.get_running_loop().time()
        sending = asyncio.create_task(line.send_slowly(upload(bytes(4 * MIB)), 400_000))
        await line.rest()  # closed at the ordinary deadline, however much comes
        assert asyncio.get_running_loop().time() - began < 7  # the whole would take ten
        sending.cancel()


@pytest.mark.parametrize("path", ["/v1/files", "/v1/uploads/{upload}/parts"])
async def test_a_slow_but_steady_sender_may_take_longer_than_a_body(server: Server, path: str) -> None:
    body = upload(bytes(300_000)) if path == "/v1/files" else form(("data", "d", bytes(300_000)))
    target = path.format(upload=await new_upload(server, 300_000))
    for _ in range(3):
        async with wire(server.url) as line:
            began = asyncio.get_running_loop().time()
            await line.send(post(body, TYPE, path=target)[: -len(body)])
            replying = asyncio.create_task(line.reply())
            await line.send_slowly(body, 60_000)
            reply = await replying
            took = asyncio.get_running_loop().time() - began
        if took < 7:  # else this sender was held up, and was not steady
            break
    assert reply.status == 200, reply
    assert took > 4.5  # the deadline of a body is 2 s


@pytest.mark.parametrize("burst", [0, MIB])
async def test_a_sender_below_the_rate_is_cut_off_even_after_a_burst(server: Server, burst: int) -> None:
    body = upload(bytes(4 * MIB))
    async with wire(server.url) as line:
        await line.send(post(body, TYPE, path="/v1/files")[: burst - len(body)])
        trickling = asyncio.create_task(line.send_slowly(body[burst:], 1000))
        async with asyncio.timeout(8):
            refused(await line.reply(), 408, "request_not_received")
        trickling.cancel()
    await eventually(lambda: {state for _, state in rows_of(server)} <= {"ready"}, what="the cut file to be discarded")


async def test_a_cut_upload_leaves_nothing(patient: Server) -> None:
    before = blobs_of(patient)
    body = upload(os.urandom(4 * MIB))
    async with wire(patient.url) as line:
        await line.send(post(body, TYPE, path="/v1/files")[: 3 * MIB])
        await eventually(lambda: len(blobs_of(patient)) > len(before), what="the first bytes to be stored")
        assert "uploading" in {state for _, state in rows_of(patient)}
    await eventually(lambda: blobs_of(patient) == before, what="the half file to be gone")
    await eventually(lambda: {state for _, state in rows_of(patient)} <= {"ready"}, what="its row to be gone")


async def test_files_on_their_way_in_are_limited(patient: Server) -> None:
    key, other = await patient.create_key("busy"), await patient.create_key("idle")
    head = post(upload(b"x" * 500), TYPE, path="/v1/files", key=key)[:-100]
    async with AsyncExitStack() as stack:
        for _ in range(32):
            line = await stack.enter_async_context(wire(patient.url))
            await line.send(head)

        def on_their_way() -> bool:
            return [state for _, state in rows_of(patient)].count("uploading") == 32

        await eventually(on_their_way, what="all of them to be let in")
        refused(await send(patient, upload(b"x"), key=key), 429, "too_many_uploads")
        assert (await send(patient, upload(b"x"), key=other)).status == 200

    async def accepts() -> bool:
        return (await send(patient, upload(b"x"), key=key)).status == 200

    await eventually(accepts, what="room again")


async def test_lists(server: Server) -> None:
    key = await server.create_key("lists")
    assert (await ask(server, "/v1/files", key=key)).json == {
        "object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None,
    }  # fmt: skip
    made = [(await send(server, upload(b"x", "vision" if n % 2 else "evals"), key=key)).json for n in range(5)]
    page = (await ask(server, "/v1/files?limit=2", key=key)).json
    assert page["data"] == made[:2:-1]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (True, made[4]["id"], made[3]["id"])
    page = (await ask(server, f"/v1/files?limit=3&after={page['last_id']}", key=key)).json
    assert (page["data"], page["has_more"]) == (made[2::-1], False)
    page = (await ask(server, "/v1/files?order=asc&purpose=vision", key=key)).json
    assert page["data"] == [made[1], made[3]]
    for query in ("limit=0", "limit=10001", "limit=x", "order=up", "after=" + "x" * 200):
        refused(await ask(server, f"/v1/files?{query}", key=key), 400, "invalid_request")
    refused(await ask(server, "/v1/files?after=file_nope", key=key), 404, "not_found")


async def test_tenants_see_nothing_of_each_other(server: Server) -> None:
    mine, theirs = await server.create_key("mine"), await server.create_key("theirs")
    reader = await server.create_key("mine", "read_only")
    made = (await send(server, upload(b"secret"), key=mine)).json
    announced = await new_upload(server, 5, key=mine)
    assert (await ask(server, f"/v1/files/{made['id']}/content", key=reader)).body == b"secret"
    refused(await ask(server, f"/v1/files/{made['id']}", method="DELETE", key=reader), 403, "insufficient_role")
    refused(await send(server, upload(b"x"), key=reader), 403, "insufficient_role")
    for method, path in (
        ("GET", f"/v1/files/{made['id']}"),
        ("GET", f"/v1/files/{made['id']}/content"),
        ("DELETE", f"/v1/files/{made['id']}"),
        ("GET", f"/v1/uploads/{announced}"),
        ("POST", f"/v1/uploads/{announced}/cancel"),
    ):
        refused(await ask(server, path, "Content-Length: 0", method=method, key=theirs), 404, "not_found")
    part = form(("data", "d", b"x"))
    refused(await send(server, part, path=f"/v1/uploads/{announced}/parts", key=theirs), 404, "not_found")
    assert (await ask(server, "/v1/files", key=theirs)).json["data"] == []
    refused(await ask(server, f"/v1/files?after={made['id']}", key=theirs), 404, "not_found")
    assert (await ask(server, f"/v1/files/{made['id']}", key=mine)).json == made


@pytest.mark.parametrize(
    ("wanted", "status", "start", "end"),
    [
        ("bytes=0-0", 206, 0, 1),
        ("bytes=10-19", 206, 10, 20),
        ("bytes=990-", 206, 990, 1000),
        ("bytes=990-5000", 206, 990, 1000),
        ("bytes=-5", 206, 995, 1000),
        ("bytes=-5000", 200, 0, 1000),
        ("bytes=0-", 200, 0, 1000),
        ("bytes=5-2", 200, 0, 1000),
        ("bytes=0-1,5-6", 200, 0, 1000),
        ("lines=1-2", 200, 0, 1000),
        ("bytes=1000-", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
    ],
)
async def test_ranges(server: Server, wanted: str, status: int, start: int, end: int) -> None:
    data = os.urandom(1000)
    made = await make(server, data)
    reply = await ask(server, f"/v1/files/{made['id']}/content", f"Range: {wanted}")
    assert reply.status == status
    if status == 416:
        refused(reply, 416, "range_not_satisfiable")
        assert reply.headers["content-range"] == "bytes */1000"
        return
    assert reply.body == data[start:end]
    if status == 206:
        assert reply.headers["content-range"] == f"bytes {start}-{end - 1}/1000"


async def test_a_reader_who_takes_nothing_is_cut_off(server: Server) -> None:
    made = await make(server, os.urandom(5 * MIB))
    async with wire(server.url) as line:
        line.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await line.send(get(f"/v1/files/{made['id']}/content", f"Authorization: Bearer {server.key}"))
        await eventually(
            lambda: server.metric("forebay_connections_closed_total", reason="write_stall"),
            what="the cut",
            within_seconds=15,
        )


async def test_a_file_is_made_once_for_a_key(server: Server) -> None:
    once = "Idempotency-Key: file-1"
    before = len(blobs_of(server))
    replies = await asyncio.gather(*(send(server, upload(b"same"), TYPE, once) for _ in range(8)))
    assert {reply.status for reply in replies} == {200}
    assert len({reply.json["id"] for reply in replies}) == 1
    refused(await send(server, upload(b"different"), TYPE, once), 409, "idempotency_conflict")
    refused(await send(server, upload(b"same", "vision"), TYPE, once), 409, "idempotency_conflict")
    assert len(blobs_of(server)) == before + 1


async def test_no_room() -> None:
    environment = {"FOREBAY_FILES_FREE_BYTES_MIN": str(2**50)}
    async with serving(CONFIG) as server:
        made = await make(server, b"before")
        await server.stop()
        async with again(server, environment) as full:
            refused(await send(full, upload(b"x")), 507, "insufficient_storage")
            identity = await new_upload(full, 1)
            part = form(("data", "d", b"x"))
            refused(await send(full, part, path=f"/v1/uploads/{identity}/parts"), 507, "insufficient_storage")
            assert (await ask(full, f"/v1/files/{made['id']}/content")).body == b"before"
            assert len(blobs_of(full)) == 1
            assert {state for _, state in rows_of(full)} == {"ready"}
            assert (await ask(full, f"/v1/files/{made['id']}", method="DELETE")).status == 200


async def test_no_room_for_a_project() -> None:
    async with serving(CONFIG, environment={"FOREBAY_FILES_PROJECT_BYTES_MAX": "1000"}) as server:
        made = await make(server, bytes(900))
        refused(await send(server, upload(bytes(101))), 507, "insufficient_storage")
        assert len(blobs_of(server)) == 1
        await ask(server, f"/v1/files/{made['id']}", method="DELETE")
        await make(server, bytes(1000))


async def new_upload(server: Server, size: int, purpose: str = "vision", **options: Any) -> str:
    body = {"bytes": size, "filename": "a.jsonl", "mime_type": "text/plain", "purpose": purpose}
    reply = await send(
        server, json.dumps(body).encode(), "Content-Type: application/json", path="/v1/uploads", **options
    )
    assert reply.status == 200, reply
    return str(reply.json["id"])


@pytest.mark.parametrize("point", ["file.blob_written", "file.row_committed", "upload.joined"])
async def test_a_server_killed_at_a_commit_point_leaves_nothing_that_a_sweep_does_not_find(point: str) -> None:
    async with serving(CONFIG, environment={"FOREBAY_REHEARSAL_KILL_AT": point}) as server:
        with pytest.raises((aiohttp.ClientError, EOFError, ConnectionError)):
            if point == "upload.joined":
                await through_an_upload(server)
            else:
                await send(server, upload(b"data"))
        assert await asyncio.wait_for(server.process.wait(), 10) == -9
        assert blobs_of(server)
        async with again(server) as restarted:
            listed = (await ask(restarted, "/v1/files")).json["data"]
            assert len(listed) == (point == "file.row_committed")
            for file in listed:
                assert (await ask(restarted, f"/v1/files/{file['id']}/content")).body == b"data"
        await sweep_later(server)
        assert [path.name for path in blobs_of(server)] == [file["id"] for file in listed]
        assert [identity for identity, _ in rows_of(server)] == [file["id"] for file in listed]


async def through_an_upload(server: Server) -> dict[str, Any]:
    identity = await new_upload(server, 4)
    reply = await send(server, form(("data", "d", b"data")), path=f"/v1/uploads/{identity}/parts")
    body = json.dumps({"part_ids": [reply.json["id"]]}).encode()
    reply = await send(server, body, "Content-Type: application/json", path=f"/v1/uploads/{identity}/complete")
    found: dict[str, Any] = reply.json
    return found


async def test_a_large_file_never_sits_in_memory(prove: bool) -> None:
    size = (500 if prove else 200) * MIB
    piece = os.urandom(MIB)
    config = "default_models = false\n"

    async def pieces() -> AsyncIterator[bytes]:
        head, tail = upload(b"").split(b"\r\n--b0undary--")
        yield head
        for _ in range(size // MIB):
            yield piece
        yield b"\r\n--b0undary--" + tail

    async with serving(config) as server:
        await make(server, b"warm")
        headers = {**server.headers, "Content-Type": "multipart/form-data; boundary=b0undary"}
        address = f"{server.url}/v1/files"
        async with growth(server.rss) as up, server.session.post(address, data=pieces(), headers=headers) as response:
            assert response.status == 200, await response.text()
            made = await response.json()
        address += f"/{made['id']}/content"
        received = 0
        async with growth(server.rss) as down, server.session.get(address, headers=server.headers) as response:
            async for part in response.content.iter_any():
                received += len(part)
        print(f"{size // MIB} MiB: RSS +{up.bytes / MIB:.1f} up, +{down.bytes / MIB:.1f} down")
        assert received == made["bytes"] == size
        assert max(up.bytes, down.bytes) <= 100 * MIB


async def test_files_in_a_bucket() -> None:
    bucket = await s3.new_bucket()
    environment = {
        "FOREBAY_BLOBS_URL": f"s3://{bucket}/some/prefix",
        "FOREBAY_BLOBS_ENDPOINT": s3.endpoint(),
        "FOREBAY_BLOBS_REGION": "us-east-1",
        "FOREBAY_BLOBS_ACCESS_KEY_ID": s3.KEY,
        "FOREBAY_BLOBS_SECRET_ACCESS_KEY": s3.SECRET,
        "FOREBAY_BLOBS_ALLOW_HTTP": "true",
    }
    config = "default_models = false\n"
    async with serving(config, environment=environment) as server:
        data = os.urandom(20 * MIB)
        made = await make(server, data)
        assert (await ask(server, f"/v1/files/{made['id']}/content")).body == data
        reply = await ask(server, f"/v1/files/{made['id']}/content", "Range: bytes=5000000-15000000")
        assert reply.body == data[5_000_000:15_000_001]
        assert (await through_an_upload(server))["status"] == "completed"
        async with wire(server.url) as line:
            await line.send(post(upload(data), TYPE, path="/v1/files")[: 15 * MIB])
            await eventually(lambda: s3.multipart_uploads(bucket), what="the parts on their way")
        await eventually(lambda: _none_left(bucket), what="the cut upload to be aborted")
        assert (await ask(server, f"/v1/files/{made['id']}", method="DELETE")).status == 200
        assert not blobs_of(server)


async def _none_left(bucket: str) -> bool:
    return await s3.multipart_uploads(bucket) == 0

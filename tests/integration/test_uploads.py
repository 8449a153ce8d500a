"""The routes of uploads, through a real server: parts in any order and at once, checks, ends, and what is left."""

import asyncio
import hashlib
import json
import os
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.integration.test_files import (
    CONFIG,
    FILE,
    MIB,
    PURPOSE,
    TYPE,
    again,
    ask,
    blobs_of,
    form,
    new_upload,
    refused,
    rows_of,
    send,
    sweep_later,
)
from tests.support.server import Server, eventually, serving, serving_well
from tests.support.wire import Reply, post, wire

JSON = "Content-Type: application/json"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving_well(CONFIG) as running:
        yield running


async def send_part(server: Server, identity: str, data: bytes) -> Reply:
    return await send(server, form(("data", "blob", data)), path=f"/v1/uploads/{identity}/parts")


async def part(server: Server, identity: str, data: bytes) -> str:
    reply = await send_part(server, identity, data)
    assert reply.status == 200, reply
    assert reply.json == {
        "id": reply.json["id"],
        "object": "upload.part",
        "created_at": reply.json["created_at"],
        "upload_id": identity,
    }
    return str(reply.json["id"])


async def complete(server: Server, identity: str, part_ids: list[str], **more: Any) -> Reply:
    body = json.dumps({"part_ids": part_ids, **more}).encode()
    return await send(server, body, JSON, path=f"/v1/uploads/{identity}/complete")


async def status(server: Server, identity: str) -> str:
    return str((await ask(server, f"/v1/uploads/{identity}")).json["status"])


def parts_left(server: Server) -> list[str]:
    return [path.name for path in blobs_of(server) if path.name.startswith("part_")]


async def test_eight_parts_at_once_and_out_of_order(server: Server) -> None:
    pieces = [os.urandom(300_000 + number) for number in range(8)]
    whole = b"".join(pieces)
    identity = await new_upload(server, len(whole))
    order = random.Random(8).sample(range(8), 8)
    made = dict(zip(order, await asyncio.gather(*(part(server, identity, pieces[n]) for n in order)), strict=True))
    reply = await complete(server, identity, [made[n] for n in range(8)], md5=hashlib.md5(whole).hexdigest().upper())
    assert reply.status == 200, reply
    assert (reply.json["status"], reply.json["object"], reply.json["bytes"]) == ("completed", "upload", len(whole))
    file = reply.json["file"]
    assert (file["bytes"], file["filename"], file["status"]) == (len(whole), "a.jsonl", "processed")
    assert (await ask(server, f"/v1/files/{file['id']}/content")).body == whole
    assert (await ask(server, f"/v1/uploads/{identity}")).json == reply.json
    assert parts_left(server) == []
    assert not rows_of(server, "upload_parts")


async def test_another_order_makes_another_file(server: Server) -> None:
    identity = await new_upload(server, 6)
    first, second = await part(server, identity, b"abc"), await part(server, identity, b"def")
    reply = await complete(server, identity, [second, first])
    assert (await ask(server, f"/v1/files/{reply.json['file']['id']}/content")).body == b"defabc"


async def test_a_part_that_was_cut_off_is_sent_again(server: Server) -> None:
    data = os.urandom(MIB)
    identity = await new_upload(server, MIB)
    async with wire(server.url) as line:
        body = form(("data", "d", data))
        await line.send(post(body, TYPE, path=f"/v1/uploads/{identity}/parts")[: MIB // 2])
        await eventually(lambda: rows_of(server, "upload_parts"), what="the part to be begun")
    await eventually(lambda: not rows_of(server, "upload_parts"), what="the cut part to be discarded")
    reply = await complete(server, identity, [await part(server, identity, data)])
    assert (await ask(server, f"/v1/files/{reply.json['file']['id']}/content")).body == data


async def test_parts_that_are_not_what_was_announced(server: Server) -> None:
    identity = await new_upload(server, 10)
    first, second, third = [await part(server, identity, data) for data in (b"12345", b"67890", b"x")]
    refused(await complete(server, identity, [first]), 400, "upload_size_mismatch")
    refused(await complete(server, identity, [first, second, third]), 400, "upload_size_mismatch")
    refused(await complete(server, identity, [first, first]), 400, "invalid_request")
    refused(await complete(server, identity, [first, "part_nope"]), 400, "invalid_request")
    refused(await complete(server, identity, [first, second], md5="0" * 32), 400, "checksum_mismatch")
    refused(await complete(server, identity, [first, second], md5="nonsense"), 400, "invalid_value")
    refused(await complete(server, identity, []), 400, "invalid_value")
    assert await status(server, identity) == "pending"
    assert {state for _, state in rows_of(server)} <= {"ready"}
    reply = await complete(server, identity, [first, second], md5=hashlib.md5(b"1234567890").hexdigest())
    assert reply.json["status"] == "completed"


async def test_completing_twice_gives_the_same_answer(server: Server) -> None:
    identity = await new_upload(server, 4)
    made = await part(server, identity, b"data")
    replies = await asyncio.gather(*(complete(server, identity, [made]) for _ in range(6)))
    replies.append(await complete(server, identity, [made]))
    assert {reply.status for reply in replies} == {200}
    assert len({reply.json["file"]["id"] for reply in replies}) == 1
    assert {state for _, state in rows_of(server)} <= {"ready"}
    assert (await ask(server, f"/v1/files/{replies[0].json['file']['id']}/content")).body == b"data"


async def test_cancelling(server: Server) -> None:
    identity = await new_upload(server, 4)
    made = await part(server, identity, b"data")
    for _ in range(2):
        reply = await send(server, b"", JSON, path=f"/v1/uploads/{identity}/cancel")
        assert (reply.status, reply.json["status"]) == (200, "cancelled")
    assert parts_left(server) == []
    refused(await complete(server, identity, [made]), 400, "upload_not_pending")
    refused(await send_part(server, identity, b"more"), 400, "upload_not_pending")


@pytest.mark.parametrize(
    ("fields", "code", "answer"),
    [
        ({"bytes": 0}, "invalid_value", 400),
        ({"bytes": -1}, "invalid_value", 400),
        ({"bytes": 1.5}, "invalid_value", 400),
        ({"bytes": "4"}, "invalid_value", 400),
        ({"bytes": 8 * 2**30 + 1}, "payload_too_large", 413),
        ({"bytes": MIB + 1, "purpose": "batch"}, "payload_too_large", 413),
        ({"purpose": "batch", "filename": "a.txt"}, "invalid_value", 400),
        ({"purpose": "batch_output"}, "invalid_value", 400),
        ({"filename": ""}, "invalid_value", 400),
        ({"mime_type": "x" * 200}, "invalid_value", 400),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "invalid_value", 400),
        ({"expires_after": {"anchor": "never", "seconds": 3600}}, "invalid_value", 400),
        ({"unknown": 1}, "invalid_request", 400),
    ],
)
async def test_what_cannot_be_announced(server: Server, fields: dict[str, Any], code: str, answer: int) -> None:
    body = {"bytes": 4, "filename": "a.jsonl", "mime_type": "text/plain", "purpose": "vision", **fields}
    refused(await send(server, json.dumps(body).encode(), JSON, path="/v1/uploads"), answer, code)


async def test_the_file_expires_as_announced(server: Server) -> None:
    expiry = {"anchor": "created_at", "seconds": 7200}
    body = {"bytes": 2, "filename": "../a.jsonl", "mime_type": "x", "purpose": "batch", "expires_after": expiry}
    upload = (await send(server, json.dumps(body).encode(), JSON, path="/v1/uploads")).json
    assert upload["expires_at"] - upload["created_at"] == 3600
    assert (upload["filename"], upload["status"], upload["file"]) == ("a.jsonl", "pending", None)
    file = (await complete(server, upload["id"], [await part(server, upload["id"], b"{}")])).json["file"]
    assert file["expires_at"] - file["created_at"] == 7200
    assert (file["purpose"], file["filename"]) == ("batch", "a.jsonl")


async def test_parts_of_the_wrong_kind(server: Server) -> None:
    identity = await new_upload(server, 4)
    path = f"/v1/uploads/{identity}/parts"
    refused(await send_part(server, identity, bytes(2 * MIB + 1)), 413, "payload_too_large")
    refused(await send_part(server, identity, b""), 400, "invalid_value")
    refused(await send(server, form(PURPOSE, FILE), path=path), 400, "invalid_value")
    refused(await send(server, form(), path=path), 400, "missing_required_parameter")
    refused(await send(server, b"{}", JSON, path=path), 400, "invalid_multipart")
    refused(await send_part(server, "upload_nope", b"x"), 404, "not_found")
    assert parts_left(server) == []
    assert not [path for path in blobs_of(server) if ".partial" in path.parts]


async def test_an_upload_outlives_a_restart_and_its_leftovers_do_not_outlive_the_sweep() -> None:
    async with serving(CONFIG) as server:
        identity, forgotten = await new_upload(server, 8), await new_upload(server, 8)
        first = await part(server, identity, b"1234")
        await part(server, forgotten, b"left")
        await server.stop()
        async with again(server) as restarted:
            reply = await complete(restarted, identity, [first, await part(restarted, identity, b"5678")])
            assert (await ask(restarted, f"/v1/files/{reply.json['file']['id']}/content")).body == b"12345678"
            await sweep_later(restarted)
            assert [path.name for path in blobs_of(restarted)] == [reply.json["file"]["id"]]

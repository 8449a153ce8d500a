"""Batches of several projects on one server: they take turns, and none has more lines in line than it may."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.batches import CHAT, create, jsonl, line, upload
from tests.support.server import Server, eventually, serving

CONFIG = """
default_models = false
[batches]
chunk_lines = 16
segment_seconds = 0.1
[models.fake]
engine = "fake"
preload = true
slots = 2
[models.other]
engine = "fake"
preload = true
slots = 1
"""
ENDLESS = "[[fake tokens=1000 token_ms=1000]]"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG) as running:
        yield running


async def submit(server: Server, key: str, count: int, text: str, model: str = "fake") -> dict[str, Any]:
    file = await upload(server, jsonl(line(f"id-{n}", f"{text} {n}", model=model) for n in range(count)), key=key)
    status, batch = await create(server, file["id"], key=key)
    assert status == 200, batch
    return batch


async def look(server: Server, key: str, batch_id: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    async with server.session.get(f"{server.url}/v1/batches/{batch_id}", headers=headers) as response:
        found: dict[str, Any] = await response.json()
        return found


async def test_a_small_batch_does_not_wait_for_all_of_another_project(server: Server) -> None:
    """Whoever came first has filled every place; a few lines of somebody else are done long before he is."""
    noisy, quiet = await server.create_key("noisy"), await server.create_key("quiet")
    text = "[[fake tokens=5 token_ms=10]]"
    first = await submit(server, noisy, 600, text)

    async def of_the_first() -> int:
        return int((await look(server, noisy, first["id"]))["request_counts"]["completed"])

    async def begun() -> bool:
        return await of_the_first() >= 20

    await eventually(begun, within_seconds=30, what="lines of the first")
    second = await submit(server, quiet, 40, text)
    before = after = await of_the_first()

    async def done() -> bool:
        nonlocal after
        seen = await of_the_first()
        if (await look(server, quiet, second["id"]))["status"] == "completed":
            return True
        after = seen  # the second was not done yet, however late its own look came
        return False

    await eventually(done, within_seconds=60, what="the end of the second")
    assert after < 600, "it is not done itself"
    # Line by line that is 40 beside 40; what was in flight, and what is written down late, comes on top.
    assert after - before < 200
    status, _ = await server.post(f"/v1/batches/{first['id']}/cancel", noisy)
    assert status == 200


async def limit(server: Server, *options: str) -> None:
    command = (
        sys.executable,
        "-m",
        "forebay.cli",
        "projects",
        "set",
        *options,
        "--data-dir",
        str(server.folder / "data"),
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FOREBAY_")}
    process = await asyncio.create_subprocess_exec(
        *command, env=inherited, cwd=server.folder, stdout=asyncio.subprocess.PIPE
    )
    await process.communicate()
    assert process.returncode == 0


async def try_to_create(server: Server, key: str, file_id: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    headers = {"Authorization": f"Bearer {key}"}
    async with server.session.post(f"{server.url}/v1/batches", json=body, headers=headers) as response:
        return response.status, await response.json(), dict(response.headers)


async def test_no_project_has_more_lines_in_line_than_it_may(server: Server) -> None:
    key = await server.create_key("small")
    await limit(server, "small", "--quota", "queued_lines=10")
    lines = [line(f"id-{n}", ENDLESS, model="other") for n in range(11)]
    three = (await upload(server, jsonl([*lines[:3], "", ""]), key=key))["id"]
    one = (await upload(server, jsonl(lines[:1]), key=key))["id"]
    many = (await upload(server, jsonl(lines), key=key))["id"]

    async def in_force() -> bool:
        status, batch, _ = await try_to_create(server, key, many)
        if status == 200:
            await server.post(f"/v1/batches/{batch['id']}/cancel", key)
        return status == 429

    await eventually(in_force, within_seconds=20, what="the quota")

    async def all_cancelled() -> bool:
        headers = {"Authorization": f"Bearer {key}"}
        async with server.session.get(f"{server.url}/v1/batches", headers=headers) as response:
            return all(batch["status"] in {"cancelled", "failed"} for batch in (await response.json())["data"])

    await eventually(all_cancelled, within_seconds=20, what="the end of what came before")
    found = await asyncio.gather(*(try_to_create(server, key, three) for _ in range(10)))
    made = [batch for status, batch, _ in found if status == 200]
    assert len(made) == 3
    refused = [(answer["error"], headers) for status, answer, headers in found if status == 429]
    assert len(refused) == 7
    for error, headers in refused:
        assert (error["code"], error["type"]) == ("insufficient_quota", "insufficient_quota")
        assert headers["x-quota-limit-queued-lines"] == "10"
        assert headers["x-quota-remaining-queued-lines"] == "1"
    assert (await try_to_create(server, key, one))[0] == 200, "just what is left"
    assert (await try_to_create(server, key, one))[0] == 429
    await server.post(f"/v1/batches/{made[0]['id']}/cancel", key)

    async def room_again() -> bool:
        return (await try_to_create(server, key, three))[0] == 200

    await eventually(room_again, within_seconds=20, what="room after a cancelled batch")

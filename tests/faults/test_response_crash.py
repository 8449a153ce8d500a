"""A server that is killed while responses run in the background ends each of them exactly once after its restart."""

import asyncio
import random
import signal
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.support.receiver import receiving
from tests.support.server import FAKE, Server, eventually, serving

CONFIG = (
    FAKE
    + """
slots = 4
[responses]
events_seconds = 0.05
[outbound]
allowed_networks = ["127.0.0.2/32"]
"""
)
WORDS = 40
TEXT = f"[[fake tokens={WORDS} token_ms=25]]"
SAID = "".join(f"tok{number} " for number in range(WORDS))

pytestmark = pytest.mark.timeout(300)


async def streamed(client: openai.AsyncOpenAI, found: list[Any]) -> None:
    """The events of a new response, until it ends or the connection breaks."""
    stream = await client.responses.create(model="fake", input=TEXT, background=True, stream=True)
    try:
        async for event in stream:
            found.append(event)
    except (openai.APIError, httpx2.TransportError):
        return


async def ended(client: openai.AsyncOpenAI, response_id: str) -> Any:
    async def now() -> Any:
        response = await client.responses.retrieve(response_id)
        return None if response.status in ("queued", "in_progress") else response

    return await eventually(now, within_seconds=30, what=f"the end of {response_id}")


async def check(server: Server, told: list[Any]) -> None:
    """What was told before the crash and what is told after it fit together."""
    client = server.client()
    name, last = told[0].response.id, told[-1].sequence_number
    response = await ended(client, name)
    assert (response.status, response.output_text) == ("completed", SAID)
    rest = [event async for event in await client.responses.retrieve(name, stream=True, starting_after=last)]
    if told[-1].type == "response.completed":
        assert rest == []
        return
    numbers = [event.sequence_number for event in told + rest]
    assert numbers == sorted(set(numbers))
    assert rest[-1].type == "response.completed"
    assert rest[-1].response == response
    begun = max(place for place, event in enumerate(told + rest) if event.type == "response.created")
    whole = (told + rest)[begun:]
    assert "".join(event.delta for event in whole if event.type == "response.output_text.delta") == SAID


async def test_kill_9_in_the_middle(tmp_path: Path, prove: bool) -> None:
    chance = random.Random(20261121)
    for number in range(12 if prove else 3):
        await kill_once(tmp_path / str(number), chance.randint(3, 60))


async def kill_once(folder: Path, events: int) -> None:
    folder.mkdir()
    async with receiving("127.0.0.2") as receiver:
        async with serving(CONFIG, folder=folder) as first:
            client = first.client()
            await client.post("/webhooks", cast_to=object, body={"url": receiver.url})
            quiet = [await client.responses.create(model="fake", input=TEXT, background=True) for _ in range(3)]
            told: list[list[Any]] = [[] for _ in range(3)]
            reading = [asyncio.create_task(streamed(client, events)) for events in told]
            await eventually(
                lambda: all(told) and sum(map(len, told)) >= events, within_seconds=20, what=f"{events} events"
            )
            assert await first.stop(signal.SIGKILL) == -signal.SIGKILL
            await asyncio.gather(*reading)
        (folder / "server.log").unlink()
        async with serving(CONFIG, folder=folder) as second:
            client = second.client()
            for one in quiet:
                response = await ended(client, one.id)
                assert (response.status, response.output_text) == ("completed", SAID)
            for heard in told:
                await check(second, heard)
            names = {one.id for one in quiet} | {heard[0].response.id for heard in told}
            await eventually(lambda: {request.event["data"]["id"] for request in receiver.received} == names)
            events_told = {request.headers["webhook-id"] for request in receiver.received}
            assert len(events_told) == len(names), "each end is one event, however often it is sent"
            jobs = (await second.get("/v1/jobs?kind=response"))["data"]
            assert {job["id"]: job["status"] for job in jobs} == dict.fromkeys(names, "completed")

"""Two projects on one model, one of which floods it: the other keeps its places in line and its latency.

The times are those of the fake engine, which sleeps; what is ours to add is the wait for the next slot that is free.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support.server import Server, chat_body, eventually, serving

SLOTS = 8
FLOOD = 100
CONFIG = f"""
default_models = false
[models.fake]
engine = "fake"
slots = {SLOTS}
preload = true
"""
TOKEN_SECONDS = 0.05  # long ones, so that the machine has little to do for each request
LIGHT_SECONDS = 1.0
LIGHT = 100
ROUNDS_MAX = 4  # a loaded machine may spoil one: without turns each is many times worse


def lasting(seconds: float) -> dict[str, Any]:
    return chat_body(f"Hello. [[fake tokens={round(seconds / TOKEN_SECONDS)} token_ms={TOKEN_SECONDS * 1000:g}]]")


async def ask(server: Server, key: str, seconds: float) -> tuple[int, float]:
    """The status, and how long it took."""
    began = time.monotonic()
    headers = {"Authorization": f"Bearer {key}"}
    url = f"{server.url}/v1/chat/completions"
    async with server.session.post(url, json=lasting(seconds), headers=headers) as response:
        await response.read()
        return response.status, time.monotonic() - began


@asynccontextmanager
async def flood(server: Server, key: str) -> AsyncIterator[list[int]]:
    """So many callers of one project who never stop; the statuses of their answers."""
    chance, statuses, answered = random.Random(7), list[int](), asyncio.Semaphore(0)

    async def call() -> None:
        while True:
            # Of different lengths, so that slots come free one by one as with any engine.
            status, _ = await ask(server, key, chance.uniform(0.4, 1.2))
            statuses.append(status)
            if status == 429:
                await answered.acquire()  # not at once again, but when another one has its answer
            else:
                answered.release()

    callers = [asyncio.create_task(call()) for _ in range(FLOOD)]
    try:
        await eventually(lambda: 429 in statuses and 200 in statuses, what="a full line")
        yield statuses
    finally:
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)


async def light(server: Server, key: str, count: int) -> list[float]:
    """How long each of so many requests of a project took, two of them at a time."""
    taken: list[float] = []

    async def call() -> None:
        for _ in range(count // 2):
            status, seconds = await ask(server, key, LIGHT_SECONDS)
            assert status == 200, "no place in line"
            taken.append(seconds)

    await asyncio.gather(call(), call())
    return sorted(taken)


@pytest.mark.timeout(400)
async def test_a_project_that_floods_a_model_does_not_slow_another_down() -> None:
    async with serving(CONFIG) as server:
        noisy, quiet = await server.create_key("noisy"), await server.create_key("quiet")
        ratios: list[float] = []
        while len(ratios) < ROUNDS_MAX and (not ratios or ratios[-1] > 1.5):
            alone = await light(server, quiet, 6)
            async with flood(server, noisy) as statuses:
                beside = await light(server, quiet, LIGHT)
            assert set(statuses) == {200, 429}
            p99 = beside[LIGHT * 99 // 100 - 1]
            ratios.append(p99 / alone[-1])
            print(f"p50, p99 and longest beside: {beside[LIGHT // 2]:.2f}, {p99:.2f}, {beside[-1]:.2f} s")
        print(f"p99 beside by the longest alone: {ratios}")
        assert ratios[-1] <= 1.5

"""A batch of thousands of lines on the same slots as online traffic, through a whole server: online goes first.

Rounds with the batch and without take turns on one server, so that what else the machine does meets both alike.
"""

import asyncio
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from forebay.clock import SystemClock, seeded
from tests.support.batches import create, finished, jsonl, line, results, upload
from tests.support.server import Server, eventually, serving

SLOTS = 8
LOAD = 0.5
ONLINE_SECONDS_MEAN = 0.08
TOKEN_SECONDS = 0.01
LINES, LINES_LONG = 3_000, 10_000
LONG_LINE_EVERY = 100
LONG_LINE_MILLISECONDS = 600
# The settings are to the length of these requests as the defaults are to requests of five seconds.
CONFIG = f"""
default_models = false
[scheduler]
headroom_seconds = {2 * ONLINE_SECONDS_MEAN}
batch_floor_seconds = {24 * ONLINE_SECONDS_MEAN}
[models.fake]
engine = "fake"
preload = true
slots = {SLOTS}
queue_places = 1000
"""
# The header counts whole milliseconds, and taking a place back costs one round trip to the engine.
NOISE_MILLISECONDS = 3
ROUNDS_MAX = 6
SEED = 20_261_121


@dataclass(slots=True)
class Seen:
    """How long online requests waited, in milliseconds."""

    waits: list[int] = field(default_factory=list)

    def share(self, share: float) -> int:
        return sorted(self.waits)[int(len(self.waits) * share)]


async def online(server: Server, chance: Random, seconds: float, seen: Seen) -> None:
    """Callers who come at random moments and stay for random times."""
    clock, due = SystemClock(), 0.0
    began = clock.monotonic()
    async with asyncio.TaskGroup() as group:
        while due < seconds:
            due += chance.expovariate(LOAD * SLOTS / ONLINE_SECONDS_MEAN)
            tokens = max(1, round(chance.expovariate(1 / ONLINE_SECONDS_MEAN) / TOKEN_SECONDS))
            await clock.sleep(max(0.0, began + due - clock.monotonic()))
            group.create_task(ask(server, f"Hello. [[fake tokens={tokens} token_ms={TOKEN_SECONDS * 1000}]]", seen))


async def ask(server: Server, text: str, seen: Seen) -> None:
    async with await server.chat(text, max_tokens=1000) as response:
        assert response.status == 200, await response.text()
        seen.waits.append(int(response.headers["x-queue-wait-ms"]))
        await response.read()


def ask_of_line(number: int) -> str:
    """Most lines are short, so that thousands of them end; one that is not would be long to wait for."""
    return f"[[fake tokens=1 delay_ms={LONG_LINE_MILLISECONDS if number % LONG_LINE_EVERY == 0 else 4}]]"


async def begun(server: Server, file_id: str) -> dict[str, Any]:
    """A batch of which some lines are finished."""
    status, batch = await create(server, file_id)
    assert status == 200, batch
    await eventually(lambda: done(server, batch), within_seconds=30, what="the first lines")
    return batch


async def done(server: Server, batch: dict[str, Any]) -> int:
    found = await server.get(f"/v1/batches/{batch['id']}")
    return int(found["request_counts"]["completed"])


@pytest.mark.timeout(900)
async def test_online_requests_wait_no_longer_beside_a_batch_and_the_batch_is_finished(prove: bool) -> None:
    rounds, seconds, lines = (5, 20.0, LINES_LONG) if prove else (2, 5.0, LINES)
    alone, beside, meanwhile, number = Seen(), Seen(), 0, 0
    async with serving(CONFIG) as server:
        file = await upload(server, jsonl(line(f"id-{i}", f"{i} {ask_of_line(i)}") for i in range(lines)))
        # Further rounds where it is not so at once: somebody else may have kept the machine busy.
        while number < rounds or (number < ROUNDS_MAX and not no_longer(beside, alone)):
            await online(server, seeded(SEED + number), seconds, alone)
            batch = await begun(server, file["id"])
            before = await done(server, batch)
            await online(server, seeded(SEED + number), seconds, beside)
            after = await done(server, batch)
            assert before < after < lines, "the batch ran for as long as anybody was online"
            meanwhile += after - before
            ended = await finished(server, batch["id"], 120)
            assert ended["status"] == "completed", ended
            output, errors = await results(server, ended)
            assert (len(output), errors) == (lines, [])
            number += 1
        taken_back = await server.metric("forebay_preemptions_total", model="fake")
    print(
        f"{len(alone.waits)} online requests each: p50, p90, p99 wait "
        f"{[alone.share(share) for share in (0.5, 0.9, 0.99)]} ms alone and "
        f"{[beside.share(share) for share in (0.5, 0.9, 0.99)]} ms beside a batch, of which {meanwhile} lines were "
        f"finished in {number * seconds:g} s; {taken_back:g} began again"
    )
    assert len(alone.waits) == len(beside.waits)
    assert no_longer(beside, alone), (beside.share(0.99), alone.share(0.99))


def no_longer(beside: Seen, alone: Seen) -> bool:
    """Whether the p99 of the waits is the same but for noise."""
    return beside.share(0.99) <= max(1.25 * alone.share(0.99), alone.share(0.99) + NOISE_MILLISECONDS)

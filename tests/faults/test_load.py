"""More callers than there is room for."""

import asyncio

from tests.support.answers import ask
from tests.support.server import serving

CONFIG = """
default_models = false
[models.fake]
engine = "fake"
preload = true
slots = 8
queue_places = 32
"""
MEBIBYTE = 2**20


async def test_of_64_streams_on_8_slots_40_finish_and_24_are_told_when_to_come_back(prove: bool) -> None:
    attempts = 10 if prove else 2
    async with serving(CONFIG) as server:
        await asyncio.gather(*(ask(server, "Warm up. [[fake tokens=50]]") for _ in range(40)))
        for attempt in range(attempts):
            before = server.rss()
            asking = [
                asyncio.create_task(ask(server, f"Stream {attempt}.{number}. [[fake tokens=40 token_ms=20]]"))
                for number in range(64)
            ]
            most = before
            while left := [one for one in asking if not one.done()]:
                await asyncio.wait(left, timeout=0.05)
                most = max(most, server.rss())
            answers = [one.result() for one in asking]
            finished = [answer for answer in answers if answer.whole]
            refused = [answer for answer in answers if answer.status == 429]
            assert (len(finished), len(refused)) == (40, 24)
            assert all(answer.tokens == 40 for answer in finished)
            assert all(answer.code == "queue_full" for answer in refused)
            waits = [int(answer.headers["retry-after"]) for answer in refused]
            assert all(1 <= wait <= 120 for wait in waits)
            positions = [int(answer.headers["x-queue-position"]) for answer in finished]
            assert sorted(positions) == [0] * 8 + list(range(1, 33))
            grown = (most - before) / MEBIBYTE
            print(f"40 finished, 24 refused, retry-after {min(waits)}-{max(waits)} s, server grew {grown:.1f} MiB")
            assert grown < 50
            await server.until_load(0, 0)
        rejected = await server.metric("forebay_rejections_total", model="fake", reason="queue_full")
        assert rejected == 24 * attempts


async def test_a_line_that_stands_still_turns_its_callers_away_in_time() -> None:
    config = CONFIG.replace("slots = 8", "slots = 1\nqueue_timeout_seconds = 0.5")
    async with serving(config) as server:
        holding = asyncio.create_task(ask(server, "Hold. [[fake tokens=100 token_ms=20]]"))
        await server.until_load(1, 0)
        answer = await ask(server, "Wait.")
        assert (answer.status, answer.code) == (429, "queue_timeout")
        assert int(answer.headers["retry-after"]) <= 120
        assert (await holding).whole

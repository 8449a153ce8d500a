"""A server that is killed wherever it writes down what was used: every answer that a caller has is counted, and once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from forebay.clock import seeded
from tests.support.batches import finished, line, submit
from tests.support.server import FAKE, Server, chat_body, eventually, serving

CONFIG = (
    FAKE
    + """slots = 8
[usage]
fold_seconds = 0.05
journal_bytes_max = 2000
[jobs]
lease_seconds = 3
poll_seconds = 0.2
backoff_seconds_min = 0.1
[batches]
segment_lines = 8
segment_seconds = 0.2
"""
)
SERVING = ("usage.journaled:5", "usage.folded:3", "usage.journal_removed")
STARTING = ("usage.left_folded",)
WORKING = ("chunk.segment_written:2", "chunk.segment_committed:2")
LINES = 40
CALLERS = 6
REQUESTS, TOKENS = 40, 90_000
QUOTAS = f"""{CONFIG}[quotas]
defaults = ["requests={REQUESTS}/month", "tokens={TOKENS}/month"]
"""
WRITTEN = 17  # records, before the server dies
ASKED = 50_000  # tokens, of the requests that tell how much one reserves

pytestmark = pytest.mark.timeout(600)


@dataclass
class Told:
    """What callers know: answers that they have whole, and those that were cut by the death of the server."""

    whole: int = 0
    cut: int = 0
    tokens: int = 0

    async def ask(self, server: Server, number: int) -> None:
        """One request; raises ClientError when the server is gone."""
        tokens, stream = number % 4 + 1, number % 2 == 0
        try:
            async with await server.send(chat_body(f"[[fake tokens={tokens}]]", stream=stream)) as response:
                body = await response.read()
        except aiohttp.ClientError:
            self.cut += 1
            raise
        if response.status == 200 and (not stream or b"data: [DONE]\n\n" in body):
            self.whole += 1
            self.tokens += tokens
        else:
            self.cut += 1


async def test_a_server_that_is_killed_at_every_point_of_the_books(tmp_path: Path, prove: bool) -> None:
    told = Told()
    for point in SERVING:
        before = told.cut
        async with living(tmp_path, point) as server:
            with suppress(aiohttp.ClientError):
                for number in range(2000):
                    await told.ask(server, number)
            await server.process.wait()
        assert told.cut == before + 1, "the server was to die under the last request"
        for start in STARTING if prove or point == SERVING[0] else ():
            with pytest.raises(AssertionError, match="the server ended with -9"):
                async with living(tmp_path, start):
                    pass
    async with living(tmp_path) as server:
        found = await settled(server)
        # Each that was cut was written down or not: who asked cannot tell. At the first point, it was.
        assert told.whole + 1 <= found["num_model_requests"] <= told.whole + told.cut
        assert told.tokens < found["output_tokens"] <= told.tokens + 4 * told.cut
        await nothing_is_left(server)


async def test_a_server_that_is_killed_at_any_moment(tmp_path: Path, prove: bool) -> None:
    told, chance = Told(), seeded(20261121)
    for _ in range(40 if prove else 2):
        async with living(tmp_path) as server:
            asking = [asyncio.create_task(_ask_on(told, server, caller)) for caller in range(CALLERS)]
            enough = told.whole + chance.randrange(20, 120)
            await eventually(lambda: told.whole >= enough, within_seconds=60, what="answers")  # noqa: B023
            server.process.kill()
            await asyncio.gather(*asking)
            await server.process.wait()
    async with living(tmp_path) as server:
        found = await settled(server)
        assert told.whole <= found["num_model_requests"] <= told.whole + told.cut
        assert told.tokens <= found["output_tokens"] <= told.tokens + 4 * told.cut
        await nothing_is_left(server)


async def test_what_is_left_of_a_quota_is_the_same_to_the_unit_after_a_kill(tmp_path: Path) -> None:
    told = Told()
    async with living(tmp_path, f"usage.journaled:{WRITTEN}", QUOTAS) as server:
        _, headers = await answered(server, ASKED)
        around = TOKENS - int(headers["x-quota-remaining-tokens"]) - ASKED
        await asyncio.gather(*(_ask_on(told, server, caller) for caller in range(CALLERS)))
        await server.process.wait()
    async with living(tmp_path, config=QUOTAS) as server:
        found = await settled(server)
        assert told.whole + 1 <= found["num_model_requests"] == WRITTEN, "what was under way holds nothing any more"
        left = TOKENS - found["input_tokens"] - found["output_tokens"]
        refused, headers = await answered(server, left - around + 1)
        assert (refused, headers["x-quota-remaining-tokens"]) == ("insufficient_quota", str(left))
        passed, headers = await answered(server, left - around)
        assert (passed, headers["x-quota-remaining-tokens"]) == ("", "0")
        codes = Counter(code for code, _ in await asyncio.gather(*(answered(server, 20) for _ in range(REQUESTS))))
        assert codes == {"": REQUESTS - WRITTEN - 1, "insufficient_quota": WRITTEN + 1}
        server.process.kill()
        await server.process.wait()
    async with living(tmp_path, config=QUOTAS) as server:
        refused, headers = await answered(server, 20)
        assert (refused, headers["x-quota-remaining-requests"]) == ("insufficient_quota", "0")
        assert (await settled(server))["num_model_requests"] == REQUESTS


async def test_lines_of_a_batch_count_once_however_often_they_are_tried(tmp_path: Path, prove: bool) -> None:
    batch_id = ""
    for point in WORKING if prove else WORKING[1:]:
        async with living(tmp_path, point) as server:
            if not batch_id:
                with suppress(aiohttp.ClientError):
                    lines = [line(str(number), "[[fake tokens=2]]") for number in range(LINES)]
                    batch_id = (await submit(server, lines))["id"]
            await server.process.wait()
    async with living(tmp_path) as server:
        assert (await finished(server, batch_id))["request_counts"]["completed"] == LINES
        found = await settled(server)
        assert (found["num_model_requests"], found["output_tokens"]) == (LINES, 2 * LINES)


async def _ask_on(told: Told, server: Server, caller: int) -> None:
    with suppress(aiohttp.ClientError):
        for number in range(caller, 100_000):
            await told.ask(server, number)


async def answered(server: Server, max_tokens: int) -> tuple[str, Mapping[str, str]]:
    """The code of the refusal, empty for an answer, and what is told of quotas."""
    async with await server.send(chat_body("[[fake tokens=3]]", max_tokens=max_tokens)) as response:
        body = await response.json()
        assert response.status in {200, 429}, body
        return body.get("error", {}).get("code", ""), response.headers


async def settled(server: Server) -> Counter[str]:
    """What is counted when all that was written down is added up."""
    async with server.session.post(f"{server.url}/admin/projects/default", json={}, headers=server.headers) as response:
        assert response.status == 200  # which folds
    days = (await server.get("/v1/usage?limit=2"))["data"]  # midnight may have passed
    found = Counter[str]()
    for result in (each for day in days for each in day["results"]):
        found.update({name: result[name] for name in ("num_model_requests", "input_tokens", "output_tokens")})
    return found


async def nothing_is_left(server: Server) -> None:
    """Of the journals of the dead there is nothing any more, and the living has one."""

    def left() -> list[str]:
        return sorted(path.name for path in (server.folder / "data" / "usage").iterdir())

    await eventually(lambda: len(left()) == 1, what="one journal")


@asynccontextmanager
async def living(folder: Path, point: str | None = None, config: str = CONFIG) -> AsyncIterator[Server]:
    environment = {} if point is None else {"FOREBAY_REHEARSAL_KILL_AT": point}
    async with serving(config, folder=folder, environment=environment, wait=point is None) as server:
        if point is not None:
            with suppress(AssertionError, aiohttp.ClientError):
                await eventually(server.ready, within_seconds=30, what="readiness")
        yield server

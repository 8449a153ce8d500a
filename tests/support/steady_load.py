"""Batches that come at a steady pace whatever happens, each sent again until it is acknowledged, and checked at the end."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tests.support.batches import CHAT, finished, jsonl, line, results
from tests.support.receiver import Receiver, receiving
from tests.support.server import Server

NETWORK = "127.0.0.2"  # where the receiver of the webhooks is
_AGAIN_SECONDS = 0.25
_GIVE_UP_SECONDS = 60.0
_AT_ONCE = 8
_DRAINS_MAX = 3


class SteadyLoad:
    """`pace` batches a second of `lines` lines that end with `more`; the receiver hears of the end of each."""

    def __init__(self, server: Server, receiver: Receiver, pace: float, lines: int, more: str) -> None:
        self.batches: dict[str, str] = {}  # the mark of every acknowledged batch
        self.errors: Counter[str] = Counter()
        self._server = server
        self._receiver = receiver
        self._pace = pace
        self._lines = lines
        self._more = more
        self._heard: set[str] = set()
        self._read = 0
        self._random = random.Random(5)

    async def offer_during(self, chaos: Coroutine[Any, Any, None]) -> None:
        """The same for as long as `chaos` takes."""
        async with asyncio.TaskGroup() as group:
            raging = group.create_task(chaos)
            await self._offer(lambda: not raging.done())

    async def drain(self, count: int) -> float:
        """Offer so many at once; batches a second, from the first to when the receiver has heard of each."""
        began = time.monotonic()
        room = asyncio.Semaphore(_AT_ONCE)

        async def submit() -> str:
            async with room:
                return await self._submit()

        await self.until_told(set(await asyncio.gather(*(submit() for _ in range(count)))))
        return count / (time.monotonic() - began)

    async def drain_as_fast(self, count: int, before: float) -> float:
        """The same; again if it was slower than `before`, in case that somebody else kept the machine busy."""
        rate = 0.0
        for _ in range(_DRAINS_MAX):
            rate = max(rate, await self.drain(count))
            if rate >= before:
                break
        return rate

    async def _offer(self, more: Callable[[], bool]) -> None:
        began = time.monotonic()
        offered: list[asyncio.Task[str]] = []
        async with asyncio.TaskGroup() as group:
            while more():
                offered.append(group.create_task(self._submit()))
                await asyncio.sleep(max(0.0, began + len(offered) / self._pace - time.monotonic()))
        await self.until_told({batch.result() for batch in offered})

    async def until_told(self, batches: set[str]) -> None:
        """Wait until the receiver has heard of the end of these."""
        async with asyncio.timeout(_GIVE_UP_SECONDS):
            while not batches <= self._told():
                await asyncio.sleep(0.02)

    def _told(self) -> set[str]:
        """The batches of which the receiver has heard."""
        for request in self._receiver.received[self._read :]:
            self._read += 1
            self._heard.add(request.event["data"]["id"])
        return self._heard

    async def check(self) -> None:
        """Every acknowledged batch has ended, every line of it has its own answer once, and one event tells of it."""
        for batch_id, mark in self.batches.items():
            ended = await finished(self._server, batch_id)
            assert ended["status"] == "completed", ended
            output, errors = await results(self._server, ended)
            assert not errors
            said = {each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in output}
            expected = {f"{mark}-{i}": f"Line {i} of {mark}." for i in range(self._lines)}
            assert {name: text.strip() for name, text in said.items()} == expected
        events = {(request.event["id"], request.event["data"]["id"]) for request in self._receiver.received}
        assert sorted(batch_id for _, batch_id in events) == sorted(self.batches), "one event for each batch"

    async def _submit(self) -> str:
        mark = self._random.randbytes(8).hex()
        lines = jsonl(line(f"{mark}-{i}", f"Line {i} of {mark}. {self._more}") for i in range(self._lines))
        file = await self._until_accepted("/v1/files", mark, lines)
        body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        batch = await self._until_accepted("/v1/batches", mark, {**body, "webhook_url": self._receiver.url})
        assert batch["id"] not in self.batches, "each key makes a batch of its own"
        self.batches[batch["id"]] = mark
        return str(batch["id"])

    async def _until_accepted(self, path: str, mark: str, body: bytes | dict[str, Any]) -> dict[str, Any]:
        headers = {**self._server.headers, "Idempotency-Key": f"{path}-{mark}"}
        deadline = time.monotonic() + _GIVE_UP_SECONDS
        while time.monotonic() < deadline:
            content: dict[str, Any] = {"data": _form(body)} if isinstance(body, bytes) else {"json": body}
            try:
                request = self._server.session.post(self._server.url + path, headers=headers, **content)
                async with request as response:
                    answer: dict[str, Any] = await response.json()
                    if response.status == 200:
                        return answer
                    assert response.status == 503, (response.status, answer)
                    self.errors[f"503 {answer['error']['code']}"] += 1
            except aiohttp.ClientConnectionError as error:
                self.errors[type(error).__name__] += 1
            await asyncio.sleep(_AGAIN_SECONDS)
        message = f"{path} was not accepted within {_GIVE_UP_SECONDS} s: {self.errors}"
        raise AssertionError(message)


def _form(data: bytes) -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", data, filename="input.jsonl", content_type="application/jsonl")
    return form


@asynccontextmanager
async def steady_load(server: Server, pace: float, lines: int, more: str) -> AsyncIterator[SteadyLoad]:
    """A load with a receiver of its own."""
    async with receiving(NETWORK) as receiver:
        yield SteadyLoad(server, receiver, pace, lines, more)

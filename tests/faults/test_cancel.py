"""Callers that go away, at every moment that there is, and callers that say stop."""

import asyncio
import contextlib
import json
import random
from functools import partial
from statistics import median
from time import monotonic
from urllib.parse import urlsplit

import psutil

from tests.support.answers import Answer, ask, first_bytes, read
from tests.support.measuring import within
from tests.support.models import smollm2_path
from tests.support.server import Server, chat_body, eventually, serving

DEBUG = {"FOREBAY_LOG_LEVEL": "debug", "FOREBAY_LOG_FORMAT": "json"}
SLOTS = 4
CONFIG = f"""
default_models = false
[models.fake]
engine = "fake"
preload = true
slots = {SLOTS}
queue_places = 16
"""
LONG = "[[fake tokens=5000 token_ms=10]]"
SEED = 20_260_101


async def test_a_place_is_free_at_the_engine_soon_after_its_caller_has_gone(prove: bool) -> None:
    config = CONFIG.replace(f"slots = {SLOTS}", "slots = 1")
    async with serving(config, environment=DEBUG) as server:
        for number in range(100 if prove else 15):
            await within(0.5, partial(_stopped_after, server, number))


async def _stopped_after(server: Server, number: int, again: int) -> float:
    """How long the engine goes on whose caller leaves: every other one in the midst of a stream."""
    name, stream = f"leaving-{number}-{again}", number % 2 > 0
    asking = asyncio.create_task(server.send(chat_body(LONG, stream=stream), **{"X-Request-ID": name}))
    await eventually(partial(_engine_says, server, "started", name), what="a start at the engine")
    response = await asking if stream else None
    left = monotonic()
    if response is not None:
        response.close()
    asking.cancel()
    await eventually(partial(_engine_says, server, "cancelled", name), what="a stop at the engine")
    return monotonic() - left


def _engine_says(server: Server, what: str, name: str) -> bool:
    return f"fake: event={what} request_id={name}" in server.log


async def test_llama_cpp_stops_computing_when_its_caller_has_gone(prove: bool) -> None:
    config = f"""
default_models = false
[models.small]
engine = "llama.cpp"
source = "file:{smollm2_path()}"
preload = true
slots = 1
options.context = 4096
options.threads = 2
"""
    waits = []
    async with serving(config, environment=DEBUG) as server:
        engine = psutil.Process(server.engine_pid("small"))
        for number in range(40 if prove else 6):
            await _leave_llama(server, stream=number % 2 > 0)
            answer = await ask(server, "Hi.", model="small", max_tokens=1)
            assert answer.whole
            waits.append(int(answer.headers["x-queue-wait-ms"]) / 1000)
        await _leave_llama(server, stream=True)
        await server.until_load(0, 0, "small")
        used = await asyncio.to_thread(engine.cpu_percent, 1.0) / 100  # over one second
        print(
            f"next admitted after {median(waits):.3f} s (median), {max(waits):.3f} s (most); then {used:.2f} s of CPU"
        )
        assert median(waits) < 0.5  # the most is the length of a step, which other work on the machine can stretch
        assert used < 0.2
        assert await server.metric("forebay_engine_deaths_total") == 0


async def _leave_llama(server: Server, *, stream: bool) -> None:
    """Ask for a long story, and go away in the middle of it."""
    body = chat_body("Write a very long story.", model="small", stream=stream, max_tokens=3000, temperature=0)
    asking = asyncio.create_task(server.send(body))
    await server.until_load(1, 0, "small")
    if stream:
        response = await asking
        await first_bytes(response)
        response.close()
    asking.cancel()


async def test_random_disconnects_leave_nothing_behind(prove: bool) -> None:
    count, chance = (5000 if prove else 1000), random.Random(SEED)
    # An idle worker of jobs makes its tasks anew all the time, and tasks are counted.
    quiet = {"FOREBAY_LOG_ACCESS": "false", "FOREBAY_JOBS_ENABLED": "false"}
    async with serving(CONFIG, environment=quiet) as server:
        await asyncio.gather(*(ask(server, "[[fake tokens=20 token_ms=10]]") for _ in range(SLOTS)))
        engine = psutil.Process(server.engine_pids()[0])
        await _settled(server)
        start = _belongings(server, engine)
        tasks = await server.metric("forebay_tasks")
        began, limit = monotonic(), asyncio.Semaphore(32)
        kinds = [chance.choice(KINDS) for _ in range(count)]
        await asyncio.gather(*(_leave(server, limit, kind, random.Random(chance.random())) for kind in kinds))
        took = monotonic() - began
        await server.until_load(0, 0)
        assert (await server.model())["replicas"][0]["in_flight"] == 0
        await _settled(server)
        await eventually(lambda: _belongings(server, engine) <= start, what=f"no more sockets than {start}")
        left = _belongings(server, engine)
        print(f"{count} disconnects in {took:.1f} s: {start} -> {left}, {tasks:.0f} tasks before")
        await eventually(partial(_at_most_tasks, server, tasks), what=f"no more tasks than {tasks:.0f}")
        assert await server.metric("forebay_engine_deaths_total") == 0
        assert "request.bug" not in server.log
        assert "Traceback" not in server.log
        whole = await asyncio.gather(*(ask(server, f"After all that. {i}") for i in range(SLOTS + 16)))
        assert all(answer.whole for answer in whole)


KINDS = ("head", "body", "stream", "stream", "whole", "waiting")


async def _leave(server: Server, limit: asyncio.Semaphore, kind: str, chance: random.Random) -> None:
    """Begin a request of one kind on a connection of its own, and go away in the middle of it."""
    async with limit:
        address = urlsplit(server.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        sent = _request(server, kind, chance)
        if kind == "head":
            sent = sent[: chance.randrange(1, sent.index(b"\r\n\r\n"))]
        elif kind == "body":
            end = sent.index(b"\r\n\r\n") + 4
            sent = sent[: chance.randrange(end, len(sent))]
        writer.write(sent)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(chance.random() * 0.2):
                while await reader.read(chance.randrange(1, 4096)):
                    pass
        if chance.random() < 0.5:
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _request(server: Server, kind: str, chance: random.Random) -> bytes:
    text = f"{chance.random()} [[fake tokens={chance.randrange(1, 200)} token_ms={chance.choice((0, 1, 20))}]]"
    if kind == "waiting":
        text = f"{chance.random()} [[fake delay_ms={chance.randrange(100, 400)}]]"
    body = json.dumps(chat_body(text, stream=kind == "stream")).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: forebay\r\nAuthorization: Bearer {server.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _settled(server: Server) -> None:
    """Wait until the only open client connection is the one that asks."""

    async def one() -> bool:
        return await server.metric("forebay_connections") <= 1

    await server.reconnect()
    await eventually(one, what="one client connection")


async def _at_most_tasks(server: Server, count: float) -> bool:
    return await server.metric("forebay_tasks") <= count


def _belongings(server: Server, engine: psutil.Process) -> tuple[int, int]:
    """Open files and sockets of the server and of the engine."""
    return psutil.Process(server.pid).num_fds(), engine.num_fds()


async def test_a_project_cancels_its_requests_and_nobody_else_s() -> None:
    config = CONFIG.replace(f"slots = {SLOTS}", "slots = 1")
    async with serving(config, environment=DEBUG) as server:
        mine, other, looker = [
            await server.create_key(*who) for who in (("mine", "member"), ("other", "member"), ("mine", "read_only"))
        ]

        def begin(name: str) -> "asyncio.Task[Answer]":
            headers = {"X-Request-ID": name, "Authorization": f"Bearer {mine}"}

            async def run() -> Answer:
                async with await server.send(chat_body(LONG, stream=True), **headers) as response:
                    return await read(response)

            return asyncio.create_task(run())

        running = begin("running-one")
        await server.until_load(1, 0)
        waiting = begin("waiting-one")
        await server.until_load(1, 1)
        for name in ("running-one", "waiting-one", "never-was"):
            assert (await server.post(f"/v1/requests/{name}/cancel", other))[0] == 404
        assert (await server.post("/v1/requests/running-one/cancel", looker))[0] == 403
        assert await server.load() == (1, 1)
        status, told = await server.post("/v1/requests/waiting-one/cancel", mine)
        assert (status, told["cancelled"]) == (200, True)
        assert (await waiting).status == 499
        await server.until_load(1, 0)
        assert not _engine_says(server, "started", "waiting-one")
        asked = monotonic()
        assert (await server.post("/v1/requests/running-one/cancel", mine))[0] == 200
        assert (await running).code == "client_closed_request"
        await server.until_load(0, 0)
        print(f"cancel call: the place was back after {monotonic() - asked:.3f} s")
        assert monotonic() - asked < 3
        assert _engine_says(server, "cancelled", "running-one")
        assert (await server.post("/v1/requests/running-one/cancel", mine))[0] == 404
        assert await server.metric("forebay_cancellations_total", reason="cancel_call") == 2

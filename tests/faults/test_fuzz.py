"""Mutated requests: the server neither dies nor grows, and every refusal is the caller's, in OpenAI's shape."""

import asyncio
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from tests.support.logs import unforeseen
from tests.support.models import smollm2_path
from tests.support.mutate import SCHEMAS, mutated, tool, valid_chat
from tests.support.server import FAKE, Server, serving

FAKE_CONFIG = FAKE + "[http]\nbody_bytes_max = 250000\n"
SMOL = """
default_models = false
[models.smol]
engine = "llama.cpp"
source = "file:{path}"
preload = true
slots = 4
request_timeout_seconds = 60
[models.smol.options]
context = 512
"""
SMOL_TOOLS = """
[models.smol-tools]
engine = "llama.cpp"
source = "file:{path}"
preload = true
slots = 4
request_timeout_seconds = 60
[models.smol-tools.options]
context = 512
chat_template_file = "{template}"
"""
TEMPLATE = __file__.replace("faults/test_fuzz.py", "support/chatml_tools.jinja")
CONTENT_TYPES = ("application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x", "")
ODD_HEADERS = (
    {},
    {},
    {"X-Request-ID": "a b\u00e9"},
    {"traceparent": "zz"},
    {"Content-Encoding": "gzip"},
    {"X-Odd": "\u00ff\t,;"},
)
GIVEAWAYS = re.compile(
    r"Traceback|File \"|/src/|site-packages|\.py\b|0x[0-9a-f]{6,}|127\.0\.0\.1|xllamacpp|pydantic|llama_"
)
MEBIBYTE = 2**20


def check_refusal(status: int, text: str) -> str:
    """A refusal is the caller's fault, and says so in OpenAI's shape without giving anything away; its code."""
    assert 400 <= status < 500, (status, text)
    body = json.loads(text)
    assert set(body) == {"error"}, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str), error
    assert isinstance(error["code"], str), error
    assert error["message"], error
    assert len(text) < 4_000, text[:3000]
    assert not GIVEAWAYS.search(text.replace("GET /v1/models", "")), text
    return str(error["code"])


async def send(server: Server, data: bytes, chance: random.Random) -> str:
    """POST `data` to a generation route; the outcome."""
    path = chance.choice(("/v1/chat/completions",) * 3 + ("/v1/completions",))
    headers = {**server.headers, "Content-Type": chance.choice(CONTENT_TYPES), **chance.choice(ODD_HEADERS)}
    async with server.session.post(server.url + path, data=data, headers=headers) as response:
        text = (await response.read()).decode()
        if response.status == 200:
            assert '"error":' not in text, text[-500:]
            return "ok"
        return check_refusal(response.status, text)


async def send_apart(server: Server, path: str, data: bytes, kind: str, chance: random.Random) -> str:
    """POST `data` on a connection of its own, which no timeout of an idle one can cut; the outcome."""
    headers = {**server.headers, "Content-Type": kind, "Connection": "close", **chance.choice(ODD_HEADERS)}
    async with server.session.post(server.url + path, data=data, headers=headers) as response:
        text = (await response.read()).decode()
        if response.status == 200 and "event-stream" in response.headers["content-type"]:
            return "streamed" if '"error":' not in text else check_refusal(400, text.strip().split("data: ")[-1])
        return "ok" if response.status < 300 else check_refusal(response.status, text)


async def swarm(jobs: list[Callable[[], Awaitable[str]]], width: int) -> Counter[str]:
    """Run `jobs`, `width` at a time; how often each outcome came."""
    outcomes: Counter[str] = Counter()
    waiting = iter(jobs)

    async def one_after_another() -> None:
        for job in waiting:
            outcomes[await job()] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(one_after_another())
    return outcomes


@asynccontextmanager
async def unharmed(server: Server) -> AsyncIterator[Callable[[], None]]:
    """Whatever is sent in this block: the engine is still the same, the server has not grown, and nothing was a bug.

    What it gives is to be called after each batch of requests, of which there are more than three.
    """
    engine, sizes = server.engine_pids("forebay.engines.fake"), list[int]()
    yield lambda: sizes.append(server.rss())
    grown = sizes[-1] - sizes[2]  # the first batches fill caches and the allocator's pools
    print(f"grown {grown / MEBIBYTE:.1f} MiB of {sizes[2] / MEBIBYTE:.0f}")
    assert server.engine_pids("forebay.engines.fake") == engine
    assert await server.metric("forebay_engine_starts_total", model="fake") == 1
    assert grown < max(20 * MEBIBYTE, sizes[2] // 20)
    assert not unforeseen(server.log), unforeseen(server.log)


async def fuzzed(server: Server, count: int, make: Callable[[], Callable[[], Awaitable[str]]]) -> Counter[str]:
    """Send `count` requests, eight at a time, each made by `make`; how often each outcome came. They do no harm."""
    outcomes: Counter[str] = Counter()
    async with unharmed(server) as batch_done:
        for _ in range(10):
            outcomes += await swarm([make() for _ in range(count // 10)], 8)
            batch_done()
    print(f"{outcomes.total()} requests: {dict(outcomes)}")
    assert outcomes.total() == count
    return outcomes


async def test_mutated_requests_against_the_fake_engine(prove: bool) -> None:
    count = 20_000 if prove else 2_000
    chance = random.Random(20261)
    async with serving(FAKE_CONFIG) as server:
        outcomes = await fuzzed(server, count, lambda: partial(send, server, mutated(chance, "fake"), chance))
        assert {"ok", "invalid_json", "invalid_value", "payload_too_large", "missing_required_parameter"} <= set(
            outcomes
        )


async def ask(server: Server, body: dict[str, Any]) -> str:
    """Ask a real model; the outcome, which is an answer or a refusal with a reason."""
    async with server.session.post(f"{server.url}/v1/chat/completions", json=body, headers=server.headers) as response:
        text = await response.text()
        if response.status != 200:
            return check_refusal(response.status, text)
        if not body.get("stream"):
            assert json.loads(text)["choices"], text
            return "ok"
        assert text.endswith("data: [DONE]\n\n"), (body, text[-700:])
        assert '"error":' not in text, (body, text[-700:])
        return "ok"


@pytest.mark.timeout(900)
async def test_odd_but_valid_requests_against_a_real_model(prove: bool) -> None:
    chance = random.Random(2026)
    path = smollm2_path()
    async with serving(SMOL.format(path=path) + SMOL_TOOLS.format(path=path, template=TEMPLATE)) as server:
        bodies = [valid_chat(chance, chance.choice(("smol", "smol-tools"))) for _ in range(1_500 if prove else 90)]
        for number, schema in enumerate(SCHEMAS):
            form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
            question = [{"role": "user", "content": "Hi"}]
            asked: dict[str, Any] = {"messages": question, "max_tokens": 4, "stream": number % 2 == 0}
            bodies.append({"model": "smol", "response_format": form, **asked})
            if prove or number % 4 == 0:
                choice = {"tools": [tool("f", schema)], "tool_choice": ("auto", "required")[number % 2]}
                bodies.append({"model": "smol-tools", **choice, **asked})
        engines = sorted(server.engine_pids())
        slowest, outcomes = 0.0, Counter[str]()
        failures: list[str] = []

        async def job(body: dict[str, Any]) -> str:
            nonlocal slowest
            began = asyncio.get_running_loop().time()
            try:
                outcome = await ask(server, body)
            except AssertionError as error:
                failures.append(f"{json.dumps(body)[:600]} -> {str(error)[:400]}")
                outcome = "failed"
            slowest = max(slowest, asyncio.get_running_loop().time() - began)
            return outcome

        outcomes = await swarm([lambda body=body: job(body) for body in bodies], 4)
        print(f"{outcomes.total()} requests: {dict(outcomes)}; the slowest took {slowest:.1f} s")
        assert not failures, "\n".join(itertools.islice(failures, 40))
        assert sorted(server.engine_pids()) == engines
        for name in ("smol", "smol-tools"):
            assert await server.metric("forebay_engine_starts_total", model=name) == 1
        assert outcomes["ok"] > outcomes.total() // 3
        assert slowest < 30
        assert "request.bug" not in server.log

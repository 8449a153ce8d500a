"""A provider that behaves as told: a real HTTP server whose next answers a test plans, and that remembers what it was asked."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

CHUNK = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "theirs"}


@dataclass(frozen=True, slots=True)
class Plan:
    """One answer. `cut`: the connection breaks after the first word, once the provider is told; `hang`: nothing comes, not even a status.

    One that does not count says nothing of what it has used.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "No."
    code: str | None = None
    cut: bool = False
    hang: bool = False
    counts: bool = True
    words: tuple[str, ...] = ("far ", "away")


WELL = Plan()


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float


class Provider:
    """What it does next is in `plans`; when they are used up, `usual`."""

    def __init__(self) -> None:
        self.url = ""
        self.port = 0
        self.plans: deque[Plan] = deque()
        self.usual = WELL
        self.key: str | None = None
        self.asked: list[Asked] = []
        self.hanging = 0
        self.cut = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        now = asyncio.get_running_loop().time()
        self.asked.append(Asked(request.path, dict(request.headers), body, now))
        plan = self.plans.popleft() if self.plans else self.usual
        given = request.headers.get("Authorization")
        if self.key is not None and given != f"Bearer {self.key}":
            plan = Plan(401, message=f"Incorrect API key provided: {given}.", code="invalid_api_key")
        if plan.hang:
            self.hanging += 1
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                self.hanging -= 1
        if plan.status != 200:
            error = {"message": plan.message, "type": "error", "code": plan.code}
            return web.json_response({"error": error}, status=plan.status, headers=plan.headers)
        if request.path.endswith("/embeddings"):
            return web.json_response(_embeddings(body))
        if request.path.endswith("/rerank"):
            return web.json_response(_ranking(body))
        return await _stream(self, request, plan)


async def _stream(provider: Provider, request: web.Request, plan: Plan) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for place, word in enumerate(plan.words):
        delta = {"role": "assistant", "content": word} if place == 0 else {"content": word}
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        await response.write(_event({**CHUNK, "choices": [choice]}))
        if plan.cut:
            await provider.cut.wait()
            assert request.transport is not None
            request.transport.close()
            return response
    await response.write(_event({**CHUNK, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
    usage = {"prompt_tokens": 5, "completion_tokens": len(plan.words), "total_tokens": 5 + len(plan.words)}
    ending = _event({**CHUNK, "choices": [], "usage": usage}) if plan.counts else b""
    await response.write(ending + b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def _embeddings(body: dict[str, Any]) -> dict[str, Any]:
    inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
    data = [{"object": "embedding", "index": place, "embedding": [0.5, 0.25]} for place in range(len(inputs))]
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    return {"object": "list", "model": "theirs", "data": data, "usage": usage}


def _ranking(body: dict[str, Any]) -> dict[str, Any]:
    results = [{"index": place, "relevance_score": 0.1 * place} for place in range(len(body["documents"]))]
    return {"model": "theirs", "results": results, "usage": {"prompt_tokens": 3, "total_tokens": 3}}


@asynccontextmanager
async def providing(port: int = 0) -> AsyncIterator[Provider]:
    """A provider that answers well until it is told otherwise."""
    provider = Provider()
    app = web.Application()
    app.router.add_post("/{path:.*}", provider.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
    await site.start()
    provider.port = runner.addresses[0][1]
    provider.url = f"http://127.0.0.1:{provider.port}"
    try:
        yield provider
    finally:
        await runner.cleanup()

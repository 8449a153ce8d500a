"""Mutated requests to the routes of messages and tokens: the server neither dies nor grows, and no fault is ours."""

import copy
import json
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from tests.faults.test_fuzz import CONTENT_TYPES, GIVEAWAYS, ODD_HEADERS, check_refusal, fuzzed
from tests.support.mutate import SCHEMAS, spoiled
from tests.support.server import FAKE, Server, serving

CONFIG = FAKE + "[http]\nbody_bytes_max = 250000\n"
MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
PATHS = (MESSAGES, MESSAGES, MESSAGES, COUNT, "/tokenize", "/detokenize")
USE = {"type": "tool_use", "id": "t1", "name": "f0", "input": {"a": [1, None, {"b": "c"}]}}
PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
TURNS: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "Hi"},
    {"role": "user", "content": "[[fake tool=f0 calls=2]]"},
    {"role": "user", "content": "[[fake think=2 tokens=3 stop=END]]"},
    {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
    {"role": "user", "content": [PNG, {"type": "text", "text": "see"}]},
    {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/a.png"}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "42", "is_error": True}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [PNG]}]},
    {"role": "user", "content": []},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, USE]},
    {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]},
    {"role": "assistant", "content": "Yes."},
    {"role": "system", "content": "Be brief."},
)


def valid_message(chance: random.Random) -> dict[str, Any]:
    """A body for POST /v1/messages."""
    body: dict[str, Any] = {
        "model": "fake",
        "max_tokens": chance.choice((1, 8, 100)),
        "messages": [copy.deepcopy(chance.choice(TURNS)) for _ in range(chance.randint(1, 4))],
    }
    schema: dict[str, Any] = {"type": "json_schema", "schema": copy.deepcopy(chance.choice(SCHEMAS))}
    tools = [{"name": f"f{i}", "input_schema": copy.deepcopy(chance.choice(SCHEMAS))} for i in range(2)]
    options: dict[str, Any] = {
        "system": chance.choice(("s", [{"type": "text", "text": "s"}], "")),
        "temperature": chance.choice((0, 1, 1e-9)),
        "top_k": 5,
        "top_p": 0.5,
        "stop_sequences": chance.choice(([], ["a"], ["", "\u0000"])),
        "stream": chance.choice((True, False)),
        "thinking": {"type": chance.choice(("enabled", "disabled", "adaptive")), "budget_tokens": 1024},
        "tools": tools,
        "output_config": {"format": schema, "effort": "low"},
        "output_format": schema,
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "speed": "fast",
        "context_management": {"edits": [{}]},
    }
    body |= {name: options[name] for name in chance.sample(sorted(options), chance.randint(0, 5))}
    if "tools" in body:
        choices: tuple[dict[str, Any], ...] = (
            {"type": "auto"},
            {"type": "any"},
            {"type": "tool", "name": "f0"},
            {"type": "none"},
        )
        body["tool_choice"] = {**chance.choice(choices), "disable_parallel_tool_use": chance.choice((True, False))}
    return body


def valid_body(chance: random.Random, path: str) -> dict[str, Any]:
    """A body for `path`."""
    if path == "/tokenize":
        return {"model": "fake", chance.choice(("content", "prompt")): "w\u00f6rd", "add_special": True}
    if path == "/detokenize":
        return {"model": "fake", "tokens": [chance.choice((0, 97, 255, 2**31 - 1)) for _ in range(4)]}
    body = valid_message(chance)
    if path == COUNT:
        for name in (
            "max_tokens",
            "temperature",
            "top_k",
            "top_p",
            "stop_sequences",
            "stream",
            "metadata",
            "service_tier",
        ):
            body.pop(name, None)
    return body


def check_message_refusal(status: int, text: str) -> str:
    """A refusal is the caller's fault, and says so in Anthropic's shape; its code."""
    assert 400 <= status < 500, (status, text)
    body = json.loads(text)
    assert set(body) == {"type", "error", "request_id"}, body
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message", "code"}, body
    assert body["error"]["message"]
    assert len(text) < 4_000, text[:3000]
    assert not GIVEAWAYS.search(text.replace("GET /v1/models", "")), text
    return str(body["error"]["code"])


async def send(server: Server, path: str, data: bytes, chance: random.Random) -> str:
    """POST `data`; the outcome."""
    headers = {**server.headers, "Content-Type": chance.choice(CONTENT_TYPES), **chance.choice(ODD_HEADERS)}
    async with server.session.post(server.url + path, data=data, headers=headers) as response:
        text = (await response.read()).decode()
        if response.status != 200:
            check = check_message_refusal if path.startswith(MESSAGES) else check_refusal
            return check(response.status, text)
        assert "event: error" not in text, text[-500:]
        if path == MESSAGES:
            assert text.endswith('data: {"type":"message_stop"}\n\n') or json.loads(text)["type"] == "message"
        return "ok"


@pytest.mark.timeout(600)
async def test_mutated_requests(prove: bool) -> None:
    count = 20_000 if prove else 3_000
    chance = random.Random(20263)
    async with serving(CONFIG) as server:

        def make() -> Callable[[], Awaitable[str]]:
            path = chance.choice(PATHS)
            body = valid_body(chance, path)
            data = json.dumps(body).encode() if chance.random() < 0.2 else spoiled(chance, body)
            return partial(send, server, path, data, chance)

        outcomes = await fuzzed(server, count, make)
        assert {"ok", "invalid_json", "invalid_value", "missing_required_parameter"} <= set(outcomes)

"""Mutated requests to the routes of embeddings and rankings: the server neither dies nor grows, and no fault is ours."""

import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from tests.faults.test_fuzz import CONTENT_TYPES, ODD_HEADERS, check_refusal, fuzzed
from tests.support.mutate import spoiled
from tests.support.server import FAKE, Server, serving

CONFIG = FAKE + "[http]\nbody_bytes_max = 250000\n"
TEXTS = ("a", "two words", "ünïcödé \U0001f600", "word " * 300, "\u0000", "-", "[[fake tokens=3]]")
EMBEDDINGS = "/v1/embeddings"


def valid_embedding(chance: random.Random) -> dict[str, Any]:
    """A body for POST /v1/embeddings."""
    texts = [chance.choice(TEXTS) for _ in range(chance.randint(1, 5))]
    tokens = [chance.randrange(2**31) for _ in range(chance.randint(1, 5))]
    body: dict[str, Any] = {"model": "fake", "input": chance.choice((texts[0], texts, tokens, [tokens, tokens[:1]]))}
    options = {"dimensions": 8, "encoding_format": chance.choice(("float", "base64")), "user": "u", "truncate": True}
    return body | {key: value for key, value in options.items() if chance.random() < 0.3}


def valid_ranking(chance: random.Random) -> dict[str, Any]:
    """A body for either rerank route."""
    texts = [chance.choice(TEXTS) for _ in range(chance.randint(1, 5))]
    documents: list[Any] = [{"text": text} if chance.random() < 0.3 else text for text in texts]
    body: dict[str, Any] = {"model": "fake", "query": chance.choice(TEXTS), "documents": documents}
    options = {
        "top_n": 2, "return_documents": True, "max_tokens_per_doc": 9, "mode": chance.choice(("bi-encoder", "cross-encoder")),
        "raw_scores": True, "truncate": chance.choice((True, False)),
    }  # fmt: skip
    return body | {key: value for key, value in options.items() if chance.random() < 0.3}


async def send(server: Server, path: str, data: bytes, chance: random.Random) -> str:
    """POST `data`; the outcome."""
    headers = {**server.headers, "Content-Type": chance.choice(CONTENT_TYPES), **chance.choice(ODD_HEADERS)}
    async with server.session.post(server.url + path, data=data, headers=headers) as response:
        text = (await response.read()).decode()
        if response.status == 200:
            assert '"error":' not in text, text[-500:]
            return "ok"
        return check_refusal(response.status, text)


@pytest.mark.timeout(600)
async def test_mutated_requests(prove: bool) -> None:
    count = 20_000 if prove else 3_000
    chance = random.Random(20262)
    async with serving(CONFIG) as server:

        def make() -> Callable[[], Awaitable[str]]:
            path = chance.choice((EMBEDDINGS, EMBEDDINGS, "/v1/rerank", "/rerank", "/v2/rerank"))
            body = valid_embedding(chance) if path == EMBEDDINGS else valid_ranking(chance)
            data = spoiled(chance, body)
            return partial(send, server, path, data, chance)

        outcomes = await fuzzed(server, count, make)
        assert {"ok", "invalid_json", "invalid_value", "missing_required_parameter"} <= set(outcomes)

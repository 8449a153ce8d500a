"""Requests for embeddings and rankings over HTTP, and what an answer with vectors has to look like."""

import math
from array import array
from base64 import b64decode
from typing import Any

from tests.support.server import Server

EMBEDDINGS = "/v1/embeddings"
RERANK = "/v1/rerank"
EMBEDDER = """
default_models = false
[models.embedder]
engine = "fake"
preload = true
slots = 4
queue_places = 100
[models.embedder.options]
capabilities = ["embedding"]
dimensions = 64
"""
RANKER = """
[models.ranker]
engine = "fake"
preload = true
[models.ranker.options]
capabilities = ["rerank"]
"""


async def send(server: Server, path: str, body: Any, *, key: str | None = None) -> tuple[int, Any]:
    """POST `body`; status and JSON."""
    headers = {"Authorization": f"Bearer {key or server.key}"}
    async with server.session.post(server.url + path, json=body, headers=headers) as response:
        return response.status, await response.json()


async def embed(server: Server, given: Any, *, model: str = "embedder", key: str | None = None, **fields: Any) -> Any:
    """The answer of POST /v1/embeddings, which has to be one."""
    status, answer = await send(server, EMBEDDINGS, {"model": model, "input": given, **fields}, key=key)
    assert status == 200, answer
    assert answer["object"] == "list"
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return answer


async def rerank(server: Server, query: str, documents: list[Any], *, path: str = RERANK, **fields: Any) -> Any:
    """The answer of a rerank route, which has to be one."""
    body = {"model": "ranker", "query": query, "documents": documents, **fields}
    status, answer = await send(server, path, body)
    assert status == 200, answer
    return answer


def vectors(answer: Any) -> list[list[float]]:
    """The vectors of an answer in either form."""
    return [floats(entry["embedding"]) for entry in answer["data"]]


def floats(embedding: Any) -> list[float]:
    """One vector."""
    if isinstance(embedding, str):
        numbers = array("f")
        numbers.frombytes(b64decode(embedding, validate=True))
        return numbers.tolist()
    return list(embedding)


def cosine(one: list[float], other: list[float]) -> float:
    """How alike two vectors are."""
    return sum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other))


async def outcomes(server: Server, model: str = "embedder") -> tuple[float, float, float]:
    """How many items were known, computed for another, and computed."""
    name = "forebay_embedding_items_total"
    hit, shared, miss = [await server.metric(name, model=model, outcome=each) for each in ("hit", "shared", "miss")]
    return hit, shared, miss

"""A program that answers for embeddings and rankings as `vllm serve` does: its fields, its shapes, its refusals.

A text has as many tokens as words, and what it scores is the number of words that it shares with the query. What it is
asked goes into the file named by SHIM_LOG, one JSON object a line.
"""

import base64
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

KEY = os.environ.get("VLLM_API_KEY", "")
LOG = Path(os.environ.get("SHIM_LOG", os.devnull))


class TooLongError(Exception):
    """A text is longer than the context."""


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def read(text: Any, body: dict[str, Any]) -> list[str]:
    """The tokens of a text, or of a list of token ids."""
    tokens = text.split() if isinstance(text, str) else [str(token) for token in text]
    most = int(option("--max-model-len"))
    if len(tokens) > most and body.get("truncate_prompt_tokens") != -1:
        raise TooLongError(f"This model's maximum context length is {most} tokens, and there are {len(tokens)}.")
    return tokens[:most]


def embed(body: dict[str, Any]) -> dict[str, Any]:
    given = body["input"] if isinstance(body["input"], list) else [body["input"]]
    texts = [read(each, body) for each in given]
    data: list[Any] = []
    for index, tokens in enumerate(texts):
        vector = [float(len(tokens)), float(len(tokens[-1])), 0.5]
        packed: Any = base64.b64encode(struct.pack("<3f", *vector)).decode()
        embedding = packed if body.get("encoding_format") == "base64" else vector
        data.append({"index": index, "object": "embedding", "embedding": embedding})
    return {"id": "embd-1", "object": "list", "created": 1, "model": body["model"], "data": data, "usage": usage(texts)}


def rank(body: dict[str, Any]) -> dict[str, Any]:
    query = set(body["query"].split())
    texts = [read(each, body) for each in body["documents"]]
    results = [
        {
            "index": index,
            "document": {"text": body["documents"][index]},
            "relevance_score": len(query & set(tokens)) / len(query),
        }
        for index, tokens in enumerate(texts)
    ]
    results.sort(key=lambda each: -each["relevance_score"])
    return {"id": "score-1", "model": body["model"], "usage": usage(texts), "results": results[: body.get("top_n")]}


def usage(texts: list[list[str]]) -> dict[str, int]:
    total = sum(map(len, texts))
    return {"prompt_tokens": total, "total_tokens": total}


async def answer(request: web.Request) -> web.Response:
    if request.headers.get("Authorization") != f"Bearer {KEY}":
        return web.json_response({"error": "Unauthorized"}, status=401)
    body = await request.json()
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"path": request.path, **body}) + "\n")
    try:
        return web.json_response(embed(body) if request.path == "/v1/embeddings" else rank(body))
    except TooLongError as error:
        refused = {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}
        return web.json_response({"error": refused}, status=400)


async def well(_: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    """Serve until SIGTERM."""
    app = web.Application()
    app.router.add_get("/health", well)
    app.router.add_post("/v1/embeddings", answer)
    app.router.add_post("/v1/rerank", answer)
    web.run_app(app, host=option("--host"), port=int(option("--port")), print=None)


if __name__ == "__main__":
    main()

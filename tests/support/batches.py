"""Batches over HTTP: input files, submitting, waiting, reading results."""

import json
from collections.abc import Iterable
from typing import Any

import aiohttp

from tests.support.server import Server, chat_body, eventually

CHAT = "/v1/chat/completions"
LIVE = {"validating", "in_progress", "finalizing", "cancelling"}


def line(custom_id: str, text: str, *, model: str = "fake", url: str = CHAT, **fields: Any) -> dict[str, Any]:
    """One request."""
    body = chat_body(text, model=model, **fields)
    del body["stream"]
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(lines: Iterable[Any]) -> bytes:
    """Lines as a file; one that is text already is taken as it is."""
    return b"".join((each if isinstance(each, str) else json.dumps(each)).encode() + b"\n" for each in lines)


async def upload(server: Server, data: bytes, *, purpose: str = "batch", key: str | None = None) -> dict[str, Any]:
    """POST /v1/files."""
    form = aiohttp.FormData()
    form.add_field("purpose", purpose)
    form.add_field("file", data, filename="input.jsonl", content_type="application/jsonl")
    async with server.session.post(f"{server.url}/v1/files", data=form, headers=_headers(server, key)) as response:
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        return answer


async def create(server: Server, file_id: str, *, key: str | None = None, **fields: Any) -> tuple[int, dict[str, Any]]:
    """POST /v1/batches; status and JSON."""
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **fields}
    async with server.session.post(f"{server.url}/v1/batches", json=body, headers=_headers(server, key)) as response:
        return response.status, await response.json()


async def submit(server: Server, lines: Iterable[Any], **fields: Any) -> dict[str, Any]:
    """Upload lines and make a batch of them."""
    file = await upload(server, jsonl(lines))
    status, batch = await create(server, file["id"], **fields)
    assert status == 200, batch
    return batch


async def finished(server: Server, batch_id: str, within_seconds: float = 60) -> dict[str, Any]:
    """Wait for the end of a batch; on the way its counts must only ever grow."""
    counts = (0, 0, 0)

    async def ended() -> dict[str, Any] | None:
        nonlocal counts
        batch: dict[str, Any] = await server.get(f"/v1/batches/{batch_id}")
        now = batch["request_counts"]
        after = (now["total"], now["completed"], now["failed"])
        assert all(old <= new for old, new in zip(counts, after, strict=True)), (counts, after)
        assert now["completed"] + now["failed"] <= now["total"], now
        counts = after
        return None if batch["status"] in LIVE else batch

    found: dict[str, Any] = await eventually(ended, within_seconds=within_seconds, what=f"the end of {batch_id}")
    return found


async def content(server: Server, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of a file; none if there is no file."""
    if file_id is None:
        return []
    async with server.session.get(f"{server.url}/v1/files/{file_id}/content", headers=server.headers) as response:
        assert response.status == 200, await response.text()
        return [json.loads(each) for each in (await response.read()).splitlines()]


async def results(server: Server, batch: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of the output and the error file; together they have every custom_id once."""
    output = await content(server, batch["output_file_id"])
    errors = await content(server, batch["error_file_id"])
    names = [each["custom_id"] for each in output + errors]
    assert len(set(names)) == len(names) == batch["request_counts"]["total"]
    assert (len(output), len(errors)) == (batch["request_counts"]["completed"], batch["request_counts"]["failed"])
    return output, errors


def _headers(server: Server, key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key or server.key}"}

"""Requests for pictures over HTTP, as forms and as JSON, and what is answered."""

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import aiohttp
from PIL import Image

from tests.support.picture_jobs import EDITS, IMAGE, SEED, mask
from tests.support.recordings import form_of
from tests.support.server import Server


def form(fields: Mapping[str, Any], *files: tuple[str, bytes]) -> aiohttp.FormData:
    """What the official client would send."""
    data = aiohttp.FormData(default_to_multipart=True)
    for name, value in form_of({"model": "fake", "prompt": "a cat", "seed": SEED, **fields}):
        data.add_field(name, value)
    for name, content in files:
        data.add_field(name, content, filename="a.png", content_type="image/png")
    return data


async def send(server: Server, *files: tuple[str, bytes], key: str | None = None, **fields: Any) -> tuple[int, str]:
    """POST a form to the route of edits; the status and the text of the answer."""
    headers = {"Authorization": f"Bearer {key or server.key}"}
    async with server.session.post(server.url + EDITS, data=form(fields, *files), headers=headers) as response:
        return response.status, await response.text()


async def edited(server: Server, *files: tuple[str, bytes], **fields: Any) -> Any:
    """The JSON of an answer that is one."""
    status, text = await send(server, *(files or (("image", IMAGE), ("mask", mask()))), **fields)
    assert status == 200, text
    return json.loads(text)


async def as_json(server: Server, path: str = EDITS, **body: Any) -> tuple[int, Any]:
    url = server.url + path
    whole = {"model": "fake", "prompt": "a cat", "seed": SEED, **body}
    async with server.session.post(url, json=whole, headers=server.headers) as response:
        return response.status, await response.json()


async def refusal(server: Server, *files: tuple[str, bytes], **fields: Any) -> tuple[int, str, str | None]:
    status, text = await send(server, *files, **fields)
    assert status >= 400, text
    error = json.loads(text)["error"]
    return status, error["code"], error["param"]


def opened(shown: Mapping[str, Any]) -> Image.Image:
    """The picture of an answer or of an event."""
    return Image.open(io.BytesIO(base64.b64decode(shown["b64_json"])))


def pixels(image: Image.Image) -> bytes:
    return image.convert("RGB").tobytes()


async def events_of(server: Server, path: str, data: Any = None, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream."""
    sent = {"data": data} if data is not None else {"json": {"model": "fake", "prompt": "a cat", "seed": SEED, **body}}
    found = []
    async with server.session.post(server.url + path, headers=server.headers, **sent) as response:
        assert response.headers["content-type"].startswith("text/event-stream"), await response.text()
        buffer = b""
        async for piece in response.content.iter_any():
            *blocks, buffer = (buffer + piece).split(b"\n\n")
            for block in blocks:
                event = json.loads(block.split(b"data: ", 1)[1])
                assert b"event: " + event.get("type", "error").encode() in block or "error" in event
                found.append(event)
    return found

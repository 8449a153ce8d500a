"""/v1/messages on the wire: its headers, its errors where no call was made, its place in line, and as a line of a batch."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.batches import finished, results, submit
from tests.support.images import picture
from tests.support.server import FAKE, Server, serving

BODY = {"model": "fake", "max_tokens": 100, "messages": [{"role": "user", "content": "[[fake tokens=2]]"}]}
COUNT = {"model": "fake", "messages": [{"role": "user", "content": "one two three"}]}
CONFIG = f"""
{FAKE}
slots = 1
options = {{ tools = true }}
[models.eye]
engine = "fake"
preload = true
options = {{ vision = true }}
[models.far]
engine = "upstream"
options = {{ base_url = "http://127.0.0.1:9/v1" }}
"""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG) as running:
        yield running
        assert "request.bug" not in running.log


async def post(server: Server, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
    """Status, headers and JSON."""
    async with server.session.post(server.url + path, json=body, headers={**server.headers, **headers}) as response:
        return response.status, response.headers, await response.json()


async def test_the_key_may_come_in_either_header(server: Server) -> None:
    for headers in (
        {"x-api-key": server.key, "anthropic-version": "2023-06-01"},
        {"Authorization": f"Bearer {server.key}"},
    ):
        async with server.session.post(f"{server.url}/v1/messages?beta=true", json=BODY, headers=headers) as response:
            assert response.status == 200
            assert (await response.json())["content"] == [{"type": "text", "text": "tok0 tok1 "}]


async def test_the_id_of_a_request_is_in_the_headers_and_in_the_errors(server: Server) -> None:
    status, headers, body = await post(server, "/v1/messages", {**BODY, "model": "nope"}, **{"X-Request-ID": "mine"})
    assert (status, headers["request-id"], headers["x-request-id"], body["request_id"]) == (404, "mine", "mine", "mine")
    _, headers, _ = await post(server, "/v1/messages", BODY)
    assert headers["request-id"] == headers["x-request-id"]
    assert "request-id" not in (await post(server, "/v1/chat/completions", COUNT))[1]


@pytest.mark.parametrize(
    ("method", "path", "key", "status", "kind"),
    [
        ("POST", "/v1/messages", "", 401, "authentication_error"),
        ("POST", "/v1/messages/count_tokens", "fb_x", 401, "authentication_error"),
        ("GET", "/v1/messages", None, 405, "invalid_request_error"),
        ("POST", "/v1/messages/batches", None, 404, "not_found_error"),
    ],
)
async def test_errors_before_there_is_a_call(
    server: Server, method: str, path: str, key: str | None, status: int, kind: str
) -> None:
    headers = {"x-api-key": server.key if key is None else key}
    async with server.session.request(method, server.url + path, headers=headers) as response:
        body = await response.json()
    assert (response.status, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["request_id"] == response.headers["request-id"]


async def test_a_read_only_key_may_not(server: Server) -> None:
    key = await server.create_key("readers", "read_only")
    for path, body in (("/v1/messages", BODY), ("/v1/messages/count_tokens", COUNT)):
        status, _, refusal = await post(server, path, body, Authorization=f"Bearer {key}")
        assert (status, refusal["error"]["type"]) == (403, "permission_error")
    status, _, refusal = await post(
        server, "/tokenize", {"model": "fake", "content": "a"}, Authorization=f"Bearer {key}"
    )
    assert (status, refusal["error"]["code"]) == (403, "insufficient_role")


async def test_counting_waits_in_line_like_every_request(server: Server) -> None:
    busy = {
        **BODY,
        "stream": True,
        "max_tokens": 1000,
        "messages": [{"role": "user", "content": "[[fake tokens=1000 rate=50]]"}],
    }
    async with server.session.post(f"{server.url}/v1/messages", json=busy, headers=server.headers) as stream:
        assert stream.content_type == "text/event-stream"
        await stream.content.readuntil(b"text_delta")
        counting = asyncio.create_task(post(server, "/v1/messages/count_tokens", COUNT))
        await server.until_load(1, 1)
        assert not counting.done()
        stream.close()
        status, headers, body = await counting
    assert (status, body) == (200, {"input_tokens": 3})
    assert int(headers["x-queue-wait-ms"]) > 0


async def test_a_message_can_be_cancelled_by_its_id(server: Server) -> None:
    body = {
        **BODY,
        "stream": True,
        "max_tokens": 1000,
        "messages": [{"role": "user", "content": "[[fake tokens=1000 rate=50]]"}],
    }
    headers = {**server.headers, "X-Request-ID": "to-cancel"}
    async with server.session.post(f"{server.url}/v1/messages", json=body, headers=headers) as stream:
        await stream.content.readuntil(b"text_delta")
        assert (await server.post("/v1/requests/to-cancel/cancel"))[0] == 200
        said = (await stream.content.read()).decode()
    name, line = said.strip().split("\n\n")[-1].split("\n")
    assert name == "event: error"
    assert json.loads(line.removeprefix("data: "))["error"]["code"] == "client_closed_request"
    await server.until_load(0, 0)


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/messages/count_tokens", {**COUNT, "model": "far"}),
    ("/tokenize", {"model": "far", "content": "a"}),
    ("/detokenize", {"model": "far", "tokens": [1]}),
])  # fmt: skip
async def test_an_engine_that_cannot_say_is_not_asked(server: Server, path: str, body: Any) -> None:
    status, _, refusal = await post(server, path, body)
    assert (status, refusal["error"]["code"]) == (400, "capability_not_supported")


async def test_tokens_of_the_fake_engine(server: Server) -> None:
    status, _, made = await post(server, "/tokenize", {"model": "fake", "prompt": "h\u00e9"})
    assert (status, made) == (200, {"object": "tokens", "model": "fake", "tokens": [104, 195, 169], "count": 3})
    status, _, back = await post(server, "/detokenize", {"model": "fake", "tokens": made["tokens"]})
    assert (status, back["content"], back["prompt"]) == (200, "h\u00e9", "h\u00e9")


async def test_the_sequence_that_stopped_it(server: Server) -> None:
    asked = {**BODY, "messages": [{"role": "user", "content": "[[fake tokens=1 stop=END]]"}], "stop_sequences": ["END"]}
    _, _, message = await post(server, "/v1/messages", asked)
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")


def image(width: int, height: int) -> dict[str, Any]:
    data = base64.b64encode(picture(width, height)).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


async def test_images_reach_a_model_that_sees_them(server: Server) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [image(10, 20)]}
    messages = [
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [{"type": "text", "text": "[[fake images=1]]"}, image(30, 40), result]},
    ]
    status, _, message = await post(server, "/v1/messages", {**BODY, "model": "eye", "messages": messages})
    assert status == 200, message
    assert [word.split(":")[1] for word in message["content"][0]["text"].split()] == ["10x20", "30x40"]


@pytest.mark.parametrize(
    ("model", "source", "code"),
    [
        ("fake", {"type": "base64", "media_type": "image/png", "data": "AAAA"}, "capability_not_supported"),
        ("eye", {"type": "base64", "media_type": "image/png", "data": "AAAA"}, "media_invalid"),
        ("eye", {"type": "url", "url": "http://127.0.0.1:1/a.png"}, None),
    ],
)
async def test_images_that_no_engine_is_shown(server: Server, model: str, source: Any, code: str | None) -> None:
    for path, fields in (("/v1/messages", BODY), ("/v1/messages/count_tokens", COUNT)):
        messages = [{"role": "user", "content": [{"type": "image", "source": source}]}]
        status, _, refusal = await post(server, path, {**fields, "model": model, "messages": messages})
        assert (status, refusal["type"]) == (400, "error"), refusal
        assert code in {None, refusal["error"]["code"]}


async def test_messages_as_lines_of_a_batch(server: Server) -> None:
    lines = [
        {"custom_id": str(index), "method": "POST", "url": "/v1/messages", "body": {**body, "model": "eye"}}
        for index, body in enumerate([BODY, {**BODY, "max_tokens": 0}])
    ]
    batch = await finished(server, (await submit(server, lines, endpoint="/v1/messages"))["id"])
    good, bad = await results(server, batch)
    assert good[0]["response"]["body"]["content"][0]["text"] == "tok0 tok1 "
    assert bad[0]["custom_id"] == "1"

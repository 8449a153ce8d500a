"""What a caller sees of a bug of ours: an error like every other, in the dialect of the path, and nothing of the bug."""

import json

import pytest
from starlette.types import Message
from structlog.testing import capture_logs

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.gateway.envelope import Envelope
from forebay.gateway.server import create_app

BUG = "The server met a bug of its own. Report it with this request's id."


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", "/v1/messages")])
async def test_a_bug_is_answered_in_the_dialect_of_its_path(method: str, path: str) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", "client": None}
    without_rooms = Envelope(create_app(Settings()), SystemClock(), access_log=False)
    with capture_logs() as logs:
        await without_rooms(scope, receive, send)
    [bug] = [log for log in logs if log["event"] == "request.bug"]
    assert bug["exc_info"], "with what whoever mends it needs"
    start, content = sent
    headers = dict(start["headers"])
    body = json.loads(content["body"])
    assert start["status"] == 500
    assert (body["error"]["message"], body["error"]["code"]) == (BUG, "internal_error")
    assert headers[b"x-request-id"]
    if path == "/v1/messages":
        assert (body["type"], body["error"]["type"]) == ("error", "api_error")
        assert body["request_id"].encode() == headers[b"request-id"]
    else:
        assert body["error"]["type"] == "server_error"

"""Answers about recordings that are easily got wrong: empty ones, late ones, and those that a caller waits for in vain."""

import asyncio
import json
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from tests.integration.test_audio import (
    ALIGNMENTS,
    DIARIZATIONS,
    TRANSCRIPTIONS,
    TRANSLATIONS,
    TWO,
    as_json,
    heard,
    refusal,
    send,
)
from tests.support.recordings import SILENT, data_url, wav
from tests.support.server import FAKE, Server, eventually, serving

CONFIG = f"""
{FAKE}
[audio]
diarization_model = "fake"
online_seconds_max = 60
stretch_seconds = 30
"""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG) as one:
        yield one
        await one.until_load(0, 0)
        assert "request.bug" not in one.log


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def longest() -> AsyncIterator[Server]:
    """A server at which nobody becomes a job."""
    async with serving(CONFIG.replace("online_seconds_max = 60", "online_seconds_max = 900")) as one:
        yield one
        assert "request.bug" not in one.log


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The next answer on a connection; status and body."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    lines = head.decode().lower().splitlines()
    size = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
    return int(lines[0].split()[1]), await asyncio.wait_for(reader.readexactly(size), 10)


async def test_an_empty_answer_leaves_the_connection_to_the_next_request(server: Server) -> None:
    url = urlsplit(server.url)
    silence = {"model": "fake", "url": data_url(wav(2, SILENT)), "response_format": "rttm"}
    body = json.dumps(silence).encode()
    head = f"POST {DIARIZATIONS} HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {server.key}\r\n"
    request = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        for _ in range(2):
            writer.write(request)
            assert await read_answer(reader) == (200, b"")
    finally:
        writer.close()
        await writer.wait_closed()


async def test_a_text_alone_is_for_a_recording_of_ten_minutes(longest: Server) -> None:
    long = wav(602, SILENT)
    assert await refusal(longest, ALIGNMENTS, long, transcript="a") == (400, "invalid_value", "transcript")
    segments = json.dumps([{"start": 0, "end": 1, "text": "a"}, {"start": 1, "end": 602, "text": "b"}])
    assert await refusal(longest, ALIGNMENTS, long, segments=segments) == (400, "invalid_value", "segments[1]")


async def test_an_address_that_nobody_may_call_is_told_by_its_field(server: Server) -> None:
    told = {"background": True, "webhook_url": "http://127.0.0.1/hook"}
    assert await refusal(server, TRANSCRIPTIONS, TWO, **told) == (400, "url_not_allowed", "webhook_url")
    for url in ("ftp://example.com/a.wav", "http://127.0.0.1/a.wav", "https://example.com/a.wav"):
        status, body = await as_json(server, {"url": url, "background": True})
        assert (status, body["error"]["code"], body["error"]["param"]) == (400, "url_not_allowed", "url"), url


async def test_a_wrong_value_is_told_in_words_of_ours(server: Server) -> None:
    status, body = await as_json(server, {"url": data_url(TWO), "language": "tlh"})
    message = "Invalid value for 'language': write a language as in ISO 639-1, such as `en`."
    assert (status, body["error"]["message"]) == (400, message)


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, TRANSLATIONS])
async def test_speakers_are_told_apart_for_those_who_can_see_them(server: Server, path: str) -> None:
    for form in ("json", "text"):
        found = await refusal(server, path, TWO, diarize=True, response_format=form)
        assert found == (400, "invalid_value", "response_format")
    assert (await heard(server, path, diarize=True, response_format="verbose_json"))["speakers"] == ["A", "B"]
    status, _ = await send(server, path, TWO, diarize=True, background=True)
    assert status == 202


async def test_the_time_of_a_request_ends_the_work_on_its_recording() -> None:
    config = CONFIG.replace("[audio]", "request_timeout_seconds = 2\n[audio]")
    async with serving(config, environment={"FOREBAY_LOG_LEVEL": "debug"}) as one:
        asking = asyncio.create_task(send(one, TRANSCRIPTIONS, TWO, prompt="[[fake token_ms=5000]]"))
        await eventually(lambda: "event=started" in one.log, what="a start at the engine")
        status, text = await asking
        assert (status, json.loads(text)["error"]["code"]) == (504, "request_timeout")
        await one.until_load(0, 0, within_seconds=2)
        assert (await heard(one))["text"], "its place is free"
        assert "engine.condemned" not in one.log

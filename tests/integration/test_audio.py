"""Recordings through a real server to an engine whose words follow from the samples alone."""

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from functools import partial
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest
import pytest_asyncio

from forebay.engines.lived import Lived
from tests.support.measuring import within
from tests.support.processes import command_line, lives
from tests.support.receiver import Answer, receiving
from tests.support.recordings import LOUD, QUIET, SILENT, data_url, form_of, wav
from tests.support.server import FAKE, Server, eventually, serving
from tests.support.subtitles import read_srt, read_vtt

CONFIG = f"""
{FAKE}
[models.other]
engine = "fake"
options.capabilities = ["transcription"]
[models.broken]
engine = "fake"
fallback = ["fake"]
options.fail_start = "exit"
[audio]
diarization_model = "fake"
online_seconds_max = 60
stretch_seconds = 30
uploads_at_once = 8
fetch_hosts = ["127.0.0.2"]
[outbound]
allowed_networks = ["127.0.0.2/32"]
"""
NARROW = f"""
{FAKE}
slots = 2
queue_places = 4
[audio]
bytes_max = 9_000_000
seconds_max = 280
online_seconds_max = 600
stretch_seconds = 30
uploads_at_once = 8
"""
LOG = {"FOREBAY_LOG_FORMAT": "json", "FOREBAY_LOG_LEVEL": "debug"}
TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"
ALIGNMENTS, DIARIZATIONS = "/v1/audio/alignments", "/v1/audio/diarizations"
TWO = wav(9, LOUD, QUIET, SILENT)  # three seconds of each: two voices
ENDLESS = "[[fake hang_at=1]]"
STOP_SECONDS = 2.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG, environment=LOG) as one:
        yield one
        await nothing_left(one)
        assert "request.bug" not in one.log


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def narrow() -> AsyncIterator[Server]:
    """A server with little room and long recordings."""
    async with serving(NARROW, environment=LOG) as one:
        yield one
        await nothing_left(one)
        assert "request.bug" not in one.log


def form(content: bytes | None, fields: Mapping[str, Any]) -> aiohttp.FormData:
    """What the official client would send."""
    data = aiohttp.FormData(default_to_multipart=True)
    for name, value in form_of({"model": "fake", **fields}):
        data.add_field(name, value)
    if content is not None:
        data.add_field("file", content, filename="a.wav", content_type="audio/wav")
    return data


async def send(server: Server, path: str, content: bytes | None, **fields: Any) -> tuple[int, str]:
    """POST a form; the status and the text of the answer."""
    url, data = server.url + path, form(content, fields)
    async with server.session.post(url, data=data, headers=server.headers) as response:
        return response.status, await response.text()


async def heard(server: Server, path: str = TRANSCRIPTIONS, content: bytes = TWO, **fields: Any) -> Any:
    """The JSON of an answer that is one."""
    status, text = await send(server, path, content, **fields)
    assert status == 200, text
    return json.loads(text)


async def refusal(server: Server, path: str, content: bytes | None, **fields: Any) -> tuple[int, str, str | None]:
    status, text = await send(server, path, content, **fields)
    assert status >= 400, text
    error = json.loads(text)["error"]
    return status, error["code"], error["param"]


async def as_json(server: Server, body: Mapping[str, Any], path: str = TRANSCRIPTIONS) -> tuple[int, Any]:
    url = server.url + path
    async with server.session.post(url, json={"model": "fake", **body}, headers=server.headers) as response:
        return response.status, await response.json()


async def nothing_left(server: Server) -> None:
    """Nobody runs or waits, no recording is decoded, no file is open, every place is free."""
    await server.until_load(0, 0)
    lived = Lived()
    until = lived.seconds() + STOP_SECONDS
    while left := [*open_recordings(server), *decoding(server)]:
        assert lived.seconds() < until, left
        await server.load()  # while one of the two is held up, that clock stands still


def open_recordings(server: Server) -> list[str]:
    """The private files that the server has open; they have no names any more."""
    return [file for file in _descriptors(server.pid) if "/recordings/" in file]


def _descriptors(pid: int) -> list[str]:
    found = []
    for descriptor in range(psutil.Process(pid).num_fds() + 64):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
        except OSError:
            continue
    return found


def decoding(server: Server) -> list[int]:
    """The processes that decode right now: children of those that wait for something to decode."""
    programs = [process for process in server.family() if "audio_decode" in command_line(process)]
    parents = {process.ppid() for process in programs if lives(process)}
    return [process.pid for process in programs if process.pid not in parents and process.ppid() != server.pid]


# What is answered.


async def test_formats(server: Server) -> None:
    body = await heard(server)
    text = body["text"]
    assert len(text.split()) == 12
    assert body["usage"] == {"type": "duration", "seconds": 9.0}
    assert await send(server, TRANSCRIPTIONS, TWO, response_format="text") == (200, text + "\n")
    for name, read in (("srt", read_srt), ("vtt", read_vtt)):
        status, subtitles = await send(server, TRANSCRIPTIONS, TWO, response_format=name)
        cues = read(subtitles)
        assert status == 200
        assert [(cue.start, cue.end) for cue in cues] == [(0, 2), (2, 4), (4, 6)]
        assert " ".join(cue.text for cue in cues) == text
    verbose = await heard(server, response_format="verbose_json", timestamp_granularities=["word"], language="de")
    assert verbose["language"] == "german"
    assert " ".join(word["word"] for word in verbose["words"]) == text
    assert "segments" not in verbose


async def test_a_clip_that_cannot_be_used_is_told_before_the_work(server: Server) -> None:
    known = {"known_speaker_names": ["Ann"], "known_speaker_references": [data_url(b"RIFF")]}
    found = await refusal(server, TRANSCRIPTIONS, TWO, response_format="diarized_json", stream="true", **known)
    assert found == (400, "media_invalid", "known_speaker_references")  # and no stream has begun


async def test_segments_that_are_no_part_of_the_recording(server: Server) -> None:
    behind = [{"start": 0, "end": 1, "text": "one"}, {"start": 9.5, "end": 12, "text": "two"}]
    found = await refusal(server, ALIGNMENTS, TWO, segments=json.dumps(behind))
    assert found == (400, "invalid_value", "segments[1].start")
    heap = [{"start": number / 1000, "end": 599, "text": "all"} for number in range(100)]
    found = await refusal(server, ALIGNMENTS, wav(60), segments=json.dumps(heap))
    assert found == (400, "invalid_value", "segments")


async def test_who_speaks(server: Server) -> None:
    body = await heard(server, response_format="diarized_json")
    assert [segment["speaker"] for segment in body["segments"]] == ["A", "A", "B", "B"]
    assert " ".join(segment["text"] for segment in body["segments"]) == body["text"]
    verbose = await heard(server, response_format="verbose_json", diarize=True, timestamp_granularities=["word"])
    assert {word["speaker"] for word in verbose["words"]} == {"A", "B"}
    _, subtitles = await send(server, TRANSCRIPTIONS, TWO, response_format="srt", diarize=True)
    assert [cue.text[:2] for cue in read_srt(subtitles)] == ["A:", "A:", "B:", "B:"]


async def test_known_speakers(server: Server) -> None:
    known: dict[str, Any] = {"known_speaker_names": ["Ann"], "known_speaker_references": [data_url(wav(3, QUIET))]}
    body = await heard(server, response_format="diarized_json", **known)
    assert [segment["speaker"] for segment in body["segments"]] == ["A", "A", "Ann", "Ann"]


async def test_the_other_routes(server: Server) -> None:
    said = await heard(server)
    assert (await heard(server, TRANSLATIONS))["text"] == said["text"].upper()
    turns = await heard(server, DIARIZATIONS, response_format="verbose_json")
    assert [speaker["id"] for speaker in turns["speakers"]] == ["A", "B"]
    _, rttm = await send(server, DIARIZATIONS, TWO, response_format="rttm")
    assert [line.split()[7] for line in rttm.splitlines()] == ["A", "B"]
    aligned = await heard(server, ALIGNMENTS, transcript="who is there", character_alignments=True)
    assert [(word["word"], word["start"]) for word in aligned["words"]] == [("who", 0.0), ("is", 3.0), ("there", 6.0)]
    assert len(aligned["words"][0]["characters"]) == 3


async def test_stretches_give_the_same_words_as_one(server: Server) -> None:
    content = wav(58, *range(300, 12_000, 100))
    whole = await heard(server, content=content, response_format="verbose_json")
    assert len(whole["segments"]) == 29
    assert [segment["id"] for segment in whole["segments"]] == list(range(29))
    starts = [segment["start"] for segment in whole["segments"]]
    assert starts == [2.0 * place for place in range(29)]


async def test_a_stream_tells_what_is_said_when_it_is_said(server: Server) -> None:
    fields = {"stream": True, "response_format": "diarized_json"}
    url, data = server.url + TRANSCRIPTIONS, form(TWO, {**fields, "prompt": ENDLESS})
    async with server.session.post(url, data=data, headers=server.headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        first = await anext(_told(response))
        assert await server.load() == (1, 0)
        response.close()
    await nothing_left(server)
    url, data = server.url + TRANSCRIPTIONS, form(TWO, fields)
    async with server.session.post(url, data=data, headers=server.headers) as response:
        events = [event async for event in _told(response)]
    assert events[0] == first
    kinds = [event["type"].rsplit(".", 1)[1] for event in events]
    assert kinds == ["delta"] * 3 + ["segment"] * 4 + ["done"]
    assert "".join(event["delta"] for event in events[:3]) == events[-1]["text"]
    assert events[-1]["usage"]["input_tokens"] == 90


async def _told(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    """The events of a stream."""
    async for line in response.content:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


async def test_a_stream_that_fails_says_so_at_its_end(server: Server) -> None:
    status, text = await send(server, TRANSCRIPTIONS, TWO, stream=True, prompt="[[fake garbage_at=2 token_ms=100]]")
    assert status == 200
    assert json.loads(text.strip().split("\n\n")[-1][6:])["error"]["code"] == "engine_garbled"
    assert text.count("delta") == 2 * 2  # its type and its field, of two


async def test_json_and_forms_say_the_same(server: Server) -> None:
    said = await heard(server)
    assert await as_json(server, {"url": data_url(TWO)}) == (200, said)
    assert await as_json(server, {"url": data_url(TWO), "languages": ["en"], "beam_size": 3}) == (200, said)
    status, answer = await as_json(server, {"url": data_url(TWO), "beam_size": "3"})
    assert (status, answer["error"]["param"]) == (400, "beam_size")


async def test_an_uploaded_file(server: Server) -> None:
    client = server.client()
    file = await client.files.create(file=("a.wav", TWO), purpose="user_data")
    assert (await as_json(server, {"file_id": file.id}))[1] == await heard(server)
    strange = await server.create_key("other")
    headers = {"Authorization": f"Bearer {strange}"}
    body = {"model": "fake", "file_id": file.id}
    async with server.session.post(server.url + TRANSCRIPTIONS, json=body, headers=headers) as response:
        assert response.status == 404
    await client.files.delete(file.id)
    status, answer = await as_json(server, {"file_id": file.id})
    assert (status, answer["error"]["param"]) == (404, "file_id")


async def test_an_address(server: Server) -> None:
    async with receiving("127.0.0.2") as host:
        host.then = Answer(200, body=TWO)
        url = f"{host.url}/a.wav"
        assert (await as_json(server, {"url": url}))[1] == await heard(server)
        host.then = Answer(404)
        status, answer = await as_json(server, {"url": url})
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "media_invalid", "url")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/a", "https://example.com/a", "file:///etc/passwd", "/etc/passwd", "x"]
)
async def test_addresses_that_are_not_allowed(server: Server, url: str) -> None:
    status, answer = await as_json(server, {"url": url})
    assert status == 400
    assert answer["error"]["code"] in {"url_not_allowed", "media_invalid"}
    assert answer["error"]["param"] == "url"


@pytest.mark.parametrize(
    ("path", "content", "fields", "expected"),
    [
        (TRANSCRIPTIONS, b"", {}, (400, "media_invalid", "file")),
        (TRANSCRIPTIONS, b"not a sound", {}, (400, "media_invalid", "file")),
        (TRANSCRIPTIONS, None, {"language": "en"}, (400, "missing_required_parameter", "file")),
        (TRANSCRIPTIONS, TWO, {"file_id": "file_1"}, (400, "invalid_value", "file_id")),
        (TRANSCRIPTIONS, TWO, {"model": "nobody"}, (404, "model_not_found", None)),
        (TRANSCRIPTIONS, TWO, {"beam_size": 99}, (400, "invalid_value", "beam_size")),
        (TRANSCRIPTIONS, TWO, {"model": "other", "response_format": "srt", "stream": True}, (400, "invalid_value", "stream")),
        (TRANSCRIPTIONS, TWO, {"align_model": "other"}, (400, "capability_not_supported", "align_model")),
        (TRANSCRIPTIONS, TWO, {"align_model": "nobody"}, (404, "model_not_found", "align_model")),
        (TRANSCRIPTIONS, TWO, {"diarize": True, "diarization_model": "other"}, (400, "capability_not_supported", "diarization_model")),
        (TRANSLATIONS, TWO, {"model": "other"}, (400, "capability_not_supported", "model")),
        (TRANSLATIONS, TWO, {"stream": True}, (400, "invalid_value", "stream")),
        (DIARIZATIONS, TWO, {"model": "other"}, (400, "capability_not_supported", "model")),
        (ALIGNMENTS, TWO, {}, (400, "invalid_value", "transcript")),
        (ALIGNMENTS, TWO, {"transcript": "x" * 70_000}, (400, "invalid_value", "transcript")),
        (TRANSCRIPTIONS, TWO, {"prompt": "x" * 9000}, (413, "payload_too_large", "prompt")),
    ],
)  # fmt: skip
async def test_what_is_refused(
    server: Server, path: str, content: bytes | None, fields: dict[str, Any], expected: tuple[int, str, str | None]
) -> None:
    assert await refusal(server, path, content, **fields) == expected


async def test_what_is_no_form(server: Server) -> None:
    headers = {**server.headers, "Content-Type": "multipart/form-data; boundary=x"}
    for body, code in ((b"--x\r\n", "invalid_multipart"), (b"{}", "invalid_multipart"), (b"", "invalid_multipart")):
        async with server.session.post(server.url + TRANSCRIPTIONS, data=body, headers=headers) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (400, code)


async def test_forms_have_bounds(server: Server) -> None:
    many = {"keywords": ["x"] * 1600}
    assert await refusal(server, TRANSCRIPTIONS, TWO, **many) == (400, "invalid_multipart", None)
    assert await refusal(server, TRANSCRIPTIONS, TWO, keywords=["x"] * 1000) == (400, "invalid_value", "keywords")
    large = {"known_speaker_names": ["a"] * 3, "known_speaker_references": ["data:," + "x" * 3_000_000] * 3}
    status, code, param = await refusal(server, TRANSCRIPTIONS, TWO, diarize=True, **large)
    assert (status, code, param) == (413, "payload_too_large", "known_speaker_references[]")


async def test_a_wrong_model_is_told_before_the_recording_has_come(server: Server) -> None:
    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    fields = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nnobody\r\n'
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 1000
    head = f"POST {TRANSCRIPTIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
    kind = "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000000\r\n\r\n"
    writer.write((head + kind).encode() + fields + file)
    await writer.drain()
    async with asyncio.timeout(10):
        assert b" 404 " in await reader.readline()
    writer.close()


# What becomes a job.


@pytest.mark.parametrize("fields", [{"background": True}, {}])
async def test_a_long_recording_and_one_in_the_background_are_jobs(server: Server, fields: dict[str, Any]) -> None:
    content = TWO if fields else wav(61, LOUD)
    url = server.url + TRANSCRIPTIONS
    async with server.session.post(url, data=form(content, fields), headers=server.headers) as response:
        assert response.status == 202
        job = await response.json()
        assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["object"], job["kind"]) == ("job", "transcription")

    async def completed() -> bool:  # it waits for the quiet after online work, with its recording
        found = await server.get(f"/v1/jobs/{job['id']}")
        return bool(found["status"] == "completed")

    await eventually(completed, within_seconds=60, what="the job to be done")


# Who goes, and what stops then.


async def started(server: Server, content: bytes, **fields: Any) -> "asyncio.Task[tuple[int, str]]":
    """A request that an engine works on."""
    before = sum(await server.load())
    asking = asyncio.create_task(send(server, TRANSCRIPTIONS, content, **fields))
    await eventually(partial(_more_than, server, before), what="a start at the engine")
    return asking


async def _more_than(server: Server, before: int) -> bool:
    return sum(await server.load()) > before


@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_who_leaves_stops_the_engine(server: Server, stream: bool) -> None:
    async def stopped(_number: int) -> float:
        asking = await started(server, TWO, prompt=ENDLESS, stream=stream)
        left = monotonic()
        asking.cancel()
        await nothing_left(server)
        return monotonic() - left

    await within(STOP_SECONDS, stopped)


async def test_a_cancel_call_stops_it_too(server: Server) -> None:
    url, data = server.url + TRANSCRIPTIONS, form(TWO, {"prompt": ENDLESS})
    headers = {**server.headers, "X-Request-ID": "hear-me"}
    asking = asyncio.ensure_future(server.session.post(url, data=data, headers=headers).__aenter__())
    await server.until_load(1, 0)
    status, _ = await server.post("/v1/requests/hear-me/cancel")
    response = await asking
    assert (status, response.status) == (200, 499)
    response.close()
    await nothing_left(server)


async def begin_upload(server: Server) -> asyncio.StreamWriter:
    """A connection on which the first megabytes of a recording have been sent."""
    address = urlsplit(server.url)
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST {TRANSCRIPTIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
    kind = "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000000\r\n\r\n"
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 2_000_000
    writer.write((head + kind).encode() + file)
    await writer.drain()
    return writer


async def test_an_upload_that_is_cut_leaves_nothing(server: Server) -> None:
    for _ in range(5):
        writer = await begin_upload(server)
        await eventually(lambda: open_recordings(server), what="a recording on its way in")
        writer.close()
        await nothing_left(server)


async def test_only_so_many_recordings_are_received_at_once(server: Server) -> None:
    writers = [await begin_upload(server) for _ in range(8)]
    await eventually(lambda: len(open_recordings(server)) >= 6 * 2, what="recordings on their way in")
    data = form(TWO, {})
    async with server.session.post(server.url + TRANSCRIPTIONS, data=data, headers=server.headers) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (429, "queue_full")
        assert int(response.headers["retry-after"]) > 0
    for writer in writers:
        writer.close()
    await nothing_left(server)
    assert (await heard(server))["text"]


async def test_cancels_at_any_moment_leave_nothing(server: Server, prove: bool) -> None:
    """Claim 3.4: uploading, fetching, decoding, in line, computing; nothing is left within two seconds."""
    chance = random.Random(5)
    content = wav(55, *range(300, 12_000, 50))
    outcomes = Counter[str]()
    async with receiving("127.0.0.2") as host:
        host.then = Answer(200, body=content, stalls=True)
        url = f"{host.url}/a.wav"
        for number in range(200 if prove else 50):
            fields: dict[str, Any] = {"prompt": "[[fake token_ms=20]]", "stream": number % 2 == 0}
            fields |= {"response_format": "diarized_json"} if number % 3 == 0 else {}
            asking = asyncio.create_task(
                as_json(server, {"url": url, "prompt": ENDLESS}) if number % 5 == 0 else send(server, TRANSCRIPTIONS, content, **fields)
            )  # fmt: skip
            done, _ = await asyncio.wait({asking}, timeout=chance.uniform(0, 0.6))
            outcomes["done" if done else "cancelled"] += 1
            asking.cancel()
            if number % 10 == 9:
                await nothing_left(server)
    print(f"{dict(outcomes)}")
    assert outcomes["cancelled"] > 25
    assert "fake: event=cancelled" in server.log, "some were let in"
    await nothing_left(server)
    assert (await heard(server))["text"]


async def test_many_at_once_are_bounded_and_those_accepted_finish(narrow: Server) -> None:
    """Claim 3.6: twenty uploads at once on two places."""
    content = wav(50, *range(300, 12_000, 100))
    expected = (await heard(narrow, content=content))["text"]
    asking = [send(narrow, TRANSCRIPTIONS, content, prompt="[[fake token_ms=20]]") for _ in range(20)]
    answers = await asyncio.gather(*asking)
    statuses = Counter(status for status, _ in answers)
    print(f"20 uploads on 2 places: {dict(statuses)}")
    assert set(statuses) == {200, 429}
    assert statuses[200] >= 6
    for status, text in answers:
        found = json.loads(text)
        assert found["text"] == expected if status == 200 else found["error"]["code"] == "queue_full"
    await nothing_left(narrow)


async def test_a_recording_that_was_let_in_waits_for_its_further_stretches(narrow: Server) -> None:
    """Others take every place that it gives back in between; it is not turned away half-way."""
    content = wav(270, *range(300, 12_000, 100))
    hearing = await started(narrow, content, prompt="[[fake token_ms=10]]")
    others = [asyncio.create_task(_hammer(narrow, hearing)) for _ in range(9)]
    status, text = await hearing
    served, refused = (sum(each) for each in zip(*await asyncio.gather(*others), strict=True))
    print(f"beside one recording of 9 stretches: {served} served, {refused} turned away")
    assert status == 200, text
    assert len(json.loads(text)["text"].split()) == 4 * 135
    assert served > 9
    assert refused > served


async def _hammer(server: Server, until: "asyncio.Task[Any]") -> tuple[int, int]:
    """Ask for something short, over and over; how often it was answered and how often turned away."""
    counts = Counter[int]()
    while not until.done():
        async with await server.chat("[[fake tokens=2 token_ms=5]]") as response:
            await response.read()
            counts[response.status] += 1
    return counts[200], counts[429]


async def test_another_model_stands_in(server: Server) -> None:
    url, data = server.url + TRANSCRIPTIONS, form(TWO, {"model": "broken", "stream": True})
    async with server.session.post(url, data=data, headers=server.headers) as response:
        assert response.status == 200
        assert response.headers["x-served-by"] == "fake"
        assert "transcript.text.done" in await response.text()


async def test_a_file_that_is_too_large_or_too_long(narrow: Server) -> None:
    assert await refusal(narrow, TRANSCRIPTIONS, wav(281)) == (413, "media_too_large", "file")
    assert await refusal(narrow, TRANSCRIPTIONS, wav(282)) == (413, "media_too_large", "file")
    await nothing_left(narrow)


async def test_the_rate_of_a_key_counts_the_length_of_what_is_heard(server: Server) -> None:
    key = await server.create_key("rated", "member", "--tokens-per-minute", "60")
    headers = {"Authorization": f"Bearer {key}"}
    url = server.url + TRANSCRIPTIONS
    async with server.session.post(url, data=form(TWO, {}), headers=headers) as response:
        assert response.status == 200
    async with server.session.post(url, data=form(TWO, {}), headers=headers) as response:
        assert response.status == 429
        assert (await response.json())["error"]["code"] == "rate_limit_exceeded"
        assert int(response.headers["x-ratelimit-remaining-tokens"]) == 0


async def test_a_further_model_that_is_away_is_told_before_the_work() -> None:
    config = CONFIG + '[models.voices]\nengine = "fake"\noptions.fail_start = "exit"\n'
    async with serving(config, environment=LOG) as server:
        await eventually(  # its first start has failed
            partial(_is_away, server, "voices"), within_seconds=30, what="the refusal for want of a model"
        )
        status, text = await send(
            server, TRANSCRIPTIONS, TWO, response_format="diarized_json", diarization_model="voices", stream="true"
        )
        assert (status, json.loads(text)["error"]["code"]) == (503, "engine_unavailable")  # and no stream has begun


async def _is_away(server: Server, model: str) -> bool:
    status, _ = await send(server, DIARIZATIONS, TWO, model=model)
    return status == 503


async def test_one_project_leaves_places_to_the_others() -> None:
    async with serving(CONFIG, environment=LOG) as server:
        other = await server.create_key("other")
        slow = [
            asyncio.create_task(send(server, TRANSCRIPTIONS, TWO, prompt="[[fake token_ms=1000]]")) for _ in range(8)
        ]
        done, _ = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
        assert {status for status, _ in (task.result() for task in done)} == {429}
        headers = {"Authorization": f"Bearer {other}"}
        async with server.session.post(server.url + TRANSCRIPTIONS, data=form(TWO, {}), headers=headers) as answer:
            assert answer.status == 200, await answer.text()
        statuses = Counter(status for status, _ in await asyncio.gather(*slow))
        assert statuses == {200: 6, 429: 2}


async def test_a_request_that_becomes_a_job_counts_once() -> None:
    async with serving(CONFIG, environment=LOG) as server:
        key = await server.create_key("rated", "member", "--requests-per-minute", "1")
        headers = {"Authorization": f"Bearer {key}"}
        async with server.session.post(server.url + TRANSCRIPTIONS, data=form(wav(70), {}), headers=headers) as answer:
            assert answer.status == 202, await answer.text()

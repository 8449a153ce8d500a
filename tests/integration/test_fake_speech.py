"""The fake engine speaks the protocols of the speech engines: what they answer, how it streams, and how it goes wrong."""

import base64
import contextlib
import json
import math
import struct
from array import array
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.engines import Engine, Stream, alive, eventually

RATE = 16_000
TRANSCRIPTIONS = "/v1/audio/transcriptions"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine("fake", {"name": "fake", "slots": 2, "capabilities": ["transcription", "alignment", "diarization"]})
    engine.wait_until_ready()
    yield engine
    engine.end()


def tone(seconds: float, height: int = 8_000, pitch: int = 300) -> bytes:
    steps = range(round(seconds * RATE))
    return array("h", [round(height * math.sin(step * pitch / RATE)) for step in steps]).tobytes()


def silence(seconds: float) -> bytes:
    return bytes(2 * round(seconds * RATE))


def ask(engine: Engine, path: str, header: Any, data: bytes) -> list[Any]:
    with contextlib.closing(Stream(engine.address, path, header, data)) as stream:
        stream.read_until(b"0\r\n\r\n")
        assert b"application/x-ndjson" in stream.received
        return [json.loads(line) for line in stream.received.split(b"\n") if line.startswith(b"{")]


def transcribe(engine: Engine, data: bytes, prompt: str = "", **header: Any) -> list[Any]:
    return ask(engine, TRANSCRIPTIONS, {"last": True, "options": {"initial_prompt": prompt}, **header}, data)


def test_words_are_those_of_the_samples_and_silence_has_none(engine: Engine) -> None:
    heard = tone(2) + silence(4) + tone(3, pitch=500)
    language, *segments, done = transcribe(engine, heard, words=True)
    assert language == {"type": "language", "language": "en", "probability": 0.98}
    assert [(each["start"], each["end"]) for each in segments] == [(0, 2), (6, 8), (8, 9)]
    assert done == {"type": "done", "consumed": 9 * RATE, "speech": [[0, 2], [6, 9]]}
    for each in segments:
        assert each["text"] == "".join(word["text"] for word in each["words"])
        assert [each["start"], each["end"]] == [each["words"][0]["start"], each["words"][-1]["end"]]
    assert len({each["text"] for each in segments}) == 3
    assert transcribe(engine, heard, words=True)[1:-1] == segments
    assert transcribe(engine, silence(5))[1:] == [{"type": "done", "consumed": 5 * RATE, "speech": []}]


def test_the_text_is_the_same_in_whatever_stretches_it_is_asked_for(engine: Engine) -> None:
    heard = tone(2) + tone(2, pitch=411) + tone(2, pitch=555) + tone(1, pitch=666)
    whole = [each["text"] for each in transcribe(engine, heard)[1:-1]]
    texts, rest = list[str](), heard
    while rest:
        part = rest[: 2 * 5 * RATE]
        _, *segments, done = transcribe(engine, part, last=len(part) == len(rest))
        texts += [each["text"] for each in segments]
        rest = rest[2 * done["consumed"] :]
    assert texts == whole
    assert len(whole) == 4


def test_the_prompt_directs_it(engine: Engine) -> None:
    echoed = transcribe(engine, tone(4), "to be or [[fake echo=1]]")[1:-1]
    assert [each["text"] for each in echoed] == [" to be or to", " be or to be"]
    translated = transcribe(engine, tone(2), task="translate", language="de")
    assert translated[0]["language"] == "de"
    assert translated[1]["text"] == transcribe(engine, tone(2))[1]["text"].upper()
    with contextlib.closing(_open(engine, "[[fake status=418]]")) as stream:
        assert b" 418 " in stream.read_until(b"}")


def _open(engine: Engine, prompt: str, seconds: float = 6) -> Stream:
    return Stream(engine.address, TRANSCRIPTIONS, {"last": True, "options": {"initial_prompt": prompt}}, tone(seconds))


def test_segments_come_as_they_are_made_and_a_half_closed_connection_stops_it(engine: Engine) -> None:
    before = engine.get("/fake/stats")[1]["cancelled"]
    with contextlib.closing(_open(engine, "[[fake hang_at=2]]")) as stream:
        assert stream.read_until(b'"end": 4.0').count(b'"segment"') == 2
        assert engine.busy() == 1
        stream.half_close()
        assert b'"done"' not in stream.read_to_end()
    eventually(lambda: engine.busy() == 0, 5)
    assert engine.get("/fake/stats")[1]["cancelled"] == before + 1


def test_two_work_at_once_and_a_third_waits(engine: Engine) -> None:
    with contextlib.ExitStack() as stack:
        first, _ = (stack.enter_context(contextlib.closing(_open(engine, "[[fake hang_at=1]]"))) for _ in range(2))
        eventually(lambda: engine.busy() == 2, 10)
        third = stack.enter_context(contextlib.closing(_open(engine, "")))
        assert engine.get("/fake/stats")[1]["running"] == 2
        assert third.read_what_is_there() == b""
        first.half_close()
        third.read_until(b'"done"')


@pytest.mark.parametrize("how", ["crash_at=1", "oom_at=1"])
def test_it_dies_before_a_segment(how: str) -> None:
    engine = Engine("fake", {"name": "fake", "capabilities": ["transcription"]})
    try:
        engine.wait_until_ready()
        pid = engine.pid
        with contextlib.closing(_open(engine, f"[[fake {how}]]")) as stream:
            received = stream.read_to_end()
        assert received.count(b'"segment"') == 1
        assert b'"done"' not in received
        eventually(lambda: not alive(pid), 5)
    finally:
        engine.end()


def test_each_word_to_align_gets_its_share(engine: Engine) -> None:
    wanted = [{"start": 1.0, "end": 2.0, "text": " two words"}, {"start": 3, "end": 4, "text": ""}]
    first, second, done = ask(engine, "/v1/audio/alignments", {"segments": wanted, "characters": True}, tone(5))
    assert [(word["text"], word["start"], word["end"]) for word in first["words"]] == [
        (" two", 1.0, 1.5),
        (" words", 1.5, 2.0),
    ]
    assert [each["text"] for each in first["words"][0]["characters"]] == ["t", "w", "o"]
    assert (second["words"], done) == ([], {"type": "done"})


def voices(engine: Engine, data: bytes, **header: Any) -> tuple[Any, Any]:
    heard, done = ask(engine, "/v1/audio/voices", {"last": True, **header}, data)
    assert len(base64.b64decode(heard["vectors"])) == 2 * heard["dimensions"] * len(heard["windows"])
    return heard, done


def told_apart(engine: Engine, heard: Any, **header: Any) -> Any:
    named = {"regions": heard["regions"], "windows": heard["windows"], "dimensions": heard["dimensions"], **header}
    turns, done = ask(engine, "/v1/audio/speakers", named, base64.b64decode(heard["vectors"]))
    assert done == {"type": "done"}
    return turns


def test_loud_and_quiet_are_two_speakers(engine: Engine) -> None:
    heard, done = voices(engine, tone(4, 1_000) + silence(4) + tone(4, 20_000) + tone(4, 1_000))
    assert heard["regions"] == [[0, 4], [8, 16]]
    assert done["consumed"] == 16 * RATE
    found = told_apart(engine, heard)
    assert [turn["speaker"] for turn in found["turns"]] == ["A", "B", "A"]
    assert found["speakers"] == ["A", "B"]
    assert all(one["end"] <= two["start"] for one, two in zip(found["turns"], found["turns"][1:], strict=False))
    assert {turn["speaker"] for turn in told_apart(engine, heard, speakers=1)["turns"]} == {"A"}
    clip, _ = voices(engine, tone(2, 20_000))
    known = [{"name": "Loud", "vectors": clip["vectors"]}]
    assert told_apart(engine, heard, known=known)["speakers"] == ["A", "Loud"]


@pytest.mark.parametrize(
    ("path", "header", "data"),
    [
        (TRANSCRIPTIONS, {"last": True}, b""),
        (TRANSCRIPTIONS, {"last": True}, b"\0\0\0"),
        (TRANSCRIPTIONS, [], b"\0\0"),
        ("/v1/audio/alignments", {}, b"\0\0"),
        ("/v1/audio/speakers", {"windows": [[0, 1]], "dimensions": 2}, struct.pack("<e", 1)),
        ("/v1/audio/speakers", {"windows": []}, b""),
    ],
)
def test_what_makes_no_sense_is_refused(engine: Engine, path: str, header: Any, data: bytes) -> None:
    with contextlib.closing(Stream(engine.address, path, header, data)) as stream:
        assert stream.read_until(b"}").startswith(b"HTTP/1.1 400 ")


def test_what_it_does_not_serve_is_not_there() -> None:
    engine = Engine("fake", {"name": "fake", "capabilities": ["diarization"]})
    try:
        engine.wait_until_ready()
        assert engine.ask("POST", TRANSCRIPTIONS, {})[0] == 404
    finally:
        engine.end()

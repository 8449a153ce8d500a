"""Mutated requests about recordings, as forms and as JSON: the server neither dies nor grows, and no fault is ours."""

import json
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from tests.faults.test_fuzz import CONTENT_TYPES, ODD_HEADERS, check_refusal, fuzzed
from tests.support.mutate import EVIL, spoiled
from tests.support.recordings import LOUD, QUIET, SILENT, data_url, form_of, wav
from tests.support.server import FAKE, Server, serving

CONFIG = (
    FAKE + "[http]\nbody_bytes_max = 250000\n[audio]\ndiarization_model = 'fake'\nbytes_max = 200000\nseconds_max = 4\n"
)
SOUNDS = (wav(0.5), wav(2.5, LOUD, QUIET), wav(1, SILENT), wav(5))
PATHS = tuple(f"/v1/audio/{name}" for name in ("transcriptions", "translations", "alignments", "diarizations"))
TEXTS = ("a", "two words", "ünïcödé \U0001f600", "\u0000", "<v A> & -->", "[[fake tokens=1]]", "1\n00:00 --> x")
BOUNDARY = "b0undary"


def valid(chance: random.Random, path: str) -> dict[str, Any]:
    """A body for one of the routes, without its recording."""
    options: dict[str, Any] = {
        "language": chance.choice(("en", "German")), "prompt": chance.choice(TEXTS), "temperature": 0.4, "beam_size": 2,
        "keywords": [chance.choice(TEXTS)], "suppress_tokens": [-1, 5], "vad_onset": 0.6, "chunking_strategy": "auto",
        "diarize": True, "suppress_numerals": True, "no_speech_threshold": 0.4,
        "response_format": chance.choice(("json", "text", "srt", "vtt", "verbose_json")),
    }  # fmt: skip
    speakers = {
        "speakers_min": 1, "max_speakers": 3, "known_speaker_names": ["Ann"],
        "known_speaker_references": [data_url(SOUNDS[0])],
    }  # fmt: skip
    if path.endswith("transcriptions"):
        options |= {"stream": chance.random() < 0.3, "timestamp_granularities": ["word"], "include": ["logprobs"]}
    elif path.endswith("alignments"):
        pieces = [{"start": place, "end": place + 1, "text": text} for place, text in enumerate(TEXTS[:3])]
        options = {"interpolate": "linear", "character_alignments": True}
        fixed = chance.choice(({"transcript": chance.choice(TEXTS)}, {"segments": pieces}))
        return {"model": "fake", **fixed, **_some(chance, options)}
    elif path.endswith("diarizations"):
        options = {"response_format": chance.choice(("json", "verbose_json", "rttm"))}
    return {"model": "fake", **_some(chance, options), **(speakers if chance.random() < 0.1 else {})}


def _some(chance: random.Random, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if chance.random() < 0.2}


def sound(chance: random.Random) -> bytes:
    """A recording, or what was one."""
    content = chance.choice(SOUNDS)
    match chance.randrange(6):
        case 0:
            return content[: chance.randrange(len(content))]
        case 1:
            place = chance.randrange(len(content))
            return content[:place] + chance.randbytes(20) + content[place + 20 :]
        case 2:
            return chance.randbytes(chance.randrange(300))
        case _:
            return content


def as_form(chance: random.Random, body: dict[str, Any]) -> bytes:
    """`body` and a recording as a form, often with something wrong."""
    fields = form_of(body)
    for _ in range(chance.randrange(3)):
        value = chance.choice(EVIL)
        text = value if isinstance(value, str) else json.dumps(value)
        fields.insert(0, (chance.choice([name for name, _ in fields] + ["user", "keywords[]", "x" * 99]), text))
    parts = [(f'form-data; name="{name}"', text.encode("utf-8", "replace")) for name, text in fields]
    parts.insert(chance.randrange(len(parts) + 1), ('form-data; name="file"; filename="a.wav"', sound(chance)))
    data = b"".join(
        b"--%b\r\nContent-Disposition: %b\r\n\r\n%b\r\n" % (BOUNDARY.encode(), head.encode(), value)
        for head, value in parts
    )
    data += b"--%b--\r\n" % BOUNDARY.encode()
    if chance.random() < 0.1:
        place = chance.randrange(len(data))
        return data[:place] + chance.randbytes(4) + data[place + chance.randrange(40) :]
    return data


async def send(server: Server, path: str, data: bytes, kind: str, chance: random.Random) -> str:
    """POST `data` on a connection of its own, which no timeout of an idle one can cut; the outcome."""
    headers = {**server.headers, "Content-Type": kind, "Connection": "close", **chance.choice(ODD_HEADERS)}
    async with server.session.post(server.url + path, data=data, headers=headers) as response:
        text = (await response.read()).decode()
        if response.status == 200 and "event-stream" in response.headers["content-type"]:
            return "streamed" if '"error"' not in text else check_refusal(400, text.strip().split("data: ")[-1])
        return "ok" if response.status == 200 else check_refusal(response.status, text)


@pytest.mark.timeout(900)
async def test_mutated_requests(prove: bool) -> None:
    count = 20_000 if prove else 1_000
    chance = random.Random(20263)
    async with serving(CONFIG) as server:

        def make() -> Callable[[], Awaitable[str]]:
            path = chance.choice(PATHS)
            body = valid(chance, path)
            if chance.random() < 0.7:
                data, kind = as_form(chance, body), f"multipart/form-data; boundary={BOUNDARY}"
            else:
                data = spoiled(chance, {**body, "url": data_url(sound(chance))})
                kind = chance.choice(CONTENT_TYPES)
            return partial(send, server, path, data, kind, chance)

        outcomes = await fuzzed(server, count, make)
        assert {"ok", "streamed", "media_invalid", "media_too_large", "invalid_value", "invalid_multipart"} <= set(
            outcomes
        )
        assert await server.load() == (0, 0)

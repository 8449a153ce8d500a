"""Mutated requests about recordings, as forms and as JSON: the server neither dies nor grows, and no fault is ours."""

import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from tests.faults.test_fuzz import CONTENT_TYPES, fuzzed, send_apart
from tests.support.mutate import BOUNDARY, damaged, spoiled, spoiled_form
from tests.support.recordings import LOUD, QUIET, SILENT, data_url, form_of, wav
from tests.support.server import FAKE, serving

CONFIG = (
    FAKE + "[http]\nbody_bytes_max = 250000\n[audio]\ndiarization_model = 'fake'\nbytes_max = 200000\nseconds_max = 4\n"
)
SOUNDS = (wav(0.5), wav(2.5, LOUD, QUIET), wav(1, SILENT), wav(5))
PATHS = tuple(f"/v1/audio/{name}" for name in ("transcriptions", "translations", "alignments", "diarizations"))
TEXTS = ("a", "two words", "ünïcödé \U0001f600", "\u0000", "<v A> & -->", "[[fake tokens=1]]", "1\n00:00 --> x")


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
    return damaged(chance, chance.choice(SOUNDS))


@pytest.mark.timeout(900)
async def test_mutated_requests(prove: bool) -> None:
    count = 20_000 if prove else 1_000
    chance = random.Random(20263)
    async with serving(CONFIG) as server:

        def make() -> Callable[[], Awaitable[str]]:
            path = chance.choice(PATHS)
            body = valid(chance, path)
            if chance.random() < 0.7:
                data, kind = (
                    spoiled_form(chance, form_of(body), [("file", sound(chance))]),
                    f"multipart/form-data; boundary={BOUNDARY}",
                )
            else:
                data = spoiled(chance, {**body, "url": data_url(sound(chance))})
                kind = chance.choice(CONTENT_TYPES)
            return partial(send_apart, server, path, data, kind, chance)

        outcomes = await fuzzed(server, count, make)
        assert {"ok", "streamed", "media_invalid", "media_too_large", "invalid_value", "invalid_multipart"} <= set(
            outcomes
        )
        assert await server.load() == (0, 0)

import json
from typing import Any

import pytest

from forebay.engines.connection import Refused
from forebay.engines.whisper_options import SECONDS_MAX, Model, Options, Request, read

ENGLISH = Model(multilingual=False, languages=("en",), tokens=50_000)
MANY = Model(multilingual=True, languages=("en", "de"), tokens=50_000)


def _read(model: Model = MANY, samples: bytes = b"", **header: Any) -> Request:
    return read(json.dumps(header).encode() + b"\n" + samples, model)


def test_what_is_left_out_is_as_usual() -> None:
    request = _read(samples=b"\1\0\2\0", options={"beam_size": None, "no_speech_threshold": None})
    assert (request.task, request.language, request.words, request.last) == ("transcribe", None, False, False)
    assert request.options == Options(no_speech_threshold=None)
    assert bytes(request.samples) == b"\1\0\2\0"


def test_the_prompt_is_for_the_first_chunk_alone() -> None:
    request = _read(options={"initial_prompt": "so", "hotwords": "it"})
    assert [request.decoding(first=first)["initial_prompt"] for first in (True, False)] == ["so", None]
    assert request.decoding(first=False)["hotwords"] == "it"
    json.dumps(request.decoding(first=True))


@pytest.mark.parametrize(
    ("model", "header", "language"),
    [
        (ENGLISH, {}, "en"),
        (ENGLISH, {"language": "en"}, "en"),
        (MANY, {}, None),
        (MANY, {"language": "de"}, "de"),
        (MANY, {"options": {"language": "de"}}, "de"),
        (MANY, {"task": "translate", "language": "de"}, "de"),
    ],
)
def test_the_language_is_given_or_found_out(model: Model, header: dict[str, Any], language: str | None) -> None:
    assert _read(model, **header).language == language


@pytest.mark.parametrize(
    ("model", "header", "param"),
    [
        (ENGLISH, {"language": "de"}, "language"),
        (ENGLISH, {"task": "translate"}, "model"),
        (MANY, {"language": "xx"}, "language"),
        (MANY, {"options": {"suppress_tokens": [50_000]}}, "suppress_tokens"),
        (MANY, {"options": {"suppress_tokens": [-2]}}, "suppress_tokens"),
        (MANY, {"options": {"suppress_tokens": list(range(1025))}}, "suppress_tokens"),
        (MANY, {"options": {"vad_pad_ms": 0.5}}, "vad_pad_ms"),
        (MANY, {"options": {"patience": True}}, "patience"),
        (MANY, {"options": {"patience": float("inf")}}, "patience"),
        (MANY, {"options": {"vad": 1}}, "vad"),
        (MANY, {"options": {"strange" * 20: 1}}, ("strange" * 20)[:64]),
    ],
)
def test_what_is_out_of_bounds_is_named(model: Model, header: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as refused:
        _read(model, **header)
    assert (refused.value.status, json.loads(refused.value.body)["error"]["param"]) == (400, param)


def test_sound_has_whole_samples_and_a_limit() -> None:
    with pytest.raises(Refused, match="whole"):
        _read(samples=b"\0")
    most = bytes(SECONDS_MAX * 32_000)
    assert len(_read(samples=most).samples) == len(most)
    with pytest.raises(Refused, match="600 seconds"):
        _read(samples=most + b"\0\0")


@pytest.mark.parametrize(
    "body", [b"", b"\n", b"no\n", b"[" * 100_000 + b"\n", b'"a"\n', b'{"options":[]}\n', b"x" * 10**6]
)
def test_a_body_without_a_line_of_json_is_refused(body: bytes) -> None:
    with pytest.raises(Refused) as refused:
        read(body, MANY)
    assert refused.value.status == 400


def test_padding_never_fills_a_chunk() -> None:
    assert Options(chunk_seconds=2, vad_pad_ms=5000).regions().pad_ms == 500
    assert Options().regions().max_speech_seconds == 30

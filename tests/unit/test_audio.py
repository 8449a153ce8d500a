"""Bodies about recordings: what each option becomes, what does not go together, and forms that say the same as JSON."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.dialects.languages import LANGUAGES, code_of, name_of
from forebay.dialects.openai import audio
from forebay.dialects.openai.audio_events import SpeechShape
from forebay.dialects.openai.audio_formats import Look
from forebay.dialects.openai.audio_forms import AUDIO_FORM
from forebay.dialects.openai.call import Call, Context, Wire, parse
from forebay.dialects.speech import Align, AudioRef, Diarize, SpeechTask
from forebay.errors import ForebayError, InvalidRequest
from forebay.inference import Capability
from forebay.replicas.calls import ENDPOINTS
from forebay.speech import Segment
from tests.support.recordings import form_of

PATHS = (audio.TRANSCRIPTIONS, audio.TRANSLATIONS, audio.ALIGNMENTS, audio.DIARIZATIONS)
CLIP = "data:audio/wav;base64,AAAA"
BEAMS = {"beam_size": 3, "best_of": 2, "patience": 1.5, "length_penalty": 0.5, "repetition_penalty": 1.1}
SILENCE = {
    "vad": True,
    "vad_onset": 0.6,
    "vad_offset": 0.3,
    "vad_min_speech_ms": 1,
    "vad_min_silence_ms": 2,
    "vad_pad_ms": 3,
}
DOUBT = {"compression_ratio_threshold": 2.0, "log_prob_threshold": -2.0, "no_speech_threshold": 0.5}
TEXT = {"no_repeat_ngram_size": 3, "suppress_tokens": [-1, 7], "suppress_numerals": True, "chunk_seconds": 20}
FULL: Mapping[str, dict[str, Any]] = {
    audio.TRANSCRIPTIONS: {
        "model": "m", "file_id": "file-1", "background": True, "webhook_url": "https://example.com/hook",
        "languages": ["en", "de"], "prompt": "Hi 5", "temperature": 0.4, "keywords": ["true", "7"],
        "response_format": "verbose_json", "timestamp_granularities": ["word", "segment"], "align_model": "a",
        "chunking_strategy": {"type": "server_vad", "threshold": 0.4}, "interpolate": "linear",
        "character_alignments": False, "diarize": True, "diarization_model": "d", "num_speakers": 2, "min_speakers": 1,
        "max_speakers": 3, "known_speaker_names": ["1", "true"], "known_speaker_references": [CLIP, CLIP], "stream": False,
        **BEAMS, **DOUBT, **TEXT,
    },
    audio.TRANSLATIONS: {
        "model": "m", "url": "https://example.com/a", "background": False, "initial_prompt": "1", "hotwords": "2",
        "temperatures": [0, 0.5], "response_format": "srt", "diarize": True, "speakers": 2, "language": "de",
        **BEAMS, **SILENCE, **DOUBT, **TEXT,
    },
    audio.ALIGNMENTS: {
        "model": "m", "file_id": "file-1", "segments": [{"start": 0, "end": 1.5, "text": "Hello"}], "language": "en",
        "interpolate": "ignore", "character_alignments": True, "response_format": "json",
    },
    audio.DIARIZATIONS: {
        "model": "m", "file_id": "file-1", "speakers_min": 1, "speakers_max": 3, "response_format": "rttm",
        "known_speaker_names": ["Ann"], "known_speaker_references": [CLIP],
    },
}  # fmt: skip
NEAR = (
    "0",
    "1",
    "-1",
    "5",
    "0.5",
    "1e3",
    "nan",
    "inf",
    "true",
    "False",
    "word",
    "auto",
    "[",
    "{}",
    "x" * 300,
    "\x00",
    "²",
)


def context(*, with_recording: bool = False) -> Context:
    return Context("req_1", "p", None, 1024, 4, with_recording=with_recording, diarization_model="speakers")


def made(path: str = audio.TRANSCRIPTIONS, *, with_recording: bool = True, **fields: Any) -> Call:
    endpoint = ENDPOINTS[path]
    raw = json.dumps({"model": "m", **fields}).encode()
    call: Call = endpoint.build(parse(endpoint.body, raw), context(with_recording=with_recording))
    return call


def task(path: str = audio.TRANSCRIPTIONS, **fields: Any) -> SpeechTask:
    speech = made(path, **fields).speech
    assert speech is not None
    return speech


def refused(path: str = audio.TRANSCRIPTIONS, **fields: Any) -> str:
    with pytest.raises(InvalidRequest) as error:
        made(path, **fields)
    assert error.value.code in {"invalid_value", "missing_required_parameter"} or "Unrecognized" in str(error.value)
    return str(error.value.param)


@pytest.mark.parametrize(
    ("path", "capability", "fields"),
    [
        (audio.TRANSCRIPTIONS, Capability.TRANSCRIPTION, {}),
        (audio.TRANSLATIONS, Capability.TRANSLATION, {}),
        (audio.ALIGNMENTS, Capability.ALIGNMENT, {"transcript": "Hi"}),
        (audio.DIARIZATIONS, Capability.DIARIZATION, {}),
    ],
)
def test_the_least_body(path: str, capability: Capability, fields: dict[str, Any]) -> None:
    call = made(path, **fields)
    assert (call.request.path, call.request.capability, call.request.body) == (path, capability, b"")
    assert (call.kind, call.stream) == ("speech", False)
    assert call.speech is not None
    assert call.speech.source is None
    assert call.speech.options == {}
    assert isinstance(call.shape, SpeechShape)
    assert call.shape.form == "json"


@pytest.mark.parametrize("path", PATHS)
def test_every_field_of_a_full_body_is_taken(path: str) -> None:
    fields = FULL[path]
    call = made(path, with_recording=False, **{key: fields[key] for key in fields if key != "model"})
    assert call.speech is not None
    assert call.speech.source == AudioRef(fields.get("file_id"), fields.get("url"))


def test_the_full_bodies_name_every_field() -> None:
    for path in PATHS:
        body = ENDPOINTS[path].body.model_fields
        own = set(FULL[path])
        others = set().union(*(FULL[other] for other in PATHS))
        alone = {"transcript", "include"}  # beside which something else cannot be
        assert own <= set(body)
        assert set(body) <= others | alone


def test_options_of_whisper_go_on_by_their_names() -> None:
    given: dict[str, Any] = {
        **BEAMS,
        **SILENCE,
        **DOUBT,
        **TEXT,
        "initial_prompt": "a",
        "hotwords": "b",
        "temperatures": [0.0, 1.0],
    }
    assert json.loads(json.dumps(task(**given).options)) == given


def test_openais_names_are_those_of_whisper() -> None:
    options = task(prompt="a", keywords=["x", "y"], temperature=0.3, language="German").options
    assert options == {
        "initial_prompt": "a", "hotwords": "x, y", "temperatures": (0.3, 0.5, 0.7, 0.9), "language": "de",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("temperature", "ladder"), [(0, (0, 0.2, 0.4, 0.6, 0.8, 1.0)), (1, (1.0,)), (0.6, (0.6, 0.8, 1.0)), (0.9, (0.9,))]
)
def test_a_temperature_begins_a_ladder(temperature: float, ladder: tuple[float, ...]) -> None:
    assert task(temperature=temperature).options["temperatures"] == pytest.approx(ladder)


def test_chunking_strategies() -> None:
    assert task(chunking_strategy="auto").options == {"vad": True}
    strategy = {"type": "server_vad", "threshold": 0.3, "prefix_padding_ms": 7, "silence_duration_ms": 9}
    assert task(chunking_strategy=strategy).options == {
        "vad": True, "vad_onset": 0.3, "vad_offset": 0.163, "vad_pad_ms": 7, "vad_min_silence_ms": 9,
    }  # fmt: skip
    assert refused(chunking_strategy="auto", vad=False) == "vad"
    assert refused(chunking_strategy=strategy, vad_onset=0.4) == "vad_onset"
    assert refused(chunking_strategy={"type": "server_vad", "threshold": 2}) == "chunking_strategy.threshold"
    assert refused(chunking_strategy="never") == "chunking_strategy"
    assert refused(vad_onset=0.2, vad_offset=0.3) == "vad_offset"
    assert refused(vad_offset=0.6) == "vad_offset"
    assert task(vad_onset=0.05).options["vad_offset"] == 0.01


def test_one_of_several_languages_is_that_of_the_recording() -> None:
    assert task(languages=["en"]).options == {"language": "en"}
    assert task(languages=["en", "de"]).options == {}
    assert refused(languages=["en"], language="en") == "languages"
    assert refused(language="xx") == "language"
    assert refused(language="en-US") == "language"
    assert refused(languages=["en", "klingon"]) == "languages[1]"


@pytest.mark.parametrize(
    ("fields", "words", "look"),
    [
        ({}, False, Look()),
        ({"response_format": "verbose_json"}, False, Look()),
        ({"response_format": "vtt"}, True, Look()),
        ({"timestamp_granularities": ["word"]}, True, Look(words=True, segments=False)),
        ({"timestamp_granularities": ["word", "segment"]}, True, Look(words=True)),
        ({"timestamp_granularities": ["segment"]}, False, Look()),
        ({"response_format": "json", "include": ["logprobs"]}, True, Look(logprobs=True)),
        ({"response_format": "verbose_json", "align_model": "a"}, True, Look(words=True)),
    ],
)
def test_times_of_words(fields: dict[str, Any], words: bool, look: Look) -> None:
    if "timestamp_granularities" in fields:
        fields = {**fields, "response_format": "verbose_json"}
    call = made(**fields)
    assert call.speech is not None
    assert call.speech.words is words
    assert isinstance(call.shape, SpeechShape)
    assert call.shape.look == look


def test_speakers() -> None:
    assert task(response_format="diarized_json").diarize == Diarize("speakers")
    named: dict[str, Any] = {"known_speaker_names": ["Ann"], "known_speaker_references": [CLIP]}
    found = task(diarize=True, num_speakers=3, min_speakers=2, max_speakers=4, diarization_model="d", **named)
    assert found.diarize == Diarize("d", 3, 2, 4, ("Ann",), (CLIP,))
    assert found.words
    assert task(audio.DIARIZATIONS, speakers=2).diarize == Diarize("m", 2)
    assert task(audio.TRANSLATIONS, diarize=True).diarize == Diarize("speakers")


@pytest.mark.parametrize(
    "fields",
    [
        {"speakers": 2}, {"min_speakers": 2}, {"speakers_max": 2}, {"diarization_model": "d"},
        {"known_speaker_names": ["A"], "known_speaker_references": [CLIP]},
    ],
)  # fmt: skip
def test_speakers_need_to_be_told_apart(fields: dict[str, Any]) -> None:
    assert refused(**fields) in fields
    assert refused(audio.TRANSLATIONS, **fields) in fields


def test_speakers_that_make_no_sense() -> None:
    told: dict[str, Any] = {"diarize": True}
    assert refused(**told, speakers_min=3, speakers_max=2) == "speakers_min"
    assert refused(**told, speakers=5, speakers_max=4) == "speakers"
    assert refused(**told, speakers=2, num_speakers=2) == "num_speakers"
    assert refused(**told, known_speaker_names=["A"]) == "known_speaker_references"
    assert refused(**told, known_speaker_names=["A", "A"], known_speaker_references=[CLIP] * 2) == "known_speaker_names"
    assert refused(**told, known_speaker_names=["A"] * 5) == "known_speaker_names"
    assert refused(**told, known_speaker_names=["a\nb"], known_speaker_references=[CLIP]) == "known_speaker_names[0]"
    assert refused(**told, known_speaker_names=["A"], known_speaker_references=["file:///etc/passwd"]).endswith("[0]")
    assert refused(diarize=False, response_format="diarized_json") == "diarize"


def test_alignments() -> None:
    found = task(audio.ALIGNMENTS, transcript="Hello", language="en", interpolate="linear", character_alignments=True)
    assert found.align == Align("m", "linear", characters=True)
    assert found.transcript == (Segment(0.0, 0.0, "Hello"),)
    assert found.options == {"language": "en"}
    segments = [{"start": 0, "end": 1, "text": "a"}, {"start": 0.5, "end": 2, "text": "b"}]
    assert task(audio.ALIGNMENTS, segments=segments).transcript == (Segment(0, 1, "a"), Segment(0.5, 2, "b"))
    assert refused(audio.ALIGNMENTS) == "transcript"
    assert refused(audio.ALIGNMENTS, transcript="a", segments=segments) == "transcript"
    assert refused(audio.ALIGNMENTS, segments=segments[::-1]) == "segments[1]"
    assert refused(audio.ALIGNMENTS, segments=[{"start": 1, "end": 1, "text": "a"}]) == "segments[0]"
    assert refused(audio.ALIGNMENTS, segments=[{"start": 0, "end": 1, "text": "a" * 65_000}] * 17) == "segments"
    assert task(align_model="a", interpolate="ignore").align == Align("a", "ignore")
    assert refused(interpolate="ignore") == "interpolate"
    assert refused(character_alignments=True) == "character_alignments"
    assert refused(audio.TRANSLATIONS, interpolate="nearest") == "interpolate"


@pytest.mark.parametrize("form", ["srt", "vtt", "verbose_json"])
def test_what_is_written_at_the_end_is_not_streamed(form: str) -> None:
    assert refused(stream=True, response_format=form) == "stream"


@pytest.mark.parametrize("form", ["json", "text", "diarized_json"])
def test_streams(form: str) -> None:
    assert made(stream=True, response_format=form).stream
    assert refused(stream=True, response_format=form, background=True) == "stream"


def test_what_needs_a_format() -> None:
    assert refused(timestamp_granularities=["word"]) == "timestamp_granularities"
    assert refused(timestamp_granularities=["word"], response_format="srt") == "timestamp_granularities"
    assert refused(include=["logprobs"], response_format="verbose_json") == "include"
    assert refused(prompt="a", initial_prompt="a") == "initial_prompt"
    assert refused(keywords=["a"], hotwords="a") == "hotwords"
    assert refused(temperature=0, temperatures=[0]) == "temperatures"
    assert refused(webhook_url="https://example.com") == "webhook_url"


def test_a_recording_is_in_one_place() -> None:
    assert refused(with_recording=False) == "file"
    assert refused(file_id="file-1") == "file_id"
    assert refused(url="https://example.com/a", with_recording=False, file_id="file-1") == "url"
    assert task(with_recording=False, url=CLIP).source == AudioRef(url=CLIP)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beam_size", 17), ("beam_size", True), ("best_of", 0), ("patience", 0), ("temperature", 1.01), ("temperature", "0"),
        ("temperatures", []), ("temperatures", [0] * 12), ("suppress_tokens", [65_536]), ("suppress_tokens", [0] * 1025),
        ("no_speech_threshold", -0.1), ("log_prob_threshold", 1), ("chunk_seconds", 31), ("vad_pad_ms", 10_001),
        ("prompt", "x" * 8193), ("keywords", ["x"] * 101), ("keywords", [""]), ("file_id", "x" * 129), ("model", ""),
        ("response_format", "xml"), ("include", ["tokens"]), ("timestamp_granularities", ["letter"]), ("num_speakers", 65),
        ("diarize", "yes"), ("user", "me"), ("logprobs", True), ("length_penalty", float("nan")),
    ],
)  # fmt: skip
def test_values_have_bounds(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        made(**{field: value})
    assert field in str(error.value.param)


@pytest.mark.parametrize("path", PATHS)
def test_a_form_says_the_same_as_json(path: str) -> None:
    assert json.loads(AUDIO_FORM.json_of(form_of(FULL[path]))) == FULL[path]
    assert {name for name, _ in form_of(FULL[path])} <= AUDIO_FORM.names(ENDPOINTS[path].body)


def test_forms_as_people_write_them() -> None:
    fields = [
        ("diarize", "True"),
        ("stream", "0"),
        ("vad", "1"),
        ("background", "yes"),
        ("temperature", ""),
        ("include", "logprobs"),
        ("keywords", "a"),
    ]
    assert json.loads(AUDIO_FORM.json_of(fields)) == {
        "diarize": True, "stream": False, "vad": True, "background": "yes", "include": ["logprobs"], "keywords": ["a"],
    }  # fmt: skip
    strategy = '{"type": "server_vad", "threshold": 0.5}'
    assert json.loads(AUDIO_FORM.json_of([("chunking_strategy", strategy)]))["chunking_strategy"]["threshold"] == 0.5
    assert json.loads(AUDIO_FORM.json_of([("chunking_strategy", "{")])) == {"chunking_strategy": "{"}
    assert json.loads(AUDIO_FORM.json_of([("beam_size", "9" * 5000), ("patience", "nan")])) == {
        "beam_size": "9" * 5000, "patience": "nan",
    }  # fmt: skip


def test_lists_and_large_fields_are_fields() -> None:
    known = set().union(*(ENDPOINTS[path].body.model_fields for path in PATHS))
    assert known >= AUDIO_FORM.lists
    assert known >= AUDIO_FORM.large
    nested = {"chunking_strategy[type]", "chunking_strategy[threshold]", "chunking_strategy[prefix_padding_ms]"}
    assert nested <= AUDIO_FORM.names(ENDPOINTS[audio.TRANSCRIPTIONS].body)
    assert not nested & AUDIO_FORM.names(ENDPOINTS[audio.DIARIZATIONS].body)


NAMES = sorted(set().union(*(AUDIO_FORM.names(ENDPOINTS[path].body) for path in PATHS)))


@given(
    st.sampled_from(PATHS), st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NEAR) | st.text(max_size=20)))
)
def test_any_form_is_taken_or_refused_by_name(path: str, fields: list[tuple[str, str]]) -> None:
    endpoint = ENDPOINTS[path]
    try:
        body: Wire = parse(endpoint.body, AUDIO_FORM.json_of([("model", "m"), *fields]))
        call = endpoint.build(body, context(with_recording=True))
    except ForebayError as error:
        assert isinstance(error, InvalidRequest)
        assert error.param
        return
    assert call.speech is not None


def test_languages() -> None:
    assert len(LANGUAGES) == 100
    for code, name in LANGUAGES.items():
        assert code_of(code) == code_of(name) == code_of(name.upper()) == code
        assert name_of(code) == name
    assert code_of("") is None
    assert (code_of("jv"), code_of("Mandarin")) == ("jw", "zh")

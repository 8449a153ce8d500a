"""Transcripts in every format: subtitles that parse back, JSON as the official client's types have it, turns as RTTM."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.audio import (
    Transcription,
    TranscriptionDiarized,
    TranscriptionStreamEvent,
    TranscriptionVerbose,
    TranslationVerbose,
)
from pydantic import TypeAdapter

from forebay.dialects.openai.audio_events import SpeechShape, usage_in_tokens
from forebay.dialects.openai.audio_formats import JSON, PLAIN, Look, written
from forebay.errors import InvalidRequest
from forebay.speech import Character, Segment, Transcript, Turn, Word
from tests.support.subtitles import Cue, read_srt, read_vtt

HELLO = Word(0.1, 0.4, " Hello", 0.9)
THERE = Word(0.5, 0.9, " there.", 0.5)
NO = Word(1.2, 1.5, " No.", 1.0, "B")
FIRST = Segment(0.1, 0.9, " Hello there.", (5, 6), 0.0, -0.2, 1.1, 0.01, (HELLO, THERE))
SECOND = Segment(1.2, 1.5, " No.", (7,), 0.2, -0.4, 0.9, 0.02, (NO,))
SPOKEN = Transcript("transcribe", 2.0004, "en", 0.98, (FIRST, SECOND))
TOLD = replace(
    SPOKEN,
    segments=(
        replace(FIRST, speaker="A", words=(replace(HELLO, speaker="A"), replace(THERE, speaker="B"))),
        replace(SECOND, speaker="B"),
    ),
    turns=(Turn(0.0, 0.45, "A"), Turn(0.45, 1.6, "B")),
    speakers=("A", "B"),
)
EVENTS: TypeAdapter[Any] = TypeAdapter(TranscriptionStreamEvent)


def shown(transcript: Transcript, form: str, look: Look = Look()) -> Any:  # noqa: B008  # frozen
    answer = written(transcript, form, look)
    return json.loads(answer.body) if answer.content_type == JSON else answer.body.decode()


def events_of(data: bytes) -> list[dict[str, Any]]:
    assert data == b"" or data.endswith(b"\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in data.decode().split("\n\n") if line]


def test_json() -> None:
    body = shown(SPOKEN, "json")
    usage = {"type": "duration", "seconds": 2.0}
    assert body == {"text": "Hello there. No.", "languages": [{"code": "en"}], "usage": usage}
    assert Transcription.model_validate(body).text == "Hello there. No."


def test_json_with_log_probabilities() -> None:
    entries = shown(SPOKEN, "json", Look(logprobs=True))["logprobs"]
    assert [entry["token"] for entry in entries] == [" Hello", " there.", " No."]
    assert [entry["logprob"] for entry in entries] == [-0.1054, -0.6931, 0.0]
    assert bytes(entries[0]["bytes"]) == b" Hello"
    silent = replace(SPOKEN, segments=(replace(FIRST, words=(replace(HELLO, probability=0.0),)),))
    assert shown(silent, "json", Look(logprobs=True))["logprobs"][0]["logprob"] == -100.0


def test_text() -> None:
    assert shown(SPOKEN, "text") == "Hello there. No.\n"
    assert written(SPOKEN, "text", Look()).content_type == PLAIN


def test_verbose_json() -> None:
    body = shown(SPOKEN, "verbose_json")
    assert (body["task"], body["language"], body["duration"]) == ("transcribe", "english", 2.0)
    assert body["segments"][0] == {
        "id": 0, "seek": 10, "start": 0.1, "end": 0.9, "text": " Hello there.", "tokens": [5, 6], "temperature": 0.0,
        "avg_logprob": -0.2, "compression_ratio": 1.1, "no_speech_prob": 0.01,
    }  # fmt: skip
    assert "words" not in body
    assert "speakers" not in body
    assert TranscriptionVerbose.model_validate(body, strict=True).segments


def test_verbose_json_has_the_times_that_were_asked_for() -> None:
    words = shown(SPOKEN, "verbose_json", Look(words=True, segments=False))
    assert "segments" not in words
    assert words["words"][0] == {"word": "Hello", "start": 0.1, "end": 0.4, "score": 0.9}
    both = shown(TOLD, "verbose_json", Look(words=True))
    assert [segment["speaker"] for segment in both["segments"]] == ["A", "B"]
    assert [word["speaker"] for word in both["words"]] == ["A", "B", "B"]
    assert both["speakers"] == ["A", "B"]


@pytest.mark.parametrize(("code", "name"), [("de", "german"), ("yue", "cantonese"), ("xx", "xx"), (None, "unknown")])
def test_languages_have_their_english_names(code: str | None, name: str) -> None:
    assert shown(replace(SPOKEN, language=code), "verbose_json")["language"] == name


def test_a_translation_is_english() -> None:
    body = shown(replace(SPOKEN, task="translate", language="de"), "verbose_json")
    assert (body["task"], body["language"]) == ("translate", "english")
    assert TranslationVerbose.model_validate(body).text


def test_diarized_json_changes_the_segment_with_the_speaker() -> None:
    body = shown(TOLD, "diarized_json")
    found = [(each["id"], each["speaker"], each["start"], each["end"], each["text"]) for each in body["segments"]]
    assert found == [
        ("seg_000", "A", 0.1, 0.4, "Hello"), ("seg_001", "B", 0.5, 0.9, "there."), ("seg_002", "B", 1.2, 1.5, "No."),
    ]  # fmt: skip
    assert body["text"] == "Hello there. No."
    assert TranscriptionDiarized.model_validate(body, strict=True).segments[0].speaker == "A"


def test_what_nobody_said_has_no_name() -> None:
    turn = (Turn(0.0, 0.45, "A"),)
    assert shown(replace(SPOKEN, turns=turn), "diarized_json")["segments"][0]["speaker"] == "unknown"


@pytest.mark.parametrize("form", ["diarized_json", "rttm"])
def test_speakers_that_nobody_told_apart_cannot_be_written(form: str) -> None:
    with pytest.raises(InvalidRequest, match="speakers"):
        shown(SPOKEN, form)
    assert shown(replace(SPOKEN, segments=()), form) is not None  # in silence, nobody is somebody


@pytest.mark.parametrize("task", ["transcribe", "translate", "align", "diarize"])
def test_only_formats_of_the_task(task: str) -> None:
    with pytest.raises(InvalidRequest, match="can be written as json"):
        shown(replace(SPOKEN, task=task), "mp3")
    with pytest.raises(InvalidRequest):
        shown(replace(SPOKEN, task=task), "srt" if task == "diarize" else "xml")


def test_the_text_of_what_was_aligned_has_its_segments_apart() -> None:
    told = Transcript("align", 2.0, segments=(replace(FIRST, text="hello hello"), replace(SECOND, text="oh hello ")))
    assert shown(told, "json")["text"] == "hello hello oh hello"
    assert shown(told, "text") == "hello hello oh hello\n"


def test_names_with_spaces_are_kept_apart_in_rttm() -> None:
    turns = (Turn(0.0, 1.0, "a b"), Turn(1.0, 2.0, "a_b"), Turn(2.0, 3.0, "a  b"))
    lines = shown(Transcript("diarize", 3.0, turns=turns, speakers=("a b", "a_b", "a  b")), "rttm").splitlines()
    assert [len(line.split()) for line in lines] == [10, 10, 10]
    assert [line.split()[7] for line in lines] == ["a_b_2", "a_b", "a_b_3"]


def test_alignments() -> None:
    letters = (Character("N", 1.2, 1.3, 0.5), Character("o", None, None, None))
    body = shown(
        Transcript("align", 2.0, segments=(FIRST, replace(SECOND, words=(replace(NO, characters=letters),)))), "json"
    )
    assert [word["word"] for word in body["words"]] == ["Hello", "there.", "No."]
    assert [len(segment["words"]) for segment in body["segments"]] == [2, 1]
    assert body["words"][2]["characters"] == [{"text": "N", "start": 1.2, "end": 1.3, "score": 0.5}, {"text": "o"}]


def test_diarizations() -> None:
    transcript = Transcript("diarize", 2.0, turns=TOLD.turns, speakers=("A", "B"))
    body = shown(transcript, "json")
    assert body["num_speakers"] == 2
    assert body["segments"][1] == {"id": 1, "speaker": "B", "start": 0.45, "end": 1.6}
    verbose = shown(transcript, "verbose_json")
    assert verbose["speakers"][1] == {"id": "B", "total_speech_duration": 1.15, "segment_count": 1}
    assert shown(transcript, "rttm") == (
        "SPEAKER recording 1 0.000 0.450 <NA> <NA> A <NA> <NA>\nSPEAKER recording 1 0.450 1.150 <NA> <NA> B <NA> <NA>\n"
    )


def test_a_name_with_spaces_is_one_column() -> None:
    line = shown(Transcript("diarize", 2.0, turns=(Turn(0, 1, "Ann  Lee"), Turn(1, 1, "nobody"))), "rttm")
    assert line.split()[7] == "Ann_Lee"
    assert line.count("\n") == 1


def test_subtitles() -> None:
    assert shown(SPOKEN, "srt") == (
        "1\n00:00:00,100 --> 00:00:00,900\nHello there.\n\n2\n00:00:01,200 --> 00:00:01,500\nNo.\n\n"
    )
    assert shown(SPOKEN, "vtt").startswith("WEBVTT\n\n00:00:00.100 --> 00:00:00.900\nHello there.\n\n")


def test_subtitles_show_who_speaks() -> None:
    assert [cue.text for cue in read_srt(shown(TOLD, "srt"))] == ["A: Hello", "B: there.", "B: No."]
    cues = read_vtt(shown(TOLD, "vtt"))
    assert [(cue.speaker, cue.text) for cue in cues] == [("A", "Hello"), ("B", "there."), ("B", "No.")]


def test_a_text_cannot_end_its_cue() -> None:
    nasty = "a <b>&amp; --> c\n\n2\n00:00:00,000 --> 00:00:09,000\nforged"
    transcript = replace(SPOKEN, segments=(Segment(0, 1, nasty, speaker="x>\n<y"),))
    plain = " ".join(nasty.split())
    (cue,) = read_srt(shown(transcript, "srt"))
    assert cue.text == "x> <y: " + plain.replace("-->", "->")
    (cue,) = read_vtt(shown(transcript, "vtt"))
    assert (cue.speaker, cue.text) == ("x> <y", plain)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("-->", "->"),
        ("a ----> b", "a -> b"),
        ("-->-->", "->->"),
        ("--- -> --", "--- -> --"),
        ("-" * 65_535 + ">", "->"),
    ],
)
def test_no_arrow_of_a_text_is_one_of_times(text: str, told: str) -> None:
    begun = time.process_time()
    (cue,) = read_srt(shown(replace(SPOKEN, segments=(Segment(0, 1, text),)), "srt"))
    assert cue.text == told
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("timed", [True, False])
def test_long_segments_are_cut_between_words(timed: bool) -> None:
    words = tuple(Word(place * 0.5, place * 0.5 + 0.4, f" word{place}") for place in range(60))
    segment = Segment(0, 30, "".join(word.text for word in words), words=words if timed else ())
    cues = read_srt(shown(replace(SPOKEN, segments=(segment,)), "srt"))
    assert len(cues) > 4
    assert all(cue.end - cue.start <= 7.001 for cue in cues)
    assert all(len(line) <= 42 for cue in cues for line in cue.lines)
    assert " ".join(cue.text for cue in cues) == segment.text.strip()
    assert cues[-1].end == (29.9 if timed else 30.0)


def cues_of(*segments: Segment) -> list[tuple[float, float, str]]:
    cues = read_srt(shown(replace(SPOKEN, segments=segments), "srt"))
    return [(cue.start, cue.end, cue.text) for cue in cues]


def test_cues_are_in_order_and_none_is_above_another() -> None:
    late, long = Segment(2, 4, " b"), Segment(0, 5, " a")
    assert cues_of(late, long) == [(0, 2, "a"), (2, 4, "b")]
    assert cues_of(Segment(1, 3, " a"), Segment(1, 2, " b")) == [(1, 1.001, "a"), (1.001, 2, "b")]


def test_slow_and_fast_speech_is_cut_in_time() -> None:
    slow = tuple(Word(3.0 * place, 3.0 * place + 2, " hm") for place in range(6))
    assert [end - start for start, end, _ in cues_of(Segment(0, 18, " hm" * 6, words=slow))] == [5, 5, 5]
    fast = tuple(Word(0.1 * place, 0.1 * place + 0.1, " word") for place in range(40))
    assert [len(text) for _, _, text in cues_of(Segment(0, 4, " word" * 40, words=fast))] == [79, 79, 39]


texts = st.text(st.characters(codec="utf-8"), max_size=200) | st.sampled_from(
    [
        "-->",
        "\n\n",
        "1\n00:00:00,000 --> 00:00:01,000\nx",
        "<v A>",
        "&lt;",
        "WEBVTT",
        "NOTE x",
        "日本語のテキスト" * 9,
        "a" * 99,
    ]
)
times = st.floats(0, 400_000, allow_nan=False)


@st.composite
def segment(draw: st.DrawFn) -> Segment:
    begin, end = draw(times), draw(times)
    speaker = draw(st.sampled_from([None, "A", "B", "Ann <Lee> & co"]))
    words = draw(st.lists(st.builds(Word, times, times, texts, speaker=st.sampled_from([None, "A", "B"])), max_size=4))
    text = "".join(word.text for word in words) if words else draw(texts)
    return Segment(begin, end, text, words=tuple(words), speaker=speaker)


def same_text(cues: Sequence[Cue], segments: Sequence[Segment]) -> bool:
    """Whether each letter and digit that was said is shown, no matter in which order the cues are."""
    return sorted(re.sub(r"\W", "", "".join(cue.text for cue in cues))) == sorted(
        re.sub(r"\W", "", "".join(each.text for each in segments))
    )


@given(st.lists(segment(), max_size=6))
def test_subtitles_parse_back(segments: list[Segment]) -> None:
    transcript = replace(SPOKEN, segments=tuple(segments))
    for form, read in (("srt", read_srt), ("vtt", read_vtt)):
        cues = read(shown(transcript, form))
        before = 0.0
        for cue in cues:
            assert before <= cue.start < cue.end
            before = cue.end
        if form == "vtt":
            assert same_text(cues, segments)


@given(st.lists(segment(), max_size=6), st.booleans())
def test_json_is_always_written(segments: list[Segment], logprobs: bool) -> None:
    transcript = replace(SPOKEN, segments=tuple(segments), turns=(Turn(0, 1, "A"),))
    look = Look(words=True, logprobs=logprobs)
    assert shown(transcript, "json", look)["text"] == transcript.text
    assert len(shown(transcript, "verbose_json", look)["segments"]) == len(segments)
    TranscriptionDiarized.model_validate(shown(transcript, "diarized_json"))


@given(st.lists(segment(), max_size=6))
def test_deltas_put_together_are_the_text(segments: list[Segment]) -> None:
    events = SpeechShape("json", Look()).events()
    said = [event["delta"] for each in segments for event in events_of(events.told([each]))]
    (done,) = events_of(events.ended(replace(SPOKEN, segments=tuple(segments))))
    assert "".join(said) == done["text"]


def test_events_are_those_of_the_official_client() -> None:
    events = SpeechShape("diarized_json", Look()).events()
    told = events_of(events.told(TOLD.segments[:1]) + events.told(TOLD.segments[1:]) + events.ended(TOLD))
    assert [event["type"].rsplit(".", 1)[1] for event in told] == ["delta"] * 2 + ["segment"] * 3 + ["done"]
    for event in told:
        assert EVENTS.validate_python(event, strict=True).type == event["type"]
    assert told[-1]["usage"]["input_tokens"] == 20
    assert told[-1]["usage"]["output_tokens"] == 3
    assert usage_in_tokens(TOLD).total_tokens == 23


def test_space_belongs_to_the_text_if_something_follows() -> None:
    events = SpeechShape("json", Look()).events()
    told = [events.told([Segment(0, 1, text)]) for text in ("  a ", " ", " b\n", "c", "  ")]
    assert [event["delta"] for each in told for event in events_of(each)] == ["a", "   b", "\nc"]


def test_events_with_log_probabilities() -> None:
    events = SpeechShape("json", Look(logprobs=True)).events()
    told = events_of(events.told([FIRST]) + events.ended(SPOKEN))
    assert [entry["token"] for entry in told[0]["logprobs"]] == [" Hello", " there."]
    assert len(told[1]["logprobs"]) == 3
    EVENTS.validate_python(told[0], strict=True)

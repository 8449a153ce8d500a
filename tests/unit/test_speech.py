import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.speech import (
    Character,
    Segment,
    Transcript,
    Turn,
    Word,
    segment_from_wire,
    segment_to_wire,
    transcript_from_wire,
    transcript_to_wire,
    turn_from_wire,
    turn_to_wire,
    word_from_wire,
    word_to_wire,
)

TIMES = st.floats(0, 1e6)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=20)
SPEAKERS = st.none() | TEXTS
CHARACTERS = st.builds(Character, TEXTS, st.none() | TIMES, st.none() | TIMES, st.none() | NUMBERS)
WORDS = st.builds(Word, TIMES, TIMES, TEXTS, st.none() | NUMBERS, SPEAKERS, st.lists(CHARACTERS, max_size=3).map(tuple))
SEGMENTS = st.builds(
    Segment,
    TIMES,
    TIMES,
    TEXTS,
    st.lists(st.integers(0, 60_000), max_size=5).map(tuple),
    NUMBERS,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.lists(WORDS, max_size=3).map(tuple),
    SPEAKERS,
)
TURNS = st.builds(Turn, TIMES, TIMES, TEXTS)
TRANSCRIPTS = st.builds(
    Transcript,
    TEXTS,
    TIMES,
    st.none() | TEXTS,
    st.none() | NUMBERS,
    st.lists(SEGMENTS, max_size=3).map(tuple),
    st.lists(TURNS, max_size=3).map(tuple),
    st.lists(TEXTS, max_size=3).map(tuple),
)


def _told(wire: Any) -> Any:
    return json.loads(json.dumps(wire))


@given(WORDS)
def test_a_word_is_read_as_it_was_written(word: Word) -> None:
    assert word_from_wire(_told(word_to_wire(word))) == word


@given(SEGMENTS)
def test_a_segment_is_read_as_it_was_written(segment: Segment) -> None:
    assert segment_from_wire(_told(segment_to_wire(segment))) == segment


@given(TURNS)
def test_a_turn_is_read_as_it_was_written(turn: Turn) -> None:
    assert turn_from_wire(_told(turn_to_wire(turn))) == turn


@given(TRANSCRIPTS)
def test_a_transcript_is_read_as_it_was_written(transcript: Transcript) -> None:
    assert transcript_from_wire(_told(transcript_to_wire(transcript))) == transcript


def test_what_is_absent_is_not_written() -> None:
    assert set(word_to_wire(Word(0, 1, "a"))) == {"start", "end", "text", "probability"}
    assert "speaker" not in segment_to_wire(Segment(0, 1, "a"))


JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


@pytest.mark.parametrize(
    ("read", "good"),
    [
        (word_from_wire, word_to_wire(Word(0, 1, "a", characters=(Character("a"),)))),
        (segment_from_wire, segment_to_wire(Segment(0, 1, "a", words=(Word(0, 1, "a"),)))),
        (turn_from_wire, turn_to_wire(Turn(0, 1, "A"))),
        (transcript_from_wire, transcript_to_wire(Transcript("transcribe", 1, segments=(Segment(0, 1, "a"),)))),
    ],
)
@given(data=st.data())
def test_what_is_malformed_raises_what_is_promised(read: Any, good: dict[str, Any], data: st.DataObject) -> None:
    wire = dict(good)
    wire[data.draw(st.sampled_from(sorted(wire)))] = data.draw(JSON)
    if data.draw(st.booleans()):
        del wire[data.draw(st.sampled_from(sorted(wire)))]
    try:
        read(wire)
    except (KeyError, TypeError, ValueError):
        return

"""Speakers on words: by the time they share with turns; nothing lost, nothing moved."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from forebay.dialects.speakers import by_speaker, with_speakers
from forebay.speech import Segment, Turn, Word


def _segment(*words: tuple[float, float, str]) -> Segment:
    said = tuple(Word(start, end, text) for start, end, text in words)
    return Segment(said[0].start, said[-1].end, "".join(word.text for word in said), tokens=(1, 2), words=said)


def test_a_word_belongs_to_whoever_speaks_for_most_of_it() -> None:
    segment = _segment((0.0, 1.0, " one"), (1.0, 2.0, " two"), (2.0, 3.0, " three"))
    (told,) = with_speakers([segment], [Turn(0.0, 1.4, "A"), Turn(1.3, 3.0, "B")])
    assert [word.speaker for word in told.words] == ["A", "B", "B"]
    assert told.speaker == "B"


def test_a_word_outside_every_turn_goes_to_the_nearest_or_along_with_its_neighbour() -> None:
    segment = _segment((0.0, 0.5, " um"), (1.0, 2.0, " so"), (9.0, 9.5, " later"))
    (told,) = with_speakers([segment], [Turn(1.0, 2.0, "A")])
    assert [word.speaker for word in told.words] == ["A", "A", "A"]


def test_without_turns_nobody_is_named() -> None:
    (told,) = with_speakers([_segment((0.0, 1.0, " one"))], [])
    assert told.speaker is None
    assert [word.speaker for word in told.words] == [None]


def test_a_segment_without_words_has_the_speaker_of_most_of_its_time() -> None:
    (told,) = with_speakers([Segment(0.0, 4.0, " so it is")], [Turn(0.0, 1.0, "A"), Turn(1.0, 4.0, "B")])
    assert told.speaker == "B"


def test_a_segment_is_cut_where_the_speaker_changes() -> None:
    segment = _segment((0.0, 1.0, " one"), (1.0, 2.0, " two"), (2.0, 3.0, " three"))
    parts = by_speaker(with_speakers([segment], [Turn(0.0, 1.0, "A"), Turn(1.0, 3.0, "B")]))
    assert [(part.speaker, part.start, part.end, part.text) for part in parts] == [
        ("A", 0.0, 1.0, " one"),
        ("B", 1.0, 3.0, " two three"),
    ]


def test_a_segment_of_one_speaker_stays_as_it_is() -> None:
    told = with_speakers([_segment((0.0, 1.0, " one"), (1.0, 2.0, " two"))], [Turn(0.0, 2.0, "A")])
    assert by_speaker(told) == told


_seconds = st.floats(0, 100).map(lambda value: round(value, 2))
_spans = st.tuples(_seconds, _seconds).map(lambda pair: (min(pair), max(pair) + 0.01))


@given(st.lists(_spans, min_size=1, max_size=12), st.lists(st.tuples(_spans, st.sampled_from("ABC")), max_size=8))
def test_no_word_is_lost_or_moved(
    words: list[tuple[float, float]], turns: list[tuple[tuple[float, float], str]]
) -> None:
    segment = _segment(*((start, end, f" {number}") for number, (start, end) in enumerate(sorted(words))))
    told = with_speakers([segment], [Turn(*span, speaker) for span, speaker in turns])
    parts = by_speaker(told)
    assert "".join(part.text for part in parts) == segment.text
    assert [replace(word, speaker=None) for part in parts for word in part.words] == list(segment.words)
    assert all(word.speaker == part.speaker for part in parts if len(parts) > 1 for word in part.words)


@given(st.lists(_spans, min_size=1, max_size=12), st.lists(st.tuples(_spans, st.sampled_from("ABC")), max_size=12))
def test_each_segment_is_told_as_if_it_were_alone_with_all_turns(
    spans: list[tuple[float, float]], said: list[tuple[tuple[float, float], str]]
) -> None:
    segments = [Segment(start, end, "x", words=(Word(start, end, "x"),)) for start, end in sorted(spans)]
    turns = [Turn(*span, speaker) for span, speaker in said]
    for segment, told in zip(segments, with_speakers(segments, turns), strict=True):
        near = [each for each in turns if each.end >= segment.start - 1 and each.start <= segment.end + 1]
        assert (told,) == with_speakers([segment], sorted(near, key=lambda turn: turn.start))

"""Who said what: the speakers of turns put on the words and segments of a transcript.

It refuses to lose a word or to move one in time; turns that overlap stay as they are.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, groupby

from forebay.speech import Segment, Turn, Word

_NEAR_SECONDS = 1.0  # a word outside every turn belongs to the nearest one, if it is no farther than this
_INSTANT_SECONDS = 0.001


def with_speakers(segments: Sequence[Segment], turns: Sequence[Turn]) -> tuple[Segment, ...]:
    """`segments` with a speaker on every word and segment of which one can be told."""
    ordered = sorted(turns, key=lambda turn: turn.start)
    starts = [turn.start for turn in ordered]
    ends = list(accumulate((turn.end for turn in ordered), max))  # the latest so far, so it never goes back
    told = []
    for segment in segments:
        first = bisect_left(ends, segment.start - _NEAR_SECONDS)
        told.append(_told(segment, ordered[first : bisect_right(starts, segment.end + _NEAR_SECONDS)]))
    return tuple(told)


def by_speaker(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """`segments`, cut wherever the speaker changes between two words."""
    return tuple(part for segment in segments for part in _parts(segment))


def _told(segment: Segment, turns: Sequence[Turn]) -> Segment:
    near = [turn for turn in turns if _distance(turn, segment.start, segment.end) <= _NEAR_SECONDS]
    if not segment.words:
        return replace(segment, speaker=_speaker(near, segment.start, segment.end))
    words = tuple(replace(word, speaker=_speaker(near, word.start, word.end)) for word in segment.words)
    words = _filled(words)
    share: dict[str, float] = {}
    for word in words:
        if word.speaker is not None:
            share[word.speaker] = share.get(word.speaker, 0.0) + max(word.end - word.start, _INSTANT_SECONDS)
    return replace(segment, words=words, speaker=max(share, key=lambda speaker: share[speaker], default=None))


def _speaker(turns: Sequence[Turn], start: float, end: float) -> str | None:
    """Whose turn it is for most of the time, or whose turn is nearest."""
    share: dict[str, float] = {}
    for turn in turns:
        together = min(turn.end, end) - max(turn.start, start)
        if together > 0:
            share[turn.speaker] = share.get(turn.speaker, 0.0) + together
    if share:
        return max(share, key=lambda speaker: share[speaker])
    nearest = min(turns, key=lambda turn: _distance(turn, start, end), default=None)
    return None if nearest is None or _distance(nearest, start, end) > _NEAR_SECONDS else nearest.speaker


def _distance(turn: Turn, start: float, end: float) -> float:
    return max(turn.start - end, start - turn.end, 0.0)


def _filled(words: tuple[Word, ...]) -> tuple[Word, ...]:
    """Words of no turn go with the word before, or with the next one that has a speaker."""
    known = next((word.speaker for word in words if word.speaker is not None), None)
    found = []
    for word in words:
        known = word.speaker or known
        found.append(word if word.speaker == known else replace(word, speaker=known))
    return tuple(found)


def _parts(segment: Segment) -> Iterable[Segment]:
    groups = [tuple(words) for _, words in groupby(segment.words, key=lambda word: word.speaker)]
    if len(groups) <= 1:
        return (segment,)
    return tuple(
        replace(
            segment,
            start=words[0].start,
            end=words[-1].end,
            text="".join(word.text for word in words),
            words=words,
            speaker=words[0].speaker,
            tokens=(),  # which of them belong to which word is not known
        )
        for words in groups
    )

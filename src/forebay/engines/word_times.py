"""The words of a text, and times for all of them: none is ever lost, and no time goes back or out of its segment.

It refuses to listen: where words were heard it is told, and it gives a time to those that nobody heard.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from forebay.speech import Character, Segment, Word

# Scripts written without spaces whose characters can stand for words: Kana and Han.
_WORD = re.compile(
    r"\s*(?:[぀-ヿ㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff][^\s\w]*|[^\s぀-ヿ㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff]+)"
)
_MILLISECONDS = 3


@dataclass(frozen=True, slots=True)
class Heard:
    """Where a word was heard; `probability` is none for a guess."""

    start: float
    end: float
    probability: float | None = None
    characters: tuple[Character, ...] = ()


def words_of(text: str) -> list[str]:
    """The words of a text with the space before each; put together they are the text without the space at its end."""
    return _WORD.findall(text.rstrip())  # space that no word follows would be tried from each of its places


def spread(words: Sequence[str], start: float, end: float) -> list[Heard]:
    """A guess where nothing is known: the time shared out by the lengths of the words."""
    sizes = [max(1, len(word.strip())) for word in words]
    seconds = (end - start) / max(1, sum(sizes))
    found, at = [], start
    for size in sizes:
        found.append(Heard(at, at + size * seconds))
        at += size * seconds
    return found


def timed(
    segment: Segment, words: Sequence[str], heard: Sequence[Heard | None], rule: str, *, characters: bool = False
) -> Segment:
    """The segment with all its words.

    Words that were not heard get a time by `rule`: `nearest`, that of the nearest word that was; `linear`, their share of
    the time between their neighbours; `ignore`, no time of their own: they begin and end where the word before them ends.
    If no word was heard, they share the segment. `characters`: those of each word are told too, if only by name.
    """
    if not any(heard):
        heard = spread(words, segment.start, segment.end)
    known = [place for place, each in enumerate(heard) if each]
    filled: list[Heard] = []
    for place, each in enumerate(heard):
        filled.append(each or _filled(place, heard, known, rule, segment))
    found, start, end = [], segment.start, segment.start
    for text, each in zip(words, filled, strict=True):
        start = _within(each.start, start, segment.end)
        end = _within(each.end, max(start, end), segment.end)
        probability = None if each.probability is None else round(min(1.0, max(0.0, each.probability)), 4)
        placed = each.characters or tuple(Character(character) for character in text.strip()) if characters else ()
        clipped = tuple(_clipped(character, start, end) for character in placed)
        found.append(Word(start, end, text, probability, characters=clipped))
    return replace(segment, words=tuple(found))


def _filled(place: int, heard: Sequence[Heard | None], known: Sequence[int], rule: str, segment: Segment) -> Heard:
    at = bisect_left(known, place)
    before, after = known[at - 1] if at else None, known[at] if at < len(known) else None
    low, high = (None if each is None else heard[each] for each in (before, after))
    if rule == "nearest":
        near = low if high is None or (low and place - (before or 0) <= (after or 0) - place) else high
        assert near
        return Heard(near.start, near.end)
    begin = low.end if low else (segment.start if rule == "linear" else high.start if high else segment.start)
    if rule == "ignore":
        return Heard(begin, begin)
    end = high.start if high else segment.end
    first, last = -1 if before is None else before, len(heard) if after is None else after
    share = max(0.0, end - begin) / (last - first - 1)
    return Heard(begin + (place - first - 1) * share, begin + (place - first) * share)


def _within(time: float, low: float, high: float) -> float:
    return min(high, max(low, round(time, _MILLISECONDS)))


def _clipped(character: Character, start: float, end: float) -> Character:
    if character.start is None or character.end is None:
        return character
    begin = _within(character.start, start, end)
    return replace(character, start=begin, end=_within(character.end, begin, end))

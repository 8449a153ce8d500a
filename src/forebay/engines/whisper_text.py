"""What becomes of the tokens that Whisper has written: whether they are good enough, and where one segment ends.

It refuses to know a model or a tokenizer: tokens are numbers here, and from `timestamps` on they are times.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_TOKEN_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Try:
    """What was written at one temperature."""

    tokens: tuple[int, ...]
    text: str
    temperature: float
    avg_logprob: float
    no_speech_prob: float

    @property
    def compression_ratio(self) -> float:
        """How often it repeats itself."""
        data = self.text.encode()
        return len(data) / len(zlib.compress(data))


@dataclass(slots=True)
class Tries:
    """What was written of one chunk so far, and whether that is good enough by the request's thresholds."""

    options: Mapping[str, Any]
    all: list[Try] = field(default_factory=list)

    @property
    def temperature(self) -> float:
        """That of the next try."""
        return float(self.options["temperatures"][len(self.all)])

    @property
    def ended(self) -> bool:
        """Whether no other is wanted: the last is good enough, or the temperatures are used up."""
        if not self.all:
            return False
        return len(self.all) == len(self.options["temperatures"]) or not self._poor(self.all[-1])

    def best(self) -> Try:
        """The last if it is good enough, else the likeliest of those that do not repeat themselves."""
        last = self.all[-1]
        if not self._poor(last):
            return last
        most = self.options["compression_ratio_threshold"]
        fresh = [each for each in self.all if most is None or each.compression_ratio <= most]
        return max(fresh or self.all, key=lambda each: each.avg_logprob)

    def silent(self, one: Try) -> bool:
        """Whether `one` was written of something that is no speech."""
        most, least = self.options["no_speech_threshold"], self.options["log_prob_threshold"]
        return most is not None and one.no_speech_prob > most and (least is None or one.avg_logprob <= least)

    def _poor(self, one: Try) -> bool:
        most, least = self.options["compression_ratio_threshold"], self.options["log_prob_threshold"]
        unlikely = least is not None and one.avg_logprob < least
        if unlikely and self.silent(one):
            return False
        return unlikely or (most is not None and one.compression_ratio > most)


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens of one segment, times among them, and its seconds from and to."""

    start: float
    end: float
    tokens: tuple[int, ...]


def split(
    tokens: Sequence[int], timestamps: int, duration: float, *, whole: bool, rest_min: float = 1.0
) -> tuple[list[Part], float | None]:
    """The segments in `tokens`, and from where on something is left to be heard; None where nothing is.

    A segment ends where two times follow one another. What comes after the last two is a segment up to the end, unless
    `tokens` are not the whole because there was no room for more: that is heard again, as is sound of which nothing was
    written although a new segment was begun.
    """
    tokens = tuple(tokens)
    ends = [place for place in range(1, len(tokens)) if tokens[place - 1] >= timestamps and tokens[place] >= timestamps]
    parts, begin = [], 0
    for end in ends:
        parts.append(_part(tokens[begin:end], timestamps, duration))
        begin = end
    left = tokens[begin:]
    spoken = any(token < timestamps for token in left)
    last = parts[-1].end if parts else 0.0
    if spoken and (whole or not parts or left[-1] >= timestamps):
        parts.append(_part(left, timestamps, duration))
    elif parts and 0 < last < duration - rest_min:
        return parts, last
    return parts, None


def _part(tokens: tuple[int, ...], timestamps: int, duration: float) -> Part:
    """One segment: without a time at its beginning it begins with the chunk, and without one at its end it ends with it."""
    start = (tokens[0] - timestamps) * _TOKEN_SECONDS if tokens[0] >= timestamps else 0.0
    closed = len(tokens) > 1 and tokens[-1] > timestamps
    end = (tokens[-1] - timestamps) * _TOKEN_SECONDS if closed else duration
    start, end = min(start, duration), min(end, duration)
    return Part(start, max(start, end), tokens)

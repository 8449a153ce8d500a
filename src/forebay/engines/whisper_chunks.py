"""How a stretch of sound becomes chunks for Whisper, and how times in a chunk become times in the stretch.

Pure arithmetic on samples: it refuses to hear anything, and to know who asked.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from forebay.engines.vad import WINDOW_SAMPLES
from forebay.speech import SAMPLE_RATE, Segment, Word

_SILENCE_SECONDS = 0.3  # what counts as an end
_FINAL_SECONDS = 30  # where it is looked for
_FRAME_SAMPLES = SAMPLE_RATE // 50
_QUIET_FRAMES = 10
_TIME_DIGITS = 3

Region = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Sound for one run of the model: `pieces` of a stretch, one after another, as samples from and to."""

    pieces: tuple[Region, ...]

    @property
    def samples(self) -> int:
        """How long it is."""
        return sum(end - begin for begin, end in self.pieces)

    def cut(self, pcm: NDArray[np.int16]) -> NDArray[np.int16]:
        """Its sound, out of that of the stretch."""
        return np.concatenate([pcm[begin:end] for begin, end in self.pieces])

    def rest(self, seconds: float) -> "Chunk":
        """What is left of it from `seconds` on."""
        left, skip = [], round(seconds * SAMPLE_RATE)
        for begin, end in self.pieces:
            if skip < end - begin:
                left.append((begin + max(0, skip), end))
            skip -= end - begin
        return Chunk(tuple(left))

    def placed(self, segment: Segment) -> Segment:
        """`segment`, whose times are in the chunk, with times in the stretch. A word lies in one piece as a whole."""
        words = tuple(self._word(word) for word in segment.words)
        if words:
            return replace(segment, start=words[0].start, end=max(word.end for word in words), words=words)
        first = self._piece(segment.start)
        last = max(first, self._piece(segment.end, is_end=True))
        return replace(segment, start=self._time(segment.start, first), end=self._time(segment.end, last))

    def _word(self, word: Word) -> Word:
        piece = self._piece((word.start + word.end) / 2)
        return replace(word, start=self._time(word.start, piece), end=self._time(word.end, piece))

    def _piece(self, seconds: float, *, is_end: bool = False) -> int:
        ends = self._ends()
        sample = round(seconds * SAMPLE_RATE)
        return min(bisect_right(ends, sample - 1 if is_end else sample), len(ends) - 1)

    def _time(self, seconds: float, piece: int) -> float:
        begin, end = self.pieces[piece]
        before = self._ends()[piece] - (end - begin)
        sample = begin + round(seconds * SAMPLE_RATE) - before
        return round(min(max(sample, begin), end) / SAMPLE_RATE, _TIME_DIGITS)

    def _ends(self) -> list[int]:
        ends, total = [], 0
        for begin, end in self.pieces:
            total += end - begin
            ends.append(total)
        return ends


def collect(regions: Iterable[Region], samples_max: int) -> list[Chunk]:
    """Regions of speech, none longer than `samples_max`, put together into chunks no longer than that."""
    chunks: list[list[Region]] = []
    size = samples_max
    for begin, end in regions:
        if size + end - begin > samples_max:
            chunks.append([])
            size = 0
        size += end - begin
        pieces = chunks[-1]
        if pieces and pieces[-1][1] == begin:
            pieces[-1] = (pieces[-1][0], end)
        else:
            pieces.append((begin, end))
    return [Chunk(tuple(pieces)) for pieces in chunks]


def windows(pcm: NDArray[np.int16], samples_max: int) -> list[Chunk]:
    """All of `pcm` in chunks of at most `samples_max`, cut where the last quarter of each is quietest."""
    found, begin = [], 0
    while len(pcm) - begin > samples_max:
        cut = quietest(pcm, begin + samples_max * 3 // 4, begin + samples_max)
        found.append(Chunk(((begin, cut),)))
        begin = cut
    return [*found, Chunk(((begin, len(pcm)),))] if begin < len(pcm) else found


def quietest(pcm: NDArray[np.int16], begin: int, end: int) -> int:
    """The sample between `begin` and `end` around which it is quietest."""
    frames = (end - begin) // _FRAME_SAMPLES
    if frames < 1:
        return end
    sound = pcm[begin : begin + frames * _FRAME_SAMPLES].astype(np.float64).reshape(frames, -1)
    loudness = np.pad((sound**2).mean(1), _QUIET_FRAMES // 2, "edge")
    smooth = np.convolve(loudness, np.ones(_QUIET_FRAMES), "valid")[:frames]
    return begin + int(np.argmin(smooth)) * _FRAME_SAMPLES + _FRAME_SAMPLES // 2


def consumed(probabilities: NDArray[np.float32], offset: float, samples: int) -> int | None:
    """Where a stretch that is not the last may end: in the last silence of its final part, if there is one.

    The final part is half of it, or half a minute.
    """
    final = max(len(probabilities) // 2, len(probabilities) - _FINAL_SECONDS * SAMPLE_RATE // WINDOW_SAMPLES)
    for begin, end in reversed(list(_silences(probabilities[final:], offset))):
        if (end - begin) * WINDOW_SAMPLES >= _SILENCE_SECONDS * SAMPLE_RATE:
            return min(samples, (final + (begin + end) // 2) * WINDOW_SAMPLES)
    return None


def until(regions: Sequence[Region], samples: int) -> list[Region]:
    """What of `regions` lies before `samples`."""
    return [(begin, min(end, samples)) for begin, end in regions if begin < samples]


def _silences(probabilities: NDArray[np.float32], offset: float) -> Iterator[Region]:
    begin = None
    for window, probability in enumerate([*probabilities.tolist(), 1.0]):
        if probability < offset:
            begin = window if begin is None else begin
        elif begin is not None:
            yield begin, window
            begin = None

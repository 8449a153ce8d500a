"""The aligner's way with a model of letters: what is heard of several requests is computed together, paths are found apart.

It refuses to keep more of what was heard than the letters that a segment has.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate, chain, pairwise
from pathlib import Path

import numpy as np

from forebay.engines.compute import Compute
from forebay.engines.ctc import WILDCARD, Alphabet, Span, align
from forebay.engines.threads import Threads, Unwanted, Wanted, all_ended, cores
from forebay.engines.wav2vec2 import Ear, Letters, Listener, Samples, joined, pieces
from forebay.engines.word_times import Heard
from forebay.speech import SAMPLE_RATE, Character, Segment

_PATH_SECONDS_MAX = 60
_PROCEED_SECONDS = 1.0
_SAMPLES_MIN = SAMPLE_RATE // 25  # in less there is no frame to speak of


class CtcBackend:
    """One model of letters. Made in the loading thread; `place` runs in the event loop."""

    segments_at_once = 8

    def __init__(
        self,
        model: Path,
        threads: int,
        batch_seconds: int,
        cooldown_seconds: float,
        rehearse_seconds_max: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._listener = Listener(model, threads, rehearse_seconds_max * SAMPLE_RATE)
        self._threads = Threads(min(2, threads or cores()))
        starting = self._start(batch_seconds * SAMPLE_RATE, cooldown_seconds)
        self._compute = asyncio.run_coroutine_threadsafe(starting, loop).result()

    async def _start(self, batch_samples: int, cooldown_seconds: float) -> Compute:
        return Compute(self._listener.listen, batch_samples, 1, 0, cooldown_seconds)

    @property
    def figures(self) -> Mapping[str, float]:
        """What the metrics show: sums of pieces of recordings, and their samples as tokens."""
        figures = {f"{name}_total": value for name, value in asdict(self._compute.figures).items()}
        figures = {f"listening_{name}": value for name, value in figures.items()}
        return {**figures, "items_waiting": self._compute.waiting, "batch_budget_tokens": self._compute.budget_tokens}

    async def place(
        self, words: Sequence[str], samples: memoryview, segment: Segment, wanted: Wanted
    ) -> Sequence[Heard | None]:
        """Where each word of a segment was heard."""
        first, last = round(segment.start * SAMPLE_RATE), round(segment.end * SAMPLE_RATE)
        spelled = await self._threads.run(
            lambda: [self._listener.vocabulary.symbols(word.strip()) for word in words], wanted
        )
        if last - first < _SAMPLES_MIN or not any(chain.from_iterable(spelled)):
            return [None] * len(words)
        recording = np.frombuffer(samples, dtype="<i2")
        alphabet = self._listener.vocabulary.alphabet
        said = {symbol for word in spelled for letter in word for symbol in letter} - {WILDCARD}
        symbols = np.array(
            sorted(said | {alphabet.blank, alphabet.blank if alphabet.delimiter is None else alphabet.delimiter})
        )
        letters = await self._listen(recording, first, last, Ear(symbols, wanted))

        def find() -> list[Heard | None]:
            return _find(words, spelled, letters, alphabet, symbols, wanted)

        return await self._threads.run(find, wanted)

    async def _listen(self, recording: Samples, first: int, last: int, ear: Ear) -> Letters:
        """What is heard in a segment. Cancelled, it has what is computed for it alone broken off."""
        items = [(piece, ()) for piece in pieces(recording, first, last, ear)]
        listening = asyncio.ensure_future(self._compute.run(items, ear.wanted.proceed))
        try:
            return joined(await asyncio.shield(listening))
        except asyncio.CancelledError:
            ear.wanted.gone = True
            self._listener.stop_unwanted()
            listening.cancel()
            await all_ended([listening])
            raise


def _find(
    words: Sequence[str],
    spelled: Sequence[Sequence[Sequence[int]]],
    letters: Letters,
    alphabet: Alphabet,
    symbols: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    wanted: Wanted,
) -> list[Heard | None]:
    """The words along the likeliest path, in seconds of the recording."""
    column = {int(symbol): place for place, symbol in enumerate(symbols)} | {WILDCARD: WILDCARD}
    flat = [[column[symbol] for letter in word for symbol in letter] for word in spelled]
    own = Alphabet(column[alphabet.blank], None if alphabet.delimiter is None else column[alphabet.delimiter])
    seconds = letters.borders / SAMPLE_RATE
    frames_max = round(_PATH_SECONDS_MAX * len(letters.emissions) / max(1e-3, seconds[-1] - seconds[0]))

    told = 0.0

    def between() -> None:
        nonlocal told
        if wanted.gone:
            raise Unwanted
        if (now := time.monotonic()) - told >= _PROCEED_SECONDS:
            told = now
            wanted.proceed()

    found: list[Heard | None] = []
    for word, letter, span in zip(
        words, spelled, align(letters.emissions, flat, own, max(1, frames_max), between), strict=True
    ):
        if span is None:
            found.append(None)
            continue
        characters = _characters(word.strip(), letter, span.symbols, seconds) if span.symbols else ()
        found.append(Heard(float(seconds[span.first]), float(seconds[span.last]), span.score, characters))
    return found


def _characters(
    word: str,
    spelled: Sequence[Sequence[int]],
    spans: Sequence[Span],
    seconds: "np.ndarray[tuple[int], np.dtype[np.float64]]",
) -> tuple[Character, ...]:
    """The characters of a word; those that are not said have no times."""
    found = []
    places = pairwise(accumulate(map(len, spelled), initial=0))
    for character, (first, last) in zip(word, places, strict=True):
        if first == last:
            found.append(Character(character))
            continue
        scores = [span.score for span in spans[first:last] if span.score is not None]
        score = round(sum(scores) / len(scores), 4) if scores else None
        start, end = float(seconds[spans[first].first]), float(seconds[spans[last - 1].last])
        found.append(Character(character, start, end, score))
    return tuple(found)

"""CTC forced alignment: from what a model hears in each frame, and a text, to where each symbol of the text was said.

It holds arithmetic alone and refuses to know models, seconds and spelling: frames and symbol numbers are all there is. Memory
is bounded by `frames_max`: a longer recording is worked through in windows, each beginning where the last sure word ended.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Emissions = npt.NDArray[np.float32]
"""Log-probabilities, [frames, symbols]; the last column is that of the likeliest of all symbols, whichever it is."""

WILDCARD = -1  # the last column: any sound, for a character that the vocabulary does not know
# A wildcard is a little less likely than the likeliest symbol, so that it covers its sound and leaves silence to the blank.
_WILDCARD_COST = 0.1
_SURE_SHARE = 0.75  # of a window; words that end later may only be there because the window ends
_FRAMES_BETWEEN = 256
_IMPOSSIBLE = np.float32(-1e30)


@dataclass(frozen=True, slots=True)
class Span:
    """Frames from `first` up to and without `last`; `score` is a probability, none for what is a guess."""

    first: int
    last: int
    score: float | None


@dataclass(frozen=True, slots=True)
class WordSpan:
    """Where a word was said, and its symbols; these are none where the word is a guess."""

    first: int
    last: int
    score: float | None
    symbols: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Alphabet:
    """The symbols with a meaning of their own: nothing new (blank), and the one between words, where there is one."""

    blank: int
    delimiter: int | None = None


@dataclass(frozen=True, slots=True)
class Path:
    """The likeliest way through all frames: its states, and its log-probability."""

    states: npt.NDArray[np.int32]
    score: float


def best_path(
    emissions: Emissions,
    symbols: Sequence[int],
    blank: int,
    *,
    open_end: bool = False,
    between: Callable[[], None] = lambda: None,
) -> Path | None:
    """The likeliest path that says `symbols`, or any beginning of them with `open_end`; None when there is none.

    State 2i+1 says symbol i, the even states around it are blank. A symbol that repeats has a blank between.
    """
    if open_end:
        symbols = symbols[: len(emissions)]  # no path says more
    frames, states = len(emissions), 2 * len(symbols) + 1
    heard = emissions.copy()
    heard[:, WILDCARD] -= np.float32(_WILDCARD_COST)
    says = np.full(states, blank, dtype=np.int32)
    says[1::2] = symbols
    skips = np.zeros(states, dtype=bool)
    skips[3::2] = (says[3::2] != says[1:-2:2]) | (says[3::2] == WILDCARD)
    scores = np.full(states, _IMPOSSIBLE, dtype=np.float32)
    scores[:2] = heard[0, says[:2]]
    moves = np.zeros((frames, states), dtype=np.int8)
    options = np.full((3, states), _IMPOSSIBLE, dtype=np.float32)
    for frame in range(1, frames):
        if frame % _FRAMES_BETWEEN == 0:
            between()
        options[0] = scores
        options[1, 1:] = scores[:-1]
        options[2, 2:] = np.where(skips[2:], scores[:-2], _IMPOSSIBLE)
        moves[frame] = options.argmax(axis=0)
        scores = options.max(axis=0) + heard[frame, says]
    last = int(scores.argmax()) if open_end else states - 1 - int(states > 1 and scores[-2] > scores[-1])
    if scores[last] <= _IMPOSSIBLE / 2:
        return None
    path = np.empty(frames, dtype=np.int32)
    for frame in range(frames - 1, -1, -1):
        path[frame] = last
        last -= int(moves[frame, last])
    return Path(path, float(scores[path[-1]]))


def symbol_spans(emissions: Emissions, symbols: Sequence[int], path: Path) -> list[Span]:
    """Where the path says each symbol, for as many as it says."""
    found = []
    said = path.states[path.states % 2 == 1]
    frames = np.flatnonzero(path.states % 2 == 1)
    for place in range(int(said[-1]) // 2 + 1 if said.size else 0):
        low, high = np.searchsorted(said, 2 * place + 1, "left"), np.searchsorted(said, 2 * place + 1, "right")
        first, last = int(frames[low]), int(frames[high - 1]) + 1
        symbol = symbols[place]
        score = None if symbol == WILDCARD else float(np.exp(emissions[first:last, symbol]).mean())
        found.append(Span(first, last, score))
    return found


def align(
    emissions: Emissions,
    words: Sequence[Sequence[int]],
    alphabet: Alphabet,
    frames_max: int,
    between: Callable[[], None] = lambda: None,
) -> list[WordSpan | None]:
    """One span for each word, in order; None for words without symbols.

    Where no path says the words (more of them than frames), they share the frames that are left, without a score.
    `between` is called before each window and every few hundred frames, and may raise.
    """
    found: list[WordSpan | None] = [None] * len(words)
    spoken = [place for place, symbols in enumerate(words) if symbols]
    frame = 0
    while spoken and frame < len(emissions):
        between()
        window = emissions[frame : frame + frames_max]
        final = frame + frames_max >= len(emissions)
        tried = spoken if final else _fitting(words, spoken, frames_max)
        told = [words[place] for place in tried]
        spans = _window(window, told, alphabet, first=not any(found), open_end=not final, between=between)
        if not final:
            spans = [span for span in spans if span.last <= _SURE_SHARE * frames_max]
        for place, span in zip(tried, spans, strict=False):
            found[place] = _moved(span, frame)
        frame += spans[-1].last if spans else max(1, int(_SURE_SHARE * frames_max))
        spoken = [] if final else spoken[len(spans) :]
    if spoken:
        _share_end(found, spoken, words, len(emissions))
    return found


def share(first: int, last: int, sizes: Sequence[int]) -> list[WordSpan]:
    """Frames shared out among words by their sizes: a guess, and without a score."""
    borders = first + np.rint(np.cumsum([0, *sizes]) * ((last - first) / max(1, sum(sizes)))).astype(int)
    return [WordSpan(int(low), int(high), None) for low, high in pairwise(borders)]


def _share_end(found: list[WordSpan | None], left: list[int], words: Sequence[Sequence[int]], frames: int) -> None:
    """Give words that no window had room for what is left behind the last one that was placed."""
    begin = max((span.last for span in found if span), default=0)
    for place, span in zip(left, share(begin, frames, [len(words[each]) for each in left]), strict=True):
        found[place] = span


def _fitting(words: Sequence[Sequence[int]], spoken: list[int], frames_max: int) -> list[int]:
    """As many words as can be said in a window, and at least one."""
    sizes = np.cumsum([len(words[place]) for place in spoken[:frames_max]])
    return spoken[: max(1, int(np.searchsorted(sizes, frames_max, "right")))]


def _window(
    emissions: Emissions,
    words: Sequence[Sequence[int]],
    alphabet: Alphabet,
    *,
    first: bool,
    open_end: bool,
    between: Callable[[], None],
) -> list[WordSpan]:
    """The spans of the words in one window; with `open_end`, of those that are said in it to their end.

    A window that is not the first begins with what is between two words.
    """
    delimiters = (alphabet.delimiter, None) if alphabet.delimiter is not None else (None,)
    for delimiter in delimiters:  # without the symbol between words there is room for more of them
        symbols = _joined(words, delimiter, first=first)
        if len(symbols) > len(emissions) and not open_end:
            continue
        path = best_path(emissions, symbols, alphabet.blank, open_end=open_end, between=between)
        if path is not None:
            spans = symbol_spans(emissions, symbols, path)
            return _words(spans if first else spans[delimiter is not None :], words, delimiter, len(emissions))
    return share(0, len(emissions), [len(word) for word in words])


def _joined(words: Sequence[Sequence[int]], delimiter: int | None, *, first: bool) -> list[int]:
    between = [] if delimiter is None else [delimiter]
    symbols = [symbol for word in words for symbol in (*between, *word)]
    return symbols[len(between) :] if first else symbols


_TAIL_FRAMES = 3  # a model marks a sound when it is sure of it, before its end


def _words(spans: Sequence[Span], words: Sequence[Sequence[int]], delimiter: int | None, frames: int) -> list[WordSpan]:
    """Spans of symbols put together; each symbol of a word lasts until the next one begins."""
    found, place = [], 0
    for word in words:
        end = place + len(word)
        if end > len(spans):
            break
        border = spans[end].first if end < len(spans) else frames
        last = min(border, spans[end - 1].last + _TAIL_FRAMES)
        borders = [*(span.first for span in spans[place:end]), last]
        symbols = tuple(
            Span(low, high, span.score)
            for low, high, span in zip(borders[:-1], borders[1:], spans[place:end], strict=True)
        )
        known = [span.score for span in symbols if span.score is not None]
        found.append(WordSpan(borders[0], last, sum(known) / len(known) if known else None, symbols))
        place = end + (delimiter is not None)
    return found


def _moved(word: WordSpan, frames: int) -> WordSpan:
    symbols = tuple(Span(each.first + frames, each.last + frames, each.score) for each in word.symbols)
    return WordSpan(word.first + frames, word.last + frames, word.score, symbols)

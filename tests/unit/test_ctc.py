import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.engines.ctc import WILDCARD, Alphabet, WordSpan, align, best_path, share, symbol_spans

SYMBOLS = 4  # blank, the delimiter, and two letters; the last column is the likeliest of them
BLANK, DELIMITER = 0, 1


def _emissions(frames: int, seed: int, symbols: int = SYMBOLS) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(scale=3, size=(frames, symbols)).astype(np.float32)
    found = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return np.hstack([found, found.max(axis=1, keepdims=True)])


def _collapsed(path: tuple[int, ...]) -> list[int]:
    return [symbol for symbol, _ in itertools.groupby(path) if symbol != BLANK]


@given(st.integers(1, 6), st.lists(st.integers(1, SYMBOLS - 1), max_size=4), st.integers(0, 999))
def test_the_best_path_is_the_best_of_all(frames: int, symbols: list[int], seed: int) -> None:
    emissions = _emissions(frames, seed)
    every = itertools.product(range(SYMBOLS), repeat=frames)
    scores = [sum(emissions[at, each] for at, each in enumerate(p)) for p in every if _collapsed(p) == symbols]
    found = best_path(emissions, symbols, BLANK)
    if not scores:
        assert found is None
        return
    assert found
    assert found.score == pytest.approx(max(scores), abs=1e-4)
    said = [BLANK if state % 2 == 0 else symbols[state // 2] for state in found.states]
    assert sum(emissions[at, each] for at, each in enumerate(said)) == pytest.approx(found.score, abs=1e-4)
    assert [symbols[int(state) // 2] for state, _ in itertools.groupby(found.states) if state % 2] == symbols


@given(st.integers(1, 5), st.lists(st.integers(1, SYMBOLS - 1), max_size=4), st.integers(0, 999))
def test_with_an_open_end_it_is_the_best_beginning(frames: int, symbols: list[int], seed: int) -> None:
    emissions = _emissions(frames, seed)
    wholes = [best_path(emissions, symbols[:count], BLANK) for count in range(len(symbols) + 1)]
    found = best_path(emissions, symbols, BLANK, open_end=True)
    assert found
    assert found.score == pytest.approx(max(each.score for each in wholes if each), abs=1e-4)


def test_a_wildcard_takes_the_sound_that_nothing_explains() -> None:
    heard = [2, 0, 3, 3, 3, 0, 2]
    emissions = np.full((len(heard), SYMBOLS + 1), -8, dtype=np.float32)
    emissions[np.arange(len(heard)), heard] = emissions[:, WILDCARD] = -0.01
    found = best_path(emissions, [2, WILDCARD, 2], BLANK)
    assert found
    assert [(each.first, each.last, each.score is None) for each in symbol_spans(emissions, [2, WILDCARD, 2], found)] == [
        (0, 1, False), (2, 5, True), (6, 7, False)
    ]  # fmt: skip


WORDS = st.lists(st.lists(st.sampled_from([2, 3, WILDCARD]), max_size=5), max_size=12)


@given(st.integers(0, 60), WORDS, st.sampled_from([None, DELIMITER]), st.integers(1, 70), st.integers(0, 99))
def test_no_word_is_lost_and_no_time_goes_back(
    frames: int, words: list[list[int]], delimiter: int | None, frames_max: int, seed: int
) -> None:
    emissions = _emissions(frames, seed) if frames else np.zeros((0, SYMBOLS + 1), dtype=np.float32)
    found = align(emissions, words, Alphabet(BLANK, delimiter), frames_max)
    assert [each is None for each in found] == [not word for word in words]
    placed = [each for each in found if each]
    borders = [border for each in placed for border in (each.first, each.last)]
    assert borders == sorted(borders)
    assert all(0 <= border <= frames for border in borders)
    for word, span in zip(words, found, strict=True):
        if span and span.symbols:
            assert len(span.symbols) == len(word)
            inner = [border for each in span.symbols for border in (each.first, each.last)]
            assert inner == sorted(inner)
            assert (inner[0], inner[-1]) == (span.first, span.last)


def _heard(words: list[list[int]], silence: int) -> tuple[np.ndarray, list[int]]:
    """Frames in which the words are said plainly, with silence between them, and where each begins."""
    frames, begins = [BLANK] * silence, []
    for word in words:
        begins.append(len(frames))
        for symbol in word:
            frames += [symbol, symbol, BLANK]
        frames += [DELIMITER] + [BLANK] * silence
    emissions = np.full((len(frames), SYMBOLS + 1), -6, dtype=np.float32)
    emissions[np.arange(len(frames)), frames] = emissions[:, -1] = -0.05
    return emissions, begins


@pytest.mark.parametrize("silence", [0, 3, 40])
def test_what_is_longer_than_a_window_is_placed_as_well(silence: int) -> None:
    chance = np.random.default_rng(silence)
    words = [list(chance.integers(2, SYMBOLS, size=chance.integers(1, 9))) for _ in range(80)]
    emissions, begins = _heard(words, silence)
    windows = []
    found = align(emissions, words, Alphabet(BLANK, DELIMITER), 200, lambda: windows.append(1))
    assert [each.first for each in found if each] == begins
    assert len(windows) > len(emissions) / 200


def test_more_words_than_frames_share_them_without_a_score() -> None:
    found = align(_emissions(7, 1), [[2, 3]] * 20, Alphabet(BLANK, DELIMITER), 100)
    assert len(found) == 20
    assert all(each and each.score is None and not each.symbols for each in found)
    assert found[0]
    assert found[-1]
    assert (found[0].first, found[-1].last) == (0, 7)


def test_without_room_for_delimiters_words_are_placed_without() -> None:
    emissions, _ = _heard([[2], [3], [2]], 0)
    found = align(emissions[[0, 4, 8]], [[2], [3], [2]], Alphabet(BLANK, DELIMITER), 100)
    assert [(each.first, each.last) for each in found if each] == [(0, 1), (1, 2), (2, 3)]
    assert all(each and each.score for each in found)


def test_shares_are_by_size() -> None:
    assert share(10, 20, [1, 3, 1]) == [WordSpan(10, 12, None), WordSpan(12, 18, None), WordSpan(18, 20, None)]
    assert share(3, 3, [2, 2]) == [WordSpan(3, 3, None)] * 2


def test_a_minute_of_frames_takes_little_memory() -> None:
    import tracemalloc

    emissions, symbols = _emissions(3000, 1), [2, 3] * 700
    tracemalloc.start()
    assert best_path(emissions, symbols, BLANK)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_one_long_word_takes_little_memory_and_can_be_given_up() -> None:
    import tracemalloc

    emissions, words = _emissions(4000, 1), [[2, 3] * 32_768]
    calls = []
    tracemalloc.start()
    found = align(emissions, words, Alphabet(BLANK, DELIMITER), 3000, lambda: calls.append(1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [each and (each.last, each.score, each.symbols) for each in found] == [(4000, None, ())]
    assert peak < 40 * 2**20
    assert len(calls) > 4000 / 512


def test_a_window_is_given_up_in_its_middle() -> None:
    class GivenUpError(Exception):
        pass

    calls = []

    def between() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise GivenUpError

    with pytest.raises(GivenUpError):
        align(_emissions(3000, 1), [[2, 3]] * 200, Alphabet(BLANK, DELIMITER), 3000, between)

import numpy as np
import pytest

from forebay.engines.vad import WINDOW_SAMPLES, VadOptions, regions

SECOND = 16_000
PER_SECOND = SECOND / WINDOW_SAMPLES
PLAIN = VadOptions(pad_ms=0)


def _probabilities(*parts: tuple[float, float]) -> np.ndarray:
    """Parts of so many seconds with one probability each."""
    return np.concatenate([np.full(round(seconds * PER_SECOND), each, np.float32) for seconds, each in parts])


def _seconds(found: list[tuple[int, int]]) -> list[tuple[float, float]]:
    return [(round(begin / SECOND, 1), round(end / SECOND, 1)) for begin, end in found]


def test_speech_lasts_from_onset_until_offset() -> None:
    found = regions(_probabilities((1, 0.1), (1, 0.9), (1, 0.4), (1, 0.1), (1, 0.45), (1, 0.1)), PLAIN)
    assert _seconds(found) == [(1.0, 3.0)]  # 0.4 goes on what 0.9 began, 0.45 begins nothing


def test_a_short_silence_ends_nothing() -> None:
    probabilities = _probabilities((1, 0.9), (0.1, 0.0), (1, 0.9), (0.5, 0.0), (1, 0.9))
    assert _seconds(regions(probabilities, PLAIN)) == [(0.0, 2.1), (2.6, 3.6)]


def test_speech_that_is_too_short_is_none() -> None:
    probabilities = _probabilities((1, 0.0), (0.2, 0.9), (1, 0.0), (0.5, 0.9), (1, 0.0))
    assert _seconds(regions(probabilities, VadOptions(pad_ms=0, min_speech_ms=250))) == [(2.2, 2.7)]


def test_padding_stops_where_the_next_begins_and_at_both_ends() -> None:
    probabilities = _probabilities((0.2, 0.0), (1, 0.9), (0.4, 0.0), (1, 0.9), (2, 0.0), (1, 0.9))
    found = regions(probabilities, VadOptions(pad_ms=400))
    assert _seconds(found) == [(0.0, 1.4), (1.4, 3.0), (4.1, 5.5)]
    assert found[0][1] == found[1][0]


def test_long_speech_is_cut_where_it_is_least_likely() -> None:
    probabilities = _probabilities((7, 0.95), (0.3, 0.6), (12, 0.95))
    found = regions(probabilities, VadOptions(pad_ms=0, max_speech_seconds=10))
    assert found[0][0] == 0
    assert 7 <= found[0][1] / SECOND <= 7.3
    assert [end for _, end in found[:-1]] == [begin for begin, _ in found[1:]]
    assert found[-1][1] == len(probabilities) * WINDOW_SAMPLES
    assert all(end - begin <= 10 * SECOND for begin, end in found)


def test_regions_end_with_the_sound() -> None:
    probabilities = _probabilities((1, 0.9))
    assert regions(probabilities, VadOptions(), 15_500)[-1][1] == 15_500
    assert regions(probabilities[:0], VadOptions()) == []


@pytest.mark.parametrize("seed", range(20))
def test_regions_are_in_order_and_no_longer_than_wanted(seed: int) -> None:
    chance = np.random.default_rng(seed)
    noise = chance.random(3000).astype(np.float32)
    probabilities = (np.convolve(noise, np.ones(20) / 20, "same") * 1.2 - 0.1).astype(np.float32)
    samples = len(probabilities) * WINDOW_SAMPLES - int(chance.integers(0, WINDOW_SAMPLES))
    found = regions(probabilities, VadOptions(max_speech_seconds=5), samples)
    edges = [edge for region in found for edge in region]
    assert found
    assert edges == sorted(edges)
    assert all(0 < end - begin <= 5 * SECOND for begin, end in found)
    assert edges[0] >= 0
    assert edges[-1] <= samples

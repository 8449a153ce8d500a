import time
import tracemalloc

import numpy as np
import pytest

from forebay.engines import clustering
from forebay.engines.clustering import Floats, Windows, told_apart, unit, voices_in

STEP, LENGTH = 0.4, 1.6


class Stop(Exception):
    """Raised by a check."""


def go_on() -> None:
    """A check that lets the work go on."""


def speech(turns: list[tuple[int, int]], seed: int = 0, apart: float = 0.35) -> tuple[Windows, np.ndarray]:
    """Windows of `turns`: a voice and how many windows it has. What is said differs between windows, less in near ones."""
    chance = np.random.default_rng(seed)
    voices = chance.normal(size=(12, 256)) / 16
    whose = np.concatenate([np.full(count, voice) for voice, count in turns])
    said = chance.normal(size=(len(whose) + 3, 256)) / 16
    said = (said[:-3] + said[1:-2] + said[2:-1] + said[3:]) / 2  # four windows share sound
    everybody = chance.normal(size=256) / 16
    vectors = unit((everybody * 1.5 + voices[whose] * apart * 2 + said * 0.5).astype(np.float32))
    return Windows(np.arange(len(whose), dtype=np.float64) * STEP + LENGTH / 2, vectors, LENGTH), whose


def same(labels: np.ndarray, whose: np.ndarray) -> float:
    """The share of windows that are right, each label meaning the voice that most of it is of."""
    return float(sum(np.bincount(whose[labels == label]).max() for label in np.unique(labels)) / len(whose))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_voices_are_counted_and_told_apart(count: int) -> None:
    chance = np.random.default_rng(count)
    order = chance.permutation(np.repeat(np.arange(count), 12))
    windows, whose = speech([(int(voice), int(chance.integers(6, 20))) for voice in order], count)
    assert voices_in(windows, go_on) == count
    labels = told_apart(windows.vectors, count, go_on)
    assert len(np.unique(labels)) == count
    assert same(labels, whose) > 0.97


def test_one_voice_is_one_however_long_it_speaks() -> None:
    for seed in range(3):
        for count in (1, 5, 6, 30, 200):
            assert voices_in(speech([(0, count)], seed)[0], go_on) == 1
    assert voices_in(speech([(0, 4000)])[0], go_on) == 1


def test_a_voice_of_one_part_in_twenty_is_found_where_the_count_is_given() -> None:
    windows, whose = speech([(0, 200), (1, 20), (0, 200)], apart=0.5)
    assert same(told_apart(windows.vectors, 2, go_on), whose) > 0.97


@pytest.mark.parametrize(
    "vectors",
    [np.zeros((9, 256)), np.tile(np.eye(1, 256), (9, 1)), np.eye(256)[:3], np.eye(256)[:1], np.zeros((0, 256))],
)
def test_what_has_no_clusters_still_gets_labels(vectors: np.ndarray) -> None:
    windows = Windows(np.arange(len(vectors), dtype=np.float64) * STEP, vectors.astype(np.float32), LENGTH)
    assert voices_in(windows, go_on) >= 1
    labels = told_apart(windows.vectors, 4, go_on)
    assert len(labels) == len(vectors)
    assert set(labels) <= {0, 1, 2, 3}


def test_the_same_vectors_get_the_same_labels() -> None:
    windows, _ = speech([(number % 3, 12) for number in range(20)])
    first = told_apart(windows.vectors, 3, go_on)
    assert np.array_equal(first, told_apart(windows.vectors.copy(), 3, go_on))


def test_six_hours_cost_little_memory_and_time_and_can_be_ended_soon() -> None:
    """By the thread's own time, so that a busy machine says little about us."""
    order = np.random.default_rng(1).integers(0, 4, 2700)
    windows, whose = speech([(int(voice), 20) for voice in order])
    last, longest = time.thread_time(), 0.0

    def look() -> None:
        nonlocal last, longest
        now = time.thread_time()
        longest, last = max(longest, now - last), now

    tracemalloc.start()
    begun = time.thread_time()
    assert voices_in(windows, look) == 4
    labels = told_apart(windows.vectors, 4, look)
    seconds, peak = time.thread_time() - begun, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert same(labels, whose) > 0.97
    assert peak < 200 * 2**20, peak
    assert seconds < 60
    assert longest < 2


def test_a_check_ends_the_work_wherever_it_is() -> None:
    windows, _ = speech([(number % 2, 20) for number in range(60)])
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    told_apart(windows.vectors, 2, count)
    assert calls > 10
    for last in range(1, calls, 9):
        left = iter(range(last))

        def stop(left: object = left) -> None:
            if next(left, None) is None:  # type: ignore[call-overload]
                raise Stop

        with pytest.raises(Stop):
            told_apart(windows.vectors, 2, stop)


def test_averages_stand_for_all_vectors() -> None:
    windows, _ = speech([(number % 3, 20) for number in range(100)])
    minis: Floats = clustering._minis(windows.vectors, go_on)
    assert len(minis) <= 500
    assert np.allclose(np.linalg.norm(minis, axis=1), 1, atol=1e-5)

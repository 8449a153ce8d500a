import random

import numpy as np
import pytest

from forebay.engines.clustering import Windows, unit
from forebay.engines.turns import Count, Known, turns

STEP, LENGTH = 0.4, 1.6
VOICES = np.eye(30, 256, dtype=np.float32)


def go_on() -> None:
    """A check that lets the work go on."""


def windows(whose: list[int], begin: float = 0.0, noise: float = 0.02) -> Windows:
    """A window every 0.4 s from `begin`, of these voices."""
    vectors = VOICES[whose] + np.random.default_rng(0).normal(size=(len(whose), 256)) * noise
    middles = begin + np.arange(len(whose), dtype=np.float64) * STEP
    return Windows(middles, unit(vectors.astype(np.float32)), LENGTH)


def test_turns_change_between_the_windows_of_two_voices() -> None:
    found = turns([(0.0, 8.0)], windows([0] * 10 + [1] * 11), Count(2, 1, 20), [], go_on)
    assert [(turn.speaker, turn.start, turn.end) for turn in found] == [
        ("A", 0.0, pytest.approx(3.8, abs=0.1)),
        ("B", pytest.approx(3.8, abs=0.1), 8.0),
    ]


def test_letters_follow_the_order_of_speaking_and_go_on_after_z() -> None:
    order = list(range(30))
    random.Random(3).shuffle(order)
    found = turns([(0.0, 96.0)], windows([voice for voice in order for _ in range(8)]), Count(30, 1, 30), [], go_on)
    letters = [chr(ord("A") + number) for number in range(26)]
    assert [turn.speaker for turn in found] == [*letters, "AA", "AB", "AC", "AD"]


def test_a_blink_of_another_voice_is_no_turn() -> None:
    spoken = [0] * 10 + [1] * 10
    whole = windows(spoken)
    sure = whole.vectors.copy()
    sure[4] = unit(VOICES[0] + VOICES[1] * 1.02)  # for less than a quarter of a second
    found = turns([(0.0, 7.8)], Windows(whole.middles, sure, LENGTH), Count(2, 1, 20), [], go_on)
    assert [turn.speaker for turn in found] == ["A", "B"]


def test_every_region_is_in_turns_and_nothing_else_is() -> None:
    chance = random.Random(8)
    for _ in range(20):
        edges = sorted(chance.sample(range(1, 400), 2 * chance.randint(1, 12)))
        regions = [(low / 10, high / 10) for low, high in zip(edges[::2], edges[1::2], strict=True)]
        heard = windows([chance.randrange(3) for _ in range(100)], noise=0.1)
        found = turns(regions, heard, Count(None, 1, 20), [], go_on)
        merged: list[list[float]] = []
        for turn in found:
            if merged and turn.start - merged[-1][1] < 1e-6:
                merged[-1][1] = turn.end
            else:
                merged.append([turn.start, turn.end])
        assert [pair for region in merged for pair in region] == pytest.approx(
            [edge for region in regions for edge in region], abs=0.002
        )


def test_parts_of_regions_that_touch_are_one_turn() -> None:
    found = turns([(0.0, 2.0), (2.0, 4.0), (5.0, 6.0)], windows([0] * 16), Count(1, 1, 20), [], go_on)
    assert [(turn.start, turn.end) for turn in found] == [(0.0, 4.0), (5.0, 6.0)]


def test_each_known_speaker_is_one_voice_and_the_most_alike() -> None:
    heard = windows([0] * 10 + [1] * 10 + [2] * 10)
    both = unit(VOICES[0] + VOICES[1] * 0.5)
    known = [Known("near both", both[None]), Known("B", VOICES[1][None]), Known("nobody", VOICES[9][None])]
    found = turns([(0.0, 12.0)], heard, Count(3, 1, 20), known, go_on)
    # The letter B is a name already, so the unknown one is not called so.
    assert [turn.speaker for turn in found] == ["near both", "B", "A"]


def test_how_many_there_can_be_is_kept() -> None:
    heard = windows([0] * 20 + [1] * 20)
    said = [(0.0, 16.0)]
    assert len({turn.speaker for turn in turns(said, heard, Count(None, 3, 20), [], go_on)}) == 3
    assert len({turn.speaker for turn in turns(said, heard, Count(None, 1, 1), [], go_on)}) == 1
    assert len({turn.speaker for turn in turns(said, heard, Count(None, 1, 20), [], go_on)}) == 2


def test_nothing_said_has_no_turns() -> None:
    assert turns([], windows([]), Count(2, 1, 20), [], go_on) == []
    assert turns([], windows([0, 1]), Count(2, 1, 20), [], go_on) == []

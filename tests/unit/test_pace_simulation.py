"""The pace in simulated time, over many arrivals: what online work loses, what batch work gets, and that both have an end."""

from collections.abc import Callable, Iterator

import pytest

from forebay.server_config import PaceSettings
from tests.support.simulation import Machine, Seen, bursty, compare, diurnal, p99, poisson

SETTINGS = PaceSettings()
SMALL = Machine(engines=(1, 4, 2))
LARGE = Machine(engines=(1,) * 8, room=6, slots=32, crowd=0.02)
Trace = Callable[..., Iterator[float]]
TRACES = [poisson, bursty, diurnal]


def played(
    machine: Machine, trace: Trace, seeds: int, seconds: float, load: float = 0.4, settings: PaceSettings = SETTINGS
) -> tuple[list[Seen], list[Seen]]:
    """Runs without batch work and with it."""
    runs = [compare(machine, settings, seed, trace, load, seconds) for seed in range(seeds)]
    return [alone for alone, _ in runs], [beside for _, beside in runs]


def slowdowns(alone: list[Seen], beside: list[Seen]) -> tuple[float, float]:
    """How many times as long as alone the slowest in a hundred take: to the first token, and between tokens."""

    def ratio(of: str) -> float:
        return p99([getattr(v, of) for seen in beside for v in seen.visits]) / p99(
            [getattr(v, of) for seen in alone for v in seen.visits]
        )

    return ratio("first"), ratio("gap")


def throughput(beside: list[Seen]) -> float:
    """All work that was done, as a multiple of the online work."""
    online = sum(seen.online_seconds for seen in beside)
    return (online + sum(seen.batch_seconds for seen in beside)) / online


@pytest.mark.parametrize("trace", TRACES)
def test_online_work_keeps_its_times_and_batch_work_takes_the_rest(trace: Trace, prove: bool) -> None:
    alone, beside = played(SMALL, trace, 1000 if prove else 12, 150)
    first, gap = slowdowns(alone, beside)
    total = throughput(beside)
    print(f"{trace.__name__}: p99 of the first token x{first:.2f}, between tokens x{gap:.2f}; {total:.2f} of the work")
    assert first <= 1.25
    assert gap <= 1.25
    assert total >= 1.5


@pytest.mark.parametrize("noise", [0.08, 0.3])
def test_where_there_is_room_beside_online_work_it_is_found(noise: float, prove: bool) -> None:
    machine = Machine(engines=LARGE.engines, room=LARGE.room, slots=LARGE.slots, crowd=LARGE.crowd, noise=noise)
    alone, beside = played(machine, poisson, 300 if prove else 6, 30, load=2)
    first, gap = slowdowns(alone, beside)
    levels = [seen.changes[-1][1] for seen in beside]
    print(f"noise {noise}: x{first:.2f}, x{gap:.2f}; {throughput(beside):.2f} of the work; levels {levels}")
    assert first <= 1.25
    assert gap <= 1.25
    assert throughput(beside) >= 1.5
    assert sum(levels) / len(levels) >= 2


def test_everything_stands_still_when_somebody_comes_whatever_the_seed(prove: bool) -> None:
    for seed in range(3000 if prove else 200):
        _, beside = compare(SMALL, SETTINGS, seed, TRACES[seed % 3], 0.4, 10)
        assert beside.left_running == 0, seed


def test_nobody_who_stays_online_for_ever_starves_batch_work(prove: bool) -> None:
    settings = SETTINGS.model_copy(update={"hold_seconds_max": 8.0, "floor_seconds": 0.5})
    _, beside = played(SMALL, poisson, 300 if prove else 6, 60, load=2.5, settings=settings)
    longest = len(SMALL.engines) * (settings.hold_seconds_max + settings.floor_seconds)
    assert all(seen.batch_seconds > 0 for seen in beside)
    assert max(seen.held_longest for seen in beside) <= longest + 0.1


def test_it_does_not_try_for_ever_what_has_done_harm(prove: bool) -> None:
    _, beside = played(SMALL, poisson, 100 if prove else 4, 400)
    early = [sum(1 for at, _ in seen.changes if at <= 100) for seen in beside]
    late = [sum(1 for at, _ in seen.changes if at > 300) for seen in beside]
    assert sum(late) <= sum(early) / 2, (early, late)
    assert max(late) <= 6

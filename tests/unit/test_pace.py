"""The pace of a device: nothing beside online work without evidence, less at once when it harms, and never nothing for ever."""

from itertools import pairwise

import pytest

from forebay.scheduler.pace import Bound, Claim, Pace, Signal, to_run
from forebay.server_config import PaceSettings

SETTINGS = PaceSettings(
    resume_seconds=0.1,
    quiet_seconds=2,
    probe_seconds_min=10,
    probe_seconds_max=40,
    hold_seconds_max=60,
    floor_seconds=3,
    baseline_seconds=600,
)
ALONE = 0.01


class Drive:
    """A pace, its clock, and batch work that fills whatever it may."""

    def __init__(self) -> None:
        self.pace = Pace(SETTINGS)
        self.now = 100.0
        self.pace.batch(0, self.now, held=True)

    @property
    def yielding(self) -> int | None:
        return self.pace.bound(self.now).yielding

    def tokens(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.now += seconds
            self.pace.seen(Signal.TOKEN, "chat", seconds, self.now)
            self.fill()

    def fill(self) -> None:
        self.pace.batch(self.yielding or 0, self.now, held=True)

    def join(self) -> None:
        self.pace.joined(self.now)
        self.fill()

    def climb(self, level: int) -> None:
        for _ in range(1000):
            if self.pace.level == level:
                return
            self.tokens(1, ALONE)
        raise AssertionError(self.pace.level)


def test_nobody_online_is_no_bound() -> None:
    assert Drive().pace.bound(100.0) == Bound(None, None)


def test_the_first_online_request_stops_everything_at_once() -> None:
    drive = Drive()
    drive.pace.batch(7, drive.now, held=False)
    drive.pace.joined(drive.now)
    assert drive.pace.bound(drive.now) == Bound(0, 0)


def test_what_can_be_paused_goes_on_soon_after_the_last_has_left_and_what_cannot_later() -> None:
    drive = Drive()
    drive.join()
    drive.now += 1
    drive.pace.left(drive.now)
    assert drive.pace.bound(drive.now) == Bound(0, 0)
    for due, expected in ((0.1, Bound(None, 0)), (2.0, Bound(None, None))):
        assert drive.pace.next_look(drive.now) == pytest.approx(100 + 1 + due)
        drive.now = drive.pace.next_look(drive.now) or 0.0
        assert drive.pace.bound(drive.now) == expected
    assert drive.pace.next_look(drive.now) == pytest.approx(100 + SETTINGS.hold_seconds_max)


def test_the_bound_grows_by_one_as_long_as_tokens_come_as_fast_as_without() -> None:
    drive, seen = Drive(), []
    drive.join()
    for _ in range(120):
        drive.tokens(1, ALONE)
        seen.append(drive.yielding)
    assert seen[0] == 0
    assert seen[-1] is not None
    assert seen[-1] >= 8
    assert {after - before for before, after in pairwise(seen)} == {0, 1}  # type: ignore[operator]


def test_it_does_not_grow_beyond_what_is_used() -> None:
    drive = Drive()
    drive.join()
    drive.climb(1)
    for _ in range(100):
        drive.now += ALONE
        drive.pace.batch(1, drive.now, held=False)
        drive.pace.seen(Signal.TOKEN, "chat", ALONE, drive.now)
    assert drive.pace.level == 2


def test_it_does_not_grow_while_there_is_no_batch_work() -> None:
    drive = Drive()
    drive.pace.batch(0, drive.now, held=False)
    drive.pace.joined(drive.now)
    for _ in range(100):
        drive.now += ALONE
        drive.pace.seen(Signal.TOKEN, "chat", ALONE, drive.now)
    assert drive.pace.level == 0
    drive.fill()
    drive.tokens(1, ALONE)
    assert drive.pace.level == 1, "it is known by then what tokens take alone"


def test_tokens_that_come_late_halve_it_after_two_of_them() -> None:
    drive = Drive()
    drive.join()
    drive.climb(6)
    drive.tokens(1, 2 * ALONE)
    assert drive.pace.level == 6
    drive.tokens(1, 2 * ALONE)
    assert drive.pace.level == 3


def test_a_little_late_is_neither_good_nor_bad() -> None:
    drive = Drive()
    drive.join()
    drive.climb(3)
    drive.tokens(200, 1.18 * ALONE)
    assert drive.pace.level == 3


def test_what_did_harm_is_tried_again_later_each_time() -> None:
    drive, tried = Drive(), []
    drive.join()
    for _ in range(30_000):
        before = drive.pace.level
        drive.tokens(1, ALONE if before == 0 else 2 * ALONE)
        if drive.pace.level > before:
            tried.append(drive.now)
    waits = [round(after - before) for before, after in pairwise(tried)]
    assert waits[:3] == [10, 20, 40]
    assert set(waits[3:]) == {40}


def test_below_what_did_harm_it_grows_as_before() -> None:
    drive = Drive()
    drive.join()
    drive.climb(8)
    drive.tokens(2, 2 * ALONE)
    assert drive.pace.level == 4
    drive.tokens(60, ALONE)
    assert drive.pace.level == 7, "below what was bad at once, and not there before its time"
    drive.now += SETTINGS.probe_seconds_min
    drive.tokens(30, ALONE)
    assert drive.pace.level >= 8


def test_after_a_pause_it_climbs_again_from_nothing_to_where_it_was() -> None:
    drive = Drive()
    drive.join()
    drive.climb(4)
    drive.pace.left(drive.now)
    drive.now += 1
    drive.join()
    assert drive.pace.bound(drive.now) == Bound(0, 4), "what cannot be paused keeps what was found for it"
    drive.tokens(6, ALONE)
    assert drive.pace.bound(drive.now) == Bound(1, 4)


def test_one_who_comes_in_the_middle_of_a_step_up_takes_it_back() -> None:
    drive = Drive()
    drive.join()
    drive.climb(1)
    drive.join()
    assert drive.pace.level == 0


def test_what_nobody_knows_alone_is_looked_at_alone_first() -> None:
    drive = Drive()
    drive.join()
    drive.climb(3)
    drive.now += 1
    drive.pace.seen(Signal.TOKEN, "another", 1.0, drive.now)
    assert drive.yielding == 0
    assert drive.pace.level == 3
    drive.fill()
    drive.tokens(6, ALONE)
    assert drive.yielding == 1


def test_a_baseline_does_not_count_for_ever() -> None:
    drive = Drive()
    drive.join()
    drive.climb(2)
    drive.now += SETTINGS.baseline_seconds + 1
    drive.fill()
    drive.tokens(1, 5 * ALONE)
    assert (drive.yielding, drive.pace.level) == (0, 2)


def test_a_wait_counts_by_what_it_adds_to_the_first_token() -> None:
    drive = Drive()
    drive.join()
    for _ in range(4):
        drive.now += 0.2
        drive.pace.seen(Signal.WAIT, "chat", 0.0, drive.now)
        drive.pace.seen(Signal.FIRST, "chat", 0.2, drive.now)
    drive.climb(2)
    for _ in range(2):
        drive.now += 0.1
        drive.pace.seen(Signal.WAIT, "chat", 0.1, drive.now)
    assert drive.pace.level == 1


def test_first_tokens_that_come_late_halve_it_although_tokens_do_not_mind() -> None:
    drive = Drive()
    drive.join()
    for _ in range(4):
        drive.now += 0.2
        drive.pace.seen(Signal.FIRST, "chat", 0.2, drive.now)
    drive.climb(4)
    levels = []
    for _ in range(8):
        drive.tokens(3, ALONE)
        drive.now += 0.3
        drive.pace.seen(Signal.FIRST, "chat", 0.3, drive.now)
        levels.append(drive.pace.level)
    assert min(levels) == 2
    assert max(levels) <= 5


def test_work_that_was_held_for_long_enough_runs_for_a_while() -> None:
    drive = Drive()
    drive.join()
    assert drive.pace.next_look(drive.now) == pytest.approx(drive.now + SETTINGS.hold_seconds_max)
    drive.now += SETTINGS.hold_seconds_max
    drive.pace.tick(drive.now)
    assert drive.pace.bound(drive.now) == Bound(1, 1)
    drive.fill()
    drive.now = drive.pace.next_look(drive.now) or 0.0
    assert drive.pace.bound(drive.now) == Bound(0, 0)
    drive.fill()
    assert drive.pace.next_look(drive.now) == pytest.approx(drive.now + SETTINGS.hold_seconds_max)


def test_what_the_floor_does_to_tokens_is_no_evidence() -> None:
    drive = Drive()
    drive.join()
    drive.tokens(5, ALONE)
    drive.now += SETTINGS.hold_seconds_max
    drive.pace.tick(drive.now)
    drive.fill()
    drive.tokens(20, 3 * ALONE)
    drive.now += SETTINGS.floor_seconds
    drive.fill()
    drive.tokens(6, ALONE)
    assert drive.yielding == 1, "nothing was held against it"


TURN = 10.0


def claims(*rows: tuple[str, int, bool, float]) -> list[Claim]:
    return [Claim(*row) for row in rows]


@pytest.mark.parametrize(
    ("rows", "places", "expected"),
    [
        ([("a", 4, True, 0), ("b", 1, False, 0)], None, {"a", "b"}),
        ([("a", 4, True, 0), ("b", 1, False, 0)], 0, set()),
        ([("a", 4, True, 95), ("b", 1, False, 0)], 1, {"a"}),
        ([("a", 4, True, 90), ("b", 1, False, 95)], 1, {"b"}),
        ([("a", 1, False, 50), ("b", 1, False, 40)], 1, {"b"}),
        ([("a", 4, False, 50), ("b", 1, False, 40)], 2, {"a", "b"}),
        ([("a", 1, True, 99), ("b", 1, False, 40), ("c", 1, False, 30)], 2, {"a", "c"}),
    ],
)
def test_engines_take_turns_in_what_the_bound_leaves(
    rows: list[tuple[str, int, bool, float]], places: int | None, expected: set[str]
) -> None:
    assert to_run(claims(*rows), places, 100.0, TURN) == expected

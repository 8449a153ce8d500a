"""Who goes next, and where: the pure decisions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.inference import Priority
from forebay.scheduler.demand import Demand
from forebay.scheduler.policy import (
    Background,
    next_grant,
    position,
    rank,
    reserved,
    retry_after_seconds,
    to_preempt,
    to_step_aside,
)
from forebay.scheduler.queue import Line, Ticket
from forebay.scheduler.router import Seats, pick_replica

AGEING = 30.0
NONE = Background()
ONLINE = [priority for priority in Priority if priority is not Priority.BATCH]


def ticket(number: int, priority: Priority = Priority.DEFAULT, *, places: int = 1, joined_at: float = 0.0) -> Ticket:
    return Ticket(number, "model", priority, places, joined_at)


TICKETS = st.lists(
    st.builds(
        lambda priority, places, joined_at: (priority, places, joined_at),
        st.sampled_from(ONLINE),
        st.integers(1, 4),
        st.floats(0, 100),
    ),
    max_size=12,
).map(lambda rows: [Ticket(n, "model", p, k, j) for n, (p, k, j) in enumerate(rows)])
SEATS = st.lists(
    st.tuples(st.integers(1, 8), st.integers(0, 8)).map(lambda pair: (pair[0], min(pair))), max_size=4
).map(lambda rows: [Seats(f"replica_{n}", slots, running) for n, (slots, running) in enumerate(rows)])


def test_the_lower_priority_value_goes_first_then_the_earlier() -> None:
    waiting = [ticket(1, Priority.LOW), ticket(2), ticket(3), ticket(4, Priority.HIGH)]
    order = sorted(waiting, key=lambda one: rank(one, 0.0, AGEING))
    assert [one.number for one in order] == [4, 2, 3, 1]


def test_waiting_gains_levels_so_that_the_lowest_overtakes_newcomers() -> None:
    old = ticket(1, Priority.LOW, joined_at=0.0)
    new = ticket(2, Priority.HIGH, joined_at=59.0)
    assert rank(new, 59.0, AGEING) < rank(old, 59.0, AGEING)
    late = ticket(3, Priority.HIGH, joined_at=60.0)
    assert rank(old, 60.0, AGEING) < rank(late, 60.0, AGEING)


def test_one_that_needs_many_places_holds_up_the_line_until_they_are_free() -> None:
    waiting = [ticket(1, places=4), ticket(2)]
    assert next_grant(waiting, NONE, [Seats("a", 4, 1)], 0.0, AGEING) is None
    grant = next_grant(waiting, NONE, [Seats("a", 4, 0)], 0.0, AGEING)
    assert grant is not None
    assert grant[0].number == 1


def test_a_request_for_more_places_than_there_are_takes_the_whole_replica() -> None:
    assert pick_replica(8, [Seats("a", 4, 0)]) == Seats("a", 4, 0)
    assert pick_replica(8, [Seats("a", 4, 1)]) is None


def test_the_replica_with_the_largest_free_share_is_picked() -> None:
    assert pick_replica(1, [Seats("a", 8, 4), Seats("b", 2, 0), Seats("c", 8, 1)]) == Seats("b", 2, 0)


@given(TICKETS, SEATS, st.floats(100, 200))
def test_a_grant_never_exceeds_a_replica_and_is_always_first_in_rank(
    waiting: list[Ticket], seats: list[Seats], now: float
) -> None:
    grant = next_grant(waiting, NONE, seats, now, AGEING)
    first = min(waiting, key=lambda one: rank(one, now, AGEING), default=None)
    if grant is None:
        assert first is None or all(seat.free < min(first.places, seat.slots) for seat in seats)
    else:
        assert grant[0] is first
        assert grant[1].running + min(grant[0].places, grant[1].slots) <= grant[1].slots


@given(TICKETS, st.floats(100, 200))
def test_positions_are_one_to_the_number_of_tickets(waiting: list[Ticket], now: float) -> None:
    assert sorted(position(one, waiting, now, AGEING) for one in waiting) == list(range(1, len(waiting) + 1))


@given(st.integers(0, 10_000), st.integers(1, 64), st.floats(0, 1e6), st.floats(1, 120))
def test_retry_after_stays_within_its_bounds(waiting: int, slots: int, mean: float, longest: float) -> None:
    assert 1.0 <= retry_after_seconds(waiting, slots, mean, longest) <= longest


def test_a_line_keeps_the_order_of_arrival_and_leaving_twice_is_leaving_once() -> None:
    line = Line()
    tickets = [ticket(1), ticket(2), ticket(3)]
    for one in tickets:
        line.join(one)
    line.leave(tickets[1])
    line.leave(tickets[1])
    assert len(line) == 2
    assert list(line) == [tickets[0], tickets[2]]


def test_batch_work_goes_behind_everybody_online_however_long_it_has_waited() -> None:
    old, new = ticket(1, Priority.BATCH, joined_at=-1e6), ticket(2, Priority.LOW)
    seats = [Seats("a", 4, 0)]
    assert next_grant([new], Background(old), seats, 0.0, AGEING) == (new, seats[0])
    assert next_grant([], Background(old), seats, 0.0, AGEING) == (old, seats[0])


def test_batch_work_that_starves_goes_first_and_holds_up_the_line_until_it_can() -> None:
    batch, online = ticket(1, Priority.BATCH, places=2), ticket(2, Priority.HIGH)
    starving = Background(batch, starves=True, reserved=4)
    assert next_grant([online], starving, [Seats("a", 4, 2)], 0.0, AGEING) == (batch, Seats("a", 4, 2))
    assert next_grant([online], starving, [Seats("a", 4, 3)], 0.0, AGEING) is None


@given(st.integers(0, 12), st.integers(0, 8), st.integers(1, 4), st.integers(1, 8), st.integers(0, 8))
def test_batch_work_leaves_what_is_reserved(peak: int, batch: int, places: int, slots: int, online: int) -> None:
    kept = reserved(peak, slots)
    assert kept == (min(slots, peak + 1) if peak else 0)
    in_use = min(slots, batch + online)
    head = ticket(1, Priority.BATCH, places=places)
    grant = next_grant([], Background(head, running=batch, reserved=kept), [Seats("a", slots, in_use)], 0.0, AGEING)
    taken = min(places, slots)
    assert (grant is not None) == (batch + taken <= slots - kept and in_use + taken <= slots)


@pytest.mark.parametrize(
    ("room", "running", "places", "granted"),
    [(None, 3, 1, True), (0, 0, 1, False), (1, 0, 1, True), (1, 1, 1, False), (3, 1, 2, True), (2, 1, 2, False)],
)
def test_batch_work_stays_within_the_room_on_its_device(
    room: int | None, running: int, places: int, *, granted: bool
) -> None:
    background = Background(ticket(1, Priority.BATCH, places=places), running=running, room=room)
    assert (next_grant([], background, [Seats("a", 8, running)], 0.0, AGEING) is not None) == granted


def test_one_that_needs_more_than_the_room_goes_alone_and_one_that_starves_goes_without_any() -> None:
    seats, large = [Seats("a", 8, 0)], ticket(1, Priority.BATCH, places=4)
    assert next_grant([], Background(large, room=1), seats, 0.0, AGEING) is not None
    assert next_grant([], Background(large, room=0), seats, 0.0, AGEING) is None
    assert next_grant([], Background(large, room=0, starves=True), seats, 0.0, AGEING) is not None


def test_those_who_step_aside_are_the_newest_that_lose_nothing_by_it() -> None:
    running = [ticket(number, Priority.BATCH) for number in range(5)]
    for one in running:
        one.taken, one.yields = 1, one.number != 3
    running[4].spared = True
    assert to_step_aside(running, None) == []
    assert to_step_aside(running, 5) == []
    assert to_step_aside(running, 4) == [running[2]]
    assert to_step_aside(running, 0) == [running[2], running[1], running[0]]


RUNNING = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=10)


@given(TICKETS, RUNNING, st.lists(st.integers(0, 3), min_size=4, max_size=4), SEATS, st.floats(100, 200))
def test_those_who_go_are_the_newest_and_as_few_as_will_do(
    online: list[Ticket], rows: list[tuple[int, int]], coming: list[int], seats: list[Seats], now: float
) -> None:
    running = [
        Ticket(100 - n, "model", Priority.BATCH, places, 0.0, f"replica_{replica}", places)
        for n, (replica, places) in enumerate(rows)
    ]
    returning = {f"replica_{n}": count for n, count in enumerate(coming)}
    gone = to_preempt(online, running, returning, seats, now, AGEING)
    assert len({one.number for one in gone}) == len(gone)
    for seat in seats:
        here = [one for one in running if one.replica_id == seat.replica_id]
        assert [one for one in gone if one.replica_id == seat.replica_id] == here[: sum(one in gone for one in here)]
    assert {one.replica_id for one in gone} <= {seat.replica_id for seat in seats}
    assert len(gone) <= sum(one.places for one in online)
    free = sum(seat.free for seat in seats) + sum(returning.get(seat.replica_id, 0) for seat in seats)
    if all(one.places == 1 for one in [*online, *running]):
        here = [one for one in running if one.replica_id in {seat.replica_id for seat in seats}]
        assert len(gone) == min(len(here), max(0, len(online) - free))


def test_one_that_needs_several_places_gets_them_on_the_replica_where_the_fewest_go() -> None:
    seats = [Seats("a", 4, 4), Seats("b", 4, 3)]
    running = [
        ticket(9, Priority.BATCH), ticket(8, Priority.BATCH), ticket(7, Priority.BATCH), ticket(6, Priority.BATCH)
    ]  # fmt: skip
    for one, replica in zip(running, "abab", strict=True):
        one.replica_id, one.taken = replica, 1
    gone = to_preempt([ticket(1, places=2)], running, {}, seats, 0.0, AGEING)
    assert [one.number for one in gone] == [8]
    assert to_preempt([ticket(1, places=4), ticket(2)], running, {}, seats, 0.0, AGEING) == []
    assert to_preempt([ticket(1)], running, {"a": 1}, seats[:1], 0.0, AGEING) == []


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 4)), max_size=60), st.floats(0, 12))
def test_the_peak_is_the_highest_level_of_the_window(steps: list[tuple[int, float]], later: float) -> None:
    window, now, level = 5.0, 0.0, 0
    demand, spans, since = Demand(window), [], 0.0
    for change, pause in steps:
        change = max(change, -level)
        demand.change(change, now)
        spans.append((level, since, now))
        level, since = level + change, now
        now += pause
    now += later
    seen = [value for value, _, ended in spans if ended + window > now and value > 0]
    assert demand.peak(now) == max([level, *seen])
    due = demand.next_drop()
    if due is not None and demand.peak(now) > level:
        assert due > now
        assert demand.peak(due) < max([level, *seen])

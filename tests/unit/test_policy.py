"""Who goes next, and where: the pure decisions."""

from hypothesis import given
from hypothesis import strategies as st

from forebay.inference import Priority
from forebay.scheduler.policy import next_grant, position, rank, retry_after_seconds
from forebay.scheduler.queue import Line, Ticket
from forebay.scheduler.router import Seats, pick_replica

AGEING = 30.0


def ticket(number: int, priority: Priority = Priority.DEFAULT, *, places: int = 1, joined_at: float = 0.0) -> Ticket:
    return Ticket(number, "model", priority, places, joined_at)


TICKETS = st.lists(
    st.builds(
        lambda priority, places, joined_at: (priority, places, joined_at),
        st.sampled_from(Priority),
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
    old = ticket(1, Priority.BATCH, joined_at=0.0)
    new = ticket(2, Priority.HIGH, joined_at=89.0)
    assert rank(new, 89.0, AGEING) < rank(old, 89.0, AGEING)
    late = ticket(3, Priority.HIGH, joined_at=90.0)
    assert rank(old, 90.0, AGEING) < rank(late, 90.0, AGEING)


def test_one_that_needs_many_places_holds_up_the_line_until_they_are_free() -> None:
    waiting = [ticket(1, places=4), ticket(2)]
    assert next_grant(waiting, [Seats("a", 4, 1)], 0.0, AGEING) is None
    grant = next_grant(waiting, [Seats("a", 4, 0)], 0.0, AGEING)
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
    grant = next_grant(waiting, seats, now, AGEING)
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


def test_a_line_is_full_at_its_places_and_leaving_makes_room() -> None:
    line = Line(2)
    tickets = [ticket(1), ticket(2)]
    for one in tickets:
        assert not line.full
        line.join(one)
    assert line.full
    line.leave(tickets[0])
    line.leave(tickets[0])
    assert len(line) == 1
    assert list(line) == [tickets[1]]

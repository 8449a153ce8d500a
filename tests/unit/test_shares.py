"""Turns between projects: shares by weight, one round for a newcomer, nobody forgotten, a full line that has room."""

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.inference import Priority
from forebay.scheduler.policy import Background, in_order, next_grant, position, rank, to_turn_away
from forebay.scheduler.queue import Line, Ticket
from forebay.scheduler.router import Seats
from forebay.scheduler.shares import Shares

AGEING = 15.0
ONLINE = [priority for priority in Priority if priority is not Priority.BATCH]
PROJECTS = ["a", "b", "c", "d"]


class OneSlot:
    """A line for a model of one slot: whoever goes is served before the next is chosen."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.line = Line(lambda project: (weights or {}).get(project, 1.0))
        self.now = 0.0
        self.number = 0

    def join(
        self, project: str, count: int = 1, priority: Priority = Priority.DEFAULT, places: int = 1
    ) -> list[Ticket]:
        tickets = []
        for _ in range(count):
            self.number += 1
            tickets.append(Ticket(self.number, "model", priority, places, self.now, project=project))
            self.line.join(tickets[-1])
        return tickets

    def grant(self) -> Ticket | None:
        grant = next_grant(self.line, Background(), [Seats("r", 8, 0)], self.now, AGEING, self.line.shares)
        if grant is None:
            return None
        grant[0].taken = grant[0].places
        self.line.serve(grant[0])
        return grant[0]

    def serve(self) -> Ticket | None:
        ticket = self.grant()
        if ticket is not None:
            self.line.end(ticket, 1.0)
        return ticket

    def served(self, count: int, seconds: float = 0.0) -> list[str]:
        """The projects of the next so many, each of which takes so long."""
        found = []
        for _ in range(count):
            ticket = self.serve()
            assert ticket is not None
            found.append(ticket.project)
            self.now += seconds
        return found


class Slots(OneSlot):
    """A line for a model of several slots."""

    def __init__(self, count: int, weights: Mapping[str, float] | None = None) -> None:
        super().__init__(weights)
        self.count = count
        self.running: list[tuple[float, int, Ticket, float]] = []

    def begin(self, takes: Callable[[Ticket], float]) -> Iterator[tuple[Ticket, float]]:
        """Who gets the slots that are free, and how long each is going to take."""
        while len(self.running) < self.count and (ticket := self.grant()) is not None:
            seconds = takes(ticket)
            heapq.heappush(self.running, (self.now + seconds, ticket.number, ticket, seconds))
            yield ticket, seconds

    def end(self, before: float = math.inf) -> Ticket | None:
        """The next that ends; none if there is none by then."""
        if not self.running or self.running[0][0] > before:
            self.now = before
            return None
        self.now, _, ticket, seconds = heapq.heappop(self.running)
        self.line.end(ticket, seconds)
        return ticket


@given(st.integers(1, 120), st.sampled_from([0.0, 1.0, 20.0]))
def test_of_weights_one_to_three_each_gets_its_share_to_the_ticket(count: int, seconds: float) -> None:
    hall = OneSlot({"a": 1, "b": 3})
    hall.join("a", 100)
    hall.join("b", 100)
    got = Counter(hall.served(count, seconds))
    assert abs(got["b"] - 0.75 * count) <= 1


@given(st.dictionaries(st.sampled_from(PROJECTS), st.floats(0.1, 10), min_size=2), st.integers(1, 60))
def test_who_waits_is_never_behind_another_by_more_than_a_turn_of_each(weights: dict[str, float], count: int) -> None:
    hall = OneSlot(weights)
    for project in weights:
        hall.join(project, count)
    got = Counter(hall.served(count, 5.0))
    for one, other in ((a, b) for a in weights for b in weights):
        assert got[one] / weights[one] - got[other] / weights[other] <= 1 / weights[one] + 1 / weights[other] + 1e-9


@given(st.integers(1, 8), st.integers(0, 40), st.sampled_from([0.0, 2.0, 50.0]))
def test_a_newcomer_waits_one_round_at_most_however_long_the_others_have(
    others: int, before: int, seconds: float
) -> None:
    hall = OneSlot()
    for number in range(others):
        hall.join(f"flood{number}", 100)
    hall.served(before, seconds)
    (ticket,) = hall.join("new")
    place = position(ticket, hall.line, hall.now, AGEING, hall.line.shares)
    assert hall.served(place)[-1] == "new"
    assert place <= others + 1


def test_a_long_line_that_has_aged_lifts_nobody_over_who_comes() -> None:
    hall = OneSlot()
    hall.join("flood", 100)
    hall.served(10, 10.0)  # all of it has waited for six levels
    hall.join("light", priority=Priority.HIGH)
    hall.join("other")
    assert hall.served(4) == ["light", "other", "flood", "flood"]


def test_a_line_of_a_higher_priority_is_shared_with_whoever_has_aged_in_it() -> None:
    hall = OneSlot()
    hall.join("low", 100, Priority.LOW)
    got = []
    for _ in range(60):
        hall.join("high", 2, Priority.HIGH)
        got += hall.served(1, 1.0)
    assert set(got[:30]) == {"high"}, "two levels"
    assert abs(got[30:].count("low") - 15) <= 1


def test_in_one_project_the_order_is_that_of_priority_and_age() -> None:
    hall = OneSlot()
    old, mild = hall.join("a", priority=Priority.LOW), hall.join("a")
    hall.now = 2 * AGEING
    new = hall.join("a", priority=Priority.HIGH)
    order = list(in_order(hall.line, hall.now, AGEING, hall.line.shares))
    assert order == [*mild, *old, *new]


def test_nobody_starves_and_nothing_stands_still(*, prove: bool) -> None:
    """Random traffic above what can be served, then none: everybody gets a turn before long."""
    for seed in range(1000 if prove else 20):
        serve_all_that_comes(random.Random(seed))


def serve_all_that_comes(rolls: random.Random) -> None:
    hall = OneSlot({project: rolls.choice([0.25, 1.0, 4.0]) for project in PROJECTS})
    waits: list[float] = []
    for step in range(400):
        if step < 200:
            for _ in range(rolls.randint(0, 3)):
                hall.join(rolls.choice("aaaabcd"), 1, rolls.choice(ONLINE), rolls.randint(1, 4))
        longest = len(hall.line)
        ticket = hall.serve()
        assert (ticket is None) == (longest == 0), "work for nobody"
        if ticket is not None:
            waits.append(hall.now - ticket.joined_at)
        hall.now += 1.0
    assert len(hall.line) == 0
    assert len(hall.line.shares) == 0, "what nobody waits for is forgotten"
    assert max(waits) < 400


@given(
    st.lists(
        st.tuples(st.sampled_from(PROJECTS), st.sampled_from(ONLINE), st.integers(1, 4), st.floats(0, 100)),
        max_size=16,
    ),
    st.lists(st.tuples(st.sampled_from(PROJECTS), st.integers(1, 4)), max_size=8),
)
def test_everybody_has_one_place_in_the_order(
    rows: list[tuple[str, Priority, int, float]], served: list[tuple[str, int]]
) -> None:
    shares = Shares(lambda project: 0.5 + (project == "b"))
    for project, cost in served:
        shares.serve(project, cost)
    waiting = [Ticket(n, "m", priority, k, at, project=p) for n, (p, priority, k, at) in enumerate(rows)]
    before = {project: shares.start(project) for project in PROJECTS}
    places = [position(one, waiting, 100.0, AGEING, shares) for one in waiting]
    assert sorted(places) == list(range(1, len(waiting) + 1))
    assert {project: shares.start(project) for project in PROJECTS} == before, "a look changes nothing"


def in_order_by_looking_at_everybody(waiting: list[Ticket], now: float, shares: Shares) -> list[Ticket]:
    """What `in_order` says in its description, taken at its word."""
    ends = {project: shares.start(project) for project in PROJECTS}
    time, order, left = shares.now, list[Ticket](), list(waiting)
    while left:
        heads = [min(same, key=lambda one: rank(one, now, AGEING)) for same in by_project(left)]
        starts = {project: max(time, end) for project, end in ends.items()}

        def claim(ticket: Ticket, starts: dict[str, float] = starts, time: float = time) -> tuple[float, float, int]:
            due = starts[ticket.project] <= time
            level = rank(ticket, now, AGEING)[0] if due else ticket.priority
            return (level, starts[ticket.project], ticket.number)

        first = min(heads, key=claim)
        time = starts[first.project]
        ends[first.project] = time + first.places / shares.weight(first.project)
        left.remove(first)
        order.append(first)
    return order


def by_project(waiting: list[Ticket]) -> list[list[Ticket]]:
    same: dict[str, list[Ticket]] = {}
    for ticket in waiting:
        same.setdefault(ticket.project, []).append(ticket)
    return list(same.values())


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from(PROJECTS), st.sampled_from(ONLINE), st.integers(1, 4), st.floats(0, 100)),
        max_size=30,
    ),
    st.lists(st.tuples(st.sampled_from(PROJECTS), st.integers(1, 4)), max_size=8),
)
def test_the_order_is_what_it_says(rows: list[tuple[str, Priority, int, float]], served: list[tuple[str, int]]) -> None:
    shares = Shares(lambda project: 0.5 + (project == "b"))
    for project, cost in served:
        shares.serve(project, cost)
    waiting = [Ticket(n, "m", priority, k, at, project=p) for n, (p, priority, k, at) in enumerate(rows)]
    assert list(in_order(waiting, 100.0, AGEING, shares)) == in_order_by_looking_at_everybody(waiting, 100.0, shares)


def test_projects_that_come_once_are_forgotten_when_the_next_round_begins() -> None:
    shares = Shares()
    for number in range(1000):
        shares.serve(f"once{number}", 1)
        shares.serve("steady", 1)
        assert len(shares) <= 3
        shares.end(f"once{number}")
        shares.end("steady")


def test_what_was_taken_back_is_on_nobodys_account() -> None:
    hall = OneSlot()
    first, *_ = hall.join("a", 3, Priority.BATCH)
    hall.join("b", 3, Priority.BATCH)
    first.taken = 1
    hall.line.serve(first)
    before = hall.line.shares.start("a")
    first.preempted = True
    hall.line.end(first, 1.0)
    assert hall.line.shares.start("a") < before == 1


def test_beside_a_flood_nearly_every_request_is_as_quick_as_alone(*, prove: bool) -> None:
    """Eight slots, and a line in which the flood has long aged."""
    for seed in range(100 if prove else 4):
        alone = [taken for taken, _ in latencies(random.Random(seed), flood=0)]
        beside = latencies(random.Random(seed), flood=300)
        p99 = sorted(taken for taken, _ in beside)[int(len(beside) * 0.99)]
        assert p99 <= 1.5 * sorted(alone)[int(len(alone) * 0.99)]
        assert max(flooded for _, flooded in beside) <= 1, "more than a turn for each of its own before it, and one"


LENGTHS = {
    "a minute each": [60.0],
    "first long ones, then short ones": [60.0] * 64 + [1.0] * 30,
    "some long ones, then short ones": [60.0] * 8 + [1.0] * 30,
    "in turns": [60.0, 1.0],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("slots", [4, 16])
@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75)])
def test_places_are_shared_by_the_time_that_they_are_held_however_long_requests_are(
    weight: float, share: float, slots: int, lengths: list[float]
) -> None:
    """Both projects always have more in line, one of requests of a second."""
    hall, long, held, joined = Slots(slots, {"short": weight}), itertools.cycle(lengths), Counter[str](), False
    hall.join("long", 2)
    while held.total() < 5_000 * slots:
        for ticket, seconds in hall.begin(lambda ticket: next(long) if ticket.project == "long" else 1.0):
            hall.join(ticket.project)
            if joined:
                held[ticket.project] += round(seconds)
        hall.end()
        if hall.now >= 120 and not joined:
            joined = bool(hall.join("short", 2))
    assert abs(held["short"] / held.total() - share) < 0.05


def test_who_asks_for_less_than_his_share_does_not_wait_for_what_was_guessed_too_low(*, prove: bool) -> None:
    """Eight slots and a flood of requests of a second; one of ten of the other's takes thirty."""
    for seed in range(100 if prove else 4):
        chance, hall, waits, comes = random.Random(seed), Slots(8), list[float](), 0.0
        hall.join("flood", 2)
        while len(waits) < 1000:
            for ticket, _ in hall.begin(partial(now_and_then_long, chance)):
                if ticket.project == "light":
                    waits.append(hall.now - ticket.joined_at)
                else:
                    hall.join("flood")
            if hall.end(comes) is None:
                hall.join("light")
                comes += chance.expovariate(0.25)
        assert sorted(waits)[990] <= 3, "with whatever was missing on its account it would be seven"


def now_and_then_long(chance: random.Random, ticket: Ticket) -> float:
    return 30.0 if ticket.project == "light" and chance.random() < 0.1 else 1.0


def test_what_fails_at_once_does_not_go_before_others_for_ever() -> None:
    hall = Slots(1)
    hall.join("steady", 10)
    hall.join("failing", 1_000)
    order = []
    while "steady" in {ticket.project for ticket in hall.line}:
        order += [
            ticket.project for ticket, _ in hall.begin(lambda ticket: 0.01 if ticket.project == "steady" else 0.0)
        ]
        hall.end()
    runs = [len(list(same)) for project, same in itertools.groupby(order) if project == "failing"]
    assert max(runs) <= 12


def test_how_long_requests_of_projects_take_is_remembered_of_so_many() -> None:
    shares = Shares()
    for number in range(3000):
        shares.learn(f"p{number}", 1.0 + number)
    assert shares.cost("p2999", 2) == 6000
    assert shares.cost("p0", 1) == shares.cost("never seen", 1) > 2900, "as long as those of all lately"


def latencies(chance: random.Random, flood: int) -> list[tuple[float, int]]:
    """Of requests that come now and then how long each takes, and how many more of a flood than of its own go before."""
    slots, hall, ends, found, overtook = 8, OneSlot(), list[tuple[float, int, str]](), list[tuple[float, int]](), 0
    joined: dict[int, tuple[float, int]] = {}
    hall.join("flood", flood)
    comes = chance.expovariate(0.8)
    while len(found) < 200:
        while len(ends) < slots and (ticket := hall.serve()) is not None:
            took = chance.uniform(0.5, 1.5)
            heapq.heappush(ends, (hall.now + took, ticket.number, ticket.project))
            overtook += ticket.project == "flood"
            if ticket.project == "light":
                came, before = joined.pop(ticket.number)
                found.append((hall.now - came + took, overtook - before))
        if ends and ends[0][0] <= comes:
            hall.now, _, project = heapq.heappop(ends)
            hall.join("flood", project == "flood")  # who is answered asks again
        else:
            hall.now = comes
            (ticket,) = hall.join("light")
            joined[ticket.number] = (comes, overtook + len(joined))
            comes += chance.expovariate(0.8)
    return found


def full(*projects: str, weights: Mapping[str, float] | None = None) -> OneSlot:
    hall = OneSlot(weights)
    for project in projects:
        hall.join(project)
    return hall


def turned_away(hall: OneSlot, newcomer: Ticket) -> Ticket:
    return to_turn_away(newcomer, list(hall.line), hall.now, AGEING, hall.line.shares)


def test_who_holds_most_of_a_full_line_makes_room_for_a_newcomer_and_is_not_let_in_again() -> None:
    hall = full("a", "a", "a")
    urgent = hall.join("a", priority=Priority.HIGH)
    (new,) = hall.join("b")
    gone = turned_away(hall, new)
    assert gone.number == 3, "the last in rank"
    hall.line.leave(gone)
    (again,) = hall.join("a", priority=Priority.HIGH)
    assert turned_away(hall, again) is not urgent[0]
    assert turned_away(hall, again).project == "a"


def test_equals_turn_nobody_away_but_themselves_and_weight_counts() -> None:
    hall = full("a", "a", "b")
    (new,) = hall.join("b")
    assert turned_away(hall, new) is new
    hall = full("a", "a", "b", weights={"a": 4})
    (new,) = hall.join("b")
    assert turned_away(hall, new) is new, "four times as much is the others' right"


def test_what_was_let_in_before_keeps_its_place() -> None:
    hall = full("a", "a", "a")
    for ticket in hall.line:
        ticket.further = True
    (new,) = hall.join("b")
    assert turned_away(hall, new) is new


@given(st.lists(st.sampled_from("aaaabc"), min_size=1, max_size=60), st.integers(1, 8))
def test_no_project_is_kept_out_by_the_line_of_another(comers: list[str], places: int) -> None:
    hall, turned = OneSlot(), Counter[str]()
    for project in comers:
        (new,) = hall.join(project)
        if len(hall.line) > places:
            gone = turned_away(hall, new)
            turned[gone.project] += 1
            hall.line.leave(gone)
        in_line = Counter(ticket.project for ticket in hall.line)
        assert len(hall.line) <= places
        for one in turned:
            assert in_line[one] + 1 >= max(in_line.values()), "turned away for one who has more"

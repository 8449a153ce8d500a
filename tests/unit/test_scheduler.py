"""The hallway under every interleaving: hypothesis drives joins, grants, preemptions, cancels, crashes and timeouts.

The machine room is a list of replicas that the test opens and closes; their engines stop when the test says so.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from forebay.errors import EngineUnavailable, Overloaded, Quarantined, ShuttingDown
from forebay.inference import Priority
from forebay.replicas.replica import Replica, ReplicaState
from forebay.scheduler.hall import Limits
from forebay.scheduler.policy import reserved
from forebay.scheduler.scheduler import Scheduler
from forebay.server_config import SchedulerSettings
from forebay.telemetry import Metrics
from tests.support.clock import FakeClock
from tests.support.hallway import MODEL, PLACES, QUEUE_SECONDS, SETTINGS, Bench, Room, Visitor, request, settle


class Hallway(RuleBasedStateMachine):
    """Any order of events; the invariants hold after each."""

    visitors = Bundle("visitors")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = FakeClock()
        self.stack = AsyncExitStack()
        self.everybody: list[Visitor] = []
        self.number = 0
        self.waited_before: list[Visitor] = []
        self.batch_before: set[int] = set()
        self.preempted_before = 0
        self.came = 0

    def drive(self, step: Coroutine[Any, Any, Any] | Callable[[], None] | None = None) -> Any:
        """Do `step` on the event loop and let everybody react to it."""

        async def settle() -> Any:
            value = step() if callable(step) else await step if step is not None else None
            for _ in range(20):
                await asyncio.sleep(0)
            return value

        return self.loop.run_until_complete(settle())

    @initialize(slots=st.lists(st.integers(1, 3), min_size=1, max_size=2))
    def build(self, slots: list[int]) -> None:
        async def make() -> None:
            self.session = await self.stack.enter_async_context(aiohttp.ClientSession())
            self.room = Room(self.clock)
            self.scheduler = Scheduler(
                self.room,
                {MODEL: Limits(sum(slots), PLACES, QUEUE_SECONDS)},
                SETTINGS,
                1.0,
                self.clock,
                Metrics(),
            )
            for count in slots:
                self.room.open(count, self.session)

        self.drive(make())
        self.hall = self.scheduler._halls[MODEL]

    @rule(
        target=visitors,
        priority=st.sampled_from([*Priority, Priority.BATCH, Priority.BATCH]),
        places=st.sampled_from([1, 1, 1, 1, 1, 1, 1, 2, 5]),
        project=st.sampled_from(["one", "one", "two"]),
        runs=st.sampled_from([True, True, True, False]),
    )
    def join(self, priority: Priority, places: int, project: str, *, runs: bool) -> Visitor:
        self.number += 1

        async def come() -> Visitor:
            return Visitor(self.scheduler, request(self.number, priority, places, project), runs=runs)

        before = self.online_waiting
        visitor: Visitor = self.drive(come())
        self.everybody.append(visitor)
        self.came += not visitor.batch
        gone = [other for other in [*before, visitor] if isinstance(other.error, Overloaded)]
        assert len(gone) <= 1, "one comes, one goes"
        for other in gone:
            assert len(self.online_waiting) >= PLACES, "turned away by batch work"
            assert self.in_line(other.wanted.project) + 1 >= self.in_line(project), "turned away for one who has more"
        return visitor

    @rule(target=visitors, size=st.integers(3, 7), priority=st.sampled_from([Priority.DEFAULT, Priority.BATCH]))
    def crowd(self, size: int, priority: Priority) -> Any:
        return multiple(*(self.join(priority, 1, "one", runs=True) for _ in range(size)))

    @rule(visitor=consumes(visitors))
    def leave(self, visitor: Visitor) -> None:
        self.drive(visitor.leave)

    @rule(visitor=consumes(visitors))
    def cancel(self, visitor: Visitor) -> None:
        self.drive(lambda: visitor.task.cancel() and None)

    @rule(first=consumes(visitors), ticks=st.integers(0, 5))
    def cancel_in_the_moment_of_a_grant(self, first: Visitor, ticks: int) -> None:
        """Somebody leaves; whoever may be next is cancelled so many turns of the loop later."""
        waiting = [visitor for visitor in self.everybody if visitor.waits]

        async def at_once() -> None:
            first.leave()
            for _ in range(ticks):
                await asyncio.sleep(0)
            for visitor in waiting[:1]:
                visitor.task.cancel()

        self.drive(at_once())

    @rule(first=consumes(visitors), ticks=st.integers(0, 5), size=st.integers(1, 3))
    def come_in_the_moment_of_a_grant(self, first: Visitor, ticks: int, size: int) -> None:
        """Somebody leaves; others come online so many turns of the loop later."""
        self.number += size
        self.came += size

        async def at_once() -> None:
            first.leave()
            for _ in range(ticks):
                await asyncio.sleep(0)
            self.everybody += [Visitor(self.scheduler, request(self.number)) for _ in range(size)]

        self.drive(at_once())

    @rule(ticks=st.integers(0, 5), end=st.sampled_from(["leave", "cancel"]))
    def end_in_the_moment_of_a_preemption(self, ticks: int, end: str) -> None:
        """Somebody comes online; the newest of batch that runs ends by itself so many turns of the loop later."""
        self.number += 1
        self.came += 1
        running = [visitor for visitor in self.everybody if visitor.batch and visitor.permit is not None]

        async def at_once() -> None:
            self.everybody.append(Visitor(self.scheduler, request(self.number)))
            for _ in range(ticks):
                await asyncio.sleep(0)
            for visitor in running[-1:]:
                visitor.leave() if end == "leave" else visitor.task.cancel()

        self.drive(at_once())

    @rule(index=st.integers(0, 5))
    def engine_stops(self, index: int) -> None:
        """An engine notices that a request was taken from it."""
        stopping = [replica for replica in self.room.all if replica.stops]
        if stopping:
            self.drive(stopping[index % len(stopping)].stop_one)

    @rule(seconds=st.sampled_from([1.0, 5.0, 31.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.drive(lambda: self.clock.advance(seconds))

    @rule(index=st.integers(0, 5))
    def replica_dies(self, index: int) -> None:
        alive = self.room.replicas(MODEL)
        if alive:
            alive[index % len(alive)].state = ReplicaState.STOPPED
            self.drive(lambda: self.scheduler.changed(MODEL))

    @rule(slots=st.integers(1, 3))
    def replica_comes(self, slots: int) -> None:
        if len(self.room.replicas(MODEL)) < 3:
            self.drive(lambda: self.open(slots))

    def open(self, slots: int) -> None:
        self.room.open(slots, self.session)
        self.scheduler.changed(MODEL)

    @rule()
    @precondition(lambda self: self.number > 3)
    def nothing_can_be_started(self) -> None:
        self.room.problem = EngineUnavailable()
        self.drive(lambda: self.scheduler.changed(MODEL))
        assert self.scheduler.load(MODEL)[1] == 0
        assert not [visitor for visitor in self.everybody if visitor.waits]
        self.room.problem = None

    @property
    def online_waiting(self) -> list[Visitor]:
        return [visitor for visitor in self.everybody if visitor.waits and not visitor.batch]

    def in_line(self, project: str) -> int:
        return sum(visitor.wanted.project == project for visitor in self.online_waiting)

    @property
    def only_single_places(self) -> bool:
        return all(visitor.wanted.places == 1 for visitor in self.everybody)

    def seated(self, replica: Replica) -> int:
        """The places on `replica` that a visitor has or that its engine has not given back."""
        held = [v.wanted for v in self.everybody if v.permit is not None and v.permit.replica is replica]
        stopping = [wanted for wanted, _ in replica.stops] if isinstance(replica, Bench) else []
        return sum(min(wanted.places, replica.slots) for wanted in held + stopping)

    @invariant()
    @precondition(lambda self: hasattr(self, "hall"))
    def every_place_is_counted_once_and_none_beyond_capacity(self) -> None:
        for replica in self.room.all:
            assert self.seated(replica) == self.hall.running.get(replica.id, 0) <= replica.slots

    @invariant()
    def nothing_unforeseen_happens(self) -> None:
        assert [visitor.bug for visitor in self.everybody if visitor.bug] == []

    @invariant()
    @precondition(lambda self: hasattr(self, "hall"))
    def nobody_waits_beside_a_free_place(self) -> None:
        running, waiting = self.scheduler.load(MODEL)
        assert waiting == len(self.online_waiting)
        slots = sum(replica.slots for replica in self.room.replicas(MODEL))
        in_use = sum(self.seated(replica) for replica in self.room.replicas(MODEL))
        if not self.only_single_places:
            return
        if waiting and not self.batch_starves:
            assert in_use == slots
        batch = sum(ticket.taken for ticket in self.hall.batch.values())
        may = slots - reserved(self.hall.demand.peak(self.clock.monotonic()), slots)
        if len(self.hall.backlog) and not waiting:
            assert in_use == slots or batch >= may or running != in_use

    @property
    def batch_starves(self) -> bool:
        since = self.hall.kept_out_since
        return since is not None and self.clock.monotonic() - since >= SETTINGS.batch_floor_seconds

    @invariant()
    @precondition(lambda self: hasattr(self, "hall"))
    def the_line_is_bounded(self) -> None:
        assert len(self.hall.line) <= PLACES + sum(replica.slots for replica in self.room.all)

    @invariant()
    @precondition(lambda self: hasattr(self, "hall"))
    def batch_work_makes_room_and_no_more_than_that(self) -> None:
        alive = {replica.id for replica in self.room.replicas(MODEL)}
        running = [ticket for ticket in self.hall.batch.values() if ticket.number not in self.hall.leaving]
        returning = [ticket for ticket in self.hall.leaving.values() if ticket.replica_id in alive]
        spared = [ticket for ticket in running if ticket.spared]
        could_go = [ticket for ticket in running if not ticket.spared and ticket.replica_id in alive]
        preempted = sum(visitor.preempted for visitor in self.everybody)
        if self.only_single_places:
            assert not could_go or len(self.online_waiting) <= len(returning), "somebody waits for batch work"
            assert preempted - self.preempted_before <= len(self.waited_before) + self.came, "more went than had to"
        assert len(spared) <= 1
        self.preempted_before, self.came = preempted, 0

    @invariant()
    @precondition(lambda self: hasattr(self, "hall"))
    def online_goes_first(self) -> None:
        still = [visitor for visitor in self.waited_before if visitor.waits]
        newly = [ticket for number, ticket in self.hall.batch.items() if number not in self.batch_before]
        if still and self.only_single_places:
            assert [ticket for ticket in newly if not ticket.spared] == [], "batch work went before online traffic"
        self.waited_before, self.batch_before = self.online_waiting, set(self.hall.batch)

    def teardown(self) -> None:
        if hasattr(self, "hall"):
            self.drive(lambda: self.open(3))
            for visitor in self.everybody:
                self.drive(visitor.leave)
            for _ in range(len(self.everybody) + 3):
                for replica in self.room.all:
                    while replica.stops:
                        self.drive(replica.stop_one)
                self.drive(lambda: self.clock.advance(SETTINGS.batch_floor_seconds))
            assert [visitor.wanted for visitor in self.everybody if not visitor.task.done()] == [], "forgotten"
            assert self.scheduler.load(MODEL) == (0, 0), "a place leaked"
            assert self.hall.demand.peak(self.clock.monotonic()) == 0
            assert (self.hall.batch, self.hall.permits, self.hall.leaving, self.hall.alarm) == ({}, {}, {}, None)
            self.drive(self.stack.aclose())
        self.loop.close()


TestHallway = Hallway.TestCase
TestHallway.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.fixture
async def hall() -> Any:
    async with aiohttp.ClientSession() as session:
        clock = FakeClock()
        room = Room(clock)
        limits = {MODEL: Limits(1, 2, QUEUE_SECONDS)}
        scheduler = Scheduler(room, limits, SETTINGS, 1.0, clock, Metrics())
        room.open(1, session)
        yield room, scheduler, clock


async def test_a_full_line_turns_away_with_a_time_to_come_back(hall: tuple[Room, Scheduler, FakeClock]) -> None:
    _, scheduler, _ = hall
    visitors = [Visitor(scheduler, request(n)) for n in range(4)]
    await settle()
    assert isinstance(visitors[3].error, Overloaded)
    assert 1 <= (visitors[3].error.retry_after_seconds or 0) <= 120
    assert scheduler.load(MODEL) == (1, 2)
    for visitor in visitors:
        visitor.leave()
        await settle()
    assert scheduler.load(MODEL) == (0, 0)


async def test_one_project_that_fills_the_line_keeps_no_other_out_and_no_other_waits_behind_all_of_it(
    hall: tuple[Room, Scheduler, FakeClock],
) -> None:
    _, scheduler, _ = hall
    flood = [Visitor(scheduler, request(n, project="flood")) for n in range(3)]
    await settle()
    light = Visitor(scheduler, request(9, project="light"))
    await settle()
    assert isinstance(flood[2].error, Overloaded), "the last of those who have most of the line"
    assert scheduler.load(MODEL) == (1, 2)
    flood[0].leave()
    await settle()
    assert light.permit is not None
    assert flood[1].waits
    light.leave()
    await settle()
    assert flood[1].permit is not None
    flood[1].leave()
    await settle()
    assert scheduler.load(MODEL) == (0, 0)


async def test_batch_lines_of_projects_take_turns_by_weight() -> None:
    async with aiohttp.ClientSession() as session:
        clock = FakeClock()
        room = Room(clock)
        weights = {"heavy": 3.0}
        scheduler = Scheduler(
            room, {MODEL: Limits(1, 2, QUEUE_SECONDS)}, SETTINGS, 1.0, clock, Metrics(), lambda p: weights.get(p, 1.0)
        )
        room.open(1, session)
        first = Visitor(scheduler, request(0, Priority.BATCH, project="light"))
        waiting = [Visitor(scheduler, request(n, Priority.BATCH, project="light")) for n in range(1, 10)]
        waiting += [Visitor(scheduler, request(n, Priority.BATCH, project="heavy")) for n in range(10, 20)]
        await settle()
        order: list[str] = []
        running = first
        while waiting:
            running.leave()
            await settle()
            (running,) = [visitor for visitor in waiting if visitor.permit is not None]
            waiting.remove(running)
            order.append(running.wanted.project)
        running.leave()
        await settle()
        assert abs(order[:12].count("heavy") - 9) <= 1
        assert scheduler.load(MODEL) == (0, 0)


@pytest.mark.parametrize("priority", [Priority.DEFAULT, Priority.BATCH])
async def test_a_project_of_long_requests_gets_no_more_of_the_time_than_one_of_short_ones(priority: Priority) -> None:
    async with aiohttp.ClientSession() as session:
        clock, seconds = FakeClock(), {"long": 10.0, "short": 1.0}
        room = Room(clock)
        scheduler = Scheduler(room, {MODEL: Limits(1, 60, math.inf)}, SETTINGS, 1.0, clock, Metrics())
        room.open(1, session)
        asked = ["long", *["long"] * 10, *["short"] * 40]
        running, *waiting = (Visitor(scheduler, request(n, priority, project=each)) for n, each in enumerate(asked))
        await settle()
        order: list[str] = []
        while len(order) < 36:
            clock.advance(seconds[running.wanted.project])
            running.leave()
            await settle()
            (running,) = [visitor for visitor in waiting if visitor.permit is not None]
            waiting.remove(running)
            order.append(running.wanted.project)
        for visitor in (running, *waiting):
            visitor.leave()
            await settle()
        late = order[3:]  # by then it is known how long those of each take
        assert late.count("long") == 3, order
        assert scheduler.load(MODEL) == (0, 0)


async def test_a_further_part_finds_room_in_a_full_line(hall: tuple[Room, Scheduler, FakeClock]) -> None:
    _, scheduler, _ = hall
    visitors = [Visitor(scheduler, request(n)) for n in range(3)]
    await settle()

    async def go_on() -> None:
        async with scheduler.admit(request(9), further=True):
            pass

    going_on = asyncio.create_task(go_on())
    late = Visitor(scheduler, request(4))
    await settle()
    assert scheduler.load(MODEL) == (1, 3)
    assert isinstance(late.error, Overloaded)
    for visitor in visitors:
        assert not going_on.done()
        visitor.leave()
        await settle()
    assert going_on.done()
    assert scheduler.load(MODEL) == (0, 0)


async def test_the_wait_in_line_ends_with_queue_timeout(hall: tuple[Room, Scheduler, FakeClock]) -> None:
    _, scheduler, clock = hall
    holder, waiter = Visitor(scheduler, request(1)), Visitor(scheduler, request(2))
    await settle()
    clock.advance(QUEUE_SECONDS + 1)
    await settle()
    assert isinstance(waiter.error, Overloaded)
    assert waiter.error.code == "queue_timeout"
    assert holder.permit is not None
    holder.leave()
    await settle()


async def test_nobody_starves_however_many_go_first(hall: tuple[Room, Scheduler, FakeClock]) -> None:
    _, scheduler, clock = hall
    current = Visitor(scheduler, request(0, Priority.HIGH))
    await settle()
    patient = Visitor(scheduler, request(1, Priority.LOW))
    await settle()
    began = clock.monotonic()
    while patient.permit is None:
        newcomer = Visitor(scheduler, request(2, Priority.HIGH))
        await settle()
        clock.advance(0.5)
        current.leave()
        await settle()
        current = newcomer
        assert patient.error is None
    levels = Priority.LOW - Priority.HIGH
    assert clock.monotonic() - began <= levels * SchedulerSettings().ageing_seconds + 1.0
    for visitor in (patient, current):
        visitor.leave()
        await settle()
    assert scheduler.load(MODEL) == (0, 0)


async def test_a_closed_hallway_admits_nobody(hall: tuple[Room, Scheduler, FakeClock]) -> None:
    _, scheduler, _ = hall
    holder, waiter = Visitor(scheduler, request(1)), Visitor(scheduler, request(2))
    batch = Visitor(scheduler, request(3, Priority.BATCH))
    await settle()
    scheduler.close()
    late = [Visitor(scheduler, request(4)), Visitor(scheduler, request(5, Priority.BATCH))]
    await settle()
    for visitor in (waiter, batch, *late):
        assert isinstance(visitor.error, ShuttingDown)
    holder.leave()
    await settle()


async def test_a_refused_input_never_joins(hall: tuple[Room, Scheduler, FakeClock]) -> None:
    room, scheduler, _ = hall
    room.refused = True
    visitor = Visitor(scheduler, request(1))
    await settle()
    assert isinstance(visitor.error, Quarantined)
    assert scheduler.load(MODEL) == (0, 0)


async def test_whoever_is_turned_away_is_counted_by_reason() -> None:
    clock, metrics = FakeClock(), Metrics()
    room = Room(clock, problem=EngineUnavailable())
    scheduler = Scheduler(room, {MODEL: Limits(1, 2, QUEUE_SECONDS)}, SchedulerSettings(), 1.0, clock, metrics)
    Visitor(scheduler, request(1))
    await settle()
    scheduler.close()
    Visitor(scheduler, request(2))
    await settle()
    for reason in ("engine_unavailable", "shutting_down"):
        labels = {"model": MODEL, "reason": reason}
        assert metrics.registry.get_sample_value("forebay_rejections_total", labels) == 1

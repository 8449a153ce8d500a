"""The hallway under every interleaving: hypothesis drives joins, grants, cancels, crashes, timeouts and stops.

The machine room is a list of real `Replica` values that the test opens and closes; no engine is asked to do anything.
"""

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
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

from forebay.config import SchedulerSettings
from forebay.errors import EngineUnavailable, ForebayError, Overloaded, Quarantined, ShuttingDown
from forebay.inference import Capability, Priority, Request
from forebay.replicas.commands import Traits
from forebay.replicas.postmortem import Quarantine
from forebay.replicas.replica import Replica, ReplicaState
from forebay.scheduler.permit import Permit
from forebay.scheduler.scheduler import Limits, Scheduler
from forebay.telemetry import Metrics
from tests.support.clock import FakeClock

MODEL = "model"
QUEUE_SECONDS = 60.0
PLACES = 4


def request(number: int, priority: Priority = Priority.DEFAULT, places: int = 1) -> Request:
    return Request(f"req_{number}", "default", MODEL, Capability.CHAT, "/", b"{}", priority, places)


@dataclass(slots=True)
class Room:
    """The machine room as the scheduler sees it."""

    clock: FakeClock
    all: list[Replica] = field(default_factory=list)
    problem: ForebayError | None = None
    refused: bool = False

    def replicas(self, model: str) -> list[Replica]:
        assert model == MODEL
        return [replica for replica in self.all if replica.ready]

    def summon(self, model: str) -> None:
        if self.problem is not None:
            raise self.problem

    def trouble(self, model: str) -> ForebayError | None:
        return self.problem

    def check(self, request: Request) -> None:
        if self.refused:
            raise Quarantined

    def condemn(self, replica: Replica) -> None:
        replica.state = ReplicaState.DRAINING

    def open(self, slots: int, session: aiohttp.ClientSession) -> Replica:
        """To be called on the event loop."""
        replica = Replica(
            f"replica_{len(self.all)}", MODEL, slots, Traits("/"), session, Quarantine(1.0, 1, self.clock)
        )
        replica.state = ReplicaState.READY
        self.all.append(replica)
        return replica


class Visitor:
    """One caller: joins, holds its permit until told to leave, and remembers how it ended."""

    def __init__(self, scheduler: Scheduler, wanted: Request, *, patient: bool = False) -> None:
        self.permit: Permit | None = None
        self.error: BaseException | None = None
        self._leave = asyncio.Event()
        self._door = scheduler.admit_when_room if patient else scheduler.admit
        self.wanted = wanted
        self.task = asyncio.get_running_loop().create_task(self._visit())

    async def _visit(self) -> None:
        try:
            async with self._door(self.wanted) as self.permit:
                await self._leave.wait()
        except ForebayError as error:
            self.error = error
        finally:
            self.permit = None

    @property
    def waits(self) -> bool:
        return self.permit is None and not self.task.done()

    @property
    def bug(self) -> BaseException | None:
        return self.task.exception() if self.task.done() and not self.task.cancelled() else None

    def leave(self) -> None:
        self._leave.set()


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

    def drive(self, step: Coroutine[Any, Any, Any] | None = None) -> Any:
        async def settle() -> Any:
            value = await step if step is not None else None
            for _ in range(12):
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
                SchedulerSettings(),
                1.0,
                self.clock,
                Metrics(),
            )
            for count in slots:
                self.room.open(count, self.session)

        self.drive(make())

    @rule(
        target=visitors,
        priority=st.sampled_from(Priority),
        places=st.sampled_from([1, 1, 1, 2, 5]),
        patient=st.booleans(),
    )
    def join(self, priority: Priority, places: int, *, patient: bool) -> Visitor:
        self.number += 1

        async def come() -> Visitor:
            return Visitor(self.scheduler, request(self.number, priority, places), patient=patient)

        visitor: Visitor = self.drive(come())
        self.everybody.append(visitor)
        return visitor

    @rule(target=visitors, size=st.integers(3, 7))
    def crowd(self, size: int) -> Any:
        return multiple(*(self.join(Priority.DEFAULT, 1, patient=False) for _ in range(size)))

    @rule(visitor=consumes(visitors))
    def leave(self, visitor: Visitor) -> None:
        visitor.leave()
        self.drive()

    @rule(visitor=consumes(visitors))
    def cancel(self, visitor: Visitor) -> None:
        visitor.task.cancel()
        self.drive()

    @rule(first=consumes(visitors), ticks=st.integers(0, 3))
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

    @rule(seconds=st.sampled_from([1.0, 31.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.drive()

    @rule(index=st.integers(0, 5))
    def replica_dies(self, index: int) -> None:
        alive = self.room.replicas(MODEL)
        if alive:
            alive[index % len(alive)].state = ReplicaState.STOPPED
            self.scheduler.changed(MODEL)
            self.drive()

    @rule(slots=st.integers(1, 3))
    def replica_comes(self, slots: int) -> None:
        if len(self.room.replicas(MODEL)) < 3:
            self.drive(self._open(slots))
            self.scheduler.changed(MODEL)
            self.drive()

    async def _open(self, slots: int) -> None:
        self.room.open(slots, self.session)

    @rule()
    @precondition(lambda self: self.number > 3)
    def nothing_can_be_started(self) -> None:
        self.room.problem = EngineUnavailable()
        self.scheduler.changed(MODEL)
        self.drive()
        assert self.scheduler.load(MODEL)[1] == 0
        self.room.problem = None

    @invariant()
    def capacity_is_never_exceeded(self) -> None:
        if not hasattr(self, "room"):
            return
        for replica in self.room.all:
            held = sum(
                min(visitor.wanted.places, replica.slots)
                for visitor in self.everybody
                if visitor.permit is not None and visitor.permit.replica is replica
            )
            assert held <= replica.slots

    @invariant()
    def nothing_unforeseen_happens(self) -> None:
        assert [visitor.bug for visitor in self.everybody if visitor.bug] == []

    @invariant()
    def nobody_waits_beside_a_free_replica(self) -> None:
        if not hasattr(self, "room"):
            return
        running, waiting = self.scheduler.load(MODEL)
        if waiting and all(visitor.wanted.places == 1 for visitor in self.everybody):
            assert running >= sum(replica.slots for replica in self.room.replicas(MODEL))
        assert waiting <= PLACES

    def teardown(self) -> None:
        if hasattr(self, "room"):
            for visitor in self.everybody:
                visitor.leave()
            self.drive()
            for visitor in self.everybody:
                visitor.task.cancel()
            self.drive()
            assert self.scheduler.load(MODEL) == (0, 0), "a place leaked"
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
        scheduler = Scheduler(room, limits, SchedulerSettings(), 1.0, clock, Metrics())
        room.open(1, session)
        yield room, scheduler, clock


async def settle() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


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


async def test_the_back_office_waits_outside_and_comes_in_when_there_is_room(
    hall: tuple[Room, Scheduler, FakeClock],
) -> None:
    _, scheduler, _ = hall
    online = [Visitor(scheduler, request(n)) for n in range(3)]
    await settle()
    batch = Visitor(scheduler, request(9, Priority.BATCH), patient=True)
    await settle()
    assert batch.error is None
    assert scheduler.load(MODEL) == (1, 2)
    for visitor in online:
        visitor.leave()
        await settle()
    assert batch.permit is not None
    batch.leave()
    await settle()


@pytest.mark.parametrize("places", [0, 1, 2])
@pytest.mark.parametrize("how", ["finish", "leave the line", "are dismissed"])
async def test_the_back_office_is_not_forgotten_outside_however_the_line_empties(places: int, how: str) -> None:
    clock = FakeClock()
    room = Room(clock)
    limits = {MODEL: Limits(1, places, QUEUE_SECONDS)}
    scheduler = Scheduler(room, limits, SchedulerSettings(), 1.0, clock, Metrics())
    async with aiohttp.ClientSession() as session:
        room.open(1, session)
        running, *waiting = (Visitor(scheduler, request(n)) for n in range(1 + places))
        await settle()
        batch = Visitor(scheduler, request(9, Priority.BATCH), patient=True)
        await settle()
        assert (batch.permit, batch.error) == (None, None)
        if how == "leave the line":
            for visitor in waiting:
                visitor.task.cancel()
        elif how == "are dismissed":
            room.problem = EngineUnavailable()
            scheduler.changed(MODEL)
            room.problem = None
        await settle()
        running.leave()
        await settle()
        if how == "finish":
            for visitor in waiting:
                visitor.leave()
                await settle()
        assert batch.permit is not None
        batch.leave()
        await settle()
        assert scheduler.load(MODEL) == (0, 0)


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
    await settle()
    scheduler.close()
    late = Visitor(scheduler, request(3))
    await settle()
    assert isinstance(waiter.error, ShuttingDown)
    assert isinstance(late.error, ShuttingDown)
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

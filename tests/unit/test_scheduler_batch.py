"""Batch work behind online traffic: it waits, leaves room, gives places back, and is never forgotten."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from forebay.errors import EngineUnavailable, Overloaded
from forebay.inference import Priority
from forebay.scheduler.hall import Limits
from forebay.scheduler.scheduler import Scheduler
from forebay.server_config import SchedulerSettings
from forebay.telemetry import Metrics
from tests.support.clock import FakeClock
from tests.support.hallway import MODEL, QUEUE_SECONDS, SETTINGS, Bench, Room, Visitor, request, settle


@pytest.fixture
async def hall() -> Any:
    async with aiohttp.ClientSession() as session:
        clock = FakeClock()
        room = Room(clock)
        limits = {MODEL: Limits(1, 2, QUEUE_SECONDS)}
        scheduler = Scheduler(room, limits, SETTINGS, 1.0, clock, Metrics())
        room.open(1, session)
        yield room, scheduler, clock


async def test_batch_work_waits_behind_the_line_for_as_long_as_it_takes(
    hall: tuple[Room, Scheduler, FakeClock],
) -> None:
    _, scheduler, clock = hall
    holder = Visitor(scheduler, request(0))
    batch = [Visitor(scheduler, request(n, Priority.BATCH)) for n in range(10, 60)]
    await settle()
    waiting = [Visitor(scheduler, request(n)) for n in (1, 2)]
    await settle()
    assert [visitor.error for visitor in waiting] == [None, None], "batch work takes no place in the line"
    assert scheduler.load(MODEL) == (1, 2)
    clock.advance(QUEUE_SECONDS + 1)
    await settle()
    assert all(isinstance(visitor.error, Overloaded) for visitor in waiting)
    assert all(visitor.waits for visitor in batch)
    holder.leave()
    await settle()
    clock.advance(SETTINGS.headroom_seconds)
    for visitor in batch:
        await settle()
        assert visitor.permit is not None
        visitor.leave()
    await settle()
    assert scheduler.load(MODEL) == (0, 0)


@pytest.mark.parametrize("places", [0, 1, 2])
@pytest.mark.parametrize("how", ["finish", "leave the line", "are dismissed"])
async def test_batch_work_is_not_forgotten_however_the_line_empties(places: int, how: str) -> None:
    clock = FakeClock()
    room = Room(clock)
    limits = {MODEL: Limits(1, places, QUEUE_SECONDS)}
    scheduler = Scheduler(room, limits, SETTINGS, 1.0, clock, Metrics())
    async with aiohttp.ClientSession() as session:
        room.open(1, session)
        running, *waiting = (Visitor(scheduler, request(n)) for n in range(1 + places))
        await settle()
        batch = Visitor(scheduler, request(9, Priority.BATCH))
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
        for stop in room.all[0].stops:
            stop[1]()
        for visitor in (running, *waiting):
            visitor.leave()
            await settle()
        clock.advance(SETTINGS.headroom_seconds)
        await settle()
        assert (batch.permit is None) == isinstance(batch.error, EngineUnavailable) == (how == "are dismissed")
        batch.leave()
        await settle()
        assert scheduler.load(MODEL) == (0, 0)


@pytest.fixture
async def busy() -> Any:
    """Three slots full of batch work, no waiting places, and one more line that waits."""
    async with aiohttp.ClientSession() as session:
        clock, metrics = FakeClock(), Metrics()
        room = Room(clock)
        scheduler = Scheduler(room, {MODEL: Limits(3, 0, QUEUE_SECONDS)}, SETTINGS, 1.0, clock, metrics)
        room.open(3, session)
        batch = [Visitor(scheduler, request(n, Priority.BATCH)) for n in range(4)]
        await settle()
        yield room.all[0], scheduler, clock, batch
        replica = room.all[0]
        for visitor in batch:
            visitor.leave()
        for _ in range(20):
            await settle()
            clock.advance(SETTINGS.batch_floor_seconds)
            while replica.stops:
                replica.stop_one()
        assert [visitor.error for visitor in batch if not visitor.task.done()] == []
        assert scheduler.load(MODEL) == (0, 0)


Busy = tuple[Bench, Scheduler, FakeClock, list[Visitor]]


async def test_the_newest_of_batch_makes_room_and_its_place_passes_on_when_the_engine_has_stopped(busy: Busy) -> None:
    replica, scheduler, clock, batch = busy
    assert [visitor.permit is not None for visitor in batch] == [True, True, True, False]
    online = Visitor(scheduler, request(10))
    await settle()
    assert (online.permit, online.error) == (None, None), "a line without places turns away for online traffic alone"
    assert [visitor.preempted for visitor in batch] == [0, 0, 1, 0]
    assert scheduler.load(MODEL) == (3, 1)
    clock.advance(0.25)
    replica.stop_one()
    await settle()
    assert online.permit is not None
    assert online.permit.waited_seconds == 0.25
    assert batch[2].waits
    assert [visitor.preempted for visitor in batch] == [0, 0, 1, 0]
    online.leave()


async def test_no_more_of_batch_goes_than_there_are_online_who_need_it(busy: Busy) -> None:
    replica, scheduler, _, batch = busy
    online = [Visitor(scheduler, request(n)) for n in range(10, 15)]
    await settle()
    assert sum(visitor.preempted for visitor in batch) == 3
    assert [isinstance(visitor.error, Overloaded) for visitor in online] == [False, False, False, True, True]
    while replica.stops:
        replica.stop_one()
        await settle()
    assert all(visitor.permit is not None for visitor in online[:3])
    for visitor in online:
        visitor.leave()
        await settle()
    assert all(visitor.waits for visitor in batch), "what online traffic asked for lately stays free"


@pytest.mark.parametrize("ticks", range(6))
async def test_batch_work_that_has_its_place_and_has_not_begun_gives_it_back(busy: Busy, ticks: int) -> None:
    """In one of these turns the line that waited has been given the place and does not know it yet."""
    replica, _, _, batch = busy
    batch[0].leave()
    for _ in range(ticks):
        await asyncio.sleep(0)
    online = [Visitor(busy[1], request(n)) for n in range(10, 13)]
    await settle()
    while replica.stops:
        replica.stop_one()
        await settle()
    assert all(visitor.permit is not None for visitor in online)
    for visitor in online:
        visitor.leave()


async def test_places_that_are_on_their_way_back_are_waited_for(busy: Busy) -> None:
    replica, scheduler, _, batch = busy
    first = Visitor(scheduler, request(10))
    await settle()
    replica.stop_one()
    await settle()
    first.task.cancel()
    await settle()
    second = Visitor(scheduler, request(11))
    await settle()
    assert len(replica.stops) == 1
    assert [visitor.preempted for visitor in batch] == [0, 0, 1, 0]
    second.leave()


async def test_who_was_preempted_does_not_go_before_online_while_others_of_batch_run(busy: Busy) -> None:
    replica, scheduler, clock, batch = busy
    online = [Visitor(scheduler, request(10))]
    await settle()
    replica.stop_one()
    clock.advance(SETTINGS.batch_floor_seconds - SETTINGS.headroom_seconds)
    online.append(Visitor(scheduler, request(11)))
    await settle()
    replica.stop_one()
    await settle()
    clock.advance(SETTINGS.headroom_seconds)
    assert [visitor.permit is not None for visitor in batch] == [True, False, False, False]
    online[0].leave()
    await settle()
    assert [visitor.permit is not None for visitor in batch] == [True, False, False, False]
    online[1].leave()


@asynccontextmanager
async def wide_line() -> AsyncIterator[tuple[Scheduler, FakeClock, Visitor, Visitor]]:
    """A line that needs all four places of a model, of which somebody online has one for long."""
    async with aiohttp.ClientSession() as session:
        room = Room(FakeClock())
        scheduler = Scheduler(room, {MODEL: Limits(4, 8, QUEUE_SECONDS)}, SETTINGS, 1.0, room.clock, Metrics())
        room.open(4, session)
        long, wide = Visitor(scheduler, request(1)), Visitor(scheduler, request(2, Priority.BATCH, places=4))
        await settle()
        assert wide.waits
        yield scheduler, room.clock, long, wide
        long.leave()
        await settle()
        room.clock.advance(SETTINGS.headroom_seconds)
        await settle()
        assert wide.permit is not None
        wide.leave()
        await settle()
        assert scheduler.load(MODEL) == (0, 0)


async def test_a_starving_line_of_several_places_holds_up_the_others_for_longer_each_time() -> None:
    async with wide_line() as (scheduler, clock, _, _):
        held = 0.0
        for turn in range(1, 5):
            clock.advance(SETTINGS.batch_floor_seconds - held)
            newcomers = [Visitor(scheduler, request(10 * turn + one)) for one in range(3)]
            await settle()
            assert all(visitor.waits for visitor in newcomers), "the line waits until it has its places"
            held = turn * SETTINGS.batch_floor_seconds / 10
            clock.advance(held)
            await settle()
            assert all(visitor.permit is not None for visitor in newcomers), "but not for as long as that may take"
            for visitor in newcomers:
                visitor.leave()
            await settle()


async def test_the_floor_is_for_lines_of_one_place_while_one_of_several_does_not_find_them() -> None:
    async with wide_line() as (scheduler, clock, _, _):
        small = Visitor(scheduler, request(3, Priority.BATCH))
        clock.advance(SETTINGS.batch_floor_seconds)
        await settle()
        assert small.waits
        clock.advance(SETTINGS.batch_floor_seconds / 10)
        await settle()
        assert small.permit is not None
        small.leave()
        await settle()


async def test_batch_work_that_was_let_in_in_time_has_no_claim_to_stay() -> None:
    async with aiohttp.ClientSession() as session:
        room = Room(FakeClock())
        scheduler = Scheduler(room, {MODEL: Limits(1, 2, QUEUE_SECONDS)}, SETTINGS, 1.0, room.clock, Metrics())
        replica = room.open(1, session)
        online = Visitor(scheduler, request(1))
        await settle()
        batch = Visitor(scheduler, request(2, Priority.BATCH))
        await settle()
        online.leave()
        await settle()
        room.clock.advance(SETTINGS.headroom_seconds)
        await settle()
        assert batch.permit is not None
        room.clock.advance(SETTINGS.batch_floor_seconds)
        online = Visitor(scheduler, request(3))
        await settle()
        assert batch.preempted == 1
        for visitor in (online, batch):
            visitor.leave()
        replica.stop_one()
        await settle()
        room.clock.advance(SETTINGS.headroom_seconds)
        await settle()
        assert scheduler.load(MODEL) == (0, 0)


async def test_who_is_cancelled_while_preempted_is_cancelled(busy: Busy) -> None:
    _, scheduler, _, batch = busy
    online = Visitor(scheduler, request(10))
    batch[2].task.cancel()
    await settle()
    assert batch[2].task.cancelled()
    assert batch[2].preempted == 0
    online.leave()


async def test_without_preemption_online_waits_for_batch_work_to_end() -> None:
    settings = SchedulerSettings(preempt=False)
    async with aiohttp.ClientSession() as session:
        room = Room(FakeClock())
        scheduler = Scheduler(room, {MODEL: Limits(1, 2, QUEUE_SECONDS)}, settings, 1.0, room.clock, Metrics())
        room.open(1, session)
        batch = Visitor(scheduler, request(1, Priority.BATCH))
        await settle()
        online = Visitor(scheduler, request(2))
        await settle()
        assert batch.permit is not None
        batch.leave()
        await settle()
        assert online.permit is not None
        assert batch.preempted == 0
        online.leave()
        await settle()


async def test_batch_work_leaves_free_what_online_traffic_has_lately_used_and_one_place() -> None:
    async with aiohttp.ClientSession() as session:
        room = Room(FakeClock())
        scheduler = Scheduler(room, {MODEL: Limits(8, 2, QUEUE_SECONDS)}, SETTINGS, 1.0, room.clock, Metrics())
        room.open(8, session)
        online = [Visitor(scheduler, request(n)) for n in range(3)]
        await settle()
        batch = [Visitor(scheduler, request(n, Priority.BATCH)) for n in range(10, 20)]
        await settle()
        assert sum(visitor.permit is not None for visitor in batch) == 4
        for visitor in online[:2]:
            visitor.leave()
        await settle()
        assert sum(visitor.permit is not None for visitor in batch) == 4
        room.clock.advance(SETTINGS.headroom_seconds)
        await settle()
        assert sum(visitor.permit is not None for visitor in batch) == 6
        for visitor in [*online, *batch]:
            visitor.leave()
        await settle()
        assert scheduler.load(MODEL) == (0, 0)


async def test_batch_work_has_a_floor_however_much_comes_online(hall: tuple[Room, Scheduler, FakeClock]) -> None:
    _, scheduler, clock = hall
    current, batch = Visitor(scheduler, request(0)), Visitor(scheduler, request(1, Priority.BATCH))
    await settle()
    began, served = clock.monotonic(), []
    while len(served) < 3:
        if batch.permit is not None:
            served.append(clock.monotonic() - began)
            clock.advance(1.0)
            await settle()
            assert (batch.preempted, current.waits) == (0, True), "what the floor lets in stays to its end"
            batch.leave()
            batch = Visitor(scheduler, request(1, Priority.BATCH))
            await settle()
        assert clock.monotonic() - began < 4 * SETTINGS.batch_floor_seconds
        newcomer = Visitor(scheduler, request(2))
        await settle()
        clock.advance(1.0)
        current.leave()
        await settle()
        current = newcomer
    floor = SETTINGS.batch_floor_seconds
    assert [round(after / floor) for after in served] == [1, 2, 3]
    batch.task.cancel()
    current.leave()
    await settle()


async def test_batch_work_that_is_preempted_again_and_again_comes_to_an_end(
    hall: tuple[Room, Scheduler, FakeClock],
) -> None:
    room, scheduler, clock = hall
    batch = Visitor(scheduler, request(0, Priority.BATCH))
    await settle()
    began = clock.monotonic()
    while True:
        online = Visitor(scheduler, request(1))
        await settle()
        if online.waits and not room.all[0].stops:
            break
        room.all[0].stop_one()
        await settle()
        online.leave()
        await settle()
        clock.advance(SETTINGS.headroom_seconds)
        await settle()
        assert batch.permit is not None
        assert clock.monotonic() - began <= SETTINGS.batch_floor_seconds
        clock.advance(6.0)
    assert batch.preempted == 2
    clock.advance(5.0)
    batch.leave()
    await settle()
    assert online.permit is not None
    online.leave()
    await settle()
    assert scheduler.load(MODEL) == (0, 0)


async def test_batch_work_waits_while_the_machine_is_not_well(hall: tuple[Room, Scheduler, FakeClock]) -> None:
    _, scheduler, clock = hall
    well = False
    scheduler.well = lambda: well
    batch = Visitor(scheduler, request(10, Priority.BATCH))
    await settle()
    clock.advance(SETTINGS.batch_floor_seconds + SETTINGS.headroom_seconds)
    await settle()
    assert batch.waits, "nor does its floor let it in"
    online = Visitor(scheduler, request(0))
    await settle()
    assert online.permit is not None
    online.leave()
    await settle()
    clock.advance(SETTINGS.headroom_seconds)
    well = True
    scheduler.changed(MODEL)
    await settle()
    assert batch.permit is not None
    batch.leave()
    await settle()
    assert scheduler.load(MODEL) == (0, 0)

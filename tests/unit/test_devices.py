"""Batch work stands still for the online work of other models on its device, and for nobody else's."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from forebay.inference import Priority, Request
from forebay.replicas.replica import ReplicaState
from forebay.scheduler.scheduler import Scheduler
from forebay.server_config import PaceSettings
from tests.support.devices_hall import PACE, SETTINGS, TOKEN_SECONDS, Hall, opened, stands
from tests.support.hallway import Visitor, request, settle


@pytest.fixture
async def hall() -> AsyncIterator[Hall]:
    async with opened(PACE) as found:
        yield found


async def test_batch_work_of_another_model_stands_still_while_anybody_is_online(hall: Hall) -> None:
    hall.open("chat")
    speech = hall.open("speech")
    line = await hall.batch("speech", 1)
    assert not stands(speech)
    online = await hall.visit("chat", 2)
    assert stands(speech)
    assert hall.sample("forebay_paused_engines") == 1
    await hall.advance(5)
    assert stands(speech)
    await hall.leave(online)
    assert stands(speech)
    await hall.advance(PACE.resume_seconds)
    assert not stands(speech)
    assert hall.sample("forebay_paused_seconds_total") == pytest.approx(5 + PACE.resume_seconds)
    await hall.leave(line)
    assert hall.scheduler.load("speech") == (0, 0)


async def test_one_who_only_waits_is_online_too(hall: Hall) -> None:
    speech = hall.open("speech")
    await hall.batch("speech", 1)
    waiting = await hall.visit("chat", 2)  # of which there is no replica yet
    assert waiting.waits
    assert stands(speech)


async def test_one_who_waits_for_a_model_that_waits_for_memory_keeps_nothing_still(hall: Hall) -> None:
    speech = hall.open("speech")
    await hall.batch("speech", 1)
    hall.house.short_of_memory.add("chat")
    first = await hall.visit("chat", 2)
    assert not stands(speech)
    hall.house.short_of_memory.clear()  # it begins to load
    hall.scheduler.changed("chat")
    assert stands(speech)
    hall.house.short_of_memory.add("chat")
    hall.scheduler.changed("chat")
    second = await hall.visit("chat", 3)
    await hall.advance(PACE.resume_seconds)
    assert not stands(speech)
    for visitor in (first, second):
        visitor.task.cancel()
    await settle()
    hall.house.short_of_memory.clear()
    hall.open("chat")
    await hall.visit("chat", 4)
    assert stands(speech)
    assert hall.scheduler.load("chat") == (1, 0)


async def test_it_stands_still_before_anything_else_happens(hall: Hall) -> None:
    hall.open("chat")
    speech = hall.open("speech")
    await hall.batch("speech", 1)
    async with hall.scheduler.admit(replace(request(2), model="chat")):
        assert stands(speech)


@pytest.mark.parametrize("model", ["elsewhere", "other"])
async def test_other_devices_and_what_runs_elsewhere_are_left_alone(hall: Hall, model: str) -> None:
    hall.open("chat")
    place = hall.open(model)
    await hall.batch(model, 1)
    online = await hall.visit("chat", 2)
    assert not stands(place)
    later = await hall.batch(model, 3)
    assert not later.waits
    await hall.leave(online)
    speech = hall.open("speech")
    await hall.advance(1)
    await hall.batch("speech", 4)
    await hall.visit(model, 5)
    assert not stands(speech)


async def test_a_replica_with_online_work_runs_on_and_goes_on_when_some_comes(hall: Hall) -> None:
    hall.open("chat")
    speech = hall.open("speech")
    await hall.batch("speech", 1)
    chatting = await hall.visit("chat", 2)
    assert stands(speech)
    heard = await hall.visit("speech", 3)
    assert not stands(speech)
    assert heard.permit is not None
    await hall.leave(heard)
    assert stands(speech)
    await hall.leave(chatting)


async def test_no_further_batch_work_is_let_in_until_nobody_is_online(hall: Hall) -> None:
    hall.open("chat")
    hall.open("speech")
    online = await hall.visit("chat", 1)
    lines = [await hall.batch("speech", number) for number in (2, 3)]
    assert all(line.waits for line in lines)
    await hall.leave(online)
    await hall.advance(PACE.resume_seconds)
    assert not any(line.waits for line in lines)


async def test_batch_work_of_a_model_that_was_online_waits_for_quiet(hall: Hall) -> None:
    hall.open("chat")
    online = await hall.visit("chat", 1)
    line = await hall.batch("chat", 2)
    await hall.leave(online)
    await hall.advance(PACE.resume_seconds)
    assert line.waits, "it could not be paused if somebody came"
    await hall.advance(PACE.quiet_seconds)
    assert not line.waits


async def test_batch_work_of_the_same_model_runs_on(hall: Hall) -> None:
    chat = hall.open("chat")
    line = await hall.batch("chat", 1)
    await hall.visit("chat", 2)
    assert not stands(chat)
    assert line.permit is not None


async def test_an_engine_that_cannot_be_paused_is_not(hall: Hall) -> None:
    hall.open("chat")
    pictures = hall.open("pictures", pausable=False)
    await hall.batch("pictures", 1)
    await hall.visit("chat", 2)
    assert not stands(pictures)


async def test_a_replica_that_is_to_leave_finishes_what_it_has(hall: Hall) -> None:
    hall.open("chat")
    speech = hall.open("speech")
    line = await hall.batch("speech", 1)
    await hall.visit("chat", 2)
    assert stands(speech)
    speech.state = ReplicaState.DRAINING
    hall.scheduler.changed("speech")
    assert not stands(speech)
    await hall.leave(line)


async def test_a_line_that_is_cancelled_wakes_its_replica_which_then_stands_again(hall: Hall) -> None:
    hall.open("chat")
    speech = hall.open("speech")
    lines = [await hall.batch("speech", number) for number in (1, 2)]
    await hall.visit("chat", 3)
    assert stands(speech)
    lines[0].task.cancel()
    await settle()
    assert not stands(speech), "it has to hear of it"
    speech.stop_one()
    assert stands(speech)


async def test_batch_work_that_is_found_to_do_no_harm_goes_on_beside_online_work(hall: Hall) -> None:
    hall.open("chat")
    speech, pictures = hall.open("speech"), hall.open("pictures")
    for number, model in enumerate(("speech", "pictures")):
        await hall.batch(model, number)
    online = await hall.visit("chat", 3)
    assert stands(speech)
    assert stands(pictures)
    await hall.say(online, 12)
    assert [stands(speech), stands(pictures)].count(True) == 1
    await hall.say(online, 8)
    assert not stands(speech)
    assert not stands(pictures)
    await hall.say(online, 8, 3 * TOKEN_SECONDS)
    assert [stands(speech), stands(pictures)].count(True) >= 1


async def test_those_who_wait_are_let_in_when_the_bound_grows(hall: Hall) -> None:
    hall.open("chat")
    hall.open("speech")
    online = await hall.visit("chat", 1)
    lines = [await hall.batch("speech", number) for number in (2, 3, 4)]
    assert all(line.waits for line in lines)
    await hall.say(online, 12)
    assert [line.waits for line in lines].count(False) == 1
    await hall.say(online, 8)
    assert [line.waits for line in lines].count(False) == 2


async def test_models_take_turns_for_the_one_place_that_the_bound_has_however_long_their_lines_are(hall: Hall) -> None:
    hall.open("chat")
    models = ("speech", "pictures")
    for model in models:
        hall.open(model, pausable=False)
    online = await hall.visit("chat", 1)
    lines = {
        model: [await hall.batch(model, 10 * one + number) for number in range(8)]
        for one, model in enumerate(models, 1)
    }
    await hall.say(online, 12)
    served = []
    while len(served) < 8:
        (running,) = [(model, line) for model in models for line in lines[model] if line.permit is not None]
        served.append(running[0])
        await hall.advance(1 if running[0] == "speech" else 13)
        await hall.leave(running[1])
    assert served == [served[0], models[1 - models.index(served[0])]] * 4


async def test_a_place_is_kept_for_no_model_that_cannot_take_it(hall: Hall) -> None:
    hall.open("chat")
    hall.open("speech", pausable=False)
    online = await hall.visit("chat", 1)
    lines = [await hall.batch("speech", number) for number in (2, 3)]
    others = await hall.batch("pictures", 4)  # of which there is no replica
    await hall.say(online, 12)
    assert [line.waits for line in lines] == [False, True]
    await hall.leave(lines[0])
    assert not lines[1].waits
    assert others.waits


async def test_the_time_that_a_model_takes_to_load_is_no_harm_that_batch_work_did(hall: Hall) -> None:
    hall.open("chat")
    hall.open("speech")
    pictures = hall.open("pictures")
    online = await hall.visit("chat", 1)
    for number in range(2, 6):
        visitor = await hall.visit("pictures", number)
        await hall.say(visitor, 1)
        await hall.leave(visitor)
    for number in (6, 7, 8):
        await hall.batch("speech", number)
    for _ in range(3):
        await hall.say(online, 12)
    level = hall.sample("forebay_pace_level")
    assert level > 1
    hall.house.all.remove(pictures)
    hall.scheduler.changed("pictures")
    waiting = [await hall.visit("pictures", number) for number in (9, 10)]
    await hall.advance(25)
    hall.open("pictures")
    await settle()
    assert all(visitor.permit is not None for visitor in waiting)
    assert hall.sample("forebay_pace_level") >= level - 1, "that there were more of them takes back a step, no more"


async def test_what_was_held_for_long_runs_for_a_while(hall: Hall) -> None:
    hall.open("chat")
    speech = hall.open("speech")
    await hall.batch("speech", 1)
    await hall.visit("chat", 2)
    seen = []
    for _ in range(2):
        await hall.advance(PACE.hold_seconds_max)
        seen.append(stands(speech))
        await hall.advance(PACE.floor_seconds)
        seen.append(stands(speech))
    assert seen == [False, True, False, True]


async def test_what_is_held_beside_batch_work_that_cannot_be_paused_runs_for_a_while_in_its_turn(hall: Hall) -> None:
    hall.open("chat")
    speech, pictures = hall.open("speech"), hall.open("pictures")
    for number, model in enumerate(("chat", "speech", "pictures")):
        await hall.batch(model, number)
    await hall.visit("chat", 3)
    seen = [(stands(speech), stands(pictures))]
    for _ in range(2):
        await hall.advance(PACE.hold_seconds_max)
        seen.append((stands(speech), stands(pictures)))
        await hall.advance(PACE.floor_seconds)
        seen.append((stands(speech), stands(pictures)))
    assert seen == [(True, True), (True, False), (True, True), (False, True), (True, True)]


async def test_a_slow_reader_says_nothing_of_the_engine(hall: Hall) -> None:
    hall.open("chat")
    speech = hall.open("speech")
    await hall.batch("speech", 1)
    online = await hall.visit("chat", 2)
    await hall.say(online, 12)
    assert not stands(speech)
    assert online.permit is not None
    assert online.permit.ear is not None
    for _ in range(6):
        hall.clock.advance(1)
        online.permit.ear.skip(online.tokens, hall.clock.monotonic())  # type: ignore[attr-defined]
        await hall.say(online, 1)
    assert not stands(speech)


async def test_without_a_pace_nothing_stands_still() -> None:
    async with opened(PaceSettings(enabled=False)) as hall:
        hall.open("chat")
        speech = hall.open("speech")
        await hall.batch("speech", 1)
        online = await hall.visit("chat", 2)
        assert not stands(speech)
        assert online.permit is not None
        assert online.permit.ear is None


async def test_nothing_is_left_behind(hall: Hall) -> None:
    hall.open("chat")
    speech = hall.open("speech")
    tasks = len(asyncio.all_tasks())
    for number in range(20):
        line = await hall.batch("speech", 10 * number)
        online = await hall.visit("chat", 10 * number + 1)
        waiting = await hall.batch("speech", 10 * number + 2)
        await hall.leave(online)
        await hall.advance(PACE.quiet_seconds)
        await hall.leave(line)
        await hall.leave(waiting)
        assert not stands(speech)
    await hall.advance(1000)
    assert len(asyncio.all_tasks()) == tasks
    assert hall.scheduler.load("speech") == (0, 0)


class Line(Visitor):
    """A line that goes on from where it was when its place was taken back."""

    def __init__(self, scheduler: Scheduler, wanted: Request) -> None:
        super().__init__(scheduler, wanted)
        self._door = lambda wanted: scheduler.admit_when_room(wanted, yields=True)


async def test_a_line_that_can_go_on_steps_aside_for_its_own_model_and_comes_back_at_once(hall: Hall) -> None:
    chat = hall.open("chat")
    line = Line(hall.scheduler, replace(request(1, Priority.BATCH), model="chat"))
    plain = await hall.batch("chat", 2)
    assert not line.waits
    online = await hall.visit("chat", 3)
    chat.stop_one()
    await settle()
    assert (line.preempted, plain.preempted) == (1, 0), "one that would begin anew runs on"
    assert line.waits
    await hall.leave(plain)
    await hall.leave(online)
    assert line.waits
    await hall.advance(PACE.resume_seconds)
    assert not line.waits
    assert not stands(chat)
    await hall.leave(line)
    assert hall.scheduler.load("chat") == (0, 0)


async def test_a_line_that_can_go_on_stands_still_where_it_is_for_another_model(hall: Hall) -> None:
    chat = hall.open("chat")
    hall.open("pictures")
    line = Line(hall.scheduler, replace(request(1, Priority.BATCH), model="chat"))
    await settle()
    further = Line(hall.scheduler, replace(request(2, Priority.BATCH), model="chat"))
    await settle()
    online = await hall.visit("pictures", 3)
    hall.scheduler.changed("chat")
    await settle()
    assert stands(chat)
    assert (line.preempted, further.preempted) == (0, 0)
    await hall.leave(online)
    await hall.advance(PACE.resume_seconds)
    assert not stands(chat)


async def test_a_replica_is_for_batch_work_and_stands_still_for_the_other(hall: Hall) -> None:
    first, second = hall.open("chat"), hall.open("chat")
    await hall.leave(await hall.visit("chat", 1))
    await hall.advance(PACE.resume_seconds)
    lines = [await hall.batch("chat", number) for number in (2, 3)]
    assert (len(first.in_flight), len(second.in_flight)) == (0, 2), "in any gap, and where it can be paused"
    online = [await hall.visit("chat", number) for number in range(4, 7)]
    assert (len(first.in_flight), len(second.in_flight)) == (3, 2)
    assert (stands(first), stands(second)) == (False, True)
    assert [line.preempted for line in lines] == [0, 0]
    later = await hall.batch("chat", 7)
    assert later.waits
    for visitor in online:
        await hall.leave(visitor)
    await hall.advance(PACE.resume_seconds)
    assert not later.waits
    assert not stands(second)
    assert len(second.in_flight) == 3


async def test_online_work_that_finds_no_room_goes_to_the_replica_of_batch_work_as_well(hall: Hall) -> None:
    hall.open("chat")
    second = hall.open("chat")
    await hall.leave(await hall.visit("chat", 1))
    await hall.advance(PACE.resume_seconds)
    line = await hall.batch("chat", 2)
    online = [await hall.visit("chat", number) for number in range(3, 8)]
    assert len(second.in_flight) == 2
    assert not stands(second)
    await hall.leave(online[-1])
    assert stands(second)
    assert line.permit is not None


async def test_online_work_is_spread_over_its_own_replicas(hall: Hall) -> None:
    places = [hall.open("pictures") for _ in range(3)]
    for number in range(9):
        await hall.visit("pictures", number)
        if number == 3:
            assert [len(place.in_flight) for place in places] == [2, 2, 0]
    assert [len(place.in_flight) for place in places] == [4, 4, 1]


async def test_a_replica_for_batch_work_is_of_use_where_there_is_one_place_each(hall: Hall) -> None:
    hall.open("chat", slots=1)
    second = hall.open("chat", slots=1)
    await hall.leave(await hall.visit("chat", 1))
    await hall.advance(PACE.resume_seconds)
    line = await hall.batch("chat", 2)
    assert not line.waits
    assert len(second.in_flight) == 1


async def test_what_holds_the_place_that_somebody_waits_for_runs_on(hall: Hall) -> None:
    chat = hall.open("chat", slots=1)
    first = await hall.visit("chat", 1)
    line = await hall.batch("chat", 2)
    await hall.advance(SETTINGS.batch_floor_seconds)
    await hall.leave(first)
    assert not line.waits, "it had starved, and keeps its place"
    await hall.advance(PACE.floor_seconds)
    online = await hall.visit("chat", 3)
    assert online.waits
    assert not stands(chat)
    await hall.leave(line)
    assert not online.waits


async def test_a_line_that_may_fill_a_gap_does_not_wait_behind_one_that_may_not(hall: Hall) -> None:
    hall.open("chat")
    await hall.leave(await hall.visit("chat", 1))
    plain = await hall.batch("chat", 2)
    line = Line(hall.scheduler, replace(request(3, Priority.BATCH), model="chat"))
    await settle()
    await hall.advance(PACE.resume_seconds)
    assert (plain.waits, line.waits) == (True, False)
    await hall.advance(PACE.quiet_seconds)
    assert not plain.waits


async def test_lines_leave_a_replica_of_theirs_that_online_work_has_to_go_to(hall: Hall) -> None:
    hall.open("chat", slots=1)
    second = hall.open("chat")
    await hall.leave(await hall.visit("chat", 1))
    await hall.advance(PACE.resume_seconds)
    line = Line(hall.scheduler, replace(request(2, Priority.BATCH), model="chat"))
    await settle()
    online = [await hall.visit("chat", number) for number in (3, 4)]
    assert not any(visitor.waits for visitor in online)
    assert line.preempted == 1
    second.stop_one()
    await settle()
    assert line.waits


async def test_nobody_online_leaves_every_replica_to_batch_work(hall: Hall) -> None:
    first, second = hall.open("chat"), hall.open("chat")
    for number in range(7):
        await hall.batch("chat", number)
    assert (len(first.in_flight), len(second.in_flight)) == (3, 4)
    await hall.visit("chat", 9)
    assert (stands(first), stands(second)) == (False, True)

"""The door's books: a request that ends in a bug of ours is settled like any other, and images have so much room."""

import asyncio
from dataclasses import replace

import pytest
from starlette.types import Message

from forebay.config import MediaSettings, Settings
from forebay.dialects.answer import Progress
from forebay.dialects.openai.call import Call
from forebay.dialects.openai.events import GENERATION
from forebay.errors import Overloaded
from forebay.gateway.auth import Principal
from forebay.gateway.online import Door, OnlineAnswer, Visit
from forebay.gateway.rates import Rates
from forebay.inference import Request
from forebay.metering.meter import Meter
from forebay.model_config import FakeModel
from forebay.replicas.catalog import Catalog
from forebay.scheduler.assembly import Assembler
from forebay.scheduler.hall import Limits
from forebay.scheduler.scheduler import Scheduler
from forebay.server_config import SchedulerSettings
from forebay.store.key_format import Role
from forebay.telemetry import Metrics
from tests.support.clock import FakeClock
from tests.unit.test_scheduler import MODEL, Room, request


class _Broken(Room):
    """A machine room with a bug."""

    def check(self, request: Request) -> None:
        raise RuntimeError(request.id)


async def _never() -> Message:
    return await asyncio.get_running_loop().create_future()


async def _nowhere(_message: Message) -> None:
    raise AssertionError


async def test_a_bug_of_ours_costs_the_caller_no_tokens_and_is_counted() -> None:
    clock, metrics = FakeClock(), Metrics()
    scheduler = Scheduler(_Broken(clock), {MODEL: Limits(1, 2, 60.0)}, SchedulerSettings(), 1.0, clock, metrics)
    door = Door(scheduler, Assembler(0, clock, metrics), Rates(clock), Meter((), clock), Settings(), clock, metrics)
    caller = Principal("key_1", "default", Role.MEMBER, tokens_per_minute=100)
    headers = door.rates.check(caller, 60)
    call = Call(request(1), "chat", stream=True, include_usage=False, tier="default", shape=GENERATION)
    catalog = Catalog(Settings(default_models=False, models={MODEL: FakeModel(engine="fake")}))
    with pytest.raises(RuntimeError, match="req_1"):
        await OnlineAnswer(door, call, caller, catalog, 60, headers)({}, _never, _nowhere)
    assert door.empty
    assert door.rates.headers(caller)["x-ratelimit-remaining-tokens"] == "100"
    labels = {"model": MODEL, "capability": "chat", "code": "internal_error"}
    assert metrics.registry.get_sample_value("forebay_requests_total", labels) == 1


async def test_a_prompt_that_no_engine_has_counted_costs_the_rate_what_was_estimated() -> None:
    clock, metrics = FakeClock(), Metrics()
    scheduler = Scheduler(Room(clock), {MODEL: Limits(1, 2, 60.0)}, SchedulerSettings(), 1.0, clock, metrics)
    door = Door(scheduler, Assembler(0, clock, metrics), Rates(clock), Meter((), clock), Settings(), clock, metrics)
    caller = Principal("key_1", "default", Role.MEMBER, tokens_per_minute=100)
    door.rates.check(caller, 60)
    call = Call(request(1), "chat", stream=True, include_usage=False, tier="default", shape=GENERATION)
    visit = Visit(call, caller, 60, 0.0)
    visit.progress = Progress(events=3, prompt_estimate=60)
    door.settle(visit, None)
    assert door.rates.headers(caller)["x-ratelimit-remaining-tokens"] == "37"
    assert visit.used.amounts.tokens == 63
    for name, value in (("prompt", 60), ("completion", 3)):
        assert metrics.registry.get_sample_value(f"forebay_{name}_tokens_total", {"model": MODEL}) == value


async def test_images_that_are_held_have_a_bound_and_texts_pass() -> None:
    clock, metrics = FakeClock(), Metrics()
    scheduler = Scheduler(Room(clock), {MODEL: Limits(1, 2, 60.0)}, SchedulerSettings(), 1.0, clock, metrics)
    settings = Settings(media=MediaSettings(held_bytes_max=1_000))
    door = Door(scheduler, Assembler(0, clock, metrics), Rates(clock), Meter((), clock), settings, clock, metrics)
    text = Call(request(1), "chat", stream=True, include_usage=False, tier="default", shape=GENERATION)

    def shows(image_chars: int, project: str = "default") -> Visit:
        caller = Principal("key_1", project, Role.MEMBER)
        return Visit(replace(text, image_chars=image_chars), caller, 0, 0.0)

    large, small = shows(5_000), shows(400)
    with door.visiting(large):
        door.check_room(large)
        with door.visiting(small), pytest.raises(Overloaded):
            door.check_room(small)
        door.check_room(shows(0))
    with door.visiting(small), door.visiting(other := shows(600, "other")):
        door.check_room(other)
        with pytest.raises(Overloaded) as refused:
            door.check_room(shows(1))
    with door.visiting(small), door.visiting(shows(350)):
        with pytest.raises(Overloaded):
            door.check_room(shows(1))
        door.check_room(shows(250, "other"))
    assert refused.value.retry_after_seconds == 1
    door.check_room(shows(1_000))

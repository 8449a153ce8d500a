"""The door's books: a request that ends in a bug of ours is settled like any other."""

import asyncio

import pytest
from starlette.types import Message

from forebay.config import SchedulerSettings, Settings
from forebay.dialects.openai.call import Call
from forebay.dialects.openai.events import GENERATION
from forebay.gateway.auth import Principal
from forebay.gateway.online import Door, OnlineAnswer
from forebay.gateway.rates import Rates
from forebay.inference import Request
from forebay.model_config import FakeModel
from forebay.replicas.catalog import Catalog
from forebay.scheduler.assembly import Assembler
from forebay.scheduler.scheduler import Limits, Scheduler
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
    door = Door(scheduler, Assembler(0, clock, metrics), Rates(clock), Settings(), clock, metrics)
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

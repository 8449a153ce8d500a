"""Models of one device, or of several, as the scheduler sees them: a test opens their replicas and says what comes.

It refuses to start an engine: a replica only remembers whether it stands still.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from forebay.inference import Priority, Request
from forebay.replicas.commands import Traits
from forebay.replicas.postmortem import Quarantine
from forebay.replicas.replica import Replica, ReplicaState
from forebay.scheduler.hall import Limits
from forebay.scheduler.scheduler import Scheduler
from forebay.server_config import PaceSettings, SchedulerSettings
from forebay.telemetry import Metrics
from tests.support.clock import FakeClock
from tests.support.hallway import Bench, Room, Visitor, request, settle

PACE = PaceSettings(resume_seconds=0.1, quiet_seconds=2, brief_seconds=0, hold_seconds_max=60, floor_seconds=3)
BRIEF = PACE.model_copy(update={"brief_seconds": 0.05})
SETTINGS = SchedulerSettings(headroom_seconds=10, batch_floor_seconds=1000)
TOKEN_SECONDS = 0.02


class Process:
    """Stands for an engine process: it only remembers whether it stands still."""

    def __init__(self) -> None:
        self.stands = False

    def pause(self) -> None:
        self.stands = True

    def resume(self) -> None:
        self.stands = False


class Place(Bench):
    """A replica that knows what is in flight on it."""

    @asynccontextmanager
    async def run(self, request: Request, *arguments: Any) -> AsyncIterator[Any]:
        number = len(self.stops) + len(self.in_flight) + 1000 * self._sequence
        self._sequence += 1
        self.in_flight[number] = request
        try:
            async with super().run(request, *arguments[:-1], lambda: self._stopped(number, arguments[-1])):
                yield None
        except BaseException:
            self.resume()
            raise

    def _stopped(self, number: int, on_stopped: Callable[[], None]) -> None:
        del self.in_flight[number]
        on_stopped()


class House(Room):
    """A machine room with several models."""

    def replicas(self, model: str) -> list[Replica]:
        return [replica for replica in self.all if replica.ready and replica.model == model]


@dataclass
class Hall:
    house: House
    scheduler: Scheduler
    clock: FakeClock
    metrics: Metrics
    session: aiohttp.ClientSession

    def open(self, model: str, slots: int = 4, *, pausable: bool = True) -> Place:
        name = f"{model}_{len(self.house.all)}"
        quarantine = Quarantine(1.0, 1, self.house.clock)
        place = Place(name, model, slots, Traits("/", pausable=pausable), self.session, quarantine)
        place.process = Process()  # type: ignore[assignment]
        place.state = ReplicaState.READY
        self.house.all.append(place)
        self.scheduler.changed(model)
        return place

    async def visit(self, model: str, number: int, priority: Priority = Priority.DEFAULT) -> Visitor:
        visitor = Visitor(self.scheduler, replace(request(number, priority), model=model))
        await settle()
        return visitor

    async def batch(self, model: str, number: int) -> Visitor:
        return await self.visit(model, number, Priority.BATCH)

    async def leave(self, visitor: Visitor) -> None:
        visitor.leave()
        await settle()

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await settle()

    async def say(self, visitor: Visitor, tokens: int, seconds: float = TOKEN_SECONDS) -> None:
        """Let an online answer come, a token after the other."""
        assert visitor.permit is not None
        ear = visitor.permit.ear
        assert ear is not None
        for _ in range(tokens):
            visitor.tokens = getattr(visitor, "tokens", 0) + 1  # type: ignore[attr-defined]
            self.clock.advance(seconds)
            ear.hear(visitor.tokens, self.clock.monotonic())  # type: ignore[attr-defined]
        await settle()

    def sample(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"device": "cpu"}) or 0.0


DEVICES = {"chat": "cpu", "speech": "cpu", "pictures": "cpu", "elsewhere": "", "other": "gpu0"}
ONLINE = {"pictures": 2}  # replicas for online work


@asynccontextmanager
async def opened(pace: PaceSettings) -> AsyncIterator[Hall]:
    """With nothing up yet."""
    async with aiohttp.ClientSession() as session:
        clock, metrics = FakeClock(), Metrics()
        house = House(clock)
        limits = {
            name: Limits(4, 8, 60.0, device=device, replicas=ONLINE.get(name, 1)) for name, device in DEVICES.items()
        }
        scheduler = Scheduler(house, limits, SETTINGS, 1.0, clock, metrics, pace=pace)
        yield Hall(house, scheduler, clock, metrics, session)
        scheduler.close()


def stands(place: Place) -> bool:
    process: Any = place.process
    assert process.stands == place.paused
    return bool(process.stands)

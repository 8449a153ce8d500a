"""A machine room of replicas that a test opens and closes, and callers that come, run, leave and come back.

It refuses to start an engine: what there is stops when the test says so.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from forebay.errors import ForebayError, Preempted, Quarantined
from forebay.inference import Capability, Priority, Request
from forebay.replicas.commands import Traits
from forebay.replicas.postmortem import Quarantine
from forebay.replicas.replica import Replica, ReplicaState
from forebay.scheduler.permit import Permit
from forebay.scheduler.scheduler import Scheduler
from forebay.server_config import SchedulerSettings
from tests.support.clock import FakeClock

MODEL = "model"
QUEUE_SECONDS = 60.0
SETTINGS = SchedulerSettings(batch_floor_seconds=30)
PLACES = 4


def request(number: int, priority: Priority = Priority.DEFAULT, places: int = 1, project: str = "default") -> Request:
    return Request(f"req_{number}", project, MODEL, Capability.CHAT, "/", b"{}", priority, places)


class Bench(Replica):
    """A replica whose engine stops when the test calls what is in `stops`; an answer that ends by itself is no stop."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stops: list[tuple[Request, Callable[[], None]]] = []

    @asynccontextmanager
    async def run(self, request: Request, *arguments: Any) -> AsyncIterator[Any]:
        on_stopped: Callable[[], None] = arguments[-1]
        try:
            yield None
        except BaseException:
            self.stops.append((request, on_stopped))
            raise
        on_stopped()

    def stop_one(self) -> None:
        self.stops.pop(0)[1]()


@dataclass(slots=True)
class Room:
    """The machine room as the scheduler sees it."""

    clock: FakeClock
    all: list[Bench] = field(default_factory=list)
    problem: ForebayError | None = None
    refused: bool = False
    short_of_memory: set[str] = field(default_factory=set)

    def replicas(self, model: str) -> list[Replica]:
        assert model == MODEL
        return [replica for replica in self.all if replica.ready]

    def summon(self, model: str) -> None:
        if self.problem is not None:
            raise self.problem

    def trouble(self, model: str) -> ForebayError | None:
        return self.problem

    def waits(self, model: str) -> bool:
        return model in self.short_of_memory

    def check(self, request: Request) -> None:
        if self.refused:
            raise Quarantined

    def condemn(self, replica: Replica) -> None:
        replica.state = ReplicaState.DRAINING

    def open(self, slots: int, session: aiohttp.ClientSession) -> Bench:
        """To be called on the event loop."""
        replica = Bench(f"replica_{len(self.all)}", MODEL, slots, Traits("/"), session, Quarantine(1.0, 1, self.clock))
        replica.state = ReplicaState.READY
        self.all.append(replica)
        return replica


class Visitor:
    """One caller: joins, runs until told to leave, and remembers how it ended. Batch work comes back when preempted."""

    def __init__(self, scheduler: Scheduler, wanted: Request, *, runs: bool = True) -> None:
        self.permit: Permit | None = None
        self.error: BaseException | None = None
        self.preempted = 0
        self.wanted = wanted
        self.batch = wanted.priority is Priority.BATCH
        self._leave = asyncio.Event()
        self._failure: ForebayError | None = None
        self._door: Callable[[Request], AbstractAsyncContextManager[Permit]] = (
            scheduler.admit_when_room if self.batch else scheduler.admit
        )
        self._runs = runs
        self.task = asyncio.get_running_loop().create_task(self._visit())

    async def _visit(self) -> None:
        while await self._is_preempted():
            self.preempted += 1

    async def _is_preempted(self) -> bool:
        try:
            async with self._door(self.wanted) as self.permit, self.permit.run() if self._runs else nullcontext():
                await self._leave.wait()
                if self._failure is not None:
                    raise self._failure
        except Preempted:
            assert self.task.cancelling() == 0, "a later timeout would take this for its own"
            return True
        except ForebayError as error:
            self.error = error
        finally:
            self.permit = None
        return False

    @property
    def waits(self) -> bool:
        return self.permit is None and not self.task.done()

    @property
    def bug(self) -> BaseException | None:
        return self.task.exception() if self.task.done() and not self.task.cancelled() else None

    def leave(self) -> None:
        self._leave.set()

    def fail(self, error: ForebayError) -> None:
        self._failure = error
        self._leave.set()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)

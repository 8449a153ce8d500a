"""The hallway: the only way to a replica.

Both doors come through here. A caller at the front door is turned away when the line is full (`admit`); the back office
waits outside until there is room (`admit_when_room`). Either way the caller leaves with a Permit.

Single writer: every change of state is made here, on one event loop, and runs to its end without awaiting. It refuses
to admit anybody once it is closed.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from forebay.clock import Clock
from forebay.config import SchedulerSettings
from forebay.errors import ForebayError, Overloaded, ShuttingDown
from forebay.inference import Request
from forebay.replicas.replica import Replica
from forebay.scheduler.permit import Permit
from forebay.scheduler.policy import next_grant, position, retry_after_seconds
from forebay.scheduler.queue import Line, Ticket
from forebay.scheduler.router import Seats, pick_replica
from forebay.telemetry import Metrics

_FIRST_GUESS_SECONDS = 2.0
_SMOOTHING = 0.1


class Fleet(Protocol):
    """What the scheduler asks of the machine room. None of these blocks."""

    def replicas(self, model: str) -> list[Replica]:
        """The ready replicas of `model`."""
        ...

    def summon(self, model: str) -> None:
        """Want `model` up; raises if waiting for it makes no sense."""
        ...

    def trouble(self, model: str) -> ForebayError | None:
        """Why nobody should wait for `model` any longer, if so."""
        ...

    def check(self, request: Request) -> None:
        """Raise if this input is refused."""
        ...

    def condemn(self, replica: Replica) -> None:
        """Replace `replica`: it does not stop when told to."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one model's line."""

    slots: int
    queue_places: int
    queue_timeout_seconds: float


@dataclass(slots=True)
class _Hall:
    """What the scheduler keeps for one model. `running` counts places by replica id."""

    limits: Limits
    line: Line
    grants: dict[int, asyncio.Future[Replica]] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    mean_run_seconds: float = _FIRST_GUESS_SECONDS


class Scheduler:
    """Admits requests to replicas."""

    def __init__(
        self,
        fleet: Fleet,
        models: dict[str, Limits],
        settings: SchedulerSettings,
        grace_seconds: float,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._grace_seconds = grace_seconds
        self._clock = clock
        self._metrics = metrics
        self._halls = {name: _Hall(limits, Line(limits.queue_places)) for name, limits in models.items()}
        self._number = 0
        self._closed = False
        for name, hall in self._halls.items():
            self._measure(name, hall)

    @asynccontextmanager
    async def admit(self, request: Request) -> AsyncIterator[Permit]:
        """Join the line or raise Overloaded; leave it when the block ends, however it ends.

        Raises also Quarantined, ModelNotReady, EngineUnavailable and ShuttingDown.
        """
        hall = self._halls[request.model]
        ticket, place = self._join(hall, request)
        try:
            replica = await self._wait(hall, ticket)
        except BaseException:
            self._quit(hall, ticket)
            raise
        permit = self._permit(ticket, request, replica, place)
        started = self._clock.monotonic()

        def give_back() -> None:
            self._learn(hall, self._clock.monotonic() - started)
            self._give_back(hall, ticket, replica)

        permit.on_stopped = give_back
        try:
            yield permit
        finally:
            if not permit.held:
                self._give_back(hall, ticket, replica)

    @asynccontextmanager
    async def admit_when_room(self, request: Request) -> AsyncIterator[Permit]:
        """The same, but wait outside while the line is full."""
        hall = self._halls[request.model]
        while hall.line.full and not self._closed and not self._runs_at_once(hall, request):
            self._fleet.summon(request.model)
            hall.room.clear()
            await hall.room.wait()
        async with self.admit(request) as permit:
            yield permit

    def changed(self, model: str) -> None:
        """Told by the machine room that replicas of `model` came or went."""
        hall = self._halls[model]
        alive = {replica.id for replica in self._fleet.replicas(model)}
        hall.running = {key: count for key, count in hall.running.items() if count or key in alive}
        self._grant(model, hall)
        trouble = self._fleet.trouble(model) if len(hall.line) else None
        if trouble is not None:
            self._dismiss(hall, trouble)

    def close(self) -> None:
        """Turn away everybody who waits or comes from now on."""
        self._closed = True
        for hall in self._halls.values():
            self._dismiss(hall, ShuttingDown())
            hall.room.set()

    def load(self, model: str) -> tuple[int, int]:
        """Places in use and requests in line, for people."""
        hall = self._halls[model]
        return sum(hall.running.values()), len(hall.line)

    def _measure(self, name: str, hall: _Hall) -> None:
        self._metrics.running.labels(name).set_function(lambda: sum(hall.running.values()))
        self._metrics.waiting.labels(name).set_function(lambda: len(hall.line))
        self._metrics.slots.labels(name).set_function(lambda: sum(r.slots for r in self._fleet.replicas(name)))

    # Changes of state: none of these awaits.

    def _join(self, hall: _Hall, request: Request) -> tuple[Ticket, int]:
        """(1) closed; (2) quarantined; (3) no hope of a replica; (4) room at once; (5) room in line; (6) full."""
        try:
            self._let_in(request)
        except ForebayError as error:
            self._metrics.rejections.labels(request.model, error.code).inc()
            raise
        self._number += 1
        now = self._clock.monotonic()
        ticket = Ticket(self._number, request.model, request.priority, request.places, now)
        was_full = hall.line.full
        hall.grants[ticket.number] = asyncio.get_running_loop().create_future()
        hall.line.join(ticket)
        self._grant(request.model, hall)
        if hall.grants[ticket.number].done():
            return ticket, 0
        if was_full:
            self._quit(hall, ticket)
            self._metrics.rejections.labels(request.model, "queue_full").inc()
            raise Overloaded(retry_after_seconds=self._retry_after(hall))
        return ticket, position(ticket, hall.line, now, self._settings.ageing_seconds)

    def _let_in(self, request: Request) -> None:
        if self._closed:
            raise ShuttingDown
        self._fleet.check(request)
        self._fleet.summon(request.model)

    async def _wait(self, hall: _Hall, ticket: Ticket) -> Replica:
        granted = hall.grants[ticket.number]
        if granted.done():
            return granted.result()
        try:
            async with self._clock.timeout(hall.limits.queue_timeout_seconds):
                return await granted
        except TimeoutError:
            self._metrics.rejections.labels(ticket.model, "queue_timeout").inc()
            raise Overloaded(
                "The request waited in line for too long. Try again later.",
                code="queue_timeout",
                retry_after_seconds=self._retry_after(hall),
            ) from None

    def _permit(self, ticket: Ticket, request: Request, replica: Replica, place: int) -> Permit:
        waited = self._clock.monotonic() - ticket.joined_at
        self._metrics.queue_wait.labels(ticket.model).observe(waited)
        return Permit(request, replica, place, waited, self._grace_seconds, self._fleet.condemn)

    def _quit(self, hall: _Hall, ticket: Ticket) -> None:
        """Leave without having run: out of the line, or with a grant that nobody will use."""
        granted = hall.grants[ticket.number]
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            self._give_back(hall, ticket, granted.result())
            return
        del hall.grants[ticket.number]
        hall.line.leave(ticket)
        self._grant(ticket.model, hall)

    def _give_back(self, hall: _Hall, ticket: Ticket, replica: Replica) -> None:
        if hall.grants.pop(ticket.number, None) is None:
            return
        left = hall.running[replica.id] - self._taken(ticket, replica)
        hall.running[replica.id] = left
        if left == 0 and not replica.ready:
            del hall.running[replica.id]
        self._grant(ticket.model, hall)

    def _runs_at_once(self, hall: _Hall, request: Request) -> bool:
        """Whether nobody waits and a replica has room: the only way in where a line has no places at all."""
        replicas = self._fleet.replicas(request.model)
        return not len(hall.line) and pick_replica(request.places, _seats(hall, replicas)) is not None

    def _grant(self, model: str, hall: _Hall) -> None:
        """Give every free place to whoever is first in line for it."""
        if not len(hall.line):
            hall.room.set()
            return
        replicas = {replica.id: replica for replica in self._fleet.replicas(model)}
        now = self._clock.monotonic()
        while True:
            seats = _seats(hall, replicas.values())
            # A caller that left has a cancelled grant until its own clean-up runs.
            waiting = [ticket for ticket in hall.line if not hall.grants[ticket.number].done()]
            grant = next_grant(waiting, seats, now, self._settings.ageing_seconds)
            if grant is None:
                break
            ticket, seat = grant
            replica = replicas[seat.replica_id]
            hall.line.leave(ticket)
            hall.running[replica.id] = hall.running.get(replica.id, 0) + self._taken(ticket, replica)
            hall.grants[ticket.number].set_result(replica)
        if not hall.line.full:
            hall.room.set()

    def _dismiss(self, hall: _Hall, error: ForebayError) -> None:
        for ticket in list(hall.line):
            hall.line.leave(ticket)
            if not hall.grants[ticket.number].done():
                hall.grants[ticket.number].set_exception(error)

    def _taken(self, ticket: Ticket, replica: Replica) -> int:
        return min(ticket.places, replica.slots)

    def _learn(self, hall: _Hall, run_seconds: float) -> None:
        hall.mean_run_seconds += _SMOOTHING * (run_seconds - hall.mean_run_seconds)

    def _retry_after(self, hall: _Hall) -> float:
        longest = self._settings.retry_after_seconds_max
        return retry_after_seconds(len(hall.line), hall.limits.slots, hall.mean_run_seconds, longest)


def _seats(hall: _Hall, replicas: Iterable[Replica]) -> list[Seats]:
    return [Seats(replica.id, replica.slots, hall.running.get(replica.id, 0)) for replica in replicas]

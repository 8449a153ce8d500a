"""The hallway: the only way to a replica.

Both doors come through here. A caller at the front door is turned away when the line is full (`admit`); the back office
waits in a line of its own behind it for as long as it takes, and may have to give its place back (`admit_when_room`).
Either way the caller leaves with a Permit.

Single writer: every change of state is made here, on one event loop, and runs to its end without awaiting. It refuses
to admit anybody once it is closed.
"""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from forebay.clock import Clock
from forebay.errors import ForebayError, Overloaded, ShuttingDown
from forebay.inference import Priority, Request
from forebay.replicas.replica import Replica
from forebay.replicas.residency import Wanted
from forebay.scheduler.devices import Devices
from forebay.scheduler.hall import Hall, Limits, new_hall, places_of, seats_of, waiting_in
from forebay.scheduler.permit import Permit
from forebay.scheduler.policy import (
    Background,
    in_order,
    next_grant,
    position,
    reserved,
    retry_after_seconds,
    to_preempt,
    to_turn_away,
)
from forebay.scheduler.queue import Ticket
from forebay.scheduler.router import Seats
from forebay.scheduler.shares import Weights, equal
from forebay.scheduler.wants import wanted
from forebay.server_config import PaceSettings, SchedulerSettings
from forebay.telemetry import Metrics

_SMOOTHING = 0.1
_COLLECTING_TURNS = (
    10  # of the floor: the line waits for several places a tenth of the first one's time, all of the last's
)
_NO_BATCH = Background()


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

    def waits(self, model: str) -> bool:
        """Whether `model` waits for memory: nothing of it runs or starts."""
        ...

    def check(self, request: Request) -> None:
        """Raise if this input is refused."""
        ...

    def condemn(self, replica: Replica) -> None:
        """Replace `replica`: it does not stop when told to."""
        ...


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
        weights: Weights = equal,
        pace: PaceSettings | None = None,
    ) -> None:
        self.well: Callable[[], bool] = lambda: True  # whether the machine can do with batch work
        self._fleet = fleet
        self._settings = settings
        self._grace_seconds = grace_seconds
        self._clock = clock
        self._metrics = metrics
        window = settings.headroom_seconds
        self._halls = {name: new_hall(limits, weights, window) for name, limits in models.items()}
        self._devices = Devices(
            {name: limits.device for name, limits in models.items()},
            {name: limits.replicas for name, limits in models.items()},
            fleet.replicas,
            fleet.waits,
            lambda model: len(self._halls[model].backlog),
            lambda model: len(self._halls[model].line),
            lambda model: self._grant(model, self._halls[model]),
            pace or PaceSettings(),
            clock,
            metrics,
        )
        self._number = 0
        self._closed = False
        for name, hall in self._halls.items():
            self._measure(name, hall)

    def admit(self, request: Request, *, further: bool = False) -> AbstractAsyncContextManager[Permit]:
        """Join the line or raise Overloaded; leave it when the block ends, however it ends.

        A `further` part of something that was let in before finds room in a full line, too; the caller bounds how many
        there are. Raises also Quarantined, ModelNotReady, EngineUnavailable and ShuttingDown.
        """
        assert request.priority is not Priority.BATCH, "batch work takes no place in the line"
        return self._admitted(request, further=further)

    def admit_when_room(self, request: Request, *, yields: bool = False) -> AbstractAsyncContextManager[Permit]:
        """The same for batch work, which waits without a limit until online traffic leaves room for it.

        Its permit is to be run at once. `run` may raise Preempted; then leave the block and ask to be admitted again. Work
        that `yields` goes on from where it was: it has to leave whenever somebody comes online to its engine.
        """
        assert request.priority is Priority.BATCH, "only batch work waits behind the line"
        return self._admitted(request, yields=yields)

    def expect(self, models: Iterable[str]) -> None:
        """Have `models` up for what comes later. Raises ModelNotReady and EngineUnavailable if nobody should wait for one."""
        for model in models:
            self._fleet.summon(model)

    @asynccontextmanager
    async def _admitted(
        self, request: Request, *, further: bool = False, yields: bool = False
    ) -> AsyncIterator[Permit]:
        hall = self._halls[request.model]
        ticket, place = self._join(hall, request, further=further, yields=yields)
        try:
            replica = await self._wait(hall, ticket)
        except BaseException:
            self._quit(hall, ticket)
            raise
        permit = self._permit(hall, ticket, request, replica, place)
        started = self._clock.monotonic()

        def give_back() -> None:
            if not ticket.batch:
                self._learn(hall, self._clock.monotonic() - started)
            ticket.served = permit.served
            self._give_back(hall, ticket, replica)

        permit.on_left = lambda: self._leave(hall, ticket)
        permit.on_stopped = give_back
        try:
            yield permit
        finally:
            if not permit.held:
                self._give_back(hall, ticket, replica)

    def changed(self, model: str) -> None:
        """Told by the machine room that replicas of `model` came or went."""
        hall = self._halls[model]
        alive = {replica.id for replica in self._fleet.replicas(model)}
        hall.running = {key: count for key, count in hall.running.items() if count or key in alive}
        self._devices.changed(model)
        self._grant(model, hall)
        trouble = self._fleet.trouble(model) if len(hall.line) or len(hall.backlog) else None
        if trouble is not None:
            self._dismiss(hall, trouble)

    def close(self) -> None:
        """Turn away everybody who waits or comes from now on."""
        self._closed = True
        for hall in self._halls.values():
            self._dismiss(hall, ShuttingDown())

    def load(self, model: str) -> tuple[int, int]:
        """Places in use, and requests in line without batch work, for people."""
        hall = self._halls[model]
        return sum(hall.running.values()), len(hall.line)

    def wanted(self, model: str) -> Wanted:
        """What waits and runs for `model`, for whoever decides what is in memory."""
        hall = self._halls[model]
        return wanted(hall.line, hall.backlog, hall.running, hall.batch.values(), hall.seen, self._clock.monotonic())

    def clear_out(self, model: str) -> None:
        """Take its places back from the batch work of replicas that are to leave, but never from one whom the floor spares."""
        hall, now = self._halls[model], self._clock.monotonic()
        staying = {replica.id for replica in self._fleet.replicas(model)}
        for ticket in list(hall.batch.values()) if self._settings.preempt else ():
            if not (ticket.replica_id in staying or ticket.number in hall.leaving or ticket.spared):
                self._preempt(hall, ticket, now)
        self._devices.changed(model)

    def _measure(self, name: str, hall: Hall) -> None:
        self._metrics.running.labels(name).set_function(lambda: sum(hall.running.values()))
        self._metrics.waiting.labels(name).set_function(lambda: len(hall.line))
        self._metrics.batch_running.labels(name).set_function(lambda: places_of(hall.batch.values()))
        self._metrics.batch_waiting.labels(name).set_function(lambda: len(hall.backlog))
        self._metrics.slots.labels(name).set_function(lambda: sum(r.slots for r in self._fleet.replicas(name)))

    # Changes of state: none of these awaits.

    def _join(self, hall: Hall, request: Request, *, further: bool, yields: bool) -> tuple[Ticket, int]:
        """(1) closed; (2) quarantined; (3) no hope of a replica; (4) room at once; (5) room in line; (6) full."""
        try:
            self._let_in(request)
        except ForebayError as error:
            self._metrics.rejections.labels(request.model, error.code).inc()
            raise
        self._number += 1
        now = self._clock.monotonic()
        ticket = Ticket(self._number, request.model, request.priority, request.places, now)
        ticket.project, ticket.further, ticket.yields = request.project, further, yields
        hall.grants[ticket.number] = asyncio.get_running_loop().create_future()
        if ticket.batch:
            hall.backlog.join(ticket)
        else:
            hall.line.join(ticket)
            hall.demand.change(ticket.places, now)
        self._devices.joined(ticket)
        self._grant(request.model, hall)
        if hall.grants[ticket.number].done():
            return ticket, 0
        if ticket.batch:
            return ticket, len(hall.line) + len(hall.backlog)
        if not further and self._overfull(hall):
            self._turn_away(hall, ticket, now)
        return ticket, position(ticket, hall.line, now, self._settings.ageing_seconds, hall.line.shares)

    def _let_in(self, request: Request) -> None:
        if self._closed:
            raise ShuttingDown
        self._fleet.check(request)
        self._fleet.summon(request.model)

    def _overfull(self, hall: Hall) -> bool:
        """Whether more wait than may. Those who are about to get places that batch work gives back do not count."""
        returning = places_of(ticket for ticket in hall.leaving.values() if ticket.preempted)
        return len(hall.line) > hall.limits.queue_places + returning

    def _turn_away(self, hall: Hall, newcomer: Ticket, now: float) -> None:
        """Raise Overloaded for the newcomer, or have whoever holds most of the line lose a place in it to him."""
        self._metrics.rejections.labels(newcomer.model, "queue_full").inc()
        full = Overloaded(retry_after_seconds=self._retry_after(hall))
        waiting = waiting_in(hall, hall.line)
        last = to_turn_away(newcomer, waiting, now, self._settings.ageing_seconds, hall.line.shares)
        if last is newcomer:
            self._quit(hall, newcomer)
            raise full
        hall.line.leave(last)
        hall.grants[last.number].set_exception(full)

    async def _wait(self, hall: Hall, ticket: Ticket) -> Replica:
        granted = hall.grants[ticket.number]
        if granted.done():
            return granted.result()
        try:
            async with self._clock.timeout(None if ticket.batch else hall.limits.queue_timeout_seconds):
                return await granted
        except TimeoutError:
            self._metrics.rejections.labels(ticket.model, "queue_timeout").inc()
            raise Overloaded(
                "The request waited in line for too long. Try again later.",
                code="queue_timeout",
                retry_after_seconds=self._retry_after(hall),
            ) from None

    def _permit(self, hall: Hall, ticket: Ticket, request: Request, replica: Replica, place: int) -> Permit:
        waited = self._clock.monotonic() - ticket.joined_at
        grace = self._grace_seconds if hall.limits.cancel_grace_seconds is None else hall.limits.cancel_grace_seconds
        permit = Permit(request, replica, place, waited, grace, self._fleet.condemn)
        if not ticket.batch:
            self._metrics.queue_wait.labels(ticket.model).observe(waited)
            permit.ear = self._devices.ear(ticket.model)
        elif ticket.preempted:
            permit.preempt()
        else:
            hall.permits[ticket.number] = permit
        return permit

    def _quit(self, hall: Hall, ticket: Ticket) -> None:
        """Leave without having run: out of the line, or with a grant that nobody will use."""
        granted = hall.grants[ticket.number]
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            self._give_back(hall, ticket, granted.result())
            return
        del hall.grants[ticket.number]
        (hall.backlog if ticket.batch else hall.line).leave(ticket)
        self._gone(hall, ticket)

    def _leave(self, hall: Hall, ticket: Ticket) -> None:
        """The run is over for its holder. If the engine has not stopped, the place is on its way back."""
        if ticket.number in hall.grants:
            hall.leaving[ticket.number] = ticket
            hall.permits.pop(ticket.number, None)

    def _give_back(self, hall: Hall, ticket: Ticket, replica: Replica) -> None:
        if hall.grants.pop(ticket.number, None) is None:
            return
        (hall.backlog if ticket.batch else hall.line).end(ticket, self._clock.monotonic() - ticket.granted_at)
        replica.give_back()
        hall.running[replica.id] -= ticket.taken
        if hall.running[replica.id] == 0 and not replica.ready:
            del hall.running[replica.id]
        for held in (hall.leaving, hall.batch, hall.permits):
            held.pop(ticket.number, None)
        if ticket.batch and not ticket.preempted:
            hall.preempted_since = None
        self._gone(hall, ticket)

    def _gone(self, hall: Hall, ticket: Ticket) -> None:
        """What is left to do when a ticket neither waits nor runs any longer."""
        hall.seen.note(ticket, self._clock.monotonic())
        self._devices.gone(ticket)
        if not ticket.batch:
            hall.demand.change(-ticket.places, self._clock.monotonic())
        elif not (hall.batch or len(hall.backlog) or ticket.preempted):
            hall.kept_out_since = hall.preempted_since = None
        self._grant(ticket.model, hall)

    def _grant(self, model: str, hall: Hall) -> None:
        """Give every free place to whoever is first for it, and make room for those who wait online."""
        if not (len(hall.line) or len(hall.backlog) or hall.alarm):
            return
        replicas = {replica.id: replica for replica in self._fleet.replicas(model) if not replica.doubtful}
        now, ageing = self._clock.monotonic(), self._settings.ageing_seconds
        self._step_aside(model, hall, now)
        in_line, apart = len(hall.line), self._devices.apart(model)
        while len(hall.line) or len(hall.backlog):
            seats = seats_of(hall, replicas.values(), apart)
            online = waiting_in(hall, hall.line)
            grant = next_grant(online, self._background(hall, seats, now), seats, now, ageing, hall.line.shares)
            if grant is None:
                self._make_room(hall, online, seats, now)
                break
            self._seat(hall, grant[0], replicas[grant[1].replica_id], now)
        if len(hall.line) < in_line:
            self._step_aside(model, hall, now)  # for those who have got a place where nobody online was before
        self._set_alarm(model, hall, self._next_look(hall, now))

    def _seat(self, hall: Hall, ticket: Ticket, replica: Replica, now: float) -> None:
        ticket.replica_id, ticket.taken, ticket.granted_at = replica.id, min(ticket.places, replica.slots), now
        hall.running[replica.id] = hall.running.get(replica.id, 0) + ticket.taken
        if ticket.batch:
            hall.backlog.serve(ticket)
            if not hall.batch and self._floor_at(hall) <= now:
                ticket.spared, hall.preempted_since = True, None
            hall.batch[ticket.number], hall.kept_out_since = ticket, None
        else:
            hall.line.serve(ticket)
        replica.grant()
        self._devices.granted(ticket, replica)
        hall.grants[ticket.number].set_result(replica)

    def _background(self, hall: Hall, seats: list[Seats], now: float) -> Background:
        if not len(hall.backlog):
            return _NO_BATCH
        order = in_order(waiting_in(hall, hall.backlog), now, math.inf, hall.backlog.shares)
        head = next(order, None)
        if head is None or not self.well():
            return _NO_BATCH
        running, starves = places_of(hall.batch.values()), not hall.batch and self._floor_at(hall) <= now
        holds_up = not starves or self._holds_up(hall, head, now)
        if not holds_up:  # for those who need one place the floor is there meanwhile
            head = next((ticket for ticket in order if ticket.places == 1), head)
            holds_up = head.places == 1
        room, only = self._devices.room(head.model, yields=head.yields), self._devices.only(head.model)
        if room is not None and running >= room and not (head.yields or starves):
            head = next((ticket for ticket in order if ticket.yields), head)  # of whom more may run than of the first
            room = self._devices.room(head.model, yields=head.yields)
        slots = sum(seat.slots for seat in seats)
        kept = sum(seat.slots for seat in seats if only is None or seat.replica_id not in only)
        return Background(
            head,
            running=running,
            reserved=min(kept, reserved(hall.demand.peak(now), slots)),
            starves=starves,
            holds_up=holds_up,
            room=room,
            only=only,
        )

    def _make_room(self, hall: Hall, online: list[Ticket], seats: list[Seats], now: float) -> None:
        """Take places back from batch work for those who wait online, but never from one whom the floor spares."""
        if not (online and hall.batch and self._settings.preempt):
            return
        running = [ticket for ticket in hall.batch.values() if ticket.number not in hall.leaving]
        if running and self._floor_at(hall) <= now and not any(ticket.spared for ticket in running):
            running[0].spared, hall.preempted_since = True, None
        running = [ticket for ticket in reversed(running) if not ticket.spared]
        returning: Counter[str] = Counter()
        for ticket in hall.leaving.values():
            returning[ticket.replica_id] += ticket.taken
        for ticket in to_preempt(
            online, running, returning, seats, now, self._settings.ageing_seconds, hall.line.shares
        ):
            self._preempt(hall, ticket, now)

    def _step_aside(self, model: str, hall: Hall, now: float) -> None:
        """Take their places back from those who lose nothing by it, where online work on the engine is slower beside them."""
        if not (hall.batch and self._settings.preempt):
            return
        running = [ticket for ticket in hall.batch.values() if ticket.number not in hall.leaving]
        for ticket in self._devices.to_leave(model, running):
            self._preempt(hall, ticket, now)

    def _preempt(self, hall: Hall, ticket: Ticket, now: float) -> None:
        ticket.preempted = True
        hall.preempted_since = now if hall.preempted_since is None else hall.preempted_since
        hall.leaving[ticket.number] = ticket
        self._metrics.preemptions.labels(ticket.model).inc()
        permit = hall.permits.pop(ticket.number, None)
        if permit is not None:
            permit.preempt()

    def _floor_at(self, hall: Hall) -> float:
        """When batch work will have been kept out, or gone without an end, for as long as its floor allows."""
        since = [time for time in (hall.kept_out_since, hall.preempted_since) if time is not None]
        return min(since) + self._settings.batch_floor_seconds if since else math.inf

    def _holds_up(self, hall: Hall, head: Ticket, now: float) -> bool:
        """Whether the line waits now for one that starves; for several places longer each time, or it might never end."""
        floor = self._settings.batch_floor_seconds
        share = (now - head.joined_at) // floor / _COLLECTING_TURNS
        return head.places == 1 or (now - self._floor_at(hall)) % floor < share * floor

    def _next_look(self, hall: Hall, now: float) -> float | None:
        """When the mere passing of time may let batch work in that waits."""
        if not len(hall.backlog):
            return None
        if not hall.batch and hall.kept_out_since is None:
            hall.kept_out_since = now
        times = [hall.demand.next_drop(), *([] if hall.batch else self._floor_turns(hall, now))]
        return min((time for time in times if time is not None and time > now), default=None)

    def _floor_turns(self, hall: Hall, now: float) -> list[float]:
        """When batch work begins to starve; from then on whenever the line may begin, or cease, to wait for its places."""
        step, began = self._settings.batch_floor_seconds / _COLLECTING_TURNS, self._floor_at(hall)
        if now < began:
            return [began]
        steps = (now - began) // step
        return [began + (steps + 1) * step, began + (steps + 2) * step]  # the first may be now, by a rounding

    def _set_alarm(self, model: str, hall: Hall, due: float | None) -> None:
        """Look again at `due`. One that goes off too early does no harm: it sets the next."""
        if hall.alarm is not None:
            if due is not None and hall.alarm[0] <= due:
                return
            hall.alarm[1].cancel()
            hall.alarm = None
        if due is not None:
            hall.alarm = (due, asyncio.get_running_loop().create_task(self._look_again(model, hall, due)))

    async def _look_again(self, model: str, hall: Hall, due: float) -> None:
        await self._clock.sleep(max(0.0, due - self._clock.monotonic()))
        hall.alarm = None
        self._grant(model, hall)

    def _dismiss(self, hall: Hall, error: ForebayError) -> None:
        for line in (hall.line, hall.backlog):
            for ticket in list(line):
                line.leave(ticket)
                if not hall.grants[ticket.number].done():
                    hall.grants[ticket.number].set_exception(error)

    def _learn(self, hall: Hall, run_seconds: float) -> None:
        hall.mean_run_seconds += _SMOOTHING * (run_seconds - hall.mean_run_seconds)

    def _retry_after(self, hall: Hall) -> float:
        longest = self._settings.retry_after_seconds_max
        return retry_after_seconds(len(hall.line), hall.limits.slots, hall.mean_run_seconds, longest)

"""What the scheduler keeps for one model: its lines, its grants, and what runs where.

It refuses to decide anything: the scheduler alone changes it.
"""

import asyncio
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from forebay.replicas.replica import Replica
from forebay.scheduler.demand import Demand
from forebay.scheduler.permit import Permit
from forebay.scheduler.queue import Line, Ticket
from forebay.scheduler.router import Seats
from forebay.scheduler.shares import Weights
from forebay.scheduler.wants import Seen

_FIRST_GUESS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one model's line; without a grace of its own its engines have that of all, without a `device` no pace.

    `replicas` are for online work first, those beyond them for batch work.
    """

    slots: int
    queue_places: int
    queue_timeout_seconds: float
    cancel_grace_seconds: float | None = None
    device: str = ""
    replicas: int = 1


@dataclass(slots=True)
class Hall:
    """What the scheduler keeps for one model.

    Every ticket that waits or runs has its grant. `line` waits online and has a bound; `backlog` is batch work, bounded
    by how many the back office sends. `running` counts places by replica id. `batch` runs, the oldest first; `permits`
    are those of it that can be interrupted. `leaving` have let go of their run, and their engine has not stopped yet.
    Batch work waits and none of it runs since `kept_out_since`; `preempted_since` is the first preemption since some of
    it was last served. `alarm` looks again when time alone may have made room for it.
    """

    limits: Limits
    line: Line
    demand: Demand
    backlog: Line
    grants: dict[int, asyncio.Future[Replica]] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    batch: dict[int, Ticket] = field(default_factory=dict)
    permits: dict[int, Permit] = field(default_factory=dict)
    leaving: dict[int, Ticket] = field(default_factory=dict)
    kept_out_since: float | None = None
    preempted_since: float | None = None
    alarm: tuple[float, asyncio.Task[None]] | None = None
    mean_run_seconds: float = _FIRST_GUESS_SECONDS
    seen: Seen = field(default_factory=Seen)


def new_hall(limits: Limits, weights: Weights, window_seconds: float) -> Hall:
    """One with nobody in it."""
    return Hall(limits, Line(weights), Demand(window_seconds), Line(weights))


def waiting_in(hall: Hall, line: Line) -> list[Ticket]:
    """Those in line, but not a caller that left: it has a cancelled grant until its own clean-up runs."""
    return [ticket for ticket in line if not hall.grants[ticket.number].done()]


def places_of(tickets: Iterable[Ticket]) -> int:
    """What they fill."""
    return sum(ticket.taken for ticket in tickets)


def seats_of(hall: Hall, replicas: Iterable[Replica], apart: Container[str]) -> list[Seats]:
    """The places of `replicas`, of which some are `apart` for batch work."""
    return [Seats(r.id, r.slots, hall.running.get(r.id, 0), r.id in apart) for r in replicas]

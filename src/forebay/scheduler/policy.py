"""Who goes next: a pure decision over those who wait and the places there are.

It refuses to starve anybody: each `ageing_seconds` in line count as one level of priority.
"""

from collections.abc import Iterable

from forebay.scheduler.queue import Ticket
from forebay.scheduler.router import Seats, pick_replica


def rank(ticket: Ticket, now: float, ageing_seconds: float) -> tuple[float, int]:
    """The lower goes first: priority less the levels gained by waiting, then order of arrival."""
    gained = (now - ticket.joined_at) // ageing_seconds
    return (ticket.priority - gained, ticket.number)


def next_grant(
    waiting: Iterable[Ticket], seats: list[Seats], now: float, ageing_seconds: float
) -> tuple[Ticket, Seats] | None:
    """The ticket that goes next and the replica it goes to, or None.

    Only the first in rank is looked at: one that needs several places holds up the line behind it until they are free,
    or those who need one place would overtake it for ever.
    """
    first = min(waiting, key=lambda ticket: rank(ticket, now, ageing_seconds), default=None)
    if first is None:
        return None
    replica = pick_replica(first.places, seats)
    return (first, replica) if replica is not None else None


def position(ticket: Ticket, waiting: Iterable[Ticket], now: float, ageing_seconds: float) -> int:
    """How many go before `ticket`, plus one."""
    mine = rank(ticket, now, ageing_seconds)
    return 1 + sum(rank(other, now, ageing_seconds) < mine for other in waiting)


def retry_after_seconds(waiting: int, slots: int, mean_run_seconds: float, longest: float) -> float:
    """When a caller who is turned away may find room: the time that those before it take, within [1, longest]."""
    return min(longest, max(1.0, mean_run_seconds * (waiting + 1) / max(1, slots)))

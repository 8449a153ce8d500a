"""Picks a replica: a pure decision over the places that each one has.

It refuses to look at anything but numbers of places.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seats:
    """The places of one ready replica."""

    replica_id: str
    slots: int
    running: int

    @property
    def free(self) -> int:
        """Places that are not in use."""
        return self.slots - self.running


def pick_replica(places: int, seats: Iterable[Seats]) -> Seats | None:
    """The replica with the largest free share that has `places` free; None when there is none.

    A request for more places than a replica has (after it ran out of memory, say) takes the whole of it.
    """
    fitting = [seat for seat in seats if seat.free >= min(places, seat.slots)]
    return min(fitting, key=lambda seat: (seat.running / seat.slots, seat.replica_id), default=None)

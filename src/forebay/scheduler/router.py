"""Picks a replica: a pure decision over the places that each one has.

It refuses to look at anything but numbers of places.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seats:
    """The places of one ready replica. One that is `apart` is for batch work first, and for online work last."""

    replica_id: str
    slots: int
    running: int
    apart: bool = False

    @property
    def free(self) -> int:
        """Places that are not in use."""
        return self.slots - self.running


def pick_replica(places: int, seats: Iterable[Seats], *, batch: bool = False) -> Seats | None:
    """Of those that have `places` free, and of these of the kind that the work goes to first, the one with the largest free share.

    A request for more places than a replica has (after it ran out of memory, say) takes the whole of it.
    """
    fitting = [seat for seat in seats if seat.free >= min(places, seat.slots)]
    return min(
        fitting, key=lambda seat: (seat.apart is not batch, seat.running / seat.slots, seat.replica_id), default=None
    )

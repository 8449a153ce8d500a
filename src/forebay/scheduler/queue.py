"""One model's line: who waits, in which order, with a bound.

It refuses to grow beyond its places, and knows neither time nor replicas: the caller passes both in.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from forebay.inference import Priority


@dataclass(eq=False, slots=True)
class Ticket:
    """One caller's place in line. `number` grows with each arrival; times are monotonic seconds."""

    number: int
    model: str
    priority: Priority
    places: int
    joined_at: float


class Line:
    """Those who wait for one model."""

    def __init__(self, places: int) -> None:
        self.places = places
        self._tickets: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets.values())

    @property
    def full(self) -> bool:
        """Whether nobody else may wait."""
        return len(self._tickets) >= self.places

    def join(self, ticket: Ticket) -> None:
        """Put `ticket` at the end. A ticket that can run at once passes through even when there are no places."""
        self._tickets[ticket.number] = ticket

    def leave(self, ticket: Ticket) -> None:
        """Take `ticket` out; nothing happens if it is not there."""
        self._tickets.pop(ticket.number, None)

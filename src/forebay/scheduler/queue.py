"""A model's line: who waits, in order of arrival, and what their projects have been served of it.

It refuses to know time, replicas and bounds: whoever lets tickets join sees to those.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from forebay.inference import Priority
from forebay.scheduler.shares import Shares, Weights, equal

_SHORTEST_SECONDS = 0.001  # what fails at once does not go on for ever before it is another one's turn


@dataclass(eq=False, slots=True)
class Ticket:
    """One caller's place in line and then on a replica. `number` grows with each arrival; times are monotonic seconds.

    One that is `further` belongs to something that was let in before, and keeps its place in a full line.
    `taken` is how many places it fills on `replica_id` once it has been granted, `granted_at`, and `cost` what its project is
    charged for them at first. Of batch work only: `spared` has its place for good, `preempted` gives it back as soon as the engine has
    stopped; one that `yields` goes on from where it was when it has a place again. `served` has had its answer to the end.
    One that `found_engine` came while a replica of its model was up.
    """

    number: int
    model: str
    priority: Priority
    places: int
    joined_at: float
    replica_id: str = ""
    taken: int = 0
    cost: float = 0.0
    granted_at: float = 0.0
    spared: bool = False
    preempted: bool = False
    project: str = ""
    further: bool = False
    yields: bool = False
    served: bool = False
    found_engine: bool = False

    @property
    def batch(self) -> bool:
        """Whether it is batch work, which goes behind everything else."""
        return self.priority is Priority.BATCH


class Line:
    """Those who wait for one model, in order of arrival, and the `shares` of their projects."""

    def __init__(self, weights: Weights = equal) -> None:
        self._tickets: dict[int, Ticket] = {}
        self.shares = Shares(weights)

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets.values())

    def join(self, ticket: Ticket) -> None:
        """Put `ticket` at the end."""
        self._tickets[ticket.number] = ticket

    def leave(self, ticket: Ticket) -> None:
        """Take `ticket` out; nothing happens if it is not there."""
        self._tickets.pop(ticket.number, None)
        self._forget()

    def serve(self, ticket: Ticket) -> None:
        """Take `ticket` out since it has got its places, on the account of its project."""
        self._tickets.pop(ticket.number, None)
        ticket.cost = self.shares.cost(ticket.project, ticket.taken)
        self.shares.serve(ticket.project, ticket.cost)

    def end(self, ticket: Ticket, seconds: float) -> None:
        """One that was served has given its places back after so long; who was preempted has them on nobody's account."""
        held = max(_SHORTEST_SECONDS, seconds)
        self.shares.end(ticket.project, unused=ticket.cost - (0 if ticket.preempted else ticket.taken * held))
        if not ticket.preempted:
            self.shares.learn(ticket.project, held)
        self._forget()

    def _forget(self) -> None:
        if not self._tickets:
            self.shares.forget()

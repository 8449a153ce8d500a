"""What the hallway tells of one model to whoever decides what is in memory.

It refuses to decide anything, and has no clock: the caller passes the time in.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from forebay.replicas.residency import Wanted
from forebay.scheduler.queue import Line, Ticket


@dataclass(slots=True)
class Seen:
    """When something of a model last ended, and when something online did; None if nothing ever has."""

    online_at: float | None = None
    at: float | None = None

    def note(self, ticket: Ticket, now: float) -> None:
        """It neither waits nor runs any longer."""
        self.at = now
        if not ticket.batch:
            self.online_at = now


def wanted(
    line: Line, backlog: Line, running: Mapping[str, int], batch: Iterable[Ticket], seen: Seen, now: float
) -> Wanted:
    """What waits in `line` and `backlog` and fills the places of `running`, of which those of `batch` are batch work's."""
    of_batch: Counter[str] = Counter()
    for ticket in batch:
        of_batch[ticket.replica_id] += ticket.taken
    online_on = frozenset(name for name, places in running.items() if places > of_batch[name])
    online = bool(len(line) or online_on)
    return Wanted(
        online=len(line),
        batch=len(backlog),
        oldest_online_at=_oldest(line),
        oldest_batch_at=_oldest(backlog),
        last_online_at=now if online else seen.online_at,
        last_at=now if online or len(backlog) or of_batch else seen.at,
        online_on=online_on,
        batch_on=frozenset(of_batch),
    )


def _oldest(line: Line) -> float | None:
    return next((ticket.joined_at for ticket in line), None)

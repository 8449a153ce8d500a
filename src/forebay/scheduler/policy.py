"""Who goes next, and who has to make room: pure decisions over those who wait, those who run and the places there are.

It refuses to starve anybody: online, each `ageing_seconds` in line count as one level of priority; batch work stands
behind all of it, and has a floor. It refuses as well to let anybody wait behind all that another project has in line:
of one level, projects take turns.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from forebay.scheduler.queue import Ticket
from forebay.scheduler.router import Seats, pick_replica
from forebay.scheduler.shares import Shares

_SPARE_PLACES = 1
_FEW = 2  # from which on there is an order
_NEW_SHARES = Shares()


@dataclass(frozen=True, slots=True)
class Background:
    """The batch work of a model: the first that waits, the places that it fills, and those it has to leave free.

    `starves`: none of it runs, and none has been served for as long as the floor allows; whether the line is held up until
    it has found its places is `holds_up`. `room` bounds the places that it may fill in all, for the sake of online work on
    the same device, and `only` the replicas; None is no bound.
    """

    head: Ticket | None = None
    running: int = 0
    reserved: int = 0
    starves: bool = False
    holds_up: bool = True
    room: int | None = None
    only: frozenset[str] | None = None


def rank(ticket: Ticket, now: float, ageing_seconds: float) -> tuple[float, int]:
    """The lower goes first in one project: priority less the levels gained by waiting, then order of arrival."""
    gained = (now - ticket.joined_at) // ageing_seconds
    return (ticket.priority - gained, ticket.number)


def in_order(
    waiting: Iterable[Ticket], now: float, ageing_seconds: float, shares: Shares = _NEW_SHARES
) -> Iterator[Ticket]:
    """Those who wait in the order in which they go, if nobody comes.

    Of each project the first in rank stands for it. Among these (1) the lower level goes first: its priority, less what
    it has gained by waiting if its project is due. One that has had its turn gains nothing: it waits for its own kind,
    and a long line would otherwise lift all of it over whoever comes. (2) Then the lower start tag; (3) then the
    earlier.
    """
    waiting = list(waiting)
    if len(waiting) < _FEW:  # as it is most of the time
        yield from waiting
        return
    lines: dict[str, list[tuple[tuple[float, int], Ticket]]] = {}
    for ticket in waiting:
        lines.setdefault(ticket.project, []).append((rank(ticket, now, ageing_seconds), ticket))
    for line in lines.values():
        heapq.heapify(line)
    turns = _Turns(shares, lines)
    for project in lines:
        turns.stand(project)
    while (first := turns.take()) is not None:
        _, ticket = heapq.heappop(lines[first])
        turns.serve(first, shares.cost(first, ticket.places))
        if lines[first]:
            turns.stand(first)
        yield ticket


class _Turns:
    """Tries out whose turn it is, time after time, with no look at all projects at each: there may be many.

    Those that are due share the start tag of now, and go by what they have gained; the others go by their tags, until
    virtual time has come to them.
    """

    def __init__(self, shares: Shares, lines: Mapping[str, list[tuple[tuple[float, int], Ticket]]]) -> None:
        self._shares = shares
        self._lines = lines
        self._now = shares.now
        self._starts = {project: shares.start(project) for project in lines}
        self._due: list[tuple[float, int, str]] = []
        self._later: list[tuple[float, float, int, str]] = []  # these two may have some that are due or gone by now
        self._coming: list[tuple[float, int, str]] = []
        self._is_due: set[str] = set()

    def stand(self, project: str) -> None:
        """The first of its line stands for a project."""
        (level, number), ticket = self._lines[project][0]
        start = self._starts[project]
        if start <= self._now:
            self._is_due.add(project)
            heapq.heappush(self._due, (level, number, project))
        else:
            heapq.heappush(self._later, (ticket.priority, start, number, project))
            heapq.heappush(self._coming, (start, number, project))

    def take(self) -> str | None:
        """The project that goes next; None if there is none."""
        while self._later and not self._waits(*self._later[0][2:]):
            heapq.heappop(self._later)
        due = (self._due[0][0], self._now, self._due[0][1]) if self._due else None
        if self._later and (due is None or self._later[0][:3] < due):
            return heapq.heappop(self._later)[3]
        return heapq.heappop(self._due)[2] if due is not None else None

    def serve(self, project: str, cost: float) -> None:
        """Virtual time goes on to the start tag of what is served."""
        self._now = max(self._now, self._starts[project])
        self._starts[project] = self._now + cost / self._shares.weight(project)
        self._is_due.discard(project)
        while self._coming and self._coming[0][0] <= self._now:
            _, number, other = heapq.heappop(self._coming)
            if self._waits(number, other):
                self._is_due.add(other)
                heapq.heappush(self._due, (self._lines[other][0][0][0], number, other))

    def _waits(self, number: int, project: str) -> bool:
        """Whether this is still the first of a project that is not due."""
        line = self._lines[project]
        return project not in self._is_due and bool(line) and line[0][0][1] == number


def next_grant(
    online: Iterable[Ticket],
    background: Background,
    seats: list[Seats],
    now: float,
    ageing_seconds: float,
    shares: Shares = _NEW_SHARES,
) -> tuple[Ticket, Seats] | None:
    """The ticket that goes next and the replica it goes to, or None.

    (1) Batch work that starves, as long as it holds up the line or there is room for it; (2) the first in order of those
    online; (3) batch work, if nobody waits online and enough places stay free. Nobody but the one so chosen is looked at:
    one that needs several places holds up the line behind it until they are free, or those who need one place would
    overtake it for ever.
    """
    if background.starves and background.head is not None:
        replica = pick_replica(background.head.places, seats, batch=True)
        if replica is not None or background.holds_up:
            return (background.head, replica) if replica is not None else None
    first = next(in_order(online, now, ageing_seconds, shares), None)
    if first is None and background.head is not None and _leaves_enough(background.head, background, seats):
        first = background.head
    if first is None:
        return None
    replica = pick_replica(first.places, _open_to(first, background, seats), batch=first.batch)
    return (first, replica) if replica is not None else None


def reserved(peak: int, slots: int) -> int:
    """The places that batch work leaves free: what online traffic has lately asked for at once, and one to spare."""
    return min(slots, peak + _SPARE_PLACES) if peak else 0


def to_preempt(
    online: Iterable[Ticket],
    running: Sequence[Ticket],
    returning: Mapping[str, int],
    seats: list[Seats],
    now: float,
    ageing_seconds: float,
    shares: Shares = _NEW_SHARES,
) -> list[Ticket]:
    """Those of `running`, newest first, whose places are needed for tickets that wait online.

    For each that waits, in order: (1) places that are free or on their way back (`returning`, by replica) will do;
    (2) otherwise the fewest of the newest on one replica go; (3) if that is not enough, neither it nor anybody behind it
    is helped by anybody going.
    """
    room = {seat.replica_id: seat.free + returning.get(seat.replica_id, 0) for seat in seats}
    left = [ticket for ticket in running if ticket.replica_id in room]
    gone: list[Ticket] = []
    for ticket in in_order(online, now, ageing_seconds, shares):
        options = [(_room_for(ticket, seat, room, left), seat) for seat in seats]
        chosen = min(
            ((going, seat) for going, seat in options if going is not None),
            key=lambda option: (len(option[0]), option[1].apart, -room[option[1].replica_id], option[1].replica_id),
            default=None,
        )
        if not left or chosen is None:
            break
        going, seat = chosen
        gone += going
        left = [one for one in left if one not in going]
        room[seat.replica_id] += sum(one.taken for one in going) - min(ticket.places, seat.slots)
    return gone


def to_step_aside(running: Sequence[Ticket], room: int | None) -> list[Ticket]:
    """Those of `running`, the newest first, that go until the others fit into `room`: of them that lose nothing by it."""
    if room is None:
        return []
    over, gone = sum(ticket.taken for ticket in running) - room, []
    for ticket in reversed(running):
        if over > 0 and ticket.yields and not ticket.spared:
            gone.append(ticket)
            over -= ticket.taken
    return gone


def position(
    ticket: Ticket, waiting: Iterable[Ticket], now: float, ageing_seconds: float, shares: Shares = _NEW_SHARES
) -> int:
    """How many go before `ticket`, plus one."""
    place = 1
    for other in in_order(waiting, now, ageing_seconds, shares):
        if other is ticket:
            break
        place += 1
    return place


def to_turn_away(
    newcomer: Ticket, waiting: Sequence[Ticket], now: float, ageing_seconds: float, shares: Shares
) -> Ticket:
    """Who leaves a line that is too long by `newcomer`, which is in it.

    (1) Of the project with the most in line by its weight the last in rank, if it has more than that of the newcomer;
    (2) otherwise the newcomer. Those who are `further` stay.
    """
    in_line = Counter(ticket.project for ticket in waiting)

    def length(ticket: Ticket) -> float:
        return in_line[ticket.project] / shares.weight(ticket.project)

    movable = [ticket for ticket in waiting if not ticket.further]
    last = max(movable, key=lambda one: (length(one), rank(one, now, ageing_seconds)), default=newcomer)
    return last if length(last) > length(newcomer) else newcomer


def retry_after_seconds(waiting: int, slots: int, mean_run_seconds: float, longest: float) -> float:
    """When a caller who is turned away may find room: the time that those before it take, within [1, longest]."""
    return min(longest, max(1.0, mean_run_seconds * (waiting + 1) / max(1, slots)))


def _open_to(first: Ticket, background: Background, seats: list[Seats]) -> list[Seats]:
    if background.only is None or not first.batch:
        return seats
    return [seat for seat in seats if seat.replica_id in background.only]


def _leaves_enough(head: Ticket, background: Background, seats: list[Seats]) -> bool:
    needed = min(head.places, max((seat.slots for seat in seats), default=0))
    if background.room is not None and background.running + (needed if background.running else 1) > background.room:
        return False  # one that needs more places than there is room for goes alone
    return background.running + needed <= sum(seat.slots for seat in seats) - background.reserved


def _room_for(ticket: Ticket, seat: Seats, room: Mapping[str, int], running: list[Ticket]) -> list[Ticket] | None:
    """The newest on `seat` that have to go for `ticket`; None if that would not make enough room."""
    missing = min(ticket.places, seat.slots) - room[seat.replica_id]
    going: list[Ticket] = []
    for one in running:
        if missing <= 0:
            break
        if one.replica_id == seat.replica_id:
            going.append(one)
            missing -= one.taken
    return going if missing <= 0 else None

"""Whose chunks the whisper engine computes next: several requests share each step, and each has its turn.

It refuses to compute and to know what a chunk holds; how long a step of how many takes is all that it learns.

A step is led by the request whose turn it is: one that has been passed over `_ROUNDS_MAX` times, the longest waiting
first, else the one with the least left to do. So a short recording waits for no more than the step that runs, and no
long one waits for ever. Others join where they can be computed together, one chunk of each in turn.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from forebay.engines.whisper_chunks import Chunk

_ROUNDS_MAX = 8
_PEERS = 2.0  # who has at most so many times as much left is worth waiting for
_NEWEST = 0.3
_UNKNOWN = 2  # chunks in the first step of all
ENCODE, GENERATE, ALIGN = "encode", "generate", "align"


@dataclass(slots=True, eq=False)
class Entry:
    """One chunk of a request: its place there, what is next for it, and with whom it may be computed."""

    number: int
    request: int
    place: int
    chunk: Chunk
    first: bool = False
    stage: str = ENCODE
    key: str = ""
    alone: bool = False
    suspect: bool = False
    mishaps: int = 0
    again: int = 0

    def begin_again(self) -> None:
        """What the compute process knew of it is lost."""
        self.stage, self.key, self.alone = ENCODE, "", False


@dataclass(slots=True)
class _Turn:
    left: int = 0
    round: int = 0
    waiting: list[Entry] = field(default_factory=list)

    def at(self, stage: str) -> Iterator[Entry]:
        return (entry for entry in self.waiting if entry.stage == stage)


class Line:
    """The chunks that wait. `most` says how many may be in one step of a stage; it has one owner, in one thread."""

    def __init__(self, most: Callable[[str], int]) -> None:
        self._most = most
        self._turns: dict[int, _Turn] = {}
        self._round = 0

    @property
    def waiting(self) -> int:
        """Chunks that no step has now."""
        return sum(len(turn.waiting) for turn in self._turns.values())

    def join(self, request: int, samples: int) -> None:
        """Let a request take turns that has so much to do."""
        self._turns[request] = _Turn(samples, self._round)

    def add(self, entries: Iterable[Entry]) -> None:
        """Let chunks wait, unless their request has left."""
        for entry in entries:
            if turn := self._turns.get(entry.request):
                turn.waiting.append(entry)
                turn.waiting.sort(key=lambda each: each.place)

    def finished(self, request: int, samples: int) -> None:
        """Note that so much of a request is done."""
        if turn := self._turns.get(request):
            turn.left -= samples

    def leave(self, request: int) -> list[Entry]:
        """Forget a request; the chunks of it that waited."""
        turn = self._turns.pop(request, None)
        return turn.waiting if turn else []

    def begin_again(self) -> None:
        """What the compute process knew is lost."""
        for turn in self._turns.values():
            for entry in turn.waiting:
                entry.begin_again()

    def take(self) -> list[Entry]:
        """The chunks of the next step, all for one stage; none if none wait."""
        order = [turn for turn in self._in_turn() if turn.waiting]
        if not order:
            return []
        taken = self._step(order)
        self._round += 1
        for entry in taken:
            turn = self._turns[entry.request]
            turn.waiting.remove(entry)
            turn.round = self._round
        return taken

    def _in_turn(self) -> list[_Turn]:
        late = self._round - _ROUNDS_MAX
        return sorted(
            self._turns.values(), key=lambda turn: (turn.round > late, turn.round if turn.round <= late else turn.left)
        )

    def _step(self, order: list[_Turn]) -> list[Entry]:
        leader = order[0]
        if (first := next(leader.at(ALIGN), None)) is not None:
            return self._together(order, first, self._most(ALIGN))
        if (first := next(leader.at(GENERATE), None)) is not None:
            if first.alone or first.suspect:
                return [first]
            return self._more_to_encode(order, first) or self._together(order, first, self._most(GENERATE))
        first = next(leader.at(ENCODE))
        room = self._most(GENERATE) - sum(1 for turn in order for _ in turn.at(GENERATE))
        return self._together(order, first, min(self._most(ENCODE), max(1, room)))

    def _more_to_encode(self, order: list[_Turn], first: Entry) -> list[Entry]:
        """Chunks to encode before `first` is written, so that more are written together: those of its peers."""
        peers = [turn for turn in order if turn.left <= _PEERS * order[0].left]
        ready = sum(1 for turn in order for entry in turn.at(GENERATE) if entry.key == first.key)
        following = next((entry for turn in peers for entry in turn.at(ENCODE) if not entry.suspect), None)
        room = min(self._most(ENCODE), self._most(GENERATE) - ready)
        return self._together(peers, following, room) if following and room > 0 else []

    def _together(self, order: list[_Turn], first: Entry, most: int) -> list[Entry]:
        """`first`, and others that can be computed with it: one of each request in turn."""
        if first.alone or first.suspect:
            return [first]
        fit = [[each for each in turn.at(first.stage) if _fits(each, first)] for turn in order]
        taken = [first]
        for place in range(max(map(len, fit))):
            taken += (entries[place] for entries in fit if place < len(entries))
        return taken[:most]


def _fits(entry: Entry, first: Entry) -> bool:
    return entry is not first and entry.key == first.key and not (entry.alone or entry.suspect)


class Pace:
    """How long steps take, learned from those that were: a moving average for each stage and number of chunks."""

    def __init__(self) -> None:
        self._each: dict[str, dict[int, float]] = defaultdict(dict)

    def note(self, stage: str, count: int, seconds: float) -> None:
        """Learn that a step of `count` chunks took so long."""
        known = self._each[stage]
        each = seconds / count
        known[count] = each if count not in known else _NEWEST * each + (1 - _NEWEST) * known[count]

    def most(self, stage: str, limit: int, seconds: float) -> int:
        """How many chunks, up to `limit`, a step may have that is to take at most `seconds`; 1 at least."""
        known = self._each[stage]
        if not known:
            return min(limit, _UNKNOWN)
        for count in range(limit, 1, -1):
            smaller = [size for size in known if size <= count] or [min(known)]
            if count * known[max(smaller)] <= seconds:  # a chunk takes less time among more
                return count
        return 1

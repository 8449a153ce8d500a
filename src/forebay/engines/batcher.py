"""Forms the batches that an engine computes: items of like length from several requests, within a budget of padded tokens.

It refuses to compute, to know the time or to look into an item; who was served how much is all that it remembers.

A batch is begun by the request whose turn it is: the one that has been passed over `_ROUNDS_MAX` times, the longest
waiting first; else the one that has been served the fewest tokens. Its shortest item leads, and items that are about as
long join, one of each request in turn. So a request of one text never waits for all of a request of two thousand, and
no request waits for ever.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

_ROUNDS_MAX = 8
_BAND = 1.25
_BAND_TOKENS_MIN = 16


@dataclass(frozen=True, slots=True)
class Item:
    """One text of a request: its place there, and its tokens; or one piece of a recording, and its samples."""

    request: int
    index: int
    tokens: Sequence[int]
    kinds: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens before padding."""
        return len(self.tokens)


@dataclass(slots=True)
class _Line:
    """The items of one request that still wait, the shortest last; what it was served; when it last got into a batch."""

    waiting: list[Item]
    total: int
    served: int
    round: int
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting.sort(key=_negative_length)
        self.lengths = [-item.length for item in self.waiting]

    def pop(self, place: int) -> Item:
        del self.lengths[place]
        return self.waiting.pop(place)

    def put_back(self, item: Item) -> None:
        place = bisect_left(self.lengths, -item.length)
        self.lengths.insert(place, -item.length)
        self.waiting.insert(place, item)


class Batcher:
    """The items that wait. It has one owner, who calls from one thread."""

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}
        self._virtual = 0
        self._round = 0

    @property
    def waiting(self) -> int:
        """Items that no batch has taken yet."""
        return sum(len(line.waiting) for line in self._lines.values())

    def add(self, request: int, items: Iterable[Item]) -> None:
        """Let the items of a new request wait."""
        waiting = list(items)
        if waiting:
            total = sum(item.length for item in waiting)
            self._lines[request] = _Line(waiting, total, self._virtual, self._round)

    def put_back(self, items: Iterable[Item]) -> None:
        """Let the items of a batch that could not be computed wait again, without a new place in line."""
        for item in items:
            line = self._lines.get(item.request)
            if line is None:
                line = self._lines[item.request] = _Line([], item.length, self._virtual, self._round)
            line.put_back(item)
            line.served -= item.length

    def drop(self, request: int) -> None:
        """Forget the items of a request that wait."""
        self._lines.pop(request, None)

    def take(self, budget_tokens: int, small_tokens_max: int | None = None) -> list[Item]:
        """The next batch, out of line; empty when nothing fits.

        With `small_tokens_max`, only requests with at most so many tokens in all are served. One item alone may exceed
        the budget, several never do, counted with their padding.
        """
        lines = {
            request: line
            for request, line in self._lines.items()
            if small_tokens_max is None or line.total <= small_tokens_max
        }
        if not lines:
            return []
        leader = self._turn(lines)
        self._virtual = max(self._virtual, lines[leader].served)
        batch = list(self._fill(lines, leader, budget_tokens))
        self._round += 1
        for item in batch:
            line = lines[item.request]
            line.served += item.length
            line.round = self._round
            if not line.waiting:
                self._lines.pop(item.request, None)
        return batch

    def _turn(self, lines: dict[int, _Line]) -> int:
        oldest = min(lines, key=lambda request: lines[request].round)
        if self._round - lines[oldest].round >= _ROUNDS_MAX:
            return oldest
        return min(lines, key=lambda request: (lines[request].served, lines[request].round))

    def _fill(self, lines: dict[int, _Line], leader: int, budget_tokens: int) -> Iterator[Item]:
        first = lines[leader].pop(-1)
        yield first
        count, longest = 1, first.length
        reach = max(int(first.length * _BAND), first.length + _BAND_TOKENS_MIN)
        floor = min(int(first.length / _BAND), first.length - _BAND_TOKENS_MIN)
        turns = [leader, *sorted((each for each in lines if each != leader), key=lambda each: lines[each].served)]
        while turns:
            still = []
            for request in turns:
                line = lines[request]
                # The longest that the batch can take without more padding, else the next longer one within reach.
                place = _nearest(line, longest, floor, reach)
                if place is None or (count + 1) * max(longest, -line.lengths[place]) > budget_tokens:
                    continue
                item = line.pop(place)
                count, longest = count + 1, max(longest, item.length)
                still.append(request)
                yield item
            turns = still


def _nearest(line: _Line, longest: int, floor: int, reach: int) -> int | None:
    """Where the item is whose length is nearest to `longest` and within the band; None when there is none."""
    place = bisect_left(line.lengths, -longest)  # the first that is not longer
    if place < len(line.lengths) and -line.lengths[place] >= floor:
        return place
    if place > 0 and -line.lengths[place - 1] <= reach:
        return place - 1
    return None


def _negative_length(item: Item) -> int:
    return -item.length

"""The lines of an input file: where they are, read as a stream or one by one, and in which order they run.

It refuses to hold more of a file than a few blocks, and to start lines that share a prompt prefix before the engine has read
the first of them, where that spares the others the reading.
"""

import asyncio
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from forebay.blobs.blobs import Blobs
from forebay.scheduler.shares import Shares, Weights, equal

NO_GROUP = 0
_PLACE = struct.Struct("<IQII")
_NUMBER = struct.Struct("<I")
_BLOCK_BYTES = 256 * 2**10
_BLOCKS_MAX = 16
_GOES_ON_LINES = 8  # of its project, when it is another one's turn: enough that reading a prefix anew costs little


class Place(NamedTuple):
    """Where a line is. `number` counts from 1; lines of one `group` share a prompt prefix."""

    number: int
    offset: int
    length: int
    group: int = NO_GROUP


def pack_places(places: Iterable[Place]) -> bytes:
    """Places as a row keeps them."""
    return b"".join(_PLACE.pack(*place) for place in places)


def unpack_places(data: bytes) -> list[Place]:
    """The other way."""
    return [Place(*fields) for fields in _PLACE.iter_unpack(data)]


def pack_numbers(numbers: Iterable[int]) -> bytes:
    """Line numbers as a row keeps them."""
    return b"".join(_NUMBER.pack(number) for number in numbers)


def unpack_numbers(data: bytes) -> list[int]:
    """The other way."""
    return [number for (number,) in _NUMBER.iter_unpack(data)]


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line without its end; no `data` where it is too long."""

    offset: int
    data: bytes | None


async def raw_lines(pieces: AsyncIterator[bytes], line_bytes_max: int) -> AsyncIterator[RawLine]:
    """Cut a stream into lines. What follows the last line end counts as a line if there is anything."""
    begun: list[bytes] = []
    begun_bytes = offset = 0
    async with aclosing(pieces):  # type: ignore[type-var]  # the streams of blobs are generators
        async for piece in pieces:
            first, *others = piece.split(b"\n")
            if begun_bytes <= line_bytes_max:
                begun.append(first)
            begun_bytes += len(first)
            for other in others:
                yield _raw_line(offset, begun, begun_bytes, line_bytes_max)
                offset += begun_bytes + 1
                begun, begun_bytes = [other], len(other)
    if begun_bytes:
        yield _raw_line(offset, begun, begun_bytes, line_bytes_max)


def _raw_line(offset: int, parts: list[bytes], size: int, line_bytes_max: int) -> RawLine:
    if size > line_bytes_max:
        return RawLine(offset, None)
    return RawLine(offset, parts[0] if len(parts) == 1 else b"".join(parts))


class LineReader:
    """Reads single lines of a blob, a block at a time: neighbours come out of the block that is there already."""

    def __init__(self, blobs: Blobs, key: str) -> None:
        self._blobs = blobs
        self._key = key
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    async def read(self, place: Place) -> bytes:
        """The bytes of one line. Raises NotFound if the blob is gone, StoreUnavailable."""
        first, last = place.offset // _BLOCK_BYTES, (place.offset + place.length) // _BLOCK_BYTES
        if last > first + 1:
            return await self._blobs.read(self._key, place.offset, place.length)
        data = b"".join([await self._block(number) for number in range(first, last + 1)])
        start = place.offset - first * _BLOCK_BYTES
        return data[start : start + place.length]

    async def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            block = await self._blobs.read(self._key, number * _BLOCK_BYTES, _BLOCK_BYTES)
        self._blocks[number] = block
        self._blocks.move_to_end(number)
        while len(self._blocks) > _BLOCKS_MAX:
            self._blocks.popitem(last=False)
        return block


class RunOrder:
    """Which line goes next: pure, told when lines have been read by the engine and when they have ended.

    The group with the fewest running lines goes first, so that each slot of the engine stays with one prefix as long as
    there are several. Where its slots share what they have read (`first_alone`), the first line of a group goes alone
    until its prompt is read; otherwise each slot has to read the prefix itself, and none gains by waiting for another.
    """

    def __init__(self, places: Iterable[Place], *, first_alone: bool = True) -> None:
        self._first_alone = first_alone
        self._waiting: dict[int, deque[Place]] = {}
        self._running: dict[int, int] = {}
        self._warm = {NO_GROUP}
        for place in places:
            self._waiting.setdefault(place.group, deque()).append(place)

    @property
    def empty(self) -> bool:
        """Whether every line has been taken."""
        return not self._waiting

    @property
    def shares(self) -> bool:
        """Whether lines of a group are left."""
        return any(group != NO_GROUP for group in self._waiting)

    def take(self) -> Place | None:
        """The next line; None if there is none that may go now."""
        group = min((each for each in self._waiting if self._may_go(each)), key=self._load, default=None)
        if group is None:
            return None
        self._running[group] = self._running.get(group, 0) + 1
        line = self._waiting[group].popleft()
        if not self._waiting[group]:
            del self._waiting[group]
        return line

    def read(self, place: Place) -> None:
        """The engine has read the prompt of a line."""
        self._warm.add(place.group)

    def ended(self, place: Place) -> None:
        """A line that was taken has ended, however."""
        self._running[place.group] -= 1

    def _may_go(self, group: int) -> bool:
        return not self._first_alone or group in self._warm or not self._running.get(group)

    def _load(self, group: int) -> int:
        return 0 if group == NO_GROUP else self._running.get(group, 0)


class Turn(NamedTuple):
    """Whose line it is that wants a place: of one project the more urgent chunk goes first, then the one that began first."""

    priority: int
    deadline_at: float
    number: int
    project: str = ""


class Window:
    """How many lines of one model are in flight at once, and whose turn it is.

    Of one priority, projects take turns by weight. Some lines may wait in line ahead of a free slot, so that none is
    idle. Lines with shared prefixes may not: the one that follows another into its slot has to be of the same prefix,
    and is chosen when the slot is free. For the same reason their project may go on for a few lines when it is another
    one's turn. Lines that are `aside` wait for something of their project's own and hold no place meanwhile; where so many
    of a project are, no further ones of it come in.
    """

    def __init__(self, slots: int, ahead: int, weights: Weights = equal) -> None:
        self._slots = slots
        self._ahead = ahead
        self._used = 0
        self._projects = Shares(weights)
        self._waiting: list[_Entry] = []
        self._aside: Counter[str] = Counter()

    async def enter(self, turn: Turn, *, shares: bool) -> None:
        """Wait for a place."""
        entered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Entry(turn, shares, entered))
        self._let_in()
        try:
            await entered
        except asyncio.CancelledError:
            if entered.done() and not entered.cancelled():
                self.leave(turn, used=False)
            raise

    def leave(self, turn: Turn, *, used: bool = True) -> None:
        """Give a place back."""
        self._used -= 1
        self._projects.end(turn.project, unused=0 if used else 1)
        self._let_in(turn.project)

    @contextmanager
    def aside(self, turn: Turn) -> Iterator[None]:
        """Leave a place to others while the block lasts; afterwards there may be one more in flight for a while."""
        self._aside[turn.project] += 1
        self._used -= 1
        self._let_in()
        try:
            yield
        finally:
            self._used += 1
            self._aside -= Counter([turn.project])
            self._let_in()

    def _let_in(self, last: str | None = None) -> None:
        """Fill what is free; of the project that used it `last`, if it may go on."""
        self._waiting = [each for each in self._waiting if not each.entered.done()]
        while able := [each for each in self._waiting if self._aside[each.turn.project] < self._slots + self._ahead]:
            due = min(able, key=self._claim)
            first = self._going_on(due, last) or due
            if self._used >= self._slots + (0 if first.shares else self._ahead):
                return
            self._waiting.remove(first)
            self._used += 1
            self._projects.serve(first.turn.project, ahead_of=due.turn.project)
            first.entered.set_result(None)
            last = None
        if not self._waiting:
            self._projects.forget()

    def _claim(self, entry: "_Entry") -> tuple[float, ...]:
        turn = entry.turn
        return (turn.priority, self._projects.start(turn.project), turn.deadline_at, turn.number)

    def _going_on(self, due: "_Entry", last: str | None) -> "_Entry | None":
        """The next of project `last`, if it shares prefixes and its project is not too far ahead of the one that is due."""
        if last is not None and self._aside[last]:
            return None
        same = [each for each in self._waiting if each.turn.project == last and each.turn.priority == due.turn.priority]
        first = min(same, key=self._claim, default=None)
        if first is None or not first.shares:
            return None
        ahead = self._projects.start(first.turn.project) - self._projects.start(due.turn.project)
        return first if ahead * self._projects.weight(first.turn.project) <= _GOES_ON_LINES else None


class _Entry(NamedTuple):
    turn: Turn
    shares: bool
    entered: "asyncio.Future[None]"

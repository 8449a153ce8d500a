"""What is learned of models' memory: kept, believed for a time, and written down in turn."""

import asyncio
from collections.abc import Sequence

import pytest

from forebay.errors import StoreUnavailable
from forebay.peaks import Peak
from forebay.replicas.learned import Learned, largest
from forebay.telemetry import Log
from tests.support.clock import FakeClock

DAY = 86_400.0
GIB = 2**30


class Shelf:
    """A store in memory that can be away."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, int], Peak] = {}
        self.away = False
        self.writes: list[int] = []

    async def load(self, since: float) -> list[Peak]:
        self._there()
        return [peak for peak in self.rows.values() if peak.measured_at >= since]

    async def save(self, peaks: Sequence[Peak], since: float) -> None:
        self._there()
        self.writes.append(len(peaks))
        self.rows |= {(peak.model, peak.device, peak.input_class): peak for peak in peaks}

    def _there(self) -> None:
        if self.away:
            raise StoreUnavailable


def learned(clock: FakeClock, fingerprint: str = "print") -> Learned:
    return Learned({"chat": fingerprint, "other": "x"}, 30, clock, Log())


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_nothing_is_known_before_it_has_worked(clock: FakeClock) -> None:
    known = learned(clock)
    known.observe("chat", "host", 0, 3 * GIB, 1.0)
    assert known.most("chat", "host") is None
    assert known.at_work("chat", "host") is None
    assert known.at_rest("chat", "host") == 3 * GIB


def test_the_most_of_all_sizes_counts_and_for_what_runs_only_those_at_work(clock: FakeClock) -> None:
    known = learned(clock)
    for size_class, gib in ((0, 5), (11, 3), (12, 4), (11, 2)):
        known.observe("chat", "host", size_class, gib * GIB, 1.0)
    known.observe("other", "host", 11, 9 * GIB, 1.0)
    known.observe("chat", "gpu0", 11, 8 * GIB, 1.0)
    assert known.most("chat", "host") == 5 * GIB
    assert known.at_work("chat", "host") == 4 * GIB


def test_what_did_not_come_back_for_long_is_believed_no_longer(clock: FakeClock) -> None:
    known = learned(clock)
    known.observe("chat", "host", 12, 8 * GIB, 1.0)
    known.observe("chat", "host", 11, 4 * GIB, 1.0)
    clock.advance(20 * DAY)
    known.observe("chat", "host", 11, int(3.7 * GIB), 1.0)  # about as much again
    clock.advance(11 * DAY)
    assert known.at_work("chat", "host") == 4 * GIB
    known.observe("chat", "host", 12, GIB, 1.0)
    clock.advance(20 * DAY)
    assert known.at_work("chat", "host") == GIB


async def test_a_later_start_knows_what_an_earlier_one_learned(clock: FakeClock) -> None:
    shelf, first = Shelf(), learned(clock)
    await first.recall(shelf)
    first.observe("chat", "host", 11, 4 * GIB, 1.5)
    await first.save()
    again, changed = learned(clock), learned(clock, "another")
    await again.recall(shelf)
    await changed.recall(shelf)
    assert again.most("chat", "host") == 4 * GIB
    assert changed.most("chat", "host") is None


async def test_what_could_not_be_read_at_the_start_is_read_later(clock: FakeClock) -> None:
    shelf, first, again = Shelf(), learned(clock), learned(clock)
    await first.recall(shelf)
    first.observe("chat", "host", 11, 4 * GIB, 1.5)
    first.observe("chat", "host", 12, 3 * GIB, 1.5)
    await first.save()
    shelf.away = True
    await again.recall(shelf)
    again.observe("chat", "host", 11, GIB, 1.0)
    again.observe("chat", "host", 12, 5 * GIB, 1.0)
    shelf.away = False
    clock.advance(31)
    await again.save_when_due()
    assert again.at_work("chat", "host") == 5 * GIB
    assert shelf.rows["chat", "host", 11].peak_bytes == 4 * GIB


async def test_a_store_that_does_not_answer_holds_up_no_start(clock: FakeClock) -> None:
    class Silent(Shelf):
        async def load(self, since: float) -> list[Peak]:
            await asyncio.Event().wait()
            return await super().load(since)

    recalling = asyncio.create_task(learned(clock).recall(Silent()))
    await asyncio.sleep(0)
    clock.advance(30)
    await asyncio.wait_for(recalling, 10)


async def test_it_writes_now_and_then_and_only_what_is_new(clock: FakeClock) -> None:
    shelf, known = Shelf(), learned(clock)
    await known.recall(shelf)
    known.observe("chat", "host", 11, 100 * GIB, 1.0)
    await known.save_when_due()
    assert shelf.writes == []
    clock.advance(31)
    await known.save_when_due()
    for gib in (101, 99, 100):  # within two in a hundred of what is known
        known.observe("chat", "host", 11, gib * GIB, 1.0)
    clock.advance(31)
    await known.save_when_due()
    known.observe("chat", "host", 11, 103 * GIB, 1.0)
    clock.advance(31)
    await known.save_when_due()
    assert shelf.writes == [1, 1]


async def test_what_could_not_be_written_is_written_later(clock: FakeClock) -> None:
    shelf, known = Shelf(), learned(clock)
    shelf.away = True
    await known.recall(shelf)
    known.observe("chat", "host", 11, GIB, 1.0)
    await known.save()
    assert known.most("chat", "host") == GIB
    shelf.away = False
    await known.save()
    assert shelf.writes == [1]


def test_the_largest_of_nothing_is_nothing() -> None:
    assert largest([]) == 0
    assert largest([b"ab", b"abcd", b""]) == 4

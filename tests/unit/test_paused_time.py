"""Time that does not count: of limits beside a paused engine, and of a process that was stopped."""

import asyncio
from types import SimpleNamespace

import pytest

from forebay.engines import lived
from forebay.engines.lived import Lived
from forebay.replicas.pauses import Pauses
from tests.support.clock import FakeClock
from tests.support.server import eventually


async def _moment() -> None:
    """Let some time pass, however little."""
    loop = asyncio.get_running_loop()
    until = loop.time() + 0.002
    while loop.time() < until:
        await asyncio.sleep(0)


async def test_a_limit_stands_still_in_a_pause_and_then_has_as_much_left() -> None:
    pauses = Pauses()
    timeout = asyncio.timeout(100)
    async with pauses.limit(timeout):
        due = timeout.when()
        for _ in range(3):
            pauses.begin()
            assert timeout.when() is None
            await _moment()
            pauses.end()
        assert due is not None
        assert timeout.when() == pytest.approx(due + pauses.seconds, abs=1e-6)
    assert pauses.count == 3
    assert pauses.seconds >= 3 * 0.002


async def test_a_limit_that_begins_in_a_pause_begins_with_its_end() -> None:
    pauses = Pauses()
    pauses.begin()
    timeout = asyncio.timeout(100)
    async with pauses.limit(timeout):
        assert timeout.when() is None
        await _moment()
        pauses.end()
        assert timeout.when() == pytest.approx(asyncio.get_running_loop().time() + 100, abs=0.5)


async def test_a_limit_ends_its_block_before_a_pause_and_after_one_but_not_in_one() -> None:
    pauses = Pauses()
    with pytest.raises(TimeoutError):
        async with pauses.limit(asyncio.timeout(0.001)):
            await asyncio.Event().wait()
    with pytest.raises(TimeoutError):
        async with pauses.limit(asyncio.timeout(0.01)):
            pauses.begin()
            for _ in range(10):
                await _moment()
            pauses.end()
            await asyncio.Event().wait()
    assert pauses.seconds > 0.01


async def test_a_limit_that_is_over_is_not_brought_back_by_a_pause() -> None:
    pauses, outcome = Pauses(), []

    async def wait() -> None:
        try:
            async with pauses.limit(asyncio.timeout(0)):
                await asyncio.Event().wait()
        except TimeoutError:
            outcome.append("over")

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)  # it waits
    await asyncio.sleep(0)  # its time is over, and it has not heard of it
    pauses.begin()
    pauses.end()
    await waiting
    assert outcome == ["over"]


async def test_no_limit_is_none_in_a_pause_either() -> None:
    pauses = Pauses()
    timeout = asyncio.timeout(None)
    async with pauses.limit(timeout):
        pauses.begin()
        pauses.end()
        assert timeout.when() is None


async def test_what_a_limit_has_left_behind_is_forgotten() -> None:
    pauses = Pauses()
    for _ in range(3):
        async with pauses.limit(asyncio.timeout(100)):
            pass
        with pytest.raises(ValueError, match="gone"):
            async with pauses.limit(asyncio.timeout(100)):
                raise ValueError("gone")
    assert pauses.limits == 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock to be set, in the place of the process's own."""
    found = SimpleNamespace(now=1000.0, looks=0)

    def monotonic() -> float:
        found.looks += 1
        return float(found.now)

    monkeypatch.setattr(lived, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(lived, "time", SimpleNamespace(monotonic=monotonic))
    return found


def test_a_stop_of_minutes_is_a_second(clock: SimpleNamespace) -> None:
    own = Lived()
    begun = own.seconds()
    for _ in range(10):
        clock.now += 0.4
        own.seconds()
    assert own.seconds() - begun == pytest.approx(4.0)
    clock.now += 600
    assert own.seconds() - begun == pytest.approx(5.0)
    clock.now += 0.4
    assert own.seconds() - begun == pytest.approx(5.4)


async def test_who_sleeps_by_it_sleeps_on_after_a_stop(clock: SimpleNamespace) -> None:
    own = Lived()
    ended = asyncio.ensure_future(own.ended(asyncio.get_running_loop().create_future(), 2.5))
    sleeping = asyncio.create_task(own.sleep(1.5))
    await asyncio.sleep(0)
    clock.now += 600
    looks = clock.looks
    await eventually(lambda: clock.looks >= looks + 2, within_seconds=10, what="a look of both")
    assert not sleeping.done()
    clock.now += 600
    await sleeping
    assert not ended.done()
    clock.now += 600
    assert await ended is False


async def test_work_that_ends_in_time_is_told_at_once() -> None:
    work = asyncio.get_running_loop().create_future()
    ended = asyncio.ensure_future(Lived().ended(work, 600))
    await asyncio.sleep(0)
    work.set_result(None)
    assert await ended is True


async def test_what_came_while_this_process_was_held_up_is_read_and_no_silence() -> None:
    clock, engine = FakeClock(), asyncio.StreamReader()
    reading = asyncio.create_task(Pauses().within(8, clock, lambda: engine.read(100)))
    await asyncio.sleep(0)
    clock.advance(600)  # the limit is due, and found so before what has come
    engine.feed_data(b"here")
    assert await reading == b"here"


async def test_what_came_at_the_end_of_a_silence_is_read() -> None:
    clock, engine = FakeClock(), asyncio.StreamReader()
    reading = asyncio.create_task(Pauses().within(8, clock, lambda: engine.read(100)))
    for _ in range(7):
        await _moment()
        clock.advance(1)
    await _moment()
    clock.advance(600)
    engine.feed_data(b"here")
    assert await reading == b"here"


async def test_who_is_interrupted_while_he_reads_looks_no_more() -> None:
    """At the very moment at which a look ends, too."""
    clock, engine = FakeClock(), asyncio.StreamReader()
    reading = asyncio.create_task(Pauses().within(8, clock, lambda: engine.read(100)))
    await _moment()
    clock.advance(1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_the_limit_of_the_whole_ends_a_reading() -> None:
    clock, engine = FakeClock(), asyncio.StreamReader()

    async def whole() -> None:
        async with clock.timeout(1):
            await Pauses().within(8, clock, lambda: engine.read(100))

    reading = asyncio.create_task(whole())
    await _moment()
    clock.advance(1)  # a look ends at this moment, too
    with pytest.raises(TimeoutError):
        await reading


async def test_a_silence_ends_a_reading() -> None:
    clock, engine = FakeClock(), asyncio.StreamReader()
    reading = asyncio.create_task(Pauses().within(8, clock, lambda: engine.read(100)))
    for _ in range(8):
        await _moment()
        assert not reading.done()
        clock.advance(1)
    with pytest.raises(TimeoutError):
        await reading

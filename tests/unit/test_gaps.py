"""Lines that are soon over run in the gaps of online work, and those that are not wait for quiet."""

from collections.abc import AsyncIterator

import pytest

from forebay.errors import EngineGarbled
from tests.support.devices_hall import BRIEF, Hall, opened
from tests.support.hallway import settle


@pytest.fixture
async def hall() -> AsyncIterator[Hall]:
    async with opened(BRIEF) as found:
        yield found


async def some_online(hall: Hall, number: int) -> None:
    """A visit that is over, and the gap after it."""
    await hall.leave(await hall.visit("chat", number))
    await hall.advance(BRIEF.resume_seconds)


async def test_lines_that_are_soon_over_run_in_any_gap_as_many_as_are_over_in_time(hall: Hall) -> None:
    hall.open("chat", slots=8)
    await some_online(hall, 1)
    lines = [await hall.batch("chat", number) for number in range(2, 8)]
    assert [line.waits for line in lines] == [False, *[True] * 5], "one is tried"
    hall.clock.advance(0.015)
    await hall.leave(lines[0])
    assert [line.waits for line in lines[1:]] == [False, False, False, True, True], "three times 15 ms"
    online = await hall.visit("chat", 9)
    await hall.leave(lines[1])
    assert lines[4].waits, "somebody is online"
    await hall.leave(online)
    assert lines[4].waits
    await hall.advance(BRIEF.resume_seconds)
    assert not lines[4].waits


async def test_how_long_a_line_takes_is_its_part_of_what_many_took_together(hall: Hall) -> None:
    hall.open("chat", slots=16)
    lines = [await hall.batch("chat", number) for number in range(8)]
    hall.clock.advance(0.09)
    for line in lines:
        await hall.leave(line)
    await some_online(hall, 10)
    lines = [await hall.batch("chat", number) for number in range(11, 19)]
    assert [line.waits for line in lines].count(False) == 4, "of an eighth of 90 ms each"


async def test_lines_that_take_long_wait_for_quiet_once_that_is_known(hall: Hall) -> None:
    hall.open("chat")
    await some_online(hall, 1)
    first = await hall.batch("chat", 2)
    assert not first.waits
    hall.clock.advance(0.3)
    await hall.leave(first)
    await some_online(hall, 3)
    later = await hall.batch("chat", 4)
    assert later.waits
    await hall.advance(BRIEF.quiet_seconds)
    assert not later.waits


async def test_lines_that_took_long_are_tried_again_after_a_hundred_times_as_long(hall: Hall) -> None:
    hall.open("chat")
    await some_online(hall, 1)
    first = await hall.batch("chat", 2)
    hall.clock.advance(0.3)
    await hall.leave(first)
    lines = [await hall.batch("chat", number) for number in (3, 4)]
    seen = []
    for number in range(5, 30):
        await some_online(hall, number)
        await hall.advance(1.5)
        if not lines[0].waits:
            break
        seen.append(hall.clock.monotonic())
    assert 28 < len(seen) * (1.5 + BRIEF.resume_seconds) < 33
    assert lines[1].waits, "one"


async def test_how_soon_a_line_failed_says_nothing(hall: Hall) -> None:
    chat = hall.open("chat")
    await some_online(hall, 1)
    failing = [await hall.batch("chat", number) for number in range(2, 6)]
    assert [line.waits for line in failing] == [False, True, True, True]
    failing[0].fail(EngineGarbled())
    await settle()
    chat.stop_one()
    await settle()
    assert isinstance(failing[0].error, EngineGarbled)
    assert [line.waits for line in failing[1:]] == [False, True, True], "one is tried again"


async def test_a_line_that_failed_late_is_known_to_be_long(hall: Hall) -> None:
    chat = hall.open("chat")
    await some_online(hall, 1)
    failing = await hall.batch("chat", 2)
    hall.clock.advance(600)
    failing.fail(EngineGarbled())
    await settle()
    chat.stop_one()
    await some_online(hall, 3)
    following = await hall.batch("chat", 4)
    assert following.waits, "it may take as long beside whoever comes"

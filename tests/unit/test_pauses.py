"""How long batch work leaves a model alone."""

import asyncio

from forebay.jobs.pauses import Pauses
from tests.support.clock import FakeClock
from tests.support.hallway import settle


async def test_all_who_wait_for_a_model_go_on_together_and_others_are_not_kept() -> None:
    clock = FakeClock()
    pauses = Pauses(clock)
    pauses.hold("far", 10)
    await pauses.wait("near")
    waiting = [asyncio.create_task(pauses.wait("far")) for _ in range(3)]
    await settle()
    pauses.hold("far", 4)  # what is shorter changes nothing
    clock.advance(9.5)
    await settle()
    assert pauses.held("far")
    pauses.hold("far", 2)  # what is longer does
    clock.advance(1)
    await settle()
    assert not any(task.done() for task in waiting)
    clock.advance(1.2)
    await asyncio.gather(*waiting)
    assert not pauses.held("far")


async def test_without_a_figure_the_wait_doubles_until_something_comes_through() -> None:
    clock = FakeClock()
    pauses = Pauses(clock)
    waits = []
    for _ in range(9):
        for _together in range(3):
            pauses.hold("far", None)
        before = clock.monotonic()
        while pauses.held("far"):
            clock.advance(1)
        waits.append(clock.monotonic() - before)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    pauses.succeeded("far")
    pauses.hold("far", None)
    clock.advance(1)
    assert not pauses.held("far")


async def test_nobody_waits_for_days() -> None:
    clock = FakeClock()
    pauses = Pauses(clock)
    pauses.hold("far", 1e9)
    clock.advance(3600)
    assert not pauses.held("far")

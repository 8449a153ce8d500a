"""Times that are claimed, on a machine that may be held up for a moment."""

from collections.abc import Awaitable, Callable

_ROUNDS_MAX = 3


async def within(seconds: float, measure: Callable[[int], Awaitable[float]]) -> None:
    """Fail unless `measure`, which is told how often it ran before, finds so little in one round of a few."""
    found: list[float] = []
    while len(found) < _ROUNDS_MAX and (not found or found[-1] > seconds):
        found.append(await measure(len(found)))
    assert found[-1] <= seconds, found

"""Times that are claimed, on a machine that may be held up for a moment."""

from collections.abc import Awaitable, Callable, Sequence

_ROUNDS_MAX = 3
_MOMENT_SECONDS = 3.0


async def within(seconds: float, measure: Callable[[int], Awaitable[float]]) -> None:
    """Fail unless `measure`, which is told how often it ran before, finds so little in one round of a few."""
    found: list[float] = []
    while len(found) < _ROUNDS_MAX and (not found or found[-1] > seconds):
        found.append(await measure(len(found)))
    assert found[-1] <= seconds, found


def all_within(seconds: float, times: Sequence[float]) -> bool:
    """Whether each of many took so little, but for one that may have been held up for a moment."""
    *others, longest = sorted(times)
    return max(others) <= seconds and longest <= seconds + _MOMENT_SECONDS

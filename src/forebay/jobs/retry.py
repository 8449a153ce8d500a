"""When to try again: pure functions from the number of failures to seconds.

It refuses to know why something failed.
"""

from collections.abc import Callable

Delay = Callable[[int], float | None]


def doubling(seconds_min: float, seconds_max: float, attempts_max: int) -> Delay:
    """Wait twice as long after each failure, `attempts_max` attempts in all; None means no more."""

    def delay(failures: int) -> float | None:
        if failures >= attempts_max:
            return None
        # The exponent is bounded so that the power stays a small number.
        return float(min(seconds_min * 2.0 ** min(failures - 1, 62), seconds_max))

    return delay

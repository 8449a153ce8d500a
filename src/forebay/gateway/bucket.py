"""A token bucket as a value: what is left of a rate per minute, and when there will be more.

It refuses to know what is counted, for whom, and what time it is.
"""

from dataclasses import dataclass
from typing import Self

_MINUTE = 60.0
_CRUMB = 1e-6  # floating-point dust: who waited as long as told must not be sent away again


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is left of a rate per minute at one moment.

    The level never leaves [-capacity, capacity]: a debt is paid back within a minute, so that together with a full
    refill nobody waits for more than two.
    """

    capacity: int
    level: float
    time: float

    @classmethod
    def full(cls, capacity: int, now: float) -> Self:
        """A bucket from which nothing was taken."""
        return cls(capacity, float(capacity), now)

    def at(self, capacity: int, now: float) -> "Bucket":
        """The same bucket later, perhaps under another limit."""
        gained = max(0.0, now - self.time) * capacity / _MINUTE
        return Bucket(capacity, _within(self.level + gained, capacity), now)

    def less(self, amount: float) -> "Bucket":
        """The bucket after `amount` was taken; a negative one gives back."""
        return Bucket(self.capacity, _within(self.level - amount, self.capacity), self.time)

    def seconds_until(self, amount: float) -> float:
        """Time until `amount` is there, 0 if it is. More than the capacity counts as the capacity."""
        missing = min(amount, self.capacity) - self.level
        return missing * _MINUTE / self.capacity if missing > _CRUMB else 0.0


def _within(level: float, capacity: int) -> float:
    return max(-float(capacity), min(float(capacity), level))

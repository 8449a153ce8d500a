"""How many places online traffic asks for at once: now, and at most in the seconds before.

It refuses to know what the figure is good for, and has no clock: the caller passes the time in.
"""

from collections import deque


class Demand:
    """A level that goes up and down, and its peak over a sliding window."""

    def __init__(self, window_seconds: float) -> None:
        self._window = window_seconds
        self._level = 0
        self._past: deque[tuple[int, float]] = deque()  # (level, when it ended); each is below the one before it

    def change(self, places: int, now: float) -> None:
        """So many places more, or fewer, from now on."""
        if places < 0:
            while self._past and self._past[-1][0] <= self._level:
                self._past.pop()
            self._past.append((self._level, now))
        self._level += places

    def peak(self, now: float) -> int:
        """The highest level of the window that ends now."""
        while self._past and self._past[0][1] + self._window <= now:
            self._past.popleft()
        return max(self._level, self._past[0][0]) if self._past else self._level

    def next_drop(self) -> float | None:
        """When the peak of the last look may fall by the mere passing of time."""
        return self._past[0][1] + self._window if self._past else None

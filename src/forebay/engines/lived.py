"""A clock that stands still while its process is stopped, for whoever asks whether work takes too long.

It refuses to tell the time of day. A process is not told that it was stopped: the clock takes any time in which nobody has
looked at it for such a stop, and counts a second of it at most. So somebody has to sleep by it while something is measured.
"""

import asyncio
import time
from typing import Any

_LOOK_SECONDS = 0.5
_GAP_SECONDS_MAX = 1.0


class Lived:
    """The seconds that this process has lived through."""

    def __init__(self) -> None:
        self._seconds = self._looked_at = time.monotonic()

    def seconds(self) -> float:
        """On a clock that never goes back."""
        now = time.monotonic()
        self._seconds += min(now - self._looked_at, _GAP_SECONDS_MAX)
        self._looked_at = now
        return self._seconds

    async def sleep(self, seconds: float) -> None:
        """Wait for so much of this clock."""
        until = self.seconds() + seconds
        while (left := until - self.seconds()) > 0:
            await asyncio.sleep(min(left, _LOOK_SECONDS))

    async def ended(self, work: "asyncio.Future[Any]", seconds: float) -> bool:
        """Whether `work` has ended within so much of this clock; it goes on if not."""
        until = self.seconds() + seconds
        while not work.done() and (left := until - self.seconds()) > 0:
            await asyncio.wait([work], timeout=min(left, _LOOK_SECONDS))
        return work.done()

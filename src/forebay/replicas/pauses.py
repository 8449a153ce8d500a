"""When a replica stood still, so that nobody counts that time.

It refuses to pause anything: it is told when a pause begins and ends.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import TracebackType

from forebay.clock import Clock

_LOOKS = 8


class Pauses:
    """The pauses of one replica. `count` is of those that have begun."""

    def __init__(self) -> None:
        self.count = 0
        self._since: float | None = None
        self._ended_seconds = 0.0
        self._limits: dict[asyncio.Timeout, float | None] = {}

    @property
    def paused(self) -> bool:
        """Whether there is one now."""
        return self._since is not None

    @property
    def limits(self) -> int:
        """How many timeouts stand still in a pause."""
        return len(self._limits)

    @property
    def seconds(self) -> float:
        """How long all of them took together."""
        return self._ended_seconds + (0.0 if self._since is None else _now() - self._since)

    def begin(self) -> None:
        """A pause begins: every limit stands still."""
        self.count += 1
        self._since = _now()
        for timeout in self._limits:
            self._hold(timeout, self._since)

    def end(self) -> None:
        """The pause ends: every limit goes on with what was left of it."""
        now = _now()
        self._ended_seconds += 0.0 if self._since is None else now - self._since
        self._since = None
        for timeout, left in self._limits.items():
            if left is not None and not timeout.expired():
                timeout.reschedule(now + left)
            self._limits[timeout] = None

    def limit(self, timeout: asyncio.Timeout) -> "Limit":
        """`timeout`, which then does not count the pauses."""
        return Limit(self, timeout)

    async def within(self, seconds: float, clock: Clock, read: Callable[[], Awaitable[bytes]]) -> bytes:
        """What `read` gives, which loses nothing by being cancelled. Raises TimeoutError when that takes so long.

        Neither pauses count nor, but for an eighth, time in which this process itself was held up: what has come meanwhile
        lies ready at the next look, the last of which does not wait.
        """
        for left in range(_LOOKS, -1, -1):
            with contextlib.suppress(TimeoutError):
                async with self.limit(clock.timeout(seconds / _LOOKS if left else 0)):
                    return await read()
        raise TimeoutError

    def follow(self, timeout: asyncio.Timeout) -> None:
        """Let `timeout`, whose block has begun, stand still in every pause."""
        self._limits[timeout] = None
        if self.paused:
            self._hold(timeout, _now())

    def forget(self, timeout: asyncio.Timeout) -> None:
        """Its block is about to end."""
        self._limits.pop(timeout, None)

    def _hold(self, timeout: asyncio.Timeout, now: float) -> None:
        when = timeout.when()
        if when is not None and not timeout.expired():
            self._limits[timeout] = max(0.0, when - now)
            timeout.reschedule(None)


class Limit:
    """A timeout that stands still while a replica does. Used once, as the timeout itself would be."""

    def __init__(self, pauses: Pauses, timeout: asyncio.Timeout) -> None:
        self._pauses = pauses
        self._timeout = timeout

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._pauses.follow(self._timeout)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pauses.forget(self._timeout)
        await self._timeout.__aexit__(kind, error, trace)


def _now() -> float:
    return asyncio.get_running_loop().time()

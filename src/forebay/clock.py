"""The one door to time and chance: now, monotonic, sleep, timeouts, ids and random bytes.

It refuses to be bypassed: an import contract keeps `time`, `random`, `secrets` and `uuid` out of every other room.
"""

import asyncio
import random
import secrets
import time
from typing import Protocol

_ID_BYTES = 16
_SLICE_SECONDS = 0.003


class Clock(Protocol):
    """Time and chance as the rooms see them. Seconds everywhere."""

    def now(self) -> float:
        """Wall-clock seconds since the Unix epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait without blocking the event loop."""
        ...

    def timeout(self, seconds: float | None) -> asyncio.Timeout:
        """A context that raises TimeoutError once `seconds` have passed; None never does."""
        ...

    def jitter(self, seconds: float) -> float:
        """A random duration in [0.5, 1.0] of `seconds`, so that retries do not march in step."""
        ...


class SystemClock:
    """The real clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float | None) -> asyncio.Timeout:
        return asyncio.timeout(seconds)

    def jitter(self, seconds: float) -> float:
        return seconds * random.uniform(0.5, 1.0)  # noqa: S311 - spreads retries, protects nothing


class Slices:
    """Cuts long work on the event loop into slices, so that requests go on in between."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since = clock.monotonic()

    async def pause(self) -> None:
        """Let others go on if this slice has been long enough."""
        if self._clock.monotonic() - self._since > _SLICE_SECONDS:
            await self._clock.sleep(0)
            self._since = self._clock.monotonic()


def new_id(prefix: str) -> str:
    """An unguessable id such as `req_5f…` (128 random bits)."""
    return f"{prefix}_{secrets.token_hex(_ID_BYTES)}"


def new_token(byte_count: int) -> str:
    """A URL-safe secret made of `byte_count` random bytes."""
    return secrets.token_urlsafe(byte_count)


def random_bytes(count: int) -> bytes:
    """`count` bytes from the operating system's generator."""
    return secrets.token_bytes(count)


Random = random.Random
"""What `seeded` gives, for annotations."""


def seeded(seed: int) -> random.Random:
    """Chance that can be had again, for measurements; protects nothing."""
    return random.Random(seed)  # noqa: S311 - repeats on purpose

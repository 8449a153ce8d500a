"""A clock that moves only when a test says so. It refuses to wait for anything real."""

import asyncio


class FakeClock:
    """Implements `forebay.clock.Clock`; `advance` is the only thing that moves it."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self._now = now
        self._monotonic = 1_000.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []
        self._timeouts: list[tuple[float, asyncio.Timeout]] = []

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    @property
    def sleepers(self) -> int:
        """How many coroutines wait in `sleep`, so that a test can wait for them to get there."""
        return sum(not future.done() for _, future in self._sleepers)

    async def sleep(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._monotonic + seconds, future))
        self._wake()
        await future

    def timeout(self, seconds: float | None) -> asyncio.Timeout:
        timeout = asyncio.timeout(0 if seconds == 0 else None)
        if seconds:
            self._timeouts.append((self._monotonic + seconds, timeout))
        return timeout

    def jitter(self, seconds: float) -> float:
        return seconds

    def advance(self, seconds: float) -> None:
        """Move both clocks on, and wake whoever is due."""
        self._now += seconds
        self._monotonic += seconds
        self._wake()

    def jump(self, seconds: float) -> None:
        """Set the wall clock alone, as an administrator or NTP would."""
        self._now += seconds

    def _wake(self) -> None:
        for due, future in self._sleepers:
            if due <= self._monotonic and not future.done():
                future.set_result(None)
        for due, timeout in self._timeouts:
            if due <= self._monotonic and not timeout.expired():
                _expire(timeout)
        self._sleepers = [entry for entry in self._sleepers if not entry[1].done()]
        self._timeouts = [entry for entry in self._timeouts if entry[0] > self._monotonic]


def _expire(timeout: asyncio.Timeout) -> None:
    try:
        timeout.reschedule(asyncio.get_running_loop().time())
    except RuntimeError:  # its block has ended, or never began
        return

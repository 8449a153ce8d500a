"""The pruner: removes what has outlived its time, a bounded number of rows at a time.

It refuses to remove anything that is still live or that a live job needs.
"""

from collections.abc import Awaitable, Callable, Sequence

from forebay.clock import Clock
from forebay.config import JobSettings
from forebay.errors import ForebayError
from forebay.telemetry import Log

Sweep = Callable[[float, int], Awaitable[int]]  # (now, rows at most) -> rows removed


class Pruner:
    """Runs the sweeps of the rooms that keep something."""

    def __init__(self, sweeps: Sequence[Sweep], settings: JobSettings, clock: Clock) -> None:
        self._sweeps = sweeps
        self._settings = settings
        self._clock = clock
        self._log = Log()

    async def run(self) -> None:
        """Sweep now and on every tick, until cancelled."""
        while True:
            await self.tick()
            await self._clock.sleep(self._clock.jitter(self._settings.prune_seconds))

    async def tick(self) -> None:
        """One round; a sweep that meets trouble leaves the others alone."""
        for sweep in self._sweeps:
            try:
                removed = await sweep(self._clock.now(), self._settings.prune_rows_max)
            except ForebayError as error:  # the store is away; the next tick comes
                self._log.warning("pruner.failed", reason=str(error))
                continue
            if removed:
                self._log.info("pruner.removed", sweep=sweep.__name__, rows=removed)

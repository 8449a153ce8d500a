"""Models that batch work leaves alone for a while, because a provider has asked for it or is away.

It refuses to know why: whoever is told to wait says for how long, and all lines of the model wait with him.
"""

from forebay.clock import Clock

_SECONDS_MIN = 1.0
_SECONDS_MAX = 60.0  # where the provider does not say how long
_LONGEST_SECONDS = 3600.0
_MOMENT_SECONDS = 0.2


class Pauses:
    """By model, until when. Used on one event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}
        self._in_a_row: dict[str, int] = {}

    def held(self, model: str) -> bool:
        """Whether `model` is left alone now."""
        return self._clock.monotonic() < self._until.get(model, 0.0)

    def hold(self, model: str, seconds: float | None) -> None:
        """Leave `model` alone for `seconds`; without a figure, twice as long each time until something succeeds."""
        if seconds is None:
            if self.held(model):
                return  # of those who were under way together, the first has said it
            rounds = self._in_a_row[model] = self._in_a_row.get(model, 0) + 1
            seconds = min(_SECONDS_MAX, _SECONDS_MIN * 2.0 ** min(rounds - 1, 10))
        until = self._clock.monotonic() + min(_LONGEST_SECONDS, seconds)
        self._until[model] = max(until, self._until.get(model, 0.0))

    def succeeded(self, model: str) -> None:
        """Something of `model` came through."""
        self._in_a_row.pop(model, None)

    async def wait(self, model: str) -> None:
        """Return once `model` is no longer left alone, each a moment apart: it is not always the same who goes first."""
        while (seconds := self._until.get(model, 0.0) - self._clock.monotonic()) > 0:
            await self._clock.sleep(seconds + self._clock.jitter(_MOMENT_SECONDS))

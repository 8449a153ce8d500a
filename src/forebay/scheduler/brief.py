"""Batch work that is over so soon that it may run whenever nobody is online, although it cannot be paused for who comes next.

It refuses to guess: one place is tried, and how long it keeps an engine says how many there are from then on. Nor is it sure
for ever: what has taken long is tried again, or a first line that was slow to begin with would keep all the others out.
"""

_WEIGHT = 1 / 8  # of what ended last
_AGAIN_AFTER = 100  # times as long as one takes: so work that is long has a hundredth of the time at most


class Sharing:
    """What one place of batch work has had of an engine: its time, in equal parts for the places that are filled meanwhile."""

    __slots__ = ("_at", "_each", "_places")

    def __init__(self) -> None:
        self._at = 0.0
        self._each = 0.0
        self._places = 0

    def change(self, places: int, now: float) -> float:
        """So many more are filled from `now` on; what each place has had by then that was filled from the beginning."""
        if self._places:
            self._each += (now - self._at) / self._places
        self._at, self._places = now, self._places + places
        return self._each


class Brief:
    """How long one place of batch work keeps an engine of each model, in seconds, and how many end within `seconds_max`."""

    def __init__(self, seconds_max: float) -> None:
        self._seconds_max = seconds_max
        self._seconds: dict[str, float] = {}
        self._learned_at: dict[str, float] = {}

    def learn(self, model: str, seconds: float, now: float) -> None:
        """A place of work of `model` has kept an engine for so long: its part of the time that it was there."""
        before = self._seconds.get(model, seconds)
        self._seconds[model] = before + _WEIGHT * (seconds - before)
        self._learned_at[model] = now

    def places(self, model: str, now: float) -> int:
        """How many run at once and are over in time; one of those of which nothing is known, or was only long ago."""
        seconds = self._seconds.get(model)
        if not self._seconds_max:
            return 0
        if seconds is None:
            return 1
        tried = int(now - self._learned_at[model] > _AGAIN_AFTER * seconds)
        return max(tried, int(self._seconds_max / max(seconds, 1e-3)))

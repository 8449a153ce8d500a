"""Batch work that is over so soon that it may run whenever nobody is online, although it cannot be paused for who comes next.

It refuses to guess: one place is tried, and how long it keeps an engine says how many there are from then on.
"""

_WEIGHT = 1 / 8  # of what ended last


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

    def learn(self, model: str, seconds: float) -> None:
        """A place of work of `model` has kept an engine for so long: its part of the time that it was there."""
        before = self._seconds.get(model, seconds)
        self._seconds[model] = before + _WEIGHT * (seconds - before)

    def places(self, model: str) -> int:
        """How many run at once and are over in time; one of those of which nothing is known."""
        seconds = self._seconds.get(model)
        if not self._seconds_max:
            return 0
        return 1 if seconds is None else int(self._seconds_max / max(seconds, 1e-3))

"""Batch work that is over so soon that it may run whenever nobody is online, although it cannot be paused for who comes next.

It refuses to guess: one place is tried, and how long it keeps an engine says how many there are from then on.
"""

_WEIGHT = 1 / 8  # of what ended last


class Brief:
    """How long one place of batch work keeps an engine of each model, in seconds, and how many end within `seconds_max`."""

    def __init__(self, seconds_max: float) -> None:
        self._seconds_max = seconds_max
        self._seconds: dict[str, float] = {}

    def learn(self, model: str, seconds: float) -> None:
        """Work of `model` has kept an engine for so long: its time there, by how many were there at once."""
        before = self._seconds.get(model, seconds)
        self._seconds[model] = before + _WEIGHT * (seconds - before)

    def places(self, model: str) -> int:
        """How many run at once and are over in time; one of those of which nothing is known."""
        seconds = self._seconds.get(model)
        if not self._seconds_max:
            return 0
        return 1 if seconds is None else int(self._seconds_max / max(seconds, 1e-3))

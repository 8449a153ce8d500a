"""The circuit breaker of an upstream: closed, open for a while after failures in a row, half-open for one request.

A pure state machine: it refuses to know clocks, requests and what counts as a failure; callers pass the time in.
"""

from enum import StrEnum

_PROBE_RETRY_SECONDS = 1.0  # when those may come again who are turned away while one request tries


class CircuitState(StrEnum):
    """CLOSED -> OPEN after failures in a row -> HALF_OPEN after the cool-down -> CLOSED, or OPEN again."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Who may go, from how those fared who went before.

    `enter` gives a round. What becomes of a request is reported with its round; a report of an earlier round, which began
    before the circuit opened, changes nothing any longer.
    """

    def __init__(self, failures_max: int, cooldown_seconds: float) -> None:
        self._failures_max = failures_max
        self._cooldown_seconds = cooldown_seconds
        self._failures = 0
        self._open_until: float | None = None
        self._probing = False
        self._round = 0

    def state(self, now: float) -> CircuitState:
        """Where it is."""
        if self._open_until is None:
            return CircuitState.CLOSED
        return CircuitState.HALF_OPEN if self._probing or now >= self._open_until else CircuitState.OPEN

    def refuses_for(self, now: float) -> float | None:
        """For how long nobody may go; None if somebody may."""
        if self._open_until is None:
            return None
        if self._probing:
            return _PROBE_RETRY_SECONDS
        return self._open_until - now if now < self._open_until else None

    def enter(self, now: float) -> int | None:
        """Let a request go: its round, or None if it may not. After the cool-down one goes by itself."""
        if self.refuses_for(now) is not None:
            return None
        if self._open_until is not None:
            self._probing = True
            self._round += 1
        return self._round

    def answered(self, round_number: int) -> None:
        """The upstream has begun to answer, which is all that a probe has to show."""
        if round_number == self._round and self._probing:
            self._close()

    def succeeded(self, round_number: int) -> None:
        """The answer was whole, or an error of the request's own."""
        if round_number == self._round:
            self._close()

    def failed(self, round_number: int, now: float) -> None:
        """The upstream could not be reached, failed, or kept silent."""
        if round_number != self._round:
            return
        self._failures += 1
        if self._probing or self._failures >= self._failures_max:
            self._open_until = now + self._cooldown_seconds
            self._probing = False
            self._failures = 0
            self._round += 1

    def left(self, round_number: int) -> None:
        """The caller went away before anything could be learned; another one may try."""
        if round_number == self._round:
            self._probing = False

    def _close(self) -> None:
        self._failures = 0
        self._open_until = None
        self._probing = False

"""The circuit breaker under every order of requests, ends and waits; it is checked against a plain model of itself."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from forebay.replicas.breaker import Breaker, CircuitState

FAILURES = 3
COOLDOWN = 10.0


class Circuit(RuleBasedStateMachine):
    """Requests come and end in any order."""

    rounds = Bundle("rounds")

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(FAILURES, COOLDOWN)
        self.now = 100.0
        self.in_a_row = 0
        self.opened_at: float | None = None
        self.probe: int | None = None
        self.current: set[int] = {0}

    @rule(seconds=st.sampled_from([0.5, COOLDOWN - 0.5, COOLDOWN]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=rounds)
    def come(self) -> object:
        may = self.opened_at is None or (self.probe is None and self.now >= self.opened_at + COOLDOWN)
        found = self.breaker.enter(self.now)
        assert (found is not None) == may
        if found is None:
            return multiple()
        if self.opened_at is not None:
            self.probe = found
            self.current = {found}
        assert found in self.current
        return found

    @rule(number=consumes(rounds))
    def fail(self, number: int) -> None:
        self.breaker.failed(number, self.now)
        if number not in self.current:
            return
        self.in_a_row += 1
        if self.probe is not None or self.in_a_row == FAILURES:
            self.opened_at, self.probe, self.in_a_row = self.now, None, 0
            self.current = {number + 1}

    @rule(number=consumes(rounds))
    def succeed(self, number: int) -> None:
        self.breaker.succeeded(number)
        if number in self.current:
            self.opened_at, self.probe, self.in_a_row = None, None, 0

    @rule(number=rounds)
    def begin_to_answer(self, number: int) -> None:
        self.breaker.answered(number)
        if number in self.current and self.probe is not None:
            self.opened_at, self.probe, self.in_a_row = None, None, 0

    @rule(number=consumes(rounds))
    def leave(self, number: int) -> None:
        self.breaker.left(number)
        if number in self.current:
            self.probe = None

    @invariant()
    def it_says_what_it_does(self) -> None:
        state, refuses = self.breaker.state(self.now), self.breaker.refuses_for(self.now)
        if self.opened_at is None:
            assert (state, refuses) == (CircuitState.CLOSED, None)
        elif self.probe is not None:
            assert state is CircuitState.HALF_OPEN
            assert refuses is not None
        elif self.now >= self.opened_at + COOLDOWN:
            assert (state, refuses) == (CircuitState.HALF_OPEN, None)
        else:
            assert state is CircuitState.OPEN
            assert refuses == pytest.approx(self.opened_at + COOLDOWN - self.now)


TestCircuit = Circuit.TestCase


def test_a_request_that_began_before_it_opened_cannot_close_it() -> None:
    breaker = Breaker(1, COOLDOWN)
    old, bad = breaker.enter(0), breaker.enter(0)
    assert old is not None
    assert bad is not None
    breaker.failed(bad, 0)
    breaker.succeeded(old)
    assert breaker.state(1) is CircuitState.OPEN
    breaker.failed(old, 5)
    assert breaker.state(COOLDOWN) is CircuitState.HALF_OPEN, "nor keep it open for longer"

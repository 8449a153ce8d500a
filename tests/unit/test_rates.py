"""Requests and tokens per minute on a clock that stands still."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.errors import RateLimited
from forebay.gateway.auth import Principal
from forebay.gateway.rates import Rates, format_reset
from forebay.store.key_format import Role
from tests.support.clock import FakeClock


def principal(key: str = "key_1", requests: int | None = None, tokens: int | None = None) -> Principal:
    return Principal(key, "default", Role.MEMBER, requests_per_minute=requests, tokens_per_minute=tokens)


def test_a_key_without_a_rate_has_no_headers_and_no_limit() -> None:
    rates, free = Rates(FakeClock()), principal()
    for _ in range(1000):
        assert rates.check(free, 1_000_000) == {}
        rates.settle(free, 1_000_000, 1_000_000)
    assert rates.headers(free) == {}
    assert not rates._buckets


def test_requests_run_out_and_come_back() -> None:
    clock = FakeClock()
    rates, caller = Rates(clock), principal(requests=60)
    for left in range(59, -1, -1):
        headers = rates.check(caller, 0)
        assert headers["x-ratelimit-remaining-requests"] == str(left)
    assert headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    with pytest.raises(RateLimited, match="60 requests per minute") as refused:
        rates.check(caller, 0)
    assert refused.value.retry_after_seconds == pytest.approx(1)
    clock.advance(refused.value.retry_after_seconds or 0)
    assert rates.check(caller, 0)["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(RateLimited):
        rates.check(caller, 0)


def test_a_refusal_takes_nothing() -> None:
    rates, caller = Rates(FakeClock()), principal(requests=10, tokens=100)
    rates.check(caller, 100)
    before = rates.headers(caller)
    for _ in range(50):
        with pytest.raises(RateLimited, match="100 tokens per minute"):
            rates.check(caller, 1)
    assert rates.headers(caller) == before
    assert before["x-ratelimit-remaining-requests"] == "9"
    assert before["x-ratelimit-remaining-tokens"] == "0"


def test_settling_charges_the_difference_both_ways() -> None:
    rates, caller = Rates(FakeClock()), principal(tokens=1000)
    rates.check(caller, 200)
    rates.settle(caller, 500, 200)
    assert rates.headers(caller)["x-ratelimit-remaining-tokens"] == "500"
    rates.check(caller, 300)
    rates.settle(caller, 0, 300)
    assert rates.headers(caller)["x-ratelimit-remaining-tokens"] == "500"


def test_a_prompt_above_the_whole_rate_passes_once_when_the_bucket_is_full() -> None:
    clock = FakeClock()
    rates, caller = Rates(clock), principal(tokens=100)
    rates.check(caller, 1_000_000)
    with pytest.raises(RateLimited) as refused:
        rates.check(caller, 1_000_000)
    assert refused.value.retry_after_seconds == 120
    clock.advance(120)
    rates.check(caller, 1_000_000)


def test_keys_do_not_share_a_bucket() -> None:
    rates = Rates(FakeClock())
    rates.check(principal("key_1", requests=1), 0)
    rates.check(principal("key_2", requests=1), 0)
    with pytest.raises(RateLimited):
        rates.check(principal("key_1", requests=1), 0)


def test_the_number_of_buckets_is_bounded() -> None:
    rates = Rates(FakeClock(), keys_max=3)
    for number in range(100):
        rates.check(principal(f"key_{number}", requests=5), 0)
    assert list(rates._buckets) == ["key_97", "key_98", "key_99"]


@given(
    st.integers(1, 10_000),
    st.integers(1, 1_000_000),
    st.lists(st.tuples(st.floats(0, 200), st.integers(0, 2_000_000), st.integers(0, 2_000_000)), max_size=30),
)
def test_waits_are_bounded_kept_and_never_beaten(
    requests: int, tokens: int, steps: list[tuple[float, int, int]]
) -> None:
    clock = FakeClock()
    rates, caller = Rates(clock), principal(requests=requests, tokens=tokens)
    start = clock.monotonic()
    for granted, (pause, estimate, used) in enumerate(steps, start=1):
        clock.advance(pause)
        waits = 0
        while wait := wait_if_refused(rates, clock, caller, estimate):
            waits += 1
            assert 0 < wait <= 120 + 1e-6
            assert waits <= 2, "one wait for each of the two rates is enough"
        assert granted <= requests * (1 + (clock.monotonic() - start) / 60) + 1e-3
        rates.settle(caller, used, estimate)
        headers = rates.headers(caller)
        assert 0 <= int(headers["x-ratelimit-remaining-tokens"]) <= tokens
        assert 0 <= int(headers["x-ratelimit-remaining-requests"]) <= requests


def wait_if_refused(rates: Rates, clock: FakeClock, caller: Principal, estimate: int) -> float | None:
    """How long the caller was told to wait, having waited; None if the request passed."""
    try:
        rates.check(caller, estimate)
    except RateLimited as refused:
        clock.advance(refused.retry_after_seconds or 0)
        return refused.retry_after_seconds
    return None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.02, "20ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9996, "1m0s"),
        (60, "1m0s"),
        (90.5, "1m30.5s"),
        (360, "6m0s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert format_reset(seconds) == text

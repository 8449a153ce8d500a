"""Requests and tokens per minute of each key: token buckets, refilled as time passes.

It refuses to wait: who is over the rate is told when to come back. Nothing here awaits, so a change is whole.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

from forebay.clock import Clock
from forebay.errors import RateLimited
from forebay.gateway.auth import Principal
from forebay.gateway.bucket import Bucket

_KEYS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class _Buckets:
    requests: Bucket | None
    tokens: Bucket | None


_UNLIMITED = _Buckets(None, None)


class Rates:
    """The buckets of the keys used last. A key that was forgotten starts anew with a full minute."""

    def __init__(self, clock: Clock, keys_max: int = _KEYS_MAX) -> None:
        self._clock = clock
        self._keys_max = keys_max
        self._buckets: OrderedDict[str, _Buckets] = OrderedDict()

    def check(self, principal: Principal, prompt_estimate: int) -> dict[str, str]:
        """Take one request and `prompt_estimate` tokens; the answer is the rate headers.

        Raises RateLimited and takes nothing when either is not there. After a success the caller must call `settle`
        once with the same estimate, however the request ends. An estimate above the whole minute passes when the
        bucket is full: a request that is too long for the rate is slowed down and not shut out.
        """
        buckets = self._now(principal)
        if buckets is _UNLIMITED:
            return {}
        _refuse_if_short(buckets.requests, 1, "requests")
        _refuse_if_short(buckets.tokens, prompt_estimate, "tokens")
        taken = _Buckets(
            buckets.requests and buckets.requests.less(1), buckets.tokens and buckets.tokens.less(prompt_estimate)
        )
        self._buckets[principal.key_id] = taken
        return _headers(taken)

    def require(self, principal: Principal) -> None:
        """Raise RateLimited if nothing is left, and take nothing: for work that comes before `check`."""
        buckets = self._now(principal)
        _refuse_if_short(buckets.requests, 1, "requests")
        _refuse_if_short(buckets.tokens, 1, "tokens")

    def settle(self, principal: Principal, tokens_used: int, prompt_estimate: int) -> None:
        """Correct the estimate that `check` took to the tokens really used."""
        buckets = self._now(principal)
        if buckets.tokens is not None:
            self._buckets[principal.key_id] = _Buckets(
                buckets.requests, buckets.tokens.less(tokens_used - prompt_estimate)
            )

    def headers(self, principal: Principal) -> dict[str, str]:
        """The rate headers as of now, for an answer that `check` refused."""
        return _headers(self._now(principal))

    def _now(self, principal: Principal) -> _Buckets:
        if principal.requests_per_minute is None and principal.tokens_per_minute is None:
            return _UNLIMITED
        now = self._clock.monotonic()
        before = self._buckets.pop(principal.key_id, _UNLIMITED)
        buckets = _Buckets(
            _bucket(before.requests, principal.requests_per_minute, now),
            _bucket(before.tokens, principal.tokens_per_minute, now),
        )
        self._buckets[principal.key_id] = buckets
        if len(self._buckets) > self._keys_max:
            self._buckets.popitem(last=False)
        return buckets


def _bucket(before: Bucket | None, capacity: int | None, now: float) -> Bucket | None:
    if capacity is None:
        return None
    return Bucket.full(capacity, now) if before is None else before.at(capacity, now)


def _refuse_if_short(bucket: Bucket | None, amount: int, noun: str) -> None:
    if bucket is None:
        return
    seconds = bucket.seconds_until(amount)
    if seconds > 0:
        raise RateLimited(
            f"This API key may use {bucket.capacity} {noun} per minute. Try again in {format_reset(seconds)}.",
            retry_after_seconds=seconds,
        )


def _headers(buckets: _Buckets) -> dict[str, str]:
    headers = {}
    for noun, bucket in (("requests", buckets.requests), ("tokens", buckets.tokens)):
        if bucket is not None:
            headers[f"x-ratelimit-limit-{noun}"] = str(bucket.capacity)
            headers[f"x-ratelimit-remaining-{noun}"] = str(max(0, math.floor(bucket.level)))
            headers[f"x-ratelimit-reset-{noun}"] = format_reset(bucket.seconds_until(bucket.capacity))
    return headers


def format_reset(seconds: float) -> str:
    """A duration as OpenAI writes it: `20ms`, `1s`, `8.64s`, `6m0s`; rounded up, so that nobody comes too early."""
    milliseconds = math.ceil(round(seconds * 1000, 6))
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    rest = f"{milliseconds / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{minutes}m{rest}" if minutes else rest

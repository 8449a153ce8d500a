"""The nouns of what projects use and of what they may use: amounts, quotas of a day or a month, weights.

It holds values alone, all in whole units, so that sums are exact. It refuses to know who counts and where.
"""

import datetime as dt
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import lru_cache
from operator import add, attrgetter

from forebay.errors import InvalidRequest, QuotaExceeded

DAY_SECONDS = 86_400
AMOUNT_MAX = 2**53
WEIGHT_MIN, WEIGHT_MAX = 0.01, 100.0
QUOTAS_MAX = 16
_QUOTA = re.compile(r"([a-z_]{1,32})=(unlimited|[0-9]{1,16})(?:/(day|month))?")


class Resource(StrEnum):
    """What a quota is about. The last two are levels: what is there now, of no day and no month."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    AUDIO_SECONDS = "audio_seconds"
    MEGAPIXEL_STEPS = "megapixel_steps"
    STORED_BYTES = "stored_bytes"
    QUEUED_LINES = "queued_lines"


NOUNS = {
    Resource.REQUESTS: "requests",
    Resource.TOKENS: "tokens",
    Resource.AUDIO_SECONDS: "seconds of sound",
    Resource.MEGAPIXEL_STEPS: "megapixel-steps of pictures",
    Resource.STORED_BYTES: "bytes in files",
    Resource.QUEUED_LINES: "lines of batches in line",
}
LEVELS = frozenset({Resource.STORED_BYTES, Resource.QUEUED_LINES})
_FINE = {Resource.AUDIO_SECONDS: 1000, Resource.MEGAPIXEL_STEPS: 1_000_000}  # parts of a unit that are counted


class Period(StrEnum):
    """How long a quota lasts, in UTC."""

    DAY = "day"
    MONTH = "month"

    def window(self, now: float) -> str:
        """The day or the month of a moment: `2026-11-21`, `2026-11`."""
        return _calendar(int(now // DAY_SECONDS)).names[self]

    def ends_at(self, now: float) -> float:
        """When the day or the month of a moment is over."""
        return _calendar(int(now // DAY_SECONDS)).ends[self]


def day_of(now: float) -> str:
    """The day of a moment in UTC, `2026-11-21`."""
    return Period.DAY.window(now)


@dataclass(frozen=True, slots=True)
class _Day:
    """The names of a day and of its month, and when each is over."""

    names: Mapping[Period, str]
    ends: Mapping[Period, float]


@lru_cache(maxsize=8)
def _calendar(day: int) -> _Day:
    first = dt.datetime.fromtimestamp(day * DAY_SECONDS, dt.UTC)
    month = (first.replace(day=28) + dt.timedelta(days=4)).replace(day=1)
    names = {Period.DAY: first.strftime("%Y-%m-%d"), Period.MONTH: first.strftime("%Y-%m")}
    return _Day(names, {Period.DAY: float((day + 1) * DAY_SECONDS), Period.MONTH: month.timestamp()})


@dataclass(frozen=True, slots=True)
class Amounts:
    """So much of what is counted by day and by month. Sound in milliseconds, pictures in pixels times steps."""

    requests: int = 0
    tokens: int = 0
    audio_ms: int = 0
    pixel_steps: int = 0

    def __add__(self, other: "Amounts") -> "Amounts":
        return Amounts(
            self.requests + other.requests,
            self.tokens + other.tokens,
            self.audio_ms + other.audio_ms,
            self.pixel_steps + other.pixel_steps,
        )

    def __sub__(self, other: "Amounts") -> "Amounts":
        return Amounts(
            self.requests - other.requests,
            self.tokens - other.tokens,
            self.audio_ms - other.audio_ms,
            self.pixel_steps - other.pixel_steps,
        )

    def at_least(self, other: "Amounts") -> "Amounts":
        """Of each the larger amount."""
        return Amounts(
            max(self.requests, other.requests),
            max(self.tokens, other.tokens),
            max(self.audio_ms, other.audio_ms),
            max(self.pixel_steps, other.pixel_steps),
        )

    def of(self, resource: Resource) -> int:
        """What of it a quota is about, in the parts that are counted."""
        return _AMOUNT_OF[resource](self)


NOTHING = Amounts()
_AMOUNT_OF: Mapping[Resource, Callable[[Amounts], int]] = {
    Resource.REQUESTS: attrgetter("requests"),
    Resource.TOKENS: attrgetter("tokens"),
    Resource.AUDIO_SECONDS: attrgetter("audio_ms"),
    Resource.MEGAPIXEL_STEPS: attrgetter("pixel_steps"),
}


def milliseconds(seconds: float) -> int:
    """Sound as it is counted."""
    return round(seconds * 1000)


@dataclass(frozen=True, slots=True)
class Account:
    """On whose account a piece of work goes. A job of old has no key."""

    project: str
    key_id: str
    model: str
    capability: str


@dataclass(frozen=True, slots=True)
class Use:
    """What was used."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    audio_ms: int = 0
    pixel_steps: int = 0
    images: int = 0

    def __add__(self, other: "Use") -> "Use":
        return Use(*map(add, self.values, other.values))

    @property
    def values(self) -> tuple[int, ...]:
        """All of it, in order."""
        return _ALL_OF(self)

    @property
    def amounts(self) -> Amounts:
        """As quotas count it."""
        return Amounts(self.requests, self.prompt_tokens + self.completion_tokens, self.audio_ms, self.pixel_steps)


_ALL_OF: Callable[[Use], tuple[int, ...]] = attrgetter(*(field.name for field in fields(Use)))


@dataclass(frozen=True, slots=True)
class Counted:
    """What a project has used on the day and in the month with these names."""

    day: str
    month: str
    of_day: Amounts
    of_month: Amounts


@dataclass(frozen=True, slots=True)
class Quota:
    """At most `limit` of a resource in each period, or at any time where there is none; None lifts a default."""

    resource: Resource
    limit: int | None
    period: Period | None = None

    @property
    def parts(self) -> int | None:
        """The limit in the parts that are counted."""
        return None if self.limit is None else self.limit * parts_of(self.resource)

    def __str__(self) -> str:
        limit = "unlimited" if self.limit is None else str(self.limit)
        return f"{self.resource}={limit}" + (f"/{self.period}" if self.period else "")


def parts_of(resource: Resource) -> int:
    """In how many parts a unit of it is counted."""
    return _FINE.get(resource, 1)


@dataclass(frozen=True, slots=True)
class ProjectLimits:
    """The share of a project where several want the same, and the quotas of its own."""

    weight: float = 1.0
    quotas: tuple[Quota, ...] = ()

    def over(self, defaults: Collection[Quota]) -> tuple[Quota, ...]:
        """The quotas in force: its own, and the defaults that they do not replace."""
        own = {(quota.resource, quota.period) for quota in self.quotas}
        rest = [quota for quota in defaults if (quota.resource, quota.period) not in own]
        return tuple(quota for quota in (*self.quotas, *rest) if quota.limit is not None)


def parse_quota(text: str) -> Quota:
    """`tokens=1000000/day`, `stored_bytes=5000000000`, `requests=unlimited/month`. Raises InvalidRequest."""
    found = _QUOTA.fullmatch(text)
    names = [resource.value for resource in Resource]
    if found is None or found[1] not in names:
        raise InvalidRequest(
            f"A quota is written as tokens=1000000/day. It is about one of {', '.join(names)}.", param="quotas"
        )
    resource, period = Resource(found[1]), Period(found[3]) if found[3] else None
    limit = None if found[2] == "unlimited" else int(found[2])
    if (resource in LEVELS) is not (period is None):
        remedy = "of no day and no month" if resource in LEVELS else "of a day or a month: put /day or /month behind it"
        raise InvalidRequest(f"A quota of {resource} is {remedy}.", param="quotas")
    if limit is not None and limit * parts_of(resource) > AMOUNT_MAX:
        raise InvalidRequest(f"A quota of {resource} is at most {AMOUNT_MAX // parts_of(resource)}.", param="quotas")
    return Quota(resource, limit, period)


def parse_quotas(texts: Iterable[str]) -> tuple[Quota, ...]:
    """Several, each resource and period at most once. Raises InvalidRequest."""
    quotas = tuple(parse_quota(text) for text in texts)
    if len(quotas) > QUOTAS_MAX or len({(quota.resource, quota.period) for quota in quotas}) < len(quotas):
        raise InvalidRequest("The same quota is given twice.", param="quotas")
    return quotas


def check_level(resource: Resource, limit: int | None, held: int, wanted: int) -> None:
    """Raise QuotaExceeded if `wanted` more beside the `held` are more than `limit`."""
    if limit is not None and held + wanted > limit:
        name = resource.replace("_", "-")
        error = QuotaExceeded(
            f"This project may have {limit} {NOUNS[resource]} at once, has {held}, and this would be {wanted} more."
            " Remove some or wait until they are done, or ask the operator for more."
        )
        error.headers = {
            f"x-quota-limit-{name}": str(limit),
            f"x-quota-remaining-{name}": str(max(0, limit - held)),
        }
        raise error

"""What projects may still use: exact whoever asks at once, over midnights, folds that fail and limits that change."""

import asyncio
import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from forebay.errors import InvalidRequest, Overloaded, QuotaExceeded
from forebay.jobs.executor import Executor
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.outcome import Done, Outcome
from forebay.metering.jobs import JobMeter
from forebay.metering.meter import Aside, Meter, Reservation
from forebay.quotas import (
    NOTHING,
    Account,
    Amounts,
    Counted,
    Period,
    ProjectLimits,
    Resource,
    Use,
    day_of,
    parse_quota,
    parse_quotas,
)
from forebay.store.job_records import Lease
from forebay.telemetry import Metrics
from tests.support.clock import FakeClock

NOON = dt.datetime(2026, 11, 30, 12, tzinfo=dt.UTC).timestamp()


class _Books:
    """Stands for the journal and the database of one process."""

    def __init__(self, meter: Meter, clock: FakeClock) -> None:
        self.meter, self.clock = meter, clock
        self.stored = NOTHING
        self.written = NOTHING
        self.loads = 0
        meter.attach(self.load, self.record)

    def record(self, _account: Account, use: Use) -> None:
        self.written += use.amounts

    async def load(self, project: str) -> None:
        self.loads += 1
        await asyncio.sleep(0)
        self.fold(project)

    def fold(self, project: str = "a") -> None:
        self.meter.begin_fold()
        self.stored, self.written = self.stored + self.written, NOTHING
        day = day_of(self.clock.now())
        self.meter.counted({project: Counted(day, day[:7], self.stored, self.stored)})


def _metered(*quotas: str) -> tuple[Meter, _Books, FakeClock]:
    clock = FakeClock(now=NOON)
    meter = Meter(parse_quotas(quotas), clock)
    return meter, _Books(meter, clock), clock


async def _reserve(meter: Meter, amounts: Amounts, project: str = "a") -> Reservation:
    return await meter.reserve(project, "key", "m", "chat", lambda: amounts)


async def _in_turn(meter: Meter, tokens: int, aside: Aside = nullcontext) -> Reservation:
    return await meter.reserve_in_turn("a", "k", "m", "chat", lambda: Amounts(1, tokens), aside)


async def _settled() -> None:
    """Whoever can go on has done so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def _try(meter: Meter, amounts: Amounts) -> bool:
    try:
        (await _reserve(meter, amounts)).settle(Use(amounts.requests, amounts.tokens))
    except QuotaExceeded:
        return False
    return True


async def test_whoever_asks_at_once_gets_exactly_what_is_there() -> None:
    meter, books, _ = _metered("requests=37/day")
    got = await asyncio.gather(*(_try(meter, Amounts(1)) for _ in range(100)))
    assert sum(got) == 37
    assert books.written.requests + books.stored.requests == 37


async def test_what_is_not_used_is_given_back_and_only_once() -> None:
    meter, _, _ = _metered("tokens=100/day")
    one = await _reserve(meter, Amounts(1, 90))
    with pytest.raises(QuotaExceeded):
        await _reserve(meter, Amounts(1, 11))
    one.settle(Use(1, 5, 5))
    one.settle(Use(1, 5, 5))
    one.release()
    two = await _reserve(meter, Amounts(1, 90))
    two.release()
    two.release()
    assert meter.headers("a")["x-quota-remaining-tokens"] == "90"
    three = await _reserve(meter, Amounts(1))
    await three.raise_to(lambda: Amounts(1, 90))
    with pytest.raises(QuotaExceeded):
        await three.raise_to(lambda: Amounts(1, 91))
    assert meter.headers("a")["x-quota-remaining-tokens"] == "0"
    await three.raise_to(lambda: Amounts(1, 50))
    assert meter.headers("a")["x-quota-remaining-tokens"] == "0", "it never becomes less"
    three.lower_to(Use(1, 20))
    assert meter.headers("a")["x-quota-remaining-tokens"] == "70"


async def test_nothing_is_asked_of_whom_no_quota_holds() -> None:
    meter, books, _ = _metered("stored_bytes=5")
    (await meter.reserve("a", "k", "m", "chat", pytest.fail)).settle(Use(1, 2, 3))
    assert books.written.requests == 1
    assert books.loads == 0
    assert meter.headers("a") == {}


async def test_a_day_begins_anew_and_its_month_does_not() -> None:
    meter, _, clock = _metered("requests=2/day", "requests=3/month")
    assert [await _try(meter, Amounts(1)) for _ in range(3)] == [True, True, False]
    headers = meter.headers("a")
    assert (headers["x-quota-limit-requests"], headers["x-quota-reset-requests"]) == ("2", f"{12 * 3600}s")
    clock.jump(-86_400 * 10)  # the same month
    assert [await _try(meter, Amounts(1)) for _ in range(2)] == [True, False]
    assert meter.headers("a")["x-quota-limit-requests"] == "3"
    clock.jump(86_400 * 11)  # the next one
    assert await _try(meter, Amounts(1))


async def test_a_fold_that_fails_loses_nothing_and_counts_nothing_twice() -> None:
    meter, books, _ = _metered("requests=10/day")
    for _ in range(3):
        assert await _try(meter, Amounts(1))
    meter.begin_fold()
    assert await _try(meter, Amounts(1))
    meter.fold_failed()
    left = [meter.headers("a")["x-quota-remaining-requests"]]
    meter.begin_fold()
    left.append(meter.headers("a")["x-quota-remaining-requests"])
    books.stored, books.written = books.written, NOTHING
    day = day_of(NOON)
    meter.counted({"a": Counted(day, day[:7], books.stored, books.stored)})
    left.append(meter.headers("a")["x-quota-remaining-requests"])
    assert left == ["6", "6", "6"]


async def test_what_others_used_counts_after_a_fold() -> None:
    meter, books, _ = _metered("requests=10/day")
    assert await _try(meter, Amounts(1))
    books.stored += Amounts(8)
    books.fold()
    assert [await _try(meter, Amounts(1)) for _ in range(2)] == [True, False]


async def test_limits_of_a_project_replace_defaults_one_by_one() -> None:
    meter, _, _ = _metered("requests=1/day", "tokens=1/day", "queued_lines=5")
    meter.set_limits({"b": ProjectLimits(2.0, parse_quotas(["requests=2/day", "tokens=unlimited/day"]))})
    assert (meter.weight("a"), meter.weight("b")) == (1.0, 2.0)
    assert [str(quota) for quota in meter.quotas("b")] == ["requests=2/day", "queued_lines=5"]
    (await _reserve(meter, Amounts(2, 1000), "b")).release()
    with pytest.raises(QuotaExceeded):
        await _reserve(meter, Amounts(1, 2))
    assert meter.level("b", Resource.QUEUED_LINES) == 5
    meter.check_level("b", Resource.QUEUED_LINES, 3, 2)
    with pytest.raises(QuotaExceeded, match="at once"):
        meter.check_level("b", Resource.QUEUED_LINES, 3, 3)


async def test_work_that_can_wait_waits_for_what_others_may_give_back() -> None:
    meter, _, _ = _metered("tokens=100/day")
    first = await _reserve(meter, Amounts(1, 80))
    waiting = asyncio.create_task(_in_turn(meter, 90))
    hopeless = asyncio.create_task(_in_turn(meter, 101))
    with pytest.raises(QuotaExceeded):
        await hopeless
    assert not waiting.done()
    first.settle(Use(1, 10))
    second = await waiting
    late = asyncio.create_task(_in_turn(meter, 50))
    await asyncio.sleep(0)
    second.settle(Use(1, 60))
    with pytest.raises(QuotaExceeded):  # 70 are gone for good
        await late


async def test_it_waits_as_long_as_others_hold_what_would_do_and_sees_what_is_used_elsewhere() -> None:
    meter, books, clock = _metered("tokens=100/day")
    held = await _reserve(meter, Amounts(1, 90))
    await meter.require("a", Amounts(1, 11))
    with pytest.raises(QuotaExceeded):
        await meter.require("a", Amounts(1, 101))
    aside: list[str] = []

    @contextmanager
    def stepping_aside() -> Iterator[None]:
        aside.append("in")
        yield
        aside.append("out")

    patient, greedy = (
        asyncio.create_task(_in_turn(meter, tokens, aside))
        for tokens, aside in ((20, stepping_aside), (90, nullcontext))
    )
    for _ in range(100):
        await _settled()
        clock.advance(60)
        books.fold()
    await _settled()
    assert not patient.done()
    assert not greedy.done()
    assert aside == ["in"]
    books.stored += Amounts(1, 20)  # by another process
    books.fold()
    with pytest.raises(QuotaExceeded):
        await greedy
    assert not patient.done()
    held.release()
    (await patient).release()
    assert aside == ["in", "out"]


async def test_whoever_raises_what_it_has_and_waits_holds_nothing() -> None:
    meter, _, _ = _metered("tokens=100/day")
    one, two = await _reserve(meter, Amounts(1, 45)), await _reserve(meter, Amounts(1, 45))
    raised = [asyncio.create_task(each.raise_in_turn(lambda: Amounts(1, 70))) for each in (one, two)]
    await _settled()
    assert sorted(each.done() for each in raised) == [False, True]
    first, second = (one, two) if raised[0].done() else (two, one)
    first.settle(Use(1, 30))
    await asyncio.gather(*raised)
    assert meter.headers("a")["x-quota-remaining-tokens"] == "0"
    with pytest.raises(QuotaExceeded):
        await second.raise_in_turn(lambda: Amounts(1, 71))
    assert meter.headers("a")["x-quota-remaining-tokens"] == "70"
    second.release()
    assert meter.headers("a")["x-quota-remaining-tokens"] == "70"


async def test_work_in_a_place_that_others_want_waits_for_a_while() -> None:
    meter, _, clock = _metered("tokens=100/day")
    held = await _reserve(meter, Amounts(1, 90))

    async def brief() -> Reservation:
        async with meter.for_a_while():
            return await _in_turn(meter, 20)

    waiting = asyncio.create_task(brief())
    await _settled()
    clock.advance(31)
    with pytest.raises(Overloaded):
        await waiting
    held.release()
    (await brief()).release()
    assert meter.headers("a")["x-quota-remaining-tokens"] == "100"


@pytest.mark.parametrize("patient", [False, True])
async def test_nobody_is_refused_for_what_a_look_at_the_database_beside_a_write_counts_twice(patient: bool) -> None:
    meter, books, _ = _metered("tokens=100/day")
    first = await _reserve(meter, Amounts(1, 60))
    books.stored += Amounts(1, 60)  # its transaction is committed
    books.fold()
    first.settled_elsewhere(Use(1, 60))
    assert meter.headers("a")["x-quota-remaining-tokens"] == "0"
    loads = books.loads
    second = await (_in_turn(meter, 40) if patient else _reserve(meter, Amounts(1, 40)))
    assert books.loads == loads + 1
    with pytest.raises(QuotaExceeded):
        await _reserve(meter, Amounts(1, 1))
    with pytest.raises(QuotaExceeded):
        await second.raise_to(lambda: Amounts(1, 41))
    assert books.loads == loads + 1, "what is not in doubt costs no look"
    second.release()
    third = await _reserve(meter, Amounts(1, 20))
    meter.begin_fold()
    third.settled_elsewhere(Use(1, 20))  # it is committed between the look and its end
    books.stored += Amounts(1, 20)
    meter.counted({"a": Counted("2026-11-30", "2026-11", books.stored, books.stored)})
    await meter.require("a", Amounts(1, 20))
    (await _reserve(meter, Amounts(1, 20))).release()
    assert books.loads == loads + 2


async def test_what_is_done_counts_though_nothing_is_left() -> None:
    meter, books, _ = _metered("requests=1/day")
    assert await _try(meter, Amounts(1))
    meter.reserve_anyway(Account("a", "k", "m", "chat"), Amounts(1)).settled_elsewhere(Use(1))
    books.stored += Amounts(1)
    books.fold()
    assert meter.headers("a")["x-quota-remaining-requests"] == "0"
    meter.set_limits({"a": ProjectLimits(1.0, parse_quotas(["requests=3/day"]))})
    assert [await _try(meter, Amounts(1)) for _ in range(2)] == [True, False]


async def test_limits_of_one_project_cost_no_look_at_another() -> None:
    meter, books, _ = _metered("requests=5/day")
    for project in ("a", "b"):
        (await _reserve(meter, Amounts(1), project)).release()
    assert books.loads == 2
    meter.set_limits({"b": ProjectLimits(1.0, parse_quotas(["requests=unlimited/day"]))})
    for project in ("a", "b"):
        (await _reserve(meter, Amounts(1), project)).release()
    assert books.loads == 2
    meter.set_limits({"b": ProjectLimits(1.0, parse_quotas(["requests=7/day"]))})
    (await _reserve(meter, Amounts(1), "b")).release()
    assert books.loads == 3, "nothing was counted meanwhile"
    meter.set_limits({"b": ProjectLimits(1.0, parse_quotas(["requests=8/day"]))})
    (await _reserve(meter, Amounts(1), "b")).release()
    assert books.loads == 3


async def test_what_a_job_has_used_is_its_own_until_that_is_in_the_database() -> None:
    meter, books, clock = _metered("requests=1/day")
    request = SimpleNamespace(model="m", capability="transcription")
    call: Any = SimpleNamespace(items=None, kind="transcription", request=request)
    job = SimpleNamespace(project_id="a", key_id="k", failures=0, kind="made")
    lease = cast(Lease, SimpleNamespace(id="job_1", attempt=1, job=job))
    jobs = JobMeter(meter, cast(Any, None))

    async def nothing_is_left() -> None:
        for _ in range(2):
            with pytest.raises(QuotaExceeded):
                await _reserve(meter, Amounts(1))
            books.fold()

    async def perform(lease: Lease, run: Run) -> Outcome:
        reservation = await jobs.reserve_until(run.at_end, lease.job, call)
        jobs.settle_at(run.at_end, reservation, Use(1))
        await nothing_is_left()
        return Done()

    async def settle(*_: object) -> None:
        await nothing_is_left()
        books.stored += Amounts(1)  # the transaction is committed
        await nothing_is_left()

    def at_once(_failures: int) -> float | None:
        return 0.0

    store, settlement = SimpleNamespace(now=clock.now), SimpleNamespace(settle=settle)
    executor = Executor(cast(Any, store), cast(Any, settlement), clock, Metrics())
    await executor.execute(Kind("made", perform, 1, at_once), Run(lease))
    assert books.written == NOTHING  # in the journal it would count once more
    await nothing_is_left()
    clock.advance(86_400)
    (await _reserve(meter, Amounts(1))).release()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tokens",
        "tokens=1",
        "tokens=-1/day",
        "tokens=1/week",
        "x=1/day",
        "stored_bytes=1/day",
        f"tokens={2**53 + 1}/day",
    ],
)
def test_what_is_no_quota_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_quota(text)


def test_quotas_are_read_as_they_are_written() -> None:
    texts = ("tokens=5/day", "tokens=7/month", "megapixel_steps=2/day", "stored_bytes=9", "requests=unlimited/day")
    assert tuple(map(str, parse_quotas(texts))) == texts
    assert parse_quotas(texts)[2].parts == 2_000_000
    with pytest.raises(InvalidRequest, match="twice"):
        parse_quotas(["tokens=5/day", "tokens=6/day"])


def test_months_end_with_their_last_day() -> None:
    for text, ends in (("2026-11-30", "2026-12-01"), ("2026-12-31", "2027-01-01"), ("2028-02-29", "2028-03-01")):
        moment = dt.datetime.fromisoformat(f"{text}T23:59:59+00:00").timestamp()
        assert Period.MONTH.ends_at(moment) == Period.DAY.ends_at(moment) == moment + 1
        assert (Period.MONTH.window(moment), day_of(moment + 1)) == (text[:7], ends)

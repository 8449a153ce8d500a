"""Usage and the limits of projects on both databases: each record is counted once, and pages are whole."""

import pytest

from forebay.errors import InvalidRequest, NotFound
from forebay.quotas import Account, Amounts, ProjectLimits, Use, parse_quotas
from forebay.store.database import Database
from forebay.store.keys import KeyStore
from forebay.store.projects import ProjectStore
from forebay.store.usage import Fold, UsageStore
from tests.support.clock import FakeClock

DAY = "2026-11-21"


async def _projects(database: Database, clock: FakeClock, *names: str) -> list[str]:
    keys = KeyStore(database, clock)
    return [(await keys.get_or_create_project(name)).id for name in names]


def _fold(number: int, end: int, *totals: tuple[str, Account, Use]) -> Fold:
    return Fold("node.a", number, end, {(day, account): use for day, account, use in totals})


async def test_a_fold_counts_once_however_often_it_is_tried(database: Database, clock: FakeClock) -> None:
    (project,) = await _projects(database, clock, "a")
    store, account = UsageStore(database, clock), Account(project, "key_1", "m", "chat")
    first = _fold(1, 100, (DAY, account, Use(2, 10, 20, 5)))
    await store.fold("node", first)
    await store.fold("node", first)
    assert await store.place("node.a") == (1, 100)
    await store.fold("node", _fold(2, 150, (DAY, account, Use(1, 1, 2, 0, 30, 40, 5))))
    rows, more = await store.report(first=DAY, last=DAY, groups=("model",), limit=10)
    assert not more
    assert [(row.group, row.use) for row in rows] == [(("m",), Use(3, 11, 22, 5, 30, 40, 5))]
    await store.forget("node.a")
    assert await store.place("node.a") == (0, 0)


async def test_what_a_job_used_is_gone_with_its_transaction(database: Database, clock: FakeClock) -> None:
    (project,) = await _projects(database, clock, "a")
    store, account = UsageStore(database, clock), Account(project, "", "m", "chat")
    with pytest.raises(LookupError):
        async with database.begin() as transaction:
            await store.add(transaction, {account: Use(1, 2, 3)})
            raise LookupError
    async with database.begin() as transaction:
        await store.add(transaction, {account: Use(1, 2, 3)})
    rows, _ = await store.report(first="2000-01-01", last="2999-12-31", groups=(), limit=10)
    assert [row.use for row in rows] == [Use(1, 2, 3)]


async def test_days_and_months_are_counted_apart(database: Database, clock: FakeClock) -> None:
    one, two, none = await _projects(database, clock, "a", "b", "c")
    store = UsageStore(database, clock)
    totals = [
        ("2026-10-31", Account(one, "k", "m", "chat"), Use(100)),
        ("2026-11-01", Account(one, "k", "m", "chat"), Use(10, 1, 1)),
        (DAY, Account(one, "k", "m", "chat"), Use(1, 2, 3)),
        (DAY, Account(one, "l", "m", "transcription"), Use(1, audio_ms=7)),
        (DAY, Account(two, "l", "n", "image_edit"), Use(1, pixel_steps=9, images=1)),
        ("2026-12-01", Account(one, "k", "m", "chat"), Use(100)),
    ]
    await store.fold("node", _fold(1, 1, *totals))
    found = await store.counted([one, two, none], DAY)
    assert found[one].of_day == Amounts(2, 5, 7, 0)
    assert found[one].of_month == Amounts(12, 7, 7, 0)
    assert found[two].of_month == found[two].of_day == Amounts(1, 0, 0, 9)
    assert found[none].of_month == Amounts()


async def test_pages_go_through_every_group_once(database: Database, clock: FakeClock) -> None:
    one, two = await _projects(database, clock, "a", "b")
    store = UsageStore(database, clock)
    totals = [
        (f"2026-11-{day:02}", Account(project, f"key_{key}", "m", "chat"), Use(1, day, key))
        for day in (1, 2, 3)
        for project in (one, two)
        for key in (1, 2)
    ]
    await store.fold("node", _fold(1, 1, *totals))
    seen: list[tuple[str, ...]] = []
    after: tuple[str, ...] | None = None
    while True:
        rows, more = await store.report(
            first="2026-11-01", last="2026-11-03", groups=("project_id", "key_id"), limit=5, after=after
        )
        seen += [(row.day, *row.group) for row in rows]
        if not more:
            break
        after = seen[-1]
    assert seen == sorted((day, account.project, account.key_id) for day, account, _ in totals)
    mine, _ = await store.report(
        first="2026-11-02", last="2026-11-02", groups=("key_id",), limit=5, project=two, only={"key_id": ["key_2"]}
    )
    assert [(row.group, row.use) for row in mine] == [(("key_2",), Use(1, 2, 2))]


async def test_old_days_are_forgotten_a_day_at_a_time(database: Database, clock: FakeClock) -> None:
    (project,) = await _projects(database, clock, "a")
    store = UsageStore(database, clock)
    days = ("2025-01-01", "2025-01-02", DAY)
    await store.fold("node", _fold(1, 1, *((day, Account(project, "k", "m", "chat"), Use(1)) for day in days)))
    assert [await store.prune("2026-01-01", 10) for _ in range(3)] == [1, 1, 0]
    rows, _ = await store.report(first="2000-01-01", last="2999-12-31", groups=(), limit=10)
    assert [row.day for row in rows] == [DAY]


async def test_journals_that_are_gone_are_forgotten_by_their_own_node(database: Database, clock: FakeClock) -> None:
    (project,) = await _projects(database, clock, "a")
    store, account = UsageStore(database, clock), Account(project, "k", "m", "chat")
    for journal in ("node_1.a", "node_1.b", "node_10.a"):
        await store.fold("node", Fold(journal, 1, 9, {(DAY, account): Use(1)}))
    await store.forget_missing("node_1", {"node_1.b"})
    assert [await store.place(each) for each in ("node_1.a", "node_1.b", "node_10.a")] == [(0, 0), (1, 9), (1, 9)]


async def test_limits_are_changed_one_by_one(database: Database, clock: FakeClock) -> None:
    one, _ = await _projects(database, clock, "a", "b")
    store = ProjectStore(database, clock)
    assert await store.limits() == {}
    await store.set("a", weight=2.5, quotas=parse_quotas(["tokens=100/day", "requests=7/month"]))
    found = await store.set("a", quotas=parse_quotas(["tokens=unlimited/day", "stored_bytes=9"]))
    expected = ProjectLimits(2.5, parse_quotas(["tokens=unlimited/day", "requests=7/month", "stored_bytes=9"]))
    assert found.limits == expected
    assert await store.limits() == {one: expected}
    page, more = await store.list(limit=1)
    assert (page[0].name, page[0].limits, more) == ("a", expected, True)
    page, more = await store.list(after="a", limit=1)
    assert (page[0].name, page[0].limits, more) == ("b", ProjectLimits(), True)
    page, more = await store.list(after="b", limit=1)
    assert (page[0].name, more) == ("default", False)
    with pytest.raises(InvalidRequest, match="weight"):
        await store.set("a", weight=1000, reset=True)
    assert (await store.get("a")).limits == expected
    assert (await store.set("a", reset=True)).limits == ProjectLimits()
    with pytest.raises(NotFound):
        await store.set("nobody", weight=1)
    with pytest.raises(InvalidRequest, match="weight"):
        await store.set("a", weight=0)

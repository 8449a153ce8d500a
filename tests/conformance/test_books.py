"""The books of one process on both databases: nothing is lost and nothing counted twice, whatever goes wrong in between."""

import os
from dataclasses import astuple
from pathlib import Path

import pytest
import structlog

from forebay.errors import QuotaExceeded, StoreUnavailable
from forebay.metering.books import Books
from forebay.metering.journal import Entry, Journal
from forebay.metering.meter import Meter
from forebay.quotas import Account, Amounts, Use, parse_quotas
from forebay.server_config import UsageSettings
from forebay.store.database import Database
from forebay.store.keys import DEFAULT_PROJECT
from forebay.store.projects import ProjectStore
from forebay.store.usage import Fold, UsageStore
from tests.support.clock import FakeClock
from tests.support.usage import append_record

ACCOUNT = Account(DEFAULT_PROJECT, "key", "m", "chat")
DAY = "2027-01-15"  # that of the clock


class _Away(UsageStore):
    """A store whose answers can be lost on their way, before or after the work is done."""

    lost = ""

    async def fold(self, node: str, fold: Fold) -> None:
        if self.lost == "before":
            raise StoreUnavailable
        await super().fold(node, fold)
        if self.lost == "after":
            raise StoreUnavailable


class _Office:
    """One process."""

    def __init__(
        self, database: Database, clock: FakeClock, folder: Path, *quotas: str, bytes_max: int = 10**6
    ) -> None:
        self.folder = folder / "usage"
        self.usage = _Away(database, clock)
        self.meter = Meter(parse_quotas(quotas), clock)
        settings = UsageSettings(journal_bytes_max=bytes_max)
        projects = ProjectStore(database, clock)
        self.books = Books(self.usage, projects, self.meter, self.folder, "node_1", settings, clock)

    async def use(self, tokens: int = 1) -> None:
        taken = await self.meter.reserve(DEFAULT_PROJECT, "key", "m", "chat", lambda: Amounts(1, tokens))
        taken.settle(Use(1, tokens))

    async def counted(self) -> tuple[int, int]:
        rows, _ = await self.usage.report(first="2000-01-01", last="2999-01-01", groups=(), limit=1000)
        return sum(row.use.requests for row in rows), sum(row.use.prompt_tokens for row in rows)

    def journals(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.mark.parametrize("lost", ["before", "after"])
async def test_a_fold_whose_end_is_not_known_is_counted_once(
    database: Database, clock: FakeClock, tmp_path: Path, lost: str
) -> None:
    office = _Office(database, clock, tmp_path, "requests=4/day")
    await office.books.open()
    await office.use(5)
    office.usage.lost = lost
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await office.books.refresh()
    await office.use(7)
    office.usage.lost = ""
    await office.use(9)
    await office.books.refresh()
    assert await office.counted() == (3, 21)
    await office.use()
    with pytest.raises(QuotaExceeded):
        await office.use()
    await office.books.close()
    assert await office.counted() == (4, 22)
    assert office.journals() == []
    assert await office.usage.place("node_1") == (0, 0)


async def test_what_finds_no_room_in_the_journal_goes_to_the_database(
    database: Database, clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    office = _Office(database, clock, tmp_path)
    await office.books.open()
    with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
        patch.setattr(os, "write", lambda _descriptor, data: len(data) // 2)
        await office.use(5)
        await office.use(6)
    assert [log["event"] for log in logs] == ["usage.journal_failed"]
    await office.use(7)
    await office.books.refresh()
    assert await office.counted() == (3, 18)
    await office.books.close()


async def test_a_long_journal_is_left_for_a_new_one_and_removed(
    database: Database, clock: FakeClock, tmp_path: Path
) -> None:
    office = _Office(database, clock, tmp_path, bytes_max=200)
    await office.books.open()
    names = set()
    for _ in range(6):
        for _ in range(3):
            await office.use()
        await office.books.refresh()
        names |= set(office.journals())
        assert len(office.journals()) == 1
    assert len(names) > 2
    assert await office.counted() == (18, 18)
    await office.books.close()


async def test_the_journals_of_the_dead_are_folded_from_where_they_were(
    database: Database, clock: FakeClock, tmp_path: Path
) -> None:
    office = _Office(database, clock, tmp_path)
    office.folder.mkdir()
    dead = Journal.create(office.folder, "node_7.x")
    dead.append(Entry(DAY, ACCOUNT, Use(1, 5)))
    await office.usage.fold("node_7", Fold("node_7.x", 3, dead.size, {(DAY, ACCOUNT): Use(1, 5)}))
    dead.append(Entry(DAY, ACCOUNT, Use(1, 6)))
    living = Journal.create(office.folder, "node_8.y")
    living.append(Entry(DAY, ACCOUNT, Use(1, 100)))
    dead.close(remove=False)
    with dead.path.open("ab") as file:
        file.write(b"torn")
    with structlog.testing.capture_logs() as logs:
        await office.books.open()
    assert [(log["event"], log["bytes"]) for log in logs] == [("usage.torn", 4)]
    assert await office.counted() == (2, 11)
    assert [name.startswith("node_1.") for name in office.journals()] == [True, False]
    await office.books.close()
    living.close(remove=False)
    again = _Office(database, clock, tmp_path)
    await again.books.open()
    assert await again.counted() == (3, 111)
    await again.books.close()


async def test_a_journal_of_projects_that_are_not_there_keeps_no_server_from_starting(
    database: Database, clock: FakeClock, tmp_path: Path
) -> None:
    office = _Office(database, clock, tmp_path)
    office.folder.mkdir()
    dead = Journal.create(office.folder, "node_7.x")
    for account in (Account("proj_of_another_database", "key", "m", "chat"), ACCOUNT):
        dead.append(Entry(DAY, account, Use(1, 5)))
    dead.close(remove=False)
    with structlog.testing.capture_logs() as logs:
        await office.books.open()
    assert [(log["event"], log["records"]) for log in logs] == [("usage.unknown_project", 1)]
    assert await office.counted() == (1, 5)
    assert not dead.path.exists()
    await office.books.close()


async def test_a_journal_of_a_newer_version_keeps_no_server_from_starting(
    database: Database, clock: FakeClock, tmp_path: Path
) -> None:
    office = _Office(database, clock, tmp_path)
    office.folder.mkdir()
    dead = Journal.create(office.folder, "node_7.x")
    append_record(dead.path, DAY, *astuple(ACCOUNT), 1, 5, 0, 0, 0, 0, 0, 77, {"more": 1})
    dead.close(remove=False)
    await office.books.open()
    assert await office.counted() == (1, 5)
    assert not dead.path.exists()
    await office.books.close()


async def test_a_meter_starts_from_what_was_used_before(database: Database, clock: FakeClock, tmp_path: Path) -> None:
    first = _Office(database, clock, tmp_path, "requests=3/day")
    await first.books.open()
    await first.use()
    await first.use()
    await first.books.close()
    second = _Office(database, clock, tmp_path, "requests=3/day")
    await second.books.open()
    await second.use()
    with pytest.raises(QuotaExceeded):
        await second.use()
    await second.books.close()

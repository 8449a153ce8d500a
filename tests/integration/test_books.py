"""The books of one process: one fold serves all who ask before it begins, and callers who go leave nothing behind."""

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from forebay.config import Settings
from forebay.errors import StoreUnavailable
from forebay.metering.books import Books
from forebay.metering.journal import Entry, Journal, journals
from forebay.metering.meter import Meter
from forebay.quotas import Account, Amounts, Counted, Use, parse_quotas
from forebay.server_config import UsageSettings
from forebay.store.database import Database
from forebay.store.keys import KeyStore
from forebay.store.projects import ProjectStore
from forebay.store.usage import UsageStore
from tests.support.clock import FakeClock
from tests.support.server import eventually

CALLERS = 50


class GatedUsage(UsageStore):
    """Tells nobody what was used while its gate is shut, and nothing at all while it is `away`."""

    def __init__(self, database: Database, clock: FakeClock) -> None:
        super().__init__(database, clock)
        self.gate = asyncio.Event()
        self.gate.set()
        self.away = False
        self.looks: list[Sequence[str]] = []

    async def counted(self, watched: Sequence[str], day: str) -> dict[str, Counted]:
        """What projects have used, once the gate is open."""
        self.looks.append(watched)
        await self.gate.wait()
        if self.away:
            raise StoreUnavailable
        return await super().counted(watched, day)


@dataclass
class Room:
    """Books with their rooms, and two projects."""

    usage: GatedUsage
    meter: Meter
    books: Books
    folder: Path
    projects: Collection[str]

    async def reserve(self, project: str) -> None:
        """Take a request."""
        await self.meter.reserve(project, "k", "m", "chat", lambda: Amounts(1))


@pytest.fixture
def records_of_the_dead() -> int:
    """What a process left behind that ended before."""
    return 0


@pytest_asyncio.fixture
async def room(tmp_path: Path, records_of_the_dead: int) -> AsyncIterator[Room]:
    clock, settings = FakeClock(), Settings(data_dir=tmp_path / "data")
    database = await Database.open(settings)
    keys = KeyStore(database, clock)
    projects = [(await keys.get_or_create_project(name)).id for name in ("a", "b")]
    meter, usage = Meter(parse_quotas(["requests=1000/day"]), clock), GatedUsage(database, clock)
    limits = ProjectStore(database, clock)
    short = UsageSettings(journal_bytes_max=1024)
    (tmp_path / "usage").mkdir()
    dead = Journal.create(tmp_path / "usage", "node.dead")
    for _ in range(records_of_the_dead):
        dead.append(Entry("2027-01-15", Account(projects[0], "k", "m", "chat"), Use(1)))
    dead.close(remove=False)
    books = Books(usage, limits, meter, tmp_path / "usage", "node", short, clock)
    await books.open()
    yield Room(usage, meter, books, tmp_path / "usage", projects)
    await database.close()


async def test_all_who_ask_before_a_fold_begins_share_it(room: Room) -> None:
    first, second = room.projects
    room.usage.looks.clear()
    room.usage.gate.clear()
    beginning = asyncio.create_task(room.reserve(first))
    await eventually(lambda: room.usage.looks, what="a fold")
    others = [asyncio.create_task(room.reserve(second if each % 2 else first)) for each in range(CALLERS)]
    await asyncio.sleep(0)
    room.usage.gate.set()
    await asyncio.gather(beginning, *others)
    assert room.usage.looks == [[first], sorted(room.projects)]
    await room.books.refresh()
    assert len(room.usage.looks) == 3, "one that began before somebody asks is not for them"
    await room.books.close()


async def test_a_fold_that_fails_fails_for_all_who_share_it_and_for_nobody_after(room: Room) -> None:
    first, _ = room.projects
    room.usage.looks.clear()
    room.usage.gate.clear()
    room.usage.away = True
    asking = [asyncio.create_task(room.reserve(first)) for _ in range(CALLERS)]
    await eventually(lambda: room.usage.looks, what="a fold")
    room.usage.gate.set()
    failed = await asyncio.gather(*asking, return_exceptions=True)
    assert {type(each) for each in failed} == {StoreUnavailable}
    assert len(room.usage.looks) <= 2
    room.usage.away = False
    await room.reserve(first)
    await room.books.close()


async def test_whoever_goes_in_the_middle_of_a_fold_leaves_it_to_the_next(room: Room) -> None:
    first, second = room.projects
    room.usage.gate.clear()
    going = asyncio.create_task(room.reserve(first))
    await eventually(lambda: room.usage.looks, what="a fold")
    staying = [asyncio.create_task(room.reserve(project)) for project in (first, second)]
    await asyncio.sleep(0)
    going.cancel()
    room.usage.gate.set()
    await asyncio.gather(*staying)
    with pytest.raises(asyncio.CancelledError):
        await going
    await room.books.close()


async def test_callers_who_go_at_any_moment_leave_no_journal_and_lose_no_record(room: Room) -> None:
    first, _ = room.projects
    records = 0
    for moment in range(60):
        for _ in range(20):  # more than a journal has
            room.books.record(Account(first, "k", "m", "chat"), Use(1))
            records += 1
        leaving = asyncio.create_task(room.books.load(first))
        for _ in range(moment):
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
    await room.books.refresh()
    await room.books.close()
    assert journals(room.folder) == []
    rows, _ = await room.usage.report(first="2000-01-01", last="2999-12-31", groups=(), limit=10)
    assert [row.use for row in rows] == [Use(records)]


@pytest.mark.parametrize("records_of_the_dead", [50_000])
async def test_a_journal_of_the_dead_that_is_too_long_for_one_piece_is_folded_in_several(
    room: Room, records_of_the_dead: int
) -> None:
    rows, _ = await room.usage.report(first="2000-01-01", last="2999-12-31", groups=(), limit=10)
    assert [row.use for row in rows] == [Use(records_of_the_dead)]
    assert len(journals(room.folder)) == 1
    await room.books.close()

"""A worker that stands still for longer than its lease: what it holds goes to others, and what it says late is refused."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from forebay.blobs.local import LocalBlobs
from forebay.clock import new_id, seeded
from forebay.config import Settings
from forebay.errors import LeaseLost, StoreUnavailable
from forebay.inference import Usage
from forebay.jobs.kinds import Run
from forebay.jobs.lines import Place, pack_places, unpack_numbers
from forebay.jobs.segments import Result, SegmentStore
from forebay.store.batches import BATCH, CHUNK, RUN, Batch, BatchStore, NewBatch
from forebay.store.database import Database
from forebay.store.dead_letters import Chosen, DeadLetterStore, LostLine
from forebay.store.job_records import Lease, NewJob, Verdict
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from tests.support import invariants, postgres
from tests.support.clock import FakeClock
from tests.support.invariants import Customer, Found
from tests.support.logs import unforeseen
from tests.support.receiver import receiving
from tests.support.server import eventually
from tests.support.usage import job_meter
from tests.support.worker import Life, Site

LEASE_SECONDS = 1.0
ROUNDS = 200
HELD = "SELECT id, attempt FROM jobs WHERE kind = 'chunk' AND state = 'running' AND node = :node"

# Holds rows in a transaction and stands still in the middle of a statement: PostgreSQL does not count that as idle.
HALF_WAY = """
import asyncio, sys
import sqlalchemy as sa
from pathlib import Path
from forebay.config import Settings
from forebay.errors import StoreUnavailable
from forebay.store.database import Database

async def stand_still():
    print("held", flush=True)
    sys.stdin.readline()
    yield b""

async def main():
    database = await Database.open(Settings(data_dir=Path(sys.argv[1]), database_url=sys.argv[2]))
    try:
        async with database.begin() as transaction:
            await transaction.execute(sa.text("UPDATE projects SET name = 'mine' WHERE id = 'default'"))
            driver = (await transaction.get_raw_connection()).driver_connection
            await driver.copy_to_table("jobs", source=stand_still())
    except Exception as error:
        print(type(error).__name__, flush=True)

asyncio.run(main())
"""

# Holds a row in a transaction, says so, stands still until it is told to go on, and looks what it can still do.
HOLDER = """
import asyncio, sys
import sqlalchemy as sa
from pathlib import Path
from forebay.config import Settings
from forebay.errors import StoreUnavailable
from forebay.store.database import Database

RENAME = sa.text("UPDATE projects SET name = 'mine' WHERE id = 'default'")

async def rename(database):
    async with database.begin() as transaction:
        await transaction.execute(RENAME)

async def main():
    database = await Database.open(Settings(data_dir=Path(sys.argv[1]), database_url=sys.argv[2]))
    try:
        async with database.begin() as transaction:
            await transaction.execute(RENAME)
            others = [asyncio.create_task(rename(database)) for _ in range(4)]
            await asyncio.sleep(0.5)  # until they wait for the row
            print("held", flush=True)
            sys.stdin.readline()
            await transaction.execute(RENAME)
    except StoreUnavailable:
        await asyncio.gather(*others, return_exceptions=True)
        async with database.read() as connection:
            print(await connection.scalar(sa.text("SELECT name FROM projects WHERE id = 'default'")), flush=True)

asyncio.run(main())
"""


async def held_by(database: Database, life: Life) -> dict[str, int]:
    """The chunks, with the attempt, that a worker holds."""
    async with database.read() as connection:
        rows = await connection.execute(sa.text(HELD), {"node": life.node})
        return {row.id: row.attempt for row in rows}


def stands_still(life: Life) -> bool:
    """Whether the process is stopped."""
    return bool(psutil.Process(life.process.pid).status() == psutil.STATUS_STOPPED)


async def freeze(database: Database, life: Life) -> dict[str, int]:
    """Stop a worker that holds chunks; what it holds once all that it had sent before is done."""
    while True:
        await eventually(lambda: held_by(database, life), within_seconds=30, what="a chunk of its own")
        life.process.send_signal(signal.SIGSTOP)
        await eventually(lambda: stands_still(life), what="a worker that stands still")
        before: dict[str, int] = {}
        while before != (before := await held_by(database, life)):
            await asyncio.sleep(0.02)
        if before:
            return before
        life.process.send_signal(signal.SIGCONT)


async def rescued(database: Database, held: dict[str, int]) -> bool:
    """Whether every one of these has been taken from whoever held it."""
    query = sa.text("SELECT id, attempt, state FROM jobs WHERE kind = 'chunk'")
    async with database.read() as connection:
        now = {row.id: (row.attempt, row.state) for row in await connection.execute(query)}
    return all(now.get(chunk) != (attempt, "running") for chunk, attempt in held.items())


def told(life: Life, held: dict[str, int]) -> bool:
    """Whether the worker has said of each of these that its lease was lost."""
    said = {(event["job"], event["attempt"]) for event in life.events("job.lease_lost")}
    return all(each in said for each in held.items())


async def pause(database: Database, life: Life) -> int:
    """One round: stand still for twice the lease, go on, and own up to the loss; how many chunks it was."""
    began = asyncio.get_running_loop().time()
    held = await freeze(database, life)
    await eventually(lambda: rescued(database, held), within_seconds=20, what="the rescue")
    await asyncio.sleep(max(0.0, began + 2 * LEASE_SECONDS - asyncio.get_running_loop().time()))
    life.process.send_signal(signal.SIGCONT)
    await eventually(lambda: told(life, held), within_seconds=20, what=f"the loss of {held}")
    return len(held)


async def keep_supplied(customer: Customer, stop: asyncio.Event) -> None:
    """See to it that there is always work for two."""
    while not stop.is_set():
        await customer.look_at_all()
        while sum(each.ended is None for each in customer.submitted) < 3:
            await customer.submit(500)
        await asyncio.sleep(0.1)


@pytest.mark.timeout(1800)
async def test_what_a_paused_worker_says_late_is_refused(tmp_path: Path, prove: bool) -> None:
    rounds = ROUNDS if prove else 5
    url = postgres.new_database()
    site = Site(tmp_path, url, ["server", "first", "second"], lease_seconds=LEASE_SECONDS)
    database = await Database.open(Settings(data_dir=tmp_path / "server", database_url=SecretStr(url)))
    customer = Customer(site.url, delay_ms=100)
    chance, found, lost = seeded(4), Found(), 0
    try:
        async with receiving("127.0.0.2") as receiver:
            await site.start("server")
            workers = [await site.start(name) for name in ("first", "second")]
            await customer.post("/v1/webhooks", "hook", lambda: {"json": {"url": receiver.url}})
            stop = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                group.create_task(keep_supplied(customer, stop))
                for _ in range(rounds):
                    lost += await pause(database, chance.choice(workers))
                stop.set()
            await eventually(customer.look_at_all, within_seconds=240, what="the end of every batch")
            await eventually(
                lambda: invariants.all_told(customer, receiver.received), within_seconds=60, what="every webhook"
            )
            await invariants.check_batches(customer, found)
            invariants.check_events(customer, receiver.received, found)
        for life in site.lives["server"] + workers:
            assert not unforeseen(life.log), unforeseen(life.log)
        print(
            f"\n{rounds} rounds, {lost} leases lost, {found.lines} lines, {found.duplicates} twice, {found.lost} lost"
        )
    finally:
        await customer.close()
        await database.close()
        await site.close()


async def test_a_process_that_stands_still_in_a_transaction_does_not_hold_up_the_others(tmp_path: Path) -> None:
    url = postgres.new_database()
    database = await Database.open(Settings(data_dir=tmp_path, database_url=SecretStr(url)))
    program = [sys.executable, "-c", HOLDER, str(tmp_path), url]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert await asyncio.to_thread(holder.stdout.readline) == "held\n"
            await eventually(lambda: rename(database), within_seconds=10, what="the row, which others wait for as well")
            assert (await asyncio.to_thread(holder.communicate, "\n", 20))[0] == "ours\n"
        finally:
            holder.kill()
    await database.close()


async def test_one_that_stands_still_in_the_middle_of_a_statement_is_cut_off(tmp_path: Path) -> None:
    url = postgres.new_database()
    database = await Database.open(Settings(data_dir=tmp_path, database_url=SecretStr(url)))
    program = [sys.executable, "-c", HALF_WAY, str(tmp_path), url]

    async def had() -> bool:
        await database.cut_off_standing()
        return await rename(database)

    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert await asyncio.to_thread(holder.stdout.readline) == "held\n"
            assert await database.cut_off_standing() == 0  # it may be about to go on
            await eventually(had, within_seconds=15, what="the row")
            assert (await asyncio.to_thread(holder.communicate, "\n", 20))[0]
        finally:
            holder.kill()
    async with database.read() as connection:
        assert await connection.scalar(sa.text("SELECT name FROM projects WHERE id = 'default'")) == "ours"
    await database.close()


async def rename(database: Database) -> bool:
    """Whether the row could be had."""
    try:
        async with database.begin() as transaction:
            await transaction.execute(sa.text("UPDATE projects SET name = 'ours' WHERE id = 'default'"))
    except StoreUnavailable:
        return False
    return True


class Stores:
    """What two workers share, without their processes."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.clock = FakeClock()
        self.jobs, self.batches = JobStore(database, self.clock), BatchStore(database, self.clock)
        self.dead_letters, self.blobs = DeadLetterStore(database, self.clock), LocalBlobs(folder, 0)
        self.segments = SegmentStore(
            self.jobs, self.batches, self.dead_letters, self.blobs, job_meter(database, self.clock), self.clock
        )

    async def begin(self, lines: int) -> Batch:
        """A batch with one chunk, ready to be leased."""
        batch_id, chunk_id = new_id("batch"), new_id("chunk")
        async with self.database.begin() as transaction:
            await self.jobs.insert(transaction, [NewJob(BATCH, "default", id=batch_id)])
            new = NewBatch(batch_id, "default", "/v1/x", "file_x", "24h", None, None, self.clock.now())
            await self.batches.insert(transaction, new)
        (held,) = await self.jobs.lease({BATCH: 1}, "desk", LEASE_SECONDS)
        async with self.database.begin() as transaction:
            await self.jobs.settle(transaction, held, Verdict(JobState.WAITING, self.jobs.now(), stage=RUN))
            await self.jobs.insert(transaction, [NewJob(CHUNK, "default", id=chunk_id, parent_id=batch_id)])
            places = pack_places(Place(number, 0, 0) for number in range(1, lines + 1))
            await self.batches.add_chunks(transaction, batch_id, [(chunk_id, places)])
            await self.jobs.measure(transaction, batch_id, lines, "fake")
            await self.batches.begin(transaction, batch_id, "fake", self.jobs.now())
        return await self.batches.load(batch_id)

    async def lease(self, node: str) -> Run:
        """The next attempt at the only chunk."""
        (held,) = await self.jobs.lease({CHUNK: 1}, node, LEASE_SECONDS)
        return Run(held)

    async def expire(self, lease: Lease) -> None:
        """Twice its lease goes by, and a rescuer looks."""
        self.clock.advance(2 * LEASE_SECONDS)
        lost = await self.jobs.lost(10)
        assert [job.id for job in lost] == [lease.id]
        async with self.database.begin() as transaction:
            assert await self.jobs.take_back(transaction, lost) == 1

    async def settle(self, lease: Lease) -> None:
        """The end of a chunk."""
        async with self.database.begin() as transaction:
            await self.jobs.settle(transaction, lease, Verdict(JobState.COMPLETED, self.jobs.now()))


@asynccontextmanager
async def stores(kind: str, folder: Path) -> AsyncIterator[Stores]:
    url = SecretStr(postgres.new_database()) if kind == "postgres" else None
    database = await Database.open(Settings(data_dir=folder / "data", database_url=url))
    shared = Stores(database, folder / "blobs")
    await shared.blobs.check()
    yield shared
    await database.close()


def result(number: int, who: str, *, lost: bool) -> Result:
    text = f"{who} {number}\n".encode()
    if not lost:
        return Result(number, text, Usage(1, 1, 0))
    return Result(number, text, lost=LostLine(f"id-{number}", number, 0, 1, "engine_error", "It failed.", []))


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_late_writes_are_refused_in_any_order(kind: str, tmp_path: Path, prove: bool) -> None:
    """Two attempts at one chunk, whose writes are interleaved by chance: only those of the one that holds it count."""
    chance, rounds = seeded(7), ROUNDS if prove else 30
    async with stores(kind, tmp_path) as shared:
        refused = 0
        for _ in range(rounds):
            lines = chance.randint(2, 6)
            batch = await shared.begin(lines)
            late = await shared.lease("late")
            done = chance.randint(0, lines - 1)  # by the first attempt, in time
            if done:
                early = [result(number, "late", lost=number == 1) for number in range(1, done + 1)]
                await shared.segments.write(late, batch, 0, early)
            await shared.expire(late.lease)
            refused += await _refused(shared, late, batch, done, lines, chance.random() < 0.5)
            current = await shared.lease("current")
            written = [
                number for each in await shared.batches.segments(batch.id) for number in unpack_numbers(each.lines)
            ]
            assert written == list(range(1, done + 1))
            refused += await _refused(shared, late, batch, done, lines, chance.random() < 0.5)
            rest = [result(number, "current", lost=False) for number in range(done + 1, lines + 1)]
            await shared.segments.write(current, batch, 1 if done else 0, rest)
            refused += await _refused(shared, late, batch, done, lines, chance.random() < 0.5)
            await shared.settle(current.lease)
            refused += await _refused(shared, late, batch, done, lines, chance.random() < 0.5)
            await _check(shared, batch, done, lines)
        print(f"\n{kind}: {rounds} rounds, {refused} late writes refused")
        assert refused == 4 * rounds


async def _refused(shared: Stores, late: Run, batch: Batch, done: int, lines: int, settles: bool) -> int:
    """One late write, of a segment or of the end."""
    with pytest.raises(LeaseLost):
        if settles:
            await shared.settle(late.lease)
        else:
            rest = [result(number, "late", lost=number == lines) for number in range(done + 1, lines + 1)]
            await shared.segments.write(late, batch, 1 if done else 0, rest)
    return 1


async def _check(shared: Stores, batch: Batch, done: int, lines: int) -> None:
    segments = await shared.batches.segments(batch.id)
    numbers = [number for each in segments for number in unpack_numbers(each.lines)]
    assert numbers == list(range(1, lines + 1))
    content = b""
    for each in segments:
        for key in (each.error_key, each.output_key):
            content += b"" if key is None else await shared.blobs.read(key)
    expected = [f"{'late' if number <= done else 'current'} {number}" for number in range(1, lines + 1)]
    assert content.decode().splitlines() == expected
    after = await shared.batches.load(batch.id)
    failed = 1 if done else 0
    assert (after.job.completed, after.job.failed) == (lines - failed, failed)
    assert len(await shared.dead_letters.list("default", Chosen(job_id=batch.id))) == failed

"""Ends of jobs that are settled together, over SQLite and PostgreSQL: each as if it were alone."""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import replace

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from forebay.clock import SystemClock
from forebay.errors import EngineCrashed, InvalidRequest, LeaseLost
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.outcome import Done, Failed, Outcome, verdict
from forebay.jobs.retry import doubling
from forebay.jobs.settlement import Settlement
from forebay.store.database import Database, Transaction
from forebay.store.dead_letters import DeadLetterStore
from forebay.store.job_records import Job, Lease, NewJob, Verdict
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from forebay.store.keys import KeyStore
from forebay.store.tables import job_log, jobs, webhook_deliveries
from forebay.store.webhooks import WebhookStore

URL = "https://hooks.example/own"
RETRY = doubling(1, 8, 3)


async def _never(_lease: Lease, _run: Run) -> Outcome:
    raise AssertionError  # nothing is performed here


KINDS = {
    "teller": Kind("teller", _never, 100, RETRY, event="teller"),
    "parent": Kind("parent", _never, 100, RETRY, children="child", joins_at="join"),
    "child": Kind("child", _never, 100, RETRY, waits_for_it=True),
}


class Rooms:
    """A settlement and what it writes to. The clock runs, so that one time stands for one statement."""

    def __init__(self, database: Database) -> None:
        clock = SystemClock()
        self.database = database
        self.jobs = JobStore(database, clock)
        hooks, letters = WebhookStore(database, clock), DeadLetterStore(database, clock)
        self.hooks = hooks
        self.settlement = Settlement(self.jobs, hooks, letters, KINDS)

    async def leased(self, kind: str, count: int, **fields: object) -> list[Lease]:
        """New jobs of a kind under leases."""
        fields = {"project_id": "default", **fields}
        new = [NewJob(kind, **fields) for _ in range(count)]  # type: ignore[arg-type]
        async with self.database.begin() as transaction:
            await self.jobs.insert(transaction, new)
        return await self.jobs.lease({kind: count}, "node", 60)

    async def settle(self, lease: Lease, outcome: Outcome) -> None:
        decided = verdict(lease.job, outcome, RETRY, self.jobs.now())
        await self.settlement.settle(lease, outcome, decided)

    async def settle_all(self, leases: Sequence[Lease]) -> list[BaseException | None]:
        """End all of them well at the same moment; what each is told."""
        return await _together(*(self.settle(lease, Done()) for lease in leases))

    async def lose(self, lease: Lease) -> None:
        """Have the job taken back and leased to another worker."""
        async with self.database.begin() as transaction:
            await self.jobs.settle(transaction, lease, Verdict(JobState.AVAILABLE, 0))
        [again] = await self.jobs.lease({lease.job.kind: 1}, "another", 60)
        assert (again.id, again.attempt) == (lease.id, lease.attempt + 1)

    async def all(self, leases: Sequence[Lease]) -> list[Job]:
        return [await self.jobs.get("default", lease.id) for lease in leases]

    async def told(self) -> list[tuple[str, str]]:
        """The events that were enqueued: the job of each and its type."""
        parents = {job.id: job.parent_id for job in await self.jobs.list("default", kinds=["webhook"])}
        async with self.database.read() as connection:
            rows = await connection.execute(sa.select(webhook_deliveries.c.id, webhook_deliveries.c.event_type))
            return sorted((str(parents[row.id]), row.event_type) for row in rows)


async def _together(*ends: Awaitable[None]) -> list[BaseException | None]:
    async with asyncio.timeout(30):
        return await asyncio.gather(*ends, return_exceptions=True)


@pytest.fixture
def rooms(database: Database) -> Rooms:
    return Rooms(database)


async def test_a_lost_lease_is_refused_alone_and_only_what_is_settled_is_told(rooms: Rooms) -> None:
    leases = await rooms.leased("teller", 12, webhook_url=URL)
    lost = [leases[2], leases[7]]
    for lease in lost:
        await rooms.lose(lease)
    answers = await rooms.settle_all(leases)
    assert [isinstance(answer, LeaseLost) for answer in answers] == [lease in lost for lease in leases]
    settled = [lease for lease in leases if lease not in lost]
    found = await rooms.all(settled)
    assert {job.state for job in found} == {JobState.COMPLETED}
    assert len({job.finished_at for job in found}) == 1, "one statement"
    assert [(job.state, job.node) for job in await rooms.all(lost)] == 2 * [(JobState.RUNNING, "another")]
    assert await rooms.told() == sorted((lease.id, "teller.completed") for lease in settled)


async def test_two_attempts_at_one_job_are_told_apart(rooms: Rooms) -> None:
    [late] = await rooms.leased("teller", 1, webhook_url=URL)
    await rooms.lose(late)
    [job] = await rooms.all([late])
    answers = await rooms.settle_all([late, Lease(job)])
    assert [type(answer) for answer in answers] == [LeaseLost, type(None)]
    assert await rooms.told() == [(late.id, "teller.completed")]


async def test_one_that_cannot_be_written_does_not_take_the_others_along(rooms: Rooms) -> None:
    leases = await rooms.leased("teller", 6, webhook_url=URL)
    wrong = Lease(replace(leases[3].job, project_id="gone"))  # no event of a project that does not exist
    answers = await rooms.settle_all([*leases[:3], wrong, *leases[4:]])
    assert [type(answer) for answer in answers] == [*3 * [type(None)], IntegrityError, *2 * [type(None)]]
    assert [job.state for job in await rooms.all([leases[3]])] == [JobState.RUNNING]
    assert await rooms.told() == sorted((lease.id, "teller.completed") for lease in leases if lease is not leases[3])


async def test_who_stops_waiting_for_its_end_holds_up_nobody(rooms: Rooms) -> None:
    leases = await rooms.leased("teller", 4, webhook_url=URL)
    ends = [asyncio.create_task(rooms.settle(lease, Done())) for lease in leases]
    await asyncio.sleep(0)
    ends[1].cancel()
    answers = await _together(*ends)
    assert [type(answer) for answer in answers] == [type(None), asyncio.CancelledError, *2 * [type(None)]]
    assert [job.state for job in await rooms.all([leases[0], *leases[2:]])] == 3 * [JobState.COMPLETED]


async def test_each_project_is_told_of_its_own_jobs_alone(rooms: Rooms) -> None:
    leases: list[Lease] = []
    expected: set[tuple[str | None, str | None]] = set()
    for name in ("one", "two", "three"):
        project = (await KeyStore(rooms.database, SystemClock()).get_or_create_project(name)).id
        leases += await rooms.leased("teller", 2, project_id=project)
        if name != "three":
            async with rooms.database.begin() as transaction:
                endpoint = await rooms.hooks.create_endpoint(transaction, project, url=URL)
            expected |= {(endpoint.id, lease.id) for lease in leases[-2:]}
    assert await rooms.settle_all(leases) == [None] * 6
    query = sa.select(webhook_deliveries.c.endpoint_id, jobs.c.parent_id).join(
        jobs, jobs.c.id == webhook_deliveries.c.id
    )
    async with rooms.database.read() as connection:
        rows = (await connection.execute(query)).all()
    assert {(row.endpoint_id, row.parent_id) for row in rows} == expected
    assert len(rows) == 4


async def test_children_that_end_together_wake_each_parent_once(rooms: Rooms) -> None:
    leases: list[Lease] = []
    for parent in await rooms.leased("parent", 3):
        async with rooms.database.begin() as transaction:
            await rooms.jobs.settle(transaction, parent, Verdict(JobState.WAITING, 0, stage="run"))
        leases += await rooms.leased("child", 4, parent_id=parent.id)
    left = leases.pop()
    assert await rooms.settle_all(leases) == [None] * 11
    parents = sorted(await rooms.jobs.list("default", kinds=["parent"]), key=lambda job: job.id == left.job.parent_id)
    assert [(job.state, job.stage) for job in parents] == [
        *2 * [(JobState.AVAILABLE, "join")],
        (JobState.WAITING, "run"),
    ]
    await rooms.settle(left, Done())
    assert (await rooms.jobs.get("default", str(left.job.parent_id))).state is JobState.AVAILABLE


async def test_what_one_writes_itself_fails_for_it_alone(rooms: Rooms) -> None:
    async def refuse(transaction: Transaction) -> None:
        tried.append(refused.id)
        await rooms.jobs.note(transaction, refused.id, "job.tested")
        raise InvalidRequest("This is refused.")

    tried: list[str] = []
    leases = await rooms.leased("teller", 4, webhook_url=URL)
    refused = leases[1]
    outcomes = [Done(), Done(refuse), Failed(EngineCrashed(), retryable=False), Done()]
    ends = (rooms.settle(lease, outcome) for lease, outcome in zip(leases, outcomes, strict=True))
    answers = await _together(*ends)
    assert [type(answer) for answer in answers] == [type(None), InvalidRequest, type(None), type(None)]
    assert len(tried) == 1, "with nobody else"
    states = [JobState.COMPLETED, JobState.RUNNING, JobState.FAILED, JobState.COMPLETED]
    assert [job.state for job in await rooms.all(leases)] == states
    told = [(lease.id, f"teller.{state}") for lease, state in zip(leases, states, strict=True) if lease is not refused]
    assert await rooms.told() == sorted(told)
    async with rooms.database.read() as connection:
        noted = (await connection.execute(sa.select(job_log.c.job_id))).scalars().all()
    assert noted == [leases[2].id], "of the failure, and nothing of what was refused"

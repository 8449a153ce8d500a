"""The job engine against a model of it: random histories of leases, deaths, late writes, cancellations and retries.

Every rule does one thing to the real store, on a clock of its own, and to a dictionary; the two never disagree. Late
writers are kept: an attempt that has lost its lease may try to write at any later time, and is refused.
"""

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from forebay.config import JobSettings, Settings
from forebay.errors import EngineCrashed, LeaseLost
from forebay.jobs.desk import Desk
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.outcome import Cancelled, Done, Expired, Failed, Outcome, Snoozed, Waiting, verdict
from forebay.jobs.rescuer import Rescuer
from forebay.jobs.retry import doubling
from forebay.jobs.settlement import Settlement
from forebay.store.database import Database, Transaction
from forebay.store.dead_letters import DeadLetterStore
from forebay.store.job_records import Job, Lease, NewJob
from forebay.store.job_state import FINISHED, JobState, may_move
from forebay.store.jobs import JobStore
from forebay.store.webhooks import WebhookStore
from forebay.telemetry import Metrics
from tests.support.clock import FakeClock

LEASE_SECONDS = 10.0
ATTEMPTS_MAX = 3
RESCUES_MAX = 4
RETRY = doubling(1, 8, ATTEMPTS_MAX)


async def _never(_lease: Lease, _run: Run) -> Outcome:
    raise AssertionError  # the histories perform nothing: they settle


KINDS = {
    "solo": Kind("solo", _never, 100, RETRY, has_dead_letter=True),
    "parent": Kind("parent", _never, 100, RETRY, children="child", joins_at="join"),
    "child": Kind("child", _never, 100, RETRY, waits_for_it=True),
}


@dataclass
class Known:
    """What the model knows of one job."""

    kind: str
    parent: str | None
    state: JobState = JobState.AVAILABLE
    stage: str = ""
    attempt: int = 0
    ends: int = 0
    children: list[str] = field(default_factory=list)


class History(RuleBasedStateMachine):
    """One history."""

    runner: asyncio.Runner
    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.jobs = JobStore(self.database, self.clock)
        self.letters = DeadLetterStore(self.database, self.clock)
        self.settlement = Settlement(self.jobs, WebhookStore(self.database, self.clock), self.letters, KINDS)
        config = JobSettings(lease_seconds=LEASE_SECONDS, rescues_max=RESCUES_MAX)
        self.desk = Desk(self.jobs, self.settlement, KINDS, config, self.clock)
        self.rescuer = Rescuer(self.jobs, self.settlement, KINDS, config, self.clock, Metrics())
        self.known: dict[str, Known] = {}
        self.leases: list[Lease] = []
        self.counter = 0

    def do(self, coroutine: object) -> object:
        return self.runner.run(coroutine)  # type: ignore[arg-type]

    @initialize()
    def start_empty(self) -> None:
        async def empty() -> None:
            async with self.database.begin() as transaction:
                for table in ("dead_letters", "job_log", "jobs"):
                    await transaction.exec_driver_sql(f"DELETE FROM {table}")

        self.do(empty())

    # What callers do.

    @rule(kind=st.sampled_from(["solo", "parent"]), late=st.booleans())
    def submit(self, kind: str, late: bool) -> None:
        self.counter += 1
        job_id = f"{kind} {self.counter}"
        deadline = {"deadline_at": self.clock.now() + 25} if late else {}

        async def insert() -> None:
            async with self.database.begin() as transaction:
                await self.jobs.insert(transaction, [NewJob(kind, "default", id=job_id, **deadline)])  # type: ignore[arg-type]

        self.do(insert())
        self.known[job_id] = Known(kind, None)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from([key for key, known in self.known.items() if known.kind != "child"]))
        before = self.known[job_id].state
        job = self.do(self.desk.cancel("default", job_id))
        assert isinstance(job, Job)
        if before is JobState.AVAILABLE and self.known[job_id].stage != "join":
            assert job.state is JobState.CANCELLED, "nobody runs it: at once"
        if before in FINISHED or self.known[job_id].stage == "join":
            assert job.state is before, "what is done is put together all the same"

    @precondition(lambda self: any(k.kind == "solo" and k.state in FINISHED for k in self.known.values()))
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        ended = [key for key, known in self.known.items() if known.kind == "solo" and known.state in FINISHED]
        job_id = data.draw(st.sampled_from(ended))
        if self.known[job_id].state is not JobState.COMPLETED:
            self.do(self.desk.retry("default", job_id))

    # What workers do.

    @rule(node=st.sampled_from(["a", "b"]), room=st.integers(1, 3))
    def lease(self, node: str, room: int) -> None:
        found = self.do(self.jobs.lease(dict.fromkeys(KINDS, room), node, LEASE_SECONDS))
        assert isinstance(found, list)
        for lease in found:
            assert self.known[lease.id].state is JobState.AVAILABLE, "only what nobody has is leased"
            assert lease.attempt == self.known[lease.id].attempt + 1
        self.leases += found

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        renewed = self.do(self.jobs.renew(str(lease.job.node), [lease.id], LEASE_SECONDS))
        assert isinstance(renewed, dict)
        holds = lease.id in renewed and renewed[lease.id].attempt == lease.attempt
        assert holds == self._holds(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), ending=st.sampled_from(["done", "retry", "fatal", "snooze", "cancelled", "expired"]))
    def settle(self, data: st.DataObject, ending: str) -> None:
        """Any attempt that ever was tries to end, also one that was given up for dead long ago."""
        lease = data.draw(st.sampled_from(self.leases))
        outcome = self._outcome(lease, ending)
        decided = verdict(lease.job, outcome, RETRY, self.clock.now())
        held = self._holds(lease)
        if held:
            self.do(self.settlement.settle(lease, outcome, decided))
        else:
            with pytest.raises(LeaseLost):
                self.do(self.settlement.settle(lease, outcome, decided))

    @precondition(lambda self: len(self.leases) > 1)
    @rule(data=st.data())
    def settle_together(self, data: st.DataObject) -> None:
        """Several attempts end well at the same moment; each is told for itself whether it still had the job."""
        chosen = st.lists(
            st.sampled_from(self.leases), min_size=2, max_size=6, unique_by=lambda lease: (lease.id, lease.attempt)
        )
        leases = data.draw(chosen)
        held = [self._holds(lease) for lease in leases]

        async def settle() -> list[BaseException | None]:
            outcomes = [self._outcome(lease, "done") for lease in leases]
            ends = (
                self.settlement.settle(lease, outcome, verdict(lease.job, outcome, RETRY, self.clock.now()))
                for lease, outcome in zip(leases, outcomes, strict=True)
            )
            return await asyncio.gather(*ends, return_exceptions=True)

        answers = self.do(settle())
        assert isinstance(answers, list)
        assert [answer is None for answer in answers] == held
        assert all(answer is None or isinstance(answer, LeaseLost) for answer in answers)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def show_progress(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))

        async def fence() -> None:
            async with self.database.begin() as transaction:
                await self.jobs.fence(transaction, lease)

        if self._holds(lease):
            self.do(fence())
        else:
            with pytest.raises(LeaseLost):
                self.do(fence())

    def _outcome(self, lease: Lease, ending: str) -> Outcome:
        known = self.known[lease.id]
        if ending == "done" and known.kind == "parent" and known.stage == "":
            return Waiting("run", lambda transaction: self._make_children(transaction, lease.id))
        return {
            "done": Done(),
            "retry": Failed(EngineCrashed(), retryable=True),
            "fatal": Failed(EngineCrashed(), retryable=False),
            "snooze": Snoozed(2),
            "cancelled": Cancelled(),
            "expired": Expired(),
        }[ending]

    async def _make_children(self, transaction: Transaction, parent: str) -> None:
        count = self.counter % 3
        for number in range(count):
            child = f"child {parent} {number}"
            await self.jobs.insert(transaction, [NewJob("child", "default", id=child, parent_id=parent)])
            self.known[child] = Known("child", parent)
            self.known[parent].children.append(child)

    def _holds(self, lease: Lease) -> bool:
        known = self.known[lease.id]
        return known.state is JobState.RUNNING and known.attempt == lease.attempt

    # What time does.

    @rule(seconds=st.sampled_from([0.5, 3.0, LEASE_SECONDS + 0.5]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def rescue(self) -> None:
        self.do(self.rescuer.tick())

    @rule(node=st.sampled_from(["a", "b"]))
    def restart(self, node: str) -> None:
        self.do(self.rescuer.rescue_node(node))

    @precondition(lambda self: any(self._holds(lease) for lease in self.leases))
    @rule()
    def stall(self) -> None:
        """Every worker is paused for longer than its lease, and another one takes over."""
        self.clock.advance(LEASE_SECONDS + 0.5)
        self.rescue()
        self.every_job_has_moved_along_an_edge()
        self.lease("c", 3)

    # What always holds.

    @invariant()
    def every_job_has_moved_along_an_edge(self) -> None:
        jobs = {job.id: job for job in self._read()}
        assert jobs.keys() == self.known.keys(), "nothing is lost, nothing is made up"
        for job_id, job in jobs.items():
            known = self.known[job_id]
            assert job.attempt >= known.attempt, "the fence only grows"
            assert job.state is known.state or self._reachable(known.state, job.state), f"{known.state} -> {job.state}"
            assert job.failures <= ATTEMPTS_MAX
            assert job.rescues < RESCUES_MAX
            assert (job.node is not None) == (job.state is JobState.RUNNING)
            assert (job.finished_at is not None) == job.finished
            known.state, known.stage, known.attempt = job.state, job.stage, job.attempt

    @invariant()
    def a_waiting_parent_has_a_live_child(self) -> None:
        for known in self.known.values():
            if known.state is JobState.WAITING:
                assert any(self.known[child].state not in FINISHED for child in known.children), "nobody would wake it"
            if known.kind == "parent" and known.stage == "join":
                assert all(self.known[child].state in FINISHED for child in known.children), "it joins too early"

    def _reachable(self, old: JobState, new: JobState) -> bool:
        """One rule may make a few moves: a parent that has no children waits and goes on at once, for example."""
        seen, edge = {old}, {old}
        while edge:
            edge = {after for before in edge for after in JobState if may_move(before, after)} - seen
            seen |= edge
        return new in seen and old is not JobState.COMPLETED

    def _read(self) -> list[Job]:
        async def read() -> list[Job]:
            found: list[Job] = []
            while page := await self.jobs.list("default", after=found[-1].id if found else None, limit=100):
                found += page
            return found

        jobs = self.do(read())
        assert isinstance(jobs, list)
        return jobs

    def teardown(self) -> None:
        """Left alone with one healthy worker, every job comes to its end."""
        for _ in range(60):
            self.clock.advance(LEASE_SECONDS + 1)
            self.rescue()
            self.every_job_has_moved_along_an_edge()
            found = self.do(self.jobs.lease(dict.fromkeys(KINDS, 100), "healthy", LEASE_SECONDS))
            assert isinstance(found, list)
            for lease in found:
                self.every_job_has_moved_along_an_edge()
                outcome = self._outcome(lease, "done")
                decided = verdict(lease.job, outcome, RETRY, self.clock.now())
                self.do(self.settlement.settle(lease, outcome, decided))
            self.every_job_has_moved_along_an_edge()
            self.a_waiting_parent_has_a_live_child()
            if all(known.state in FINISHED for known in self.known.values()):
                return
        unfinished = {key: known.state for key, known in self.known.items() if known.state not in FINISHED}
        message = f"these never end: {unfinished}"
        raise AssertionError(message)


def test_no_history_breaks_the_engine(prove: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        database = runner.run(Database.open(Settings(data_dir=Path(folder))))
        machine = type("Bound", (History,), {"runner": runner, "database": database})
        try:
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=1500 if prove else 40,
                    stateful_step_count=60 if prove else 40,
                    deadline=None,
                    # Each step costs commits: a history that fails is printed as it is, not shortened for minutes.
                    phases=[Phase.explicit, Phase.reuse, Phase.generate],
                    report_multiple_bugs=False,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(database.close())

"""The back office with a real worker over both databases: attempts, retries, cancellation, rescue, parents, shutdown."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from forebay.clock import SystemClock
from forebay.config import JobSettings
from forebay.errors import Conflict, EngineCrashed, EngineUnavailable, InvalidRequest, NotFound, Overloaded
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.outcome import Cancelled, Done, Failed, Interruption, Outcome, Snoozed, Waiting
from forebay.jobs.rescuer import Rescuer
from forebay.jobs.retry import doubling
from forebay.jobs.settlement import Settlement
from forebay.store.database import Database, Transaction
from forebay.store.dead_letters import DeadLetterStore
from forebay.store.job_records import Job, Lease, NewJob
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from forebay.store.keys import KeyStore
from forebay.store.webhooks import WebhookStore
from forebay.telemetry import Metrics
from tests.support import postgres
from tests.support.office import QUICK, RETRY, back_office, settings_for
from tests.support.server import eventually

# The pace of the heartbeat and of the rescuer follows from the lease.
BRISK = QUICK.model_copy(update={"lease_seconds": 3})  # outlasts a pause of this process all the same
BRIEF = QUICK.model_copy(update={"lease_seconds": 1})  # for jobs that nobody works on, or whose lease is to run out


@pytest.fixture(params=["sqlite", "postgres"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    url = postgres.new_database() if request.param == "postgres" else None
    database = await Database.open(settings_for(tmp_path, url))
    yield database
    await database.close()


class Script:
    """A kind that does as its test says, and counts."""

    def __init__(self, *outcomes: Outcome | BaseException) -> None:
        self.outcomes = list(outcomes)
        self.attempts: list[Lease] = []
        self.interruptions: list[Interruption | None] = []
        self.holding = asyncio.Event()
        self.hold = False

    async def perform(self, lease: Lease, run: Run) -> Outcome:
        self.attempts.append(lease)
        if self.hold:
            self.holding.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.interruptions.append(run.interruption)
        outcome = self.outcomes.pop(0) if self.outcomes else Done()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def kind(self, **options: object) -> Kind:
        return Kind(**{"name": "job", "perform": self.perform, "at_once": 4, "retry": RETRY, **options})  # type: ignore[arg-type]


def job(**fields: object) -> NewJob:
    return NewJob("job", "default", **fields)  # type: ignore[arg-type]


async def test_a_job_is_done(database: Database) -> None:
    script = Script()
    async with back_office(database, [script.kind()]) as back:
        (job_id,) = await back.submit(job())
        assert (await back.until_finished(job_id)).state is JobState.COMPLETED
    assert [lease.attempt for lease in script.attempts] == [1]


async def test_a_job_starts_at_once_when_the_worker_is_idle(database: Database) -> None:
    """The worker is woken, it does not poll: its poll is far away."""
    slow = JobSettings(lease_seconds=60, poll_seconds=60)
    async with back_office(database, [Script().kind()], settings=slow) as back:
        for _ in range(5):
            (job_id,) = await back.submit(job())
            await back.until_finished(job_id, within_seconds=5)


async def test_a_failure_is_tried_again_and_then_given_up(database: Database) -> None:
    script = Script(*(EngineCrashed() for _ in range(9)))
    async with back_office(database, [script.kind(has_dead_letter=True)]) as back:
        (job_id,) = await back.submit(job())
        found = await back.until_finished(job_id)
        assert (found.state, found.error_code, found.failures) == (JobState.FAILED, "engine_crashed", 3)
        assert [entry["attempt"] for entry in found.errors] == [1, 2, 3]
        letters = await DeadLetterStore(database, back.office._clock).list("default")
        assert [(letter.job_id, letter.error_code) for letter in letters] == [(job_id, "engine_crashed")]
        assert len(script.attempts) == 3
        script.outcomes = [Done()]
        await back.office.desk.retry("default", job_id)
        assert (await back.until_finished(job_id)).state is JobState.COMPLETED
        with pytest.raises(Conflict):
            await back.office.desk.retry("default", job_id)


async def test_what_will_not_get_better_is_not_tried_again(database: Database) -> None:
    script = Script(InvalidRequest("This is wrong."))
    async with back_office(database, [script.kind()]) as back:
        (job_id,) = await back.submit(job())
        found = await back.until_finished(job_id)
        assert (found.state, found.error_message, len(script.attempts)) == (JobState.FAILED, "This is wrong.", 1)
        with pytest.raises(InvalidRequest):
            await back.office.desk.retry("default", job_id)


async def test_a_bug_in_a_kind_is_a_failed_attempt_that_tells_nothing(database: Database) -> None:
    script = Script(ZeroDivisionError("/secret/path"))
    async with back_office(database, [script.kind()]) as back:
        (job_id,) = await back.submit(job())
        found = await back.until_finished(job_id)
        assert (found.state, found.attempt) == (JobState.COMPLETED, 2)
        assert "secret" not in str(found.errors)


async def test_a_bug_in_what_an_outcome_writes_is_a_failed_attempt(database: Database) -> None:
    async def write(_transaction: Transaction) -> None:
        raise ZeroDivisionError("/secret/path")

    script = Script(Done(write))
    patient = JobSettings(lease_seconds=600, poll_seconds=0.05, backoff_seconds_min=0.01)  # nobody is to rescue it
    async with back_office(database, [script.kind()], settings=patient) as back:
        (job_id,) = await back.submit(job())
        found = await back.until_finished(job_id)
        assert (found.state, found.attempt) == (JobState.COMPLETED, 2)
        assert "secret" not in str(found.errors)
        (job_id,) = await back.submit(job())
        script.outcomes = [Done(write) for _ in range(9)]
        found = await back.until_finished(job_id)
        assert (found.state, found.error_code, found.failures) == (JobState.FAILED, "internal_error", 3)


async def test_a_snoozed_job_uses_up_no_attempt(database: Database) -> None:
    script = Script(*(Snoozed(0.01) for _ in range(6)))
    async with back_office(database, [script.kind()]) as back:
        (job_id,) = await back.submit(job())
        found = await back.until_finished(job_id)
        assert (found.state, found.failures, found.attempt) == (JobState.COMPLETED, 0, 7)


async def test_progress_forgives_earlier_failures(database: Database) -> None:
    """Three failures in a row are too many; two, some progress and two more are not."""
    jobs, attempts = JobStore(database, SystemClock()), 0

    async def perform(lease: Lease, run: Run) -> Outcome:
        nonlocal attempts
        attempts += 1
        if attempts == 3:
            async with database.begin() as transaction:
                await jobs.fence(transaction, lease)
            run.progressed = True
        return Failed(EngineCrashed(), retryable=True) if attempts < 5 else Done()

    async with back_office(database, [Kind("job", perform, 4, RETRY)]) as back:
        (job_id,) = await back.submit(job())
        found = await back.until_finished(job_id)
        assert (found.state, attempts) == (JobState.COMPLETED, 5)


async def test_cancelling_a_running_job_stops_it(database: Database) -> None:
    script = Script()
    script.hold = True
    async with back_office(database, [script.kind()], settings=JobSettings(lease_seconds=60)) as back:
        (job_id,) = await back.submit(job())
        await asyncio.wait_for(script.holding.wait(), 10)
        await back.office.desk.cancel("default", job_id)
        found = await back.until_finished(job_id, within_seconds=5)
        assert (found.state, script.interruptions) == (JobState.CANCELLED, [Interruption.CANCELLED])
        assert (await back.office.desk.cancel("default", job_id)).state is JobState.CANCELLED, "twice is fine"


async def test_a_cancellation_ends_a_job_that_fails_at_that_moment(database: Database) -> None:
    """Its attempt is over before the worker hears of it, and the next one is far away."""
    jobs = JobStore(database, SystemClock())

    async def perform(lease: Lease, _run: Run) -> Outcome:
        async with database.begin() as transaction:
            await jobs.request_cancel(transaction, lease.id)
        return Failed(EngineCrashed(), retryable=True, retry_in_seconds=3600)

    async with back_office(database, [Kind("job", perform, 4, RETRY)], settings=BRISK) as back:
        (job_id,) = await back.submit(job())
        found = await back.until_finished(job_id, within_seconds=10)
        assert (found.state, found.attempt) == (JobState.CANCELLED, 1)
        assert [entry["code"] for entry in found.errors] == ["engine_crashed", "job_cancelled"]


async def test_cancelling_a_job_that_nobody_runs_ends_it_at_once(database: Database) -> None:
    script = Script()
    async with back_office(database, [script.kind()], works=False) as back:
        (job_id,) = await back.submit(job())
        assert (await back.office.desk.cancel("default", job_id)).state is JobState.CANCELLED
        with pytest.raises(NotFound):
            await back.office.desk.cancel("other", job_id)


async def test_a_running_job_ends_at_its_deadline(database: Database) -> None:
    script = Script()
    script.hold = True
    async with back_office(database, [script.kind()], settings=BRISK) as back:
        for seconds in (0.4, 4.0):  # once more for a job whose time is up before anybody has taken it
            (job_id,) = await back.submit(job(deadline_at=back.jobs.now() + seconds))
            found = await back.until_finished(job_id, within_seconds=seconds + 4)
            if script.attempts:
                break
        assert (found.state, script.interruptions) == (JobState.EXPIRED, [Interruption.EXPIRED])
        assert found.finished_at is not None
        assert found.finished_at >= found.deadline_at


async def test_a_job_that_nobody_runs_expires(database: Database) -> None:
    async with back_office(database, [Script().kind()], works=False, settings=BRIEF) as back:
        (job_id,) = await back.submit(job(deadline_at=back.jobs.now() + 0.1))
        assert (await back.until_finished(job_id, within_seconds=5)).state is JobState.EXPIRED


async def test_shutdown_gives_the_job_back_and_the_next_worker_goes_on(database: Database) -> None:
    script = Script()
    script.hold = True
    async with back_office(database, [script.kind()]) as back:
        (job_id,) = await back.submit(job())
        await asyncio.wait_for(script.holding.wait(), 10)
    assert script.interruptions == [Interruption.SHUTDOWN]
    found = await back.jobs.get("default", job_id)
    assert (found.state, found.failures, found.rescues) == (JobState.AVAILABLE, 0, 0)
    script.hold = False
    async with back_office(database, [script.kind()], node="node_b") as back:
        assert (await back.until_finished(job_id)).state is JobState.COMPLETED


async def test_a_worker_takes_back_at_once_what_its_dead_namesake_held(database: Database) -> None:
    patient = JobSettings(lease_seconds=3600, poll_seconds=0.05)
    async with back_office(database, [], works=False) as back:
        (job_id,) = await back.submit(job())
        await back.jobs.lease({"job": 1}, "node_dead", 3600)
    async with back_office(database, [Script().kind()], node="node_dead", settings=patient) as back:
        found = await back.until_finished(job_id, within_seconds=5)
        assert (found.state, found.attempt, found.rescues) == (JobState.COMPLETED, 2, 1)


async def test_a_lease_that_runs_out_is_rescued_and_the_late_attempt_is_dropped(database: Database) -> None:
    late = Script()
    late.hold = True
    async with back_office(database, [late.kind(at_once=1)], node="node_late", settings=BRIEF) as slow:
        (job_id,) = await slow.submit(job())
        await asyncio.wait_for(late.holding.wait(), 10)
        worker = slow.office._worker
        assert worker is not None
        worker._renew = _deaf  # type: ignore[method-assign]  # a fault: its heartbeat stops,
        worker._lease = _idle  # type: ignore[method-assign]  # and it takes nothing more
        async with back_office(database, [Script().kind()], node="node_b") as back:
            found = await back.until_finished(job_id, within_seconds=10)
            assert (found.state, found.attempt) == (JobState.COMPLETED, 2)
        await eventually(lambda: late.interruptions, what="the end of the late attempt")
        assert late.interruptions == [Interruption.LEASE_LOST]


async def _deaf() -> None:
    return


async def _idle() -> list[Lease]:
    return []


async def test_a_job_on_which_workers_keep_dying_is_given_up(database: Database) -> None:
    settings = BRIEF.model_copy(update={"rescues_max": 3})
    async with back_office(database, [Script().kind(has_dead_letter=True)], works=False, settings=settings) as back:
        (job_id,) = await back.submit(job())

        async def dies_again() -> Job | None:
            await back.jobs.lease({"job": 1}, "node_dying", 0.01)
            found = await back.jobs.get("default", job_id)
            return found if found.finished else None

        found = await eventually(dies_again, what="the end of it")
        assert (found.state, found.error_code, found.attempt) == (JobState.FAILED, "worker_lost", 3)


async def test_a_worker_that_was_only_late_keeps_a_job_that_would_be_given_up(database: Database) -> None:
    """It renews between the look at lost jobs and the giving up."""
    kind = Script().kind()
    settings = QUICK.model_copy(update={"rescues_max": 1})
    clock, metrics, dead_letters = SystemClock(), Metrics(), DeadLetterStore(database, SystemClock())
    jobs, webhooks = JobStore(database, clock), WebhookStore(database, clock)
    settlement = Settlement(jobs, webhooks, dead_letters, {"job": kind})
    rescuer = Rescuer(jobs, settlement, {"job": kind}, settings, clock, metrics)
    async with database.begin() as transaction:
        (job_id,) = await jobs.insert(transaction, [job()])
    (held,) = await jobs.lease({"job": 1}, "node_late", -1)
    lost = await jobs.lost(10)
    assert await jobs.renew("node_late", [job_id], 60)
    await rescuer.rescue(lost)
    assert (await jobs.get("default", job_id)).state is JobState.RUNNING
    async with database.begin() as transaction:
        await jobs.fence(transaction, held)
    await jobs.renew("node_late", [job_id], -1)
    await rescuer.rescue(await jobs.lost(10))
    assert (await jobs.get("default", job_id)).error_code == "worker_lost"


class Family:
    """A parent that makes children, waits for them and joins."""

    def __init__(self, children: int, jobs: JobStore) -> None:
        self.child = Script()
        self.joined = 0
        self._children = children
        self._jobs = jobs

    async def perform(self, lease: Lease, _run: Run) -> Outcome:
        if lease.job.stage == "join":
            self.joined += 1
            return Cancelled() if lease.job.cancel_requested_at else Done()

        async def make(transaction: Transaction) -> None:
            new = [NewJob("child", "default", parent_id=lease.id) for _ in range(self._children)]
            await self._jobs.insert(transaction, new)

        return Waiting("run", make)

    def kinds(self) -> list[Kind]:
        parent = Kind("job", self.perform, 2, RETRY, children="child", joins_at="join")
        return [parent, self.child.kind(name="child", waits_for_it=True)]


@pytest.mark.parametrize("children", [0, 1, 7])
async def test_a_parent_joins_when_its_children_have_ended(database: Database, children: int) -> None:
    family = Family(children, JobStore(database, SystemClock()))
    async with back_office(database, family.kinds()) as back:
        (job_id,) = await back.submit(job())
        assert (await back.until_finished(job_id)).state is JobState.COMPLETED
    assert (len(family.child.attempts), family.joined) == (children, 1)


async def test_cancelling_a_parent_stops_its_children_and_it_joins_what_there_is(database: Database) -> None:
    family = Family(9, JobStore(database, SystemClock()))
    child = family.child
    child.hold = True
    async with back_office(database, family.kinds(), settings=JobSettings(lease_seconds=60)) as back:
        (job_id,) = await back.submit(job())
        await eventually(lambda: len(child.attempts) == 4, what="four running children")
        await back.office.desk.cancel("default", job_id)
        found = await back.until_finished(job_id, within_seconds=5)
        assert (found.state, family.joined) == (JobState.CANCELLED, 1)
        assert child.interruptions == [Interruption.CANCELLED] * 4
        states = {child.state for child in await back.jobs.list("default", kinds=["child"])}
        assert states == {JobState.CANCELLED}
        with pytest.raises(NotFound):
            await back.office.desk.get("default", (await back.jobs.list("default", kinds=["child"]))[0].id)


async def test_a_worker_holds_no_more_than_its_room(database: Database) -> None:
    script = Script()
    script.hold = True
    async with back_office(database, [script.kind(at_once=3)]) as back:
        await back.submit(*(job() for _ in range(10)))
        await eventually(lambda: len(script.attempts) >= 3, what="three attempts")
        counts = await back.jobs.counts()
        assert counts["job", JobState.RUNNING] == 3


async def test_one_project_does_not_hold_all_places_while_another_waits(database: Database) -> None:
    """Jobs of one project that never end, and very many of them: those of another one are done all the same."""
    other = (await KeyStore(database, SystemClock()).get_or_create_project("other")).id
    hung: list[Lease] = []

    async def perform(lease: Lease, _run: Run) -> Outcome:
        if lease.job.project_id == "default":
            hung.append(lease)
            await asyncio.Event().wait()
        return Done()

    jobs = JobStore(database, SystemClock())
    async with database.begin() as transaction:
        await jobs.insert(transaction, [job() for _ in range(500)])
        await jobs.insert(transaction, [NewJob("job", other), NewJob("job", other)])
    async with back_office(database, [Kind("job", perform, 4, RETRY, takes_turns=True)]):

        async def done() -> bool:
            return not await jobs.live(other, "job")

        await eventually(done, what="the end of the other project's jobs")
        await eventually(lambda: len(hung) == 4, what="no place that is left empty")


async def test_one_model_does_not_hold_all_places_while_another_waits(database: Database) -> None:
    """Jobs of one model that never end fill every place: those of another one are done all the same, one at a time."""
    hung: list[Lease] = []
    fast = most = 0

    async def perform(lease: Lease, _run: Run) -> Outcome:
        nonlocal fast, most
        if lease.job.model == "slow":
            hung.append(lease)
            await asyncio.Event().wait()
        fast += 1
        most = max(most, fast)
        async with database.begin() as transaction:  # it takes a while
            await jobs.fence(transaction, lease)
        fast -= 1
        return Done()

    jobs = JobStore(database, SystemClock())
    kind = Kind("job", perform, 4, RETRY, takes_turns=True, groups_models=True, spare=1)
    settings = QUICK.model_copy(update={"group_wait_seconds": 0.1})
    async with back_office(database, [kind], settings=settings) as back:
        await back.submit(*(job(model="slow") for _ in range(12)))
        await eventually(lambda: len(hung) == 4, what="every place taken")
        for job_id in await back.submit(*(job(model="fast") for _ in range(6))):
            assert (await back.until_finished(job_id, within_seconds=10)).state is JobState.COMPLETED
        assert (len(hung), most) == (4, 1)


async def test_jobs_of_another_loaded_model_wait_for_nobody(database: Database) -> None:
    """Jobs of one model fill every place and hang; those of another one that is loaded as well have a place at once."""
    hung: list[Lease] = []

    async def perform(lease: Lease, _run: Run) -> Outcome:
        if lease.job.model == "slow":
            hung.append(lease)
            await asyncio.Event().wait()
        return Done()

    kind = Kind("job", perform, 4, RETRY, takes_turns=True, groups_models=True, spare=1)
    settings = QUICK.model_copy(update={"group_wait_seconds": 3600})
    async with back_office(database, [kind], settings=settings, loaded=lambda: ["slow", "fast"]) as back:
        await back.submit(*(job(model="slow") for _ in range(12)))
        await eventually(lambda: len(hung) == 4, what="every place taken")
        for job_id in await back.submit(*(job(model="fast") for _ in range(3))):
            assert (await back.until_finished(job_id, within_seconds=10)).state is JobState.COMPLETED


async def test_a_model_that_does_not_start_does_not_hold_up_the_others(database: Database) -> None:
    """Its jobs fail, and when they are tried again they hang: those of another model find a place all the same."""
    hung: list[Lease] = []

    async def perform(lease: Lease, _run: Run) -> Outcome:
        if lease.job.model == "good":
            return Done()
        if lease.job.failures:
            hung.append(lease)
            await asyncio.Event().wait()
        return Failed(EngineUnavailable(), retryable=True)

    async with back_office(database, [Kind("job", perform, 4, RETRY)]) as back:
        await back.submit(*(job(model="bad") for _ in range(12)))
        await eventually(lambda: hung, what="a second attempt")
        done = await back.submit(*(job(model="good") for _ in range(8)))
        for job_id in done:
            assert (await back.until_finished(job_id, within_seconds=10)).state is JobState.COMPLETED
        assert len(hung) == 1


class Ahead(SystemClock):
    """The real clock; a test sets it forward."""

    ahead = 0.0

    def now(self) -> float:
        return super().now() + self.ahead


async def test_a_worker_stays_with_a_loaded_model_only_so_long(database: Database) -> None:
    """Jobs of a loaded model never run out, and a job of another one, which is older, gets its turn all the same."""
    clock, waits, before = Ahead(), 10.0, 0
    jobs, loaded = JobStore(database, clock), asyncio.Event()

    async def perform(lease: Lease, _run: Run) -> Outcome:
        nonlocal before
        if lease.job.model == "loaded":
            if not loaded.is_set():
                loaded.set()
                await asyncio.Event().wait()
            before += 1
            async with database.begin() as transaction:
                await jobs.insert(transaction, [job(model="loaded")])
        return Done()

    settings = QUICK.model_copy(update={"group_wait_seconds": waits})
    async with back_office(database, [Kind("job", perform, 2, RETRY)], settings=settings, clock=clock) as back:
        await back.submit(job(model="loaded"))
        await asyncio.wait_for(loaded.wait(), 10)
        async with database.begin() as transaction:
            (other,) = await jobs.insert(transaction, [job(model="other")])
            await jobs.insert(transaction, [job(model="loaded")])
        await eventually(lambda: before > 2, what="some of the loaded model")
        assert (await jobs.get("default", other)).state is JobState.AVAILABLE, "until then those go first"
        clock.ahead = waits
        found = await back.until_finished(other)
        assert found.started_at is not None
        assert found.started_at - found.created_at >= waits


async def test_a_job_without_progress_raises_the_alarm(database: Database) -> None:
    script, settings = Script(), BRIEF.model_copy(update={"stuck_seconds": 0.2})
    script.hold = True
    async with back_office(database, [script.kind()], settings=settings) as back:
        await back.submit(job())
        await asyncio.wait_for(script.holding.wait(), 10)
        stuck = partial(back.metrics.registry.get_sample_value, "forebay_jobs_stuck")
        await eventually(lambda: stuck() == 1, what="the alarm")
        script.hold = False
        await back.office.desk.cancel("default", script.attempts[0].id)
        await eventually(lambda: stuck() == 0, what="the end of the alarm")


async def test_the_desk_is_full_above_its_limit(database: Database) -> None:
    settings = QUICK.model_copy(update={"live_max": 3})
    async with back_office(database, [Script().kind()], works=False, settings=settings) as back:
        for _ in range(3):
            await back.office.desk.check_room()
            await back.submit(job())
        with pytest.raises(Overloaded) as refusal:
            await back.office.desk.check_room()
        assert refusal.value.code == "job_queue_full"


async def test_many_at_once_do_not_get_past_the_limit(database: Database) -> None:
    settings = QUICK.model_copy(update={"live_max": 3})
    async with back_office(database, [Script().kind()], works=False, settings=settings) as back:
        checks = (back.office.desk.check_room() for _ in range(20))
        refusals = [each for each in await asyncio.gather(*checks, return_exceptions=True) if each is not None]
        assert [type(each) for each in refusals] == [Overloaded] * 17


async def test_the_outcome_survives_a_database_that_is_away(database: Database, tmp_path: Path) -> None:
    if database.is_sqlite:
        pytest.skip("a SQLite file does not go away; a full disk has its own test")
    url = str(database._engine.url.render_as_string(hide_password=False))
    gate, script = asyncio.Event(), Script()

    async def perform(lease: Lease, _run: Run) -> Outcome:
        script.attempts.append(lease)
        await gate.wait()
        return Done()

    kind = Kind("job", perform, 4, doubling(0.01, 0.05, 3))
    async with back_office(database, [kind], settings=JobSettings(lease_seconds=30, poll_seconds=0.05)) as back:
        (job_id,) = await back.submit(job())
        await eventually(lambda: script.attempts, what="the attempt")
        postgres.take_away(url)
        gate.set()
        await eventually(lambda: back.office._worker is not None and back.office._worker._away, what="notice")
        postgres.bring_back(url)
        found = await back.until_finished(job_id)
        assert (found.state, found.attempt) == (JobState.COMPLETED, 1)


async def test_the_outcome_survives_a_disk_that_is_full(database: Database) -> None:
    if not database.is_sqlite:
        pytest.skip("a database of our own can be told how large it may grow")
    script, tried = Script(), asyncio.Event()

    async def write(transaction: Transaction) -> None:
        tried.set()
        for _ in range(20):
            await back.jobs.note(transaction, script.attempts[0].id, "note", "x" * 900)

    async def perform(lease: Lease, _run: Run) -> Outcome:
        script.attempts.append(lease)
        await _bound(database, full=True)
        return Done(write)

    kind = Kind("job", perform, 4, doubling(0.01, 0.05, 3))
    async with back_office(database, [kind], settings=JobSettings(lease_seconds=30, poll_seconds=0.05)) as back:
        (job_id,) = await back.submit(job())
        await asyncio.wait_for(tried.wait(), 10)
        await _bound(database, full=False)
        found = await back.until_finished(job_id)
        assert (found.state, found.attempt) == (JobState.COMPLETED, 1)


async def _bound(database: Database, *, full: bool) -> None:
    """Leave SQLite no further page, or as many as it likes."""
    async with database.begin() as transaction:
        pages = await transaction.scalar(sa.text("PRAGMA page_count"))
        await transaction.execute(sa.text(f"PRAGMA max_page_count = {pages if full else 2**30}"))

"""One suite for the job store, over SQLite and PostgreSQL."""

import asyncio
from collections import Counter

import pytest
import sqlalchemy as sa

from forebay.errors import LeaseLost, NotFound
from forebay.store.database import Database
from forebay.store.job_records import Lease, NewJob, Verdict
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from forebay.store.keys import KeyStore
from forebay.store.tables import jobs as jobs_table
from forebay.store.tables import line_rates
from tests.support.clock import FakeClock
from tests.support.server import eventually

LEASE_SECONDS = 15.0


@pytest.fixture
def jobs(database: Database, clock: FakeClock) -> JobStore:
    return JobStore(database, clock, log_lines_max=5)


async def insert(jobs: JobStore, *new: NewJob) -> list[str]:
    async with jobs.database.begin() as transaction:
        return await jobs.insert(transaction, new)


async def lease(jobs: JobStore, count: int = 1, node: str = "a", kind: str = "noop", **options: object) -> list[Lease]:
    return await jobs.lease({kind: count}, node, LEASE_SECONDS, **options)  # type: ignore[arg-type]


async def settle(jobs: JobStore, held: Lease, verdict: Verdict) -> None:
    async with jobs.database.begin() as transaction:
        await jobs.settle(transaction, held, verdict)


def noop(**fields: object) -> NewJob:
    return NewJob("noop", "default", **fields)  # type: ignore[arg-type]


def done(jobs: JobStore) -> Verdict:
    return Verdict(JobState.COMPLETED, jobs.now())


async def test_what_is_inserted_is_leased_once_and_settled(jobs: JobStore) -> None:
    (job_id,) = await insert(jobs, noop(payload={"a": [1, "ä"]}, total=3, webhook_url="https://example.com/"))
    (held,) = await lease(jobs, 5)
    assert (held.id, held.attempt, held.job.state, held.job.node) == (job_id, 1, JobState.RUNNING, "a")
    assert (held.job.payload, held.job.total, held.job.errors) == ({"a": [1, "ä"]}, 3, [])
    assert await lease(jobs, 5) == []
    await settle(jobs, held, done(jobs))
    found = await jobs.get("default", job_id)
    assert (found.state, found.node, found.lease_expires_at) == (JobState.COMPLETED, None, None)
    assert found.finished_at is not None


async def test_nobody_sees_the_jobs_of_others(jobs: JobStore, clock: FakeClock) -> None:
    (job_id,) = await insert(jobs, noop())
    other = await KeyStore(jobs.database, clock).get_or_create_project("other")
    with pytest.raises(NotFound):
        await jobs.get(other.id, job_id)
    assert await jobs.list(other.id) == []


async def test_the_order_is_priority_then_deadline_then_age(jobs: JobStore, clock: FakeClock) -> None:
    now = clock.now()
    expected = []
    for name, priority, deadline in (
        ("e", 1, now),
        ("c", 0, now + 9e8),
        ("d", 0, now + 9e8),
        ("b", 0, now + 8e8),
        ("a", -1, now),
    ):
        await insert(jobs, noop(id=name, priority=priority, deadline_at=deadline))
        expected.append(name)
        clock.advance(1)
    held = [one.id for _ in range(5) for one in await lease(jobs)]
    assert held == sorted(expected)


async def test_a_warm_model_goes_first_until_others_have_waited_long_enough(jobs: JobStore, clock: FakeClock) -> None:
    await insert(jobs, noop(id="cold", model="m1"))
    clock.advance(1)
    await insert(jobs, noop(id="warm", model="m2"), noop(id="warm2", model="m2"))
    (first,) = await lease(jobs, warm={"m2"}, group_wait_seconds=60)
    assert first.id == "warm"
    clock.advance(60)
    (second,) = await lease(jobs, warm={"m2"}, group_wait_seconds=60)
    assert second.id == "cold"


async def test_a_project_of_which_fewer_jobs_run_goes_first(jobs: JobStore, clock: FakeClock) -> None:
    other = (await KeyStore(jobs.database, clock).get_or_create_project("other")).id
    await insert(jobs, *(noop(id=f"a{number}") for number in range(9)))
    clock.advance(1)
    await insert(jobs, NewJob("noop", other, id="b1"), NewJob("noop", other, id="b2"), noop(id="urgent", priority=-1))
    held: list[str] = []
    running: Counter[str] = Counter()
    for room in (8, 4, 2, 1):
        found = await lease(jobs, room, turns={"noop": running})
        held += sorted(one.id for one in found)
        running.update(one.job.project_id for one in found)
    assert held == ["a0", "a1", "a2", "urgent", "b1", "b2", "a3", "a4"]


async def test_a_loaded_model_goes_before_the_turns_of_projects_where_models_are_grouped(
    jobs: JobStore, clock: FakeClock
) -> None:
    other = (await KeyStore(jobs.database, clock).get_or_create_project("other")).id
    await insert(jobs, *(noop(id=f"a{number}", model="loaded") for number in range(4)))
    await insert(jobs, NewJob("noop", other, id="b0", model="cold"), NewJob("noop", other, id="b1", model="loaded"))
    running = {"default": 1.0}

    async def next_one(*, grouped: bool) -> str:
        groups = ["noop"] if grouped else []
        turns = {"noop": running}
        (found,) = await lease(jobs, warm={"loaded"}, group_wait_seconds=60, turns=turns, grouped=groups)
        return found.id

    assert await next_one(grouped=True) == "b1"
    assert await next_one(grouped=True) == "a0"
    clock.advance(61)
    assert await next_one(grouped=True) == "b0", "it has waited"
    await insert(jobs, NewJob("noop", other, id="b2", model="cold"))
    assert await next_one(grouped=False) == "b2"


async def test_projects_go_by_the_jobs_that_run_in_proportion_to_their_weights(
    jobs: JobStore, clock: FakeClock
) -> None:
    other = (await KeyStore(jobs.database, clock).get_or_create_project("other")).id
    await insert(jobs, noop(id="a"), NewJob("noop", other, id="b"))
    found = await lease(jobs, turns={"noop": {"default": 1.0, other: 2 / 3}})
    assert [one.id for one in found] == ["b"], "two of a project with three times the weight"


async def test_a_spare_place_is_for_a_project_of_which_none_runs(jobs: JobStore, clock: FakeClock) -> None:
    other = (await KeyStore(jobs.database, clock).get_or_create_project("other")).id
    await insert(jobs, *(noop(id=f"a{number}") for number in range(4)))
    turns = {"noop": {"default": 2.0}}
    assert await lease(jobs, 0, turns=turns, spare={"noop": 1}) == []
    await insert(jobs, NewJob("noop", other, id="b0"), NewJob("noop", other, id="b1"))
    assert await lease(jobs, 0, turns=turns, spare={"noop": 0}) == []
    assert [one.id for one in await lease(jobs, 0, turns=turns, spare={"noop": 1})] == ["b0"]
    assert await lease(jobs, 0, turns={"noop": {"default": 2.0, other: 1.0}}, spare={"noop": 1}) == []


async def test_a_spare_place_is_for_a_model_of_which_none_runs(jobs: JobStore, clock: FakeClock) -> None:
    await insert(jobs, *(noop(id=f"slow{number}", model="slow") for number in range(2)), noop(id="none"))
    clock.advance(61)
    await insert(jobs, noop(id="fast0", model="fast"), noop(id="fast1", model="fast"))

    async def spare(*models: str, places: int = 1) -> list[str]:
        turns = {"noop": {"default": 4.0}}
        shared = {"turns": turns, "grouped": ["noop"], "warm": set(models), "group_wait_seconds": 60.0}
        found = await lease(jobs, 0, spare={"noop": places}, models={"noop": set(models)}, **shared)
        return [one.id for one in found]

    assert await spare("slow") == [], "a worker stays with what is loaded for a while"
    clock.advance(61)
    assert await spare("slow", places=0) == []
    assert await spare("slow") == ["fast0"], "the oldest are of a model that runs, or of none"
    assert await spare("slow", "fast") == []
    assert await spare("fast") == ["slow0"]
    assert await spare("slow") == ["fast1"], "as soon as none runs again"


async def test_for_a_spare_place_a_model_goes_before_a_project(jobs: JobStore, clock: FakeClock) -> None:
    """A project whose model runs gets the next place that comes free, so neither keeps the other out."""
    other = (await KeyStore(jobs.database, clock).get_or_create_project("other")).id
    await insert(jobs, NewJob("noop", other, id="b0", model="slow"), noop(id="fast", model="fast"))
    clock.advance(61)
    running = {"default": 4.0}

    async def spare(*models: str) -> list[str]:
        shared = {"turns": {"noop": running}, "group_wait_seconds": 60.0, "warm": set(models), "grouped": ["noop"]}
        found = await lease(jobs, 0, spare={"noop": 1}, models={"noop": set(models)}, **shared)
        return [one.id for one in found]

    assert await spare("slow") == ["fast"]
    assert await spare("slow", "fast") == ["b0"]


async def test_a_model_whose_jobs_fail_gets_one_place_until_it_gets_on(jobs: JobStore, clock: FakeClock) -> None:
    await insert(jobs, *(noop(id=f"bad{number}", model="bad") for number in range(4)), noop(id="far", model="bad2"))
    clock.advance(1)
    await insert(jobs, noop(id="good0", model="good"), noop(id="good1", model="good"), noop(id="none"))
    failed = await lease(jobs, 4)
    assert {one.job.model for one in failed} == {"bad"}, "nobody knows yet"
    for one in failed:
        error = ("engine_unavailable", "It does not start.")
        await settle(jobs, one, Verdict(JobState.AVAILABLE, jobs.now(), error=error, counts_as_failure=True))
    found = await lease(jobs, 4)
    assert sorted(one.id for one in found) == ["bad0", "far", "good0", "good1"]
    assert [one.id for one in await lease(jobs, 4, warm={"bad", "bad2", "good"})] == ["none"]
    assert await lease(jobs, 4, warm={"bad"}) == [], "the second place stays free for others"
    assert [one.id for one in await lease(jobs, 4, node="b")] == ["bad1"], "another worker may try as well"
    for one in failed:
        async with jobs.database.begin() as transaction:
            values = {"failures": 0}  # as progress of them would
            await transaction.execute(sa.update(jobs_table).where(jobs_table.c.id == one.id).values(values))
    assert sorted(one.id for one in await lease(jobs, 4, warm={"bad"})) == ["bad2", "bad3"]


async def test_each_kind_has_its_own_room(jobs: JobStore) -> None:
    await insert(jobs, *(noop() for _ in range(4)), *(NewJob("other", "default") for _ in range(4)))
    held = await jobs.lease({"noop": 3, "other": 1, "third": 2}, "a", LEASE_SECONDS)
    assert sorted(one.job.kind for one in held) == ["noop", "noop", "noop", "other"]
    assert await jobs.lease({"noop": 0}, "a", LEASE_SECONDS) == []


async def test_a_job_is_not_leased_before_its_time(jobs: JobStore, clock: FakeClock) -> None:
    await insert(jobs, noop(run_at=jobs.now() + 10))
    assert await lease(jobs) == []
    clock.advance(10)
    assert len(await lease(jobs)) == 1


async def test_no_job_is_leased_twice_by_many_workers_at_once(jobs: JobStore) -> None:
    await insert(jobs, *(noop() for _ in range(60)))
    found = await asyncio.gather(*(lease(jobs, 7, node=f"node {number}") for number in range(12)))
    ids = [one.id for leases in found for one in leases]
    assert len(ids) == len(set(ids))
    rest = await lease(jobs, 100)
    assert len(ids) + len(rest) == 60


async def test_a_late_worker_cannot_write(jobs: JobStore, clock: FakeClock) -> None:
    (job_id,) = await insert(jobs, noop())
    (late,) = await lease(jobs, node="late")
    clock.advance(LEASE_SECONDS + 1)
    lost = await jobs.lost(10)
    assert [job.id for job in lost] == [job_id]
    async with jobs.database.begin() as transaction:
        assert await jobs.take_back(transaction, lost) == 1
    (held,) = await lease(jobs, node="next")
    assert held.attempt == late.attempt + 1
    for write in (jobs.fence, jobs.progress):
        with pytest.raises(LeaseLost):
            async with jobs.database.begin() as transaction:
                await write(transaction, late)
    with pytest.raises(LeaseLost):
        await settle(jobs, late, done(jobs))
    async with jobs.database.begin() as transaction:
        assert await jobs.settle_completed(transaction, [late]) == set()
    assert job_id not in await jobs.renew("late", [job_id], LEASE_SECONDS)
    await settle(jobs, held, done(jobs))
    assert (await jobs.get("default", job_id)).state is JobState.COMPLETED


async def test_a_late_worker_cannot_write_while_the_job_waits_for_the_next(jobs: JobStore, clock: FakeClock) -> None:
    await insert(jobs, noop())
    (late,) = await lease(jobs)
    clock.advance(LEASE_SECONDS + 1)
    async with jobs.database.begin() as transaction:
        await jobs.take_back(transaction, await jobs.lost(10))
    with pytest.raises(LeaseLost):
        await settle(jobs, late, done(jobs))


async def test_a_failed_write_under_a_lost_lease_leaves_nothing(jobs: JobStore, clock: FakeClock) -> None:
    (parent, _) = await insert(jobs, noop(id="parent", run_at=clock.now() + 1e9), noop(id="child", parent_id="parent"))
    (late,) = await lease(jobs)
    clock.advance(LEASE_SECONDS + 1)
    async with jobs.database.begin() as transaction:
        await jobs.take_back(transaction, await jobs.lost(10))
    with pytest.raises(LeaseLost):
        async with jobs.database.begin() as transaction:
            await jobs.count(transaction, parent, completed=5)
            await jobs.fence(transaction, late)
    assert (await jobs.get("default", parent)).completed == 0


async def test_a_renewed_lease_is_not_lost(jobs: JobStore, clock: FakeClock) -> None:
    (job_id,) = await insert(jobs, noop())
    (held,) = await lease(jobs)
    for _ in range(3):
        clock.advance(LEASE_SECONDS - 1)
        renewed = await jobs.renew("a", [job_id], LEASE_SECONDS)
        assert (renewed[job_id].attempt, renewed[job_id].cancel_requested) == (held.attempt, False)
        assert await jobs.lost(10) == []
    assert await jobs.renew("b", [job_id], LEASE_SECONDS) == {}
    async with jobs.database.begin() as transaction:
        await jobs.request_cancel(transaction, job_id)
    assert (await jobs.renew("a", [job_id], LEASE_SECONDS))[job_id].cancel_requested


async def test_a_lease_that_was_renewed_meanwhile_is_not_taken_back(jobs: JobStore, clock: FakeClock) -> None:
    (job_id,) = await insert(jobs, noop())
    (held,) = await lease(jobs)
    clock.advance(LEASE_SECONDS + 1)
    lost = await jobs.lost(10)
    await jobs.renew("a", [job_id], LEASE_SECONDS)
    async with jobs.database.begin() as transaction:
        assert await jobs.take_back(transaction, lost) == 0
    await settle(jobs, held, done(jobs))


async def test_the_leases_of_a_dead_node_are_found_at_once(jobs: JobStore) -> None:
    await insert(jobs, noop(), noop())
    await lease(jobs, node="dead")
    await lease(jobs, node="alive")
    assert [job.node for job in await jobs.lost(10, "dead")] == ["dead"]


async def test_failures_are_kept_the_last_ones_only(jobs: JobStore, clock: FakeClock) -> None:
    (job_id,) = await insert(jobs, noop())
    for number in range(12):
        (held,) = await lease(jobs)
        error = ("engine_crashed", f"failure {number}")
        await settle(jobs, held, Verdict(JobState.AVAILABLE, jobs.now(), error=error, counts_as_failure=True))
    found = await jobs.get("default", job_id)
    assert [entry["message"] for entry in found.errors] == [f"failure {number}" for number in range(2, 12)]
    assert (found.failures, found.attempt, found.error_code) == (12, 12, "engine_crashed")
    (held,) = await lease(jobs)
    async with jobs.database.begin() as transaction:
        await jobs.progress(transaction, held, stage="half", total=8)
    found = await jobs.get("default", job_id)
    assert (found.failures, found.stage, found.total) == (0, "half", 8), "progress forgives"


async def test_counts_only_grow(jobs: JobStore) -> None:
    (job_id,) = await insert(jobs, noop())
    with pytest.raises(AssertionError):
        async with jobs.database.begin() as transaction:
            await jobs.count(transaction, job_id, completed=-1)
    async with jobs.database.begin() as transaction:
        await jobs.count(transaction, job_id, completed=3, failed=1)
    found = await jobs.get("default", job_id)
    assert (found.completed, found.failed) == (3, 1)


async def test_the_last_child_wakes_its_parent_once_whoever_ends_last(jobs: JobStore) -> None:
    """The two last children end at the same time: neither may leave it to the other."""
    for number in range(10):
        parent = f"parent {number}"
        await insert(jobs, noop(id=parent))
        (held,) = await lease(jobs)
        await settle(jobs, held, Verdict(JobState.WAITING, jobs.now(), stage="run"))
        children = [NewJob("child", "default", parent_id=parent) for _ in range(4)]
        await insert(jobs, *children)
        leases = await jobs.lease({"child": 4}, "a", LEASE_SECONDS)

        async def end(child: Lease, parent: str = parent) -> bool:
            async with jobs.database.begin() as transaction:
                await jobs.lock(transaction, parent)
                await jobs.settle(transaction, child, done(jobs))
                return await jobs.wake_parent(transaction, parent, "child", "join")

        assert sorted(await asyncio.gather(*(end(child) for child in leases))) == [False, False, False, True]
        (held,) = await lease(jobs)
        assert (held.id, held.job.stage, held.attempt) == (parent, "join", 2)
        await settle(jobs, held, done(jobs))


async def test_children_that_nobody_runs_are_ended_and_the_others_are_asked_to_stop(jobs: JobStore) -> None:
    await insert(jobs, noop(id="parent"))
    (held,) = await lease(jobs)
    await settle(jobs, held, Verdict(JobState.WAITING, jobs.now(), stage="run"))
    await insert(jobs, *(NewJob("child", "default", parent_id="parent") for _ in range(5)))
    running = await jobs.lease({"child": 2}, "a", LEASE_SECONDS)
    async with jobs.database.begin() as transaction:
        assert await jobs.end_available_children(transaction, "parent", "child", JobState.CANCELLED) == 3
        await jobs.request_cancel(transaction, "parent", children_of="parent")
        assert not await jobs.wake_parent(transaction, "parent", "child", "join")
    renewed = await jobs.renew("a", [child.id for child in running], LEASE_SECONDS)
    assert [answer.cancel_requested for answer in renewed.values()] == [True, True]
    assert (await jobs.get("default", "parent")).cancel_requested_at is not None


async def test_an_available_job_is_ended_only_if_nobody_has_taken_it(jobs: JobStore) -> None:
    (job_id,) = await insert(jobs, noop())
    seen = await jobs.get("default", job_id)
    (held,) = await lease(jobs)
    verdict = Verdict(JobState.CANCELLED, jobs.now(), error=("job_cancelled", "x"))
    async with jobs.database.begin() as transaction:
        assert not await jobs.end_available(transaction, seen, verdict)
    await settle(jobs, held, Verdict(JobState.AVAILABLE, jobs.now()))
    seen = await jobs.get("default", job_id)
    async with jobs.database.begin() as transaction:
        assert await jobs.end_available(transaction, seen, verdict)
    assert (await jobs.get("default", job_id)).state is JobState.CANCELLED


async def test_a_finished_job_is_revived_but_not_one_that_ended_well(jobs: JobStore) -> None:
    await insert(jobs, noop(id="bad"), noop(id="good"))
    for held in await lease(jobs, 2):
        state = JobState.FAILED if held.id == "bad" else JobState.COMPLETED
        error = ("internal_error", "x") if held.id == "bad" else None
        await settle(jobs, held, Verdict(state, jobs.now(), error=error, counts_as_failure=True))
    async with jobs.database.begin() as transaction:
        assert await jobs.revive(transaction, await jobs.get("default", "bad"))
        assert not await jobs.revive(transaction, await jobs.get("default", "good"))
    (held,) = await lease(jobs, 5)
    assert (held.id, held.attempt, held.job.failures, held.job.error_code) == ("bad", 2, 0, None)


async def test_pages_have_every_job_once(jobs: JobStore, clock: FakeClock) -> None:
    ids = []
    for number in range(9):
        ids += await insert(jobs, NewJob("even" if number % 2 == 0 else "odd", "default"))
        clock.advance(number % 3)
    seen: list[str] = []
    while page := await jobs.list("default", after=seen[-1] if seen else None, limit=4):
        seen += [job.id for job in page]
    assert sorted(seen) == sorted(ids)
    assert len(await jobs.list("default", kinds=["odd"])) == 4
    assert await jobs.list("default", states=[JobState.RUNNING]) == []
    with pytest.raises(NotFound):
        await jobs.list("default", after="job_none")


async def test_the_place_in_the_queue(jobs: JobStore, clock: FakeClock) -> None:
    ids = []
    for _ in range(3):
        ids += await insert(jobs, noop())
        clock.advance(1)
    await insert(jobs, noop(id="urgent", priority=-1), NewJob("other", "default", priority=-5))
    assert [await jobs.ahead(await jobs.get("default", each)) for each in ("urgent", *ids)] == [0, 1, 2, 3]
    assert await jobs.live("default", "noop") == 4
    assert await jobs.counts() == {("noop", JobState.AVAILABLE): 4, ("other", JobState.AVAILABLE): 1}


async def test_unwanted_and_stuck_jobs_are_found(jobs: JobStore, clock: FakeClock) -> None:
    await insert(jobs, noop(id="late", deadline_at=jobs.now() + 5), noop(id="early"))
    assert await jobs.unwanted(["noop"], 10) == []
    clock.advance(5)
    assert [job.id for job in await jobs.unwanted(["noop"], 10)] == ["late"]
    await lease(jobs, 2)
    assert await jobs.unwanted(["noop"], 10) == [], "whoever runs it ends it"
    (again,) = await insert(jobs, NewJob("again", "default"))
    (held,) = await lease(jobs, kind="again")
    async with jobs.database.begin() as transaction:
        await jobs.request_cancel(transaction, again)
    assert await jobs.unwanted(["again"], 10) == []
    await settle(jobs, held, Verdict(JobState.AVAILABLE, jobs.now() + 3600))
    assert [job.id for job in await jobs.unwanted(["noop", "again"], 10)] == [again]
    assert await jobs.stuck(60) == 0
    clock.advance(61)
    assert await jobs.stuck(60) == 2


async def test_pruning_removes_what_is_old_and_all_that_hangs_on_it(jobs: JobStore, clock: FakeClock) -> None:
    await insert(jobs, noop(id="old"), noop(id="parent"), NewJob("child", "default", id="child", parent_id="parent"))
    (child,) = await jobs.lease({"child": 1}, "a", LEASE_SECONDS)
    await settle(jobs, child, done(jobs))
    (held,) = await lease(jobs)
    assert held.id == "old"
    async with jobs.database.begin() as transaction:
        for number in range(9):
            await jobs.note(transaction, "old", "job.tested", f"line {number}")
    assert [line["detail"] for line in await jobs.log("old")] == [f"line {number}" for number in range(4, 9)]
    await settle(jobs, held, done(jobs))
    clock.advance(100)
    assert await jobs.prune(jobs.now() - 101, 10) == 0
    assert await jobs.prune(jobs.now() - 1, 10) == 1, "the child of a live parent stays"
    assert await jobs.log("old") == []
    with pytest.raises(NotFound):
        await jobs.get("default", "old")
    assert (await jobs.get("default", "child")).finished


async def test_a_rolled_back_job_was_never_there(jobs: JobStore) -> None:
    with pytest.raises(RuntimeError):
        async with jobs.database.begin() as transaction:
            await jobs.insert(transaction, [noop()])
            raise RuntimeError
    assert await lease(jobs) == []


async def test_news_wakes_who_listens(jobs: JobStore) -> None:
    with jobs.database.listen("jobs") as news:
        await insert(jobs, noop())
        async with asyncio.timeout(5):
            await news.wait()


async def test_the_lines_before_a_job_and_the_rate_of_its_model(jobs: JobStore) -> None:
    await insert(jobs, noop(id="a", model="m", total=10), noop(id="b", model="n", total=5))
    await insert(jobs, noop(id="c", model="m", total=7), noop(id="d", model="m", total=1, priority=-1))
    async with jobs.database.begin() as transaction:
        await jobs.count(transaction, "a", completed=2, failed=1)
        await transaction.execute(sa.insert(line_rates).values(model="m", lines_per_second=2.5, updated_at=0))
    found = {name: await jobs.lines_ahead(await jobs.get("default", name)) for name in "abcd"}
    assert found == {"a": 1, "b": 0, "c": 8, "d": 0}
    (held,) = await lease(jobs)
    assert held.id == "d"
    await settle(jobs, held, done(jobs))
    assert await jobs.lines_ahead(await jobs.get("default", "c")) == 7
    assert [await jobs.line_rate(model) for model in "mn"] == [2.5, None]


async def test_a_finished_job_is_deleted_with_its_children(jobs: JobStore) -> None:
    (parent,) = await insert(jobs, noop())
    await insert(jobs, NewJob("chunk", "default", id="chunk", parent_id=parent))
    await insert(jobs, NewJob("webhook", "default", id="webhook", parent_id=parent))
    job = await jobs.get("default", parent)
    assert not await jobs.delete(job, "chunk")
    (held,) = await lease(jobs)
    assert not await jobs.delete(job, "chunk")
    async with jobs.database.begin() as transaction:
        await jobs.note(transaction, parent, "job.noted")
    await settle(jobs, held, done(jobs))
    assert await jobs.delete(job, "chunk")
    assert not await jobs.delete(job, "chunk")
    assert [left.id for left in await jobs.list("default")] == ["webhook"]
    assert await jobs.log(parent) == []


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
async def test_a_lost_job_that_is_locked_does_not_hold_up_the_rescue_of_others(
    jobs: JobStore, clock: FakeClock
) -> None:
    await insert(jobs, noop(), noop(), noop())
    leases = [*await lease(jobs), *await lease(jobs), *await lease(jobs)]
    clock.advance(LEASE_SECONDS + 1)
    lost = await jobs.lost(10)
    async with jobs.database.begin() as holder:
        await jobs.lock(holder, leases[0].id)
        async with jobs.database.begin() as transaction:
            assert await jobs.take_back(transaction, lost) == 2
    async with jobs.database.begin() as transaction:
        assert await jobs.take_back(transaction, lost) == 1


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
@pytest.mark.parametrize("what", ["renew", "cancel", "end_available", "prune", "delete"])
@pytest.mark.parametrize("names", ["ab", "ba"])  # the order in which they lie on the disk
async def test_many_rows_are_locked_in_one_order(jobs: JobStore, clock: FakeClock, what: str, names: str) -> None:
    """Who waits for the second row holds the first one, so that no two can wait for each other."""
    await insert(jobs, noop(id="0"))
    parent = await jobs.get("default", "0")
    for each in names:
        await insert(jobs, NewJob("child", "default", id=each, parent_id="0"))
        if what != "end_available":
            (held,) = await lease(jobs, kind="child")
            if what in ("prune", "delete"):
                await settle(jobs, held, done(jobs))
    (held,) = await lease(jobs)
    if what in ("prune", "delete"):
        await settle(jobs, held, done(jobs))
    clock.advance(LEASE_SECONDS + 1)

    async def act() -> None:
        if what == "renew":
            assert len(await jobs.renew("a", ["a", "b"], LEASE_SECONDS)) == 2
        elif what == "prune":
            assert await jobs.prune(jobs.now(), 10) == 3
        elif what == "delete":
            assert await jobs.delete(parent, "child")
        else:
            async with jobs.database.begin() as transaction:
                if what == "cancel":
                    await jobs.request_cancel(transaction, "0", children_of="0")
                else:
                    assert await jobs.end_available_children(transaction, "0", "child", JobState.CANCELLED) == 2

    async def waits() -> bool:
        query = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        async with jobs.database.read() as connection:
            return bool(await connection.scalar(query))

    async with jobs.database.begin() as other:
        await jobs.lock(other, "b")
        acting = asyncio.create_task(act())
        await eventually(waits, what="a wait for the second row")
        async with jobs.database.begin() as third:
            query = sa.select(jobs_table.c.id).where(jobs_table.c.id == "a").with_for_update(skip_locked=True)
            assert (await third.execute(query)).one_or_none() is None, "the first row is held by now"
    await acting

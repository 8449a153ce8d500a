"""One suite for webhook endpoints, events and deliveries, over SQLite and PostgreSQL."""

import asyncio
import base64
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from forebay.config import WebhookSettings
from forebay.errors import Conflict, InvalidRequest, NotFound
from forebay.store.database import Database
from forebay.store.job_records import NewJob, Verdict
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from forebay.store.keys import KeyStore
from forebay.store.webhooks import Delivery, DeliveryAttempt, Endpoint, NewEvent, WebhookStore
from tests.support.clock import FakeClock

SETTINGS = WebhookSettings(endpoints_max=3, secret_overlap_seconds=60)
HOOK = "https://hooks.example/a"


@pytest.fixture
def hooks(database: Database, clock: FakeClock) -> WebhookStore:
    return WebhookStore(database, clock, SETTINGS)


@pytest.fixture
async def project(database: Database, clock: FakeClock) -> str:
    return (await KeyStore(database, clock).get_or_create_project("mine")).id


@pytest.fixture
async def other(database: Database, clock: FakeClock) -> str:
    return (await KeyStore(database, clock).get_or_create_project("other")).id


@pytest.fixture
async def job(database: Database, clock: FakeClock, project: str) -> str:
    async with database.begin() as transaction:
        [job] = await JobStore(database, clock).insert(transaction, [NewJob("batch", project)])
    return job


async def make(hooks: WebhookStore, project: str, url: str = HOOK, events: Sequence[str] = ()) -> Endpoint:
    async with hooks.database.begin() as transaction:
        return await hooks.create_endpoint(transaction, project, url=url, events=events, description="mine")


async def rotate(hooks: WebhookStore, project: str, endpoint_id: str) -> Endpoint:
    async with hooks.database.begin() as transaction:
        return await hooks.rotate(transaction, project, endpoint_id)


async def send_test(hooks: WebhookStore, project: str, endpoint_id: str) -> Delivery:
    async with hooks.database.begin() as transaction:
        return await hooks.send_test(transaction, project, endpoint_id)


async def replay(hooks: WebhookStore, project: str, delivery_id: str) -> Delivery:
    async with hooks.database.begin() as transaction:
        return await hooks.replay(transaction, project, delivery_id)


async def enqueue(
    hooks: WebhookStore, project: str, job: str, event_type: str = "batch.completed", url: str | None = None
) -> list[str]:
    async with hooks.database.begin() as transaction:
        secret = None if url is None else "whsec_x"
        return await hooks.enqueue(transaction, [NewEvent(event_type, job, job, project, url, secret)])


async def test_an_endpoint_is_found_changed_and_deleted(
    hooks: WebhookStore, clock: FakeClock, project: str, other: str
) -> None:
    made = await make(hooks, project, HOOK, ["batch.failed"])
    assert await hooks.get_endpoint(project, made.id) == made
    assert (made.url, made.events, made.description, made.created_at) == (HOOK, ["batch.failed"], "mine", clock.now())
    assert len(base64.b64decode(made.secret.removeprefix("whsec_"), validate=True)) == 32
    assert made.secret not in repr(made)

    clock.advance(1)
    changed = await hooks.update_endpoint(project, made.id, url=HOOK + "2", events=[], description="")
    assert changed == replace(made, url=HOOK + "2", events=[], description="")
    assert await hooks.update_endpoint(project, made.id) == changed
    disabled = await hooks.update_endpoint(project, made.id, enabled=False)
    assert (disabled.disabled_at, bool(disabled.disabled_reason)) == (clock.now(), True)
    assert await hooks.update_endpoint(project, made.id, enabled=True) == changed

    second = await make(hooks, project, HOOK)
    assert await hooks.list_endpoints(project) == [changed, second]
    assert await hooks.list_endpoints(other) == []
    await hooks.delete_endpoint(project, made.id)
    assert await hooks.list_endpoints(project) == [second]
    with pytest.raises(NotFound):
        await hooks.get_endpoint(project, made.id)


async def test_an_endpoint_of_another_project_is_not_there(hooks: WebhookStore, project: str, other: str) -> None:
    made = await make(hooks, project, HOOK)
    sent = await send_test(hooks, project, made.id)
    for attempt in (
        hooks.get_endpoint(other, made.id),
        hooks.update_endpoint(other, made.id, enabled=False),
        rotate(hooks, other, made.id),
        hooks.delete_endpoint(other, made.id),
        send_test(hooks, other, made.id),
        hooks.list_deliveries(other, made.id),
        replay(hooks, other, sent.id),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert await hooks.get_endpoint(project, made.id) == made


async def test_the_number_of_endpoints_is_bounded_also_at_once(hooks: WebhookStore, project: str) -> None:
    made = await asyncio.gather(
        *(make(hooks, project, f"{HOOK}{number}") for number in range(10)), return_exceptions=True
    )
    assert sum(isinstance(each, Endpoint) for each in made) == 3
    refused = [each for each in made if not isinstance(each, Endpoint)]
    assert all(isinstance(each, InvalidRequest) and each.code == "too_many_webhooks" for each in refused)


async def test_an_old_secret_signs_on_for_a_while(hooks: WebhookStore, clock: FakeClock, project: str) -> None:
    made = await make(hooks, project, HOOK)
    assert made.secrets(clock.now()) == [made.secret]
    rotated = await rotate(hooks, project, made.id)
    assert rotated.secret != made.secret
    clock.advance(59)
    assert rotated.secrets(clock.now()) == [rotated.secret, made.secret]
    clock.advance(1)
    assert rotated.secrets(clock.now()) == [rotated.secret]
    again = await rotate(hooks, project, made.id)
    assert again.secrets(clock.now()) == [again.secret, rotated.secret]


async def test_without_an_overlap_the_old_secret_ends_at_once(
    database: Database, clock: FakeClock, project: str
) -> None:
    hooks = WebhookStore(database, clock, WebhookSettings(secret_overlap_seconds=0))
    made = await make(hooks, project, HOOK)
    rotated = await rotate(hooks, project, made.id)
    assert rotated.secrets(clock.now()) == [rotated.secret]


async def test_an_event_goes_to_whoever_wants_it(
    hooks: WebhookStore, database: Database, clock: FakeClock, project: str, other: str, job: str
) -> None:
    every = await make(hooks, project, f"{HOOK}/every")
    failures = await make(hooks, project, f"{HOOK}/failures", ["batch.failed"])
    disabled = await make(hooks, project, f"{HOOK}/disabled")
    await hooks.update_endpoint(project, disabled.id, enabled=False)
    await make(hooks, other, f"{HOOK}/other")

    first, own = await enqueue(hooks, project, job, "batch.completed", url="https://own.example/")
    delivery, endpoint = await hooks.to_send(first)
    assert endpoint == every
    assert (delivery.endpoint_id, delivery.parent_id, delivery.state) == (every.id, job, JobState.AVAILABLE)
    assert json.loads(delivery.body) == {
        "id": delivery.event_id,
        "object": "event",
        "created_at": int(clock.now()),
        "type": "batch.completed",
        "data": {"id": job},
    }
    assert delivery.event_id.startswith("evt_")
    to_own, nobody = await hooks.to_send(own)
    assert nobody is None
    assert (to_own.endpoint_id, to_own.url, to_own.secret) == (None, "https://own.example/", "whsec_x")
    assert (to_own.event_id, to_own.body) == (delivery.event_id, delivery.body)

    sent = await enqueue(hooks, project, job, "batch.failed")
    assert {(await hooks.to_send(each))[0].endpoint_id for each in sent} == {every.id, failures.id}
    kept = await JobStore(database, clock).get(project, first)
    assert (kept.kind, kept.parent_id, kept.state) == ("webhook", job, JobState.AVAILABLE)


async def test_nobody_to_tell_makes_no_job(
    hooks: WebhookStore, database: Database, clock: FakeClock, project: str, job: str
) -> None:
    assert await enqueue(hooks, project, job) == []
    assert await JobStore(database, clock).list(project, kinds=["webhook"]) == []


async def test_an_event_is_enqueued_with_what_it_tells_or_not_at_all(
    hooks: WebhookStore, database: Database, clock: FakeClock, project: str, job: str
) -> None:
    endpoint = await make(hooks, project, HOOK)
    with pytest.raises(NotFound):
        async with database.begin() as transaction:
            await hooks.enqueue(transaction, [NewEvent("batch.failed", job, job, project)])
            raise NotFound
    assert await hooks.list_deliveries(project, endpoint.id) == []
    assert await JobStore(database, clock).list(project, kinds=["webhook"]) == []


async def test_workers_hear_of_a_delivery(hooks: WebhookStore, database: Database, project: str, job: str) -> None:
    await make(hooks, project, HOOK)
    with database.listen("jobs") as news:
        await enqueue(hooks, project, job)
        await asyncio.wait_for(news.wait(), 5)


async def test_deliveries_are_listed_by_pages_with_their_attempts(
    hooks: WebhookStore, database: Database, clock: FakeClock, project: str, job: str
) -> None:
    endpoint = await make(hooks, project, HOOK)
    sent = []
    for _ in range(5):
        clock.advance(1)
        sent += await enqueue(hooks, project, job)
    failed = DeliveryAttempt(1, clock.now(), 0.5, None, "It did not answer.")
    worked = DeliveryAttempt(2, clock.now() + 5, 0.25, 204, None)
    async with database.begin() as transaction:
        await hooks.log_attempt(transaction, sent[4], failed)
        await hooks.log_attempt(transaction, sent[4], worked)
    page = await hooks.list_deliveries(project, endpoint.id, limit=2)
    assert [each.id for each in page] == [sent[4], sent[3]]
    assert (page[0].attempts, page[1].attempts) == ([failed, worked], [])
    rest = await hooks.list_deliveries(project, endpoint.id, after=sent[3])
    assert [each.id for each in rest] == [sent[2], sent[1], sent[0]]
    with pytest.raises(NotFound):
        await hooks.list_deliveries(project, endpoint.id, after="whd_none")


async def test_the_log_of_attempts_is_bounded(
    hooks: WebhookStore, database: Database, clock: FakeClock, project: str, job: str
) -> None:
    await make(hooks, project, HOOK)
    [sent] = await enqueue(hooks, project, job)
    async with database.begin() as transaction:
        for number in range(1, 61):
            await hooks.log_attempt(transaction, sent, DeliveryAttempt(number, clock.now(), 0.1, 500, "x" * 1000))
    attempts = (await hooks.to_send(sent))[0].attempts
    assert [attempt.number for attempt in attempts] == list(range(11, 61))
    assert len(attempts[0].error or "") == 256


async def test_a_replay_is_the_same_event_once_more(
    hooks: WebhookStore, clock: FakeClock, project: str, job: str
) -> None:
    endpoint = await make(hooks, project, HOOK)
    first, own = await enqueue(hooks, project, job, url="https://own.example/")
    await hooks.update_endpoint(project, endpoint.id, url=f"{HOOK}/moved")
    clock.advance(10)
    for old in (first, own):
        before = (await hooks.to_send(old))[0]
        again = await replay(hooks, project, old)
        assert again.id != old
        assert (again.event_id, again.body, again.parent_id) == (before.event_id, before.body, job)
        assert (again.secret, again.created_at, again.attempts) == (before.secret, clock.now(), [])
    assert [each.url for each in await hooks.list_deliveries(project, endpoint.id)] == [f"{HOOK}/moved", HOOK]

    await hooks.update_endpoint(project, endpoint.id, enabled=False)
    for attempt in (replay(hooks, project, first), send_test(hooks, project, endpoint.id)):
        with pytest.raises(Conflict, match="disabled"):
            await attempt
    await hooks.delete_endpoint(project, endpoint.id)
    with pytest.raises(Conflict, match="deleted"):
        await replay(hooks, project, first)


async def test_a_test_event_needs_no_subscription(hooks: WebhookStore, project: str) -> None:
    endpoint = await make(hooks, project, HOOK, ["batch.failed"])
    sent = await send_test(hooks, project, endpoint.id)
    assert (sent.event_type, sent.parent_id) == ("webhook.test", None)
    assert json.loads(sent.body)["data"] == {"id": endpoint.id}


async def test_disabling_says_why_and_only_once(
    hooks: WebhookStore, database: Database, clock: FakeClock, project: str
) -> None:
    endpoint = await make(hooks, project, HOOK)
    for reason in ("first", "second"):
        async with database.begin() as transaction:
            await hooks.disable(transaction, endpoint.id, reason)
        clock.advance(1)
    found = await hooks.get_endpoint(project, endpoint.id)
    assert (found.disabled_at, found.disabled_reason) == (clock.now() - 2, "first")


async def test_what_is_pruned_takes_its_deliveries_along(
    hooks: WebhookStore, database: Database, clock: FakeClock, project: str, job: str
) -> None:
    endpoint = await make(hooks, project, HOOK)
    await enqueue(hooks, project, job)
    store = JobStore(database, clock)
    [lease] = await store.lease({"webhook": 1}, "node", 15)
    async with database.begin() as transaction:
        await hooks.log_attempt(transaction, lease.id, DeliveryAttempt(1, clock.now(), 0.1, 200, None))
        await store.settle_completed(transaction, [lease])
    async with database.begin() as transaction:
        await store.end_available(transaction, await store.get(project, job), Verdict(JobState.CANCELLED, clock.now()))
    assert await store.prune(clock.now() + 1, 10) == 2
    assert await hooks.list_deliveries(project, endpoint.id) == []

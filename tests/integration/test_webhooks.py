"""Deliveries from the event to the receiver: signatures, the schedule, what ends it, and what is written down."""

import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import openai
import pytest
from openai.types.webhooks import BatchCompletedWebhookEvent
from standardwebhooks import Webhook, WebhookVerificationError

from forebay.config import OutboundSettings, Settings, WebhookSettings
from forebay.errors import InvalidRequest
from forebay.jobs.executor import Executor
from forebay.jobs.kinds import Run
from forebay.jobs.settlement import Settlement
from forebay.jobs.webhook import DELAYS_SECONDS, webhook_kind
from forebay.outbound import Outbound
from forebay.store.database import Database
from forebay.store.dead_letters import DeadLetterStore
from forebay.store.job_records import Job, NewJob
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from forebay.store.keys import DEFAULT_PROJECT, KeyStore
from forebay.store.webhooks import Delivery, Endpoint, NewEvent, WebhookStore, new_secret
from forebay.telemetry import Metrics
from tests.support.clock import FakeClock
from tests.support.hostile_urls import hostile_urls
from tests.support.receiver import Answer, Canary, Received, Receiver, canary, receiving

HOUR = 3600


@dataclass
class Post:
    """The rooms between an event and its receiver, on a clock that stands still."""

    clock: FakeClock
    database: Database
    jobs: JobStore
    hooks: WebhookStore
    letters: DeadLetterStore
    outbound: Outbound
    settings: Settings

    async def endpoint(self, url: str, *events: str) -> Endpoint:
        async with self.database.begin() as transaction:
            return await self.hooks.create_endpoint(transaction, DEFAULT_PROJECT, url=url, events=events)

    async def tell(self, url: str | None = None, secret: str | None = None) -> list[str]:
        """A batch ends: what `Settlement` does then."""
        async with self.database.begin() as transaction:
            [job] = await self.jobs.insert(transaction, [NewJob("batch", DEFAULT_PROJECT, id="batch_1")])
            return await self.hooks.enqueue(
                transaction, [NewEvent("batch.completed", job, job, DEFAULT_PROJECT, url, secret)]
            )

    async def work(self) -> int:
        """Make one attempt at every delivery that is due; how many there were."""
        kind = webhook_kind(self.hooks, self.outbound, self.settings, self.clock)
        settlement = Settlement(self.jobs, self.hooks, self.letters, {kind.name: kind})
        executor = Executor(self.jobs, settlement, self.clock, Metrics())
        leases = await self.jobs.lease({kind.name: kind.at_once}, "node", 15)
        for lease in leases:
            await executor.execute(kind, Run(lease))
        return len(leases)

    async def job(self, delivery_id: str) -> Job:
        return await self.jobs.get(DEFAULT_PROJECT, delivery_id)

    async def delivery(self, delivery_id: str) -> Delivery:
        return (await self.hooks.to_send(delivery_id))[0]


@pytest.fixture
async def post(tmp_path: Path) -> AsyncIterator[Post]:
    settings = Settings(
        data_dir=tmp_path / "data",
        outbound=OutboundSettings(allowed_networks=("127.0.0.2/32",)),
        webhooks=WebhookSettings(secret_overlap_seconds=HOUR, timeout_seconds=5),
    )
    clock = FakeClock(now=time.time())
    database = await Database.open(settings)
    await KeyStore(database, clock).get_or_create_project(DEFAULT_PROJECT)
    outbound = Outbound(settings.outbound, clock)
    hooks = WebhookStore(database, clock, settings.webhooks)
    jobs, letters = JobStore(database, clock), DeadLetterStore(database, clock)
    yield Post(clock, database, jobs, hooks, letters, outbound, settings)
    await outbound.close()
    await database.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving("127.0.0.2") as one:
        yield one


def unwrap(request: Received, secret: str) -> object:
    """What the official client makes of a request."""
    return openai.OpenAI(api_key="none").webhooks.unwrap(request.body, request.headers, secret=secret)


async def test_an_event_arrives_signed_as_the_official_client_wants_it(post: Post, receiver: Receiver) -> None:
    endpoint = await post.endpoint(f"{receiver.url}/hook?x=1")
    [sent] = await post.tell()
    assert await post.work() == 1
    [request] = receiver.received
    assert request.path == "/hook?x=1"
    assert request.headers["content-type"] == "application/json"
    assert len(request.body) < 20_000
    event = unwrap(request, endpoint.secret)
    assert isinstance(event, BatchCompletedWebhookEvent)
    assert (event.data.id, event.object, event.created_at) == ("batch_1", "event", int(post.clock.now()))
    assert event.id == request.headers["webhook-id"]
    assert Webhook(endpoint.secret).verify(request.body, request.headers) == request.event
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrap(request, new_secret())
    with pytest.raises(WebhookVerificationError):
        Webhook(endpoint.secret).verify(request.body + b" ", request.headers)

    assert (await post.job(sent)).state is JobState.COMPLETED
    [attempt] = (await post.delivery(sent)).attempts
    assert (attempt.number, attempt.at, attempt.status, attempt.error) == (1, post.clock.now(), 200, None)


async def test_during_a_rotation_both_secrets_verify(post: Post, receiver: Receiver) -> None:
    old = await post.endpoint(receiver.url)
    async with post.database.begin() as transaction:
        new = await post.hooks.rotate(transaction, DEFAULT_PROJECT, old.id)
    await post.tell()
    await post.work()
    assert receiver.received[0].headers["webhook-signature"].count("v1,") == 2
    for secret in (old.secret, new.secret):
        assert isinstance(unwrap(receiver.received[0], secret), BatchCompletedWebhookEvent)
        Webhook(secret).verify(receiver.received[0].body, receiver.received[0].headers)

    post.clock.advance(HOUR)
    async with post.database.begin() as transaction:
        await post.hooks.send_test(transaction, DEFAULT_PROJECT, old.id)
    await post.work()
    request = receiver.received[1]
    at = datetime.fromtimestamp(int(request.headers["webhook-timestamp"]), UTC)
    signature = Webhook(new.secret).sign(request.headers["webhook-id"], at, request.body.decode())
    assert request.headers["webhook-signature"] == signature


async def test_the_url_of_a_single_job(post: Post, receiver: Receiver) -> None:
    secret = new_secret()
    [signed] = await post.tell(f"{receiver.url}/own", secret)
    await post.work()
    assert isinstance(unwrap(receiver.received[0], secret), BatchCompletedWebhookEvent)
    assert (await post.job(signed)).state is JobState.COMPLETED


async def test_the_url_of_a_single_job_without_a_secret_is_told_unsigned(post: Post, receiver: Receiver) -> None:
    await post.tell(receiver.url)
    await post.work()
    assert "webhook-signature" not in receiver.received[0].headers
    assert receiver.received[0].headers["webhook-id"] == receiver.received[0].event["id"]


async def test_the_whole_schedule_and_then_a_dead_letter(post: Post, receiver: Receiver) -> None:
    receiver.then = Answer(500)
    endpoint = await post.endpoint(receiver.url)
    [sent] = await post.tell()
    began, at = post.clock.now(), []
    for _ in range(20):
        job = await post.job(sent)
        if job.finished:
            break
        wait = job.run_at - post.clock.now()
        if wait > 0:
            post.clock.advance(wait - 1)
            assert await post.work() == 0  # not before its time
            post.clock.advance(1)
        at.append(post.clock.now() - began)
        assert await post.work() == 1
    waits = [after - before for before, after in itertools.pairwise(at)]
    assert len(at) == 10
    assert at[0] == 0
    assert waits == pytest.approx([wait * 1.05 for wait in DELAYS_SECONDS])  # the fake clock's jitter is the longest

    job = await post.job(sent)
    assert (job.state, job.error_code) == (JobState.FAILED, "webhook_refused")
    [letter] = await post.letters.list(DEFAULT_PROJECT)
    assert (letter.kind, letter.job_id, letter.error_code) == ("webhook", sent, "webhook_refused")
    assert len(letter.attempts) == 10
    attempts = (await post.delivery(sent)).attempts
    assert [attempt.status for attempt in attempts] == [500] * 10
    assert [attempt.number for attempt in attempts] == list(range(1, 11))

    assert len({request.headers["webhook-id"] for request in receiver.received}) == 1
    assert len({request.body for request in receiver.received}) == 1
    for request, offset in zip(receiver.received, at, strict=True):
        assert int(request.headers["webhook-timestamp"]) == int(began + offset)
        when = datetime.fromtimestamp(int(began + offset), UTC)
        expected = Webhook(endpoint.secret).sign(request.headers["webhook-id"], when, request.body.decode())
        assert request.headers["webhook-signature"] == expected


async def test_it_stops_at_the_first_success(post: Post, receiver: Receiver) -> None:
    receiver.answers.extend([Answer(500), Answer(drop=True), Answer(404), Answer(204, body=b"")])
    await post.endpoint(receiver.url)
    [sent] = await post.tell()
    for _ in range(4):
        assert await post.work() == 1
        post.clock.advance(24 * HOUR)
    assert (await post.job(sent)).state is JobState.COMPLETED
    attempts = (await post.delivery(sent)).attempts
    assert [attempt.status for attempt in attempts] == [500, None, 404, 204]
    assert [bool(attempt.error) for attempt in attempts] == [True, True, True, False]
    assert await post.work() == 0


@pytest.mark.parametrize("status", [201, 204, 299])
async def test_every_2xx_is_success(post: Post, receiver: Receiver, status: int) -> None:
    receiver.then = Answer(status)
    await post.endpoint(receiver.url)
    [sent] = await post.tell()
    await post.work()
    assert (await post.job(sent)).state is JobState.COMPLETED


@pytest.mark.parametrize("status", [301, 303, 304, 307, 308, 400, 404, 500])
async def test_everything_else_is_failure_and_nothing_is_followed(post: Post, receiver: Receiver, status: int) -> None:
    async with canary() as bird:
        receiver.then = Answer(status, {"location": f"http://127.0.0.1:{bird.port}/", "retry-after": "7200"})
        await post.endpoint(receiver.url)
        [sent] = await post.tell()
        await post.work()
        assert bird.connections == 0
    job = await post.job(sent)
    assert (job.state, job.run_at) == (JobState.AVAILABLE, pytest.approx(post.clock.now() + 5.25))
    assert len(receiver.received) == 1


async def test_410_disables_the_endpoint_and_is_not_tried_again(post: Post, receiver: Receiver) -> None:
    receiver.then = Answer(410)
    endpoint = await post.endpoint(receiver.url)
    [sent] = await post.tell()
    await post.work()
    assert (await post.job(sent)).state is JobState.FAILED
    found = await post.hooks.get_endpoint(DEFAULT_PROJECT, endpoint.id)
    assert found.disabled_at == post.clock.now()
    assert "410" in (found.disabled_reason or "")
    async with post.database.begin() as transaction:
        later = await post.hooks.enqueue(transaction, [NewEvent("batch.failed", "batch_1", "batch_1", DEFAULT_PROJECT)])
    assert later == []


async def test_410_from_the_url_of_a_single_job_ends_it(post: Post, receiver: Receiver) -> None:
    receiver.then = Answer(410)
    [sent] = await post.tell(receiver.url)
    await post.work()
    assert (await post.job(sent)).state is JobState.FAILED


@pytest.mark.parametrize(("status", "wait"), [(429, 120), (502, 120), (503, 120), (504, 120), (500, 5.25)])
async def test_who_is_overloaded_says_when_to_come_back(
    post: Post, receiver: Receiver, status: int, wait: float
) -> None:
    receiver.then = Answer(status, {"retry-after": "120"})
    await post.endpoint(receiver.url)
    [sent] = await post.tell()
    await post.work()
    assert (await post.job(sent)).run_at - post.clock.now() == pytest.approx(wait)


async def test_retry_after_does_not_use_up_the_days(post: Post, receiver: Receiver) -> None:
    """A receiver that always asks for a second would otherwise be given up after ten."""
    receiver.then = Answer(503, {"retry-after": "1"})
    await post.endpoint(receiver.url)
    [sent] = await post.tell()
    for wait in DELAYS_SECONDS[:3]:
        await post.work()
        assert (await post.job(sent)).run_at - post.clock.now() == pytest.approx(wait * 1.05)
        post.clock.advance(wait * 1.05)


async def test_a_deleted_endpoint_gets_nothing_more(post: Post, receiver: Receiver) -> None:
    endpoint = await post.endpoint(receiver.url)
    [sent] = await post.tell()
    await post.hooks.delete_endpoint(DEFAULT_PROJECT, endpoint.id)
    await post.work()
    assert (await post.job(sent)).state is JobState.CANCELLED
    assert receiver.received == []


async def test_a_disabled_endpoint_gets_nothing_until_somebody_asks(post: Post, receiver: Receiver) -> None:
    endpoint = await post.endpoint(receiver.url)
    [sent] = await post.tell()
    await post.hooks.update_endpoint(DEFAULT_PROJECT, endpoint.id, enabled=False)
    await post.work()
    job = await post.job(sent)
    assert (job.state, job.error_code) == (JobState.FAILED, "webhook_disabled")
    assert receiver.received == []
    await post.hooks.update_endpoint(DEFAULT_PROJECT, endpoint.id, enabled=True)
    async with post.database.begin() as transaction:
        await post.hooks.replay(transaction, DEFAULT_PROJECT, sent)
    await post.work()
    assert receiver.received[0].event["data"]["id"] == "batch_1"


async def test_a_retry_goes_to_where_the_endpoint_is_by_then(post: Post, receiver: Receiver) -> None:
    endpoint = await post.endpoint(f"{receiver.url}/old")
    receiver.answers.append(Answer(500))
    await post.tell()
    await post.work()
    await post.hooks.update_endpoint(DEFAULT_PROJECT, endpoint.id, url=f"{receiver.url}/new")
    post.clock.advance(6)
    await post.work()
    assert [request.path for request in receiver.received] == ["/old", "/new"]


async def test_an_answer_without_end_counts_by_its_status(post: Post, receiver: Receiver) -> None:
    receiver.then = Answer(200, endless=True)
    await post.endpoint(receiver.url)
    [sent] = await post.tell()
    await post.work()
    assert (await post.job(sent)).state is JobState.COMPLETED


@pytest.fixture
async def bird() -> AsyncIterator[Canary]:
    async with canary() as one:
        yield one
        assert one.connections == 0


async def test_no_hostile_url_is_called_on_delivery(post: Post, bird: Canary) -> None:
    """Even where registration was passed: the row is as a database could hold it."""

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    post.outbound = Outbound(OutboundSettings(), post.clock, resolve)
    urls = hostile_urls(bird.port)
    sent: list[str] = []
    for url in urls:
        async with post.database.begin() as transaction:
            sent += await post.hooks.enqueue(
                transaction, [NewEvent("batch.completed", "batch_1", "batch_1", DEFAULT_PROJECT, url)]
            )
    while await post.work():
        pass
    for delivery_id, url in zip(sent, urls, strict=True):
        job = await post.job(delivery_id)
        assert (job.state, job.error_code) == (JobState.FAILED, "url_not_allowed"), url
        [attempt] = (await post.delivery(delivery_id)).attempts
        assert attempt.status is None


def test_hostile_urls_are_refused_at_registration_as_far_as_they_can_be_seen() -> None:
    passed = []
    for url in hostile_urls(9):
        try:
            Outbound(OutboundSettings(), FakeClock()).check(url)
        except InvalidRequest as error:
            assert error.code == "url_not_allowed"
        else:
            passed.append(url.removeprefix("http://").removesuffix(":9/"))
    # What is left are names, which a name server may point anywhere: those are judged when they are resolved.
    assert set(passed) == {
        *("loopback.example.com", "127.0.0.1.nip.example", "localtest.example", "rebind.example.net", "metadata"),
        *("metadata.google.internal", "instance-data", "kubernetes.default.svc", "intranet"),
    }

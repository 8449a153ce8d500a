"""Webhooks as rows: endpoints, the deliveries of events to them, and every attempt at a delivery.

It refuses to enqueue an event but inside the transaction of what it tells: both are committed or neither is.
"""

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from forebay.clock import Clock, new_id, random_bytes
from forebay.config import WebhookSettings
from forebay.errors import Conflict, InvalidRequest, NotFound
from forebay.store.database import Database, Transaction
from forebay.store.job_records import NewJob
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from forebay.store.projects import hold_project
from forebay.store.tables import jobs, webhook_attempts, webhook_deliveries, webhook_endpoints

KIND = "webhook"
TEST_EVENT = "webhook.test"
PAGE_SIZE_MAX = 100
SECRET_PREFIX = "whsec_"  # noqa: S105  # what Standard Webhooks puts before a secret, and none itself
_SECRET_BYTES = 32
_ATTEMPTS_KEPT = 50
_ERROR_CHARS_MAX = 256
_BY_OWNER = "Disabled by its owner."

_DELIVERIES = sa.select(webhook_deliveries, jobs.c.state, jobs.c.run_at, jobs.c.parent_id).join(
    jobs, jobs.c.id == webhook_deliveries.c.id
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A receiver of a project's events. No `events` means every one."""

    id: str
    project_id: str
    url: str
    events: list[str]
    description: str
    secret: str = field(repr=False)
    previous_secret: str | None = field(repr=False)
    previous_secret_expires_at: float | None
    created_at: float
    disabled_at: float | None
    disabled_reason: str | None

    def wants(self, event_type: str) -> bool:
        """Whether events of this type are sent to it."""
        return self.disabled_at is None and (not self.events or event_type in self.events)

    def secrets(self, now: float) -> list[str]:
        """The secrets that sign, the newest first."""
        expires_at = self.previous_secret_expires_at
        if self.previous_secret is None or expires_at is None or now >= expires_at:
            return [self.secret]
        return [self.secret, self.previous_secret]


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to be told: to every enabled endpoint of the project that wants its type, and to its own `webhook_url`.

    `parent_id` is the job of which it tells.
    """

    type: str
    object_id: str
    parent_id: str
    project_id: str
    webhook_url: str | None = None
    webhook_secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class DeliveryAttempt:
    """One attempt at a delivery; no status where there was no answer."""

    number: int
    at: float
    duration_seconds: float
    status: int | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event on its way to one receiver: a job of kind `webhook` with the same id.

    No `endpoint_id` means the `webhook_url` of a single job; then `url` and `secret` are all that is known of it.
    """

    id: str
    project_id: str
    endpoint_id: str | None
    url: str
    secret: str | None = field(repr=False)
    event_id: str
    event_type: str
    body: str
    created_at: float
    state: JobState
    run_at: float
    parent_id: str | None
    attempts: list[DeliveryAttempt]


@dataclass(frozen=True, slots=True)
class _NewDelivery:
    """A delivery to be made; `event` and `target` are columns of its row."""

    project_id: str
    parent_id: str | None
    event: Mapping[str, str]
    target: Mapping[str, Any] = field(repr=False)


class WebhookStore:
    """Every statement about webhooks."""

    def __init__(self, database: Database, clock: Clock, settings: WebhookSettings | None = None) -> None:
        self.database = database
        self._clock = clock
        self._settings = settings or WebhookSettings()
        self._jobs = JobStore(database, clock)

    # Endpoints.

    async def create_endpoint(
        self,
        transaction: Transaction,
        project_id: str,
        *,
        url: str,
        events: Sequence[str] = (),
        description: str = "",
    ) -> Endpoint:
        """A new endpoint with a new secret. Raises InvalidRequest when the project has as many as it may."""
        endpoint = Endpoint(
            id=new_id("we"),
            project_id=project_id,
            url=url,
            events=list(events),
            description=description,
            secret=new_secret(),
            previous_secret=None,
            previous_secret_expires_at=None,
            created_at=self._clock.now(),
            disabled_at=None,
            disabled_reason=None,
        )
        row = {column.name: getattr(endpoint, column.name) for column in webhook_endpoints.columns}
        count = sa.select(sa.func.count()).where(webhook_endpoints.c.project_id == project_id)
        await hold_project(transaction, project_id)
        if (await transaction.scalar(count) or 0) >= self._settings.endpoints_max:
            raise InvalidRequest(
                f"A project has at most {self._settings.endpoints_max} webhook endpoints. Delete one first.",
                code="too_many_webhooks",
            )
        await transaction.execute(sa.insert(webhook_endpoints).values(row))
        return endpoint

    async def get_endpoint(self, project_id: str, endpoint_id: str) -> Endpoint:
        """A project's endpoint. Raises NotFound, also for another project's."""
        async with self.database.read() as transaction:
            return await self._owned(transaction, project_id, endpoint_id)

    async def list_endpoints(self, project_id: str) -> list[Endpoint]:
        """Every endpoint of a project, oldest first; there are at most `webhooks.endpoints_max`."""
        async with self.database.read() as transaction:
            return await self._endpoints(transaction, [project_id])

    async def update_endpoint(
        self,
        project_id: str,
        endpoint_id: str,
        *,
        url: str | None = None,
        events: Sequence[str] | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> Endpoint:
        """Change what is given; None leaves a thing as it is. Raises NotFound."""
        given = {"url": url, "events": None if events is None else list(events), "description": description}
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if enabled is not None:
            now = self._clock.now()
            values |= {"disabled_at": None if enabled else now, "disabled_reason": None if enabled else _BY_OWNER}
        async with self.database.begin() as transaction:
            await self._owned(transaction, project_id, endpoint_id)
            if values:
                await self._change(transaction, endpoint_id, values)
            return await self._owned(transaction, project_id, endpoint_id)

    async def delete_endpoint(self, project_id: str, endpoint_id: str) -> None:
        """Forget an endpoint; what is on its way to it is not sent any more. Raises NotFound."""
        mine = sa.and_(webhook_endpoints.c.id == endpoint_id, webhook_endpoints.c.project_id == project_id)
        async with self.database.begin() as transaction:
            if (await transaction.execute(sa.delete(webhook_endpoints).where(mine))).rowcount != 1:
                raise NotFound("There is no such webhook endpoint.")

    async def rotate(self, transaction: Transaction, project_id: str, endpoint_id: str) -> Endpoint:
        """A new secret. The old one signs too for `webhooks.secret_overlap_seconds`. Raises NotFound."""
        overlap = self._settings.secret_overlap_seconds
        endpoint = await self._owned(transaction, project_id, endpoint_id, hold=True)
        values = {
            "secret": new_secret(),
            "previous_secret": endpoint.secret if overlap else None,
            "previous_secret_expires_at": self._clock.now() + overlap if overlap else None,
        }
        await self._change(transaction, endpoint_id, values)
        return await self._owned(transaction, project_id, endpoint_id)

    async def disable(self, transaction: Transaction, endpoint_id: str, reason: str) -> None:
        """Send nothing more to an endpoint until its owner enables it again."""
        enabled = webhook_endpoints.c.disabled_at.is_(None)
        query = sa.update(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id, enabled)
        await transaction.execute(
            query.values(disabled_at=self._clock.now(), disabled_reason=reason[:_ERROR_CHARS_MAX])
        )

    async def _owned(
        self, transaction: Transaction, project_id: str, endpoint_id: str, *, hold: bool = False
    ) -> Endpoint:
        query = sa.select(webhook_endpoints).where(
            webhook_endpoints.c.id == endpoint_id, webhook_endpoints.c.project_id == project_id
        )
        row = (await transaction.execute(query.with_for_update() if hold else query)).one_or_none()
        if row is None:
            raise NotFound("There is no such webhook endpoint.")
        return Endpoint(**row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name

    async def _endpoints(self, transaction: Transaction, project_ids: Collection[str]) -> list[Endpoint]:
        query = sa.select(webhook_endpoints).where(webhook_endpoints.c.project_id.in_(project_ids))
        query = query.order_by(webhook_endpoints.c.created_at, webhook_endpoints.c.id)
        return [Endpoint(**row._mapping) for row in await transaction.execute(query)]  # noqa: SLF001

    async def _change(self, transaction: Transaction, endpoint_id: str, values: Mapping[str, Any]) -> None:
        query = sa.update(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id)
        await transaction.execute(query.values(values))

    # Events and their deliveries.

    async def enqueue(self, transaction: Transaction, events: Sequence[NewEvent]) -> list[str]:
        """Tell of the end of jobs, in the transaction that ends them; the ids of the deliveries."""
        if not events:
            return []
        endpoints = await self._endpoints(transaction, {event.project_id for event in events})
        new: list[_NewDelivery] = []
        for event in events:
            targets: list[dict[str, Any]] = [
                {"endpoint_id": endpoint.id, "url": endpoint.url, "secret": None}
                for endpoint in endpoints
                if endpoint.project_id == event.project_id and endpoint.wants(event.type)
            ]
            if event.webhook_url is not None:
                targets.append({"endpoint_id": None, "url": event.webhook_url, "secret": event.webhook_secret})
            told = self._event(event.type, event.object_id)
            new += [_NewDelivery(event.project_id, event.parent_id, told, target) for target in targets]
        return await self._send(transaction, new)

    async def send_test(self, transaction: Transaction, project_id: str, endpoint_id: str) -> Delivery:
        """Send a `webhook.test` event about the endpoint to it, whatever it subscribes to.

        Raises NotFound, Conflict if it is disabled.
        """
        endpoint = await self._owned(transaction, project_id, endpoint_id)
        target = await self._target(transaction, project_id, endpoint_id, endpoint.url, None)
        event = self._event(TEST_EVENT, endpoint_id)
        [delivery_id] = await self._send(transaction, [_NewDelivery(project_id, None, event, target)])
        return await self._delivery(transaction, delivery_id, project_id)

    async def replay(self, transaction: Transaction, project_id: str, delivery_id: str) -> Delivery:
        """Deliver the same event once more: a new delivery with the same event id and body.

        Raises NotFound, Conflict if its endpoint is deleted or disabled.
        """
        old = await self._delivery(transaction, delivery_id, project_id)
        target = await self._target(transaction, project_id, old.endpoint_id, old.url, old.secret)
        event = {"event_id": old.event_id, "event_type": old.event_type, "body": old.body}
        [new] = await self._send(transaction, [_NewDelivery(project_id, old.parent_id, event, target)])
        return await self._delivery(transaction, new, project_id)

    async def list_deliveries(
        self, project_id: str, endpoint_id: str, *, after: str | None = None, limit: int = PAGE_SIZE_MAX
    ) -> list[Delivery]:
        """A page of an endpoint's deliveries, newest first: those behind `after`. Raises NotFound."""
        mine = webhook_deliveries.c.endpoint_id == endpoint_id
        async with self.database.read() as transaction:
            await self._owned(transaction, project_id, endpoint_id)
            query = _DELIVERIES.where(mine)
            if after is not None:
                place = await self._delivery(transaction, after, project_id)
                key = sa.tuple_(webhook_deliveries.c.created_at, webhook_deliveries.c.id)
                query = query.where(key < sa.tuple_(place.created_at, place.id))
            order = (webhook_deliveries.c.created_at.desc(), webhook_deliveries.c.id.desc())
            rows = (await transaction.execute(query.order_by(*order).limit(limit))).all()
            attempts = await self._attempts(transaction, [row.id for row in rows])
        return [_delivery(row, attempts.get(row.id, [])) for row in rows]

    async def to_send(self, delivery_id: str) -> tuple[Delivery, Endpoint | None]:
        """A delivery and the endpoint that it is for, if that is still there. Raises NotFound."""
        async with self.database.read() as transaction:
            delivery = await self._delivery(transaction, delivery_id)
            query = sa.select(webhook_endpoints).where(webhook_endpoints.c.id == delivery.endpoint_id)
            row = (await transaction.execute(query)).one_or_none()
        return delivery, None if row is None else Endpoint(**row._mapping)  # noqa: SLF001

    async def log_attempt(self, transaction: Transaction, delivery_id: str, attempt: DeliveryAttempt) -> None:
        """Keep what came of an attempt; the oldest ones make room."""
        values = {
            "delivery_id": delivery_id,
            "number": attempt.number,
            "at": attempt.at,
            "duration_seconds": attempt.duration_seconds,
            "status": attempt.status,
            "error": None if attempt.error is None else attempt.error[:_ERROR_CHARS_MAX],
        }
        await transaction.execute(sa.insert(webhook_attempts).values(values))
        old = webhook_attempts.c.number <= attempt.number - _ATTEMPTS_KEPT
        await transaction.execute(sa.delete(webhook_attempts).where(webhook_attempts.c.delivery_id == delivery_id, old))

    def _event(self, event_type: str, object_id: str) -> dict[str, str]:
        """A new event. Its body tells which object it is about and nothing else: who may read it has a key."""
        event_id = new_id("evt")
        body = {
            "id": event_id,
            "object": "event",
            "created_at": int(self._clock.now()),
            "type": event_type,
            "data": {"id": object_id},
        }
        return {"event_id": event_id, "event_type": event_type, "body": json.dumps(body, separators=(",", ":"))}

    async def _target(
        self, transaction: Transaction, project_id: str, endpoint_id: str | None, url: str, secret: str | None
    ) -> dict[str, Any]:
        """Where to send something by hand. Raises Conflict unless there is anybody who takes it."""
        if endpoint_id is not None:
            endpoints = {each.id: each for each in await self._endpoints(transaction, [project_id])}
            endpoint = endpoints.get(endpoint_id)
            if endpoint is None:
                raise Conflict("The webhook endpoint of this delivery is deleted.")
            if endpoint.disabled_at is not None:
                raise Conflict("The webhook endpoint is disabled. Enable it first.")
            url = endpoint.url
        return {"endpoint_id": endpoint_id, "url": url, "secret": secret}

    async def _send(self, transaction: Transaction, new: Sequence[_NewDelivery]) -> list[str]:
        jobs_of = [NewJob(KIND, each.project_id, id=new_id("whd"), parent_id=each.parent_id) for each in new]
        ids = await self._jobs.insert(transaction, jobs_of)
        now = self._jobs.now()
        rows = [
            {"id": delivery_id, "project_id": each.project_id, "created_at": now, **each.event, **each.target}
            for delivery_id, each in zip(ids, new, strict=True)
        ]
        if rows:
            await transaction.execute(sa.insert(webhook_deliveries), rows)
        return ids

    async def _delivery(self, transaction: Transaction, delivery_id: str, project_id: str | None = None) -> Delivery:
        query = _DELIVERIES.where(webhook_deliveries.c.id == delivery_id)
        if project_id is not None:
            query = query.where(webhook_deliveries.c.project_id == project_id)
        row = (await transaction.execute(query)).one_or_none()
        if row is None:
            raise NotFound("There is no such webhook delivery.")
        return _delivery(row, (await self._attempts(transaction, [row.id])).get(row.id, []))

    async def _attempts(
        self, transaction: Transaction, delivery_ids: Collection[str]
    ) -> dict[str, list[DeliveryAttempt]]:
        query = sa.select(webhook_attempts).where(webhook_attempts.c.delivery_id.in_(delivery_ids))
        found: dict[str, list[DeliveryAttempt]] = {}
        for row in await transaction.execute(query.order_by(webhook_attempts.c.number)):
            attempt = DeliveryAttempt(row.number, row.at, row.duration_seconds, row.status, row.error)
            found.setdefault(row.delivery_id, []).append(attempt)
        return found


def new_secret() -> str:
    """A secret to sign with, as Standard Webhooks writes it."""
    return SECRET_PREFIX + base64.b64encode(random_bytes(_SECRET_BYTES)).decode("ascii")


def _delivery(row: sa.Row[Any], attempts: list[DeliveryAttempt]) -> Delivery:
    values = dict(row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name
    return Delivery(**values | {"state": JobState(values["state"]), "attempts": attempts})

"""The kind of job that tells a receiver of an event: signed by Standard Webhooks, tried again for three days.

It refuses to follow a redirect, and to take anything but an answer of 2xx for success.
"""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from standardwebhooks import Webhook

from forebay.clock import Clock
from forebay.commit_points import reach
from forebay.config import Settings
from forebay.errors import ForebayError, InvalidRequest, Unreachable
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.outcome import Cancelled, Done, Failed, Outcome
from forebay.outbound import Answer, Outbound
from forebay.store.database import Transaction
from forebay.store.job_records import Lease
from forebay.store.webhooks import KIND, Delivery, DeliveryAttempt, Endpoint, WebhookStore

_MINUTE = 60.0
_HOUR = 3600.0
# The waits between the ten attempts that Standard Webhooks advises: 75 h 35 m in all.
DELAYS_SECONDS = (
    *(5.0, 5 * _MINUTE, 30 * _MINUTE, 2 * _HOUR, 5 * _HOUR),
    *(10 * _HOUR, 14 * _HOUR, 20 * _HOUR, 24 * _HOUR),
)
_JITTER = 0.05  # to either side
_RETRY_AFTER_SECONDS_MAX = 24 * _HOUR
_THROTTLED = frozenset({429, 502, 503, 504})
_GONE = 410


def webhook_delay(failures: int) -> float | None:
    """The wait after so many failed attempts, without jitter; None after the last one."""
    return DELAYS_SECONDS[failures - 1] if failures <= len(DELAYS_SECONDS) else None


def retry_after(answer: Answer, now: float) -> float:
    """How long a receiver that is overloaded asks us to wait, within bounds; 0 where it does not."""
    text = answer.headers.get("retry-after", "").strip() if answer.status in _THROTTLED else ""
    if text.isascii() and text.isdigit():
        return min(float(text), _RETRY_AFTER_SECONDS_MAX)
    try:
        until = parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(0.0, until - now), _RETRY_AFTER_SECONDS_MAX)


def signed(delivery: Delivery, secrets: list[str], now: float) -> dict[str, str]:
    """The headers of a delivery: the event's id, the same at every attempt, the time, a signature by each secret."""
    at = datetime.fromtimestamp(int(now), UTC)
    headers = {
        "content-type": "application/json",
        "webhook-id": delivery.event_id,
        "webhook-timestamp": str(int(now)),
    }
    if secrets:
        signatures = (Webhook(secret).sign(delivery.event_id, at, delivery.body) for secret in secrets)
        headers["webhook-signature"] = " ".join(signatures)
    return headers


class WebhookDelivery:
    """Makes attempts at deliveries."""

    def __init__(self, webhooks: WebhookStore, outbound: Outbound, settings: Settings, clock: Clock) -> None:
        self._webhooks = webhooks
        self._outbound = outbound
        self._settings = settings.webhooks
        self._clock = clock

    async def perform(self, lease: Lease, _run: Run) -> Outcome:
        """One attempt. What came of it is written down in the transaction that settles the job."""
        delivery, endpoint = await self._webhooks.to_send(lease.id)
        if delivery.endpoint_id is not None and endpoint is None:
            return Cancelled()  # its endpoint was deleted
        if endpoint is not None and endpoint.disabled_at is not None:
            disabled = InvalidRequest("The webhook endpoint is disabled.", code="webhook_disabled")
            return Failed(disabled, retryable=False)
        began, at = self._clock.monotonic(), self._clock.now()
        answer, error = await self._send(delivery, endpoint)
        reach("webhook.sent")
        attempt = DeliveryAttempt(
            number=lease.attempt,
            at=at,
            duration_seconds=self._clock.monotonic() - began,
            status=None if answer is None else answer.status,
            error=None if error is None else str(error),
        )
        return self._outcome(lease, delivery, attempt, answer, error)

    async def _send(self, delivery: Delivery, endpoint: Endpoint | None) -> tuple[Answer | None, ForebayError | None]:
        """The answer, if one came, and what is wrong, if anything is."""
        now = self._clock.now()
        own = [delivery.secret] if delivery.secret is not None else []
        headers = signed(delivery, own if endpoint is None else endpoint.secrets(now), now)
        try:
            answer = await self._outbound.post(
                delivery.url if endpoint is None else endpoint.url,
                delivery.body.encode(),
                headers,
                timeout_seconds=self._settings.timeout_seconds,
                bytes_max=self._settings.response_bytes_max,
            )
        except (InvalidRequest, Unreachable) as error:
            return None, error
        return answer, None if 200 <= answer.status < 300 else _refusal(answer)

    def _outcome(
        self,
        lease: Lease,
        delivery: Delivery,
        attempt: DeliveryAttempt,
        answer: Answer | None,
        error: ForebayError | None,
    ) -> Outcome:
        gone = answer is not None and answer.status == _GONE

        async def write(transaction: Transaction) -> None:
            await self._webhooks.log_attempt(transaction, delivery.id, attempt)
            if gone and delivery.endpoint_id is not None:
                await self._webhooks.disable(transaction, delivery.endpoint_id, str(error))

        if error is None:
            return Done(write)
        asked = 0.0 if answer is None else retry_after(answer, self._clock.now())
        return Failed(error, error.retryable and not gone, self._wait(lease, asked), write)

    def _wait(self, lease: Lease, asked_seconds: float) -> float | None:
        """The planned wait with jitter, or longer if the receiver asks for it; never shorter, or the days run out early."""
        planned = webhook_delay(lease.job.failures + 1)
        if planned is None:
            return None
        spread = self._clock.jitter(4 * _JITTER * planned)  # that, or as little as half of it
        return max(planned * (1 - 3 * _JITTER) + spread, asked_seconds)


def _refusal(answer: Answer) -> Unreachable:
    if answer.status == _GONE:
        return Unreachable("The receiver answered 410: it wants nothing more.", code="webhook_gone")
    return Unreachable(f"The receiver answered {answer.status}.", code="webhook_refused")


def webhook_kind(webhooks: WebhookStore, outbound: Outbound, settings: Settings, clock: Clock) -> Kind:
    """The kind, for the list of kinds."""
    delivery = WebhookDelivery(webhooks, outbound, settings, clock)
    return Kind(
        name=KIND,
        perform=delivery.perform,
        at_once=settings.jobs.webhooks_at_once,
        retry=webhook_delay,
        has_dead_letter=True,
        takes_turns=True,  # or one slow receiver with a long queue would be everybody's
    )

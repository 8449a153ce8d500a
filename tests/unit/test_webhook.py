"""The decisions of a webhook delivery: when it is tried again, how it is signed, and which bodies make one."""

import base64
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest

from forebay.dialects.openai.call import parse
from forebay.dialects.openai.webhooks import WebhookBody, WebhookChanges
from forebay.errors import InvalidRequest
from forebay.jobs.webhook import DELAYS_SECONDS, retry_after, webhook_delay
from forebay.outbound import Answer
from forebay.store.webhooks import new_secret

HOUR = 3600
NOW = 1_800_000_000.5


def asked(status: int, text: str | None) -> float:
    headers = {} if text is None else {"retry-after": text}
    return retry_after(Answer(status, headers, b"", whole=True), NOW)


def test_the_schedule_is_that_of_the_specification() -> None:
    waits = [webhook_delay(failures) for failures in range(1, 12)]
    assert waits == [5, 300, 1800, 2 * HOUR, 5 * HOUR, 10 * HOUR, 14 * HOUR, 20 * HOUR, 24 * HOUR, None, None]
    assert sum(DELAYS_SECONDS) == 75 * HOUR + 35 * 60 + 5


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_retry_after_is_honoured_within_bounds(status: int) -> None:
    assert asked(status, "120") == 120
    assert asked(status, " 120 ") == 120
    assert asked(status, "999999999999999999999") == 24 * HOUR
    for text in ("", "soon", "-5", "1.5", "٣", "1e3", "Mon, 99 Foo 2026 25:61:00 GMT", None):
        assert asked(status, text) == 0, text


@pytest.mark.parametrize(("ahead", "wait"), [(600, 600), (-600, 0), (0, 0), (10**8, 24 * HOUR)])
def test_retry_after_may_be_a_date(ahead: int, wait: float) -> None:
    until = datetime.fromtimestamp(int(NOW) + ahead, UTC)
    assert asked(503, format_datetime(until, usegmt=True)) == pytest.approx(wait, abs=1)


@pytest.mark.parametrize("status", [200, 301, 400, 404, 410, 500])
def test_others_do_not_say_when(status: int) -> None:
    assert asked(status, "120") == 0


def test_a_secret_is_as_standard_webhooks_writes_it() -> None:
    made = {new_secret() for _ in range(100)}
    assert len(made) == 100
    for secret in made:
        assert secret.startswith("whsec_")
        assert 24 <= len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) <= 64


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"url": ""}',
        b'{"url": 1}',
        b'{"url": "https://x.example", "events": ["nothing.happened"]}',
        b'{"url": "https://x.example", "events": "batch.completed"}',
        b'{"url": "https://x.example", "secret": "whsec_mine"}',
        b'{"url": "https://x.example", "description": "' + b"x" * 513 + b'"}',
        b'{"url": "https://x.example/' + b"x" * 2048 + b'"}',
        b"[]",
        b"x",
    ],
)
def test_a_body_that_makes_no_endpoint(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(WebhookBody, body)


def test_bodies_that_make_and_change_an_endpoint() -> None:
    made = parse(WebhookBody, b'{"url": "https://x.example", "events": ["batch.failed"]}')
    assert (made.url, made.events, made.description) == ("https://x.example", ("batch.failed",), "")
    assert parse(WebhookChanges, b"{}").model_dump(exclude_none=True) == {}
    assert parse(WebhookChanges, b'{"enabled": false, "events": []}').model_dump(exclude_none=True) == {
        "enabled": False,
        "events": (),
    }

"""Webhooks on the wire: the bodies that make and change endpoints, and the names of events.

It refuses an event that nothing here sends, and a secret that Standard Webhooks would not sign with.
"""

import base64
import binascii
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from forebay.dialects.openai.call import Wire

EventName = Literal["batch.completed", "batch.failed", "batch.expired", "batch.cancelled"]
_PREFIX = "whsec_"
_SECRET_BYTES_MIN, _SECRET_BYTES_MAX = 24, 64


def _is_secret(text: str) -> str:
    """`text` if it is a secret as Standard Webhooks writes it. Raises ValueError."""
    try:
        secret = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        secret = b""
    if not text.startswith(_PREFIX) or not _SECRET_BYTES_MIN <= len(secret) <= _SECRET_BYTES_MAX:
        raise ValueError(f"a secret is `{_PREFIX}` and the base64 of {_SECRET_BYTES_MIN} to {_SECRET_BYTES_MAX} bytes")
    return text


WebhookUrl = Annotated[str, Field(min_length=1, max_length=2048)]
WebhookSecret = Annotated[str, Field(max_length=128), AfterValidator(_is_secret)]
_Events = Annotated[tuple[EventName, ...], Field(max_length=64, fail_fast=True)]
_Description = Annotated[str, Field(max_length=512)]


class WebhookBody(Wire):
    """The body that makes an endpoint. No events means every one."""

    url: WebhookUrl
    events: _Events = ()
    description: _Description = ""


class WebhookChanges(Wire):
    """The body that changes an endpoint; what is absent stays as it is."""

    url: WebhookUrl | None = None
    events: _Events | None = None
    description: _Description | None = None
    enabled: bool | None = None

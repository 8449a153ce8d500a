"""Webhooks on the wire: the bodies that make and change endpoints, and the names of events.

It refuses an event that nothing here sends.
"""

from typing import Annotated, Literal

from pydantic import Field

from forebay.dialects.openai.call import Wire

EventName = Literal[
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "response.completed",
    "response.incomplete",
    "response.failed",
    "response.cancelled",
    "transcription.completed",
    "transcription.failed",
    "transcription.expired",
    "transcription.cancelled",
    "image.completed",
    "image.failed",
    "image.expired",
    "image.cancelled",
]
WebhookUrl = Annotated[str, Field(min_length=1, max_length=2048)]
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

"""JSON answers and error answers, and the bounded reading of a request body.

It refuses to put anything into an error but its own sentence.
"""

import math
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from forebay.dialects.answer import Shape
from forebay.dialects.anthropic import errors as anthropic_errors
from forebay.dialects.anthropic.events import Messages
from forebay.dialects.anthropic.messages import PATH as MESSAGES_PATH
from forebay.dialects.openai.events import GENERATION
from forebay.errors import (
    ForebayError,
    ModelTooLarge,
    PayloadTooLarge,
    Quarantined,
    QuotaExceeded,
    RequestCancelled,
)

RETRY_AFTER_SECONDS_MAX = 120


def shape_at(path: str, request_id: str) -> Shape:
    """The dialect that is spoken at `path`, for errors before there is a call."""
    return Messages(request_id) if speaks_messages(path) else GENERATION


def speaks_messages(path: str) -> bool:
    """Whether clients of Anthropic's shape ask at `path`."""
    return path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/")


def json_answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as JSON."""
    return Response(to_json(content), status, headers, media_type="application/json")


def error_answer(error: ForebayError, headers: Mapping[str, str] | None = None, shape: Shape = GENERATION) -> Response:
    """`error` in the caller's dialect, with what a client needs to decide whether to try again."""
    fields = dict(headers or {})
    spent = isinstance(error, QuotaExceeded)
    if isinstance(error, QuotaExceeded):
        fields |= error.headers
    final = isinstance(error, Quarantined | ModelTooLarge)
    if error.retry_after_seconds is not None or (error.status in {429, 503} and not (spent or final)):
        seconds = min(RETRY_AFTER_SECONDS_MAX, max(1, math.ceil(error.retry_after_seconds or 1)))
        fields["retry-after"] = str(seconds)
    if final or (spent and "retry-after" not in fields):
        fields["x-should-retry"] = "false"
    if error.status == 401:
        fields["www-authenticate"] = "Bearer"
    status = anthropic_errors.status_of(error) if isinstance(shape, Messages) else error.status
    return json_answer(shape.error_body(error), status, fields)


async def read_body(request: Request, bytes_max: int) -> bytes:
    """The whole body. Raises PayloadTooLarge as soon as it is known to be too large, RequestCancelled if it is cut."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > bytes_max:
        raise PayloadTooLarge(f"The request body is larger than {bytes_max} bytes.")
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > bytes_max:
                raise PayloadTooLarge(f"The request body is larger than {bytes_max} bytes.")
            parts.append(part)
    except ClientDisconnect:
        raise RequestCancelled from None
    return parts[0] if len(parts) == 1 else b"".join(parts)

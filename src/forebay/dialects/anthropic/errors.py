"""Errors in Anthropic's shape: their body, and the status that its clients take for them.

It refuses to tell more than our error itself says.
"""

from typing import Any

from forebay.errors import ForebayError, Overloaded, RateLimited

_OVERLOADED = 529
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    _OVERLOADED: "overloaded_error",
}


def status_of(error: ForebayError) -> int:
    """The status for `error`: a full line is 529, so that it is told from a rate that the caller has used up."""
    full = isinstance(error, Overloaded) and not isinstance(error, RateLimited)
    return _OVERLOADED if full else error.status


def body_of(error: ForebayError, request_id: str) -> dict[str, Any]:
    """The JSON body for `error`. `code` is ours: what docs/api.md lists."""
    status = status_of(error)
    kind = _TYPES.get(status) or ("invalid_request_error" if 400 <= status < 499 else "api_error")
    return {
        "type": "error",
        "error": {"type": kind, "message": str(error), "code": error.code},
        "request_id": request_id,
    }

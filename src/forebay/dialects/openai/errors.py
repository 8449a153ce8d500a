"""Errors on the wire: ours to a body in OpenAI's shape, an engine's to one of ours.

It refuses to pass on paths or addresses that an engine put into its message.
"""

import re
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic_core import from_json

from forebay.errors import (
    EngineCrashed,
    EngineGarbled,
    EngineTimeout,
    EngineUnavailable,
    ForebayError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PayloadTooLarge,
    ServerError,
    Unauthorized,
    UpstreamError,
)

_MESSAGE_CHARS_MAX = 500
_RETRY_AFTER_SECONDS_MAX = 86_400.0
_PATHS = re.compile(r"(?:[A-Za-z]:)?(?:[/\\][\w.@+~-]+){2,}[/\\]?")
_ADDRESSES = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b|0x[0-9a-fA-F]{6,}|\[[0-9a-fA-F:]+\](?::\d+)?")
_MAXIMUM = "maximum context length"
_TOO_LONG_SAID = (_MAXIMUM, "is too large to process")  # the latter of llama.cpp, about embeddings
_OUT_OF_MEMORY = "out_of_memory"
_TOO_LONG = ("exceed_context_size_error", "context_length_exceeded")
_TOO_LARGE = re.compile(r"\((\d{1,9}) tokens\) is too large to process.{0,80}?(\d{1,9})\)")
_FIELDS = frozenset(  # named by engines as callers know them
    {
        *("dimensions", "documents", "input", "query"),
        *("language", "model", "segments", "speakers_min", "suppress_tokens", "vad_offset"),
        *("guidance", "mask", "negative_prompt", "size", "steps", "strength"),
    }
)


def body_of(error: ForebayError) -> dict[str, Any]:
    """The JSON body for `error`."""
    return {"error": {"message": str(error), "type": error.type, "param": error.param, "code": error.code}}


def from_engine(status: int, body: bytes) -> ForebayError:
    """What an engine's HTTP error means for the caller."""
    detail = _detail(body)
    message = sanitise(str(detail.get("message") or ""))
    words = f"{detail.get('type')} {detail.get('code')}"
    if any(word in words for word in _TOO_LONG) or any(said in message for said in _TOO_LONG_SAID):
        return _refusal(detail, _context_message(detail, message), "messages", "context_length_exceeded")
    if status == 413:
        return PayloadTooLarge()
    if status == 429:
        return Overloaded("The engine's own line is full. Try again later.", retry_after_seconds=1.0)
    if status in {400, 404, 422}:
        return _refusal(detail, message or "The engine refused the request.")
    if status in {401, 403}:
        return EngineUnavailable("The engine behind this model refuses this server's own key. Ask its operator.")
    if "range_check" in message:  # llama.cpp looks a token up in its vocabulary
        return InvalidRequest(
            "One of the tokens is not in the model's vocabulary.", param="tokens", code="invalid_value"
        )
    if status == 503:
        return EngineUnavailable(retry_after_seconds=1.0)
    if status >= 500 and detail.get("code") == _OUT_OF_MEMORY:
        return EngineCrashed(message or "The engine ran out of memory on this request.", code=_OUT_OF_MEMORY)
    if status >= 500:
        return ServerError(message or "The engine failed on this request.", code="engine_error")
    return EngineGarbled()


def from_upstream(
    status: int, body: bytes, *, retry_after_seconds: float | None = None, callers_key: bool = False
) -> ForebayError:
    """What the HTTP error of a provider means for the caller, whose own key it was asked with if `callers_key`."""
    words = f"{(detail := _detail(body)).get('type')} {detail.get('code')}"
    if status in {401, 403} and callers_key:
        return Unauthorized("The provider behind this model refuses your key for it.", code="upstream_key_refused")
    if status in {401, 402, 403} or "insufficient_quota" in words:
        return UpstreamError(
            "The provider behind this model refuses this server's account. Ask its operator.", code="upstream_refused"
        )
    if status == 404:
        return ModelNotFound(
            "The provider behind this model does not know it, or does not serve this. Ask the operator of this server."
        )
    if status == 408:
        return EngineTimeout("The provider behind this model took too long.")
    if status == 429:
        return Overloaded(
            "The provider behind this model asks for fewer requests. Try again later.",
            code="upstream_rate_limited",
            retry_after_seconds=retry_after_seconds,
        )
    if status == 503:
        return EngineUnavailable(
            "The provider behind this model is not available. Try again later.", retry_after_seconds=retry_after_seconds
        )
    if status == 504:
        return EngineTimeout("The provider behind this model took too long.")
    if status < 400:
        return UpstreamError("The provider behind this model answered with something else than an answer.")
    error = from_engine(status, body)
    return (
        UpstreamError(str(error) if detail.get("message") else "")
        if type(error) in {ServerError, EngineCrashed}
        else error
    )


def retry_after(value: str | None, now: float) -> float | None:
    """The seconds that a `Retry-After` asks for, as a number or as a date; None if it says nothing that makes sense."""
    text = (value or "").strip()
    try:
        number = text.isascii() and text.replace(".", "", 1).isdigit()
        seconds = float(text) if number else parsedate_to_datetime(text).timestamp() - now
    except (ValueError, TypeError, OverflowError):
        return None
    return min(_RETRY_AFTER_SECONDS_MAX, max(0.0, seconds))


def sanitise(message: str) -> str:
    """`message` without paths and addresses, on one line, cut at a bound."""
    line = " ".join("".join(char if char.isprintable() else " " for char in message).split())
    return _ADDRESSES.sub("…", _PATHS.sub("…", line))[:_MESSAGE_CHARS_MAX]


def _detail(body: bytes) -> dict[str, Any]:
    try:
        parsed = from_json(body)
    except ValueError:
        return {}
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else {}
    return error if isinstance(error, dict) else {"message": error}


def _refusal(detail: dict[str, Any], message: str, param: str | None = None, code: str | None = None) -> InvalidRequest:
    """What the engine says is wrong with the request, and with which of its contents."""
    named, index = detail.get("param"), detail.get("index")
    if not isinstance(named, str) or named not in _FIELDS:
        return InvalidRequest(message, param=param, code=code)
    error = InvalidRequest(message, param=named, code=code)
    error.index = index if isinstance(index, int) and index >= 0 else None
    return error


def _context_message(detail: dict[str, Any], said: str) -> str:
    """A sentence with both numbers, wherever the engine tells them."""
    tokens, least, context = (detail.get(name) for name in ("n_prompt_tokens", "n_prompt_tokens_min", "n_ctx"))
    if found := _TOO_LARGE.search(said):
        tokens, context = map(int, found.groups())
    if not isinstance(context, int) or not isinstance(tokens or least, int):
        return said if _MAXIMUM in said else "The prompt is longer than the model's context. Shorten it."
    what = "input" if found or isinstance(detail.get("index"), int) else "prompt"
    length = tokens if isinstance(tokens, int) else f"at least {least}"
    return (
        f"This model's context holds {context} tokens, and the {what} has {length}. Shorten the {what}, or serve the "
        "model with a larger `context`."
    )

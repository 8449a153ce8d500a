"""Creating something once: a request that is sent again gets the answer of the first one.

It refuses a key that is used for another request, and to remember a request that made nothing: those may be tried again.
"""

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from pydantic_core import to_json
from starlette.responses import Response

from forebay.errors import Conflict, InvalidRequest
from forebay.gateway.auth import Principal
from forebay.store.database import Transaction
from forebay.store.idempotency import KEEP_SECONDS, Answered, IdempotencyStore

REPLAYED = "idempotency-replayed"
RETRY_SECONDS = 10.0  # a client's own retry comes within 8 s
_NEVER_SECONDS = -KEEP_SECONDS  # no answer is young enough
_STATUS = 200
_KEY_CHARS_MAX = 255
_RETRY_COUNT = "x-stainless-retry-count"  # of the official clients: 1 for the first automatic retry

Perform = Callable[[Transaction], Awaitable[Any]]


def idempotency_key(request: Request) -> str | None:
    """The Idempotency-Key of a request. Raises InvalidRequest; look before a long body is read."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= _KEY_CHARS_MAX and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"An Idempotency-Key has 1 to {_KEY_CHARS_MAX} printable ASCII characters.", param="Idempotency-Key"
        )
    return key


def replayed(response: Response) -> bool:
    """Whether the answer is that of an earlier request, so that this one has made nothing."""
    return REPLAYED in response.headers


async def _nothing() -> None:
    return


async def create(
    request: Request,
    caller: Principal,
    fingerprint: bytes,
    perform: Perform,
    *,
    before: Callable[[], Awaitable[None]] = _nothing,
    retries: bool = False,
) -> Response:
    """Run `perform` in a transaction and answer with what it returns; once for each Idempotency-Key.

    `fingerprint` is the body, or what stands for it. `before` checks and prepares what a request that gets the answer
    of an earlier one does not need. `perform` uses no connection but its transaction, since others with the same key
    hold theirs while they wait. With `retries` a request without a key is made once, too, if it is the automatic
    retry of an official client.
    Raises InvalidRequest for a bad key, Conflict for a key that another request has, and what `perform` raises.
    """
    store: IdempotencyStore = request.app.state.idempotency
    digest = _digest(request, fingerprint)
    key, keep_seconds = idempotency_key(request), KEEP_SECONDS
    if key is None and retries:
        key = f"\tretry {digest}"  # no client can send a tab in a key
        keep_seconds = RETRY_SECONDS if _is_retry(request) else _NEVER_SECONDS
    if key is None:
        await before()
        async with store.database.begin() as transaction:
            content = to_json(await perform(transaction))
        return _answer(content)
    found = await store.find(caller.project_id, key, keep_seconds)
    if found is None:
        await before()
        async with store.database.begin() as transaction:
            found = await store.claim(transaction, caller.project_id, key, digest, keep_seconds)
            if found is None:
                content = to_json(await perform(transaction))
                await store.keep(transaction, caller.project_id, key, _STATUS, content.decode())
    return _answer(content) if found is None else _again(found, digest)


def _again(found: Answered, digest: str) -> Response:
    if found.fingerprint != digest:
        raise Conflict(
            "This Idempotency-Key was used for another request. Use a new one for each request.",
            code="idempotency_conflict",
        )
    return _answer(found.body, {REPLAYED: "true"})


def _digest(request: Request, fingerprint: bytes) -> str:
    head = f"{request.method} {request.url.path}\n".encode()
    return hashlib.sha256(head + hashlib.sha256(fingerprint).digest()).hexdigest()


def _is_retry(request: Request) -> bool:
    count = request.headers.get(_RETRY_COUNT, "")
    return count.isascii() and count.isdigit() and count.strip("0") != ""


def _answer(body: bytes | str, headers: dict[str, str] | None = None) -> Response:
    return Response(body, _STATUS, headers, media_type="application/json")

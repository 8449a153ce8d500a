"""Signed addresses of pictures: whoever has one may read the picture until it expires, without a key.

It refuses to tell a wrong signature from one that is too late, and both from a picture that is gone; and to serve by them
what is no picture of an answer.
"""

import hashlib
import hmac
import re
from base64 import urlsafe_b64encode
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from forebay.clock import Clock
from forebay.dialects.openai.files import IMAGE_RESULT
from forebay.errors import InvalidRequest, NotFound
from forebay.gateway.download import Download
from forebay.store.files import FileStore
from forebay.store.secrets import SecretStore

_PATH = "/v1/images/results"
_KEY = "image_results"
_GONE = "There is no such picture, or its address has expired."
_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}  # so that a page can show it
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](?::[0-9]{1,5})?")
_EXPIRES = re.compile(r"[1-9][0-9]{0,11}")

open_router = APIRouter(prefix=_PATH)


class Signer:
    """Makes the signatures, with a key that all nodes share."""

    def __init__(self, secrets: SecretStore, clock: Clock) -> None:
        self._secrets = secrets
        self._clock = clock

    async def address(self, beginning: str, file_id: str, seconds: float) -> str:
        """Where the picture can be read for so long. Raises StoreUnavailable and InsufficientStorage."""
        expires = str(int(self._clock.now() + seconds))
        signature = await self._signature(file_id, expires)  # of letters that stand for themselves in an address
        return f"{beginning}{_PATH}/{file_id}?expires={expires}&signature={signature}"

    async def is_valid(self, file_id: str, expires: str, signature: str) -> bool:
        """Whether somebody may read the picture now."""
        wanted = await self._signature(file_id, expires)
        right = hmac.compare_digest(wanted.encode(), signature.encode("utf-8", "replace"))
        return right and _EXPIRES.fullmatch(expires) is not None and int(expires) >= self._clock.now()

    async def _signature(self, file_id: str, expires: str) -> str:
        """Over the texts themselves: there is one way to write each, and an id has no line break."""
        said = f"{file_id}\n{expires}".encode("utf-8", "replace")
        digest = hmac.digest(await self._secrets.get(_KEY), said, hashlib.sha256)
        return urlsafe_b64encode(digest).decode().rstrip("=")


def beginning_of(request: Request, public_url: str | None) -> str:
    """What addresses in an answer begin with: as the settings say, or as the caller has found this server.

    Raises InvalidRequest for a `Host` that names none.
    """
    if public_url is not None:
        return public_url.rstrip("/")
    host = request.headers.get("host", "")
    if _HOST.fullmatch(host) is None:
        raise InvalidRequest("The `Host` header of the request names no host that an address could begin with.")
    return f"{request.url.scheme}://{host}"


@open_router.get("/{file_id}")
async def show_picture(
    request: Request,
    file_id: str,
    expires: Annotated[str, Query()] = "",
    signature: Annotated[str, Query()] = "",
) -> Response:
    """The bytes of a picture, for whoever has its signed address."""
    state = request.app.state
    signer: Signer = state.signer
    store: FileStore = state.files
    if not await signer.is_valid(file_id, expires, signature):
        raise NotFound(_GONE)
    file = await store.find(file_id, IMAGE_RESULT)
    if file is None:
        raise NotFound(_GONE)
    stall_seconds = state.settings.http.write_stall_seconds
    kind = _TYPES.get(file.filename.rpartition(".")[2], "application/octet-stream")
    return Download(state.blobs, file.blob_key, file.bytes, file.filename, stall_seconds, state.door.clock, kind)

"""The ways of what a request refers to into a spool: an uploaded file, a `data:` URL, an address.

It refuses local paths, every other scheme, hosts that the settings do not name, and to hold more than a piece in memory.
"""

import binascii
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from forebay.errors import InvalidRequest, Unreachable
from forebay.media.medium import Medium
from forebay.media.spool import Spool
from forebay.outbound import Outbound

_BASE64_CHARS = 4 * 2**18  # a multiple of four
_DATA = re.compile(
    r"data:([a-z]{1,16})/[a-z0-9.+-]{1,64}(?:;[a-z0-9-]{1,32}=[a-z0-9.,+\"-]{1,64}){0,4};base64,", re.IGNORECASE
)
_DATA_HEAD_CHARS = 1024
_NOT_BASE64 = "Its base64 is not valid: write it in one line, with its padding and without percent-encoding."


class StoredFiles(Protocol):
    """Where uploaded files are."""

    def stream(self, medium: Medium, project: str, file_id: str, bytes_max: int) -> AsyncGenerator[bytes, None]:
        """The bytes of the project's file in pieces. Raises NotFound, and PayloadTooLarge (`media_too_large`)."""
        ...


class Sources:
    """Fetches what requests refer to, from `hosts` at most."""

    def __init__(self, outbound: Outbound, stored: StoredFiles, hosts: Sequence[str], timeout_seconds: float) -> None:
        self._outbound = outbound
        self._stored = stored
        self._hosts = hosts
        self._timeout_seconds = timeout_seconds

    def check(self, medium: Medium, url: str, param: str) -> None:
        """Raise InvalidRequest (`url_not_allowed`) for an address from which nothing will ever be fetched."""
        if is_address(url):
            self._check_hosts(medium, param)
            self._outbound.check(url, hosts=self._hosts, param=param)

    async def read(self, spool: Spool, project: str, *, url: str | None, file_id: str | None, bytes_max: int) -> None:
        """Write what is at `url`, or the file of that id, into the spool.

        Raises InvalidRequest (`url_not_allowed`, `media_invalid`), PayloadTooLarge (`media_too_large`), NotFound,
        Unreachable, InsufficientStorage and StoreUnavailable.
        """
        if file_id is not None:
            async with aclosing(self._stored.stream(spool.medium, project, file_id, bytes_max)) as pieces:
                async for piece in pieces:
                    await spool.write(piece)
        elif is_address(url or ""):
            await self._get(spool, url or "")
        else:
            await _write_data(spool, url or "")
        await spool.flush()

    async def _get(self, spool: Spool, url: str) -> None:
        self._check_hosts(spool.medium, "url")
        answer = await self._outbound.download(
            url, spool.write, hosts=self._hosts, timeout_seconds=self._timeout_seconds
        )
        check_answer(spool.medium, answer.status)
        if not answer.whole:
            raise cut_short(spool.medium)

    def _check_hosts(self, medium: Medium, param: str) -> None:
        if not self._hosts:
            raise fetches_nothing(medium, param)


def is_address(url: str) -> bool:
    """Whether something has to be fetched to have what is there."""
    return url[:5].lower() != "data:"


def fetches_nothing(medium: Medium, param: str | None = None) -> InvalidRequest:
    """The refusal of every address, where the settings name no host."""
    return InvalidRequest(
        f"This server fetches no {medium.name}s. Send the {medium.name} itself, or upload it as a file.",
        param=param,
        code="url_not_allowed",
    )


def check_answer(medium: Medium, status: int) -> None:
    """Raise Unreachable or InvalidRequest (`media_invalid`) unless an address has answered with what it has."""
    if status == 429 or status >= 500:
        raise Unreachable(f"The address of the {medium.name} answers with status {status}.")
    if status != 200:
        raise medium.invalid(f"Its address answers with status {status} and no {medium.name}.")


def cut_short(medium: Medium) -> Unreachable:
    """The refusal of half an answer."""
    return Unreachable(f"The {medium.name} did not arrive whole.")


async def _write_data(spool: Spool, url: str) -> None:
    medium = spool.medium
    match = _DATA.match(url, 0, _DATA_HEAD_CHARS)
    if match is None or match[1].lower() not in medium.types:
        raise medium.invalid(f"Write it as `{medium.example}`.")
    if (len(url) - match.end()) % 4:
        raise medium.invalid(_NOT_BASE64)
    for start in range(match.end(), len(url), _BASE64_CHARS):
        end = start + _BASE64_CHARS
        try:
            data = binascii.a2b_base64(url[start:end].encode("ascii"), strict_mode=True)
        except ValueError:
            raise medium.invalid(_NOT_BASE64) from None
        if end < len(url) and len(data) * 4 != _BASE64_CHARS * 3:
            raise medium.invalid(_NOT_BASE64)  # padding inside it
        await spool.write(data)

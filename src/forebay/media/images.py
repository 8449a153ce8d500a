"""The one way of an image into a request: taken from where it is, checked, and written into the request by the server.

It refuses local paths, every scheme but `data:`, http and https, and hosts that the settings do not name; no engine ever
sees an address.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Protocol

from forebay.clock import Clock
from forebay.config import MediaSettings
from forebay.dialects.images import ImageRef
from forebay.errors import ForebayError, InvalidRequest, Overloaded
from forebay.media.checker import Checker
from forebay.media.medium import IMAGE, Medium
from forebay.media.sources import check_answer, cut_short, fetches_nothing, is_address
from forebay.outbound import Outbound

_WAITING_MAX = 64  # requests at the front door whose images are being looked at, each with its body in memory
_FETCHING_MAX = 32  # of these with images that have to be fetched: a slow host is not to turn the others away
_DATA = re.compile(r"data:image/([a-z0-9.+-]{1,32});base64,", re.IGNORECASE)
_NAMES = {"jpg": "jpeg", "pjpeg": "jpeg", "x-png": "png"}


class StoredImages(Protocol):
    """Where uploaded files are."""

    async def read(self, medium: Medium, project: str, file_id: str, bytes_max: int) -> bytes:
        """The bytes of the project's file. Raises NotFound, and PayloadTooLarge (`media_too_large`)."""
        ...


class Images:
    """Makes pictures for engines out of what requests refer to. Shared by the front door and the lines of batches."""

    def __init__(self, settings: MediaSettings, outbound: Outbound, stored: StoredImages, clock: Clock) -> None:
        self._settings = settings
        self._outbound = outbound
        self._stored = stored
        self._checker = Checker(settings, clock)
        self._places = asyncio.Semaphore(settings.fetches_at_once + settings.checks_at_once)
        self._fetches = asyncio.Semaphore(settings.fetches_at_once)
        # Lines of batches leave places for the front door, where there is more than one.
        self._patient = asyncio.Semaphore(max(1, settings.fetches_at_once // 2))
        self._waiting = 0
        self._fetching = 0

    async def close(self) -> None:
        """End what looks at images."""
        await self._checker.close()

    async def inline(self, refs: Sequence[ImageRef], project: str, *, patient: bool) -> tuple[str, ...]:
        """A `data:` URL of a checked picture for each of `refs`. With `patient` it waits for its turn as long as it takes.

        Raises InvalidRequest (`url_not_allowed`, `media_invalid`), PayloadTooLarge (`media_too_large`), NotFound,
        Overloaded, Unreachable and ServerError; an error names the place in the body.
        """
        if not refs:
            return ()
        if len(refs) > self._settings.images_max:
            raise InvalidRequest(
                f"This request has {len(refs)} images, and at most {self._settings.images_max} are taken.",
                param=refs[self._settings.images_max].param,
                code="invalid_value",
            )
        async with self._turn(patient=patient, fetches=any(_is_address(ref) for ref in refs)):
            return await self._pictures(refs, project, patient=patient)

    @asynccontextmanager
    async def _turn(self, *, patient: bool, fetches: bool) -> AsyncIterator[None]:
        if not patient and (self._waiting >= _WAITING_MAX or (fetches and self._fetching >= _FETCHING_MAX)):
            raise Overloaded("Too many images are being looked at. Try again later.", retry_after_seconds=1)
        self._waiting += not patient
        self._fetching += fetches and not patient
        try:
            # Who fetches waits for that first: a slow host must not hold the places of images that are already here.
            async with (
                self._patient if patient else nullcontext(),
                self._fetches if fetches else nullcontext(),
                nullcontext() if patient else self._places,
            ):
                yield
        finally:
            self._waiting -= not patient
            self._fetching -= fetches and not patient

    async def _pictures(self, refs: Sequence[ImageRef], project: str, *, patient: bool) -> tuple[str, ...]:
        pictures: list[str] = []
        left, room = self._settings.request_bytes_max, self._settings.inlined_bytes_max
        for ref in refs:
            try:
                declared, data, in_base64 = await self._source(ref, project)
                left -= _decoded_bytes(data) if in_base64 else len(data)
                if left < 0:
                    raise IMAGE.too_large(
                        f"All images of a request have at most {self._settings.request_bytes_max} bytes."
                    )
                picture = await self._checker.check(
                    data, declared=declared, in_base64=in_base64, low=ref.low, patient=patient
                )
                room -= len(picture)
                if room < 0:  # a small file may be a large picture
                    raise IMAGE.too_large(
                        f"As an engine is given them, all images of a request have at most {self._settings.inlined_bytes_max} bytes."
                    )
                pictures.append(picture)
            except ForebayError as error:
                error.param = ref.param
                raise
        return tuple(pictures)

    async def _source(self, ref: ImageRef, project: str) -> tuple[str | None, bytes, bool]:
        """The type that the sender claims, the bytes, and whether these are base64."""
        most = self._settings.image_bytes_max
        if ref.file_id is not None:
            return None, await self._stored.read(IMAGE, project, ref.file_id, most), False
        url = ref.url or ""
        if _is_address(ref):
            return None, await self._fetch(url), False
        match = _DATA.match(url)
        if match is None:
            raise IMAGE.invalid(f"Write it as `{IMAGE.example}`.")
        try:
            data = url[match.end() :].encode("ascii")
        except UnicodeEncodeError:
            raise IMAGE.invalid("Its base64 is not valid.") from None
        if _decoded_bytes(data) > most:
            raise IMAGE.too_large(f"An image has at most {most} bytes.")
        declared = match[1].lower()
        return _NAMES.get(declared, declared), data, True

    async def _fetch(self, url: str) -> bytes:
        settings = self._settings
        if not settings.fetch_hosts:
            raise fetches_nothing(IMAGE)
        answer = await self._outbound.get(
            url,
            hosts=settings.fetch_hosts,
            timeout_seconds=settings.fetch_timeout_seconds,
            bytes_max=settings.image_bytes_max,
        )
        check_answer(IMAGE, answer.status)
        if not answer.whole:
            if len(answer.body) >= settings.image_bytes_max:
                raise IMAGE.too_large(f"An image has at most {settings.image_bytes_max} bytes.")
            raise cut_short(IMAGE)
        return answer.body


def _is_address(ref: ImageRef) -> bool:
    return ref.file_id is None and is_address(ref.url or "")


def _decoded_bytes(data: bytes) -> int:
    return len(data) * 3 // 4

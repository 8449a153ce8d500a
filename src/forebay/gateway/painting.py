"""Answers that are pictures while their caller waits: fetch -> make ready -> paint -> finish one after the other.

It refuses to paint on for a caller who has gone, and to hold more finished pictures for one answer than it may send.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from starlette.types import Send

from forebay.blobs.blobs import Blobs
from forebay.config import ImageSettings
from forebay.dialects.answer import Progress
from forebay.dialects.imaging import ImageTask, Painted
from forebay.dialects.openai.call import Call
from forebay.dialects.openai.image_events import Delivered, PictureShape, written
from forebay.errors import CallerError, InvalidRequest
from forebay.gateway.auth import Principal
from forebay.gateway.online import Door, OnlineAnswer, Visit, Waiting
from forebay.gateway.picture_jobs import ANSWER_BYTES_MAX, BYTES_OF_ANSWER
from forebay.gateway.places import Room, Share
from forebay.gateway.signed import Signer
from forebay.jobs.picture_files import kept_files
from forebay.media.pictures import Inputs, Pictures
from forebay.quotas import Amounts, Use
from forebay.replicas.catalog import Catalog
from forebay.scheduler.painter import Painter, Painting, Pixels
from forebay.store.files import FileStore

Kept = Callable[[int, Painted], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Easels:
    """The rooms that pictures come from and go to."""

    pictures: Pictures
    painter: Painter
    room: Room
    files: FileStore
    blobs: Blobs
    signer: Signer
    settings: ImageSettings


@dataclass(frozen=True, slots=True)
class Frame:
    """Where pictures of one answer go, if not into the answer: addresses begin with `beginning`."""

    easels: Easels
    project: str
    task: ImageTask
    beginning: str

    @asynccontextmanager
    async def delivering(self) -> AsyncIterator[Callable[[Painted], Awaitable[Delivered]]]:
        """Hands pictures over, for a block that tells the caller where they are; if it fails, nothing of them is left.

        What it calls raises InsufficientStorage and StoreUnavailable.
        """
        easels, delivery = self.easels, self.task.delivery
        seconds = easels.settings.url_seconds if delivery == "url" else easels.settings.keep_seconds

        async def deliver(picture: Painted) -> Delivered:
            if delivery == "b64_json":
                return Delivered(picture)
            file, stored = await keep(picture), replace(picture, data=b"")
            if delivery == "file_id":
                return Delivered(stored, file_id=file.id)
            url = await easels.signer.address(self.beginning, file.id, seconds)
            return Delivered(stored, url=url, file_id=file.id)

        async with kept_files(easels.files, easels.blobs, self.project, seconds) as keep:
            yield deliver


class _Told:
    """Collects what there is to tell until there is a moment to send it."""

    def __init__(self, shape: PictureShape, kept: Kept, *, streams: bool) -> None:
        self._shape = shape
        self._kept = kept
        self._streams = streams
        self._waiting: list[bytes | Pixels] = []

    def stage(self, stage: str, percent: float) -> None:
        """Nobody watches the progress of an online answer but by its events."""

    def step(self, image: int, step: int, steps: int) -> None:
        """Write down that a step is done."""
        if self._streams:
            self._waiting.append(self._shape.progress(image, step, steps))

    def partial(self, pixels: Pixels) -> None:
        """Keep a picture that is not finished until somebody has the time to encode it."""
        if self._streams:
            self._waiting.append(pixels)

    async def kept(self, image: int, picture: Painted) -> None:
        """A picture is finished."""
        await self._kept(image, picture)

    def take(self) -> list[bytes | Pixels]:
        """What has not been sent."""
        taken, self._waiting = self._waiting, []
        return taken


class PictureAnswer(OnlineAnswer):
    """The answer to one request for pictures, made while it is sent.

    `inputs` is what came with it; what it refers to is fetched once, and there until `stack` is left.
    """

    def __init__(
        self,
        door: Door,
        call: Call,
        principal: Principal,
        catalog: Catalog,
        rate_headers: Mapping[str, str],
        easels: Easels,
        inputs: Inputs,
        stack: AsyncExitStack,
        beginning: str,
    ) -> None:
        super().__init__(door, call, principal, catalog, 0, rate_headers)
        self._easels = easels
        self._came = inputs
        self._stack = stack
        self._beginning = beginning
        self._inputs: Inputs | None = None
        self._bytes = 0
        self._images = 0
        self._painting: Painting | None = None
        self._told: _Told | None = None

    async def _serve(self, visit: Visit, send: Send) -> None:
        call, shape, task = self._call, self._call.shape, self._call.picture
        assert isinstance(shape, PictureShape), "these endpoints are about pictures"
        assert task is not None, "so is the call"
        frame = Frame(self._easels, self._principal.project_id, task, self._beginning)
        serve = self._stream if call.stream else self._answer_whole
        self._bytes = self._images = 0
        self._painting = painting = await self._made_ready(call, task)
        if visit.reservation is not None:
            await visit.reservation.raise_to(lambda: Amounts(1, pixel_steps=task.n * painting.pixel_steps))
        with self._easels.room.held(self._painting.pixel_bytes, self._principal.project_id) as share:
            await serve(visit, send, shape, frame, share)

    async def _stream(self, visit: Visit, send: Send, shape: PictureShape, frame: Frame, share: Share) -> None:
        """Send each picture as soon as it is finished; then it is held no longer."""

        async def kept(image: int, picture: Painted) -> None:
            self._count(frame.task, picture)
            await self._tell(visit, send)
            with share.more(BYTES_OF_ANSWER * len(picture.data)):
                async with frame.delivering() as deliver:
                    delivered = await deliver(picture)
                    if self._images == frame.task.n:
                        self._account_for(visit)
                    await self._send_event(visit, send, lambda: shape.completed(image, delivered, self._now()))

        await self._paint(visit, send, _Told(shape, kept, streams=True))
        await self._send(visit, send, {"type": "http.response.body", "body": b""})

    async def _answer_whole(self, visit: Visit, send: Send, shape: PictureShape, frame: Frame, share: Share) -> None:
        """Send all of them at once. Of those that are not in the answer itself only their places are held."""
        made: list[Delivered] = []
        with ExitStack() as held:
            async with frame.delivering() as deliver:

                async def kept(_image: int, picture: Painted) -> None:
                    self._count(frame.task, picture)
                    if frame.task.delivery == "b64_json":
                        held.enter_context(share.more(BYTES_OF_ANSWER * len(picture.data)))
                    made.append(await deliver(picture))

                await self._paint(visit, send, _Told(shape, kept, streams=False))
                body = await asyncio.to_thread(written, shape.answer(made, self._now()))
                self._account_for(visit)
                await self._send_whole(visit, send, body)

    async def _paint(self, visit: Visit, send: Send, told: "_Told") -> None:
        assert self._painting is not None, "it was made ready"
        self._told = told
        await self._painting.run(lambda part: self._run_part(visit, part, send), told)
        visit.progress = Progress()

    async def _made_ready(self, call: Call, task: ImageTask) -> Painting:
        """Fetch, whoever of several models is to paint, and make it ready for this one."""
        try:
            if self._inputs is None:
                fetched = self._easels.pictures.fetched(self._came, task, self._principal.project_id)
                self._inputs = await self._stack.enter_async_context(fetched)
            return await self._easels.painter.prepare(call, self._inputs)
        except CallerError as error:
            error.param = error.param or "image"
            raise

    def _used(self, visit: Visit) -> Use:
        steps = 0 if self._painting is None else self._painting.pixel_steps
        return Use(1, pixel_steps=self._images * steps, images=self._images)

    async def _between_reads(self, visit: Visit, send: Send) -> None:
        await self._tell(visit, send)

    async def _tell(self, visit: Visit, send: Send) -> None:
        """Send what waits; what is not finished is encoded first."""
        shape = self._call.shape
        if self._told is None or self._painting is None or not isinstance(shape, PictureShape):
            return
        for each in self._told.take():
            if isinstance(each, bytes):
                await self._send_events(visit, send, each)
                continue
            visit.waiting = Waiting.LINE  # for nobody who could be blamed
            picture, pixels = await self._painting.finish(each), each
            index = pixels.partial or 0
            await self._send_event(
                visit,
                send,
                lambda: shape.partial(pixels.image, index, picture, self._now()),  # noqa: B023  # awaited here
            )

    async def _send_event(self, visit: Visit, send: Send, written: Callable[[], bytes]) -> None:
        """Megabytes of base64 are written in a thread."""
        await self._send_events(visit, send, await asyncio.to_thread(written))
        visit.waiting = Waiting.LINE

    def _count(self, task: ImageTask, picture: Painted) -> None:
        """Raise InvalidRequest for more bytes than fit into one answer beside others."""
        self._bytes += len(picture.data)
        self._images += 1
        if task.delivery == "b64_json" and self._bytes > ANSWER_BYTES_MAX:
            raise InvalidRequest(
                f"The pictures take more than the {ANSWER_BYTES_MAX} bytes that one answer may have. "
                "Ask for `file_id` or `url` as `response_format`, or for fewer of them.",
                param="response_format",
                code="answer_too_long",
            )

    def _now(self) -> int:
        return int(self._door.clock.now())

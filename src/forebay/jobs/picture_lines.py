"""Lines of batches that are about pictures: fetch -> make ready -> paint -> the JSON that is asked for.

It refuses addresses, which would be gone before anybody reads them, answers that are too long for one line, and more
pictures at once than a worker has room for.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from forebay.blobs.blobs import Blobs
from forebay.clock import Clock
from forebay.config import Settings
from forebay.dialects.imaging import ImageTask, Painted
from forebay.dialects.openai.call import Call
from forebay.dialects.openai.image_events import Delivered, PictureShape, written
from forebay.errors import InvalidRequest, Preempted
from forebay.jobs.picture_files import Keep, kept_files
from forebay.media.pictures import Inputs, Pictures
from forebay.quotas import Amounts, Use
from forebay.scheduler.gather import Gathered
from forebay.scheduler.painter import Compute, Painter, Painting, Pixels
from forebay.store.files import FileStore

_BASE64_OF = 4 / 3  # of the bytes that it tells


class PictureLines:
    """Answers calls for pictures whole, for all lines of one worker."""

    def __init__(
        self,
        pictures: Pictures,
        painter: Painter,
        files: FileStore,
        blobs: Blobs,
        settings: Settings,
        clock: Clock,
    ) -> None:
        self._pictures = pictures
        self._painter = painter
        self._files = files
        self._blobs = blobs
        self._keep_seconds = settings.images.keep_seconds
        self._bytes_max = settings.batches.line_bytes_max
        self._places = asyncio.Semaphore(settings.images.lines_at_once)
        self._clock = clock

    async def answer(self, call: Call, compute: Compute, take: Callable[[Amounts], Awaitable[None]]) -> Gathered:
        """The answer to `call`; `compute` runs one picture, again from its beginning where its place was taken back.

        `take` is told how much it takes before anything is computed, and may refuse.

        Raises InvalidRequest for what has no place in a line, what becomes of the images, and what `compute` raises.
        """
        shape, task = call.shape, call.picture
        assert isinstance(shape, PictureShape), "these endpoints are about pictures"
        assert task is not None, "so is the call"
        if task.delivery == "url":
            raise InvalidRequest(
                "The `response_format` of a line is `b64_json` or `file_id`: addresses do not last as long as a batch.",
                param="response_format",
                code="invalid_value",
            )
        files = kept_files(self._files, self._blobs, call.request.project, self._keep_seconds)
        async with self._places, files as keep:
            async with self._pictures.fetched(Inputs(), task, call.request.project, patient=True) as inputs:
                painting = await self._painter.prepare(call, inputs)
                pixel_steps = task.n * painting.pixel_steps
                await take(Amounts(1, pixel_steps=pixel_steps))
                delivered = await self._delivered(painting, task, compute, keep)
            body = await asyncio.to_thread(written, shape.answer(delivered, int(self._clock.now())))
            if len(body) > self._bytes_max:
                raise self._too_long()
        return Gathered(body, None, Use(1, pixel_steps=pixel_steps, images=task.n))

    async def _delivered(self, painting: Painting, task: ImageTask, compute: Compute, keep: Keep) -> list[Delivered]:
        if task.delivery == "b64_json":
            finished = _Finished(None, int(self._bytes_max / _BASE64_OF), self._too_long())
        else:
            finished = _Finished(keep, 0, self._too_long())
        while True:
            try:
                await painting.run(compute, finished, finished.pictures, each_alone=True)
            except Preempted:
                continue
            return [finished.pictures[image] for image in range(task.n)]

    def _too_long(self) -> InvalidRequest:
        return InvalidRequest(
            f"The pictures take more than the {self._bytes_max} bytes that a line may have. "
            "Ask for `file_id` as `response_format`, or for fewer of them.",
            param="response_format",
            code="answer_too_long",
        )


class _Finished:
    """Has what is finished while the line runs, so that nothing of it is done again when a place is taken back.

    With `keep` each picture becomes a file, and is not held. Without, all have at most `bytes_max` bytes.
    """

    def __init__(self, keep: Keep | None, bytes_max: int, too_long: InvalidRequest) -> None:
        self.pictures: dict[int, Delivered] = {}
        self._keep = keep
        self._bytes_max = bytes_max
        self._too_long = too_long

    def stage(self, stage: str, percent: float) -> None:
        """A line has no progress of its own."""

    def step(self, image: int, step: int, steps: int) -> None:
        """Nor any steps."""

    def partial(self, pixels: Pixels) -> None:
        """Nobody sees one before the end."""

    async def kept(self, image: int, picture: Painted) -> None:
        """A picture is finished.

        Raises InvalidRequest where those of the line are too many bytes, before the next, and what `keep` raises.
        """
        if self._keep is not None:
            file = await self._keep(picture)
            self.pictures[image] = Delivered(replace(picture, data=b""), file_id=file.id)
            return
        self.pictures[image] = Delivered(picture)
        if sum(len(each.picture.data) for each in self.pictures.values()) > self._bytes_max:
            raise self._too_long

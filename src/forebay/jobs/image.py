"""The kind of job that makes pictures: fetch -> make ready -> paint and finish one after the other -> hand out all as files.

It refuses to paint again what is kept, to show a picture before all of them are there, and to keep what came with the
request longer than its job. A new attempt fetches and makes ready anew, and goes on after the last picture that was kept.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from pydantic_core import from_json, to_json

from forebay.clock import new_id
from forebay.commit_points import reach
from forebay.config import ImageSettings
from forebay.dialects.imaging import ImageTask, Painted
from forebay.dialects.openai.call import Call
from forebay.dialects.openai.files import IMAGE_RESULT
from forebay.dialects.pubsub import ObjectNames
from forebay.errors import ForebayError, NotFound, Overloaded, Preempted
from forebay.inference import Capability, Priority
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.ledger import FETCHING, Ledger, Plan
from forebay.jobs.media_work import WAITS, MediaRooms, gone, later
from forebay.jobs.outcome import Cancelled, Done, Outcome
from forebay.jobs.picture_files import file_name, sha256_of, store_blob
from forebay.jobs.retry import Delay
from forebay.media.objects import Objects
from forebay.media.pictures import Inputs, Pictures
from forebay.media.spool import Spool
from forebay.metering.meter import Reservation
from forebay.pixels import Size
from forebay.quotas import Account, Amounts, Use
from forebay.scheduler.painter import FINISHING, PAINTING, PREPARING, Painter, Pixels
from forebay.store.database import Transaction
from forebay.store.files import FileStore, blob_key
from forebay.store.job_records import Job, Lease
from forebay.store.job_state import FINISHED, JobState
from forebay.store.media_jobs import IMAGE, MediaJob, Part, media_key

PREVIEW_TYPE = "image/jpeg"

# About how long each takes beside the others; painting and finishing take turns.
_PLAN = Plan({FETCHING: 2, PREPARING: 5, PAINTING: 93})
_PAINTED = 0.95  # of a picture, when its last step is done
_BEFORE_BODY = b"\n"  # no JSON in one line has one


@dataclass(frozen=True, slots=True)
class Asked:
    """What of a request its job reads. `images` and `mask` are the sizes of what came with it, in one blob.

    `objects` names what it is about where that lies in the store that others fill, and where its results go there.
    """

    body: bytes
    images: tuple[int, ...] = ()
    mask: int | None = None
    objects: ObjectNames | None = None

    @property
    def has_media(self) -> bool:
        """Whether anything came with it."""
        return bool(self.images) or self.mask is not None

    @property
    def pictures(self) -> int:
        """How many images the body does not name."""
        return len(self.images) if self.objects is None else 1

    @property
    def with_mask(self) -> bool:
        """Whether there is a mask that the body does not name."""
        return self.mask is not None or (self.objects is not None and self.objects.mask is not None)

    def written(self) -> bytes:
        """As it is kept: the body is as it came, for it may be megabytes of base64, and stands behind the rest."""
        objects = None if self.objects is None else asdict(self.objects)
        return to_json({"images": self.images, "mask": self.mask, "objects": objects}) + _BEFORE_BODY + self.body

    @classmethod
    def read(cls, kept: bytes) -> "Asked":
        """The same again."""
        head, _, body = kept.partition(_BEFORE_BODY)
        values: dict[str, Any] = from_json(head)
        objects = None if values["objects"] is None else ObjectNames(**values["objects"])
        return cls(body, tuple(values["images"]), values["mask"], objects)


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file that is stored, and is none before its job ends well."""

    id: str
    bytes: int
    sha256: str
    content_type: str


@dataclass(frozen=True, slots=True)
class KeptPicture:
    """A picture that is finished."""

    picture: KeptFile
    preview: KeptFile | None
    size: Size
    used: Mapping[str, Any]

    @property
    def pixel_steps(self) -> int:
        """What it counts for."""
        width, height, steps = (self.used.get(name) or 1 for name in ("width", "height", "steps"))
        return int(width * height * steps)

    @property
    def files(self) -> list[KeptFile]:
        """The files that it is."""
        return [self.picture] if self.preview is None else [self.picture, self.preview]

    def written(self) -> dict[str, Any]:
        """As it is kept, and as a result has it."""
        return {
            "picture": _written(self.picture),
            "preview": None if self.preview is None else _written(self.preview),
            "width": self.size.width,
            "height": self.size.height,
            "used": dict(self.used),
        }

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> "KeptPicture":
        """The same again."""
        preview = None if kept["preview"] is None else KeptFile(**kept["preview"])
        return cls(KeptFile(**kept["picture"]), preview, Size(kept["width"], kept["height"]), kept["used"])


def _written(file: KeptFile) -> dict[str, Any]:
    return {"id": file.id, "bytes": file.bytes, "sha256": file.sha256, "content_type": file.content_type}


class ImageWork:
    """Makes attempts at pictures."""

    def __init__(
        self,
        rooms: MediaRooms,
        files: FileStore,
        pictures: Pictures,
        painter: Painter,
        objects: Objects,
        settings: ImageSettings,
    ) -> None:
        self._rooms = rooms
        self._objects = objects
        self._files = files
        self._pictures = pictures
        self._painter = painter
        self._keep_seconds = settings.keep_seconds

    async def perform(self, lease: Lease, run: Run) -> Outcome:
        """One attempt."""
        job = await self._rooms.store.get(lease.id)
        if job is None:
            return Cancelled()  # it was removed
        if job.request is None:
            raise gone("image")
        asked = Asked.read(job.request)
        call = await self._rooms.calls.prepare(
            job.path,
            asked.body,
            request_id=new_id("req"),
            project=job.project_id,
            priority=Priority.BATCH,
            pictures=asked.pictures,
            with_mask=asked.with_mask,
        )
        try:
            gallery = await self._worked_on(lease, run, job, asked, self._expected(call))
        except WAITS as trouble:
            return later(trouble)
        reach("image.finished")
        if asked.objects is not None:
            await self._deliver(asked.objects, gallery)
        return self._done(lease, gallery, asked.objects, call.request.capability)

    async def after(self, job: Job, state: JobState) -> None:
        """For the process in which an attempt has ended."""
        if state in FINISHED:
            reach("image.settled")
            await self._rooms.close(job.id)

    def _expected(self, call: Call) -> Call:
        """The call for a model that is up or comes up: the one that was asked for, or who stands in for it."""
        while True:
            try:
                self._rooms.admission.expect([call.request.model])
            except ForebayError as error:
                call = self._stand_in(call, error)
            else:
                return call

    def _stand_in(self, call: Call, error: ForebayError) -> Call:
        """The call for another model. Raises `error` where there is none; a full line is waited for."""
        other = None if call.otherwise is None or isinstance(error, Overloaded) else call.otherwise(error)
        if other is None:
            raise error
        self._rooms.metrics.fallbacks.labels(call.request.model, other.request.model).inc()
        return other

    async def _worked_on(self, lease: Lease, run: Run, job: MediaJob, asked: Asked, call: Call) -> "_Gallery":
        task = call.picture
        assert task is not None, "these endpoints are about pictures"
        gallery = _Gallery(self._rooms, lease, run, task.n, await self._rooms.store.parts(lease.id))
        if gallery.next is None:  # whoever has seen the results may have removed what they are made of
            self._rooms.meter.reserve_done(run.at_end, lease.job, call, gallery.all_used)
            return gallery
        reservation = await self._rooms.meter.reserve_until(run.at_end, lease.job, call)
        async with gallery.telling():
            gallery.stage(FETCHING, 0)
            async with self._inputs(job, asked, task) as inputs:
                while gallery.next is not None:
                    try:
                        await self._painted(call, inputs, gallery, reservation)
                    except ForebayError as error:
                        call = self._stand_in(call, error)
        self._rooms.meter.settle_at(run.at_end, reservation, gallery.all_used)
        return gallery

    async def _painted(self, call: Call, inputs: Inputs, gallery: "_Gallery", reservation: Reservation) -> None:
        """All pictures that are not there yet, by one model. Raises QuotaExceeded and Overloaded."""
        gallery.stage(PREPARING, 0)
        painting = await self._painter.prepare(call, inputs, preview=True)
        pixel_steps = gallery.all_used.pixel_steps + gallery.left * painting.pixel_steps
        await self._rooms.meter.raise_to(reservation, Amounts(1, pixel_steps=pixel_steps))
        while (image := gallery.next) is not None:
            with suppress(Preempted):  # then it begins anew
                await painting.paint([image], self._rooms.compute, gallery)

    @asynccontextmanager
    async def _inputs(self, job: MediaJob, asked: Asked, task: ImageTask) -> AsyncIterator[Inputs]:
        """What came with the request, and what lies where it says. Raises InvalidRequest if either is gone."""
        async with AsyncExitStack() as stack:
            came, offset = Inputs(), 0
            for size in asked.images:
                spool = await stack.enter_async_context(self._pictures.spool())
                came = Inputs((*came.images, await self._copied(spool, job.id, offset, size)), None)
                offset += size
            if asked.mask is not None:
                spool = await stack.enter_async_context(self._pictures.spool(mask=True))
                came = Inputs(came.images, await self._copied(spool, job.id, offset, asked.mask))
            if asked.objects is not None:
                came = await self._found(stack, asked.objects)
            yield await stack.enter_async_context(self._pictures.fetched(came, task, job.project_id, patient=True))

    async def _found(self, stack: AsyncExitStack, objects: ObjectNames) -> Inputs:
        """The image, and its mask if it has one, out of the store that others fill."""
        image = await stack.enter_async_context(self._pictures.spool())
        await self._objects.fetch(image, objects.image, "image")
        if objects.mask is None:
            return Inputs((image,), None)
        mask = await stack.enter_async_context(self._pictures.spool(mask=True))
        await self._objects.fetch(mask, objects.mask, "mask")
        return Inputs((image,), mask)

    async def _copied(self, spool: Spool, job_id: str, offset: int, size: int) -> Spool:
        try:
            async for piece in self._rooms.blobs.stream(media_key(IMAGE, job_id), offset, size):
                await spool.write(piece)
        except NotFound:
            raise gone("image") from None
        await spool.flush()
        return spool

    async def _deliver(self, objects: ObjectNames, gallery: "_Gallery") -> None:
        """Put the picture and its preview where the message wants them; the bytes are those that are kept, however often."""
        (made,) = gallery.pictures()
        results = (("output", objects.output, made.picture), ("preview", objects.preview, made.preview))
        for field, name, file in results:
            if file is not None:
                async with aclosing(self._rooms.blobs.stream(blob_key(file.id))) as pieces:
                    await self._objects.put(name, pieces, field)
        reach("image.delivered")

    def _done(self, lease: Lease, gallery: "_Gallery", objects: ObjectNames | None, capability: Capability) -> Outcome:
        pictures = gallery.pictures()
        created = int(self._rooms.clock.now())
        made: dict[str, Any] = {"created": created, "pictures": [each.written() for each in pictures]}
        if objects is not None:
            made["objects"] = {"output_object": objects.output, "preview_object": objects.preview}
        result = to_json(made)
        files = [file for each in pictures for file in each.files]

        async def write(transaction: Transaction) -> None:
            for file in files:
                await self._files.create_ready(
                    transaction,
                    lease.job.project_id,
                    file_id=file.id,
                    filename=file_name(file.id, file.content_type),
                    purpose=IMAGE_RESULT,
                    size=file.bytes,
                    sha256=file.sha256,
                    keep_seconds=self._keep_seconds,
                )
            await self._rooms.store.finish(transaction, lease.id, result, [file.id for file in files])
            project, key_id = lease.job.project_id, lease.job.key_id or ""
            used = [(Account(project, key_id, model, capability), use) for model, use in gallery.used().items()]
            await self._rooms.meter.write(transaction, used)

        return Done(write)


class _Gallery(Ledger):
    """Keeps each picture that an attempt has finished, and tells of their steps as those of one work."""

    def __init__(self, rooms: MediaRooms, lease: Lease, run: Run, count: int, kept: Sequence[Part]) -> None:
        super().__init__(rooms, lease, run, _PLAN)
        self.count = count
        self._kept = {part.number: KeptPicture.read(from_json(part.body)) for part in kept}

    @property
    def next(self) -> int | None:
        """The picture that is to be painted; none if all are kept."""
        return next((image for image in range(self.count) if image not in self._kept), None)

    @property
    def left(self) -> int:
        """How many are to be painted."""
        return self.count - len(self._kept)

    @property
    def all_used(self) -> Use:
        """What has been painted, whoever did."""
        return sum(self.used().values(), Use())

    def used(self) -> dict[str, Use]:
        """What each model has painted; the request itself counts for the first."""
        used: dict[str, Use] = {}
        for image, made in sorted(self._kept.items()):
            model = str(made.used["model"])
            use = Use(int(image == 0), pixel_steps=made.pixel_steps, images=1)
            used[model] = used.get(model, Use()) + use
        return used

    def pictures(self) -> list[KeptPicture]:
        """All of them, in order."""
        return [self._kept[image] for image in range(self.count)]

    def stage(self, stage: str, percent: float) -> None:
        """So much of a stage is done; of painting and finishing it is that of one picture."""
        if stage == FINISHING:
            self.tell(stage, self._done_of(_PAINTED + (1 - _PAINTED) * percent / 100))
        elif stage == PAINTING:  # with the steps that were told, if the model has any
            self.tell(stage, self._done_of(_PAINTED * percent / 100), self._steps if self._stage == stage else None)
        else:
            super().stage(stage, percent)

    def step(self, image: int, step: int, steps: int) -> None:
        """An engine has finished a step of a picture."""
        before = len(self._kept) * steps
        self.tell(PAINTING, self._done_of(_PAINTED * step / steps), (before + step, self.count * steps))

    def partial(self, pixels: Pixels) -> None:
        """Nobody sees one before the end."""

    async def kept(self, image: int, picture: Painted) -> None:
        """Store a finished picture and write it down. Raises LeaseLost."""
        files = {new_id("file"): (picture.data, picture.content_type)}
        if picture.preview is not None:
            files[new_id("file")] = (picture.preview, PREVIEW_TYPE)
        await self.insist(lambda: self._rooms.store.draft(self._lease, list(files)))
        stored = [await self._stored(file_id, *content) for file_id, content in files.items()]
        reach("image.picture_stored")
        found = KeptPicture(stored[0], stored[1] if len(stored) > 1 else None, picture.size, picture.used)
        await self.keep(Part(PAINTING, image, to_json(found.written())))
        self._kept[image] = found
        reach("image.picture_kept")

    async def _stored(self, file_id: str, data: bytes, content_type: str) -> KeptFile:
        await self.insist(lambda: store_blob(self._rooms.blobs, blob_key(file_id), data))
        return KeptFile(file_id, len(data), await sha256_of(data), content_type)

    def _done_of(self, share: float) -> int:
        """How far all of it is when the picture that is painted is so far."""
        return _PLAN.done(PAINTING, 100 * (len(self._kept) + share) / self.count)


def image_kind(work: ImageWork, settings: ImageSettings, retry: Delay) -> Kind:
    """The kind, for the list of kinds."""
    return Kind(
        name=IMAGE,
        perform=work.perform,
        at_once=settings.jobs_at_once,
        retry=retry,
        event=IMAGE,
        has_dead_letter=True,
        takes_turns=True,
        after=work.after,
    )

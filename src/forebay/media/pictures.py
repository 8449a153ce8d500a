"""The one way of an image to a model that paints, and of what it paints back into the image.

It refuses local paths, every scheme but `data:`, http and https, hosts that the settings do not name, and to decode
anything in this process; no engine ever sees an address, a file format, or what it is not asked to change.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from forebay.blobs.disk import in_thread
from forebay.clock import Clock
from forebay.config import ImageSettings, MediaSettings
from forebay.dialects.images import ImageRef
from forebay.dialects.imaging import ImageTask, Painted
from forebay.errors import ForebayError
from forebay.media.editor import Editor, Files
from forebay.media.medium import IMAGE, MASK
from forebay.media.private_file import PrivateFile, PrivateFiles
from forebay.media.programs import Places
from forebay.media.sources import Sources, StoredFiles, is_address
from forebay.media.spool import Spool
from forebay.outbound import Outbound
from forebay.pixels import Size, fit

_ENGINE_BYTES_MAX = 63 * 2**20  # of pixels in one request to an engine; its prompts have room beside them
_CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of a request as they were sent, on the disk. The mask is that of the first image."""

    images: tuple[Spool, ...] = ()
    mask: Spool | None = None

    @property
    def spools(self) -> tuple[Spool, ...]:
        """All of them."""
        return self.images if self.mask is None else (*self.images, self.mask)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What an engine is given. `size` is that of what it is to paint, and of the first image and its mask.

    `data` is every image as RGB, one after the other, and then the mask, if there is one.
    """

    size: Size
    image_sizes: tuple[Size, ...] = ()
    has_mask: bool = False
    data: bytes = field(default=b"", repr=False)


class Pictures:
    """Makes requests ready for engines, and answers of what they paint. Shared by both doors and the lines of batches.

    With `patient`, which is for work that nobody waits for at the front door, a place is left to others.
    """

    def __init__(
        self,
        settings: ImageSettings,
        fetching: MediaSettings,
        folder: Path,
        outbound: Outbound,
        stored: StoredFiles,
        clock: Clock,
        *,
        free_bytes_min: int = 0,
    ) -> None:
        self._settings = settings
        self._sources = Sources(outbound, stored, fetching.fetch_hosts, fetching.fetch_timeout_seconds)
        self._fetches = Places(fetching.fetches_at_once)
        self._files = PrivateFiles(folder, free_bytes_min)
        self._editor = Editor(settings, clock)

    def open(self) -> None:
        """Make the folder, and remove what a crash left there. Raises SetupError."""
        self._files.open()

    async def close(self) -> None:
        """End whatever works on images."""
        await self._editor.close()

    @asynccontextmanager
    async def spool(self, *, mask: bool = False) -> AsyncIterator[Spool]:
        """A place for one file as it is sent; it is gone when the block ends."""
        medium = MASK if mask else IMAGE
        async with self._files.file() as file:
            yield Spool(file, medium, self._bytes_max(mask=mask))

    def _bytes_max(self, *, mask: bool) -> int:
        return self._settings.mask_bytes_max if mask else self._settings.image_bytes_max

    def check(self, ref: ImageRef) -> None:
        """Raise InvalidRequest (`url_not_allowed`) for an address from which nothing will ever be fetched."""
        if ref.url is not None:
            self._sources.check(IMAGE, ref.url, ref.param)

    def check_bytes(self, inputs: Inputs, param: str = "image") -> None:
        """Raise PayloadTooLarge (`media_too_large`) if all files of a request are larger than they may be together."""
        most = self._settings.request_bytes_max
        if sum(spool.bytes for spool in inputs.spools) > most:
            error = IMAGE.too_large(f"All files of a request have at most {most} bytes.")
            error.param = param
            raise error

    async def fetch(self, spool: Spool, ref: ImageRef, project: str, *, patient: bool = False) -> None:
        """Write what `ref` refers to into the spool. An error names its place in the body.

        Raises InvalidRequest (`url_not_allowed`, `media_invalid`), PayloadTooLarge (`media_too_large`), NotFound,
        Unreachable, InsufficientStorage and StoreUnavailable.
        """
        far = ref.file_id is None and is_address(ref.url or "")
        most = self._bytes_max(mask=spool.medium is MASK)
        try:
            async with self._fetches.one(patient=patient) if far else nullcontext():
                await self._sources.read(spool, project, url=ref.url, file_id=ref.file_id, bytes_max=most)
        except ForebayError as error:
            error.param = ref.param
            raise

    @asynccontextmanager
    async def fetched(
        self, came: Inputs, task: ImageTask, project: str, *, patient: bool = False
    ) -> AsyncIterator[Inputs]:
        """The files of a request: those that came with it, and those that it refers to, until the block ends.

        Raises as `fetch`.
        """
        async with AsyncExitStack() as stack:

            async def have(ref: ImageRef, *, mask: bool = False) -> Spool:
                spool = await stack.enter_async_context(self.spool(mask=mask))
                await self.fetch(spool, ref, project, patient=patient)
                return spool

            inputs = came
            for ref in task.images:
                inputs = replace(inputs, images=(*inputs.images, await have(ref)))
                self.check_bytes(inputs, ref.param)
            if task.mask is not None:
                inputs = replace(inputs, mask=await have(task.mask, mask=True))
                self.check_bytes(inputs, task.mask.param)
            yield inputs

    async def prepare(self, inputs: Inputs, task: ImageTask, *, patient: bool = False) -> Prepared:
        """What the engine is given for `task`.

        Raises InvalidRequest (`media_invalid`) and PayloadTooLarge (`media_too_large`) with the field that is at fault,
        InsufficientStorage, StoreUnavailable, ServerError and ShuttingDown.
        """
        rules = task.rules
        if task.task == "generate":
            return Prepared(
                fit(task.output.size or Size(rules.edge_max, rules.edge_max), rules.edge_max, rules.edge_factor)
            )
        self.check_bytes(inputs)
        async with self._room() as out:
            cut = await self._editor.prepare(await _files(inputs), task, out, patient=patient)
            if cut.bytes > _ENGINE_BYTES_MAX:
                error = IMAGE.too_large(
                    f"As the model is given them, all images of a request have at most {_ENGINE_BYTES_MAX} bytes, three"
                    " for each pixel. Send fewer."
                )
                error.param = "images" if task.images else "image"
                raise error
            return Prepared(cut.size, cut.image_sizes, cut.has_mask, await in_thread(out.read, 0, cut.bytes))

    async def finish(
        self, inputs: Inputs, task: ImageTask, size: Size, pixels: bytes, *, preview: bool, patient: bool = False
    ) -> Painted:
        """The picture as its caller gets it; `used` is left empty. Raises as `prepare`."""
        first = Files([], None) if task.task == "generate" else await _files(replace(inputs, images=inputs.images[:1]))
        async with self._room() as painted, self._room() as out:
            await in_thread(painted.write, pixels)
            made = await self._editor.finish(first, task, painted.reader, size, out, preview=preview, patient=patient)
            picture = await in_thread(out.read, 0, made.picture_bytes)
            small = await in_thread(out.read, made.picture_bytes, made.preview_bytes)
        return Painted(picture, _CONTENT_TYPES[task.output.format], made.size, {}, small or None)

    @asynccontextmanager
    async def _room(self) -> AsyncIterator[PrivateFile]:
        """A file for what a program writes. Raises InsufficientStorage where the disk has none left for it."""
        async with self._files.file() as file:
            await in_thread(self._files.check_room, _ENGINE_BYTES_MAX)
            yield file


async def _files(inputs: Inputs) -> Files:
    """What a program is handed."""
    for spool in inputs.spools:
        await spool.flush()
    mask = inputs.mask
    return Files([spool.file.reader for spool in inputs.images], None if mask is None else mask.file.reader)

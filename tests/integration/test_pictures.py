"""Pictures on their way to a model and back: where they come from, what is made of them, and what is left behind."""

import asyncio
import base64
import hashlib
import io
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import uvloop
from PIL import Image

from forebay.blobs.blobs import open_blobs
from forebay.clock import SystemClock
from forebay.config import MediaSettings, Settings
from forebay.dialects.images import ImageRef
from forebay.dialects.imaging import ImageRules, ImageTask, MaskPlan, OutputPlan, Painted
from forebay.errors import (
    CallerError,
    ForebayError,
    InsufficientStorage,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    ServerError,
    ShuttingDown,
    Unreachable,
)
from forebay.media.pictures import Inputs, Pictures, Prepared
from forebay.pixels import Size
from forebay.store.database import Database
from forebay.store.files import FileStore
from forebay.store.keys import DEFAULT_PROJECT, KeyStore
from tests.support.files_server import serve
from tests.support.image_program import PROGRAM
from tests.support.images import data_url, encoded, picture, png
from tests.support.listening import pictures
from tests.support.memory import growth, of_family
from tests.support.processes import at_work, lives, open_files, programs
from tests.support.server import eventually

MIB = 2**20
HOLE = (16, 8, 40, 32)
WIDE, HIGH = 96, 64
RULES = ImageRules(edge_max=48, edge_factor=16, images_max=4)
FREE = ImageRules(edge_max=48, edge_factor=16, needs_mask=False)


def noise(width: int = WIDE, height: int = HIGH, seed: int = 1) -> Image.Image:
    return Image.frombytes("RGB", (width, height), Random(seed).randbytes(3 * width * height))


def alpha_mask(hole: tuple[int, int, int, int] = HOLE, width: int = WIDE, height: int = HIGH) -> bytes:
    """Transparent in the hole."""
    mask = Image.new("RGBA", (width, height), "black")
    mask.paste((0, 0, 0, 0), hole)
    return encoded(mask)


def white_mask(hole: tuple[int, int, int, int] = HOLE) -> bytes:
    mask = Image.new("L", (WIDE, HIGH), 0)
    mask.paste(255, hole)
    return encoded(mask)


def edit(**fields: Any) -> ImageTask:
    return ImageTask("edit", "a", **{"rules": RULES, **fields})


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Pictures]:
    async with pictures(tmp_path) as one:
        yield one
        assert list((tmp_path / "pictures").iterdir()) == []


@asynccontextmanager
async def sent(room: Pictures, *images: bytes, mask: bytes | None = None) -> AsyncIterator[Inputs]:
    """The files of a request, as the server has them."""
    async with AsyncExitStack() as stack:
        spools = [await stack.enter_async_context(room.spool()) for _ in images]
        for spool, content in zip(spools, images, strict=True):
            await spool.write(content)
        if mask is None:
            yield Inputs(tuple(spools))
            return
        spool = await stack.enter_async_context(room.spool(mask=True))
        await spool.write(mask)
        yield Inputs(tuple(spools), spool)


async def whole_way(
    room: Pictures, inputs: Inputs, task: ImageTask, *, preview: bool = False
) -> tuple[Prepared, Painted]:
    """With a model that paints everything in blue."""
    ready = await room.prepare(inputs, task)
    blue = b"\0\0\xff" * ready.size.pixels
    return ready, await room.finish(inputs, task, ready.size, blue, preview=preview)


async def refusal(
    room: Pictures, *images: bytes, mask: bytes | None = None, named: ImageRef | None = None, **fields: Any
) -> tuple[str, str | None]:
    """The code of it, and the field. `named` is where the mask is, if it did not come with the request."""
    with pytest.raises(CallerError) as refused:
        async with sent(room, *images, mask=mask) as inputs:
            await room.prepare(inputs, edit(mask=named, **fields))
    return refused.value.code, refused.value.param


def shown(painted: Painted) -> Image.Image:
    return Image.open(io.BytesIO(painted.data))


def only_the_hole_is_blue(before: Image.Image, after: Image.Image) -> None:
    expected = before.copy()
    expected.paste((0, 0, 255), HOLE)
    assert after.convert("RGB").tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
async def test_the_whole_way_of_every_format(made: Pictures, kind: str) -> None:
    content = encoded(noise(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    before = Image.open(io.BytesIO(content)).convert("RGB")
    async with sent(made, content, mask=alpha_mask()) as inputs:
        for form, content_type in {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}.items():
            task = edit(output=OutputPlan(form))  # type: ignore[arg-type]
            ready, painted = await whole_way(made, inputs, task, preview=True)
            assert (ready.size, ready.image_sizes, ready.has_mask) == (Size(48, 32), (Size(48, 32),), True)
            assert len(ready.data) == 48 * 32 * 4
            after = shown(painted)
            assert (painted.content_type, painted.size, painted.used) == (content_type, Size(WIDE, HIGH), {})
            assert (after.format, after.size) == (form.upper(), (WIDE, HIGH))
            assert painted.preview is not None
            assert Image.open(io.BytesIO(painted.preview)).format == "JPEG"
            if form == "png":
                only_the_hole_is_blue(before, after)


async def test_the_mask_of_its_own_in_white_and_that_of_the_image(made: Pictures) -> None:
    async with sent(made, encoded(noise()), mask=white_mask()) as inputs:
        ready, painted = await whole_way(made, inputs, edit(mask_plan=MaskPlan("white")))
        only_the_hole_is_blue(noise(), shown(painted))
    through = noise()
    through.putalpha(Image.open(io.BytesIO(alpha_mask())).getchannel("A"))
    async with sent(made, encoded(through)) as inputs:
        same, painted = await whole_way(made, inputs, edit())
        only_the_hole_is_blue(noise(), shown(painted))
    assert ready.has_mask
    assert ready.data[-48 * 32 :] == same.data[-48 * 32 :], "the same mask"
    assert set(ready.data[-48 * 32 :]) == {0, 255}
    assert painted.preview is None


async def test_without_a_mask_everything_is_of_the_model(made: Pictures) -> None:
    async with sent(made, encoded(noise())) as inputs:
        ready, painted = await whole_way(made, inputs, edit(rules=FREE))
    assert (ready.has_mask, len(ready.data)) == (False, 48 * 32 * 3)
    assert shown(painted).convert("RGB").tobytes() == b"\0\0\xff" * (WIDE * HIGH)


async def test_several_images_and_another_size_of_the_answer(made: Pictures) -> None:
    async with sent(made, encoded(noise()), picture(20, 100), picture(33, 33), mask=alpha_mask()) as inputs:
        ready, painted = await whole_way(made, inputs, edit(output=OutputPlan(size=Size(48, 32))))
    assert ready.image_sizes == (Size(48, 32), Size(16, 48), Size(32, 32))
    assert len(ready.data) == 3 * (48 * 32 + 16 * 48 + 32 * 32) + 48 * 32
    assert painted.size == Size(48, 32)


async def test_new_pictures_need_no_files(made: Pictures) -> None:
    task = ImageTask("generate", "a", output=OutputPlan("webp", size=Size(50, 34)), rules=RULES)
    assert await made.prepare(Inputs(), task) == Prepared(Size(48, 32))
    assert not programs(PROGRAM)
    painted = await made.finish(Inputs(), task, Size(48, 32), bytes(48 * 32 * 3), preview=True)
    assert (painted.size, painted.content_type, shown(painted).size) == (Size(50, 34), "image/webp", (50, 34))
    assert painted.preview


async def test_a_refusal_names_the_file_that_it_is_about(made: Pictures) -> None:
    good, mask, through = encoded(noise()), alpha_mask(), picture(WIDE, HIGH)
    invalid, large = "media_invalid", "media_too_large"
    for images, its_mask, expected in (
        ([b"GIF89a" + bytes(40)], mask, (invalid, "image")),
        ([good[:-400]], mask, (invalid, "image")),
        ([b""], mask, (invalid, "image")),
        ([png(10_000, 10_000, rows=1)], mask, (large, "image")),
        ([picture(9, 1)], mask, (invalid, "image")),
        ([good, b"x"], mask, (invalid, "image[1]")),
        ([good, good, good[:-400]], mask, (invalid, "image[2]")),
        ([good], b"", (invalid, "mask")),
        ([good], mask[:-60], (invalid, "mask")),
        ([good], alpha_mask(width=WIDE + 1), (invalid, "mask")),
        ([good], white_mask(), (invalid, "mask")),  # in mode `alpha`
        ([good], alpha_mask((0, 0, 0, 0)), (invalid, "mask")),
        ([good], alpha_mask((0, 0, 2, 2)), (invalid, "mask")),
        ([through], None, (invalid, "mask")),
    ):
        assert await refusal(made, *images, mask=its_mask) == expected, (len(images), expected)
    refs = (ImageRef("images[0].file_id", file_id="file_1"), ImageRef("images[1].image_url", url="data:"))
    its_ref = ImageRef("mask.file_id", file_id="file_2")
    assert await refusal(made, b"x", good, mask=mask, images=refs, named=its_ref) == (invalid, "images[0].file_id")
    assert await refusal(made, good, b"x", mask=mask, images=refs, named=its_ref) == (invalid, "images[1].image_url")
    assert await refusal(made, good, good, mask=b"x", images=refs, named=its_ref) == (invalid, "mask.file_id")
    wrong = edit(output=OutputPlan(size=Size(50, 50)))
    assert await refusal(made, good, mask=mask, output=wrong.output) == ("invalid_value", "size")
    assert len(programs(PROGRAM)) == 1, "and the program has lived through all of it"


async def test_what_a_refusal_says(made: Pictures) -> None:
    good = encoded(noise())
    for its_mask, words in (
        (alpha_mask(width=90, height=70), "90x70 pixels and its image 96x64"),
        (white_mask(), "`mask_mode` `white`"),
        (alpha_mask((0, 0, 0, 0)), "Nothing of it is transparent"),
        (alpha_mask((0, 0, 2, 2)), "marks 4 pixels.* at least 16"),
    ):
        with pytest.raises(InvalidRequest, match=words) as refused:
            async with sent(made, good, mask=its_mask) as inputs:
                await made.prepare(inputs, edit())
        assert str(refused.value).startswith("The mask cannot be used. ")


async def test_limits(tmp_path: Path) -> None:
    large = "media_too_large"
    async with pictures(
        tmp_path, image_bytes_max=30_000, mask_bytes_max=2000, request_bytes_max=40_000, mask_coverage_max=0.05
    ) as made:
        async with made.spool() as spool, made.spool(mask=True) as mask:
            await spool.write(bytes(30_000))
            with pytest.raises(PayloadTooLarge, match=r"The image is too large\. It has at most 30000 bytes"):
                await spool.write(b"x")
            with pytest.raises(PayloadTooLarge, match=r"The mask is too large\. It has at most 2000 bytes"):
                await mask.write(bytes(2001))
        good = encoded(noise())
        assert await refusal(made, good, good, good, mask=alpha_mask()) == (large, "image")
        assert await refusal(made, good, mask=alpha_mask()) == ("media_invalid", "mask")
    async with pictures(tmp_path, pixels_max=WIDE * HIGH - 1) as made:
        assert await refusal(made, good, mask=alpha_mask()) == (large, "image")
    async with pictures(tmp_path, prepare_seconds_max=1, pixels_max=2**30, prepare_memory_bytes_max=8 * 2**30) as made:
        assert await refusal(made, png(20_000, 20_000), rules=FREE) == (large, "image")
    async with pictures(tmp_path, prepare_memory_bytes_max=512 * MIB, pixels_max=2**30) as made:
        assert await refusal(made, png(12_000, 12_000), rules=FREE) == (large, "image")
        async with sent(made, good, mask=alpha_mask()) as inputs:
            await whole_way(made, inputs, edit())


async def test_a_picture_that_cannot_be_written_in_so_much_memory_is_refused_before_it_is_painted(
    tmp_path: Path,
) -> None:
    async with pictures(tmp_path, prepare_memory_bytes_max=512 * MIB) as made:
        large = encoded(Image.new("L", (3000, 2500)))
        assert await refusal(made, large, rules=FREE, output=OutputPlan("webp")) == ("media_too_large", None)
        async with sent(made, large) as inputs:
            await made.prepare(inputs, edit(rules=FREE, output=OutputPlan("webp", 90)))


async def test_more_pixels_than_an_engine_takes_in_one_request(made: Pictures) -> None:
    wide = ImageRules(edge_max=4096, edge_factor=1, needs_mask=False, images_max=3)
    each = encoded(Image.new("L", (3000, 3000)))
    async with sent(made, each, each) as inputs:
        assert len((await made.prepare(inputs, edit(rules=wide))).data) == 2 * 3 * 9_000_000
    assert await refusal(made, each, each, each, rules=wide) == ("media_too_large", "image")


async def test_an_image_of_25_megapixels(made: Pictures) -> None:
    wide, high, hole = 5000, 5000, (1000, 1000, 1600, 1600)
    smooth = Image.linear_gradient("L").resize((wide, high))
    content = encoded(Image.merge("RGB", (smooth, smooth.transpose(Image.Transpose.ROTATE_90), smooth)), "JPEG")
    task = edit(rules=ImageRules(edge_max=1024, edge_factor=16), output=OutputPlan("jpeg"))
    async with sent(made, content, mask=alpha_mask(hole, wide, high)) as inputs, growth(of_family) as grown:
        ready, painted = await whole_way(made, inputs, task, preview=True)
    print(f"25 megapixels: {grown.bytes / MIB:.0f} MiB more at most, of which the child took nearly all")
    assert (ready.size, painted.size) == (Size(1024, 1024), Size(wide, high))
    assert shown(painted).getpixel((1300, 1300))[2] > 200  # type: ignore[index]
    assert grown.bytes < 512 * MIB


async def test_files_of_the_project_and_data_urls(tmp_path: Path) -> None:
    content, settings, clock = encoded(noise()), Settings(data_dir=tmp_path), SystemClock()
    database = await Database.open(settings)
    await KeyStore(database, clock).get_or_create_project(DEFAULT_PROJECT)
    files, blobs = FileStore(database, clock), open_blobs(settings)
    begun = await files.begin(DEFAULT_PROJECT, "a.png", "vision")
    await blobs.put(begun.blob_key, content)
    async with database.begin() as transaction:
        file = await files.finish(transaction, begun, len(content), hashlib.sha256(content).hexdigest())
    await database.close()
    images = (
        ImageRef("images[0].file_id", file_id=file.id),
        ImageRef("images[1].image_url", url=data_url(content, "webp")),
    )
    task = edit(images=images, mask=ImageRef("mask.image_url", url=data_url(alpha_mask())))
    async with pictures(tmp_path, image_bytes_max=len(content)) as made:
        async with made.fetched(Inputs(), task, DEFAULT_PROJECT) as inputs:
            ready, painted = await whole_way(made, inputs, task)
            only_the_hole_is_blue(noise(), shown(painted))
            assert len(ready.image_sizes) == 2
        async with sent(made, content) as came:  # an image that came, and a mask that it names
            named = edit(mask=task.mask)
            async with made.fetched(came, named, DEFAULT_PROJECT) as inputs:
                assert (await whole_way(made, inputs, named))[0].has_mask
        for ref, expected in (
            (ImageRef("images[0].file_id", file_id="file_0"), (NotFound, "images[0].file_id")),
            (
                ImageRef("images[0].image_url", url="data:text/html;base64,AAAA"),
                (InvalidRequest, "images[0].image_url"),
            ),
            (ImageRef("images[0].image_url", url="data:image/png;base64,A"), (InvalidRequest, "images[0].image_url")),
            (
                ImageRef("images[0].image_url", url=data_url(content + b"x")),
                (PayloadTooLarge, "images[0].image_url"),
            ),
        ):
            assert await not_fetched(made, edit(images=(ref,))) == expected
        assert (await not_fetched(made, edit(images=images[:1]), "another"))[0] is NotFound
    async with pictures(tmp_path, image_bytes_max=len(content) - 1) as made:
        assert await not_fetched(made, edit(images=images[:1])) == (PayloadTooLarge, "images[0].file_id")
    async with pictures(tmp_path, request_bytes_max=2 * len(content) - 1) as made:
        assert await not_fetched(made, edit(images=images)) == (PayloadTooLarge, "images[1].image_url")


async def not_fetched(
    room: Pictures, task: ImageTask, project: str = DEFAULT_PROJECT
) -> tuple[type[ForebayError], str | None]:
    with pytest.raises(ForebayError) as refused:
        async with room.fetched(Inputs(), task, project):
            pass
    return type(refused.value), refused.value.param


async def test_addresses(tmp_path: Path) -> None:
    async with serve(encoded(noise())) as server:
        ref = ImageRef("images[0].image_url", url=f"{server.url}/a.png")
        task = edit(images=(ref,), mask=ImageRef("mask.image_url", url=data_url(alpha_mask())))
        for hosts in ((), ("images.example.com",)):
            async with pictures(tmp_path, fetching=MediaSettings(fetch_hosts=hosts)) as made:
                with pytest.raises(InvalidRequest) as refused:
                    made.check(ref)
                assert (refused.value.code, refused.value.param) == ("url_not_allowed", ref.param)
                assert await not_fetched(made, task) == (InvalidRequest, ref.param)
        assert not server.requests
        async with pictures(tmp_path, fetching=MediaSettings(fetch_hosts=("127.0.0.1",))) as made:
            made.check(ref)
            async with made.fetched(Inputs(), task, "p") as inputs:
                only_the_hole_is_blue(noise(), shown((await whole_way(made, inputs, task))[1]))
            inside = ImageRef("mask.image_url", url="http://169.254.169.254/latest/meta-data")
            with pytest.raises(InvalidRequest):
                made.check(inside)
            assert await not_fetched(made, edit(images=task.images, mask=inside)) == (InvalidRequest, inside.param)
            server.redirect_to = "http://169.254.169.254/"
            assert await not_fetched(made, task) == (InvalidRequest, ref.param)
            server.redirect_to, server.status = None, 503
            assert await not_fetched(made, task) == (Unreachable, ref.param)
            server.status, server.cut_after = None, 1000
            assert await not_fetched(made, task) == (Unreachable, ref.param)
        async with pictures(tmp_path, fetching=MediaSettings(fetch_hosts=("*",)), image_bytes_max=4000) as made:
            server.cut_after = None
            assert await not_fetched(made, task) == (PayloadTooLarge, ref.param)
    assert list((tmp_path / "pictures").iterdir()) == []


@cache
def slow_files() -> tuple[bytes, bytes]:
    side = 4900
    return picture(side, side, kind="WEBP", lossless=True), alpha_mask((0, 0, 4000, 4000), side, side)


@asynccontextmanager
async def slow(room: Pictures) -> AsyncIterator[tuple[Inputs, ImageTask]]:
    """What takes a second or more to work on."""
    content, mask = slow_files()
    async with sent(room, content, mask=mask) as inputs:
        rules = ImageRules(edge_max=4096, edge_factor=1)
        yield inputs, edit(rules=rules, mask_plan=MaskPlan(feather=60), output=OutputPlan("webp"))


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("part", ["prepare", "finish"])
def test_a_cancel_leaves_nothing(tmp_path: Path, runner: Any, part: str) -> None:
    async def cancelled() -> None:
        async with pictures(tmp_path) as made, slow(made) as (inputs, task):
            files = open_files()
            size = Size(1024, 1024)
            work: Any = (
                made.prepare(inputs, task)
                if part == "prepare"
                else made.finish(inputs, task, size, bytes(3 * size.pixels), preview=True)
            )
            working = asyncio.create_task(work)
            await eventually(
                lambda: len(programs(PROGRAM)) == 2, within_seconds=30, what="a program and its child at work"
            )
            family = programs(PROGRAM)
            working.cancel()
            with pytest.raises(asyncio.CancelledError):
                await working
            await eventually(lambda: not any(lives(each) for each in family), within_seconds=2, what="their end")
            await eventually(lambda: open_files() <= files, within_seconds=2, what="no open files")
            async with sent(made, encoded(noise()), mask=alpha_mask()) as others:
                await whole_way(made, others, edit())

    runner(cancelled())


async def test_cancels_at_any_moment_leave_nothing(tmp_path: Path, prove: bool) -> None:
    chance, large = Random(4), encoded(noise(800, 600))
    mask = alpha_mask(width=800, height=600)
    async with pictures(tmp_path) as made:

        async def work() -> None:
            async with sent(made, large, mask=mask) as inputs:
                await whole_way(made, inputs, edit(), preview=True)

        await work()
        files = open_files()
        for _ in range(200 if prove else 12):
            working = [asyncio.create_task(work()) for _ in range(2)]
            await asyncio.wait(working, timeout=chance.uniform(0, 0.5))
            for each in working:
                each.cancel()
            assert not [each for each in (await asyncio.wait(working))[0] if not each.cancelled() and each.exception()]
        await asyncio.gather(*(work() for _ in range(6)))
        await eventually(
            lambda: len(programs(PROGRAM)) <= 2, within_seconds=3, what="the end of those of the cancelled"
        )
        await eventually(lambda: open_files() <= files + 2, within_seconds=3, what="no open files")
    assert list((tmp_path / "pictures").iterdir()) == []
    assert not programs(PROGRAM)


async def test_a_program_that_is_killed_is_replaced_once(made: Pictures) -> None:
    async with sent(made, encoded(noise()), mask=alpha_mask()) as inputs:
        expected = (await whole_way(made, inputs, edit()))[0]
        (first,) = programs(PROGRAM)
        first.kill()
        first.wait()
        assert await made.prepare(inputs, edit()) == expected
    async with slow(made) as (inputs, task):
        working, killed = asyncio.create_task(made.prepare(inputs, task)), set[int]()
        for _ in range(2):
            program = await eventually(lambda: at_work(PROGRAM, killed), what="a program at work")
            killed.add(program.pid)
            program.kill()
        with pytest.raises(ServerError):
            await working


async def test_a_child_that_dies_was_given_too_much_or_something_broken(made: Pictures) -> None:
    for number, expected in {signal.SIGKILL: "media_too_large", signal.SIGSEGV: "media_invalid"}.items():
        async with slow(made) as (inputs, task):
            working = asyncio.create_task(made.prepare(inputs, task))
            program = await eventually(lambda: at_work(PROGRAM), what="a program at work")
            program.children()[0].send_signal(number)
            with pytest.raises(CallerError) as refused:
                await working
            assert refused.value.code == expected


async def test_the_end_of_the_server_ends_the_work(tmp_path: Path) -> None:
    async with pictures(tmp_path) as made, slow(made) as (inputs, task):
        working = asyncio.create_task(made.prepare(inputs, task))
        await eventually(lambda: at_work(PROGRAM), what="a program at work")
        await made.close()
        with pytest.raises(ShuttingDown):
            await working
        assert not programs(PROGRAM)


async def test_a_disk_without_room(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    async with pictures(tmp_path) as made, sent(made, encoded(noise()), mask=alpha_mask()) as inputs:
        await made.prepare(inputs, edit())
        made._files._free_bytes_min = 2 * free
        with pytest.raises(InsufficientStorage):
            await made.prepare(inputs, edit())
        with pytest.raises(InsufficientStorage):
            async with sent(made, encoded(noise())):
                await made.prepare(Inputs(), edit())
        made._files._free_bytes_min = 0


async def test_batches_leave_a_place_to_the_front_door(tmp_path: Path) -> None:
    async with (
        pictures(tmp_path, prepares_at_once=2) as made,
        sent(made, encoded(noise()), mask=alpha_mask()) as inputs,
    ):
        expected = await made.prepare(inputs, edit())  # a program is there
        (program,) = programs(PROGRAM)
        program.suspend()
        lines = [asyncio.create_task(made.prepare(inputs, edit(), patient=True)) for _ in range(5)]
        await eventually(lambda: len(made._editor._programs.busy) == 1, what="a line at work")
        assert await asyncio.wait_for(made.prepare(inputs, edit()), 20) == expected
        assert len(programs(PROGRAM)) == 2
        assert not any(each.done() for each in lines)
        program.resume()
        assert await asyncio.gather(*lines) == [expected] * 5


async def test_many_at_once_share_few_programs(tmp_path: Path) -> None:
    async with pictures(tmp_path, prepares_at_once=2) as made:

        async def one(number: int) -> bytes:
            before = noise(seed=number)
            async with sent(made, encoded(before), mask=alpha_mask()) as inputs:
                painted = (await whole_way(made, inputs, edit()))[1]
            only_the_hole_is_blue(before, shown(painted))
            return base64.b64encode(painted.data)

        assert len(set(await asyncio.gather(*(one(number) for number in range(20))))) == 20
        assert len(programs(PROGRAM)) <= 2

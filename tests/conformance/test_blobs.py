"""One suite for blobs, over a local folder and a real S3 endpoint, and what goes wrong with each."""

import asyncio
import errno
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from forebay.blobs.blobs import Blobs, open_blobs, open_objects
from forebay.blobs.local import LocalBlobs
from forebay.config import BlobSettings, FileSettings, IntakeSettings, Settings
from forebay.errors import InsufficientStorage, NotFound, SetupError, StoreUnavailable
from tests.support import s3

MIB = 2**20

WRITE_AND_WAIT = """
import asyncio, sys
from pathlib import Path
from forebay.blobs.blobs import open_blobs
from forebay.config import Settings

async def main():
    blobs = open_blobs(Settings(data_dir=Path(sys.argv[1])))
    async with blobs.write("files/half") as writer:
        await writer.write(bytes(3 * 2**20))
        print("half", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture(params=["local", "s3"])
async def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    blobs = BlobSettings() if request.param == "local" else await s3.settings_for(await s3.new_bucket())
    return Settings(data_dir=tmp_path / "data", blobs=blobs)


@pytest.fixture
async def blobs(settings: Settings) -> Blobs:
    blobs = open_blobs(settings)
    await blobs.check()
    return blobs


@pytest.fixture
async def bucket() -> str:
    return await s3.new_bucket()


@pytest.fixture
async def proxy() -> AsyncIterator[s3.Proxy]:
    async with s3.proxy() as stands:
        yield stands


async def keys_of(blobs: Blobs, prefix: str = "") -> list[str]:
    return sorted([key async for key in blobs.list(prefix)])


async def whole(stream: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in stream])


async def until_half(blobs: Blobs, key: str, half_written: asyncio.Event) -> None:
    async with blobs.write(key) as writer:
        for _ in range(20):
            await writer.write(os.urandom(MIB))
        half_written.set()
        await asyncio.Event().wait()


def leftovers(settings: Settings) -> list[Path]:
    """Files in the data folder that are no blob."""
    return [path for path in settings.data_dir.rglob("*") if path.is_file() and ".partial" in path.parts]


@pytest.mark.parametrize("size", [0, 1, 65_537, 3 * MIB])
async def test_what_is_put_is_read_again(blobs: Blobs, size: int) -> None:
    data = os.urandom(size)
    await blobs.put("files/one", data)
    assert await blobs.read("files/one") == data
    assert await whole(blobs.stream("files/one")) == data
    assert await blobs.size("files/one") == size


@pytest.mark.parametrize("pieces", [[], [1], [MIB] * 3, [8 * MIB, 1], [5 * MIB] * 5])
async def test_what_is_written_in_pieces_is_one_blob(blobs: Blobs, pieces: list[int]) -> None:
    data = [os.urandom(size) for size in pieces]
    async with blobs.write("files/one") as writer:
        for piece in data:
            await writer.write(piece)
    assert await blobs.read("files/one") == b"".join(data)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 10), (5, None), (99, 1), (99, 50), (100, 1), (100, None), (500, 7), (0, 0), (3, 0)]
)
async def test_a_part_of_a_blob(blobs: Blobs, offset: int, length: int | None) -> None:
    data = bytes(range(100))
    await blobs.put("files/one", data)
    wanted = data[offset:] if length is None else data[offset : offset + length]
    assert await blobs.read("files/one", offset, length) == wanted
    assert await whole(blobs.stream("files/one", offset, length)) == wanted


async def test_a_stream_comes_in_bounded_pieces(blobs: Blobs) -> None:
    data = os.urandom(11 * MIB)
    await blobs.put("files/one", data)
    pieces = [piece async for piece in blobs.stream("files/one", 7)]
    assert b"".join(pieces) == data[7:]
    assert max(len(piece) for piece in pieces) <= 4 * MIB


async def test_what_is_not_there_is_not_found(blobs: Blobs) -> None:
    for reading in (blobs.read("files/no"), blobs.read("files/no", 3, 4), blobs.size("files/no")):
        with pytest.raises(NotFound):
            await reading
    with pytest.raises(NotFound):
        await whole(blobs.stream("files/no"))
    await blobs.delete("files/no")
    assert await blobs.delete_prefix("nothing/here/") == 0
    assert await keys_of(blobs, "nothing/") == []


async def test_delete_and_list(blobs: Blobs) -> None:
    names = ["files/a", "segments/b1/0001", "segments/b1/0002", "segments/b10/0001", "segments/b2/x/y"]
    for name in names:
        await blobs.put(name, name.encode())
    assert await keys_of(blobs) == names
    assert await keys_of(blobs, "segments/b1/") == names[1:3]
    assert await blobs.delete_prefix("segments/b1/") == 2
    assert await keys_of(blobs, "segments/") == names[3:]
    await blobs.delete("files/a")
    assert await keys_of(blobs, "files/") == []
    await blobs.put("segments/b1/0003", b"again")
    assert await keys_of(blobs, "segments/b1/") == ["segments/b1/0003"]


async def test_more_blobs_than_a_page_are_listed_and_removed(blobs: Blobs) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(1100):
            group.create_task(blobs.put(f"many/{number}", b"x"))
    assert len(await keys_of(blobs, "many/")) == 1100
    assert await blobs.delete_prefix("many/") == 1100
    assert await keys_of(blobs) == []


async def test_a_blob_is_replaced_whole(blobs: Blobs) -> None:
    await blobs.put("files/one", b"long long ago")
    await blobs.put("files/one", b"now")
    assert await blobs.read("files/one") == b"now"


async def test_what_is_read_is_never_of_two_blobs(blobs: Blobs) -> None:
    """One that is replaced while it is read: the old one to its end, or nothing that could be taken for a blob."""
    await blobs.put("files/a", b"old" * 3 * MIB)
    stream, read = blobs.stream("files/a"), b""
    try:
        async for piece in stream:
            if not read:
                await blobs.put("files/a", b"new" * 3 * MIB)
            read += piece
    except StoreUnavailable:
        return
    assert read == b"old" * 3 * MIB


async def test_a_write_that_raises_leaves_nothing(blobs: Blobs, settings: Settings) -> None:
    with pytest.raises(ZeroDivisionError):
        async with blobs.write("files/one") as writer:
            for _ in range(20):
                await writer.write(os.urandom(MIB))
            raise ZeroDivisionError
    assert await keys_of(blobs) == []
    assert leftovers(settings) == []
    if settings.blobs.url:
        assert await s3.multipart_uploads(settings.blobs.url.split("/")[2]) == 0


async def test_a_write_that_is_cancelled_leaves_nothing(blobs: Blobs, settings: Settings) -> None:
    half_written = asyncio.Event()
    writing = asyncio.create_task(until_half(blobs, "files/one", half_written))
    await half_written.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await keys_of(blobs) == []
    assert leftovers(settings) == []
    if settings.blobs.url:
        assert await s3.multipart_uploads(settings.blobs.url.split("/")[2]) == 0


async def test_a_write_is_not_seen_before_it_is_whole(blobs: Blobs) -> None:
    async with blobs.write("files/one") as writer:
        await writer.write(os.urandom(20 * MIB))
        assert await keys_of(blobs) == []
    assert await keys_of(blobs) == ["files/one"]


async def test_many_at_once(blobs: Blobs) -> None:
    contents = {f"files/{number}": os.urandom(100_000 + number) for number in range(40)}

    async def write(key: str, data: bytes) -> None:
        async with blobs.write(key) as writer:
            for start in range(0, len(data), 9_999):
                await writer.write(data[start : start + 9_999])

    async with asyncio.TaskGroup() as group:
        for key, data in contents.items():
            group.create_task(write(key, data))
    for key, data in contents.items():
        assert await blobs.read(key) == data


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".partial/x", "a/.b", "a b", "ä"])
async def test_a_key_that_the_server_did_not_make_is_refused(blobs: Blobs, key: str) -> None:
    with pytest.raises(AssertionError):
        await blobs.read(key)
    with pytest.raises(AssertionError):
        await blobs.put(key, b"")


async def test_a_large_blob_is_never_held_whole(blobs: Blobs) -> None:
    piece, digest, process = os.urandom(MIB), hashlib.sha256(), psutil.Process()
    await blobs.put("files/warm", piece)
    before = highest = process.memory_info().rss
    async with blobs.write("files/large") as writer:
        for _ in range(100):
            await writer.write(piece)
            highest = max(highest, process.memory_info().rss)
    async for part in blobs.stream("files/large"):
        digest.update(part)
        highest = max(highest, process.memory_info().rss)
    assert digest.hexdigest() == hashlib.sha256(piece * 100).hexdigest()
    if isinstance(blobs, LocalBlobs):
        assert highest - before <= 60 * MIB  # the endpoint of the other one keeps blobs in this process


async def test_a_folder_that_cannot_be_written_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("no folder")
    blobs = open_blobs(Settings(blobs=BlobSettings(url=f"file:{tmp_path}/plain/blobs")))
    with pytest.raises(SetupError, match="FOREBAY_BLOBS_URL"):
        await blobs.check()
    with pytest.raises(SetupError, match="absolute path"):
        open_blobs(Settings(blobs=BlobSettings(url="file:relative")))


async def test_a_disk_without_room_is_refused_and_reads_go_on(tmp_path: Path) -> None:
    await open_blobs(Settings(data_dir=tmp_path)).put("files/one", b"before")
    full = open_blobs(Settings(data_dir=tmp_path, files=FileSettings(free_bytes_min=2**60)))
    await full.check()
    with pytest.raises(InsufficientStorage):
        await full.put("files/two", b"x")
    with pytest.raises(InsufficientStorage):
        async with full.write("files/three") as writer:
            await writer.write(b"x")
    assert await full.read("files/one") == b"before"
    assert await keys_of(full) == ["files/one"]


@pytest.mark.parametrize(
    ("call", "number", "error"),
    [
        *[(call, errno.ENOSPC, InsufficientStorage) for call in ("write", "fsync", "mkdir", "rename", "open")],
        ("write", errno.EDQUOT, InsufficientStorage),
        ("write", errno.EIO, StoreUnavailable),
        ("fsync", errno.EIO, StoreUnavailable),
        ("rename", errno.EACCES, StoreUnavailable),
    ],
)
async def test_a_disk_that_fails_at_any_step_leaves_nothing_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, error: type[Exception]
) -> None:
    blobs = open_blobs(Settings(data_dir=tmp_path))
    await blobs.put("files/one", b"before")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(error):
            await blobs.put("segments/new/two", b"x")
        with pytest.raises(error):
            async with blobs.write("segments/new/three") as writer:
                await writer.write(bytes(3 * MIB))
    assert await keys_of(blobs) == ["files/one"]
    assert leftovers(Settings(data_dir=tmp_path)) == []
    await blobs.put("segments/new/two", b"x")
    assert await blobs.read("segments/new/two") == b"x"


async def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    command = (sys.executable, "-c", WRITE_AND_WAIT, str(tmp_path))
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as dead,
        subprocess.Popen(command, stdout=subprocess.PIPE) as living,
    ):
        for process in (dead, living):
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == b"half\n"
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert len(leftovers(settings)) == 2
        await open_blobs(settings).check()
        assert len(leftovers(settings)) == 1
        living.kill()
    await open_blobs(settings).check()
    assert leftovers(settings) == []


async def test_what_is_put_is_flushed_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    await open_blobs(Settings(data_dir=tmp_path)).put("segments/b1/one", b"x")
    folder = tmp_path / "blobs"
    assert any(path.startswith(str(folder / ".partial")) for path in flushed)
    for made in (tmp_path, folder, folder / "segments", folder / "segments" / "b1"):
        assert str(made) in flushed
    assert flushed[-1] == str(folder / "segments" / "b1")


async def test_a_store_that_refuses_three_in_ten_is_survived(bucket: str, proxy: s3.Proxy) -> None:
    settings = Settings(blobs=await s3.settings_for(bucket, proxy.url, retries_max=12))
    blobs = open_blobs(settings)
    proxy.refuse_share = 0.3
    await blobs.check()
    large = os.urandom(20 * MIB)
    for number in range(20):
        await blobs.put(f"files/{number}", str(number).encode())
    async with blobs.write("files/large") as writer:
        await writer.write(large)
    for number in range(20):
        assert await blobs.read(f"files/{number}") == str(number).encode()
    assert await whole(blobs.stream("files/large")) == large
    assert len(await keys_of(blobs)) == 21
    assert await blobs.delete_prefix("files/") == 21
    assert proxy.refused >= 5


async def test_a_store_that_is_always_unavailable(bucket: str, proxy: s3.Proxy) -> None:
    blobs = open_blobs(Settings(blobs=await s3.settings_for(bucket, proxy.url, retries_max=1)))
    await blobs.put("files/one", b"x")
    proxy.refuse_share = 1.0
    for doing in (blobs.put("files/two", b"x"), blobs.read("files/one"), blobs.delete("files/one"), keys_of(blobs)):
        with pytest.raises(StoreUnavailable):
            await doing
    with pytest.raises(StoreUnavailable):
        async with blobs.write("files/large") as writer:
            for _ in range(60):
                await writer.write(bytes(MIB))
    with pytest.raises(SetupError, match="FOREBAY_BLOBS_ENDPOINT"):
        await blobs.check()
    proxy.refuse_share = 0.0
    assert await keys_of(blobs) == ["files/one"]


async def test_a_store_that_falls_silent_is_given_up_in_time(bucket: str, proxy: s3.Proxy) -> None:
    blobs = open_blobs(Settings(blobs=await s3.settings_for(bucket, proxy.url, retries_max=0, timeout_seconds=0.5)))
    patient = open_blobs(Settings(blobs=await s3.settings_for(bucket, proxy.url)))
    await patient.put("files/one", b"x")
    proxy.silent = True
    async with asyncio.timeout(10):
        for doing in (blobs.put("files/two", b"x"), blobs.read("files/one"), blobs.delete("files/one"), keys_of(blobs)):
            with pytest.raises(StoreUnavailable):
                await doing
        with pytest.raises(StoreUnavailable):
            async with blobs.write("files/large") as writer:
                for _ in range(60):
                    await writer.write(bytes(MIB))
    proxy.silent = False
    assert await patient.read("files/one") == b"x"


async def test_a_store_without_room(bucket: str, proxy: s3.Proxy) -> None:
    blobs = open_blobs(Settings(blobs=await s3.settings_for(bucket, proxy.url, retries_max=0)))
    await blobs.put("files/one", b"x")
    proxy.full = True
    with pytest.raises(InsufficientStorage):
        await blobs.put("files/two", b"x")
    with pytest.raises(InsufficientStorage):
        async with blobs.write("files/large") as writer:
            for _ in range(60):
                await writer.write(bytes(MIB))
    assert await blobs.read("files/one") == b"x"
    proxy.full = False


async def test_a_bucket_that_is_not_there_stops_the_start(bucket: str) -> None:
    settings = await s3.settings_for("no-such-bucket")
    with pytest.raises(SetupError, match="FOREBAY_BLOBS_URL"):
        await open_blobs(Settings(blobs=settings)).check()
    secret = SecretStr("x")
    gone = BlobSettings(
        url=f"s3://{bucket}", endpoint="http://127.0.0.1:1", region="x", access_key_id="x", secret_access_key=secret,
        allow_http=True, retries_max=0,
    )  # fmt: skip
    with pytest.raises(SetupError, match="FOREBAY_BLOBS_ENDPOINT"):
        await open_blobs(Settings(blobs=gone)).check()


@pytest.fixture(params=["local", "s3"])
async def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """The store that others fill, with a folder or a bucket."""
    if request.param == "local":
        intake = IntakeSettings(url=f"file:{tmp_path / 'inbox'}")
    else:
        intake = IntakeSettings(**(await s3.settings_for(await s3.new_bucket())).model_dump())
    store = open_objects(Settings(data_dir=tmp_path / "data", intake=intake))
    assert store is not None
    await store.check()
    return store


@pytest.mark.parametrize("name", ["a.jpg", "Fotos 2026/ä/IMG (1).JPG", "日本/é%2f#?.jpg", "x*~[]{}^`'\"<>|:;,/y z"])
async def test_objects_have_the_names_of_others_and_are_written_over(objects: Blobs, name: str) -> None:
    with pytest.raises(NotFound):
        await objects.size(name)
    for data in (os.urandom(6 * MIB), b"small"):
        async with objects.write(name) as writer:
            await writer.write(data)
        assert await whole(objects.stream(name)) == data
        assert (await objects.read(name), await objects.size(name)) == (data, len(data))


async def test_what_is_in_a_folder_and_no_file_is_no_object(tmp_path: Path) -> None:
    store = open_objects(Settings(data_dir=tmp_path, intake=IntakeSettings(url=f"file:{tmp_path / 'inbox'}")))
    assert store is not None
    await store.check()
    await store.put("file/inside", b"x")
    os.mkfifo(tmp_path / "inbox" / "pipe")
    for name in ("file", "pipe", "file/inside/further"):
        with pytest.raises(NotFound):
            await store.size(name)
        with pytest.raises(NotFound):
            await whole(store.stream(name))
    for name in ("file", "file/inside/further"):
        with pytest.raises(NotFound):
            await store.put(name, b"y")
    assert await store.read("file/inside") == b"x"


async def test_results_in_a_folder_are_not_for_this_server_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        settings = Settings(data_dir=tmp_path / "data", intake=IntakeSettings(url=f"file:{tmp_path / 'inbox'}"))
        objects, blobs = open_objects(settings), open_blobs(settings)
        assert objects is not None
        for store in (objects, blobs):
            await store.put("new/result", b"x")
    finally:
        os.umask(before)
    modes = [
        (tmp_path / folder / "new" / name).stat().st_mode & 0o777
        for folder in ("inbox", "data/blobs")
        for name in ("", "result")
    ]
    assert modes == [0o755, 0o644, 0o700, 0o600]

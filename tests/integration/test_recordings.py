"""Recordings on their way to an engine: where they come from, what is decoded of them, and what is left behind."""

import asyncio
import base64
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import wave
from array import array
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import uvloop

from forebay.blobs.blobs import open_blobs
from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.dialects.speech import AudioRef
from forebay.errors import (
    ForebayError,
    InsufficientStorage,
    InvalidRequest,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    ServerError,
    ShuttingDown,
    Unreachable,
)
from forebay.media.recordings import Recordings
from forebay.store.database import Database
from forebay.store.files import FileStore
from forebay.store.keys import DEFAULT_PROJECT, KeyStore
from tests.support.bad_media import wav
from tests.support.encoded import KINDS, hum
from tests.support.listening import recordings, samples
from tests.support.memory import growth, of_family
from tests.support.ogg_opus import opus_of
from tests.support.processes import at_work, lives, open_files, programs
from tests.support.receiver import Answer, receiving
from tests.support.server import eventually
from tests.support.speech import sample_wav

MIB = 2**20
PROGRAM = "forebay.engines.audio_decode"
HOUR = 3600
TONE = 440
LEFT_BEHIND = """
import asyncio, sys
from pathlib import Path
from tests.support.listening import recordings
from tests.support.ogg_opus import opus_of

async def main() -> None:
    async with recordings(Path(sys.argv[1])) as made, made.spool() as spool:
        await spool.write(opus_of(6 * 3600, 1))
        async with made.decode(spool, on_progress=lambda percent: print(percent, flush=True)):
            pass

asyncio.run(main())
"""
FENCED = """
import ctypes, os, socket, sys, tempfile
from forebay.engines import audio_decode as program, fence
program._warm_up()
out = tempfile.TemporaryFile()
source = open(sys.argv[1], "rb")
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
work = program.Work(source.fileno(), out.fileno(), 16_000)
fence.close(program.cost(work, program.Limits(512 * 2**20, 5)), ctypes.CDLL(None))
reached = []
for name, attempt in {
    "file": lambda: open("/etc/hostname"),
    "socket": lambda: socket.socket(),
    "memory": lambda: bytearray(2**30),
    "process": lambda: os._exit(1) if os.fork() == 0 else None,
    "program": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "disk": lambda: os.pwrite(out.fileno(), bytes(1), 4 * 16_000 + 1),
}.items():
    try:
        attempt()
        reached.append(name)
    except (OSError, MemoryError):
        pass
sink = program.Sink(out.fileno(), 16_000)
program.Decoding(program.Source(source.fileno()), sink, lambda percent: None).run()
print(reached, sink.samples)
"""


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Recordings]:
    async with recordings(tmp_path) as one:
        yield one
        assert list((tmp_path / "audio").iterdir()) == []


async def refusal(recordings: Recordings, content: bytes) -> ForebayError:
    with pytest.raises(ForebayError) as refused:
        await samples(recordings, content)
    return refused.value


async def fetched(recordings: Recordings, ref: AudioRef, project: str = DEFAULT_PROJECT) -> bytes:
    """What lies in the spool."""
    async with recordings.spool() as spool:
        await recordings.fetch(spool, ref, project)
        return b"".join([piece async for piece in spool.pieces()])


async def not_fetched(recordings: Recordings, ref: AudioRef) -> tuple[type[ForebayError], str]:
    with pytest.raises(ForebayError) as refused:
        await fetched(recordings, ref)
    return type(refused.value), refused.value.code


def data_url(content: bytes, head: str = "audio/wav") -> AudioRef:
    return AudioRef(url=f"data:{head};base64,{base64.b64encode(content).decode()}")


async def test_what_is_mono_and_16_khz_already_comes_out_as_it_went_in(made: Recordings) -> None:
    with wave.open(str(sample_wav())) as file:
        expected = file.readframes(file.getnframes())
    async with made.spool() as spool:
        await spool.write(sample_wav().read_bytes())
        async with made.decode(spool) as recording:
            assert (recording.samples, recording.seconds) == (480_000, 30.0)
            assert await recording.read(0, 480_000) == expected
            assert await recording.read(16_000, 100) == expected[32_000:32_200]
            assert await recording.read(479_990, 100) == expected[-20:]
            assert await recording.read(480_000, 100) == b""


async def test_the_sound_of_every_kind_of_file(made: Recordings) -> None:
    for kind in KINDS:
        heard = array("h", await samples(made, hum(kind)))
        assert 1.95 <= len(heard) / 16_000 <= 2.1, kind
        middle = heard[8_000:24_000]
        crossings = sum((one < 0) != (other < 0) for one, other in pairwise(middle))
        assert abs(crossings / 2 - TONE) <= 5, kind
        assert 4000 <= max(middle) <= 11_000, kind


async def test_channels_count_alike(made: Recordings) -> None:
    for channels in (2, 3, 6, 8, 12, 64):
        content = array("h", [9600 if number % channels == 0 else 0 for number in range(1600 * channels)])
        heard = array("h", await samples(made, wav(channels=channels, content=content.tobytes())))
        assert len(heard) == 1600
        assert abs(heard[800] - 9600 / channels) <= 1, channels


async def test_the_shortest_recordings(made: Recordings) -> None:
    assert await samples(made, wav(content=b"\x01\x02")) == b"\x01\x02"
    assert len(await samples(made, wav(rate=44_100, content=b"\x01\x02"))) == 2


async def test_names_and_titles_in_any_alphabet_and_none(made: Recordings) -> None:
    tagged = hum("mp3").replace(b"Lavf", b"\xff\xfe\xff\xff", 1)
    assert tagged != hum("mp3")
    assert len(await samples(made, tagged)) == len(await samples(made, hum("mp3")))


async def test_a_short_recording_is_decoded_at_once_by_a_program_that_is_warm(made: Recordings) -> None:
    content, took = sample_wav().read_bytes(), []
    for _ in range(6):
        started = time.perf_counter()
        await samples(made, content)
        took.append(time.perf_counter() - started)
    print(f"30 s: first {took[0] * 1000:.0f} ms, then {min(took[1:]) * 1000:.0f} ms at best")
    assert min(took[1:]) < 0.15
    assert len(programs(PROGRAM)) == 1


async def test_a_file_has_no_name_and_nothing_stays_open(tmp_path: Path) -> None:
    async with recordings(tmp_path) as made:
        before = None
        for _ in range(3):
            async with made.spool() as spool:
                await spool.write(hum("mp3"))
                async with made.decode(spool) as recording:
                    assert recording.samples
                    assert list((tmp_path / "audio").iterdir()) == []
            before = before or open_files()
        assert open_files() == before
        assert (tmp_path / "audio").stat().st_mode & 0o777 == 0o700


async def test_what_a_crash_left_is_gone_at_the_next_start(tmp_path: Path) -> None:
    left = tmp_path / "audio"
    left.mkdir(mode=0o755)
    (left / "part_0").write_bytes(b"private")
    (left / "folder").mkdir()
    async with recordings(tmp_path):
        assert list(left.iterdir()) == []
        assert left.stat().st_mode & 0o777 == 0o700


async def test_a_process_that_is_killed_leaves_no_file_and_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEFT_BEHIND, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        await asyncio.to_thread(process.stdout.readline)  # it decodes
        family = programs(PROGRAM, psutil.Process(process.pid))
        assert len(family) == 2, "the program and its child"
        process.kill()
    await eventually(lambda: not any(lives(each) for each in family), within_seconds=2, what="the end of the decoding")
    assert list((tmp_path / "audio").iterdir()) == []


async def test_a_long_recording_is_a_stream(tmp_path: Path, prove: bool) -> None:
    percents: list[float] = []
    seconds = HOUR if prove else HOUR // 4
    content = opus_of(seconds, 1)
    async with recordings(tmp_path) as made, made.spool() as spool:
        await samples(made, hum("opus"))
        await spool.write(content)
        await spool.flush()
        async with growth(of_family) as grown, made.decode(spool, on_progress=percents.append) as recording:
            assert abs(recording.seconds - seconds) < 1
    print(f"{seconds} s of Opus: {grown.bytes / MIB:.0f} MiB more at most, {len(percents)} times told")
    assert grown.bytes < 64 * MIB
    assert percents == sorted(percents)
    assert len(percents) > 20
    assert 0 <= percents[0] < percents[-1] < 100


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_a_cancel_ends_the_decoding_within_two_seconds(tmp_path: Path, runner: object) -> None:
    async def cancelled() -> None:
        async with recordings(tmp_path) as made:
            files = open_files()
            begun = asyncio.Event()
            decoding = asyncio.create_task(samples(made, opus_of(6 * HOUR, 1), on_progress=lambda _: begun.set()))
            await begun.wait()
            family = programs(PROGRAM)
            assert len(family) == 2
            decoding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await decoding
            await eventually(lambda: not any(lives(each) for each in family), within_seconds=2, what="its end")
            await eventually(lambda: open_files() <= files, within_seconds=2, what="no open files")
            assert len(await samples(made, hum("mp3"))) == 64_000

    runner(cancelled())  # type: ignore[operator]


async def test_cancels_at_any_moment_leave_nothing(tmp_path: Path, prove: bool) -> None:
    async with recordings(tmp_path) as made:
        content = opus_of(120, 1)
        await samples(made, hum("mp3"))
        files = open_files()
        for number in range(200 if prove else 15):
            decoding = asyncio.create_task(samples(made, content))
            await asyncio.wait([decoding], timeout=number % 25 * 0.02)
            decoding.cancel()
            await asyncio.wait([decoding])
        await eventually(
            lambda: len(programs(PROGRAM)) <= 1, within_seconds=3, what="the end of those that were cancelled"
        )
        await samples(made, hum("mp3"))
        await eventually(lambda: open_files() <= files + 1, within_seconds=3, what="no open files")
    assert list((tmp_path / "audio").iterdir()) == []
    assert not programs(PROGRAM)


async def test_a_program_that_is_killed_is_replaced_once(made: Recordings) -> None:
    await samples(made, hum("mp3"))
    (first,) = programs(PROGRAM)
    first.kill()
    first.wait()
    assert len(await samples(made, hum("mp3"))) == 64_000
    decoding, killed = asyncio.create_task(samples(made, opus_of(HOUR, 1))), set[int]()
    for _ in range(2):
        program = await eventually(lambda: at_work(PROGRAM, killed), what="a program at work")
        killed.add(program.pid)
        program.kill()
    with pytest.raises(ServerError):
        await decoding
    assert len(await samples(made, hum("mp3"))) == 64_000


async def test_a_child_that_dies_was_given_too_much_or_something_broken(made: Recordings) -> None:
    for number, expected in {signal.SIGKILL: "media_too_large", signal.SIGSEGV: "media_invalid"}.items():
        begun = asyncio.Event()
        decoding = asyncio.create_task(samples(made, opus_of(HOUR, 1), on_progress=lambda _, begun=begun: begun.set()))
        await begun.wait()
        program = at_work(PROGRAM)
        assert program
        (child,) = program.children()
        child.send_signal(number)
        with pytest.raises(ForebayError) as refused:
            await decoding
        assert refused.value.code == expected


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_the_end_of_the_server_ends_the_decoding(tmp_path: Path, runner: object) -> None:
    async def ended() -> None:
        begun = asyncio.Event()
        async with recordings(tmp_path) as made:
            decoding = asyncio.create_task(samples(made, opus_of(HOUR, 1), on_progress=lambda _: begun.set()))
            await begun.wait()
        with pytest.raises(ShuttingDown):
            await decoding
        assert not programs(PROGRAM)

    runner(ended())  # type: ignore[operator]


async def test_limits_of_length_time_and_size(tmp_path: Path) -> None:
    async with recordings(tmp_path, seconds_max=10, decode_seconds_max=1, bytes_max=8 * MIB) as made:
        assert len(await samples(made, hum("mp3", 10.0))) == 320_000
        longer = await refusal(made, hum("mp3", 11.0))
        assert (type(longer), longer.code, "10 seconds" in str(longer)) == (PayloadTooLarge, "media_too_large", True)
        with pytest.raises(PayloadTooLarge, match="1 seconds"):
            await samples(made, hum("mp3"), seconds_max=1)
        async with made.spool() as spool:
            await spool.write(bytes(8 * MIB))
            with pytest.raises(PayloadTooLarge) as refused:
                await spool.write(b"x")
            assert refused.value.code == "media_too_large"
    async with recordings(tmp_path, decode_seconds_max=1) as made:
        slow = await refusal(made, opus_of(6 * HOUR, 1))
        assert (type(slow), slow.code, "too much time" in str(slow)) == (PayloadTooLarge, "media_too_large", True)


async def test_a_disk_without_room(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    async with recordings(tmp_path, free_bytes_min=2 * free) as made:
        assert type(await refusal(made, hum("mp3"))) is InsufficientStorage
    async with recordings(tmp_path) as made, made.spool() as spool:
        await spool.write(opus_of(HOUR, 1))
        await spool.flush()
        made._files._free_bytes_min = 2 * free
        with pytest.raises(InsufficientStorage):
            async with made.decode(spool):
                pass
        made._files._free_bytes_min = 0
        await eventually(lambda: not programs(PROGRAM), within_seconds=2, what="the end of the decoding")


async def test_a_disk_that_is_full_to_its_last_byte(tmp_path: Path) -> None:
    disk = tmp_path / "audio"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        async with recordings(tmp_path) as made:
            for content in (wav(content=bytes(3 * MIB)), opus_of(300, 1)):  # full as it is sent, and as it is decoded
                assert type(await refusal(made, content)) is InsufficientStorage
            assert len(await samples(made, hum("mp3"))) == 64_000
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


async def test_few_at_once_and_a_line_that_ends(tmp_path: Path) -> None:
    async with recordings(tmp_path, decodes_at_once=2) as made:
        content, most = opus_of(10, 1), 0
        asked = [asyncio.create_task(samples(made, content)) for _ in range(80)]
        while not all(each.done() for each in asked):
            most = max(most, len(made._decoder._programs.busy))
            await asyncio.wait(asked, timeout=0.01)
        ended = [each.exception() for each in asked]
        refused = [each for each in ended if each is not None]
        assert {type(each) for each in refused} == {Overloaded}
        assert 1 <= len(refused) <= 80 - 64
        assert most == 2


def test_whoever_decodes_opens_and_starts_nothing(tmp_path: Path) -> None:
    """Files, sockets, memory, processes; and it can decode all the same, also as somebody who is not root."""
    short = tmp_path / "short.mp3"
    short.write_bytes(hum("mp3", 0.5))
    short.chmod(0o644)
    ended = subprocess.run([sys.executable, "-c", FENCED, str(short)], check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == "[] 8000"


async def test_data_urls(tmp_path: Path) -> None:
    content = hum("wav", 1.0) * 40  # several pieces
    async with recordings(tmp_path, bytes_max=4 * MIB) as made:
        assert await fetched(made, data_url(content)) == content
        assert await fetched(made, data_url(b"x", "video/webm;codecs=vp8,opus")) == b"x"
        assert await fetched(made, data_url(b"", "audio/mpeg")) == b""
        good = data_url(content).url or ""
        for bad in (
            good[:-1], good + "=", good + "!", good[:-100] + "====" + good[-96:], good.replace("AAAA", "A AA", 1),
            good.replace(";base64", ""), good.replace("audio/wav", "text/html"), good.replace("audio/wav", ""),
            "data:", "data:audio/wav;base64,é", "data:audio/wav;" + "a=b;" * 9 + "base64,", good[:2_000_001] + "=" + good[2_000_002:],
        ):  # fmt: skip
            assert await not_fetched(made, AudioRef(url=bad)) == (InvalidRequest, "media_invalid"), bad[:60]
        assert await not_fetched(made, data_url(bytes(4 * MIB + 1))) == (PayloadTooLarge, "media_too_large")


async def test_uploaded_files_of_the_project_alone(tmp_path: Path) -> None:
    content, settings, clock = hum("wav"), Settings(data_dir=tmp_path), SystemClock()
    database = await Database.open(settings)
    await KeyStore(database, clock).get_or_create_project(DEFAULT_PROJECT)
    files, blobs = FileStore(database, clock), open_blobs(settings)
    begun = await files.begin(DEFAULT_PROJECT, "a.wav", "user_data")
    await blobs.put(begun.blob_key, content)
    async with database.begin() as transaction:
        file = await files.finish(transaction, begun, len(content), hashlib.sha256(content).hexdigest())
    async with recordings(tmp_path) as made:
        assert await fetched(made, AudioRef(file_id=file.id)) == content
        assert await not_fetched(made, AudioRef(file_id="file_0")) == (NotFound, "not_found")
        with pytest.raises(NotFound):
            await fetched(made, AudioRef(file_id=file.id), "another")
    async with recordings(tmp_path, bytes_max=len(content) - 1) as made:
        assert await not_fetched(made, AudioRef(file_id=file.id)) == (PayloadTooLarge, "media_too_large")
    await database.close()


async def test_addresses(tmp_path: Path) -> None:
    async with receiving() as receiver:
        ref, content = AudioRef(url=f"{receiver.url}/a.wav"), hum("wav")
        async with recordings(tmp_path) as made:
            assert await not_fetched(made, ref) == (InvalidRequest, "url_not_allowed")
        async with recordings(tmp_path, fetch_hosts=("audio.example.com",)) as made:
            assert await not_fetched(made, ref) == (InvalidRequest, "url_not_allowed")
        assert not receiver.received
        async with recordings(tmp_path, fetch_hosts=("127.0.0.1",), bytes_max=MIB) as made:
            receiver.answers.append(Answer(body=content))
            assert await fetched(made, ref) == content
            for status, expected in {
                404: (InvalidRequest, "media_invalid"),
                302: (InvalidRequest, "media_invalid"),
                206: (InvalidRequest, "media_invalid"),
                429: (Unreachable, "url_unreachable"),
                500: (Unreachable, "url_unreachable"),
            }.items():
                receiver.answers.append(Answer(status, {"location": "/b.wav"}))
                assert await not_fetched(made, ref) == expected
            receiver.answers.extend([Answer(drop=True)] * 2)  # a request that was never answered is sent once more
            assert (await not_fetched(made, ref))[0] is Unreachable
            receiver.answers.append(Answer(endless=True))
            assert await not_fetched(made, ref) == (PayloadTooLarge, "media_too_large")
            await asyncio.wait_for(receiver.left.wait(), 5)
            assert receiver.sent_bytes < 32 * MIB
            for url in ("file:///etc/hostname", "/etc/hostname", "ftp://127.0.0.1/", "", "http://169.254.169.254/"):
                assert (await not_fetched(made, AudioRef(url=url))) == (InvalidRequest, "url_not_allowed"), url
        async with recordings(tmp_path, fetch_hosts=("*",), fetch_timeout_seconds=0.5) as made:
            receiver.answers.append(Answer(stalls=True))
            assert await not_fetched(made, ref) == (Unreachable, "url_unreachable")
    assert list((tmp_path / "audio").iterdir()) == []

"""Two hundred files that are no recordings or bad ones: each a clear refusal or what could be heard, and nothing else touched."""

import asyncio
import subprocess
import sys
import wave
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from forebay.errors import CallerError
from forebay.media.recordings import Recordings
from tests.support.bad_media import bad_media, nothing, pointing, silent
from tests.support.encoded import hum
from tests.support.listening import recordings, samples
from tests.support.memory import growth, of_family
from tests.support.ogg_opus import opus_of
from tests.support.processes import command_line, lives
from tests.support.receiver import canary
from tests.support.server import eventually

SEED = 20_261_121
MIB = 2**20
PROGRAM = "forebay.engines.audio_decode"
SECRET = b"\x5e\xc7" * 8000  # as samples: a sound that no other file has
CODES = {"media_invalid", "media_too_large"}
OPENED = "openat(", "open(", "connect(", "socket("


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Recordings]:
    async with recordings(tmp_path) as one:
        yield one
    assert list((tmp_path / "audio").iterdir()) == []
    assert not _programs()


@pytest.fixture
def secret(tmp_path: Path) -> str:
    """A recording that nobody has sent."""
    path = tmp_path / "secret.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(SECRET)
    return str(path)


def _programs() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if PROGRAM in command_line(each) and lives(each)]


async def _came_of(made: Recordings, content: bytes) -> tuple[str, bytes]:
    """`decoded` or the code of the refusal, and the samples."""
    try:
        return "decoded", await samples(made, content)
    except CallerError as error:
        assert error.code in CODES, error
        assert "recording" in str(error)
        assert error.status in {400, 413}
        return error.code, b""


async def test_two_hundred_bad_files(made: Recordings, secret: str) -> None:
    async with canary() as bird:
        bad = list(bad_media(f"http://127.0.0.1:{bird.port}/a.wav", secret, SEED))
        assert len(bad) >= 200
        await samples(made, hum("mp3"))
        came: dict[str, int] = {}
        async with growth(of_family) as grown:
            for name, content in bad:
                async with asyncio.timeout(20):
                    verdict, heard = await _came_of(made, content)
                came[verdict] = came.get(verdict, 0) + 1
                assert SECRET[:64] not in heard, name
                assert len(heard) <= 600 * 32_000, name
        assert bird.connections == 0
    print(f"{len(bad)} files: {came}, {grown.bytes / MIB:.0f} MiB more at most")
    assert set(came) == {"decoded", *CODES}
    assert came["media_invalid"] >= 80
    assert grown.bytes <= 512 * MIB
    assert len(await samples(made, hum("mp3"))) == 64_000
    assert len(_programs()) == 1, "no program had to be replaced"


async def test_hours_in_few_bytes(tmp_path: Path, prove: bool) -> None:
    """8.7 hours of Opus in 25 MB; by default only the first of them are decoded, with a limit that is lower."""
    bomb = opus_of(8.7 * 3600)
    assert 24_000_000 < len(bomb) < 25_000_000
    settings = {} if prove else {"seconds_max": 600}
    async with recordings(tmp_path, **settings) as made:
        await samples(made, hum("mp3"))
        async with growth(of_family) as grown:
            assert (await _came_of(made, bomb))[0] == "media_too_large"
    print(f"{grown.bytes / MIB:.0f} MiB more at most")
    assert grown.bytes <= 128 * MIB


async def test_files_without_anything_to_hear_say_so(made: Recordings) -> None:
    for _, content in silent():
        with pytest.raises(CallerError, match=r"no sound|damaged"):
            await samples(made, content)
    for name, content in nothing(SEED):
        assert (await _came_of(made, content))[0] == "media_invalid", name


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux is asked what was opened")
async def test_nothing_that_a_recording_points_at_is_even_tried(made: Recordings, secret: str, tmp_path: Path) -> None:
    """Not that the attempt fails: none is made. The kernel would refuse it with `too many open files`."""
    if subprocess.run(["sh", "-c", "command -v strace"], capture_output=True, check=False).returncode:
        pytest.skip("there is no strace")
    await samples(made, hum("mp3"))
    (program,) = _programs()
    report = tmp_path / "calls"
    command = ["strace", "-f", "-e", "trace=open,openat,connect,socket", "-o", str(report), "-p", str(program.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
        assert tracer.stderr
        await asyncio.to_thread(tracer.stderr.readline)
        for _, content in pointing("http://127.0.0.1:1/a.wav", secret):
            await _came_of(made, content)
        tracer.terminate()
    calls = [line for line in report.read_text().splitlines() if any(each in line for each in OPENED)]
    assert calls, "each child opens the null device, before its fence is up"
    assert [line for line in calls if "/dev/null" not in line] == []
    await eventually(lambda: len(_programs()) == 1, what="the program alone")

"""Hours of speech as one job: bounded memory, progress that moves, and the same text whoever is killed on the way."""

import asyncio
import os
import signal
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import av
import psutil
import pytest

from tests.support.jobs import job_of, progress_of, result, until_at
from tests.support.models import whisper_tiny
from tests.support.processes import GONE
from tests.support.server import Server, eventually, serving
from tests.support.speech import SAMPLE_SECONDS, sample_wav
from tests.support.transcriptions import handed_in, text_of, until_nothing_is_left

CONFIG = f"""
default_models = false
[supervisor]
backoff_seconds_min = 0.1
[models.whisper]
engine = "whisper"
source = "file:{whisper_tiny() / "model.bin"}"
preload = true
"""
HOURS = 3.0
RSS_MAX = 1.5e9
STANDSTILL_SECONDS = 240.0  # a stretch on a machine that does much else
JSON_LOG = {"FOREBAY_LOG_FORMAT": "json"}


def opus(path: Path, seconds: float) -> bytes:
    """The sample again and again, as Opus."""
    with wave.open(str(sample_wav())) as sound:
        samples = sound.readframes(sound.getnframes())
    with av.open(str(path), "w", format="ogg") as container:
        stream = container.add_stream("libopus", rate=16_000, layout="mono")
        stream.bit_rate = 24_000
        for _ in range(round(seconds / SAMPLE_SECONDS)):
            frame = av.AudioFrame(format="s16", layout="mono", samples=len(samples) // 2)
            frame.sample_rate = 16_000
            frame.planes[0].update(samples)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


@asynccontextmanager
async def peak_of(server: Server) -> AsyncIterator[list[int]]:
    """The most memory that the server and all its programs have taken together while the block lasts."""
    found = [0]

    async def look() -> None:
        while True:
            found[0] = max(found[0], sum(map(rss, [psutil.Process(server.pid), *server.family()])))
            await asyncio.sleep(0.2)

    looking = asyncio.create_task(look())
    try:
        yield found
    finally:
        looking.cancel()


def rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except GONE:
        return 0


async def moving(server: Server, job_id: str) -> float:
    """Follow a job to its end; the longest time in which it did not move."""
    clock = asyncio.get_running_loop().time
    longest, since, before = 0.0, clock(), -1.0
    async for job in progress_of(server, job_id):
        percent = job["progress"]["percent"] or 0.0
        assert percent >= before
        if percent > before:
            longest, since, before = max(longest, clock() - since), clock(), percent
    return longest


@pytest.mark.timeout(7200)
async def test_three_hours(tmp_path: Path, prove: bool) -> None:
    if not prove:
        pytest.skip("with --prove")
    recording = await asyncio.to_thread(opus, tmp_path / "talk.ogg", HOURS * 3600)
    clock = asyncio.get_running_loop().time
    async with serving(CONFIG, folder=tmp_path) as server:
        began = clock()
        async with peak_of(server) as peak:
            job_id = await handed_in(server, recording)
            standstill = await moving(server, job_id)
        undisturbed = await text_of(server, job_id)
        print(f"\n{HOURS:g} h in {clock() - began:.0f} s, {peak[0] / 1e6:.0f} MB, still for {standstill:.0f} s at most")
        assert peak[0] <= RSS_MAX
        assert standstill <= STANDSTILL_SECONDS
        assert len(undisturbed) > HOURS * 5_000
    job_id = ""
    for engine_at, server_at in ((15, 25), (45, 55), (75, 85)):
        async with serving(CONFIG, folder=tmp_path, environment=JSON_LOG) as server:
            job_id = job_id or await handed_in(server, recording)
            await until_at(server, job_id, "transcribing", engine_at, 3600)
            os.kill(server.engine_pid("whisper"), signal.SIGKILL)
            await until_at(server, job_id, "transcribing", server_at, 3600)
            await server.stop(signal.SIGKILL)
    async with serving(CONFIG, folder=tmp_path) as server:
        await eventually(lambda: has_ended(server, job_id), within_seconds=3600, what="the end")
        assert await text_of(server, job_id) == undisturbed
        assert (await result(server, job_id, "srt"))[0] == 200
        await until_nothing_is_left(server)


async def has_ended(server: Server, job_id: str) -> bool:
    return (await job_of(server, job_id))["finished_at"] is not None

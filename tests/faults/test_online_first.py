"""A long transcription beside chat on the same processors: it stands still for whoever is online, and loses nothing by it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil

from forebay.clock import SystemClock
from tests.support.engines import still
from tests.support.models import whisper_tiny
from tests.support.processes import family
from tests.support.server import Server, chat_body, eventually, serving
from tests.support.speech import sample_wav
from tests.support.transcriptions import handed_in, text_of

CONFIG = f"""
default_models = false
[models.fake]
engine = "fake"
preload = true
slots = 4
[models.whisper]
engine = "whisper"
source = "file:{whisper_tiny() / "model.bin"}"
preload = true
[pace]
hold_seconds_max = 5
floor_seconds = 1
"""
JSON_LOG = {"FOREBAY_LOG_FORMAT": "json", "FOREBAY_LOG_LEVEL": "debug"}
YIELD_SECONDS = 1.0  # what is promised; it is some milliseconds on a machine that does nothing else
STANDS_SECONDS = 1.5  # and less than it is held at most
ONLINE = "[[fake tokens=1 delay_ms=600000]]"  # no tokens come that would tell how much may run beside it
WORDS_MIN = 20


def engine(server: Server) -> list[psutil.Process]:
    """The processes of the engine that transcribes, without their guard."""
    return family(server.guard_pid("whisper"))


def stands(server: Server) -> bool:
    return bool(still(server.guard_pid("whisper")))


def computed(server: Server) -> float:
    """Seconds of processor time that it has used."""
    times = [process.cpu_times() for process in engine(server)]
    return sum(each.user + each.system for each in times)


async def begun(server: Server, before: float) -> None:
    await eventually(lambda: computed(server) > before + 0.05, within_seconds=30, what="a transcription that computes")


@asynccontextmanager
async def online(server: Server) -> AsyncIterator["asyncio.Task[dict[str, Any]]"]:
    """Somebody who waits for an answer."""

    async def ask() -> dict[str, Any]:
        async with await server.send(chat_body(ONLINE)) as response:
            assert response.status == 200, await response.text()
            answer: dict[str, Any] = await response.json()
            return answer

    asking = asyncio.create_task(ask())
    try:
        yield asking
    finally:
        asking.cancel()
        await asyncio.wait([asking])


async def test_a_transcription_stands_still_for_a_chat_and_ends_as_it_would_have_whoever_stays_online() -> None:
    clock, sample = SystemClock(), sample_wav().read_bytes()
    async with serving(CONFIG, environment=JSON_LOG) as server:
        expected = await text_of(server, await handed_in(server, sample))
        assert len(expected.split()) >= WORDS_MIN
        before = computed(server)
        job = await handed_in(server, sample)
        await begun(server, before)
        asked_at = clock.monotonic()
        async with online(server):
            await eventually(lambda: stands(server), within_seconds=10, what="an engine that stands still")
            yielded = clock.monotonic() - asked_at
            used = computed(server)
            assert await server.metric("forebay_paused_engines", device="cpu") == 1
            print(f"the engine stood still {yielded * 1000:.0f} ms after the request was sent")
            assert yielded <= YIELD_SECONDS
            await eventually(lambda: clock.monotonic() > asked_at + STANDS_SECONDS, what="some time")
            assert computed(server) == used
        await eventually(lambda: not stands(server), within_seconds=10, what="an engine that goes on")
        assert await text_of(server, job) == expected
        assert await server.metric("forebay_paused_seconds_total", device="cpu") >= STANDS_SECONDS / 2
        async with online(server) as asking:
            await server.until_load(1, 0)
            assert await text_of(server, await handed_in(server, sample)) == expected, "its floor is enough for it"
            assert not asking.done()
        assert len(server.named("engine.paused", model="whisper")) >= 2, "it had to be taken back after the floor"
        assert server.named("engine.died") == []

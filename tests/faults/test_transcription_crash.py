"""Whoever is killed while a recording is worked on: the text is that of an undisturbed run, and nothing is left behind."""

import asyncio
import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from tests.support.jobs import job_of, result, rows, until_at, until_ended
from tests.support.kills import kill_engine
from tests.support.measuring import within
from tests.support.server import Server, eventually, serving
from tests.support.transcriptions import handed_in, kept_recordings, speech, text_of, until_nothing_is_left

CONFIG = """
default_models = false
[audio]
stretch_seconds = 30
[jobs]
lease_seconds = 3
poll_seconds = 0.2
prune_seconds = 1
backoff_seconds_min = 0.2
[supervisor]
tick_seconds = 0.1
backoff_seconds_min = 0.1
backoff_seconds_max = 0.3
[models.whisper]
engine = "fake"
preload = true
"""
JSON_LOG = {"FOREBAY_LOG_FORMAT": "json"}
STRETCHES = 6
RECORDING = speech(30 * STRETCHES)
PACE = "[[fake token_ms=60]]"  # 0.9 s a stretch
ALL = {"diarize": True, "diarization_model": "whisper", "align_model": "whisper"}
KEPT = "SELECT stage, number, attempt FROM media_parts ORDER BY attempt, stage DESC, number"

pytestmark = pytest.mark.timeout(300)


async def test_a_server_that_is_killed_loses_one_stretch_at_most(tmp_path: Path) -> None:
    """Three times in one job: while it is written down, while its words are aligned, and while speakers are told apart."""
    lives = [kill_at(f"transcription.stretch_kept:{count}") for count in (3, STRETCHES, STRETCHES)]
    async with serving(CONFIG, folder=tmp_path) as server:
        undisturbed = await found(server, await handed_in(server, RECORDING, **ALL))
        assert len(json.loads(undisturbed)["text"].split()) == STRETCHES * 15 * 4
    job_id = ""
    for attempt, environment in enumerate(lives, 1):
        async with serving(CONFIG, folder=tmp_path, environment=environment, wait=False) as server:
            job_id = job_id or await handed_in(server, RECORDING, **ALL)
            await server.process.wait()
            assert kept_recordings(tmp_path), "the next attempt needs it"
            kept = await rows(server, KEPT)
            assert [row[2] for row in kept] == [1] * 3 + [each for each in (2, 3) for _ in range(STRETCHES)][
                : len(kept) - 3
            ]
            assert len(kept) == 3 + STRETCHES * (attempt - 1)
    async with serving(CONFIG, folder=tmp_path) as server:
        assert await found(server, job_id) == undisturbed
        job = await job_of(server, job_id)
        assert (job["progress"]["stage"], job["progress"]["percent"]) == ("finished", 100)
        await until_nothing_is_left(server)
        assert not await rows(server, KEPT)


async def found(server: Server, job_id: str) -> bytes:
    await text_of(server, job_id)
    status, body = await result(server, job_id, "diarized_json")
    assert status == 200
    return body


def kill_at(point: str) -> dict[str, str]:
    return {"FOREBAY_REHEARSAL_KILL_AT": point}


async def test_an_engine_that_is_killed_loses_one_stretch_at_most(tmp_path: Path) -> None:
    async with serving(CONFIG, folder=tmp_path, environment=JSON_LOG) as server:
        undisturbed = await text_of(server, await handed_in(server, RECORDING))
        job_id = await handed_in(server, RECORDING, prompt=PACE)
        finished = 0
        for _ in range(3):
            await until_at(server, job_id, "transcribing", 100 * (finished + 0.6) / STRETCHES)
            finished = await kill_engine(server, job_id, "whisper")
        assert await text_of(server, job_id) == undisturbed
        assert 1 <= len((await job_of(server, job_id))["attempts"]) <= 3
        await until_nothing_is_left(server)


@pytest.mark.parametrize("point", ["media_stored", "created", "settled"])
async def test_what_a_crash_leaves_is_swept_or_finished(tmp_path: Path, point: str, prove: bool) -> None:
    """A recording without a job goes at the next start; a job that nobody was told of runs."""
    if point == "created" and not prove:
        pytest.skip("with --prove")
    async with serving(CONFIG, folder=tmp_path, environment=kill_at(f"transcription.{point}")) as server:
        with suppress(aiohttp.ClientError):
            await handed_in(server, speech(4))
        await server.process.wait()
        assert kept_recordings(tmp_path)
    async with serving(CONFIG, folder=tmp_path) as server:

        async def clear() -> bool:
            return not kept_recordings(tmp_path) and not await unfinished(server)

        await eventually(clear, within_seconds=20, what="a cellar without recordings")
        jobs = (await server.get("/v1/jobs?kind=transcription"))["data"]
        assert [job["status"] for job in jobs] == ([] if point == "media_stored" else ["completed"])
        assert len(await rows(server, "SELECT id FROM media_jobs")) == len(jobs)


async def test_a_job_ends_at_its_deadline(tmp_path: Path) -> None:
    hurried = CONFIG.replace("[audio]", "[audio]\nbackground_seconds_max = 2")
    async with serving(hurried, folder=tmp_path) as server:

        async def lived(_number: int) -> float:
            job_id = await handed_in(server, speech(20), prompt="[[fake token_ms=2000]]")
            job = await until_ended(server, job_id)
            assert (job["status"], job["error"]["code"]) == ("expired", "job_expired")
            await until_nothing_is_left(server)
            return float(job["finished_at"] - job["created_at"])

        await within(4, lived)


async def unfinished(server: Server) -> bool:
    jobs = (await server.get("/v1/jobs?kind=transcription"))["data"]
    return any(job["finished_at"] is None for job in jobs)


async def test_fifty_cancels_leave_nothing(tmp_path: Path, prove: bool) -> None:
    """At moments of all kinds: no recording, no place, no program that decodes."""
    async with serving(CONFIG, folder=tmp_path) as server:
        clock = asyncio.get_running_loop().time

        async def cancelled(number: int, _again: int) -> float:
            job_id = await handed_in(server, speech(20, number % 3), prompt="[[fake token_ms=50]]", diarize=False)
            await asyncio.wait_for(passing(server, job_id, number * 0.02), 20)
            began = clock()
            await server.post(f"/v1/jobs/{job_id}/cancel")
            await until_ended(server, job_id)
            return clock() - began

        for number in range(50 if prove else 10):
            await within(2, partial(cancelled, number))
        await until_nothing_is_left(server)


async def passing(server: Server, job_id: str, seconds: float) -> None:
    """Follow a job for so long."""
    until = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < until:
        await job_of(server, job_id)

"""Whoever is killed while pictures are made: they are those of an undisturbed run, there once, and nothing is left behind."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.jobs import job_of, result, rows, until_ended
from tests.support.kills import kill_engine, until_working
from tests.support.measuring import within
from tests.support.picture_jobs import (
    blobs_of_files,
    content,
    handed_in,
    kept_pictures,
    pictures_of,
    until_nothing_is_left,
)
from tests.support.receiver import receiving
from tests.support.server import Server, eventually, serving

CONFIG = """
default_models = false
[jobs]
lease_seconds = 3
poll_seconds = 0.2
prune_seconds = 1
backoff_seconds_min = 0.2
[supervisor]
tick_seconds = 0.1
backoff_seconds_min = 0.1
backoff_seconds_max = 0.3
[outbound]
allowed_networks = ["127.0.0.2/32"]
[models.painter]
engine = "fake"
preload = true
"""
KILLS = 3
PACED_PICTURES = KILLS + 2
PACED = {"n": PACED_PICTURES, "prompt": "a cat [[fake token_ms=200]]"}  # 0.8 s a picture
PICTURES = 3
FILES = 2 * PICTURES  # with their previews
QUICK = {"n": PICTURES, "prompt": "a cat [[fake token_ms=200]]"}
KEPT = "SELECT number, attempt FROM media_parts ORDER BY number"

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    async with living(tmp_path_factory.mktemp("server")) as running:
        yield running
        assert "job.bug" not in running.log


@asynccontextmanager
async def living(folder: Path, point: str | None = None, *, wait: bool = True) -> AsyncIterator[Server]:
    """A server that kills itself at a point, if there is one; ready unless that may be before."""
    environment = {"FOREBAY_LOG_FORMAT": "json"} | ({} if point is None else {"FOREBAY_REHEARSAL_KILL_AT": point})
    async with serving(CONFIG, folder=folder, environment=environment, wait=wait) as running:
        yield running


async def found(server: Server, job_id: str) -> list[Any]:
    """What a job has made: each picture with all that it takes to make it again."""
    job = await until_ended(server, job_id)
    assert job["status"] == "completed", (job["attempts"], job["error"], job["progress"])
    assert (job["progress"]["stage"], job["progress"]["percent"]) == ("finished", 100)
    answer = json.loads((await result(server, job_id))[1])
    return [(await content(server, each["file_id"]), each["used"]) for each in answer["data"]]


async def test_an_engine_that_is_killed_within_a_step(server: Server) -> None:
    before = len(await pictures_of(server))
    undisturbed = await found(server, await handed_in(server, **PACED))
    job_id = await handed_in(server, **PACED)
    finished = 0
    for _ in range(KILLS):
        await until_working(server, job_id, "painter", finished)
        finished = await kill_engine(server, job_id, "painter")
    assert await found(server, job_id) == undisturbed
    assert 1 <= len((await job_of(server, job_id))["attempts"]) <= 3
    assert len(await pictures_of(server)) == before + 2 * 2 * PACED_PICTURES
    await until_nothing_is_left(server)


async def test_a_server_that_is_killed_again_and_again(server: Server, tmp_path: Path, prove: bool) -> None:
    """At every point of one job, and within a step. It paints no picture again that was kept, and its files are there once."""
    undisturbed = await found(server, await handed_in(server, **QUICK))
    lives: list[tuple[str, list[int]]] = [("created", []), ("picture_stored", []), ("picture_kept", [0]), ("step", [0])]
    lives += [("picture_stored:2", [0, 1]), ("picture_kept", [0, 1, 2])] if prove else []
    lives += [("finished", [0, 1, 2]), ("settled", [])]
    async with receiving("127.0.0.2") as receiver:
        job_id = ""
        for point, kept in lives:
            asked = point == "step" or not job_id
            async with living(tmp_path, None if point == "step" else f"image.{point}", wait=asked) as killed:
                with suppress(aiohttp.ClientError):
                    job_id = job_id or await handed_in(killed, webhook_url=receiver.url, **QUICK)
                if point == "step":
                    await until_working(killed, job_id, "painter", 1)
                    killed.process.kill()
                await asyncio.wait_for(killed.process.wait(), 30)
                assert kept_pictures(tmp_path), "the next attempt needs it"
                found_kept = [row[0] for row in await rows(killed, KEPT)]
                assert found_kept[: len(kept)] == kept, point
                assert len(found_kept) == len(kept) or point == "step", "it may have been killed a little later"
                job_id = job_id or (await rows(killed, "SELECT id FROM jobs"))[0][0]
        async with living(tmp_path) as last:
            assert await found(last, job_id) == undisturbed
            assert len(await pictures_of(last)) == FILES
            await until_nothing_is_left(last)
            assert not await rows(last, "SELECT id FROM drafted_files")
            await receiver.until(1)

            async def told() -> bool:
                query = "SELECT count(*) FROM jobs WHERE kind = 'webhook' AND finished_at IS NULL"
                return (await rows(last, query))[0][0] == 0

            await eventually(told, within_seconds=10, what="the end of every delivery")
        assert {each.event["type"] for each in receiver.received} == {"image.completed"}
        assert len({each.headers["webhook-id"] for each in receiver.received}) == 1


async def test_a_request_without_a_job_goes_at_the_next_start(tmp_path: Path) -> None:
    async with living(tmp_path, "image.media_stored") as server:
        with suppress(aiohttp.ClientError):
            await handed_in(server)
        await asyncio.wait_for(server.process.wait(), 30)
        assert kept_pictures(tmp_path)
    async with living(tmp_path) as server:
        await until_nothing_is_left(server, within_seconds=20)
        assert not (await server.get("/v1/jobs?kind=image"))["data"]

        async def swept() -> bool:
            return not await rows(server, "SELECT id FROM media_jobs")

        await eventually(swept, what="the sweep of a row without a job")


async def test_cancels_at_moments_of_all_kinds_leave_nothing(server: Server, prove: bool) -> None:
    """No image, no picture, no place of the engine; and what has ended well before is whole."""
    whole = len(await pictures_of(server))

    async def cancelled(seconds: float, _number: int) -> float:
        nonlocal whole
        job_id = await handed_in(server, n=2, steps=3, prompt="[[fake token_ms=20]]")
        await passing(server, job_id, seconds)
        began = monotonic()
        await server.post(f"/v1/jobs/{job_id}/cancel")
        job = await until_ended(server, job_id)
        whole += 2 * 2 * (job["status"] == "completed")
        return monotonic() - began

    for number in range(50 if prove else 10):
        await within(2, partial(cancelled, number % 10 * 0.04))
    await until_nothing_is_left(server)
    assert len(await pictures_of(server)) == whole == len(blobs_of_files(server.folder))


async def passing(server: Server, job_id: str, seconds: float) -> None:
    """Follow a job for so long."""
    until = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < until:
        await job_of(server, job_id)

"""A server that is killed between taking a pushed message and settling its job: one job, and one result in the store."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from forebay.config import IntakeSettings
from tests.support.jobs import until_ended
from tests.support.picture_jobs import IMAGE, pictures_of, until_nothing_is_left
from tests.support.pushed import Bucket, envelope, hole, ordered, push, pushed
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
[intake]
model = "painter"
[models.painter]
engine = "fake"
preload = true
"""
POINTS = ("intake.taken", "image.delivered")
MORE = ("image.picture_stored", "image.picture_kept", "image.delivered", "image.settled")

pytestmark = pytest.mark.timeout(300)


async def test_a_server_that_is_killed_at_every_point_of_a_message(tmp_path: Path, prove: bool) -> None:
    bucket = Bucket(IntakeSettings(url=f"file:{tmp_path / 'inbox'}"))
    for folder in ("calm", "storm"):
        await bucket.put(f"{folder}/photo.png", IMAGE)
        await bucket.put(f"{folder}/mask.png", hole())
    body = envelope(ordered("storm/photo.png"), "storm")
    jobs: set[str] = set()
    for attempt, point in enumerate((*POINTS, *MORE) if prove else POINTS, 1):
        async with living(tmp_path, bucket, point) as server:
            with suppress(aiohttp.ClientError):
                jobs.add((await push(server, {**body, "deliveryAttempt": attempt}))[1]["job_id"])
            await server.process.wait()
    async with living(tmp_path, bucket) as server:
        for _ in range(10):  # as a platform that heard of nothing does
            jobs.add((await push(server, body))[1]["job_id"])
        (job_id,) = jobs
        assert (await until_ended(server, job_id))["status"] == "completed"
        calm = await pushed(server, ordered("calm/photo.png"), "calm")
        assert (await until_ended(server, calm))["status"] == "completed"
        for name in ("edited.jpg", "preview.jpg"):
            assert await bucket.get(f"storm/{name}") == await bucket.get(f"calm/{name}")
        assert len((await server.get("/v1/jobs?kind=image"))["data"]) == 2
        assert len(await pictures_of(server)) == 2 * 2
        await until_nothing_is_left(server)
    assert {path.name for path in (tmp_path / "inbox" / "storm").iterdir()} == {
        *("photo.png", "mask.png", "edited.jpg", "preview.jpg"),
    }


async def test_an_image_that_is_removed_when_its_result_is_there_fails_no_job(tmp_path: Path) -> None:
    """Whoever watches the store may tidy up before the job is settled, and then the server dies."""
    bucket = Bucket(IntakeSettings(url=f"file:{tmp_path / 'inbox'}"))
    for name, data in {"photo.png": IMAGE, "mask.png": hole()}.items():
        await bucket.put(name, data)
    async with living(tmp_path, bucket, "image.delivered") as server:
        with suppress(aiohttp.ClientError):
            await pushed(server, ordered("photo.png"), "tidy")
        await eventually(
            lambda: server.process.returncode is not None, within_seconds=60, what=f"the end of\n{server.log}"
        )
    assert await bucket.get("edited.jpg") is not None
    for name in ("photo.png", "mask.png"):
        await bucket.remove(name)
    async with living(tmp_path, bucket) as server:
        (job,) = (await server.get("/v1/jobs?kind=image"))["data"]
        assert (await until_ended(server, job["id"]))["status"] == "completed"
        assert len(await pictures_of(server)) == 2
        await until_nothing_is_left(server)


@asynccontextmanager
async def living(folder: Path, bucket: Bucket, point: str | None = None) -> AsyncIterator[Server]:
    environment = bucket.environment | ({} if point is None else {"FOREBAY_REHEARSAL_KILL_AT": point})
    async with serving(CONFIG, folder=folder, environment=environment, wait=point is None) as server:
        yield server

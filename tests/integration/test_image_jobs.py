"""Pictures in the background on a running server, over SQLite and PostgreSQL: from the upload to the files."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support import postgres
from tests.support.batches import finished, results, submit, upload
from tests.support.images import data_url
from tests.support.jobs import job_of, keys_of, progress_of, result, rows, until_at, until_ended
from tests.support.picture_jobs import (
    EDITS,
    GENERATIONS,
    IMAGE,
    SIZE,
    content,
    generated,
    handed_in,
    kept_pictures,
    mask,
    pictures_of,
    pixels,
    post,
    until_nothing_is_left,
)
from tests.support.receiver import receiving
from tests.support.server import Server, eventually, serving

CONFIG = """
default_models = false
[images]
live_per_project_max = 3
preview_pixels = 32
[jobs]
backoff_seconds_min = 0.05
attempts_max = 2
prune_seconds = 1
watch_seconds = 0.02
[batches]
line_bytes_max = 65536
[supervisor]
backoff_seconds_min = 0.05
[outbound]
allowed_networks = ["127.0.0.2/32"]
[models.painter]
engine = "fake"
preload = true
slots = 4
[models.broken]
engine = "fake"
fallback = ["painter"]
options.fail_start = "exit"
"""
CANCEL_SECONDS = 2.0
SLOW = "[[fake token_ms=400]]"  # a step takes so long
HANGS = "[[fake hang_at=3]]"  # in the fourth step
KEEP_SECONDS = 2_592_000

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str | None:
    """The database: none is SQLite in the data folder."""
    return postgres.new_database() if request.param == "postgres" else None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(url: str | None) -> AsyncIterator[Server]:
    async with serving(CONFIG, environment={} if url is None else {"FOREBAY_DATABASE_URL": url}) as running:
        yield running
        assert "request.bug" not in running.log
        assert "job.bug" not in running.log


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keys(server: Server, url: str | None) -> dict[str, str]:
    """Keys beside that of the administrator, by name."""
    return await keys_of(server, url)


async def made(server: Server, job_id: str, form: str | None = None) -> dict[str, Any]:
    """The result of a job that has ended well."""
    job = await until_ended(server, job_id)
    assert job["status"] == "completed", job
    status, body = await result(server, job_id, form)
    assert status == 200, body
    answer: dict[str, Any] = json.loads(body)
    return answer


async def test_from_the_upload_to_the_files(server: Server, url: str | None) -> None:
    async with receiving("127.0.0.2") as receiver:
        status, job, location = await post(
            server, n=2, webhook_url=receiver.url, prompt="a cat [[fake token_ms=250]]", backdrop="opaque"
        )
        assert (status, location) == (202, f"/v1/jobs/{job['id']}")
        assert (job["kind"], job["status"], job["model"]) == ("image", "available", "painter")
        assert job["progress"]["stage"] == "queued"
        assert job["webhook_secret"].startswith("whsec_")
        told = [each async for each in progress_of(server, job["id"])]
        [received] = await receiver.until(1)
    assert (received.event["type"], received.event["data"]["id"]) == ("image.completed", job["id"])
    stages = [each["progress"]["stage"] for each in told]
    assert (
        {"painting", "finished"}
        <= set(stages)
        <= {*("queued", "fetching", "preparing", "painting", "finishing", "finished")}
    )
    percents = [each["progress"]["percent"] or 0 for each in told]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    steps = [each["progress"]["step"] for each in told if each["progress"]["step"] is not None]
    assert steps
    assert steps == sorted(steps)
    assert {each["progress"]["steps"] for each in told} == {None, 8}
    assert (told[-1]["progress"]["step"], told[-1]["progress"]["stage"]) == (None, "finished")
    answer = await made(server, job["id"])
    assert (answer["size"], answer["output_format"], answer["background"]) == ("64x48", "png", "opaque")
    files = {file["id"]: file for file in await pictures_of(server)}
    for number, each in enumerate(answer["data"]):
        assert each["used"]["seed"] == 7 + number
        file, preview = files.pop(each["file_id"]), files.pop(each["preview_file_id"])
        assert file["expires_at"] - file["created_at"] == preview["expires_at"] - preview["created_at"] == KEEP_SECONDS
        assert file["filename"].endswith(".png")
        assert (await content(server, preview["id"]))[:3] == b"\xff\xd8\xff"
    assert not files, "that is all that there is"
    assert len({(await content(server, each["file_id"])) for each in answer["data"]}) == 2
    await eventually(lambda: not kept_pictures(server.folder), what="what came with it to go")
    assert not await rows(server, "SELECT id FROM drafted_files", url)


async def test_what_is_painted_online_is_painted_in_the_background(server: Server) -> None:
    """By upload, by file and by data URL; what the mask leaves alone is as it was."""
    status, online, _ = await post(server, background="auto", response_format="b64_json")
    assert status == 200, online
    painted = base64.b64decode(online["data"][0]["b64_json"])
    before, after = pixels(IMAGE), pixels(painted)
    changed = [place for place, (one, two) in enumerate(zip(before, after, strict=True)) if one != two]
    assert changed
    assert all(16 <= place % SIZE[0] < 40 and 16 <= place // SIZE[0] < 40 for place in changed)
    file = await upload(server, IMAGE, purpose="vision")
    hole = {"image_url": data_url(mask())}
    jobs = [
        await handed_in(server),
        await handed_in(server, None, images=[{"file_id": file["id"]}], mask=hole),
        await handed_in(server, None, images=[{"image_url": data_url(IMAGE)}], mask=hole),
    ]
    for job_id in jobs:
        found = await made(server, job_id, "b64_json")
        assert base64.b64decode(found["data"][0]["b64_json"]) == painted
        assert found["data"][0]["used"] == online["data"][0]["used"]


async def test_another_model_stands_in_for_one_that_cannot_start(server: Server) -> None:
    expected = await made(server, await handed_in(server), "b64_json")
    found = await made(server, await handed_in(server, model="broken"), "b64_json")
    assert found["data"][0]["b64_json"] == expected["data"][0]["b64_json"]
    assert found["data"][0]["used"]["model"] == "painter"


async def test_a_result_in_every_form(server: Server, keys: dict[str, str]) -> None:
    job_id = await generated(server, response_format="url")
    address = (await made(server, job_id))["data"][0]["url"]
    async with server.session.get(address) as response:  # without a key
        data = await response.read()
        assert response.status == 200
    file_id = (await made(server, job_id, "file_id"))["data"][0]["file_id"]
    assert await content(server, file_id) == data
    assert base64.b64decode((await made(server, job_id, "b64_json"))["data"][0]["b64_json"]) == data
    assert await result(server, job_id, "file_id", keys["reader"]) == await result(server, job_id, "file_id")
    assert (await result(server, job_id, "file_id", keys["stranger"]))[0] == 404
    status, body = await result(server, job_id, "tiff")
    assert (status, json.loads(body)["error"]["param"]) == (400, "format")
    async with server.session.delete(f"{server.url}/v1/files/{file_id}", headers=server.headers) as response:
        assert response.status == 200
    assert (await result(server, job_id, "b64_json"))[0] == 404
    assert (await result(server, job_id, "file_id"))[0] == 200
    await server.session.delete(f"{server.url}/v1/jobs/{job_id}", headers=server.headers)
    assert (await result(server, job_id))[0] == 404


async def test_the_same_request_makes_one_job(server: Server) -> None:
    same = {"Idempotency-Key": "once"}
    first = await post(server, headers=same)
    assert await post(server, headers=same) == first
    for fields in ({"hole": mask(0, 0, 20, 20)}, {"steps": 2}):
        status, refusal, _ = await post(server, headers=same, **fields)
        assert (status, refusal["error"]["code"]) == (409, "idempotency_conflict")
    await until_ended(server, first[1]["id"])
    await until_nothing_is_left(server)


async def test_an_image_that_was_a_mask_is_another_request(server: Server) -> None:
    """The same fields and the same bytes in the same order, but not for the same."""
    answers = []
    for second in ("mask", "image"):
        form = aiohttp.FormData()
        for name, value in {"model": "painter", "prompt": "a cat", "background": "true", "seed": "7"}.items():
            form.add_field(name, value)
        form.add_field("image", IMAGE, filename="image.png", content_type="image/png")
        form.add_field(second, mask(), filename="mask.png", content_type="image/png")
        headers = {**server.headers, "Idempotency-Key": "which is which"}
        async with server.session.post(server.url + EDITS, headers=headers, data=form) as response:
            answers.append((response.status, await response.json()))
    (status, job), (again, refusal) = answers
    assert (status, again) == (202, 409), answers
    assert refusal["error"]["code"] == "idempotency_conflict"
    await until_ended(server, job["id"])
    await until_nothing_is_left(server)


async def test_a_cancel_within_a_step_leaves_nothing(server: Server) -> None:
    """Not even the picture that was finished before."""
    before = len(await pictures_of(server))
    clock = asyncio.get_running_loop().time
    for _ in range(2):  # either one shows how fast it can be
        job_id = await handed_in(server, n=10, steps=2, prompt=SLOW)
        await until_at(server, job_id, "painting", 18)
        assert (await result(server, job_id))[0] == 409
        began = clock()
        await server.post(f"/v1/jobs/{job_id}/cancel")
        assert (await until_ended(server, job_id))["status"] == "cancelled"
        await until_nothing_is_left(server)
        took = clock() - began
        assert len(await pictures_of(server)) == before
        status, body = await server.post(f"/v1/jobs/{job_id}/retry")
        assert (status, body["error"]["code"]) == (409, "input_gone")
        if took < CANCEL_SECONDS:
            break
    assert took < CANCEL_SECONDS


async def test_what_cannot_be_painted_fails_for_a_reason(server: Server) -> None:
    job_id = await handed_in(server, b"no image at all" * 100)
    job = await until_ended(server, job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "media_invalid")
    await until_nothing_is_left(server)
    for fields in ({"images": [{"file_id": "file_none"}]}, {"images": [{"image_url": "http://127.0.0.9/x.png"}]}):
        status, refusal, _ = await post(server, None, **fields)
        assert status in {400, 404}, refusal


async def test_only_those_whose_images_lie_elsewhere_are_tried_again(server: Server) -> None:
    broken = {"prompt": "[[fake status=500]]"}
    file = await upload(server, IMAGE, purpose="vision")
    again = {
        await handed_in(server, **broken): False,
        await handed_in(server, None, images=[{"file_id": file["id"]}], **broken): True,
        await generated(server, **broken): True,
    }
    for job_id, can in again.items():
        job = await until_ended(server, job_id)
        assert (job["status"], len(job["attempts"])) == ("failed", 2)
        (letter,) = (await server.get(f"/v1/dead-letters?job={job_id}"))["data"]
        if not can:
            await until_nothing_is_left(server)
        status, body = await server.post(f"/v1/dead-letters/{letter['id']}/requeue")
        assert status == (200 if can else 409), body
        await until_ended(server, job_id)


async def test_a_project_has_so_many_at_once(server: Server, keys: dict[str, str]) -> None:
    hanging = {"key": keys["many"], "prompt": HANGS}
    jobs = [(await post(server, **hanging))[1]["id"] for _ in range(3)]
    status, refusal, _ = await post(server, **hanging)
    assert (status, refusal["error"]["code"]) == (429, "image_limit_reached")
    for job_id in jobs:
        await server.post(f"/v1/jobs/{job_id}/cancel", keys["many"])
    await until_nothing_is_left(server)


async def test_no_image_stays_behind_in_a_request(server: Server, url: str | None) -> None:
    job_id = await handed_in(server, None, images=[{"image_url": data_url(IMAGE)}])
    await made(server, job_id)

    async def gone() -> bool:
        return (await rows(server, f"SELECT request FROM media_jobs WHERE id = '{job_id}'", url))[0][0] is None

    await eventually(gone, what="a request without its image")
    assert (await job_of(server, job_id))["status"] == "completed"


async def test_lines_of_a_batch(server: Server) -> None:
    file = await upload(server, IMAGE, purpose="vision")
    by_file = {"images": [{"file_id": file["id"]}], "mask": {"image_url": data_url(mask())}}
    status, online, _ = await post(server, None, background="auto", **by_file)
    assert status == 200, online
    bodies: dict[str, dict[str, Any]] = {
        "by-file": by_file,
        "kept": {**by_file, "response_format": "file_id", "background": "opaque"},
        "by-url": {**by_file, "images": [{"image_url": data_url(IMAGE)}]},
        "address": {**by_file, "response_format": "url"},
        "long": {**by_file, "n": 8, "size": "256x192"},
        "noise": {"images": [{"image_url": data_url(b"no image at all" * 100)}]},
        "nothing": {},
        "stranger": {"images": [{"file_id": "file_none"}]},
    }
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": EDITS,
            "body": {"model": "painter", "prompt": "a cat", "seed": 7, **body},
        }
        for name, body in bodies.items()
    ]
    batch = await finished(server, (await submit(server, lines, endpoint=EDITS))["id"])
    assert batch["status"] == "completed"
    good, bad = await results(server, batch)
    answers = {line["custom_id"]: line["response"]["body"]["data"][0] for line in good}
    assert answers["by-file"] == answers["by-url"] == online["data"][0]
    kept = answers["kept"]["file_id"]
    assert base64.b64encode(await content(server, kept)).decode() == online["data"][0]["b64_json"]
    [known] = [each for each in await pictures_of(server) if each["id"] == kept]
    assert known["expires_at"] - known["created_at"] == KEEP_SECONDS
    codes = {line["custom_id"]: line["response"]["body"]["error"]["code"] for line in bad}
    assert codes == {
        "address": "invalid_value",
        "long": "answer_too_long",
        "noise": "media_invalid",
        "nothing": "missing_required_parameter",
        "stranger": "not_found",
    }
    await until_nothing_is_left(server)


async def test_a_line_that_is_cancelled_leaves_no_files(server: Server) -> None:
    before = len(await pictures_of(server))
    body = {"model": "painter", "prompt": SLOW, "size": "64x48", "n": 10, "steps": 2, "response_format": "file_id"}
    line = {"custom_id": "new", "method": "POST", "url": GENERATIONS, "body": body}
    batch = await submit(server, [line], endpoint=GENERATIONS)

    async def begun() -> bool:
        return len(await pictures_of(server)) > before

    await eventually(begun, what="the first picture of the line")
    await server.post(f"/v1/batches/{batch['id']}/cancel")
    assert (await finished(server, batch["id"]))["status"] == "cancelled"
    await until_nothing_is_left(server)
    assert len(await pictures_of(server)) == before


async def test_lines_for_new_pictures(server: Server) -> None:
    body = {"model": "painter", "prompt": "a cat", "size": "64x48", "seed": 7}
    line = {"custom_id": "new", "method": "POST", "url": GENERATIONS, "body": body}
    batch = await finished(server, (await submit(server, [line], endpoint=GENERATIONS))["id"])
    [[answer], _] = await results(server, batch)
    online = await made(server, await generated(server), "b64_json")
    assert answer["response"]["body"]["data"][0]["b64_json"] == online["data"][0]["b64_json"]

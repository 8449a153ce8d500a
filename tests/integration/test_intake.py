"""Pushed messages on a running server, over SQLite with a folder and PostgreSQL with a bucket: one job for each."""

import asyncio
import io
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image
from pydantic import SecretStr

from forebay.clock import SystemClock
from forebay.config import IntakeSettings, Settings
from forebay.errors import NotFound
from forebay.gateway.intake import check_open
from forebay.inference import Capability
from forebay.store.database import Database
from forebay.store.key_format import Role
from forebay.store.keys import KeyStore
from tests.support import jwks, postgres
from tests.support.images import encoded
from tests.support.jobs import rows, until_ended
from tests.support.jwks import Keys, token
from tests.support.picture_jobs import IMAGE, SIZE, content
from tests.support.pushed import Bucket, envelope, hole, ordered, push, pushed, s3_bucket
from tests.support.server import Server, eventually, serving

CONFIG = """
default_models = false
[images]
image_bytes_max = 65536
preview_pixels = 32
[jobs]
backoff_seconds_min = 0.05
attempts_max = 2
watch_seconds = 0.02
[auth]
failures_per_minute_max = {failures}
[outbound]
allowed_networks = ["127.0.0.2/32"]
[intake]
model = "painter"
message_bytes_max = 16384
token_project = "pushed"
projects = ["default", "stranger"]
token_audience = "{audience}"
token_email = "{email}"
token_keys_url = "{keys}"
[models.painter]
engine = "fake"
preload = true
slots = 4
"""
FAILURES = 40  # of one address in a minute
LAST = 4  # deliveries of a bad message that are refused

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str | None:
    """The database: none is SQLite in the data folder."""
    return postgres.new_database() if request.param == "postgres" else None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bucket(url: str | None, tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    """Where the objects are; every test has a folder of its own in it."""
    if url is not None:
        return await s3_bucket()
    return Bucket(IntakeSettings(url=f"file:{tmp_path_factory.mktemp('inbox')}"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keys() -> AsyncIterator[Keys]:
    async with jwks.serving_keys("127.0.0.2") as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(url: str | None, bucket: Bucket, keys: Keys) -> AsyncIterator[Server]:
    environment = bucket.environment | ({} if url is None else {"FOREBAY_DATABASE_URL": url})
    config = CONFIG.format(failures=FAILURES, audience=jwks.AUDIENCE, email=jwks.EMAIL, keys=keys.url)
    async with serving(config, environment=environment) as running:
        yield running
        assert "request.bug" not in running.log
        assert "job.bug" not in running.log


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyring(server: Server, url: str | None) -> dict[str, str]:
    """Further API keys, by name."""
    secret = None if url is None else SecretStr(url)
    database = await Database.open(Settings(data_dir=server.folder / "data", database_url=secret))
    store = KeyStore(database, SystemClock())
    found = {
        "stranger": (await store.create_key("stranger"))[1],
        "reader": (await store.create_key(role=Role.READ_ONLY))[1],
        "embedder": (await store.create_key(scopes=frozenset({Capability.EMBEDDING})))[1],
        "pushed": (await store.create_key("pushed"))[1],
        "outsider": (await store.create_key("outsider"))[1],
        "slow": (await store.create_key(requests_per_minute=1))[1],
    }
    await database.close()
    return found


async def placed(bucket: Bucket, folder: str, name: str = "photo.png") -> str:
    """An image and a mask in a folder; the name of the image."""
    await bucket.put(f"{folder}/{name}", IMAGE)
    await bucket.put(f"{folder}/mask.png", hole())
    return f"{folder}/{name}"


async def jobs(server: Server, url: str | None) -> int:
    return int((await rows(server, "SELECT count(*) FROM jobs WHERE kind = 'image'", url))[0][0])


async def taken(server: Server, url: str | None, message_id: str) -> int:
    """How many messages of that id have become something."""
    return len(await rows(server, f"SELECT job_id FROM intake_messages WHERE message_id = '{message_id}'", url))


async def test_from_the_push_to_the_objects(server: Server, bucket: Bucket) -> None:
    image = await placed(bucket, "Fotos 2026/ä", "IMG (1).png")
    status, receipt = await push(server, envelope(ordered(image), "1", deliveryAttempt=1))
    job_id = receipt["job_id"]
    assert (status, receipt) == (
        200,
        {
            "object": "intake.receipt",
            "message_id": "1",
            "job_id": job_id,
            "dead_letter_id": None,
            "duplicate": False,
        },
    )
    job = await until_ended(server, job_id)
    assert (job["kind"], job["status"], job["model"]) == ("image", "completed", "painter"), job
    edited = await bucket.get("Fotos 2026/ä/edited.jpg")
    preview = await bucket.get("Fotos 2026/ä/preview.jpg")
    assert edited is not None
    assert preview is not None
    made, small = Image.open(io.BytesIO(edited)), Image.open(io.BytesIO(preview))
    assert (made.format, made.size, small.format, max(small.size)) == ("JPEG", SIZE, "JPEG", 32)
    red, _, blue = made.convert("RGB").getpixel((2, 2))  # type: ignore[misc]
    assert (red > 240, blue < 20) == (True, True), "what the mask leaves alone stays red"
    shown = await server.get(f"/v1/jobs/{job_id}/result")
    (each,) = shown["data"]
    assert (each["output_object"], each["preview_object"]) == ("Fotos 2026/ä/edited.jpg", "Fotos 2026/ä/preview.jpg")
    assert await content(server, each["file_id"]) == edited
    assert await bucket.get(image) == IMAGE


async def test_an_order_names_its_own_results(server: Server, bucket: Bucket) -> None:
    image = await placed(bucket, "named")
    order = ordered(image, output="results/named.png", preview="results/small.jpg")
    job_id = await pushed(server, order, "named")
    assert (await until_ended(server, job_id))["status"] == "completed"
    edited = await bucket.get("results/named.png")
    assert edited is not None
    made, before = Image.open(io.BytesIO(edited)).convert("RGB"), Image.open(io.BytesIO(IMAGE)).convert("RGB")
    outside = [(x, y) for x in range(SIZE[0]) for y in range(SIZE[1]) if not (16 <= x < 40 and 16 <= y < 40)]
    assert all(made.getpixel(place) == before.getpixel(place) for place in outside), "bit for bit"
    assert made.getpixel((28, 28)) != before.getpixel((28, 28))
    assert await bucket.get("results/small.jpg") is not None
    assert await bucket.get("named/edited.jpg") is None


async def test_what_lies_behind_the_result_is_as_ordered(server: Server, bucket: Bucket) -> None:
    """`background` means that here, as nobody can mean a job."""
    image = await placed(bucket, "behind")
    await bucket.put(image, encoded(Image.new("RGBA", SIZE, (255, 0, 0, 128))))
    for backdrop, mode in {"auto": "RGBA", "opaque": "RGB"}.items():
        order = ordered(image, output=f"behind/{backdrop}.png", preview=f"behind/{backdrop}.jpg", background=backdrop)
        job_id = await pushed(server, order, f"behind-{backdrop}")
        assert (await until_ended(server, job_id))["status"] == "completed"
        made = await bucket.get(f"behind/{backdrop}.png")
        assert made is not None
        assert Image.open(io.BytesIO(made)).mode == mode


async def test_ten_deliveries_at_once_are_one_job(server: Server, bucket: Bucket, url: str | None) -> None:
    image = await placed(bucket, "many")
    before = await jobs(server, url)
    body = envelope(ordered(image), "many")
    answers = await asyncio.gather(*(push(server, {**body, "deliveryAttempt": n}) for n in range(10)))
    assert {status for status, _ in answers} == {200}
    assert len({receipt["job_id"] for _, receipt in answers}) == 1
    assert sorted(receipt["duplicate"] for _, receipt in answers) == [False, *[True] * 9]
    job_id = answers[0][1]["job_id"]
    assert (await until_ended(server, job_id))["status"] == "completed"
    assert await push(server, body) == (200, {**answers[0][1], "duplicate": True})
    assert await jobs(server, url) == before + 1
    assert await taken(server, url, "many") == 1


async def test_another_subscription_or_project_has_messages_of_its_own(
    server: Server, bucket: Bucket, keyring: dict[str, str]
) -> None:
    body = envelope(ordered(await placed(bucket, "shared")), "shared")
    first = (await push(server, body))[1]["job_id"]
    other = (await push(server, {**body, "subscription": "projects/p/subscriptions/other"}))[1]["job_id"]
    theirs = (await push(server, body, key=keyring["stranger"]))[1]["job_id"]
    assert len({first, other, theirs}) == 3
    for job_id in (first, other):
        assert (await until_ended(server, job_id))["status"] == "completed"
    async with server.session.get(f"{server.url}/v1/jobs/{theirs}", headers=server.headers) as response:
        assert response.status == 404


BAD = [
    ({"image": "a/../b"}, "image"),
    ({"image": "/etc/passwd"}, "image"),
    ({"image": "../../etc/passwd"}, "image"),
    ({"image": "a.png", "mask": "a\\b"}, "mask"),
    ({"image": "a.png", "output": ".hidden"}, "output"),
    ({"image": "a.png", "output": "x/"}, "output"),
    ({"image": "a.png", "preview": "a\nb"}, "preview"),
    ({"image": "a.png", "output": "a.png"}, "output"),
    ({"image": "a.png", "prompt": ""}, "prompt"),
    ({"image": "a.png", "steps": 100_000}, "steps"),
    ({"image": "a.png", "guidance": "much"}, "guidance"),
    ({"image": "a.png", "seed": -1}, "seed"),
    ({"image": "a.png", "strength": 7}, "strength"),
    ({"image": "a.png", "mask": None, "mask_mode": "white"}, "mask_mode"),
    ({"image": "a.png", "stream": True}, "stream"),
    ({"image": "a.png", "webhook_url": "http://x"}, "webhook_url"),
    ({"image": "a.png", "colour": "red"}, "colour"),
    ({"prompt": "a cat"}, "image"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=[f"{param} {index}" for index, (_, param) in enumerate(BAD)])
async def test_a_bad_order_is_refused_by_its_field(server: Server, change: dict[str, Any], param: str) -> None:
    order = {"prompt": "a cat", "mask": "m.png", **change}
    status, answer = await push(server, envelope(order, f"bad {param}".replace(" ", "-"), deliveryAttempt=LAST))
    assert (status, answer["error"]["param"]) == (400, f"message.data.{param}"), answer


async def test_what_is_no_order_at_all_is_refused(server: Server, url: str | None) -> None:
    status, answer = await push(server, envelope("%%%", "no-base64"))
    assert (status, answer["error"]["param"]) == (400, "message.data")
    status, answer = await push(server, envelope("e30=", "unknown-model") | {"message": 5})
    assert (status, answer["error"]["param"]) == (400, "message")
    status, answer = await push(server, envelope({"image": "a", "prompt": "p", "model": "nobody"}, "unknown-model"))
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    status, answer = await push(server, envelope({"image": "a", "prompt": "x" * 20_000}, "large"))
    assert (status, answer["error"]["code"]) == (413, "payload_too_large")
    assert await taken(server, url, "large") == 0


async def test_an_object_that_is_not_there_is_a_dead_letter_until_it_is(server: Server, bucket: Bucket) -> None:
    job_id = await pushed(server, ordered("late/photo.png"), "late")
    job = await until_ended(server, job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "object_not_found"), job
    (letter,) = (await server.get(f"/v1/dead-letters?job={job_id}"))["data"]
    assert (letter["kind"], letter["error"]["code"]) == ("image", "object_not_found")
    await placed(bucket, "late")
    status, answer = await server.post(f"/v1/dead-letters/{letter['id']}/requeue")
    assert (status, answer["requeued_as"]) == (200, job_id)
    assert (await until_ended(server, job_id))["status"] == "completed"
    assert await bucket.get("late/edited.jpg") is not None


async def test_an_object_that_is_too_large_or_no_image_is_refused(server: Server, bucket: Bucket) -> None:
    image = await placed(bucket, "large")
    await bucket.put(image, encoded(Image.effect_noise((400, 400), 90)))
    job = await until_ended(server, await pushed(server, ordered(image), "too-large"))
    assert (job["status"], job["error"]["code"]) == ("failed", "media_too_large"), job
    await bucket.put(image, b"no image")
    job = await until_ended(server, await pushed(server, ordered(image), "no-image"))
    assert (job["status"], job["error"]["code"]) == ("failed", "media_invalid"), job


async def test_a_bad_message_becomes_a_dead_letter_in_the_end_and_can_be_edited(
    server: Server, bucket: Bucket, keyring: dict[str, str]
) -> None:
    image = await placed(bucket, "edited")
    bad = ordered(image, prompt="")
    body = envelope(bad, "hopeless")
    for attempt in (1, LAST):
        status, answer = await push(server, {**body, "deliveryAttempt": attempt})
        assert (status, answer["error"]["param"]) == (400, "message.data.prompt")
    answers = await asyncio.gather(*(push(server, {**body, "deliveryAttempt": LAST + 1}) for _ in range(5)))
    assert {status for status, _ in answers} == {200}
    (letter_id,) = {receipt["dead_letter_id"] for _, receipt in answers}
    assert {receipt["job_id"] for _, receipt in answers} == {None}
    assert (await push(server, body))[1]["dead_letter_id"] == letter_id
    letter = await server.get(f"/v1/dead-letters/{letter_id}")
    assert (letter["kind"], letter["job_id"], letter["custom_id"]) == ("message", None, "hopeless")
    assert (letter["endpoint"], letter["error"]["code"]) == ("/v1/intake/pubsub", "missing_required_parameter")
    assert letter["input"] == bad
    assert (letter["attempts"][0]["attempt"], letter["attempts"][0]["param"]) == (LAST + 1, "message.data.prompt")
    assert len((await server.get("/v1/files?purpose=user_data"))["data"]) == 1

    requeue = f"{server.url}/v1/dead-letters/{letter_id}/requeue"
    async with server.session.post(requeue, headers=server.headers) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, "body.prompt")
    stranger = {"Authorization": f"Bearer {keyring['stranger']}"}
    async with server.session.post(requeue, headers=stranger, json={"body": ordered(image)}) as response:
        assert response.status == 404
    embedder = {"Authorization": f"Bearer {keyring['embedder']}"}
    async with server.session.post(requeue, headers=embedder, json={"body": ordered(image)}) as response:
        assert response.status == 403
    async with server.session.post(requeue, headers=server.headers, json={"body": ordered(image)}) as response:
        assert response.status == 200
        job_id = (await response.json())["requeued_as"]
    assert (await until_ended(server, job_id))["status"] == "completed"
    assert await bucket.get("edited/edited.jpg") is not None
    async with server.session.post(requeue, headers=server.headers, json={"body": ordered(image)}) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (409, "already_requeued")


async def test_all_dead_letters_at_once_pass_over_what_is_still_bad(server: Server, bucket: Bucket) -> None:
    for name, data in (("still-bad", {"image": 5}), ("no-json", "bm90IGpzb24=")):
        status, receipt = await push(server, envelope(data, name, deliveryAttempt=LAST + 1))
        assert (status, receipt["job_id"]) == (200, None)
    shown = await server.get(f"/v1/dead-letters/{receipt['dead_letter_id']}")
    assert shown["input"] == "not json"
    filtered = {"kind": "message"}
    url = f"{server.url}/v1/dead-letters/requeue"
    async with server.session.post(url, headers=server.headers, json=filtered) as response:
        answer = await response.json()
        assert (response.status, answer["requeued"], answer["left"], answer["jobs"]) == (200, 0, 2, [])


async def test_a_signed_token_pushes_for_its_project_and_does_nothing_else(
    server: Server, bucket: Bucket, keyring: dict[str, str]
) -> None:
    body = envelope(ordered(await placed(bucket, "signed")), "signed")
    signed = token()
    status, receipt = await push(server, body, key=signed)
    assert status == 200, receipt

    async def ended() -> bool:
        headers = {"Authorization": f"Bearer {keyring['pushed']}"}
        async with server.session.get(f"{server.url}/v1/jobs/{receipt['job_id']}", headers=headers) as response:
            return bool((await response.json())["status"] == "completed")

    await eventually(ended, within_seconds=20, what="the end of the job of the token's project")
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/v1/jobs"),
        ("POST", "/v1/images/edits"),
        ("GET", "/admin/models"),
    ):
        async with server.session.request(
            method, server.url + path, headers={"Authorization": f"Bearer {signed}"}
        ) as response:
            assert response.status == 401, path


async def test_nobody_else_is_let_in(server: Server, url: str | None, keyring: dict[str, str]) -> None:
    body = envelope({"image": "a.png", "prompt": "a cat"}, "nobody")
    for why, credential in {
        "expired": token(exp=int(time.time()) - 120),
        "another audience": token(aud="https://elsewhere.example.com"),
        "another account": token(email="somebody@example.com"),
        "forged": token("two", kid="one"),
        "unknown key": token("two"),
        "no key at all": "fb_no_such_key",
    }.items():
        status, answer = await push(server, body, key=credential)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key"), why
    assert (await push(server, body, headers={"Authorization": ""}))[0] == 401
    assert (await push(server, body, key=keyring["reader"]))[0] == 403
    assert (await push(server, body, key=keyring["embedder"]))[1]["error"]["code"] == "insufficient_scope"
    status, answer = await push(server, body, key=keyring["outsider"])  # or it could read what others have put there
    assert (status, answer["error"]["code"]) == (403, "permission_denied")
    assert await taken(server, url, "nobody") == 0


async def test_the_rate_of_a_key_counts(server: Server, keyring: dict[str, str]) -> None:
    body = envelope({"image": "a.png", "prompt": ""}, "rated")
    statuses = [(await push(server, body, key=keyring["slow"]))[0] for _ in range(2)]
    assert statuses == [400, 429]


async def test_a_job_that_is_removed_leaves_its_message_taken(server: Server, bucket: Bucket) -> None:
    body = envelope(ordered(await placed(bucket, "removed")), "removed")
    job_id = (await push(server, body))[1]["job_id"]
    await until_ended(server, job_id)
    async with server.session.delete(f"{server.url}/v1/jobs/{job_id}", headers=server.headers) as response:
        assert response.status == 200
    assert (await push(server, body))[1] == {
        "object": "intake.receipt",
        "message_id": "removed",
        "job_id": job_id,
        "dead_letter_id": None,
        "duplicate": True,
    }


async def test_without_a_store_the_route_is_closed() -> None:
    with pytest.raises(NotFound, match=r"intake\.url"):
        check_open(Settings())


async def test_what_lies_in_the_folder_is_what_was_put_there(bucket: Bucket) -> None:
    """No half of an object, and nothing of the check at the start."""
    if bucket.settings.url is not None and bucket.settings.url.startswith("file:"):
        folder = Path(bucket.settings.url.removeprefix("file:"))
        assert not [path for path in (folder / ".partial").rglob("*") if path.is_file()]
        assert not list((folder / "checks").glob("*"))


async def test_failed_tokens_count_as_failures_and_good_ones_still_pass(server: Server) -> None:
    body = envelope({"image": "a.png", "prompt": ""}, "storm")
    forged = token("two", kid="one")
    began = time.monotonic()
    statuses = [(await push(server, body, key=forged))[0] for _ in range(45)]
    seconds = time.monotonic() - began
    assert set(statuses) == {401, 429}
    assert statuses[0] == 401
    assert statuses.count(401) <= FAILURES * (1 + seconds / 60), "those of a full bucket, and what has come back since"
    assert (await push(server, body, key=token()))[0] == 400
    assert (await push(server, body))[0] == 400

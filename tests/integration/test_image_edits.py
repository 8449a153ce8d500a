"""Pictures through a real server to an engine whose pixels follow from the seed, the prompt and the image alone."""

import asyncio
import io
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import pytest_asyncio
from PIL import Image

from forebay.engines.fake_images import paint
from tests.support.images import data_url, encoded, picture
from tests.support.memory import forget_peak, peak
from tests.support.picture_jobs import EDITS, GENERATIONS, IMAGE, SIZE, blobs_of_files, mask, pictures_of
from tests.support.picture_requests import as_json, edited, events_of, form, opened, pixels, refusal, send
from tests.support.receiver import Answer, receiving
from tests.support.server import FAKE, Server, eventually, serving

CONFIG = f"""
{FAKE}
[models.words]
engine = "fake"
options.capabilities = ["chat"]
[models.broken]
engine = "fake"
fallback = ["fake"]
options.fail_start = "exit"
[models.telea]
engine = "opencv"
[models.small]
engine = "fake"
options.edge_max = 64
[images]
requests_at_once = 8
image_bytes_max = 3000000
mask_bytes_max = 1000000
request_bytes_max = 4000000
[media]
fetch_hosts = ["127.0.0.2"]
[outbound]
allowed_networks = ["127.0.0.2/32"]
"""
LOG = {"FOREBAY_LOG_FORMAT": "json", "FOREBAY_LOG_LEVEL": "debug"}
SLOW = "[[fake token_ms=600000]]"
STOP_SECONDS = 5.0
HOLE = (16, 16, 40, 40)
SEED = 7

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG, environment=LOG) as one:
        yield one
        await nothing_left(one)
        assert "request.bug" not in one.log


def painted(prompt: str = "a cat", seed: int = SEED, steps: int = 4, step: int = 4, before: bytes = b"") -> bytes:
    """What the engine makes of it."""
    return paint(prompt, seed, step, steps, *SIZE, before)


def inside(place: int) -> bool:
    """Whether the hole of the mask has this pixel."""
    x, y = place % SIZE[0], place // SIZE[0]
    return HOLE[0] <= x < HOLE[2] and HOLE[1] <= y < HOLE[3]


async def nothing_left(server: Server) -> None:
    """Nobody runs or waits, no image is open or worked on, every place is free."""
    await server.until_load(0, 0, within_seconds=STOP_SECONDS)
    await eventually(lambda: not open_images(server), within_seconds=STOP_SECONDS, what="no image on the disk")


def open_images(server: Server) -> list[str]:
    """The private files that the server has open; they have no names any more."""
    found = []
    for descriptor in range(psutil.Process(server.pid).num_fds() + 64):
        try:
            found.append(os.readlink(f"/proc/{server.pid}/fd/{descriptor}"))
        except OSError:
            continue
    return [file for file in found if "/data/pictures/" in file]


async def computed(server: Server) -> float:
    """How many requests have been let in to the model."""
    return await server.metric("forebay_queue_wait_seconds_count", model="fake")


# What is answered.


async def test_what_the_mask_marks_is_painted_and_nothing_else(server: Server) -> None:
    body = await edited(server)
    image = opened(body["data"][0])
    assert (image.format, image.size, image.mode) == ("PNG", SIZE, "RGB")
    red, found = pixels(Image.open(io.BytesIO(IMAGE))), pixels(image)
    expected = painted(before=red)
    for place in range(SIZE[0] * SIZE[1]):
        source = expected if inside(place) else red
        assert found[3 * place : 3 * place + 3] == source[3 * place : 3 * place + 3], place
    assert (body["size"], body["quality"], body["output_format"]) == ("64x48", "high", "png")
    assert body["created"] > 1.7e9
    used = body["data"][0]["used"]
    assert (used["model"], used["seed"], used["steps"], used["engine"]) == ("fake", SEED, 4, "fake")
    assert used["model_fingerprint"]


async def test_the_same_seed_gives_the_same_bytes(server: Server) -> None:
    first = await edited(server)
    assert (await edited(server))["data"] == first["data"]
    other = await edited(server, seed=8)
    assert other["data"][0]["b64_json"] != first["data"][0]["b64_json"]
    free = [json.loads((await send(server, ("image", IMAGE), seed=""))[1])["data"][0] for _ in range(2)]
    assert free[0]["used"]["seed"] != free[1]["used"]["seed"]
    again = await edited(server, ("image", IMAGE), seed=free[0]["used"]["seed"])
    assert again["data"][0]["b64_json"] == free[0]["b64_json"]


async def test_several_images_have_seeds_of_their_own(server: Server) -> None:
    before = await computed(server)
    body = await edited(server, n=3)
    assert await computed(server) == before + 1  # one request to the engine
    assert [each["used"]["seed"] for each in body["data"]] == [SEED, SEED + 1, SEED + 2]
    assert len({each["b64_json"] for each in body["data"]}) == 3
    assert body["data"][1]["b64_json"] == (await edited(server, seed=SEED + 1))["data"][0]["b64_json"]


async def test_new_pictures(server: Server) -> None:
    status, body = await as_json(server, GENERATIONS, size="64x48", steps=2, output_format="webp", quality="low", n=2)
    assert (status, body["size"], body["output_format"], body["quality"]) == (200, "64x48", "webp", "low")
    assert [opened(each).format for each in body["data"]] == ["WEBP", "WEBP"]
    _, body = await as_json(server, GENERATIONS, size="64x48", steps=2)
    assert pixels(opened(body["data"][0])) == painted(steps=2, step=2)
    status, body = await as_json(server, GENERATIONS, size="64x48", quality="low")
    assert body["data"][0]["used"]["steps"] == 2


@pytest.mark.parametrize(("form_name", "format_name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
async def test_formats(server: Server, form_name: str, format_name: str) -> None:
    options = {} if form_name == "png" else {"output_compression": 80}
    body = await edited(server, output_format=form_name, **options)
    image = opened(body["data"][0])
    assert (image.format, image.size, body["output_format"]) == (format_name, SIZE, form_name)


async def test_a_size_of_its_own(server: Server) -> None:
    body = await edited(server, size="128x96")
    assert (opened(body["data"][0]).size, body["size"]) == ((128, 96), "128x96")


# How images come.


async def test_json_and_forms_say_the_same(server: Server) -> None:
    expected = (await edited(server))["data"]
    images, hole = [{"image_url": data_url(IMAGE)}], {"image_url": data_url(mask())}
    status, body = await as_json(server, images=images, mask=hole)
    assert (status, body["data"]) == (200, expected)
    client = server.client()
    file = await client.files.create(file=("a.png", IMAGE), purpose="vision")
    drawn = await client.files.create(file=("m.png", mask()), purpose="vision")
    status, body = await as_json(server, images=[{"file_id": file.id}], mask={"file_id": drawn.id})
    assert (status, body["data"]) == (200, expected)
    await client.files.delete(file.id)
    status, answer = await as_json(server, images=[{"file_id": file.id}])
    assert (status, answer["error"]["param"]) == (404, "images[0].file_id")


async def test_files_of_another_project_are_not_there(server: Server) -> None:
    client = server.client(api_key=await server.create_key("other"))
    file = await client.files.create(file=("a.png", IMAGE), purpose="vision")
    for body in (
        {"images": [{"file_id": file.id}]},
        {"images": [{"image_url": data_url(IMAGE)}], "mask": {"file_id": file.id}},
    ):
        status, answer = await as_json(server, **body)
        assert (status, answer["error"]["code"]) == (404, "not_found")


async def test_an_address(server: Server) -> None:
    async with receiving("127.0.0.2") as host:
        host.then = Answer(200, body=IMAGE)
        where = {"image_url": f"{host.url}/a.png"}
        status, body = await as_json(server, images=[where], mask={"image_url": data_url(mask())})
        assert (status, body["data"]) == (200, (await edited(server))["data"])
        host.then = Answer(404)
        status, answer = await as_json(server, images=[where])
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (
            400,
            "media_invalid",
            "images[0].image_url",
        )


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/a", "https://example.com/a", "file:///etc/passwd", "/etc/passwd", "x"]
)
async def test_addresses_that_are_not_allowed(server: Server, url: str) -> None:
    status, answer = await as_json(server, images=[{"image_url": url}])
    assert (status, answer["error"]["param"]) == (400, "images[0].image_url")
    assert answer["error"]["code"] in {"url_not_allowed", "media_invalid"}


async def test_several_images_as_the_official_client_names_them(server: Server) -> None:
    other = picture(*SIZE, "blue")
    two = await edited(server, ("image[]", IMAGE), ("image[]", other), ("mask", mask()))
    assert two["data"] == (await edited(server, ("image", IMAGE), ("mask", mask()), ("image", other)))["data"]
    urls = [{"image_url": data_url(each)} for each in (IMAGE, other)]
    status, body = await as_json(server, images=urls, mask={"image_url": data_url(mask())})
    assert (status, body["data"]) == (200, two["data"])
    five = [("image[]", IMAGE)] * 5
    assert await refusal(server, *five) == (400, "invalid_value", "image")  # the model takes four
    assert await refusal(server, *[("image", IMAGE)] * 17) == (400, "invalid_multipart", "image")
    assert await refusal(server, ("image", IMAGE), ("mask", mask()), ("mask", mask())) == (
        400,
        "invalid_multipart",
        "mask",
    )


# Masks.


def alpha_of(hole: tuple[int, int, int, int]) -> bytes:
    """An image of many colours that one can see through at one place."""
    image = Image.frombytes("RGB", SIZE, random.Random(1).randbytes(3 * SIZE[0] * SIZE[1])).convert("RGBA")
    image.paste((0, 0, 0, 0), hole)
    return encoded(image)


def white_of(hole: tuple[int, int, int, int]) -> bytes:
    image = Image.new("L", SIZE, 0)
    image.paste(255, hole)
    return encoded(image)


async def test_a_mask_may_be_white_or_the_alpha_of_the_image(server: Server) -> None:
    expected = pixels(opened((await edited(server))["data"][0]))
    white = await edited(server, ("image", IMAGE), ("mask", white_of(HOLE)), mask_mode="white")
    assert pixels(opened(white["data"][0])) == expected
    image = alpha_of(HOLE)
    body = await edited(server, ("image", image), model="telea", background="opaque")
    assert body["background"] == "opaque"
    found, before = pixels(opened(body["data"][0])), pixels(Image.open(io.BytesIO(image)))
    differs = {place // 3 for place, (one, two) in enumerate(zip(found, before, strict=True)) if one != two}
    assert differs
    assert all(inside(place) for place in differs)


@pytest.mark.parametrize(
    ("hole", "fields", "expected"),
    [
        (encoded(Image.new("RGBA", (32, 32))), {}, (400, "mask")),
        (encoded(Image.new("RGBA", SIZE, (0, 0, 0, 255))), {}, (400, "mask")),
        (picture(*SIZE), {}, (400, "mask")),
        (white_of((0, 0, 0, 0)), {"mask_mode": "white"}, (400, "mask")),
        (b"not an image", {}, (400, "mask")),
        (b"", {}, (400, "mask")),
    ],
)
async def test_masks_that_are_none(
    server: Server, hole: bytes, fields: dict[str, Any], expected: tuple[int, str]
) -> None:
    before = await computed(server)
    status, code, param = await refusal(server, ("image", IMAGE), ("mask", hole), **fields)
    assert ((status, param), code) == (expected, "media_invalid")
    assert await computed(server) == before


async def test_a_model_that_needs_a_mask_says_so(server: Server) -> None:
    status, code, param = await refusal(server, ("image", IMAGE), model="telea")
    assert (status, code, param) == (400, "media_invalid", "mask")


# What is refused before anything is computed.


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "nobody"}, (404, "model_not_found", None)),
        ({"model": "words"}, (400, "capability_not_supported", "model")),
        ({"prompt": ""}, (400, "missing_required_parameter", "prompt")),
        ({"prompt": "x" * 32_001}, (400, "invalid_value", "prompt")),
        *[({"n": value}, (400, "invalid_value", "n")) for value in (0, 11, -1, 1.5, "many", 10**30)],
        *[({"steps": value}, (400, "invalid_value", "steps")) for value in (0, 101, 1001, -5, "nan")],
        *[({"guidance": value}, (400, "invalid_value", "guidance")) for value in (-0.1, 30.1, 1e9, "inf")],
        *[({"strength": value}, (400, "invalid_value", "strength")) for value in (0, 1.01, -1)],
        *[({"seed": value}, (400, "invalid_value", "seed")) for value in (-1, 2**32)],
        *[({"size": value}, (400, "invalid_value", "size")) for value in ("8x8", "5000x64", "1x", "big")],
        *[({"output_compression": value}, (400, "invalid_value", "output_compression")) for value in (-1, 101, 50)],
        *[({name: value}, (400, "invalid_value", name)) for name in ("mask_dilation", "mask_feather") for value in (-1, 513)],
        *[({"mask_specks": value}, (400, "invalid_value", "mask_specks")) for value in (-1, 1_000_001)],
        ({"partial_images": 4, "stream": True}, (400, "invalid_value", "partial_images")),
        ({"partial_images": 2}, (400, "invalid_value", "partial_images")),
        ({"background": "transparent", "output_format": "jpeg"}, (400, "invalid_value", "background")),
        ({"output_format": "gif"}, (400, "invalid_value", "output_format")),
        ({"response_format": "svg"}, (400, "invalid_value", "response_format")),
        ({"quality": "ultra"}, (400, "invalid_value", "quality")),
        ({"mask_mode": "black"}, (400, "invalid_value", "mask_mode")),
        ({"webhook_url": "https://example.com"}, (400, "invalid_value", "webhook_url")),
        ({"background": True, "stream": True}, (400, "invalid_value", "stream")),
        ({"style": "vivid"}, (400, "invalid_value", "style")),
        ({"images": "x"}, (400, "invalid_value", "images")),
    ],
)  # fmt: skip
async def test_what_is_refused(server: Server, fields: dict[str, Any], expected: tuple[int, str, str | None]) -> None:
    before = await computed(server)
    assert await refusal(server, ("image", IMAGE), ("mask", mask()), **fields) == expected
    assert await computed(server) == before


async def test_a_model_without_steps_takes_none(server: Server) -> None:
    for field in ("steps", "guidance", "strength", "negative_prompt"):
        found = await refusal(server, ("image", IMAGE), ("mask", mask()), model="telea", **{field: 1})
        assert found == (400, "invalid_value", field)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (b"", (400, "media_invalid")), (b"GIF89a", (400, "media_invalid")), (IMAGE[:60], (400, "media_invalid")),
        (b"x" * 3_000_001, (413, "media_too_large")), (picture(1, 200), (400, "media_invalid")),
    ],
)  # fmt: skip
async def test_images_that_are_none(server: Server, image: bytes, expected: tuple[int, str]) -> None:
    before = await computed(server)
    status, code, param = await refusal(server, ("image", image))
    assert ((status, code), param) == (expected, "image")
    status, answer = await as_json(server, images=[{"image_url": data_url(image)}])
    assert (status, answer["error"]["code"]) == expected
    assert answer["error"]["param"] in {"images[0].image_url", "image", "images"}
    assert await computed(server) == before


async def test_all_files_together_have_a_bound(server: Server) -> None:
    heavy = ("image[]", IMAGE + bytes(2_500_000))
    assert await refusal(server, heavy, heavy) == (413, "media_too_large", "image")
    assert await refusal(server, ("image", IMAGE), ("mask", bytes(1_000_001))) == (413, "media_too_large", "mask")


async def test_what_is_no_form(server: Server) -> None:
    headers = {**server.headers, "Content-Type": "multipart/form-data; boundary=x"}
    for body in (b"--x\r\n", b"{}", b""):
        async with server.session.post(server.url + EDITS, data=body, headers=headers) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (400, "invalid_multipart")
    async with server.session.post(server.url + GENERATIONS, data=b"--x\r\n", headers=headers) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, "invalid_json")


async def test_a_wrong_model_is_told_before_the_image_has_come(server: Server) -> None:
    writer, reader = await begin_upload(
        server, b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nnobody\r\n'
    )
    async with asyncio.timeout(10):
        assert b" 404 " in await reader.readline()
    writer.close()


# Streams.


@pytest.mark.parametrize(("path", "prefix"), [(EDITS, "image_edit"), (GENERATIONS, "image_generation")])
async def test_a_stream_tells_steps_and_shows_what_is_not_finished(server: Server, path: str, prefix: str) -> None:
    fields: dict[str, Any] = {"stream": True, "partial_images": 2, "steps": 6, "n": 2}
    if path == EDITS:
        data = form({**fields, "prompt": "a [[fake token_ms=40]]"}, ("image", IMAGE), ("mask", mask()))
        events = await events_of(server, path, data)
    else:
        events = await events_of(server, path, size="64x48", **{**fields, "prompt": "a [[fake token_ms=40]]"})
    steps = [event for event in events if event["type"] == f"{prefix}.progress"]
    assert [(event["image"], event["step"], event["steps"]) for event in steps] == [
        (image, step, 6) for image in range(2) for step in range(1, 7)
    ]
    assert steps[2]["percent"] == 50
    partials = [event for event in events if event["type"] == f"{prefix}.partial_image"]
    assert [(each["image"], each["partial_image_index"]) for each in partials] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    completed = [event for event in events if event["type"] == f"{prefix}.completed"]
    assert [each["image"] for each in completed] == [0, 1]
    assert completed[0]["usage"]["total_tokens"] == 0
    shown = [opened(each) for each in (*partials, *completed)]
    assert {image.size for image in shown} == {SIZE}
    assert len({pixels(image) for image in shown}) == 6
    assert events.index(partials[0]) < events.index(steps[3]), "in the order in which it was painted"
    assert completed[0]["used"]["seed"] == SEED


@pytest.mark.parametrize(("path", "prefix"), [(EDITS, "image_edit"), (GENERATIONS, "image_generation")])
async def test_a_step_is_told_when_it_is_done(server: Server, path: str, prefix: str) -> None:
    """The last step, which never ends, is at work then."""
    fields: dict[str, Any] = {"stream": True, "steps": 4, "prompt": "[[fake hang_at=3]]"}
    body = {"model": "fake", "size": "64x48", **fields}
    sent: dict[str, Any] = {"data": form(fields, ("image", IMAGE))} if path == EDITS else {"json": body}
    async with server.session.post(server.url + path, headers=server.headers, **sent) as response:
        for step in (1, 2, 3):
            told = json.loads((await response.content.readuntil(b"\n\n")).split(b"data: ", 1)[1])
            assert (told["type"], told["step"]) == (f"{prefix}.progress", step)
        assert await server.load() == (1, 0)
    await nothing_left(server)


async def test_what_is_not_finished_stays_inside_the_mask_too(server: Server) -> None:
    data = form({"stream": True, "partial_images": 3}, ("image", IMAGE), ("mask", mask()))
    for event in await events_of(server, EDITS, data):
        if "b64_json" in event:
            found = pixels(opened(event))
            assert all(found[3 * p : 3 * p + 3] == b"\xff\0\0" for p in range(SIZE[0] * SIZE[1]) if not inside(p))


async def test_a_stream_that_fails_says_so_at_its_end(server: Server) -> None:
    data = form({"stream": True, "prompt": "[[fake garbage_at=2 token_ms=50]]"}, ("image", IMAGE))
    events = await events_of(server, EDITS, data)
    assert events[-1]["error"]["code"] == "engine_garbled"
    assert [event.get("type") for event in events[:-1]] == ["image_edit.progress"] * 2


async def test_an_engine_that_fails_is_an_error(server: Server) -> None:
    found = await refusal(server, ("image", IMAGE), prompt="[[fake garbage_at=1]]")
    assert found[:2] == (502, "engine_garbled")


# Another model, and the background.


async def test_another_model_stands_in(server: Server) -> None:
    async with receiving("127.0.0.2") as host:
        host.then = Answer(200, body=IMAGE)
        url, body = server.url + EDITS, {"model": "broken", "prompt": "a cat", "seed": SEED}
        body |= {"images": [{"image_url": f"{host.url}/a.png"}], "mask": {"image_url": data_url(mask())}}
        async with server.session.post(url, json=body, headers=server.headers) as response:
            assert (response.status, response.headers["x-served-by"]) == (200, "fake")
            assert (await response.json())["data"][0]["b64_json"] == (await edited(server))["data"][0]["b64_json"]
        assert len(host.received) == 1, "it is fetched once"


async def test_true_is_a_job(server: Server) -> None:
    status, text = await send(server, ("image", IMAGE), ("mask", mask()), background=True)
    job = json.loads(text)
    assert (status, job["object"], job["kind"]) == (202, "job", "image")


async def test_headers_are_those_of_every_answer(server: Server) -> None:
    key = await server.create_key("rated", "member", "--requests-per-minute", "1")
    headers = {"Authorization": f"Bearer {key}", "X-Request-ID": "paint-me"}
    data = form({}, ("image", IMAGE))
    async with server.session.post(server.url + EDITS, data=data, headers=headers) as response:
        assert response.status == 200
        assert response.headers["x-request-id"] == "paint-me"
        assert (response.headers["x-served-by"], response.headers["x-queue-position"]) == ("fake", "0")
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
    status, text = await send(server, ("image", IMAGE), key=key)
    assert (status, json.loads(text)["error"]["code"]) == (429, "rate_limit_exceeded")


# Who goes, and what stops then.


async def started(server: Server, **fields: Any) -> "asyncio.Task[tuple[int, str]]":
    """A request that an engine works on."""
    asking = asyncio.create_task(send(server, ("image", IMAGE), ("mask", mask()), prompt=SLOW, **fields))
    await server.until_load(1, 0)
    return asking


@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_who_leaves_stops_the_engine(server: Server, stream: bool) -> None:
    asking = await started(server, stream=stream)
    left = monotonic()
    asking.cancel()
    await nothing_left(server)
    assert monotonic() - left < STOP_SECONDS


async def test_a_cancel_call_stops_it_too(server: Server) -> None:
    headers = {**server.headers, "X-Request-ID": "stop-me"}
    data = form({"prompt": SLOW}, ("image", IMAGE))
    asking = asyncio.ensure_future(server.session.post(server.url + EDITS, data=data, headers=headers).__aenter__())
    await server.until_load(1, 0)
    status, _ = await server.post("/v1/requests/stop-me/cancel")
    response = await asking
    assert (status, response.status) == (200, 499)
    response.close()
    await nothing_left(server)


async def begin_upload(server: Server, fields: bytes = b"") -> tuple[asyncio.StreamWriter, asyncio.StreamReader]:
    """A connection on which the first bytes of an image have been sent, after `fields`."""
    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST {EDITS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
    kind = "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000000\r\n\r\n"
    file = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + b"x" * 1_500_000
    writer.write((head + kind).encode() + fields + file)
    await writer.drain()
    return writer, reader


async def test_only_so_many_are_received_at_once_and_those_cut_leave_nothing(server: Server) -> None:
    lines = [await begin_upload(server) for _ in range(8)]
    await eventually(lambda: len(open_images(server)) >= 6 * 2, what="images on their way in")
    data = form({}, ("image", IMAGE))
    async with server.session.post(server.url + EDITS, data=data, headers=server.headers) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (429, "queue_full")
        assert int(response.headers["retry-after"]) > 0
    other = await server.create_key("other")
    assert (await send(server, ("image", IMAGE), key=other))[0] == 200, "a quarter is left to other projects"
    for writer, _ in lines:
        writer.close()
    await nothing_left(server)
    assert await edited(server)


async def test_cancels_at_any_moment_leave_nothing(server: Server, prove: bool) -> None:
    """Receiving, fetching, making ready, in line, painting, finishing, storing; nothing is left."""
    chance = random.Random(6)
    files_before, blobs_before = len(await pictures_of(server)), blobs_of_files(server.folder)
    large, outcomes = picture(600, 400, "green"), Counter[str]()
    slow = "a [[fake token_ms=25]]"
    async with receiving("127.0.0.2") as host:
        host.then = Answer(200, body=large, stalls=True)
        for number in range(200 if prove else 30):
            fields: dict[str, Any] = {"stream": number % 2 == 0, "prompt": slow, "n": 2}
            fields |= {"partial_images": 2} if number % 4 == 0 else {}
            fields |= {"response_format": chance.choice(("url", "file_id"))} if number % 3 == 0 else {}
            asking = asyncio.create_task(
                as_json(server, images=[{"image_url": f"{host.url}/a.png"}])
                if number % 7 == 0
                else send(server, ("image", large), **fields)
            )
            done, _ = await asyncio.wait({asking}, timeout=chance.uniform(0, 1.0))
            outcomes["done" if done else "cancelled"] += 1
            asking.cancel()
            if number % 10 == 9:
                await nothing_left(server)
    print(f"{dict(outcomes)}")
    assert outcomes["cancelled"] > 10
    assert "event=cancelled" in server.log, "some were let in"
    await nothing_left(server)

    async def whole() -> bool:
        """Every blob that has come is a file of somebody."""
        return blobs_of_files(server.folder) - blobs_before <= {each["id"] for each in await pictures_of(server)}

    await eventually(whole, what="no bytes without a file")
    assert len(await pictures_of(server)) - files_before <= 2 * 10
    assert (await edited(server))["data"]


async def test_many_at_once_are_all_answered_alike(server: Server) -> None:
    expected = (await edited(server))["data"]
    beside = 5  # a project has six places, and the request before may not have left its own yet
    answers = await asyncio.gather(*(send(server, ("image", IMAGE), ("mask", mask())) for _ in range(beside)))
    assert [json.loads(text)["data"] for status, text in answers if status == 200] == [expected] * beside


async def test_of_pictures_that_become_files_one_is_held_at_a_time(server: Server) -> None:
    """Grain that JPEG has thrown much of away takes 20 times as many bytes as PNG, each of the nine."""
    edge, count = 2000, 9
    grain = Image.frombytes("RGB", (edge, edge), random.Random(1).randbytes(3 * edge * edge))
    written = io.BytesIO()
    grain.save(written, "JPEG", quality=5)
    hole = Image.new("RGBA", (edge, edge), (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (0, 0, 50, 50))
    sent = (("image", written.getvalue()), ("mask", encoded(hole)))
    await edited(server, *sent, model="small", response_format="file_id")
    forget_peak(server.pid)
    before = peak(server.pid)
    body = await edited(server, *sent, model="small", n=count, response_format="file_id")
    grown = peak(server.pid) - before
    files = {each["id"]: each["bytes"] for each in await pictures_of(server)}
    sizes = [files[each["file_id"]] for each in body["data"]]
    assert len(sizes) == count
    assert grown < sum(sizes) / 2


async def test_the_program_that_repairs_small_places(server: Server) -> None:
    body = await edited(server, model="telea", prompt="")
    found = pixels(opened(body["data"][0]))
    assert found == pixels(Image.open(io.BytesIO(IMAGE))), "red all around gives red"
    assert body["data"][0]["used"]["engine"] == "opencv"

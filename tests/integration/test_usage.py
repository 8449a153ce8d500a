"""Usage and quotas from outside: what is counted, who sees it, and that nobody goes beyond a quota."""

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.batches import create, finished, jsonl, line, results, submit, upload
from tests.support.images import data_url as image_url
from tests.support.images import picture
from tests.support.jobs import until_at, until_ended
from tests.support.recordings import data_url, wav
from tests.support.server import FAKE, Server, chat_body, eventually, serving
from tests.support.upstream import Plan, providing
from tests.support.wire import wire

CONFIG = FAKE + "slots = 16\nqueue_places = 200\n[usage]\nfold_seconds = 0.1\n[batches]\nsegment_seconds = 0.2\n"
DAY, LEFT_SECONDS = 86_400, 120

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    # What is used is counted by the day, so none may end in the middle.
    await eventually(lambda: DAY - time.time() % DAY > LEFT_SECONDS, within_seconds=LEFT_SECONDS + 10, what="a new day")
    async with serving(CONFIG, environment={"FOREBAY_LOG_FORMAT": "json"}) as running:
        yield running


def forebay(server: Server, *arguments: str) -> str:
    """Run a command beside the server, on its database."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}
    command = [sys.executable, "-m", "forebay.cli", *arguments, "--data-dir", str(server.folder / "data")]
    done = subprocess.run(command, env=kept, cwd=server.folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def limited(server: Server, name: str, *quotas: str) -> str:
    """A key of a project with these quotas."""
    key = await server.create_key(name)
    status, shown = await post(server, f"/admin/projects/{name}", {"quotas": quotas})
    assert status == 200, shown
    return key


async def post(server: Server, path: str, body: Any) -> tuple[int, Any]:
    async with server.session.post(server.url + path, json=body, headers=server.headers) as response:
        return response.status, await response.json()


async def ask(server: Server, key: str, path: str, body: Any) -> tuple[int, Any, dict[str, str]]:
    headers = {"Authorization": f"Bearer {key}"}
    async with server.session.post(server.url + path, json=body, headers=headers) as response:
        return response.status, await response.json(content_type=None), dict(response.headers)


async def used(server: Server, key: str, *groups: str) -> list[dict[str, Any]]:
    """What a project has used today."""
    address = f"{server.url}/v1/usage?limit=1&group_by=" + ",".join(groups)
    async with server.session.get(address, headers={"Authorization": f"Bearer {key}"}) as response:
        assert response.status == 200, await response.text()
        (bucket,) = (await response.json())["data"]
        return list(bucket["results"])


async def counted(server: Server, key: str, requests: int) -> dict[str, Any]:
    """What a project has used when so many requests are counted; nothing more comes after."""

    async def there() -> dict[str, Any] | None:
        found = await used(server, key)
        return found[0] if found and found[0]["num_model_requests"] >= requests else None

    found: dict[str, Any] = await eventually(there, what=f"{requests} requests to be counted")
    assert found["num_model_requests"] == requests
    return found


async def test_every_kind_of_work_is_counted_in_its_own_units(server: Server) -> None:
    key = await server.create_key("kinds")
    headers = {"Authorization": f"Bearer {key}"}
    await ask(server, key, "/v1/chat/completions", chat_body("one two [[fake tokens=3]]"))
    async with await server.send(chat_body("one two [[fake tokens=3]]", stream=True), **headers) as stream:
        assert b"[DONE]" in await stream.read()
    await ask(server, key, "/v1/embeddings", {"model": "fake", "input": ["one two", "three"]})
    await ask(server, key, "/v1/audio/transcriptions", {"model": "fake", "url": data_url(wav(2))})
    await ask(server, key, "/v1/images/generations", {"model": "fake", "prompt": "a", "size": "64x64", "n": 2})
    edit = {"model": "fake", "prompt": "a", "images": [{"image_url": image_url(picture())}]}
    assert (await ask(server, key, "/v1/images/edits", edit))[0] == 200
    assert (await ask(server, key, "/tokenize", {"model": "fake", "content": "one two"}))[0] == 200
    assert (await ask(server, key, "/v1/chat/completions", chat_body("[[fake status=500]]")))[0] == 500
    assert (await ask(server, key, "/v1/chat/completions", chat_body("a", model="none")))[0] == 404
    total = await counted(server, key, 7)
    assert total["audio_seconds"] == 2
    assert total["images"] == 3
    by = {each["capability"]: each for each in await used(server, key, "capability")}
    assert (by["completion"]["num_model_requests"], by["completion"]["input_tokens"]) == (1, 0)
    assert set(by) == {"chat", "completion", "embedding", "transcription", "image_generation", "image_edit"}
    assert (by["chat"]["num_model_requests"], by["chat"]["output_tokens"]) == (2, 6)
    assert by["chat"]["input_tokens"] > 0
    assert by["embedding"]["input_tokens"] > 0
    assert by["image_generation"]["megapixel_steps"] > 0
    assert [each["model"] for each in await used(server, key, "model")] == ["fake"]
    table = forebay(server, "usage", "--project", "kinds", "--by", "capability", "--by", "model")
    assert "image_generation" in table
    assert "transcription" in table


async def test_a_stream_that_its_caller_cuts_is_counted_as_far_as_it_came(server: Server) -> None:
    key = await server.create_key("cutter")
    body = chat_body("[[fake tokens=400 token_ms=20]]", stream=True)
    async with await server.send(body, Authorization=f"Bearer {key}") as stream:
        await stream.content.readuntil(b"\n\n")
        await stream.content.readuntil(b"\n\n")
    found = await counted(server, key, 1)
    assert 0 < found["output_tokens"] < 400


async def test_of_a_hundred_at_once_exactly_as_many_pass_as_the_quota_allows(server: Server) -> None:
    key = await limited(server, "hundred", "requests=37/day", "tokens=1000000/month")

    async def one() -> tuple[int, Any, dict[str, str]]:
        return await ask(server, key, "/v1/chat/completions", chat_body("[[fake tokens=2]]"))

    answers = await asyncio.gather(*(one() for _ in range(100)))
    assert Counter(status for status, _, _ in answers) == {200: 37, 429: 63}
    _, refusal, headers = next(each for each in answers if each[0] == 429)
    assert refusal["error"]["code"] == refusal["error"]["type"] == "insufficient_quota"
    assert headers["x-quota-limit-requests"] == "37"
    assert headers["x-quota-remaining-requests"] == "0"
    assert headers["x-quota-reset-requests"].endswith("s")
    assert 0 < int(headers["x-quota-remaining-tokens"]) < 1_000_000
    assert ("retry-after" in headers) is not (headers.get("x-should-retry") == "false")
    await counted(server, key, 37)
    project = await server.get("/admin/projects/hundred")
    assert next((each["quota"], each["used"]) for each in project["quotas"]) == ("requests=37/day", 37)


async def test_no_request_goes_beyond_a_quota_of_tokens(server: Server) -> None:
    key = await limited(server, "tokens", "tokens=1500/day")
    body = chat_body("[[fake tokens=20]]", max_tokens=20)
    answers = await asyncio.gather(*(ask(server, key, "/v1/chat/completions", body) for _ in range(100)))
    passed = sum(status == 200 for status, _, _ in answers)
    assert 0 < passed < 100
    found = await counted(server, key, passed)
    assert 0 < found["input_tokens"] + found["output_tokens"] <= 1500
    status, refusal, _ = await ask(server, key, "/v1/chat/completions", chat_body("a", max_tokens=3000))
    assert (status, refusal["error"]["code"]) == (429, "insufficient_quota")
    for path, body in (
        ("/v1/embeddings", {"model": "fake", "input": ["word " * 1000]}),
        ("/v1/responses", {"model": "fake", "input": "a", "max_output_tokens": 3000, "store": False}),
    ):
        assert (await ask(server, key, path, body))[0] == 429


async def test_recordings_and_pictures_beyond_a_quota_are_refused_before_they_cost_anything(server: Server) -> None:
    key = await limited(server, "media", "audio_seconds=5/day", "megapixel_steps=1/month")
    recording = {"model": "fake", "url": data_url(wav(2))}
    statuses = [(await ask(server, key, "/v1/audio/transcriptions", recording))[0] for _ in range(3)]
    assert statuses == [200, 200, 429]
    drawing = {"model": "fake", "prompt": "a", "size": "1024x1024", "n": 2}
    assert (await ask(server, key, "/v1/images/generations", drawing))[0] == 429
    found = await counted(server, key, 2)
    assert (found["audio_seconds"], found["megapixel_steps"]) == (4, 0)


async def test_lines_and_jobs_wait_for_what_a_request_holds_and_gives_back(server: Server) -> None:
    key = await limited(server, "patient", "audio_seconds=4/day")
    mine = type(server)(server.process, server.folder, server.folder / "server.log")
    mine.url, mine.key = server.url, key
    before = sum(await server.load())
    slow = {"model": "fake", "url": data_url(wav(4)), "prompt": "[[fake token_ms=20000]]"}
    holding = asyncio.create_task(ask(server, key, "/v1/audio/transcriptions", slow))

    async def held() -> bool:
        return sum(await server.load()) > before

    try:
        await eventually(held, what="the request to hold its quota")
        body = {"model": "fake", "url": data_url(wav(2))}
        spoken = {"custom_id": "a", "method": "POST", "url": "/v1/audio/transcriptions", "body": body}
        batch = await submit(mine, [spoken], endpoint="/v1/audio/transcriptions")
        status, job, _ = await ask(server, key, "/v1/audio/transcriptions", {**body, "background": True})
        assert status == 202, job
        await until_at(mine, job["id"], "decoding")
        assert not holding.done()
        holding.cancel()
        output, errors = await results(mine, await finished(mine, batch["id"]))
        assert (len(output), errors) == (1, [])
        assert (await until_ended(mine, job["id"]))["status"] == "completed"
    finally:
        holding.cancel()
        await mine.disconnect()
    assert (await counted(server, key, 2))["audio_seconds"] == 4


async def test_where_a_quota_is_used_up_nothing_is_received(server: Server) -> None:
    key = await limited(server, "used-up", "audio_seconds=2/day")
    recording = {"model": "fake", "url": data_url(wav(2))}
    assert (await ask(server, key, "/v1/audio/transcriptions", recording))[0] == 200
    await counted(server, key, 1)
    head = (
        f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000000\r\n\r\n"
    )
    async with wire(server.url) as line_of:
        await line_of.send(head.encode())
        refused = await line_of.reply()
    assert refused.status == 429
    assert b"insufficient_quota" in refused.body
    assert (await ask(server, key, "/v1/chat/completions", chat_body("a")))[0] == 200, "that is another quota"


async def test_lines_of_a_batch_beyond_the_quota_are_error_lines(server: Server) -> None:
    key = await limited(server, "lines", "requests=25/day")
    mine = type(server)(server.process, server.folder, server.folder / "server.log")
    mine.url, mine.key = server.url, key
    try:
        file = await upload(mine, jsonl(line(str(number), "[[fake tokens=2]]") for number in range(40)))
        status, batch = await create(mine, file["id"])
        assert status == 200, batch
        output, errors = await results(mine, await finished(mine, batch["id"]))
    finally:
        await mine.disconnect()
    assert (len(output), len(errors)) == (25, 15)
    codes = {each["response"]["body"]["error"]["code"] for each in errors}
    assert codes == {"insufficient_quota"}
    found = await counted(server, key, 25)
    assert found["output_tokens"] == batch_tokens(output)
    assert (await used(server, key, "key"))[0]["api_key_id"].startswith("key_")


def batch_tokens(output: list[dict[str, Any]]) -> int:
    return sum(each["response"]["body"]["usage"]["completion_tokens"] for each in output)


AWAY = """
default_models = false
[models.far]
engine = "upstream"
max_tokens = 64
fallback = ["near"]
fallback_on = ["failed", "circuit_open"]
options = {{ base_url = "{url}/v1", retries_max = 0 }}
[models.near]
engine = "fake"
preload = true
slots = 16
max_tokens = 8192
[usage]
fold_seconds = 0.1
[batches]
segment_seconds = 0.2
"""


async def test_a_stand_in_that_may_write_more_takes_nobody_beyond_a_quota() -> None:
    async with providing() as provider, serving(AWAY.format(url=provider.url)) as server:
        provider.usual = Plan(500)
        short = await limited(server, "short", "tokens=500/day")
        body = {"model": "far", "messages": [{"role": "user", "content": "[[fake tokens=900]]"}]}
        for stream in (True, False):
            status, refusal, _ = await ask(server, short, "/v1/chat/completions", {**body, "stream": stream})
            assert (status, refusal["error"]["code"]) == (429, "insufficient_quota")
        background = {"model": "far", "input": "[[fake tokens=900]]", "background": True}
        _, made, _ = await ask(server, short, "/v1/responses", background)
        mine = type(server)(server.process, server.folder, server.folder / "server.log")
        mine.url, mine.key = server.url, short
        try:
            ended = await until_ended(mine, made["id"])
            assert (ended["status"], ended["error"]["code"]) == ("failed", "insufficient_quota")
            assert await used(server, short) == []
            mine.key = await limited(server, "lines", "tokens=20000/day")
            lines = [line(f"line-{number}", "[[fake tokens=900]]", model="far") for number in range(10)]
            output, errors = await results(mine, await finished(mine, (await submit(mine, lines))["id"]))
            assert (len(output), errors) == (10, []), "each waits until those before it have given back the rest"
        finally:
            await mine.disconnect()
        long = await limited(server, "long", "tokens=20000/day")
        answers = await asyncio.gather(*(ask(server, long, "/v1/chat/completions", body) for _ in range(40)))
        passed = sum(status == 200 for status, _, _ in answers)
        assert 0 < passed < 40
        assert {status for status, _, _ in answers} == {200, 429}
        found = await counted(server, long, passed)
        assert found["output_tokens"] == passed * 900
        assert found["input_tokens"] + found["output_tokens"] <= 20_000
        assert [each["model"] for each in await used(server, long, "model")] == ["near"]


async def test_a_line_tries_its_own_model_again_where_the_quota_forbids_the_one_that_stands_in() -> None:
    async with providing() as provider, serving(AWAY.format(url=provider.url)) as server:
        provider.plans.append(Plan(500))
        server.key = await limited(server, "short", "tokens=500/day")
        batch = await submit(server, [line("one", "[[fake tokens=900]]", model="far")])
        output, errors = await results(server, await finished(server, batch["id"]))
        assert (len(output), errors, len(provider.asked)) == (1, [], 2)
        assert [each["model"] for each in await used(server, server.key, "model")] == ["far"]


async def test_where_the_engine_counts_nothing_every_door_charges_the_same() -> None:
    async with providing() as provider, serving(AWAY.format(url=provider.url)) as server:
        provider.usual = Plan(counts=False)
        asked = line("one", "Say where it is. " * 20, model="far")
        key = await server.create_key("online")
        status, answer, _ = await ask(server, key, "/v1/chat/completions", asked["body"])
        online = await counted(server, key, 1)
        charged = {"input_tokens": online["input_tokens"], "output_tokens": online["output_tokens"]}
        said = answer["usage"]
        assert (status, said["prompt_tokens"], said["completion_tokens"]) == (200, *charged.values())
        assert charged["input_tokens"] > 80
        assert charged["output_tokens"] == 3, "one for each event"
        mine = type(server)(server.process, server.folder, server.folder / "server.log")
        mine.url, mine.key = server.url, await server.create_key("lines")
        try:
            done = await finished(mine, (await submit(mine, [asked]))["id"])
            ((output,), errors) = await results(mine, done)
            assert (output["response"]["body"]["usage"], errors) == (said, [])
            assert {name: done["usage"][name] for name in charged} == charged
            assert (await counted(server, mine.key, 1)).items() >= charged.items()
            mine.key = await server.create_key("responses")
            body = {"model": "far", "input": "Say where it is. " * 20}
            status, told, _ = await ask(server, mine.key, "/v1/responses", body)
            _, made, _ = await ask(server, mine.key, "/v1/responses", {**body, "background": True})
            await until_ended(mine, made["id"])
            again = await mine.get(f"/v1/responses/{made['id']}")
            assert told["usage"] == again["usage"]
            assert told["usage"]["input_tokens"] > 80
            both = await counted(server, mine.key, 2)
            assert both["input_tokens"] == 2 * told["usage"]["input_tokens"]
        finally:
            await mine.disconnect()


async def test_stored_bytes_are_a_level_that_falls_again(server: Server) -> None:
    key = await limited(server, "stored", "stored_bytes=1000")
    file = await upload(server, b"x" * 900, purpose="user_data", key=key)
    form = aiohttp.FormData({"purpose": "user_data"})
    form.add_field("file", b"y" * 101, filename="y")
    headers = {"Authorization": f"Bearer {key}"}
    async with server.session.post(f"{server.url}/v1/files", data=form, headers=headers) as response:
        refusal = await response.json()
        assert (response.status, refusal["error"]["code"]) == (429, "insufficient_quota")
        assert response.headers["x-quota-remaining-stored-bytes"] == "100"
        assert "retry-after" not in response.headers
    async with server.session.delete(f"{server.url}/v1/files/{file['id']}", headers=headers) as response:
        assert response.status == 200
    await upload(server, b"z" * 1000, purpose="user_data", key=key)


async def test_a_project_sees_its_own_and_an_administrator_everything(server: Server) -> None:
    one, two = await server.create_key("own_a"), await server.create_key("own_b")
    for key in (one, two, two):
        await ask(server, key, "/v1/chat/completions", chat_body("[[fake tokens=1]]"))
    await counted(server, one, 1)
    await counted(server, two, 2)
    assert [each["project"] for each in await used(server, one, "project")] == ["own_a"]
    everything = {each["project"]: each["num_model_requests"] for each in await used(server, server.key, "project")}
    assert (everything["own_a"], everything["own_b"]) == (1, 2)
    other = [each["project_id"] for each in await used(server, server.key, "project") if each["project"] == "own_b"]
    address = f"{server.url}/v1/usage?project_ids={other[0]}"
    async with server.session.get(address, headers={"Authorization": f"Bearer {one}"}) as response:
        assert not [each for bucket in (await response.json())["data"] for each in bucket["results"]]


async def test_pages_of_days_and_mistakes(server: Server) -> None:
    days: list[str] = []
    page = ""
    while True:
        found = await server.get(f"/v1/usage?start_time=2026-01-01&end_time=2026-02-20&limit=31{page}")
        days += [bucket["day"] for bucket in found["data"]]
        if not found["has_more"]:
            break
        page = f"&page={found['next_page']}"
    assert (days[0], days[-1], len(days)) == ("2026-01-01", "2026-02-20", 51)
    days_out_of_bounds = ("start_time=0999-05-05", "start_time=1969-12-31", "start_time=9999-12-31&end_time=9999-12-31")
    for query in (
        *("group_by=x", "start_time=x", "end_time=2026-13-01", "page=x", "bucket_width=1h", "limit=0"),
        *days_out_of_bounds,
    ):
        found = await server.get(f"/v1/usage?{query}")
        assert found["error"]["type"] == "invalid_request_error", query


async def test_limits_are_listed_and_set_from_the_command_line(server: Server) -> None:
    await server.create_key("shop")
    shown = forebay(server, "projects", "set", "shop", "--weight", "2", "--quota", "requests=9/month")
    assert "requests=9/month" in shown
    assert "shop" in forebay(server, "projects", "list")
    project = await server.get("/admin/projects/shop")
    assert (project["weight"], project["quotas"][0]["limit"]) == (2, 9)
    status, answer = await post(server, "/admin/projects/shop", {"quotas": ["requests=9"]})
    assert (status, answer["error"]["param"]) == (400, "quotas")
    status, answer = await post(server, "/admin/projects/shop", {"reset": True})
    assert (status, answer["quotas"]) == (200, [])

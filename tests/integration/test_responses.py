"""Responses on a running server, over SQLite and PostgreSQL: kept, continued, in the background, streamed again."""

import asyncio
import base64
import copy
import io
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
from PIL import Image
from pydantic import SecretStr

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.store.database import Database
from forebay.store.key_format import Role
from forebay.store.keys import KeyStore
from tests.support import postgres
from tests.support.batches import finished, results, submit
from tests.support.logs import unforeseen
from tests.support.mutate import RESPONSES, spoiled
from tests.support.receiver import Receiver, receiving
from tests.support.server import FAKE, Server, eventually, serving

CONFIG = (
    FAKE
    + """
slots = 4
options = { tools = true, vision = true }
[responses]
per_project_max = 40
turns_max = 5
background_at_once = 3
live_per_project_max = 30
[scheduler]
headroom_seconds = 0.2
[supervisor]
backoff_seconds_min = 0.05
[jobs]
backoff_seconds_min = 0.05
prune_seconds = 1
[outbound]
allowed_networks = ["127.0.0.2/32"]
"""
)
ANSWER_SECONDS = 60.0
ENDED = {"completed", "incomplete", "failed", "cancelled"}
TOOL: Any = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str | None:
    """The database: none is SQLite in the data folder."""
    return postgres.new_database() if request.param == "postgres" else None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(url: str | None) -> AsyncIterator[Server]:
    async with serving(CONFIG, environment={} if url is None else {"FOREBAY_DATABASE_URL": url}) as running:
        yield running
        assert not unforeseen(running.log), unforeseen(running.log)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keys(server: Server, url: str | None) -> dict[str, str]:
    """Keys of further projects, by name."""
    secret = None if url is None else SecretStr(url)
    database = await Database.open(Settings(data_dir=server.folder / "data", database_url=secret))
    store = KeyStore(database, SystemClock())
    found = {name: (await store.create_key(name))[1] for name in ("stranger", "small", "hooks", "many")}
    found["reader"] = (await store.create_key("small", role=Role.READ_ONLY))[1]
    await database.close()
    return found


@pytest.fixture
def client(server: Server) -> openai.AsyncOpenAI:
    return server.client()


async def until_ended(client: openai.AsyncOpenAI, response_id: str, within_seconds: float = 20) -> Any:
    async def ended() -> Any:
        found = await client.responses.retrieve(response_id)
        return found if found.status in ENDED else None

    return await eventually(ended, within_seconds=within_seconds, what=f"the end of {response_id}")


async def read(client: openai.AsyncOpenAI, response_id: str, after: int | None = None) -> list[Any]:
    more: Any = {} if after is None else {"starting_after": after}
    return [event async for event in await client.responses.retrieve(response_id, stream=True, **more)]


def said(events: list[Any]) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


async def test_a_response_is_kept_before_its_end_is_sent(client: openai.AsyncOpenAI) -> None:
    whole = await client.responses.create(model="fake", input="Hi [[fake tokens=3]]", metadata={"a": "b"})
    assert (whole.status, whole.output_text) == ("completed", "tok0 tok1 tok2 ")
    stream = await client.responses.create(model="fake", input="Hi [[fake tokens=3]]", stream=True)
    events = [event async for event in stream]
    for answer in (whole, events[-1].response):  # type: ignore[union-attr]
        assert await client.responses.retrieve(answer.id) == answer
    items = await client.responses.input_items.list(whole.id)
    [item] = items.data
    assert item.to_dict()["content"] == [{"type": "input_text", "text": "Hi [[fake tokens=3]]"}]


async def test_what_is_not_to_be_stored_is_not(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(model="fake", input="Hi", store=False)
    assert answer.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="fake", input="Hi", previous_response_id=answer.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


async def test_a_conversation_goes_on_and_is_bounded(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(model="fake", input="one two three [[fake tokens=2]]")
    first, counts = answer.id, [answer.usage.input_tokens]  # type: ignore[union-attr]
    for _ in range(4):
        answer = await client.responses.create(
            model="fake", input="four [[fake tokens=1]]", previous_response_id=answer.id
        )
        counts.append(answer.usage.input_tokens)  # type: ignore[union-attr]
    assert counts == [5, 5 + 2 + 3, 10 + 4, 14 + 4, 18 + 4]
    echoed = await client.responses.create(model="fake", input="x [[fake echo=1]]", instructions="Be brief.")
    assert echoed.instructions == "Be brief."
    answer = await client.responses.create(model="fake", input="five", previous_response_id=answer.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="fake", input="six", previous_response_id=answer.id)
    assert caught.value.code == "conversation_too_long"
    await client.responses.delete(first)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="fake", input="four", previous_response_id=answer.id)
    assert caught.value.code in ("previous_response_not_found", "conversation_too_long")


async def test_a_tool_is_called_and_answers(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="fake", input="[[fake tool=look]]", tools=[TOOL])
    [call] = first.output
    assert (call.type, call.name, call.arguments) == ("function_call", "look", "{}")  # type: ignore[union-attr]
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}  # type: ignore[union-attr]
    second = await client.responses.create(model="fake", input=[output], tools=[TOOL], previous_response_id=first.id)
    assert second.status == "completed"


async def test_images_are_looked_at_and_stay_in_the_conversation(client: openai.AsyncOpenAI) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")

    def asking(url: str) -> Any:
        text = {"type": "input_text", "text": "What is it? [[fake tokens=2]]"}
        return [{"role": "user", "content": [text, {"type": "input_image", "image_url": url}]}]

    good = asking("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    first = await client.responses.create(model="fake", input=good)
    second = await client.responses.create(model="fake", input="And?", previous_response_id=first.id)
    assert first.usage
    assert second.usage
    assert second.usage.input_tokens > first.usage.input_tokens > 60  # the fake engine counts an image as 64
    later = await client.responses.create(model="fake", input=good, background=True)
    assert (await until_ended(client, later.id)).status == "completed"
    for url, code in (
        ("http://127.0.0.1:1/x.png", "url_not_allowed"),
        ("data:image/svg+xml;base64,AA", "media_invalid"),
    ):
        for background in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.responses.create(model="fake", input=asking(url), background=background)
            assert (caught.value.code, caught.value.param) == (code, "input")


async def test_nobody_else_sees_a_response(server: Server, client: openai.AsyncOpenAI, keys: dict[str, str]) -> None:
    answer = await client.responses.create(model="fake", input="Hi")
    live = await client.responses.create(model="fake", input="[[fake tokens=2000 rate=50]]", background=True)
    other = server.client(api_key=keys["stranger"])
    for one in (answer.id, live.id, "resp_nothing"):
        calls: list[Any] = [
            other.responses.retrieve(one),
            other.responses.input_items.list(one),
            other.responses.cancel(one),
            other.responses.delete(one),
            other.responses.retrieve(one, stream=True),
        ]
        for call in calls:
            with pytest.raises(openai.NotFoundError):
                await call
        with pytest.raises(openai.BadRequestError):
            await other.responses.create(model="fake", input="Hi", previous_response_id=one)
    reader = server.client(api_key=keys["reader"])
    with pytest.raises(openai.PermissionDeniedError):
        await reader.responses.create(model="fake", input="Hi")
    assert (await client.responses.cancel(live.id)).status == "cancelled"


async def test_the_oldest_make_room(server: Server, keys: dict[str, str]) -> None:
    client = server.client(api_key=keys["many"])
    ids = [(await client.responses.create(model="fake", input=f"{n} [[fake tokens=1]]")).id for n in range(45)]

    async def only_the_newest() -> bool:
        try:
            await client.responses.retrieve(ids[4])
        except openai.NotFoundError:
            return True
        return False

    await eventually(only_the_newest, what="room for new responses")
    for kept in (ids[5], ids[-1]):
        await client.responses.retrieve(kept)


async def test_in_the_background(client: openai.AsyncOpenAI, server: Server) -> None:
    answer = await client.responses.create(model="fake", input="Hi [[fake tokens=3 token_ms=30]]", background=True)
    assert (answer.status, answer.output, answer.background) == ("queued", [], True)
    live = await client.responses.create(model="fake", input="[[fake tokens=2000 rate=50]]", background=True)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="fake", input="Hi", previous_response_id=live.id)
    assert caught.value.code == "previous_response_unfinished"
    with pytest.raises(openai.ConflictError):
        await client.responses.delete(live.id)
    await client.responses.cancel(live.id)
    ended = await until_ended(client, answer.id)
    assert (ended.status, ended.output_text, ended.error) == ("completed", "tok0 tok1 tok2 ", None)
    assert ended.created_at == answer.created_at
    assert ended.completed_at >= ended.created_at
    job = await server.get(f"/v1/jobs/{answer.id}")
    assert (job["kind"], job["status"], job["model"]) == ("response", "completed", "fake")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.retrieve(answer.id, stream=True)
    assert caught.value.code == "stream_not_supported"
    await client.responses.create(model="fake", input="Hi", previous_response_id=answer.id)
    await client.responses.delete(answer.id)
    assert (await server.get(f"/v1/jobs/{answer.id}"))["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("text", "fields", "status", "code"),
    [
        ("[[fake tokens=9]]", {"max_output_tokens": 3}, "incomplete", None),
        ("[[fake context_error=1]]", {}, "failed", "context_length_exceeded"),
        ("[[fake garbage_at=2]]", {}, "failed", "engine_garbled"),
    ],
)
async def test_other_ends_are_told_and_streamed_to_their_end(
    client: openai.AsyncOpenAI, text: str, fields: Any, status: str, code: str | None
) -> None:
    stream = await client.responses.create(model="fake", input=text, background=True, stream=True, **fields)
    events = [event async for event in stream]
    assert events[-1].type == f"response.{status}"
    response = await client.responses.retrieve(events[-1].response.id)  # type: ignore[union-attr]
    assert (response.status, response.error and response.error.code) == (status, code)
    assert await read(client, response.id) == [event for event in events if event in await read(client, response.id)]
    if status == "incomplete":
        assert response.incomplete_details
        assert response.incomplete_details.reason == "max_output_tokens"


async def test_a_stream_goes_on_where_it_broke_off(client: openai.AsyncOpenAI) -> None:
    text = "[[fake tokens=40 token_ms=25]]"
    stream = await client.responses.create(model="fake", input=text, background=True, stream=True)
    begun: list[Any] = []
    async for event in stream:
        begun.append(event)
        if len(begun) == 6:
            break
    await stream.close()
    name = begun[0].response.id
    rest = await read(client, name, begun[-1].sequence_number)
    events = begun + rest
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert said(events) == "".join(f"tok{number} " for number in range(40))
    assert events[-1].response == await client.responses.retrieve(name)
    assert await read(client, name) == events
    assert await read(client, name, len(events) - 2) == events[-1:]
    assert await read(client, name, len(events)) == []


async def test_many_read_one_response_at_once(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(
        model="fake", input="[[fake tokens=30 token_ms=20]]", background=True, stream=True
    )
    name = (await anext(aiter(answer))).response.id  # type: ignore[union-attr]
    found = await asyncio.gather(*(read(client, name, after) for after in (None, -1, 0, 2, 3)))
    assert found[0] == found[1]
    for events, after in zip(found[2:], (0, 2, 3), strict=True):
        assert events == found[0][after + 1 :]


async def test_a_cancel_stops_the_engine(client: openai.AsyncOpenAI, server: Server) -> None:
    await server.until_load(0, 0)
    stream = await client.responses.create(
        model="fake", input="[[fake tokens=2000 rate=50]]", background=True, stream=True
    )
    events = []
    async for event in stream:
        events.append(event)
        if event.type == "response.output_text.delta":
            cancelled = await client.responses.cancel(events[0].response.id)  # type: ignore[union-attr]
            assert cancelled.status == "cancelled"
            await server.until_load(0, 0)
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "cancelled"
    assert (await client.responses.cancel(cancelled.id)).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.cancel((await client.responses.create(model="fake", input="Hi")).id)
    assert caught.value.code == "not_cancellable"


async def test_a_response_that_waits_is_cancelled_at_once(client: openai.AsyncOpenAI) -> None:
    busy = [
        await client.responses.create(model="fake", input="[[fake tokens=2000 rate=50]]", background=True)
        for _ in range(3)
    ]
    waiting = await client.responses.create(model="fake", input="Hi", background=True, stream=True)
    answer = [event async for event in _cancelling(client, waiting, busy)]
    assert [event.type for event in answer] == ["response.failed"]
    assert answer[0].response.status == "cancelled"


async def _cancelling(client: openai.AsyncOpenAI, stream: Any, busy: list[Any]) -> AsyncIterator[Any]:
    """The events of the last one while it is cancelled, and the others after it."""
    jobs = (await client.get("/jobs?kind=response&limit=1", cast_to=object))["data"]  # type: ignore[call-overload]
    assert (await client.responses.cancel(jobs[0]["id"])).status == "cancelled"
    async for event in stream:
        yield event
    for one in busy:
        assert (await client.responses.cancel(one.id)).status == "cancelled"


async def test_an_engine_that_dies_begins_the_stream_anew(client: openai.AsyncOpenAI, server: Server) -> None:
    """Numbers go on, none is told twice with another event, and what is kept is the last attempt alone."""
    stream = await client.responses.create(
        model="fake", input="[[fake tokens=120 token_ms=30]]", background=True, stream=True
    )
    events: list[Any] = []
    async for event in stream:
        events.append(event)
        if len(events) == 5:
            os.kill(server.engine_pids("forebay.engines.fake")[0], signal.SIGKILL)
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))
    begun = [place for place, event in enumerate(events) if event.type == "response.created"]
    assert len(begun) == 2
    last = events[begun[1] :]
    assert said(last) == "".join(f"tok{number} " for number in range(120))
    assert events[-1].type == "response.completed"
    assert await read(client, events[0].response.id) == last
    assert await read(client, events[0].response.id, numbers[3]) == last


async def test_the_same_key_makes_one_response(client: openai.AsyncOpenAI, server: Server) -> None:
    header = {"Idempotency-Key": "once"}
    body: Any = {"model": "fake", "input": "Hi [[fake tokens=2]]", "background": True}
    made = await asyncio.gather(*(client.responses.create(**body, extra_headers=header) for _ in range(5)))
    assert len({one.id for one in made}) == 1
    with pytest.raises(openai.ConflictError):
        await client.responses.create(**{**body, "input": "Ho"}, extra_headers=header)
    streamed: Any = {**body, "stream": True}
    header = {"Idempotency-Key": "streamed once"}
    names = set()
    for _ in range(2):
        events = [event async for event in await client.responses.create(**streamed, extra_headers=header)]
        assert events[-1].type == "response.completed"
        names.add(events[-1].response.id)
    assert len(names) == 1


async def test_the_number_of_unfinished_responses_is_bounded(server: Server, keys: dict[str, str]) -> None:
    client = server.client(api_key=keys["small"])
    made = []
    with pytest.raises(openai.RateLimitError) as caught:
        for _ in range(40):
            made.append(
                await client.responses.create(model="fake", input="[[fake tokens=2000 rate=50]]", background=True)
            )
    assert caught.value.code == "response_limit_reached"
    assert len(made) == 30
    await asyncio.gather(*(client.responses.cancel(one.id) for one in made))


async def test_webhooks_tell_of_the_end(server: Server, keys: dict[str, str]) -> None:
    client = server.client(api_key=keys["hooks"])
    async with receiving("127.0.0.2") as receiver:
        hook: Any = await client.post("/webhooks", cast_to=object, body={"url": receiver.url})
        made = {
            "response.completed": (await _run(client, "[[fake tokens=1]]")),
            "response.incomplete": (await _run(client, "[[fake tokens=9]]", max_output_tokens=2)),
            "response.failed": (await _run(client, "[[fake context_error=1]]")),
        }
        live = await client.responses.create(model="fake", input="[[fake tokens=99 rate=5]]", background=True)
        await client.responses.cancel(live.id)
        made["response.cancelled"] = live.id
        await _check_told(client, receiver, hook["secret"], made)


async def _run(client: openai.AsyncOpenAI, text: str, **fields: Any) -> str:
    answer = await client.responses.create(model="fake", input=text, background=True, **fields)
    await until_ended(client, answer.id)
    return answer.id


async def _check_told(client: openai.AsyncOpenAI, receiver: Receiver, secret: str, made: dict[str, str]) -> None:
    told = {}
    for request in await receiver.until(len(made)):
        event: Any = client.webhooks.unwrap(request.body, request.headers, secret=secret)
        told[event.type] = event.data.id
    assert told == made


async def test_lines_of_a_batch(server: Server) -> None:
    def line(name: str, **body: Any) -> dict[str, Any]:
        return {"custom_id": name, "method": "POST", "url": "/v1/responses", "body": {"model": "fake", **body}}

    lines = [line(f"l{number}", input=f"Hi [[fake tokens={number % 5 + 1}]]") for number in range(20)]
    lines += [line("background", input="Hi", background=True), line("tool", input="[[fake tool=look]]", tools=[TOOL])]
    batch = await finished(server, (await submit(server, lines, endpoint="/v1/responses"))["id"])
    output, errors = await results(server, batch)
    assert [(each["custom_id"], each["response"]["body"]["error"]["param"]) for each in errors] == [
        ("background", "background")
    ]
    answers = {each["custom_id"]: each["response"]["body"] for each in output}
    assert answers["l3"]["output"][0]["content"][0]["text"] == "tok0 tok1 tok2 tok3 "
    assert answers["tool"]["output"][0]["type"] == "function_call"
    assert {answer["store"] for answer in answers.values()} == {False}
    assert batch["usage"]["output_tokens"] == sum(answer["usage"]["output_tokens"] for answer in answers.values())


async def test_mutated_requests_are_the_callers_fault(server: Server, prove: bool) -> None:
    chance = random.Random(4711)
    limit = asyncio.Semaphore(16)

    async def one(data: bytes) -> int:
        async with limit:
            try:
                async with (
                    asyncio.timeout(ANSWER_SECONDS),
                    server.session.post(f"{server.url}/v1/responses", data=data, headers=server.headers) as answer,
                ):
                    text = (await answer.read()).decode()
            except (TimeoutError, aiohttp.ClientError) as error:
                raise AssertionError(f"{error!r} for {data[:2000]!r}; {server.log[-4000:]}") from error
        assert answer.status < 500, (answer.status, text, data[:2000], unforeseen(server.log))
        if answer.status >= 400:
            assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
        return answer.status

    bodies = [spoiled(chance, copy.deepcopy(chance.choice(RESPONSES))) for _ in range(3000 if prove else 300)]
    statuses = await asyncio.gather(*map(one, bodies))
    assert {200, 400} <= set(statuses)

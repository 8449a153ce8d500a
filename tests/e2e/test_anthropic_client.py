"""The official Anthropic client, unmodified, against a real model and the fake engine."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import jsonschema
import pytest
import pytest_asyncio
from pydantic import BaseModel

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.store.database import Database
from forebay.store.keys import KeyStore
from tests.support.models import smollm2_path
from tests.support.server import Server, serving

TEMPLATE = Path(__file__).parents[1] / "support" / "chatml_tools.jinja"
CONFIG = """
default_models = false
[models.smol]
engine = "llama.cpp"
source = "file:{path}"
preload = true
slots = 4
options = {{ context = 1024, chat_template_file = "{template}" }}
[models.fake]
engine = "fake"
preload = true
slots = 2
options = {{ tools = true }}
[models.narrow]
engine = "fake"
preload = true
slots = 1
queue_places = 1
"""
HAMLET: Any = [{"role": "user", "content": "Who wrote Hamlet?"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ASK_WEATHER: Any = [{"role": "user", "content": "What is the weather in Paris?"}]

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


class Mood(BaseModel):
    mood: Literal["good", "bad"]
    happy: bool


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG.format(path=smollm2_path(), template=TEMPLATE)) as running:
        yield running
        assert "request.bug" not in running.log


def client_of(server: Server, **options: Any) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(**{"base_url": server.url, "api_key": server.key, "max_retries": 0, **options})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(server: Server) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with client_of(server) as made:
        yield made


def asking(text: str, model: str = "fake", **fields: Any) -> Any:
    return {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": text}], **fields}


async def test_a_message(client: anthropic.AsyncAnthropic) -> None:
    message = await client.messages.create(
        model="smol", max_tokens=12, messages=HAMLET, system="You know books.", extra_body={"temperature": 0}
    )
    assert (message.type, message.role, message.model) == ("message", "assistant", "smol")
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text.strip()  # type: ignore[union-attr]
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 12
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) > 15
    assert message._request_id is not None
    assert message.id == f"msg_{message._request_id.removeprefix('req_')}"


async def test_streamed_and_whole_are_the_same(client: anthropic.AsyncAnthropic) -> None:
    fields: Any = {"model": "smol", "max_tokens": 16, "messages": HAMLET, "extra_body": {"temperature": 0}}
    whole = await client.messages.create(**fields)
    texts = []
    async with client.messages.stream(**fields) as stream:
        async for text in stream.text_stream:
            texts.append(text)
        message = await stream.get_final_message()
    assert len(texts) > 5
    assert "".join(texts) == whole.content[0].text == message.content[0].text  # type: ignore[union-attr]
    assert (message.stop_reason, message.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


async def test_the_plain_stream(client: anthropic.AsyncAnthropic) -> None:
    kinds = [event.type async for event in await client.messages.create(**asking("[[fake tokens=2]]", stream=True))]
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 2,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


async def test_a_turn_is_continued(client: anthropic.AsyncAnthropic) -> None:
    first = await client.messages.create(model="smol", max_tokens=8, messages=HAMLET)
    more: Any = [*HAMLET, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And Faust?"}]
    second = await client.messages.create(model="smol", max_tokens=8, messages=more)
    assert second.content[0].text  # type: ignore[union-attr]


async def test_words_put_into_the_model_s_mouth_are_continued(client: anthropic.AsyncAnthropic) -> None:
    begun: Any = [*HAMLET, {"role": "assistant", "content": "Hamlet was written by"}]
    message = await client.messages.create(
        model="smol", max_tokens=4, messages=begun, extra_body={"temperature": 0}, thinking={"type": "disabled"}
    )
    assert message.content[0].text.startswith(" William")  # type: ignore[union-attr]


async def test_the_stop_sequence_is_named(client: anthropic.AsyncAnthropic) -> None:
    fields: Any = {"model": "smol", "messages": HAMLET, "extra_body": {"temperature": 0}, "max_tokens": 24}
    text = (await client.messages.create(**fields)).content[0].text
    stop = text.split()[2]
    message = await client.messages.create(**fields, stop_sequences=["\u2603", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert stop not in message.content[0].text  # type: ignore[union-attr]
    async with client.messages.stream(**fields, stop_sequences=[stop]) as stream:
        assert (await stream.get_final_message()).stop_sequence == stop


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
async def test_tools_there_and_back(client: anthropic.AsyncAnthropic, choice: Any) -> None:
    fields: Any = {"model": "smol", "max_tokens": 60, "tools": [WEATHER], "extra_body": {"temperature": 0}}
    message = await client.messages.create(**fields, messages=ASK_WEATHER, tool_choice=choice)
    (use,) = [block for block in message.content if block.type == "tool_use"]
    assert message.stop_reason == "tool_use"
    assert use.name == "get_weather"
    jsonschema.validate(use.input, WEATHER["input_schema"])
    async with client.messages.stream(**fields, messages=ASK_WEATHER, tool_choice=choice) as stream:
        streamed = await stream.get_final_message()
    assert [block.input for block in streamed.content if block.type == "tool_use"] == [use.input]
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "Sunny, 21 degrees."}
    answer = await client.messages.create(
        **fields,
        messages=[
            *ASK_WEATHER,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]},
        ],
        tool_choice={"type": "none"},
    )
    assert answer.content[0].type == "text"


async def test_calls_beside_each_other(client: anthropic.AsyncAnthropic) -> None:
    fields = asking("[[fake tool=get_weather calls=3]]", tools=[WEATHER])
    whole = await client.messages.create(**fields)
    async with client.messages.stream(**fields) as stream:
        kinds = [event.type async for event in stream]
        streamed = await stream.get_final_message()
    uses = [block for block in whole.content if block.type == "tool_use"]
    assert [(use.name, use.input) for use in uses] == [("get_weather", {})] * 3
    assert len({use.id for use in uses}) == 3
    assert [block.type for block in streamed.content] == ["tool_use"] * 3
    assert kinds.count("content_block_stop") == 3
    assert whole.stop_reason == streamed.stop_reason == "tool_use"


async def test_thoughts(client: anthropic.AsyncAnthropic) -> None:
    fields = asking("[[fake think=3 tokens=2]]", thinking={"type": "enabled", "budget_tokens": 1024})
    whole = await client.messages.create(**fields)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert whole.content[0].thinking == "hm0 hm1 hm2 "  # type: ignore[union-attr]
    async with client.messages.stream(**fields) as stream:
        assert (await stream.get_final_message()).content[0] == whole.content[0]
    silent = await client.messages.create(**{**fields, "thinking": {"type": "disabled"}})
    assert [block.type for block in silent.content] == ["text"]


async def test_a_schema(client: anthropic.AsyncAnthropic) -> None:
    schema = {**Mood.model_json_schema(), "additionalProperties": False}
    message = await client.messages.create(
        model="smol",
        max_tokens=60,
        messages=[{"role": "user", "content": "How are you?"}],
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert Mood.model_validate_json(message.content[0].text).mood in {"good", "bad"}  # type: ignore[union-attr]


async def test_parse_gives_a_pydantic_object(client: anthropic.AsyncAnthropic) -> None:
    messages: Any = [{"role": "user", "content": "Answer in one word: how are you?"}]
    message = await client.messages.parse(
        model="smol", max_tokens=200, messages=messages, output_format=Mood, extra_body={"temperature": 0}
    )
    assert isinstance(message.parsed_output, Mood)


async def test_tokens_are_counted_as_the_model_reads_them(client: anthropic.AsyncAnthropic) -> None:
    fields: Any = {"model": "smol", "messages": HAMLET, "system": "Be brief.", "tools": [WEATHER]}
    counted = await client.messages.count_tokens(**fields)
    used = (await client.messages.create(**fields, max_tokens=1)).usage
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)
    bare = await client.messages.count_tokens(model="smol", messages=HAMLET)
    assert 20 < bare.input_tokens < counted.input_tokens


async def test_the_tokens_of_a_text(server: Server) -> None:
    async def post(path: str, **fields: Any) -> tuple[int, Any]:
        url, body = f"{server.url}{path}", {"model": "smol", **fields}
        async with server.session.post(url, json=body, headers=server.headers) as response:
            return response.status, await response.json()

    status, made = await post("/tokenize", content="Who wrote Hamlet?")
    assert status == 200
    assert made["count"] == len(made["tokens"]) > 2
    assert await post("/tokenize", prompt="Who wrote Hamlet?") == (200, made)
    status, back = await post("/detokenize", tokens=made["tokens"])
    assert (status, back["content"]) == (200, "Who wrote Hamlet?")
    status, refusal = await post("/detokenize", tokens=[10_000_000])
    assert (status, refusal["error"]["type"]) == (400, "invalid_request_error")


async def test_the_beta_door_and_its_headers(client: anthropic.AsyncAnthropic) -> None:
    message = await client.beta.messages.create(
        **asking("[[fake tokens=1]]"), betas=["context-management-2025-06-27"], cache_control={"type": "ephemeral"}
    )
    assert message.content[0].text == "tok0 "  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"model": "nope"}, anthropic.NotFoundError, "model_not_found"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_value"),
        ({"messages": [{"role": "user", "content": "[[fake context_error=1]]"}]}, anthropic.BadRequestError, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 9_000_000}]}, anthropic.RequestTooLargeError, "payload_too_large"),
        ({"messages": [{"role": "user", "content": "[[fake status=500]]"}]}, anthropic.InternalServerError, "engine_error"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, anthropic.BadRequestError, "capability_not_supported"),
    ],
)  # fmt: skip
async def test_errors_are_of_its_classes(
    client: anthropic.AsyncAnthropic, fields: Any, kind: type[anthropic.APIStatusError], code: str
) -> None:
    with pytest.raises(kind) as raised:
        await client.messages.create(**{**asking("Hi"), **fields})
    body: Any = raised.value.body
    assert body["type"] == "error"
    assert body["error"]["code"] == code
    assert body["request_id"] == raised.value.request_id


async def test_who_has_no_key_is_told_so(server: Server) -> None:
    async with client_of(server, api_key="fb_nothing") as stranger:
        with pytest.raises(anthropic.AuthenticationError) as raised:
            await stranger.messages.create(**asking("Hi"))
    body: Any = raised.value.body
    assert body["error"]["type"] == "authentication_error"
    assert raised.value.request_id
    async with client_of(server, api_key=None, auth_token=server.key) as bearer:
        assert (await bearer.messages.create(**asking("[[fake tokens=1]]"))).stop_reason == "end_turn"


async def test_a_key_with_a_rate(server: Server, client: anthropic.AsyncAnthropic) -> None:
    database = await Database.open(Settings(data_dir=server.folder / "data"))
    try:
        _, key = await KeyStore(database, SystemClock()).create_key(requests_per_minute=1)
    finally:
        await database.close()
    async with client_of(server, api_key=key) as slow:
        await slow.messages.create(**asking("[[fake tokens=1]]"))
        with pytest.raises(anthropic.RateLimitError) as raised:
            await slow.messages.create(**asking("[[fake tokens=1]]"))
    assert int(raised.value.response.headers["retry-after"]) >= 1


async def test_a_full_line_is_an_overload(server: Server, client: anthropic.AsyncAnthropic) -> None:
    slow = asking("[[fake tokens=1000 rate=50]]", model="narrow", max_tokens=1000, stream=True)
    first = await client.messages.create(**slow)
    async with client_of(server) as second:
        waits = second.messages.stream(**asking("[[fake tokens=1]]", model="narrow"))
        waiting = asyncio.create_task(waits.__aenter__())
        await server.until_load(1, 1, "narrow")
        with pytest.raises(anthropic.APIStatusError) as raised:
            await client.messages.create(**asking("[[fake tokens=1]]", model="narrow"))
        assert raised.value.status_code == 529
        assert isinstance(raised.value.body, dict)
        assert raised.value.body["error"]["type"] == "overloaded_error"
        await first.close()
        assert await (await waiting).get_final_text() == "tok0 "


async def test_closing_the_stream_stops_the_engine(server: Server, client: anthropic.AsyncAnthropic) -> None:
    stream = await client.messages.create(**asking("[[fake tokens=100000 rate=100]]", max_tokens=100_000, stream=True))
    seen = 0
    async for _ in stream:
        seen += 1
        if seen == 5:
            break
    await server.until_load(1, 0)
    await stream.close()
    await server.until_load(0, 0, within_seconds=5)


async def test_an_engine_that_dies_in_the_middle_is_an_error(client: anthropic.AsyncAnthropic) -> None:
    texts = []
    with pytest.raises(anthropic.APIStatusError) as raised:
        async with client.messages.stream(**asking("[[fake tokens=9 token_ms=20 crash_at=3]]")) as stream:
            async for text in stream.text_stream:
                texts.append(text)
    assert texts == ["tok0 ", "tok1 ", "tok2 "]
    assert isinstance(raised.value.body, dict)
    assert raised.value.body["error"]["code"] == "engine_crashed"

"""The official client, unmodified, against a real model."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.store.database import Database
from forebay.store.key_format import Role
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
options = {{ context = 512 }}
[models.smol-tools]
engine = "llama.cpp"
source = "file:{path}"
preload = true
slots = 4
options = {{ context = 1024, chat_template_file = "{template}" }}
[models.fake]
engine = "fake"
preload = true
"""
HAMLET: Any = [{"role": "user", "content": "Who wrote Hamlet?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME: Any = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
ASK_WEATHER: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
PERSON: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["good", "bad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


class Person(BaseModel):
    mood: Literal["good", "bad"]
    happy: bool


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG.format(path=smollm2_path(), template=TEMPLATE)) as running:
        yield running
        assert "request.bug" not in running.log


@pytest.fixture
def client(server: Server) -> openai.AsyncOpenAI:
    return server.client()


async def key(server: Server, **fields: Any) -> str:
    database = await Database.open(Settings(data_dir=server.folder / "data"))
    try:
        return (await KeyStore(database, SystemClock()).create_key(**fields))[1]
    finally:
        await database.close()


async def text_of(stream: Any) -> str:
    return "".join([part.choices[0].delta.content or "" async for part in stream if part.choices])


async def test_who_wrote_hamlet_whole_and_streamed_alike(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "smol", "messages": HAMLET, "temperature": 0, "max_tokens": 40}
    whole = await client.chat.completions.create(**asked)
    streamed = await text_of(await client.chat.completions.create(**asked, stream=True))
    assert "Shakespeare" in (whole.choices[0].message.content or "")
    assert streamed == whole.choices[0].message.content
    assert whole.model == "smol"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


async def test_the_synchronous_client(server: Server) -> None:
    def ask() -> str:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as client:
            asked: dict[str, Any] = {"model": "smol", "messages": HAMLET, "temperature": 0, "max_tokens": 40}
            whole = client.chat.completions.create(**asked).choices[0].message.content
            parts = client.chat.completions.create(**asked, stream=True)
            assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole
            return whole or ""

    assert "Shakespeare" in await asyncio.to_thread(ask)


async def test_a_json_schema_answer_validates(client: openai.AsyncOpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    messages: Any = [{"role": "user", "content": "Describe Ann, who is 30."}]
    for stream in (False, True):
        asked: dict[str, Any] = {"model": "smol", "messages": messages, "response_format": form, "max_tokens": 200}
        answer = await client.chat.completions.create(**asked, stream=stream)
        text = await text_of(answer) if stream else answer.choices[0].message.content
        jsonschema.validate(json.loads(text or ""), PERSON)


async def test_parse_gives_a_pydantic_object(client: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "How is Ann?"}]
    answer = await client.chat.completions.parse(
        model="smol", messages=messages, response_format=Person, max_completion_tokens=100
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


async def test_json_object(client: openai.AsyncOpenAI) -> None:
    schema: Any = [{"role": "user", "content": "Answer {} or a short JSON object."}]
    answer = await client.chat.completions.create(
        model="smol", messages=schema, response_format={"type": "json_object"}, temperature=0, max_tokens=300
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
    else:
        assert (answer.choices[0].message.content or "").lstrip().startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_a_forced_tool_call(client: openai.AsyncOpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {"model": "smol-tools", "messages": ASK_WEATHER, "max_tokens": 100}
    answer = await client.chat.completions.create(**asked, tools=[WEATHER, TIME], tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert answer.choices[0].finish_reason == "tool_calls"
    check_call(call.function.name, call.function.arguments, choice)
    pieces: dict[str, str] = {"name": "", "arguments": ""}
    finish = None
    async for part in await client.chat.completions.create(
        **asked, tools=[WEATHER, TIME], tool_choice=choice, stream=True
    ):
        for choice_part in part.choices:
            finish = choice_part.finish_reason or finish
            for piece in choice_part.delta.tool_calls or ():
                assert piece.function is not None
                pieces["name"] += piece.function.name or ""
                pieces["arguments"] += piece.function.arguments or ""
    assert finish == "tool_calls"
    check_call(pieces["name"], pieces["arguments"], choice)


def check_call(name: str, arguments: str, choice: Any) -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, TIME)}
    assert name in schemas
    assert choice == "required" or name == choice["function"]["name"]
    jsonschema.validate(json.loads(arguments), schemas[name])


async def test_a_tool_result_turn(client: openai.AsyncOpenAI) -> None:
    call: Any = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
    messages: Any = [
        *ASK_WEATHER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Sunny, 21 degrees."},
    ]
    answer = await client.chat.completions.create(
        model="smol-tools", messages=messages, tools=[WEATHER], temperature=0, max_tokens=60
    )
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


async def test_tools_without_a_template_for_them_are_refused(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="smol", messages=ASK_WEATHER, tools=[WEATHER])
    assert refused.value.code == "capability_not_supported"


async def test_logprobs(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "smol", "messages": HAMLET, "temperature": 0, "max_tokens": 5}
    answer = await client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in content)
    streamed: list[str] = []
    async for part in await client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True):
        for choice in part.choices:
            streamed += [entry.token for entry in (choice.logprobs.content if choice.logprobs else None) or []]
    assert streamed == [entry.token for entry in content]


async def test_n_stop_seed_and_limits(client: openai.AsyncOpenAI) -> None:
    two = await client.chat.completions.create(model="smol", messages=HAMLET, n=2, max_completion_tokens=5)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert {choice.finish_reason for choice in two.choices} <= {"length", "stop"}
    asked: dict[str, Any] = {"model": "smol", "messages": HAMLET, "max_tokens": 20}
    stopped = await client.chat.completions.create(**asked, temperature=0, stop=["Shakespeare"])
    assert "Shakespeare" not in (stopped.choices[0].message.content or "")
    assert stopped.choices[0].finish_reason == "stop"
    seeded = [await client.chat.completions.create(**asked, temperature=1, seed=7) for _ in range(2)]
    assert seeded[0].choices[0].message.content == seeded[1].choices[0].message.content
    short = await client.chat.completions.create(model="smol", messages=HAMLET, max_completion_tokens=3)
    assert short.usage is not None
    assert short.usage.completion_tokens == 3
    assert short.choices[0].finish_reason == "length"


async def test_usage_comes_last_in_a_stream_and_only_when_asked_for(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "smol", "messages": HAMLET, "max_tokens": 4, "stream": True}
    plain = [part async for part in await client.chat.completions.create(**asked)]
    assert all(part.usage is None and part.choices for part in plain)
    parts = [
        part async for part in await client.chat.completions.create(**asked, stream_options={"include_usage": True})
    ]
    assert parts[-1].choices == []
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == 4
    assert all(part.usage is None for part in parts[:-1])


@pytest.mark.parametrize(("asked", "used"), [("flex", "flex"), ("priority", "priority"), ("auto", "default")])
async def test_the_tier_is_echoed(client: openai.AsyncOpenAI, asked: Any, used: str) -> None:
    fields: dict[str, Any] = {"model": "smol", "messages": HAMLET, "max_tokens": 2, "service_tier": asked}
    assert (await client.chat.completions.create(**fields)).service_tier == used
    tiers = [part.service_tier async for part in await client.chat.completions.create(**fields, stream=True)]
    assert tiers[0] == used


async def test_headers(client: openai.AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model="smol", messages=HAMLET, max_tokens=2, extra_headers={"X-Request-ID": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.headers["x-queue-position"] == "0"
    assert raw.parse().choices[0].message.content


async def test_completions(client: openai.AsyncOpenAI) -> None:
    two = await client.completions.create(model="smol", prompt=["One, two,", "The sky is"], max_tokens=4, logprobs=2)
    assert [choice.index for choice in two.choices] == [0, 1]
    for choice in two.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs.tokens or ()) == len(choice.logprobs.token_logprobs or ()) == 4
        assert choice.logprobs.text_offset is not None
        assert choice.logprobs.text_offset[0] == 0
        assert all(1 <= len(top) <= 2 for top in choice.logprobs.top_logprobs or ())
    asked: dict[str, Any] = {"model": "smol", "prompt": "One, two,", "max_tokens": 6, "temperature": 0}
    whole = await client.completions.create(**asked)
    stream = await client.completions.create(**asked, stream=True)
    assert "".join([part.choices[0].text async for part in stream if part.choices]) == whole.choices[0].text


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["fake", "smol", "smol-tools"]
    assert (await client.models.retrieve("smol")).owned_by == "forebay"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.models.retrieve("gpt-9")
    assert missing.value.code == "model_not_found"


async def test_a_prompt_that_is_too_long(client: openai.AsyncOpenAI) -> None:
    long: Any = [{"role": "user", "content": "word " * 2_000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="smol", messages=long, stream=stream)
        assert refused.value.code == "context_length_exceeded"


async def test_the_client_raises_the_right_errors(server: Server) -> None:
    async def ask(key: str, **fields: Any) -> None:
        asked = {"model": "fake", "messages": HAMLET, **fields}
        async with server.client(api_key=key) as client:
            await client.chat.completions.create(**asked)

    with pytest.raises(openai.AuthenticationError):
        await ask("wrong")
    with pytest.raises(openai.PermissionDeniedError):
        await ask(await key(server, role=Role.READ_ONLY))
    with pytest.raises(openai.NotFoundError):
        await ask(server.key, model="gpt-9")
    with pytest.raises(openai.BadRequestError) as wrong:
        await ask(server.key, temperature=9)
    assert wrong.value.param == "temperature"
    limited = await key(server, requests_per_minute=1)
    await ask(limited)
    with pytest.raises(openai.RateLimitError) as slower:
        await ask(limited)
    assert slower.value.code == "rate_limit_exceeded"


async def test_an_engine_that_dies_in_mid_stream(server: Server, client: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "[[fake tokens=20 token_ms=5 crash_at=5]]"}]
    seen = ""
    with pytest.raises(openai.APIError) as broken:
        async for part in await client.chat.completions.create(model="fake", messages=messages, stream=True):
            seen += part.choices[0].delta.content or ""
    assert seen == "tok0 tok1 tok2 tok3 tok4 "
    assert broken.value.code == "engine_crashed"


async def test_a_completion_that_begins_with_its_prompt(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "smol", "prompt": "Hamlet is a", "max_tokens": 5, "temperature": 0}
    bare = (await client.completions.create(**asked)).choices[0].text
    assert (await client.completions.create(**asked, echo=True)).choices[0].text == f"Hamlet is a{bare}"
    parts = await client.completions.create(**asked, echo=True, stream=True)
    assert "".join([choice.text async for part in parts for choice in part.choices]) == f"Hamlet is a{bare}"

"""Responses with the official client, unmodified, against a real model."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Literal

import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel

from tests.e2e.test_openai_client import CONFIG
from tests.e2e.test_openai_client import TEMPLATE as TOOLS_TEMPLATE
from tests.support.models import smollm2_path
from tests.support.server import Server, eventually, serving

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


class Person(BaseModel):
    mood: Literal["good", "bad"]
    happy: bool


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    path = await asyncio.to_thread(smollm2_path)
    async with serving(CONFIG.format(path=path, template=TOOLS_TEMPLATE)) as running:
        yield running


@pytest.fixture
def client(server: Server) -> openai.AsyncOpenAI:
    return server.client()


async def test_create(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(
        model="smol", input="Who wrote Hamlet?", instructions="Answer in one word.", max_output_tokens=12, temperature=0
    )
    assert answer.output_text
    assert answer.usage
    assert answer.usage.input_tokens > 5
    assert 0 < answer.usage.output_tokens <= 12
    assert answer.status in ("completed", "incomplete")


async def test_a_stream_says_what_the_whole_says(client: openai.AsyncOpenAI) -> None:
    body: Any = {"model": "smol", "input": "Count to five.", "max_output_tokens": 24, "temperature": 0, "top_p": 1}
    whole = await client.responses.create(**body)
    async with client.responses.stream(**body) as stream:
        texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
    assert "".join(texts) == whole.output_text
    assert len(texts) > 3


async def test_parse(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.parse(
        model="smol", input="I am glad today.", text_format=Person, max_output_tokens=64, temperature=0
    )
    assert isinstance(answer.output_parsed, Person)
    async with client.responses.stream(model="smol", input="I am sad.", text_format=Person, temperature=0) as stream:
        final = await stream.get_final_response()
    assert isinstance(final.output_parsed, Person)


async def test_a_tool_is_called_and_its_answer_is_read(client: openai.AsyncOpenAI) -> None:
    ask: Any = {"model": "smol-tools", "tools": [WEATHER], "temperature": 0, "max_output_tokens": 64}
    first = await client.responses.create(
        input="What is the weather in Paris?", tool_choice={"type": "function", "name": "get_weather"}, **ask
    )
    [call] = first.output
    assert call.type == "function_call"
    assert call.name == "get_weather"
    answer: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 21 degrees"}
    second = await client.responses.create(input=[answer], previous_response_id=first.id, **ask)
    assert second.output
    history: Any = [{"role": "user", "content": "What is the weather in Paris?"}, *first.output, answer]
    third = await client.responses.create(input=history, **ask)
    assert third.usage
    assert second.usage
    assert third.usage.input_tokens == second.usage.input_tokens
    async with client.responses.stream(input="Weather in Rome?", tool_choice="required", **ask) as stream:
        final = await stream.get_final_response()
    assert final.output[0].type == "function_call"


async def test_log_probabilities(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(
        model="smol", input="Hi", max_output_tokens=4, include=["message.output_text.logprobs"], top_logprobs=2
    )
    part: Any = answer.output[0].content[0]  # type: ignore[union-attr]
    assert len(part.logprobs) == answer.usage.output_tokens  # type: ignore[union-attr]
    assert len(part.logprobs[0].top_logprobs) == 2


async def test_in_the_background_polled_and_resumed(client: openai.AsyncOpenAI) -> None:
    body: Any = {"model": "smol", "input": "Tell me a story.", "max_output_tokens": 60, "background": True}
    queued = await client.responses.create(**body)
    assert queued.status == "queued"

    async def ended() -> Any:
        found = await client.responses.retrieve(queued.id)
        return found if found.status not in ("queued", "in_progress") else None

    answer = await eventually(ended, within_seconds=60, what="the end of the response")
    assert answer.output_text
    name, seen = "", 0
    async with client.responses.stream(**body) as begun:
        async for event in begun:
            if event.type == "response.created":
                name = event.response.id
            if event.type == "response.output_text.delta":
                seen = event.sequence_number
                break
    async with client.responses.stream(response_id=name, starting_after=seen) as resumed:
        numbers = [event.sequence_number async for event in resumed]
        final = resumed._state._completed_response  # none where its length was cut
    assert numbers == list(range(seen + 1, seen + 1 + len(numbers)))
    kept = await client.responses.retrieve(name)
    assert final is None or final.output_text == kept.output_text
    await client.responses.delete(name)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(name)


async def test_cancel(client: openai.AsyncOpenAI, server: Server) -> None:
    live = await client.responses.create(
        model="smol", input="Count.", max_output_tokens=400, background=True, temperature=1.5
    )
    assert (await client.responses.cancel(live.id)).status in ("cancelled", "completed", "incomplete")
    await server.until_load(0, 0, "smol")


async def test_what_is_not_served_is_refused(client: openai.AsyncOpenAI) -> None:
    refused: list[dict[str, Any]] = [
        {"tools": [{"type": "web_search"}]},
        {"conversation": "conv_1"},
        {"truncation": "auto"},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://example.com/a.png"}]}]},
    ]
    for fields in refused:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(**{"model": "smol", "input": "Hi", **fields})
        assert caught.value.param

"""Batches with the official client, unmodified, against a real model."""

import asyncio
import io
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai.types import Batch

from tests.integration.test_batches import WRONG
from tests.support.batches import LIVE, jsonl, line
from tests.support.models import smollm2_path
from tests.support.server import Server, eventually, serving

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

CONFIG = """
default_models = false
[models.smol]
engine = "llama.cpp"
source = "file:{path}"
preload = true
slots = 8
options = {{ context = 512 }}
"""
LINES, LINES_LONG = 200, 1000
FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "mood",
        "schema": {
            "type": "object",
            "properties": {"mood": {"enum": ["good", "bad"]}},
            "required": ["mood"],
            "additionalProperties": False,
        },
    },
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    path = await asyncio.to_thread(smollm2_path)
    async with serving(CONFIG.format(path=path)) as running:
        yield running


def request(number: int, **fields: Any) -> dict[str, Any]:
    return line(f"id-{number}", f"What is {number} plus one?", model="smol", **{"max_tokens": 1, **fields})


async def run(client: openai.AsyncOpenAI, data: bytes) -> Batch:
    """Upload, create, poll."""
    file = await client.files.create(file=("lines.jsonl", io.BytesIO(data)), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"run": "night"}
    )

    async def ended() -> Batch | None:
        found = await client.batches.retrieve(batch.id)
        return None if found.status in LIVE else found

    found: Batch = await eventually(ended, within_seconds=240, what="the end of the batch")
    return found


async def lines_of(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(each) for each in (await client.files.content(file_id)).text.splitlines()]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with server.client() as connected:
        yield connected


async def test_many_lines_come_back_once_each(client: openai.AsyncOpenAI, prove: bool) -> None:
    lines = LINES_LONG if prove else LINES
    structured = request(lines - 1, response_format=FORMAT, max_tokens=64, temperature=0)
    batch = await run(client, jsonl([*(request(number) for number in range(lines - 1)), structured]))
    assert batch.status == "completed"
    assert batch.error_file_id is None
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed) == (lines, lines)
    output = await lines_of(client, batch.output_file_id)
    assert sorted(each["custom_id"] for each in output) == sorted(f"id-{number}" for number in range(lines))
    answers = {each["custom_id"]: each["response"]["body"] for each in output}
    assert all(answer["choices"][0]["message"]["content"] for answer in answers.values())
    assert json.loads(answers[f"id-{lines - 1}"]["choices"][0]["message"]["content"])["mood"] in {"good", "bad"}
    assert batch.usage is not None
    assert batch.usage.output_tokens == sum(answer["usage"]["completion_tokens"] for answer in answers.values())


async def test_ten_bad_lines_of_many_are_ten_error_lines(client: openai.AsyncOpenAI, prove: bool) -> None:
    lines = LINES_LONG if prove else LINES
    bad = [request(-number, **{field: value}) for number, (field, value) in enumerate(WRONG.items(), 1)]
    bad.append(line("long", "word " * 2000, model="smol"))
    bad.append(line("image", "", model="smol") | {"custom_id": "image"})
    bad[-1]["body"]["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": "https://example.com/a"}}]
    good = [request(number) for number in range(lines - len(bad))]
    batch = await run(client, jsonl(good[: lines // 3] + bad + good[lines // 3 :]))
    output = await lines_of(client, batch.output_file_id)
    errors = await lines_of(client, batch.error_file_id)
    assert (batch.status, len(output), len(errors)) == ("completed", lines - 10, 10)
    assert {each["custom_id"] for each in errors} == {each["custom_id"] for each in bad}
    assert all(each["response"]["status_code"] == 400 for each in errors)


async def test_a_wrong_file_fails_with_the_numbers_of_its_lines(client: openai.AsyncOpenAI) -> None:
    wrong = [request(1), request(1), "{", request(2), {**request(3), "method": "PUT"}]
    batch = await run(client, jsonl(wrong))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [(error.line, error.code) for error in batch.errors.data or []] == [
        (2, "duplicate_custom_id"),
        (3, "invalid_json_line"),
        (5, "invalid_method"),
    ]


async def test_lines_that_share_a_prefix_find_it_in_the_prompt_cache(client: openai.AsyncOpenAI) -> None:
    """Lines of 8 prefixes in an order by chance: but for the first of each, the engine reads only what is new."""
    prefixes, each = 8, 6
    words = ["river", "dam", "turbine", "gate", "flow", "basin", "weir", "sluice", "level", "pressure", "head", "spill"]
    chance = random.Random(5)
    systems = [" ".join([f"Station {number}.", *chance.choices(words, k=150)]) for number in range(prefixes)]
    lines = []
    for number in range(prefixes * each):
        asked = request(number, max_tokens=4)
        asked["body"]["messages"].insert(0, {"role": "system", "content": systems[number % prefixes]})
        lines.append(asked)
    chance.shuffle(lines)
    done = await run(client, jsonl(lines))
    assert done.request_counts is not None
    assert done.usage is not None
    assert done.request_counts.completed == prefixes * each
    cached, shareable = done.usage.input_tokens_details.cached_tokens, done.usage.input_tokens * (each - 1) / each
    print(
        f"\n{done.usage.input_tokens} prompt tokens, {cached} from the cache: {cached / shareable:.2f} of what is shared"
    )
    assert cached >= 0.8 * shareable

"""POST /v1/embeddings over HTTP on the fake engine: forms, limits, what is computed once, and for whom."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.batches import content, create, finished, jsonl, upload
from tests.support.items import EMBEDDER, EMBEDDINGS, cosine, embed, outcomes, send, vectors
from tests.support.server import Server, eventually, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEDULER = "[scheduler]\nheadroom_seconds = 0.2\n"
LIMITED = """
[models.limited]
engine = "fake"
preload = true
inputs_max = 3
input_tokens_max = 100
[models.limited.options]
capabilities = ["embedding"]
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(EMBEDDER + LIMITED + SCHEDULER, environment={"FOREBAY_LOG_FORMAT": "json"}) as running:
        yield running
        assert "request.bug" not in running.log


async def test_every_form_of_input_has_a_vector_for_each(server: Server) -> None:
    for given, number in (("one text", 1), (["a", "b", "a"], 3), ([5, 6, 7], 1), ([[1], [2, 3]], 2)):
        answer = await embed(server, given)
        assert len(answer["data"]) == number
        assert answer["model"] == "embedder"
        assert all(len(vector) == 64 for vector in vectors(answer))
    answer = await embed(server, ["a", "b", "a"])
    assert answer["data"][0]["embedding"] == answer["data"][2]["embedding"] != answer["data"][1]["embedding"]
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


async def test_base64_and_float_agree_to_the_bit(server: Server) -> None:
    texts = [f"text number {number}" for number in range(50)]
    plain = await embed(server, texts, encoding_format="float")
    packed = await embed(server, texts, encoding_format="base64")
    assert isinstance(packed["data"][0]["embedding"], str)
    assert vectors(plain) == vectors(packed)
    assert cosine(vectors(plain)[0], vectors(packed)[0]) > 0.999999
    assert plain["usage"] == packed["usage"]


async def test_fewer_dimensions(server: Server) -> None:
    answer = await embed(server, "short", dimensions=16)
    assert [len(vector) for vector in vectors(answer)] == [16]
    status, answer = await send(server, EMBEDDINGS, {"model": "embedder", "input": "x", "dimensions": 65})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


async def test_a_long_input_is_refused_or_cut_when_asked_to(server: Server) -> None:
    long = "word " * 5000
    status, answer = await send(server, EMBEDDINGS, {"model": "embedder", "input": [long]})
    assert status == 400
    assert (answer["error"]["code"], answer["error"]["param"]) == ("context_length_exceeded", "input")
    cut = await embed(server, [long], truncate=True)
    assert cut["usage"]["prompt_tokens"] == 2048


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input[1]", "invalid_value"),
        ({"input": [[]]}, "input[0]", "invalid_value"),
        ({"input": [1, -1]}, "input[1]", "invalid_value"),
        ({"input": ["a", 1]}, "input[1]", "invalid_value"),
        ({"input": 7}, "input", "invalid_value"),
        ({"input": ["a"] * 2049}, "input", "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ({"input": "a", "stream": True}, "stream", "invalid_request"),
        ({}, "input", "missing_required_parameter"),
        ({"input": ["a"] * 4, "model": "limited"}, "input", "invalid_value"),
        ({"input": "a" * 1700, "model": "limited"}, "input", "invalid_value"),
        ({"input": [1] * 101, "model": "limited"}, "input", "invalid_value"),
        ({"input": ["a " * 60, "b " * 60], "model": "limited"}, "input", "invalid_request"),  # counted by the engine
        ({"input": "a", "model": "nobody"}, None, "model_not_found"),
    ],
)
async def test_what_is_wrong_is_named(server: Server, body: dict[str, Any], param: str, code: str) -> None:
    status, answer = await send(server, EMBEDDINGS, {"model": "embedder", **body})
    assert status in {400, 404}
    assert (answer["error"]["param"], answer["error"]["code"]) == (param, code), answer


async def test_other_capabilities_are_refused(server: Server) -> None:
    body = {"model": "embedder", "messages": [{"role": "user", "content": "Hi"}]}
    status, answer = await send(server, "/v1/chat/completions", body)
    assert (status, answer["error"]["code"]) == (400, "capability_not_supported")


async def test_what_is_known_is_not_computed_again_and_still_counted(server: Server) -> None:
    first = await embed(server, ["known one", "known two"])
    before = await outcomes(server)
    assert await embed(server, ["known two", "known one", "new three here"]) != first
    hit, shared, miss = await outcomes(server)
    assert (hit - before[0], shared - before[1], miss - before[2]) == (2, 0, 1)
    again = await embed(server, ["known one", "known two"])
    assert again == first
    assert again["usage"]["prompt_tokens"] == 4
    assert await server.metric("forebay_embedding_cache_bytes") > 3 * 64 * 4


async def test_a_known_answer_needs_no_place(server: Server) -> None:
    known = await embed(server, "known before the line")
    blockers = [asyncio.create_task(embed(server, f"[[fake delay_ms=60000]] {number}")) for number in range(4)]
    await server.until_load(4, 0, "embedder")
    assert await embed(server, "known before the line") == known
    for task in blockers:
        task.cancel()
    await asyncio.gather(*blockers, return_exceptions=True)
    await server.until_load(0, 0, "embedder")


async def test_identical_inputs_in_flight_are_computed_once(server: Server) -> None:
    before = await outcomes(server)
    text = "[[fake delay_ms=1500]] the same for all"
    answers = await asyncio.gather(*[embed(server, [text, text]) for _ in range(12)])
    assert all(answer == answers[0] for answer in answers)
    _, shared, miss = await outcomes(server)
    assert miss - before[2] == 1
    assert shared - before[1] >= 12


async def test_who_waits_for_one_that_leaves_computes_for_himself(server: Server) -> None:
    before = await outcomes(server)
    text = "[[fake delay_ms=2000]] the first one leaves"
    first = asyncio.create_task(embed(server, text))
    await server.until_load(1, 0, "embedder")
    others = [asyncio.create_task(embed(server, text)) for _ in range(3)]

    async def joined() -> bool:
        return (await outcomes(server))[1] - before[1] == 3

    await eventually(joined, what="three that wait for the first")
    first.cancel()
    answers = await asyncio.gather(*others)
    assert answers[0] == answers[1] == answers[2]


async def test_no_project_profits_from_what_another_has_sent(server: Server) -> None:
    other = await server.create_key("other")
    mine = await embed(server, "a secret between us")
    before = await outcomes(server)
    theirs = await embed(server, "a secret between us", key=other)
    after = await outcomes(server)
    assert (after[0] - before[0], after[2] - before[2]) == (0, 1)
    assert theirs == mine


async def test_order_is_kept_by_many_at_once(server: Server) -> None:
    texts = [[f"{client} {number} " + "word " * (number % 17) for number in range(20)] for client in range(64)]
    alone = [await embed(server, each) for each in texts[:2]]
    at_once = await asyncio.gather(*[embed(server, each) for each in texts])
    assert at_once[:2] == alone
    for each, answer in list(zip(texts, at_once, strict=True))[::16]:
        one = await embed(server, each[7])
        assert one["data"][0]["embedding"] == answer["data"][7]["embedding"]


async def test_errors_of_the_engine_reach_the_caller(server: Server) -> None:
    for directive, status, code in (
        ("status=500", 500, "engine_error"),
        ("garbage_at=0", 502, "engine_garbled"),
        ("truncate_at=0", 502, "engine_garbled"),
        ("status=429", 429, "queue_full"),
    ):
        got, answer = await send(server, EMBEDDINGS, {"model": "embedder", "input": f"[[fake {directive}]]"})
        assert (got, answer["error"]["code"]) == (status, code), directive


async def test_an_engine_that_dies_is_told_of_and_replaced(server: Server) -> None:
    status, answer = await send(server, EMBEDDINGS, {"model": "embedder", "input": ["[[fake crash_at=0]] x", "y"]})
    assert (status, answer["error"]["code"]) == (502, "engine_crashed")
    await eventually(lambda: _answers(server), within_seconds=20, what="a new engine")


async def _answers(server: Server) -> bool:
    return (await send(server, EMBEDDINGS, {"model": "embedder", "input": "after the crash"}))[0] == 200


async def test_a_large_answer_leaves_room_for_others(server: Server) -> None:
    texts = [f"{number}" for number in range(2048)]
    body = {"model": "limited", "input": ["warm"], "encoding_format": "float"}
    assert (await send(server, EMBEDDINGS, body))[0] == 200
    answer = await embed(server, texts, encoding_format="float")
    assert len(answer["data"]) == 2048
    assert answer["usage"]["prompt_tokens"] == 2048


async def test_a_batch_of_embeddings(server: Server) -> None:
    def line(number: int, **fields: Any) -> dict[str, Any]:
        body = {"model": "embedder", "input": [f"line {number % 50}", "shared by all"], **fields}
        return {"custom_id": f"c{number}", "method": "POST", "url": EMBEDDINGS, "body": body}

    before = await outcomes(server)
    lines = [
        *[line(number) for number in range(200)],
        line(200, dimensions=70_000),
        line(201, encoding_format="base64"),
    ]
    file = await upload(server, jsonl(lines))
    status, batch = await create(server, file["id"], endpoint=EMBEDDINGS)
    assert status == 200, batch
    batch = await finished(server, batch["id"])
    assert batch["request_counts"] == {"total": 202, "completed": 201, "failed": 1}
    found = {each["custom_id"]: each for each in await content(server, batch["output_file_id"])}
    assert len(found) == 201
    for number in (0, 49, 50, 199):
        made = found[f"c{number}"]["response"]["body"]
        online = await embed(server, [f"line {number % 50}", "shared by all"])
        assert json.dumps(made) == json.dumps(online)
    [error] = await content(server, batch["error_file_id"])
    assert (error["custom_id"], error["response"]["body"]["error"]["param"]) == ("c200", "dimensions")
    after = await outcomes(server)
    assert after[2] - before[2] == 51, "each text is computed once"
    assert (batch["usage"]["input_tokens"], batch["usage"]["output_tokens"]) == (201 * 5, 0)

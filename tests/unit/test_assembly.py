"""Answers put together from items: what is computed once, who waits for whom, and what becomes of those left behind."""

import asyncio
import json
import time
from array import array
from base64 import b64encode
from dataclasses import replace
from typing import Any

import pytest

from forebay.clock import SystemClock
from forebay.dialects.items import Item, ItemRules
from forebay.dialects.openai.call import Call, Context
from forebay.dialects.openai.embeddings import EmbeddingBody, embedding_call
from forebay.errors import EngineCrashed, InvalidRequest
from forebay.inference import Priority
from forebay.scheduler.assembly import Assembler
from forebay.scheduler.item_cache import ENTRY_BYTES, ItemCache
from forebay.telemetry import Metrics


class Engine:
    """Computes when the test lets it, and remembers what it was asked for."""

    def __init__(self, *, counts: bool = True) -> None:
        self.asked: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self._counts = counts

    async def compute(self, call: Call) -> bytes:
        texts = json.loads(call.request.body)["input"]
        self.asked.append(texts)
        error = self.error
        await self.gate.wait()
        if error is not None:
            raise error
        data = [{"index": index, "embedding": [float(len(text))]} for index, text in enumerate(texts)]
        counted = {"tokens": [len(text) for text in texts]} if self._counts else {}
        usage = {"prompt_tokens": sum(map(len, texts))}
        return json.dumps({"data": data, "usage": usage, **counted}).encode()


def call(*texts: str, priority: Priority = Priority.DEFAULT, counted: bool = True, project: str = "web") -> Call:
    body = EmbeddingBody(model="m", input=texts)
    made = embedding_call(body, Context("req_1", project, None, 16, 4, items=ItemRules("p", counted=counted)))
    return replace(made, request=replace(made.request, priority=priority))


def assembler(cache_bytes: int = 2**20) -> Assembler:
    return Assembler(cache_bytes, SystemClock(), Metrics())


async def vectors(made: Any) -> list[float]:
    gathered = await made
    found = json.loads(gathered.body)
    assert found["usage"]["prompt_tokens"] == gathered.usage.prompt_tokens
    return [entry["embedding"][0] for entry in found["data"]]


async def until_asked(engine: Engine, times: int) -> None:
    async with asyncio.timeout(10):
        while len(engine.asked) < times:
            await asyncio.sleep(0)


async def test_only_what_is_unknown_is_asked_for() -> None:
    room, engine = assembler(), Engine()
    assert await vectors(room.answer(call("a", "bb", "a"), engine.compute)) == [1, 2, 1]
    gathered = await room.answer(call("bb", "ccc", "a"), engine.compute)
    assert engine.asked == [["a", "bb"], ["ccc"]]
    assert gathered.usage is not None
    assert gathered.usage.prompt_tokens == 6, "what was known counts too"
    await room.answer(call("a", project="other"), engine.compute)
    assert engine.asked[2:] == [["a"]]


@pytest.mark.parametrize(
    ("texts", "sent", "index", "param"),
    [
        (("a", "b", "c", "long"), ["c", "long"], 1, "input[3]"),
        (("b", "a", "long", "long", "c"), ["long", "c"], 0, "input[2]"),
        (("c", "long"), ["c", "long"], 1, "input[1]"),
        (("a", "b", "long"), ["long"], None, "input[2]"),
        (("long",), ["long"], 0, "input"),
        (("c", "long"), ["c", "long"], None, "input"),
        (("c", "long"), ["c", "long"], 2, "input"),
    ],
)
async def test_what_an_engine_refuses_is_named_by_its_place_in_the_request(
    texts: tuple[str, ...], sent: list[str], index: int | None, param: str
) -> None:
    room, engine = assembler(), Engine()
    await room.answer(call("a", "b"), engine.compute)
    error = InvalidRequest(param="input", code="context_length_exceeded")
    engine.error, error.index = error, index
    with pytest.raises(InvalidRequest) as refused:
        await room.answer(call(*texts), engine.compute)
    assert engine.asked[1:] == [sent]
    assert refused.value.param == param


@pytest.mark.parametrize("param", ["dimensions", "query", None])
async def test_an_error_about_something_else_stays_as_it_is(param: str | None) -> None:
    room, engine = assembler(), Engine()
    engine.error = InvalidRequest(param=param)
    with pytest.raises(InvalidRequest) as refused:
        await room.answer(call("a", "b"), engine.compute)
    assert refused.value.param == param


async def test_without_room_nothing_is_kept() -> None:
    room, engine = assembler(0), Engine()
    for _ in range(2):
        await room.answer(call("a"), engine.compute)
    assert engine.asked == [["a"], ["a"]]


async def test_what_has_no_count_of_its_own_is_neither_kept_nor_shared() -> None:
    room, engine = assembler(), Engine(counts=False)
    for _ in range(2):
        gathered = await room.answer(call("a", "bb", counted=False), engine.compute)
        assert gathered.usage is not None
        assert gathered.usage.prompt_tokens == 3
    assert len(engine.asked) == 2
    for _ in range(2):
        await room.answer(call("one alone", counted=False), engine.compute)
    assert len(engine.asked) == 3, "the only input has the count of all"


async def test_two_at_once_compute_once() -> None:
    room, engine = assembler(0), Engine()
    engine.gate.clear()
    first = asyncio.create_task(vectors(room.answer(call("a", "bb"), engine.compute)))
    await until_asked(engine, 1)
    second = asyncio.create_task(vectors(room.answer(call("bb", "ccc"), engine.compute)))
    await until_asked(engine, 2)
    engine.gate.set()
    assert await first == [1, 2]
    assert await second == [2, 3]
    assert engine.asked == [["a", "bb"], ["ccc"]]


async def test_nobody_waits_for_less_urgent_work() -> None:
    room, engine = assembler(), Engine()
    engine.gate.clear()
    batch = asyncio.create_task(vectors(room.answer(call("a", priority=Priority.BATCH), engine.compute)))
    await until_asked(engine, 1)
    online = asyncio.create_task(vectors(room.answer(call("a"), engine.compute)))
    await until_asked(engine, 2)
    later = asyncio.create_task(vectors(room.answer(call("a", priority=Priority.BATCH), engine.compute)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(engine.asked) == 2, "batch work waits for the online request"
    engine.gate.set()
    assert [await batch, await online, await later] == [[1], [1], [1]]


async def test_nobody_waits_for_much_larger_work() -> None:
    room, engine = assembler(), Engine()
    engine.gate.clear()
    large = asyncio.create_task(vectors(room.answer(call("a", *map(str, range(8))), engine.compute)))
    await until_asked(engine, 1)
    small = asyncio.create_task(vectors(room.answer(call("a"), engine.compute)))
    await until_asked(engine, 2)
    others = [asyncio.create_task(vectors(room.answer(each, engine.compute))) for each in (call("a"), call("a", "bb"))]
    await until_asked(engine, 3)
    assert engine.asked[1:] == [["a"], ["bb"]], "who comes later waits for the small one"
    engine.gate.set()
    assert [await small, *[await each for each in others]] == [[1], [1], [1, 2]]
    assert await large == [1] * 9


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_who_waited_for_one_that_did_not_make_it_has_it_all_the_same(how: str) -> None:
    room, engine = assembler(), Engine()
    engine.gate.clear()
    engine.error = EngineCrashed() if how == "failed" else None
    first = asyncio.create_task(room.answer(call("a", "bb"), engine.compute))
    await until_asked(engine, 1)
    engine.error = None
    others = [asyncio.create_task(vectors(room.answer(call("bb"), engine.compute))) for _ in range(3)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(engine.asked) == 1
    if how == "cancelled":
        first.cancel()
    engine.gate.set()
    with pytest.raises(asyncio.CancelledError if how == "cancelled" else EngineCrashed):
        await first
    assert await asyncio.gather(*others) == [[2]] * 3
    assert len(engine.asked) == 2, "one of those who waited computes for all of them"


async def test_nobody_waits_in_vain_more_often_than_twice() -> None:
    room, engine = assembler(0), Engine()
    engine.gate.clear()
    engine.error = EngineCrashed()
    callers = [asyncio.create_task(room.answer(call("a"), engine.compute)) for _ in range(6)]
    await until_asked(engine, 1)
    engine.gate.set()
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert all(isinstance(each, EngineCrashed) for each in outcomes)
    assert len(engine.asked) == 6


async def test_one_who_waits_and_leaves_harms_nobody() -> None:
    room, engine = assembler(), Engine()
    engine.gate.clear()
    first = asyncio.create_task(vectors(room.answer(call("a"), engine.compute)))
    await until_asked(engine, 1)
    leaver, stayer = [asyncio.create_task(vectors(room.answer(call("a"), engine.compute))) for _ in range(2)]
    for _ in range(20):
        await asyncio.sleep(0)
    leaver.cancel()
    engine.gate.set()
    assert await first == await stayer == [1]
    assert len(engine.asked) == 1


async def test_many_items_are_computed_in_parts() -> None:
    room, engine = assembler(), Engine()
    body = call(*[str(number) for number in range(2048)])
    assert len(await vectors(room.answer(body, engine.compute))) == 2048
    assert [len(part) for part in engine.asked] == [2048]


@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize("form", ["float", "base64"])
async def test_a_large_answer_is_made_in_slices(form: str) -> None:
    """By the thread's own time, the best of three: 0.1 s of work for 16 MB, 4 to 26 ms at once."""
    vector = b64encode(array("f", [number / 7000 for number in range(384)]).tobytes()).decode()
    texts = tuple(f"text {number}" for number in range(2048))
    body = EmbeddingBody(model="m", input=texts, encoding_format="float" if form == "float" else "base64")
    wanted = embedding_call(body, Context("req_1", "web", None, 16, 4, items=ItemRules("p", counted=True)))
    data = [{"index": index, "embedding": vector} for index in range(2048)]
    raw = json.dumps({"data": data, "tokens": [3] * 2048, "usage": {"prompt_tokens": 6144}}).encode()

    async def compute(_call: Call) -> bytes:
        return raw

    rounds, bodies = list[list[float]](), set[bytes]()
    for _ in range(3):
        ticker, room = asyncio.create_task(_gaps(rounds)), assembler(2**24)
        for _ in range(2):
            bodies.add((await room.answer(wanted, compute)).body)
        ticker.cancel()
    gaps = min(rounds, key=max)
    (made,) = bodies
    print(f"{form}: {len(made)} bytes, at most {1000 * max(gaps):.1f} ms at once, {1000 * sum(gaps):.0f} ms in all")
    assert max(gaps) < 0.04
    assert len([gap for gap in gaps if gap > 0.001]) > 3


async def _gaps(rounds: list[list[float]]) -> None:
    """Add what this thread computes between one pass of the loop and the next, until cancelled."""
    rounds.append([])
    while True:
        before = time.thread_time()
        await asyncio.sleep(0)
        rounds[-1].append(time.thread_time() - before)


def test_the_cache_stays_within_its_bytes_and_forgets_the_oldest() -> None:
    cache = ItemCache(3 * (8 + ENTRY_BYTES))
    for number in range(5):
        cache.put(bytes([number]), Item(b"12345678", 1))
        cache.get(bytes([0]))
    assert [number for number in range(5) if cache.get(bytes([number]))] == [0, 3, 4]
    assert cache.bytes == 3 * (8 + ENTRY_BYTES)
    cache.put(bytes([4]), Item(b"1234", 1))
    assert cache.bytes == 3 * (8 + ENTRY_BYTES) - 4
    cache.put(b"large", Item(bytes(5000), 1))
    assert cache.get(b"large") is None
    assert len(cache) == 3

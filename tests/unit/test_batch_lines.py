"""Lines of batches: reading them off a stream, checking them, cutting them into chunks, the order in which they run."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.blobs.local import LocalBlobs
from forebay.clock import SystemClock
from forebay.config import BatchSettings
from forebay.dialects.openai.batches import (
    PREFIX_CHARS_MIN,
    answer_line,
    failure_line,
    parse_line,
    prefix_of,
    refusal_line,
    window_seconds,
)
from forebay.errors import InvalidRequest
from forebay.jobs.checking import Check, Index, plan_chunks
from forebay.jobs.lines import (
    NO_GROUP,
    LineReader,
    Place,
    RunOrder,
    Turn,
    Window,
    pack_numbers,
    pack_places,
    raw_lines,
    unpack_numbers,
    unpack_places,
)
from forebay.metering.meter import Meter
from forebay.quotas import Amounts, parse_quotas
from tests.support.batches import CHAT, jsonl, line
from tests.support.clock import FakeClock

LONG = "x" * PREFIX_CHARS_MIN


async def pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def read(data: bytes, size: int, most: int = 100) -> list[tuple[int, bytes | None]]:
    return [(each.offset, each.data) async for each in raw_lines(pieces(data, size), most)]


async def check(data: bytes, models: tuple[str, ...] = ("fake", "other"), **settings: Any) -> Index:
    return await Check(CHAT, models, BatchSettings(**settings), SystemClock()).run(pieces(data, 1000))


@given(lines=st.lists(st.binary(max_size=20).map(lambda data: data.replace(b"\n", b""))), size=st.integers(1, 30))
async def test_a_stream_is_cut_the_same_however_it_comes(lines: list[bytes], size: int) -> None:
    data = b"\n".join(lines)
    found = await read(data, size)
    expected = data.split(b"\n")
    if expected[-1] == b"":
        expected.pop()  # what follows the last line end is no line
    assert [each for _, each in found] == expected
    assert all(data[offset : offset + len(each or b"")] == each for offset, each in found)


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_line_that_is_too_long_is_not_kept_and_the_next_one_is_found(size: int) -> None:
    data = b"short\n" + b"x" * 200 + b"\nafter\n" + b"y" * 101
    assert await read(data, size) == [(0, b"short"), (6, None), (207, b"after"), (213, None)]


@given(
    st.lists(st.tuples(st.integers(1, 2**32 - 1), st.integers(0, 2**63), st.integers(0, 2**32 - 1), st.integers(0, 9)))
)
def test_packed_places_come_back(fields: list[tuple[int, int, int, int]]) -> None:
    places = [Place(*each) for each in fields]
    assert unpack_places(pack_places(places)) == places
    numbers = [place.number for place in places]
    assert unpack_numbers(pack_numbers(numbers)) == numbers


async def test_single_lines_are_read_across_blocks(tmp_path: Path) -> None:
    lines = [b"a" * 200_000, b"b" * 100_000, b"c" * 1_000_000, b"d"]
    blobs = LocalBlobs(tmp_path, 0)
    await blobs.check()
    await blobs.put("files/x", b"\n".join(lines))
    reader = LineReader(blobs, "files/x")
    offset = 0
    for number, each in enumerate(lines, 1):
        assert await reader.read(Place(number, offset, len(each))) == each
        offset += len(each) + 1


@pytest.mark.parametrize(("window", "seconds"), [("24h", 86_400), ("2h", 7200), ("30m", 1800), ("45s", 45)])
def test_windows(window: str, seconds: int) -> None:
    assert window_seconds(window, 10) == seconds


@pytest.mark.parametrize("window", ["", "24", "24H", "25h", "9s", "-1h", "1d", "01h", "1.5h", " 24h", "9999999h"])
def test_what_is_no_window(window: str) -> None:
    with pytest.raises(InvalidRequest):
        window_seconds(window, 10)


def test_results_are_lines_of_json() -> None:
    body = b'{"id":"chatcmpl-1","choices":[]}'
    assert json.loads(answer_line("batch_req_1", "a\n", "req_1", body)) == {
        "id": "batch_req_1",
        "custom_id": "a\n",
        "response": {"status_code": 200, "request_id": "req_1", "body": json.loads(body)},
        "error": None,
    }
    refused = json.loads(refusal_line("batch_req_1", "a", "req_1", InvalidRequest("No.", param="n")))
    assert refused["response"]["body"]["error"]["param"] == "n"
    failed = json.loads(failure_line("batch_req_1", "a", "batch_expired", "Late."))
    assert failed == {
        "id": "batch_req_1",
        "custom_id": "a",
        "response": None,
        "error": {"code": "batch_expired", "message": "Late."},
    }
    for each in (answer_line("i", "\u2028\n", "r", b"{}"), failure_line("i", "\n", "c", "\n")):
        assert each.count(b"\n") == 1
        assert each.endswith(b"\n")


def prefix(*messages: tuple[str, str]) -> bytes:
    body = {"model": "fake", "messages": [{"role": role, "content": text} for role, text in messages]}
    data = json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": body}).encode()
    return prefix_of(parse_line(data, CHAT))


def test_lines_with_one_long_system_prompt_share_a_prefix() -> None:
    assert prefix(("system", LONG), ("user", "one")) == prefix(("system", LONG), ("user", "two")) != b""
    assert prefix(("system", LONG), ("user", "one")) != prefix(("system", LONG + "y"), ("user", "one"))
    assert prefix(("system", "Be brief."), ("user", "one")) == b""
    assert prefix(("user", LONG * 8 + "one")) == prefix(("user", LONG * 8 + "two")) != b""


def test_lines_with_the_same_long_instructions_share_a_prefix() -> None:
    def of(instructions: str, text: str) -> bytes:
        body = {"model": "fake", "instructions": instructions, "input": text}
        data = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}).encode()
        return prefix_of(parse_line(data, "/v1/responses"))

    assert of(LONG, "one") == of(LONG, "two") != b""
    assert of("Be brief.", "one") == b""


async def test_a_file_of_evil_lines_is_refused_line_by_line() -> None:
    evil = ["\x00", '{"custom_id": "\\ud800"}', "[" * 100_000, '{"a":1e999}', "null", '"x"', "{}", "1" * 5000]
    found = await check(b"\n".join(each.encode() for each in evil))
    assert [error["line"] for error in found.errors] == list(range(1, len(evil) + 1))
    assert all(len(error["message"]) < 300 for error in found.errors)


@given(st.binary(max_size=400))
async def test_no_bytes_break_the_check(data: bytes) -> None:
    index = await check(data)
    assert index.errors or len(index)


async def test_lines_are_cut_by_model_and_put_together_by_prefix() -> None:
    def shared(name: str, letter: str, model: str = "fake") -> dict[str, Any]:
        request = line(name, "Go.", model=model)
        request["body"]["messages"].insert(0, {"role": "system", "content": letter * PREFIX_CHARS_MIN})
        return request

    data = jsonl(
        [shared("1", "a"), line("2", "x", model="other"), shared("3", "b"), line("4", "y"), shared("5", "a"),
         shared("6", "c"), shared("7", "b")]
    )  # fmt: skip
    index = await check(data)
    chunks = list(plan_chunks(index, 4))
    assert [(model, [place.number for place in places]) for model, places in chunks] == [
        ("fake", [1, 5, 3, 7]),
        ("fake", [4, 6]),
        ("other", [2]),
    ]
    groups = {place.number: place.group for _, places in chunks for place in places}
    assert groups[1] == groups[5] != groups[3] == groups[7]
    assert groups[2] == groups[4] == groups[6] == NO_GROUP
    assert all(
        json.loads(data[p.offset : p.offset + p.length])["custom_id"] == str(p.number) for _, c in chunks for p in c
    )


def order(*groups: int, first_alone: bool = True) -> RunOrder:
    places = (Place(number, 0, 0, group) for number, group in enumerate(groups, 1))
    return RunOrder(places, first_alone=first_alone)


def test_the_first_line_of_a_group_goes_alone_until_it_is_read() -> None:
    lines = order(1, 1, 1)
    first = lines.take()
    assert first is not None
    assert lines.take() is None
    lines.read(first)
    assert [lines.take(), lines.take()] == [Place(2, 0, 0, 1), Place(3, 0, 0, 1)]
    assert lines.empty


def test_none_waits_for_the_first_where_each_slot_has_to_read_the_prefix_anyway() -> None:
    lines = order(1, 1, 1, 2, 2, first_alone=False)
    taken = [lines.take() for _ in range(5)]
    assert [place.group for place in taken if place] == [1, 2, 1, 2, 1], "a slot for each, then more of each"
    assert lines.empty


def test_a_first_line_that_fails_lets_the_next_one_try() -> None:
    lines = order(1, 1)
    first = lines.take()
    assert first is not None
    lines.ended(first)
    assert lines.take() == Place(2, 0, 0, 1)


def test_several_groups_run_side_by_side() -> None:
    lines = order(1, 1, 1, 2, 2, 2)
    first, second = lines.take(), lines.take()
    assert (first, second) == (Place(1, 0, 0, 1), Place(4, 0, 0, 2))
    assert lines.take() is None
    assert second is not None
    lines.read(second)
    lines.ended(second)
    following = lines.take()
    assert following == Place(5, 0, 0, 2)


def test_lines_of_no_group_wait_for_nobody() -> None:
    lines = order(NO_GROUP, 1, NO_GROUP, 1)
    taken = [lines.take() for _ in range(3)]
    assert [each.number for each in taken if each] == [1, 3, 2]
    assert lines.take() is None


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 8), st.booleans(), st.randoms())
def test_every_line_runs_once_in_any_order(groups: list[int], window: int, first_alone: bool, random: Any) -> None:
    lines = order(*groups, first_alone=first_alone)
    running: list[Place] = []
    seen: list[int] = []
    while not lines.empty or running:
        place = lines.take() if len(running) < window else None
        if place is not None:
            running.append(place)
            seen.append(place.number)
        else:
            assert running, "nobody runs and nobody may go"
            ended = running.pop(random.randrange(len(running)))
            if random.random() < 0.8:
                lines.read(ended)
            lines.ended(ended)
    assert sorted(seen) == list(range(1, len(groups) + 1))


async def test_the_chunk_that_began_first_goes_first_and_shared_prefixes_do_not_wait_ahead() -> None:
    window = Window(slots=1, ahead=1)
    entered: list[str] = []

    async def enter(name: str, turn: int, *, shares: bool) -> None:
        await window.enter(Turn(0, 0.0, turn), shares=shares)
        entered.append(name)

    await enter("a", 2, shares=True)
    others = [
        asyncio.create_task(enter(name, turn, shares=shares))
        for name, turn, shares in (("gone", 0, True), ("early", 1, True), ("late", 3, False))
    ]
    await asyncio.sleep(0)
    assert entered == ["a"]
    others[0].cancel()
    await asyncio.wait([others[0]])
    window.leave(Turn(0, 0.0, 2))
    await asyncio.wait(others[1:])
    assert entered == ["a", "early", "late"]


async def lines_of(window: Window, turns: list[Turn], count: int, *, shares: bool) -> list[str]:
    """The projects of the first so many lines, where each turn always has another line and one runs at a time."""
    order: list[str] = []
    ending: list[asyncio.Task[None]] = []
    enough = asyncio.Event()

    async def run(turn: Turn) -> None:
        for _ in range(3):  # until the next lines wait
            await asyncio.sleep(0)
        window.leave(turn)

    async def chunk(turn: Turn) -> None:
        while len(order) < count:
            await window.enter(turn, shares=shares)
            order.append(turn.project)
            ending.append(asyncio.create_task(run(turn)))
        enough.set()

    running = [asyncio.create_task(chunk(turn)) for turn in turns]
    await enough.wait()
    for task in running:
        task.cancel()
    await asyncio.wait([*running, *ending])
    return order[:count]


async def test_lines_of_projects_go_by_weight_whoever_came_first() -> None:
    window = Window(slots=1, ahead=0, weights=lambda project: 3.0 if project == "b" else 1.0)
    turns = [Turn(0, 10.0, 1, "a"), Turn(0, 10.0, 2, "a"), Turn(0, 20.0, 3, "b")]
    order = await lines_of(window, turns, 80, shares=False)
    assert abs(order.count("b") - 60) <= 2


async def test_lines_with_shared_prefixes_take_turns_by_runs_of_a_few() -> None:
    window = Window(slots=1, ahead=0)
    order = await lines_of(window, [Turn(0, 10.0, 1, "a"), Turn(0, 10.0, 2, "b")], 160, shares=True)
    changes = sum(one != other for one, other in itertools.pairwise(order))
    assert abs(order.count("a") - 80) <= 10
    assert 4 <= changes <= 30


async def test_a_more_urgent_chunk_goes_before_any_turn() -> None:
    window = Window(slots=1, ahead=0)
    order = await lines_of(window, [Turn(0, 10.0, 1, "a"), Turn(-1, 99.0, 2, "b")], 40, shares=True)
    assert order.count("a") <= 2


async def test_a_place_that_was_not_used_costs_no_turn() -> None:
    window = Window(slots=1, ahead=0)
    first, other, again = Turn(0, 1.0, 1, "a"), Turn(0, 9.0, 2, "b"), Turn(0, 2.0, 3, "a")
    await window.enter(first, shares=False)
    entered: list[str] = []

    async def enter(turn: Turn) -> None:
        await window.enter(turn, shares=False)
        entered.append(turn.project)

    waiting = [asyncio.create_task(enter(other)), asyncio.create_task(enter(again))]
    await asyncio.sleep(0)
    window.leave(first, used=False)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert entered == ["a"]
    window.leave(again)
    await asyncio.wait(waiting)
    assert entered == ["a", "b"]


async def test_lines_that_wait_for_their_quota_keep_no_place_from_another_project() -> None:
    meter = Meter(parse_quotas(["tokens=100/day"]), FakeClock())
    held = await meter.reserve("a", "", "m", "chat", lambda: Amounts(1, 100))
    window = Window(slots=1, ahead=1)
    patient, other = Turn(0, 1.0, 1, "a"), Turn(0, 2.0, 2, "b")
    begun: list[Turn] = []
    running: list[asyncio.Task[None]] = []

    async def run(turn: Turn) -> None:
        begun.append(turn)
        if turn is patient:
            aside = partial(window.aside, turn)
            (await meter.reserve_in_turn("a", "", "m", "chat", lambda: Amounts(1, 10), aside)).release()
        window.leave(turn)

    async def chunk(turn: Turn, lines: int) -> None:
        for _ in range(lines):
            await window.enter(turn, shares=False)
            running.append(asyncio.create_task(run(turn)))

    of_a = asyncio.create_task(chunk(patient, 50))
    await chunk(other, 20)
    await asyncio.sleep(0)
    assert begun.count(other) == 20
    assert begun.count(patient) <= 4  # nor do all of them wait in memory
    held.release()
    await of_a
    await asyncio.gather(*running)
    assert begun.count(patient) == 50


@pytest.mark.parametrize("body", [{"input": ["a" * 2000]}, {"query": "q" * 2000, "documents": ["d" * 2000]}])
def test_lines_without_a_prompt_share_no_prefix(body: dict[str, Any]) -> None:
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"model": "m", **body}}
    assert prefix_of(parse_line(json.dumps(line).encode(), CHAT)) == b""


@pytest.mark.parametrize("url", ["/v1/audio/transcriptions", "/v1/images/edits"])
@pytest.mark.parametrize("field", [{"background": True}, {"webhook_url": "https://example.com/"}])
def test_a_line_about_media_is_no_job_of_its_own(field: dict[str, object], url: str) -> None:
    body = {"model": "m", "url": "data:,", "background": False} | field
    line = json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode()
    with pytest.raises(InvalidRequest) as refused:
        parse_line(line, url)
    (name,) = field
    assert (refused.value.code, refused.value.param) == ("invalid_body", f"body.{name}")


def test_the_backdrop_of_a_picture_is_no_job() -> None:
    url = "/v1/images/generations"
    body = {"model": "m", "prompt": "a cat", "background": "opaque"}
    line = json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode()
    assert parse_line(line, url).body == body

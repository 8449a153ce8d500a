"""Events of a generation: however the bytes are cut, relayed and gathered answers say the same."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.dialects.openai.call import Call
from forebay.dialects.openai.events import (
    ANSWER_BYTES_MAX,
    EVENT_BYTES_MAX,
    GENERATION,
    EventReader,
    GenerationGatherer,
    GenerationRelay,
    legacy_logprobs,
)
from forebay.errors import EngineCrashed, EngineGarbled, ForebayError, InvalidRequest, ServerError
from forebay.inference import Capability, Request

TEXTS = st.lists(st.text(max_size=8), min_size=1, max_size=8)
CUTS = st.lists(st.integers(1, 300), max_size=30)


def call(
    *, stream: bool = True, usage: bool = False, kind: Any = "chat", forced: bool = False, legacy: bool = False
) -> Call:
    request = Request("req_1", "p", "mine", Capability.CHAT, "/v1/chat/completions", b"{}", places=3)
    return Call(request, kind, stream, usage, "default", GENERATION, legacy_logprobs=legacy, forced_tool=forced)


def chunk(delta: dict[str, Any], *, index: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "mine", "choices": [choice], **more}


def wire(events: list[dict[str, Any]], end: str = "\n\n", *, done: bool = True) -> bytes:
    lines = ["data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")) for event in events]
    return "".join(line + end for line in [*lines, *(["data: [DONE]"] if done else [])]).encode()


def conversation(texts: list[str], choices: int = 1) -> list[dict[str, Any]]:
    """What an engine streams: roles, texts, ends, and the usage."""
    events = [chunk({"role": "assistant", "content": None}, index=index) for index in range(choices)]
    events += [chunk({"content": text}, index=index) for text in texts for index in range(choices)]
    events += [chunk({}, index=index, finish="stop") for index in range(choices)]
    usage = {"prompt_tokens": 3, "completion_tokens": len(texts), "total_tokens": 3 + len(texts)}
    return [*events, {**chunk({}), "choices": [], "usage": usage}]


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    parts = []
    for size in sizes:
        parts.append(data[:size])
        data = data[size:]
    return [part for part in [*parts, data] if part]


def relayed(one: Call, parts: list[bytes], *, rename: bool = False) -> tuple[list[dict[str, Any]], GenerationRelay]:
    relay = GenerationRelay(one, rename=rename)
    out = b"".join(relay.feed(part) for part in parts)
    reader = EventReader()
    events = reader.feed(out)
    assert reader.done
    assert reader.empty
    return events, relay


def gathered(one: Call, parts: list[bytes]) -> Any:
    gatherer = GenerationGatherer(one)
    for part in parts:
        gatherer.feed(part)
    return json.loads(gatherer.body())


def content(events: list[dict[str, Any]], index: int = 0) -> str:
    found = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in found)


@given(TEXTS, CUTS, st.integers(1, 3), st.booleans(), st.sampled_from(["\n\n", "\r\n\r\n"]))
def test_the_cut_of_the_bytes_changes_nothing(
    texts: list[str], sizes: list[int], choices: int, usage: bool, end: str
) -> None:
    data, one = wire(conversation(texts, choices), end), call(usage=usage)
    whole, relay = relayed(one, [data])
    assert relay.done
    parts, other = relayed(one, cut(data, sizes))
    assert parts == whole
    assert other.progress.usage == relay.progress.usage
    events, _ = relayed(
        one, [wire([event], done=False) for event in conversation(texts, choices)] + [b"data: [DONE]\n\n"]
    )
    assert events == whole
    body = gathered(one, cut(data, sizes))
    for index in range(choices):
        assert content(whole, index) == "".join(texts) == body["choices"][index]["message"]["content"]
    assert bool([event for event in whole if event.get("usage")]) is usage
    assert body["usage"]["completion_tokens"] == len(texts)


@given(TEXTS, CUTS)
def test_the_fast_path_and_the_slow_path_say_the_same(texts: list[str], sizes: list[int]) -> None:
    data = wire(conversation(texts))
    assert relayed(call(), cut(data, sizes))[0] == relayed(call(), cut(data, sizes), rename=True)[0]


def test_plain_reads_pass_as_they_came() -> None:
    relay = GenerationRelay(call(), rename=False)
    relay.feed(wire([chunk({"role": "assistant"})], done=False))
    plain = b'data: {"choices":[ {"index":0, "delta":{"content":"a"}} ]}\n\n' * 3
    assert relay.feed(plain) is plain
    assert relay.progress.content_seen


def test_the_first_event_has_the_tier_and_every_event_our_name_of_the_model() -> None:
    events = [{**event, "model": "theirs", "timings": {"x": 1}} for event in conversation(["a", "b"])]
    out, _ = relayed(call(), [wire(events)], rename=True)
    assert out[0]["service_tier"] == "default"
    assert {event["model"] for event in out} == {"mine"}
    assert not [event for event in out if "timings" in event]


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9), max_size=4), CUTS)
def test_a_forced_tool_call_is_the_same_both_ways(arguments: dict[str, Any], sizes: list[int]) -> None:
    text = json.dumps({"name": "f", "arguments": arguments})
    data = wire(conversation([text[:5], text[5:9], text[9:]]))
    events, _ = relayed(call(forced=True), cut(data, sizes))
    (piece,) = [
        found for event in events for choice in event["choices"] for found in choice["delta"].get("tool_calls", ())
    ]
    body = gathered(call(forced=True), cut(data, sizes))["choices"][0]
    (made,) = body["message"]["tool_calls"]
    assert {key: value for key, value in piece.items() if key != "index"} == made
    assert (made["function"]["name"], json.loads(made["function"]["arguments"])) == ("f", arguments)
    assert body["finish_reason"] == "tool_calls"
    assert body["message"]["content"] is None
    assert content(events) == ""


def test_a_forced_tool_call_that_was_cut_short_is_shown_as_text() -> None:
    data = wire(conversation(['{"name": "f", "argu']))
    assert content(relayed(call(forced=True), [data])[0]) == '{"name": "f", "argu'
    assert gathered(call(forced=True), [data])["choices"][0]["message"]["content"] == '{"name": "f", "argu'


def test_tool_calls_in_pieces_are_put_together() -> None:
    pieces = [
        {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"a"'}},
        {"index": 1, "id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        {"index": 0, "function": {"arguments": ":1}"}},
    ]
    data = wire([*(chunk({"tool_calls": [piece]}) for piece in pieces), chunk({}, finish="tool_calls")])
    message = gathered(call(), [data])["choices"][0]["message"]
    assert message["content"] is None
    found = [(made["id"], made["function"]["name"], made["function"]["arguments"]) for made in message["tool_calls"]]
    assert found == [("c1", "f", '{"a":1}'), ("c2", "g", "{}")]


def test_legacy_logprobs_have_four_columns() -> None:
    entries = [
        {"token": "He", "logprob": -0.1, "top_logprobs": [{"token": "Hi", "logprob": -2.0}]},
        {"token": "llo", "logprob": -0.2},
    ]
    assert legacy_logprobs({"content": entries}) == {
        "tokens": ["He", "llo"],
        "token_logprobs": [-0.1, -0.2],
        "top_logprobs": [{"Hi": -2.0}, {}],
        "text_offset": [0, 2],
    }
    assert legacy_logprobs(None) is None
    assert legacy_logprobs({"tokens": ["a"]}) == {"tokens": ["a"]}


def test_logprobs_that_are_legacy_already_are_put_together_too() -> None:
    def piece(token: str, offset: int) -> dict[str, Any]:
        columns = {
            "tokens": [token],
            "token_logprobs": [-0.5],
            "top_logprobs": [{token: -0.5}],
            "text_offset": [offset],
        }
        return {"choices": [{"index": 0, "text": token, "logprobs": columns, "finish_reason": None}]}

    data = wire([piece("He", 0), piece("llo", 2), {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}])
    choice = gathered(call(kind="completion", legacy=True), [data])["choices"][0]
    assert choice["text"] == "Hello"
    assert choice["logprobs"] == {
        "tokens": ["He", "llo"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"He": -0.5}, {"llo": -0.5}],
        "text_offset": [0, 2],
    }


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"rubbish\n\n",
            b"data: {\n\n",
            b"data: 5\n\n",
            b"data: []\n\n",
            b'data: {"choices":5}\n\n',
            b'data: {"choices":[5]}\n\n',
        ),
        *(b"data: \xff\n\n", b"{}\n\n", b"x" * (EVENT_BYTES_MAX + 1), b"HTTP/1.1 200 OK\r\n\r\n"),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_event_is_garbled(data: bytes) -> None:
    with pytest.raises(EngineGarbled):
        GenerationRelay(call(), rename=False).feed(data)
    with pytest.raises(EngineGarbled):
        GenerationGatherer(call()).feed(data)


@pytest.mark.parametrize(
    "choice",
    [
        *({"delta": [1]}, {"delta": "x"}, {"delta": {"tool_calls": 5}}, {"delta": {"tool_calls": [5]}}),
        *({"delta": {"tool_calls": [{"function": made}]}} for made in ("x", {"name": 5}, {"arguments": {}})),
        *({"text": "x", "logprobs": {"content": [{"top_logprobs": top}]}} for top in (5, [5], [{"token": [1]}])),
    ],
    ids=str,
)
def test_a_choice_of_another_shape_is_garbled_and_no_bug_of_ours(choice: dict[str, Any]) -> None:
    data = wire([{"choices": [choice]}])
    for one in (call(), call(forced=True), call(kind="completion", legacy=True)):
        with pytest.raises(EngineGarbled):
            GenerationRelay(one, rename=True).feed(data)
        with pytest.raises(EngineGarbled):
            GenerationGatherer(one).feed(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("index", "delta", "text", "content", "tool_calls", "function", "name", "arguments", "id"),
                    *("logprobs", "top_logprobs", "token", "finish_reason", "usage", "reasoning_content"),
                ]
            ),
            inner,
            max_size=4,
        )
    ),
)


@given(st.lists(st.dictionaries(st.sampled_from(["choices", "usage", "error"]), JSON), max_size=3), st.booleans())
def test_whatever_json_an_engine_sends_the_error_is_one_of_ours(events: list[dict[str, Any]], choices: bool) -> None:
    data = wire([{"choices": [event]} if choices else event for event in events])
    for one in (call(usage=True), call(forced=True), call(kind="completion", legacy=True)):
        with contextlib.suppress(ForebayError):
            GenerationRelay(one, rename=True).feed(data)
        with contextlib.suppress(ForebayError):
            gathered(one, [data])


def test_an_answer_without_an_end_is_not_put_together_for_ever() -> None:
    gatherer = GenerationGatherer(call())
    piece = wire([chunk({"content": "x" * 2**20})], done=False)
    with pytest.raises(EngineGarbled, match="Ask for a stream"):
        for _ in range(ANSWER_BYTES_MAX // 2**20 + 1):
            gatherer.feed(piece)


@given(st.binary(max_size=300), CUTS)
def test_random_bytes_end_in_an_error_of_ours_or_in_nothing(data: bytes, sizes: list[int]) -> None:
    relay = GenerationRelay(call(), rename=False)
    try:
        for part in cut(wire([chunk({"content": "a"})], done=False) + data, sizes):
            relay.feed(part)
    except (EngineGarbled, ServerError, InvalidRequest):
        return


def test_an_answer_without_its_end_is_garbled() -> None:
    gatherer = GenerationGatherer(call())
    gatherer.feed(wire(conversation(["a"]), done=False))
    with pytest.raises(EngineGarbled):
        gatherer.body()


@pytest.mark.parametrize(
    "line",
    [
        b'data: {"error":{"code":500,"message":"at /opt/x/y.cpp"}}\n\n',
        b'error: {"code":500,"message":"at /opt/x/y.cpp"}\n\n',
    ],
)
def test_an_error_event_is_raised_without_its_paths(line: bytes) -> None:
    with pytest.raises(ServerError) as raised:
        GenerationRelay(call(), rename=False).feed(line)
    assert "/opt" not in str(raised.value)


def test_comments_and_other_fields_of_events_are_passed_over() -> None:
    data = b": hello\n\nevent: x\nid: 1\nretry: 5\ndata: null\n\n" + wire(conversation(["a"]))
    assert content(relayed(call(), [data])[0]) == "a"


def test_our_error_event_is_what_clients_raise() -> None:
    event = json.loads(GENERATION.error_event(EngineCrashed()).removeprefix(b"data: "))
    assert event["error"]["code"] == "engine_crashed"


@pytest.mark.parametrize("index", [3, 10**9])
def test_an_answer_that_was_not_asked_for_is_garbage(index: int) -> None:
    data = wire([chunk({"content": "x"}, index=index)])
    with pytest.raises(EngineGarbled):
        GenerationGatherer(call(stream=False)).feed(data)
    with pytest.raises(EngineGarbled):
        GenerationRelay(call(forced=True), rename=False).feed(data)

"""Messages out of the stream of a chat: however the bytes are cut, relayed and gathered they say the same."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.dialects.anthropic.events import CountedTokens, Messages
from forebay.dialects.openai.call import Call
from forebay.dialects.tokens import TOKENS
from forebay.errors import EngineCrashed, EngineGarbled, ForebayError
from forebay.inference import Capability, Request
from tests.unit.test_events import CUTS, chunk, cut, wire

TEXTS = st.lists(st.text(max_size=6), max_size=4)
INPUTS = st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=6) | st.none(), max_size=3)
PIECES = st.lists(
    st.tuples(st.just("content"), TEXTS) | st.tuples(st.just("reasoning_content"), TEXTS) | st.tuples(st.just("tool"), INPUTS),
    max_size=6,
)  # fmt: skip
FINISHES = st.sampled_from(["stop", "length", "tool_calls", "content_filter", "other"])
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 3},
}


def call(*, forced: bool = False, tier: str = "default") -> Call:
    request = Request("req_1", "p", "mine", Capability.CHAT, "/v1/chat/completions", b"{}")
    return Call(request, "chat", True, False, tier, Messages("req_1"), forced_tool=forced)


def stream(pieces: list[tuple[str, Any]], finish: str = "stop", **more: Any) -> bytes:
    """What an engine streams for pieces of text, of thought, and calls of tools."""
    events = [chunk({"role": "assistant", "content": None})]
    tools = 0
    for kind, value in pieces:
        if kind != "tool":
            events += [chunk({kind: text}) for text in value]
            continue
        events.append(chunk(tool(tools, {"name": f"f{tools}", "arguments": ""}, id=f"call_{tools}")))
        events += [chunk(tool(tools, {"arguments": letter})) for letter in json.dumps(value)]
        tools += 1
    last = chunk({}, finish=finish)
    last["choices"][0] |= more
    return wire([*events, last, {**chunk({}), "choices": [], "usage": USAGE}])


def tool(index: int, function: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "function": function, **more}]}


def gathered(data: bytes, sizes: list[int] | None = None, *, of: Call | None = None, thinks: bool = True) -> Any:
    gatherer = Messages("req_1", shows_thinking=thinks).gatherer(of or call())
    for part in cut(data, sizes or []):
        gatherer.feed(part)
    return json.loads(gatherer.body())


def relayed(data: bytes, sizes: list[int] | None = None, *, of: Call | None = None, thinks: bool = True) -> list[Any]:
    """The events; each is named as it says it is."""
    relay = Messages("req_1", shows_thinking=thinks).relay(of or call(), rename=False)
    out = b"".join(relay.feed(part) for part in cut(data, sizes or []))
    assert relay.done
    events = []
    for block in out.decode().split("\n\n")[:-1]:
        name, line = block.split("\n")
        events.append(json.loads(line.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def put_together(events: list[Any]) -> Any:
    """A message as a client of the dialect puts it together, who wants one block at a time."""
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message, opened, texts = events[0]["message"], None, ""
    for event in events[2:-2]:
        match event["type"]:
            case "content_block_start":
                assert opened is None
                assert event["index"] == len(message["content"])
                opened, texts = event["index"], ""
                message["content"].append(event["content_block"])
            case "content_block_delta":
                assert event["index"] == opened
                delta = event["delta"]
                texts += delta[{"text_delta": "text", "thinking_delta": "thinking"}.get(delta["type"], "partial_json")]
            case "content_block_stop":
                assert event["index"] == opened
                block = message["content"][-1]
                block |= {"input": json.loads(texts or "{}")} if block["type"] == "tool_use" else {block["type"]: texts}
                opened = None
    assert opened is None
    return message | events[-2]["delta"] | {"usage": events[-2]["usage"]}


@given(PIECES, FINISHES, CUTS)
def test_relayed_and_gathered_say_the_same(pieces: list[tuple[str, Any]], finish: str, sizes: list[int]) -> None:
    data = stream(pieces, finish)
    message = gathered(data, sizes)
    assert message == gathered(data)
    assert put_together(relayed(data, sizes)) == message
    said = "".join("".join(value) for kind, value in pieces if kind == "content")
    assert "".join(block["text"] for block in message["content"] if block["type"] == "text") == said
    inputs = [value for kind, value in pieces if kind == "tool"]
    assert [block["input"] for block in message["content"] if block["type"] == "tool_use"] == inputs


@given(st.binary(max_size=60), CUTS)
def test_rubbish_is_an_error_and_no_message(data: bytes, sizes: list[int]) -> None:
    for write in (gathered, relayed):
        with pytest.raises((ForebayError, AssertionError)):
            write(data, sizes)


def test_a_whole_message() -> None:
    message = gathered(stream([("reasoning_content", ["h", "m"]), ("content", ["a", "b"]), ("tool", {"x": 1})]))
    assert message == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "mine",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "ab"},
            {"type": "tool_use", "id": "call_0", "name": "f0", "input": {"x": 1}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": 5,
            "service_tier": "standard",
        },
    }
    assert gathered(stream([]), of=call(tier="priority"))["usage"]["service_tier"] == "priority"


def test_where_the_engine_counts_nothing_the_prompt_is_estimated_and_each_event_a_token() -> None:
    asked = call()
    asked = replace(asked, request=replace(asked.request, body=b" " * 400))
    message = gathered(wire([chunk({"content": "a"}), chunk({"content": "b"}), chunk({}, finish="stop")]), of=asked)
    assert (message["usage"]["input_tokens"], message["usage"]["output_tokens"]) == (100, 3)


@pytest.mark.parametrize(
    ("finish", "more", "reason", "sequence"),
    [
        ("stop", {}, "end_turn", None),
        ("stop", {"stop_reason": "END"}, "stop_sequence", "END"),
        ("stop", {"stop_reason": 151645}, "end_turn", None),
        ("length", {}, "max_tokens", None),
        ("tool_calls", {}, "tool_use", None),
        ("content_filter", {}, "refusal", None),
        ("what?", {}, "end_turn", None),
    ],
)
def test_why_it_stopped(finish: str, more: dict[str, Any], reason: str, sequence: str | None) -> None:
    message = gathered(stream([("content", ["a"])], finish, **more))
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


@pytest.mark.parametrize(("kind", "sequence"), [("word", "END"), ("eos", None)])
def test_llama_cpp_says_beside_the_choice_which_sequence_it_met(kind: str, sequence: str | None) -> None:
    last = {**chunk({}, finish="stop"), "__verbose": {"stop_type": kind, "stopping_word": "END"}}
    message = gathered(wire([chunk({"content": "a"}), last]))
    assert message["stop_sequence"] == sequence
    assert message["stop_reason"] == ("stop_sequence" if sequence else "end_turn")


def test_thoughts_that_nobody_wants_to_see_are_not_shown() -> None:
    data = stream([("reasoning_content", ["hm"]), ("content", ["a"])])
    assert [block["type"] for block in gathered(data, thinks=False)["content"]] == ["text"]
    assert "hm" not in json.dumps(relayed(data, thinks=False))


@given(INPUTS, CUTS)
def test_a_forced_call_comes_as_text_and_becomes_a_call(value: dict[str, Any], sizes: list[int]) -> None:
    text = json.dumps({"name": "f", "arguments": value})
    data = stream([("content", list(text))])
    message = gathered(data, sizes, of=call(forced=True))
    assert [(block["name"], block["input"]) for block in message["content"]] == [("f", value)]
    assert message["stop_reason"] == "tool_use"
    assert put_together(relayed(data, sizes, of=call(forced=True))) == message


def test_a_forced_call_that_was_cut_is_text() -> None:
    data = stream([("content", ['{"name": "f", "argu'])], "length")
    message = gathered(data, of=call(forced=True))
    assert message["content"] == [{"type": "text", "text": '{"name": "f", "argu'}]
    assert message["stop_reason"] == "max_tokens"


def test_a_call_that_was_cut_has_the_input_that_there_is() -> None:
    start = tool(0, {"name": "f", "arguments": '{"a": 1, "b": "ha'}, id="call_0")
    message = gathered(wire([chunk(start), chunk({}, finish="length")]))
    assert message["content"][0]["input"] == {"a": 1, "b": "ha"}
    assert message["stop_reason"] == "max_tokens"


def test_a_call_without_an_id_gets_one() -> None:
    message = gathered(wire([chunk(tool(0, {"name": "f", "arguments": "{}"})), chunk({}, finish="tool_calls")]))
    assert message["content"][0]["id"] == "toolu_1_0"


@pytest.mark.parametrize(
    "events",
    [
        [],
        [{**chunk({}), "choices": []}],
        [chunk({"content": "a"}, index=1)],
        [chunk(tool(0, {"arguments": "{}"}))],
        [chunk(tool(0, {"name": "f", "arguments": "[]"})), chunk({}, finish="tool_calls")],
        [chunk(tool(0, {"name": "f", "arguments": "nonsense"})), chunk({}, finish="tool_calls")],
        [chunk(tool(0, {"name": "f"})), chunk(tool(1, {"name": "g"})), chunk(tool(0, {"arguments": "{}"}))],
        [chunk(tool(0, {"name": "f", "arguments": "x" * 5_000_000}))],
    ],
)
def test_what_is_no_answer_is_garbled(events: list[dict[str, Any]]) -> None:
    for write in (gathered, relayed):
        with pytest.raises(EngineGarbled):
            write(wire(events))


def test_an_answer_without_its_end_is_garbled() -> None:
    with pytest.raises(EngineGarbled):
        gathered(wire([chunk({"content": "a"})], done=False))


def test_the_error_of_a_stream_is_its_last_event() -> None:
    name, line = Messages("req_1").error_event(EngineCrashed()).decode().strip().split("\n")
    assert name == "event: error"
    error = json.loads(line.removeprefix("data: "))
    assert (error["type"], error["error"]["type"], error["request_id"]) == ("error", "api_error", "req_1")


@pytest.mark.parametrize("answer", [b'{"input_tokens": 5}', b'{"count": 5, "tokens": [1]}'])
def test_a_count(answer: bytes) -> None:
    gatherer = CountedTokens("req_1").gatherer(call())
    gatherer.feed(answer[:4])
    gatherer.feed(answer[4:])
    assert json.loads(gatherer.body()) == {"input_tokens": 5}


@pytest.mark.parametrize("answer", [b"", b"[]", b"{", b"{}", b'{"input_tokens": -1}', b'{"input_tokens": "5"}'])
def test_no_count(answer: bytes) -> None:
    gatherer = CountedTokens("req_1").gatherer(call())
    gatherer.feed(answer)
    with pytest.raises(EngineGarbled):
        gatherer.body()


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b'{"tokens": [1, 2]}', {"object": "tokens", "model": "mine", "tokens": [1, 2], "count": 2}),
        (b'{"content": "a"}', {"object": "text", "model": "mine", "content": "a", "prompt": "a"}),
        (b'{"prompt": "a"}', {"object": "text", "model": "mine", "content": "a", "prompt": "a"}),
        (b'{"tokens": ["a"]}', None),
        (b'{"content": 5}', None),
    ],
)
def test_tokens_and_texts(answer: bytes, body: dict[str, Any] | None) -> None:
    gatherer = TOKENS.gatherer(call())
    gatherer.feed(answer)
    if body is not None:
        assert json.loads(gatherer.body()) == body
        return
    with pytest.raises(EngineGarbled):
        gatherer.body()

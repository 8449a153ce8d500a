"""Responses: however the engine's bytes are cut, the events are the same, and they say what the whole body says."""

import json
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from forebay.dialects.openai.call import Call, Context, Extensions, Thread, parse
from forebay.dialects.openai.responses import ResponseBody, continued, response_call, response_images
from forebay.dialects.openai.responses_events import joined, numbered
from forebay.dialects.openai.responses_items import items_of, listed
from forebay.errors import EngineCrashed, EngineGarbled, InvalidRequest, RequestCancelled
from tests.unit.test_events import CUTS, chunk, cut, wire

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
THREAD = Thread("resp_1", 7.5, lambda: 9.5)
WORDS = st.text(max_size=6)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reasoning_content"), WORDS),
        st.tuples(st.just("content"), WORDS),
        st.tuples(st.just("call"), st.tuples(st.integers(0, 2), st.sampled_from(["", '{"a":', "1}"]))),
    ),
    max_size=12,
)
USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 3,
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"reasoning_tokens": 1},
}


def call(body: dict[str, Any] | None = None, *, thread: Thread | None = THREAD, **fields: Any) -> Call:
    raw = json.dumps({"model": "mine", "input": "Hello.", **(body or {})}).encode()
    context = Context("req_1", "p", None, max_tokens=100, slots=4, thread=thread, **fields)
    return response_call(parse(ResponseBody, raw), context)


def sent(body: dict[str, Any], **fields: Any) -> Any:
    """What the engine gets for it."""
    return json.loads(call(body, **fields).request.body)


def stream(steps: list[tuple[str, Any]], finish: str = "stop", *, done: bool = True) -> bytes:
    """What an engine says in these steps."""
    events, named = [chunk({"role": "assistant", "content": None})], set()
    for kind, value in steps:
        if kind != "call":
            events.append(chunk({kind: value}))
            continue
        index, arguments = value
        function = {"arguments": arguments} if index in named else {"name": f"f{index}", "arguments": arguments}
        head = {} if index in named else {"id": f"call_{index}", "type": "function"}
        named.add(index)
        events.append(chunk({"tool_calls": [{"index": index, **head, "function": function}]}))
    events += [chunk({}, finish=finish), {**chunk({}), "choices": [], "usage": USAGE}]
    return wire(events, done=done)


def relayed(one: Call, parts: list[bytes]) -> list[dict[str, Any]]:
    relay = one.shape.relay(one, rename=False)
    return read(b"".join(relay.feed(part) for part in parts))


def read(data: bytes) -> list[dict[str, Any]]:
    found = []
    for block in data.decode().split("\n\n")[:-1]:
        name, content = block.split("\n")
        event = json.loads(content.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def gathered(one: Call, parts: list[bytes]) -> Any:
    gatherer = one.shape.gatherer(one)
    for part in parts:
        gatherer.feed(part)
    return json.loads(gatherer.body())


def accumulated(events: list[dict[str, Any]]) -> dict[int, Any]:
    """The items of the output as somebody puts them together who reads nothing but deltas."""
    items: dict[int, Any] = {}
    for event in events:
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert event["output_index"] not in items
                items[event["output_index"]] = {**event["item"], "said": ""}
            case "output_text.delta" | "reasoning_text.delta" | "function_call_arguments.delta":
                assert items[event["output_index"]]["id"] == event["item_id"]
                items[event["output_index"]]["said"] += event["delta"]
    return items


@given(steps=STEPS, cuts=CUTS, finish=st.sampled_from(["stop", "tool_calls", "length", "content_filter"]))
def test_a_stream_cut_anywhere_gives_the_same_events_and_they_say_what_the_body_says(
    steps: list[tuple[str, Any]], cuts: list[int], finish: str
) -> None:
    data = stream(steps, finish)
    events, body = relayed(call(), [data]), gathered(call(), [data])
    assert relayed(call(), cut(data, cuts)) == events
    assert gathered(call(), cut(data, cuts)) == body
    assert events[-1]["response"] == body
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert body["status"] == ("incomplete" if finish in ("length", "content_filter") else "completed")
    items = accumulated(events)
    assert len(items) == len(body["output"])
    for place, item in enumerate(body["output"]):
        whole = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert (items[place]["id"], items[place]["type"], items[place]["said"]) == (item["id"], item["type"], whole)


@given(steps=STEPS, finish=st.sampled_from(["stop", "length"]), sizes=CUTS)
def test_events_that_are_joined_say_the_same(steps: list[tuple[str, Any]], finish: str, sizes: list[int]) -> None:
    one = call()
    relay: Any = one.shape.relay(one, rename=False)
    events = relay.take(stream(steps, finish))
    few = []
    for size in [*sizes, len(events)]:
        few += joined(events[:size])
        events = events[size:]
    whole = relayed(call(), [stream(steps, finish)])
    assert accumulated(few) == accumulated(whole)
    assert len(few) <= len(whole)
    assert few[-1]["response"] == whole[-1]["response"]
    assert [event["sequence_number"] for event in numbered(few, 5)] == list(range(5, 5 + len(few)))


@given(steps=STEPS)
def test_the_official_client_takes_every_event(steps: list[tuple[str, Any]]) -> None:
    events = relayed(call(), [stream(steps)])
    state: Any = ResponseStreamState(input_tools=[], text_format=openai.omit)
    for event in events:
        state.handle_event(EVENT.validate_python(event))
    Response.model_validate(events[-1]["response"])
    assert state._completed_response is not None


def test_usage_and_times_are_told() -> None:
    body = gathered(call(), [stream([("content", "Hi")])])
    assert body["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 8,
    }
    assert (body["id"], body["created_at"], body["completed_at"], body["store"]) == ("resp_1", 7, 9, True)
    line = gathered(call(thread=None), [stream([("content", "Hi")])])
    assert (line["id"], line["created_at"], line["completed_at"], line["store"]) == ("resp_1", 1, None, False)


def test_a_stream_that_breaks_off_is_no_response() -> None:
    one = call()
    relay = one.shape.relay(one, rename=False)
    relay.feed(stream([("content", "Hi")], done=False))
    assert not relay.done
    with pytest.raises(EngineGarbled):
        gathered(call(), [stream([("content", "Hi")], done=False)])


@pytest.mark.parametrize(("error", "status"), [(EngineCrashed(), "failed"), (RequestCancelled(), "cancelled")])
def test_a_failure_is_the_last_event_and_what_was_said_stays(error: Any, status: str) -> None:
    one = call()
    relay = one.shape.relay(one, rename=False)
    told = read(relay.feed(stream([("content", "Hi")], done=False)))
    last = read(one.shape.error_event(error))
    assert last[0]["sequence_number"] == told[-1]["sequence_number"] + 1
    response = last[-1]["response"]
    assert (last[-1]["type"], response["status"]) == ("response.failed", status)
    assert response["output"][0]["content"][0]["text"] == "Hi"
    assert response["output"][0]["status"] == "incomplete"
    if status == "failed":
        assert (last[0]["type"], last[0]["code"]) == ("error", "engine_crashed")
        assert response["error"]["code"] == "engine_crashed"


def test_a_forced_call_that_an_engine_wrote_as_text_is_a_call() -> None:
    tool = {"type": "function", "name": "f0", "parameters": {"type": "object"}}
    body = {"tools": [tool], "tool_choice": "required"}
    data = stream([("content", '{"name": "f0",'), ("content", ' "arguments": {"a": 1}}')])
    for parts in ([data], cut(data, [50] * 10)):
        events = relayed(call(body, enforces_tool_choice=False), parts)
        [item] = events[-1]["response"]["output"]
        assert (item["type"], item["name"], item["arguments"]) == ("function_call", "f0", '{"a":1}')


def test_log_probabilities_come_when_asked_for() -> None:
    entry = {"token": "Hi", "logprob": -0.5, "bytes": [72], "top_logprobs": [{"token": "Ho", "logprob": -1.0}]}
    events = [chunk({"content": "Hi"}), chunk({}, finish="stop")]
    events[0]["choices"][0]["logprobs"] = {"content": [entry]}
    body = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    assert sent(body)["top_logprobs"] == 1
    found = gathered(call(body), [wire(events)])["output"][0]["content"][0]["logprobs"]
    assert found == [{**entry, "top_logprobs": [{"token": "Ho", "logprob": -1.0, "bytes": []}]}]
    assert gathered(call(), [wire(events)])["output"][0]["content"][0]["logprobs"] == []


# The request.


def test_a_conversation_in_items_is_one_in_messages() -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "sun"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "rain"}]},
    ]
    calls = [{"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}} for name in "ab"]
    assert sent({"input": items, "instructions": "Be kind."})["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "content": "sun", "tool_call_id": "a"},
        {"role": "tool", "content": [{"type": "text", "text": "rain"}], "tool_call_id": "b"},
    ]


@given(steps=STEPS)
def test_what_was_answered_can_be_sent_back(steps: list[tuple[str, Any]]) -> None:
    answer = gathered(call(), [stream(steps)])
    before = [*listed(items_of("Hello."), "resp_1"), *answer["output"]]
    whole = continued(json.dumps({"model": "mine", "input": "Go on."}).encode(), before)
    messages = sent(json.loads(whole))["messages"]
    assert messages[0] == {"role": "user", "content": [{"type": "text", "text": "Hello."}]}
    assert messages[-1] == {"role": "user", "content": "Go on."}
    said = "".join(message["content"] for message in messages[1:-1] if message["role"] == "assistant")
    assert said == "".join(text for kind, text in steps if kind == "content")


def test_fields_go_to_the_engine_in_its_words() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    fields = sent(
        {
            "max_output_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
            "tools": [{"type": "function", "name": name, "parameters": None, "strict": None} for name in "fg"],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]},
        }
    )
    assert (fields["max_tokens"], fields["temperature"], fields["top_p"]) == (9, 0.5, 0.9)
    assert fields["response_format"]["json_schema"] == {"name": "n", "schema": schema, "strict": True}
    assert [tool["function"]["name"] for tool in fields["tools"]] == ["g"]
    assert fields["tool_choice"] == "auto"
    named = {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "f"}}
    assert sent(named)["tool_choice"] == {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("extensions", ["llama.cpp", "vllm", None])
def test_not_to_think_is_said_to_engines_that_understand(extensions: Extensions | None) -> None:
    fields = sent({"reasoning": {"effort": "none"}}, extensions=extensions)
    assert fields.get("chat_template_kwargs") == ({"enable_thinking": False} if extensions else None)
    assert "chat_template_kwargs" not in sent({"reasoning": {"effort": "low"}}, extensions=extensions)


def test_images_are_found_and_put_back() -> None:
    image = {"type": "input_image", "image_url": "https://example.com/a.png", "detail": "low"}
    body = {"input": [{"role": "user", "content": [image, {"type": "input_image", "file_id": "file_1"}]}]}
    raw = json.dumps({"model": "mine", **body}).encode()
    refs = response_images(parse(ResponseBody, raw))
    assert [(ref.param, ref.url, ref.file_id, ref.low) for ref in refs] == [
        ("input", "https://example.com/a.png", None, True),
        ("input", None, "file_1", False),
    ]
    parts = sent(body, images=("data:1", "data:2"))["messages"][0]["content"]
    assert [part["image_url"]["url"] for part in parts] == ["data:1", "data:2"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"truncation": "auto"}, "truncation"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "x"}}, "prompt"),
    ({"moderation": {"model": "x"}}, "moderation"),
    ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"background": True, "store": False}, "store"),
    ({"stream_options": {}}, "stream_options"),
    (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"pattern": "x" * 999}}}},
        "text.format.schema",
    ),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"pattern": "x" * 999}}]}, "tools[0].parameters"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
]


@pytest.mark.parametrize(("body", "param"), WRONG)
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        call(body)
    assert caught.value.param == param


@pytest.mark.parametrize("name", ["background", "previous_response_id"])
def test_a_line_of_a_batch_keeps_nothing(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        call({name: True if name == "background" else "resp_1"}, thread=None)
    assert caught.value.param == name

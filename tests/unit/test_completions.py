"""The body of a completion request: its prompts, and what is refused."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.dialects.openai.call import Call, Context, parse
from forebay.dialects.openai.completions import CompletionBody, completion_call
from forebay.errors import InvalidRequest
from tests.unit.test_events import CUTS, cut, wire


def made(**fields: Any) -> Call:
    body = {"model": "m", "prompt": "Hi", **fields}
    return completion_call(parse(CompletionBody, json.dumps(body).encode()), Context("req_1", "p", None, 16, 4))


@pytest.mark.parametrize(
    ("prompt", "places"), [("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1], [2, 3]], 2), ([""], 1), ("", 1)]
)
def test_prompts_and_their_places(prompt: Any, places: int) -> None:
    call = made(prompt=prompt)
    assert call.request.places == places
    assert json.loads(call.request.body)["prompt"] == prompt
    assert call.request.path == "/v1/completions"


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        *(("prompt", {"prompt": prompt}) for prompt in (None, [], [[]], [-1], [2**31], ["a"] * 65, ["a"] * 5, {}, 5)),
        ("n", {"n": 5}),
        ("prompt", {"prompt": ["a", "b"], "n": 3}),
        ("best_of", {"best_of": 2}),
        ("suffix", {"suffix": "x"}),
        ("echo", {"echo": True, "logprobs": 1}),
        ("echo", {"echo": True, "prompt": [1, 2]}),
        ("logprobs", {"logprobs": 6}),
        ("logprobs", {"logprobs": True}),
        ("stream_options", {"stream_options": {}}),
        ("messages", {"messages": []}),
    ],
)
def test_what_is_refused(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        made(**fields)
    assert (refused.value.param or "").startswith(param)


def test_what_changes_nothing_is_taken() -> None:
    call = made(best_of=1, suffix="", echo=False, logprobs=0)
    assert call.legacy_logprobs
    assert json.loads(call.request.body)["logprobs"] == 0
    assert not made().legacy_logprobs


@given(CUTS, st.sampled_from([("a", 1), (["a", "b"], 2)]), st.booleans())
def test_an_echo_is_the_prompt_before_each_text(sizes: list[int], asked: tuple[Any, int], include_usage: bool) -> None:
    prompt, n = asked
    options = {"stream": True, "stream_options": {"include_usage": True}} if include_usage else {}
    call = made(prompt=prompt, n=n, echo=True, **options)
    places = call.request.places
    events: list[Any] = [{"id": "c", "choices": [{"index": index, "text": "x"}]} for index in range(places)]
    events += [
        {"id": "c", "choices": [{"index": index, "text": "", "finish_reason": "stop"}]} for index in range(places)
    ]
    events.append({"id": "c", "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}})
    relay, gatherer = call.shape.relay(call, rename=False), call.shape.gatherer(call)
    out = b""
    for part in cut(wire(events), sizes):
        out += relay.feed(part)
        gatherer.feed(part)
    expected = ["ax"] if n == 1 else ["ax", "ax", "bx", "bx"]
    assert [choice["text"] for choice in json.loads(gatherer.body())["choices"]] == expected
    texts = [""] * places
    seen = [json.loads(line.removeprefix("data: ")) for line in out.decode().split("\n\n")[:-2]]
    for choice in (choice for event in seen for choice in event["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == expected
    assert sum(1 for event in seen if event.get("usage")) == include_usage

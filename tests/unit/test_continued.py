"""Generations that go on: which may, what is kept of them, what the engine is asked, and when two parts are one answer."""

import json
from dataclasses import replace
from typing import Any

import pytest

from forebay.dialects.openai.call import Call, Context, parse
from forebay.dialects.openai.chat import ChatBody, chat_call
from forebay.dialects.openai.completions import CompletionBody, completion_call
from forebay.dialects.openai.continued import Continued, Written, can_continue
from forebay.errors import EngineGarbled, Preempted

MESSAGES = [{"role": "user", "content": "Tell me more."}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
BEFORE = Written("Once upon a time", 20, prompt_tokens=10, cached_tokens=4)


def context() -> Context:
    return Context("req_1", "p", None, max_tokens=64, slots=4, enforces_tool_choice=False, extensions="llama.cpp")


def chat(**more: Any) -> Call:
    body = {"model": "m", "messages": MESSAGES, "temperature": 0, **more}
    return chat_call(parse(ChatBody, json.dumps(body).encode()), context())


def completion(prompt: Any = "Once", **more: Any) -> Call:
    body = {"model": "m", "prompt": prompt, "temperature": 0, **more}
    return completion_call(parse(CompletionBody, json.dumps(body).encode()), context())


def timings(written: int, computed: int = 10, cached: int = 0) -> dict[str, int]:
    return {"cache_n": cached, "prompt_n": computed, "predicted_n": written}


def event(delta: dict[str, Any], figures: dict[str, int] | None = None, finish: str | None = None) -> dict[str, Any]:
    made = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return made if figures is None else {**made, "timings": figures}


def wire(*events: dict[str, Any], done: bool = False) -> bytes:
    lines = [json.dumps(each) for each in events] + (["[DONE]"] if done else [])
    return "".join(f"data: {each}\n\n" for each in lines).encode()


def words(text: str, **prompt: int) -> list[dict[str, Any]]:
    """An event for each word, as an engine writes them."""
    first, *others = text.split(" ")
    pieces = [first, *(f" {word}" for word in others)]
    return [event({"content": piece}, timings(number, **prompt)) for number, piece in enumerate(pieces, 1)]


def last(written: int, prompt: int, cached: int, finish: str = "stop") -> list[dict[str, Any]]:
    used = {"prompt_tokens": prompt, "completion_tokens": written, "prompt_tokens_details": {"cached_tokens": cached}}
    return [
        event({}, finish=finish),
        {"choices": [], "usage": used, "timings": timings(written, prompt - cached, cached)},
    ]


def stopped(*events: dict[str, Any], before: Written | None = None, call: Call | None = None) -> Written | None:
    """What is kept of an answer of which only these events came."""
    shape = Continued(before)
    gatherer = shape.gatherer(shape.of(call or chat()))
    gatherer.feed(wire(*events))
    return shape.written(1)


def test_one_plain_text_at_temperature_0_can_be_gone_on_with() -> None:
    assert can_continue(chat())
    assert can_continue(chat(n=1, stop=["x"], response_format={"type": "text"}, seed=1, max_tokens=5, top_p=0.5))
    assert can_continue(completion())


@pytest.mark.parametrize(
    "call",
    [
        chat(temperature=0.1),
        chat(temperature=None),
        chat(n=2),
        chat(logprobs=True),
        chat(tools=[TOOL]),
        chat(tools=[TOOL], tool_choice="required"),
        chat(response_format={"type": "json_object"}),
        chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}),
        chat(messages=[*MESSAGES, {"role": "assistant", "content": "Well,"}]),
        replace(chat(), image_chars=9),
        completion(["a", "b"]),
        completion(["a"]),
        completion([1, 2]),
        completion(logprobs=1),
        completion(echo=True),
        completion(n=2),
    ],
)
def test_what_could_come_out_otherwise_begins_anew(call: Call) -> None:
    assert not can_continue(call)


def test_the_engine_is_asked_for_what_is_left() -> None:
    asked = json.loads(Continued(BEFORE).of(chat(max_tokens=50)).request.body)
    assert asked["messages"] == [*MESSAGES, {"role": "assistant", "content": "Once upon a time"}]
    assert asked["max_tokens"] == 30
    asked = json.loads(Continued(BEFORE).of(completion("Say: ")).request.body)
    assert (asked["prompt"], asked["max_tokens"]) == ("Say: Once upon a time", 44)
    first = json.loads(Continued(None).of(chat()).request.body)
    assert (first["messages"], first["max_tokens"], first["timings_per_token"]) == (MESSAGES, 64, True)


def test_what_was_written_is_kept_to_its_last_whole_word() -> None:
    assert stopped(*words("One two three", computed=8, cached=2)) == Written("One two", 2, 10, 2)
    letters = [event({"content": piece}, timings(number)) for number, piece in enumerate("写一个", 1)]
    assert stopped(*letters) == Written("写一个", 3, 10, 0)
    ends = [
        event({"content": "Yes."}, timings(1)),
        event({"content": "\n"}, timings(2)),
        event({"content": "\n"}, timings(3)),
    ]
    assert stopped(*ends) == Written("Yes.", 1, 10, 0)
    several = [event({"content": "😀"}, timings(3)), event({"content": " yes"}, timings(4))]
    assert stopped(*several) == Written("😀", 3, 10, 0)


def test_nothing_is_kept_of_what_is_not_plain_or_not_counted() -> None:
    assert stopped() is None
    assert stopped(event({"role": "assistant", "content": None})) is None
    assert stopped(event({"content": "One"}), event({"content": " two"})) is None
    assert stopped(event({"reasoning_content": "Hm"}, timings(1)), *words("One two three")) is None
    tool = {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "look", "arguments": ""}}]}
    assert stopped(*words("One two three"), event(tool, timings(4))) is None
    assert stopped(*words("One two three"), call=chat(max_tokens=2)) is None, "nothing is left to write"
    shape = Continued(None)
    shape.gatherer(shape.of(chat())).feed(wire(*words("One two three")))
    assert shape.written(2) is not None
    assert shape.written(3) is None


def test_both_parts_are_one_answer() -> None:
    shape = Continued(BEFORE)
    gatherer = shape.gatherer(shape.of(chat()))
    rest = [event({"content": " there"}, timings(1, 1, 29)), event({"content": " was."}, timings(2, 1, 29))]
    gatherer.feed(wire(event({"role": "assistant", "content": None}), *rest, *last(2, 30, 29, "length"), done=True))
    body = json.loads(gatherer.body())
    assert shape.joined
    assert body["choices"][0]["message"]["content"] == "Once upon a time there was."
    assert body["choices"][0]["finish_reason"] == "length"
    used = {
        "prompt_tokens": 10,
        "completion_tokens": 22,
        "total_tokens": 32,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert body["usage"] == used
    assert gatherer.progress.usage is not None
    assert gatherer.progress.usage.completion_tokens == 22


def test_where_the_engine_counts_nothing_both_parts_are_charged() -> None:
    plain, shape = chat(), Continued(BEFORE)
    gatherer = shape.gatherer(shape.of(plain))
    gatherer.feed(wire(event({"content": " there"}, timings(1, 1, 29)), event({}, finish="stop"), done=True))
    used = gatherer.progress.used
    assert (used.prompt_tokens, used.completion_tokens) == (plain.tokens_estimate, BEFORE.tokens + 2)
    assert json.loads(gatherer.body())["usage"]["total_tokens"] == used.total_tokens


def test_an_end_without_a_word_is_an_answer() -> None:
    shape = Continued(BEFORE)
    gatherer = shape.gatherer(shape.of(completion()))
    gatherer.feed(wire(*last(1, 30, 29), done=True))
    assert json.loads(gatherer.body())["choices"][0]["text"] == "Once upon a time"


@pytest.mark.parametrize("figures", [timings(1, 2, 28), timings(1, 30, 0), timings(1, 1, 28), timings(1, 1, 30)])
def test_parts_that_do_not_belong_together_are_not_joined(figures: dict[str, int]) -> None:
    shape = Continued(BEFORE)
    gatherer = shape.gatherer(shape.of(chat()))
    with pytest.raises(Preempted):
        gatherer.feed(wire(event({"content": " there"}, figures)))
    assert shape.refused
    assert not shape.joined
    assert shape.written(1) is None


def test_an_engine_that_does_not_say_what_it_went_on_with_is_not_believed() -> None:
    shape = Continued(BEFORE)
    gatherer = shape.gatherer(shape.of(chat()))
    gatherer.feed(wire(event({"content": " there"}), event({}, finish="stop"), done=True))
    with pytest.raises(EngineGarbled):
        gatherer.body()


def test_a_line_may_be_stopped_again() -> None:
    assert stopped(before=BEFORE) == BEFORE, "before it has written anything"
    assert stopped(event({"content": " there"}, timings(1, 1, 29)), before=BEFORE) == BEFORE
    more = [event({"content": " there"}, timings(1, 1, 29)), event({"content": " was"}, timings(2, 1, 29))]
    assert stopped(*more, before=BEFORE) == Written("Once upon a time there", 21, 10, 4)
    shape = Continued(BEFORE)
    assert shape.written(1) == BEFORE, "before it was asked again"

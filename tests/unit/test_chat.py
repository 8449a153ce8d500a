"""The body of a chat request: every field, its bounds, and what the engine is sent."""

import json
from typing import Any

import pytest

from forebay.dialects.openai.call import Call, Context, Extensions, parse
from forebay.dialects.openai.chat import ChatBody, chat_call
from forebay.errors import InvalidRequest
from forebay.inference import Priority

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def made(
    *, enforces: bool = True, remote: str | None = None, extensions: Extensions | None = "llama.cpp", **fields: Any
) -> Call:
    body = {"model": "m", "messages": [USER], **fields}
    context = Context(
        "req_1", "p", None, 1024, 4, remote_model=remote, enforces_tool_choice=enforces, extensions=extensions
    )
    return chat_call(parse(ChatBody, json.dumps(body).encode()), context)


def sent(**fields: Any) -> Any:
    return json.loads(made(**fields).request.body)


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as error:
        made(**fields)
    return error.value


def test_the_engine_is_always_asked_for_a_stream_with_its_usage() -> None:
    for stream in (None, False, True):
        assert sent(stream=stream) == {
            "model": "m",
            "messages": [USER],
            "max_tokens": 1024,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", [0, 2, 0.5], [-0.1, 2.1, "1", True, 1e999]),
        ("top_p", [0, 1], [-0.1, 1.1]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1]),
        ("seed", [-(2**63), 2**63 - 1], [2**63, 1.5, "1"]),
        ("stop", ["a", ["a", "b", "c", "d"]], [["a"] * 5, "x" * 257, [1], 5]),
        ("logit_bias", [{"1": -100, "2": 100}], [{"1": 101}, {str(i): 0 for i in range(301)}, [1]]),
        ("top_k", [0, 1000], [-1, 1001, 1.5]),
        ("min_p", [0, 1], [-1, 2]),
        ("repeat_penalty", [0, 2], [-1, 3]),
        ("n", [2, 4], [0, 9, 1.0, "2"]),
        ("max_tokens", [1, 4_194_304], [0, 4_194_305, 1.5]),
    ],
)
def test_a_sampling_field_reaches_the_engine_within_its_bounds(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert sent(**{name: value})[name] == value
    for value in bad:
        error = refused(**{name: value})
        assert (error.param or "").startswith(name)
    assert name not in sent() or name == "max_tokens"


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("user", "u", "x" * 513),
        ("metadata", {"a": "b"}, {str(i): "" for i in range(17)}),
        ("store", True, "yes"),
        ("safety_identifier", "s", "x" * 513),
        ("prompt_cache_key", "s", "x" * 513),
        ("prompt_cache_retention", "24h", "x" * 65),
        ("reasoning_effort", "low", "huge"),
        ("verbosity", "low", "huge"),
        ("modalities", ["text"], ["audio"]),
    ],
)
def test_a_field_without_effect_is_taken_and_stays_here(name: str, good: Any, bad: Any) -> None:
    assert name not in sent(**{name: good})
    assert (refused(**{name: bad}).param or "").startswith(name)


@pytest.mark.parametrize("extensions", ["llama.cpp", "vllm", None])
def test_not_to_think_is_said_to_engines_that_understand(extensions: Extensions | None) -> None:
    fields = sent(extensions=extensions, reasoning_effort="none")
    assert fields.get("chat_template_kwargs") == ({"enable_thinking": False} if extensions else None)
    for effort in ("minimal", "low", "medium", "high", "xhigh"):
        assert sent(extensions=extensions, reasoning_effort=effort) == sent(extensions=extensions)


def test_unknown_fields_are_refused_by_name() -> None:
    assert refused(grammar="root ::= x").param == "grammar"
    assert refused(cache_prompt=True).param == "cache_prompt"
    assert refused(messages=[{**USER, "extra": 1}]).param == "messages[0].extra"
    text = {"type": "text", "text": 5}
    assert refused(messages=[USER, {"role": "user", "content": [text]}]).param == "messages[1].content[0].text"
    form = {"type": "json_schema", "json_schema": {"name": "a b"}}
    assert refused(response_format=form).param == "response_format.json_schema.name"
    assert refused(tools=[{**TOOL, "x": 1}]).param == "tools[0].x"


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"null", b"{", b'{"model": NaN}', b"\xff", b"[" * 100_000, b'{"model": "\\ud800"}']
)
def test_what_is_no_request_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(ChatBody, raw)


def test_a_wrong_tag_is_not_quoted_whole() -> None:
    assert len(str(refused(messages=[{"role": "x" * 100_000}]))) < 500


def test_limits_and_logprobs() -> None:
    assert sent(max_completion_tokens=7)["max_tokens"] == 7
    assert refused(max_completion_tokens=7, max_tokens=7).param == "max_tokens"
    assert sent(logprobs=True)["top_logprobs"] == 0
    assert sent(logprobs=True, top_logprobs=20)["top_logprobs"] == 20
    assert refused(logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert refused(top_logprobs=2).param == "top_logprobs"
    assert "top_logprobs" not in sent(logprobs=False)
    assert refused(stream_options={"include_usage": True}).param == "stream_options"
    assert made(stream=True, stream_options={"include_usage": True}).include_usage


def test_choices_need_places() -> None:
    assert made(n=4).request.places == 4
    assert refused(n=5).param == "n"


@pytest.mark.parametrize(
    ("asked", "used", "priority"),
    [
        (None, "default", Priority.DEFAULT),
        ("auto", "default", Priority.DEFAULT),
        ("default", "default", Priority.DEFAULT),
        ("flex", "flex", Priority.LOW),
        ("scale", "scale", Priority.HIGH),
        ("priority", "priority", Priority.HIGH),
        ("fast", "priority", Priority.HIGH),
    ],
)
def test_a_tier_is_a_priority(asked: str | None, used: str, priority: Priority) -> None:
    call = made(service_tier=asked)
    assert (call.tier, call.request.priority) == (used, priority)


def test_messages_are_turned_into_what_templates_know() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "refusal": "no", "annotations": [], "audio": None},
        {"role": "tool", "content": "t", "tool_call_id": "c"},
    ]
    assert sent(messages=messages)["messages"] == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "t", "tool_call_id": "c"},
    ]
    assert refused(messages=[]).param == "messages"
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}]
    assert refused(messages=[{"role": "user", "content": image}]).code == "capability_not_supported"


def test_tools() -> None:
    assert sent(tools=[TOOL])["tools"] == [TOOL]
    assert made(tools=[TOOL]).request.tools
    none = made(tools=[TOOL], tool_choice="none")
    assert not none.request.tools
    assert "tools" not in json.loads(none.request.body)
    assert refused(tool_choice="required").param == "tool_choice"
    named = {"type": "function", "function": {"name": "g"}}
    assert refused(tools=[TOOL], tool_choice=named).param == "tool_choice"
    assert refused(tools=[{"type": "function", "function": {"name": "a b"}}]).param == "tools[0].function.name"
    assert refused(tools=[TOOL] * 129).param == "tools"


def test_a_tool_that_must_be_called_becomes_a_format_where_the_engine_does_not_obey() -> None:
    call = made(tools=[TOOL], tool_choice="required", enforces=False)
    fields = json.loads(call.request.body)
    assert call.forced_tool
    assert "tool_choice" not in fields
    (only,) = fields["response_format"]["json_schema"]["schema"]["anyOf"]
    assert only["properties"] == {"name": {"const": "f"}, "arguments": {"type": "object"}}
    assert not made(tools=[TOOL], tool_choice="required").forced_tool
    assert not made(tools=[TOOL], tool_choice="auto", enforces=False).forced_tool


def test_formats() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": True}}
    assert sent(response_format=form)["response_format"] == form
    assert sent(response_format={"type": "json_object"})["response_format"] == {"type": "json_object"}
    bomb = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"pattern": "(a{99}){99}"}}}
    assert refused(response_format=bomb).param == "response_format.json_schema.schema"
    assert refused(response_format={"type": "xml"}).param == "response_format"


def test_the_engines_own_name_of_the_model() -> None:
    assert sent(remote="theirs")["model"] == "theirs"

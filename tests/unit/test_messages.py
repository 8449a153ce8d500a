"""The body of /v1/messages: every block and field, the chat that it becomes, and what is refused."""

import json
from typing import Any

import pytest

from forebay.dialects.anthropic.messages import CountBody, MessagesBody, count_call, message_images, messages_call
from forebay.dialects.openai.call import Call, Context, Extensions, parse
from forebay.dialects.tokens import DetokenizeBody, TokenizeBody, detokenize_call, tokenize_call
from forebay.errors import ForebayError, InvalidRequest, Overloaded, RateLimited
from forebay.inference import Priority

USER = {"role": "user", "content": "Hi"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


def context(extensions: Extensions | None = "llama.cpp", images: tuple[str, ...] = ()) -> Context:
    return Context("req_1", "p", None, 1024, 4, extensions=extensions, images=images)


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "max_tokens": 9, "messages": [USER], **fields}).encode()


def made(extensions: Extensions | None = "llama.cpp", images: tuple[str, ...] = (), **fields: Any) -> Call:
    return messages_call(parse(MessagesBody, body(**fields)), context(extensions, images))


def sent(**fields: Any) -> Any:
    return json.loads(made(**fields).request.body)


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as error:
        made(**fields)
    return error.value


def chat(*content: Any, role: str = "user") -> Any:
    """The messages that the engine is sent for one turn of these blocks."""
    return sent(messages=[{"role": role, "content": list(content)}])["messages"]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_the_least_body_is_the_least_chat() -> None:
    call = made()
    assert json.loads(call.request.body) == {
        "model": "m",
        "messages": [USER],
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert call.request.path == "/v1/chat/completions"
    assert not call.stream
    assert made(stream=True).stream


def test_sampling_goes_through() -> None:
    fields = sent(temperature=0, top_p=0.5, top_k=3, stop_sequences=["a", "", "b"], metadata={"user_id": "u"})
    assert (fields["temperature"], fields["top_p"], fields["top_k"], fields["stop"]) == (0, 0.5, 3, ["a", "b"])
    assert fields["verbose"] is True
    assert "user" not in fields
    assert "verbose" not in json.loads(made("vllm", stop_sequences=["a"]).request.body)
    assert "stop" not in sent(stop_sequences=[""])


@pytest.mark.parametrize(
    ("fields", "priority"),
    [
        ({}, Priority.DEFAULT),
        ({"service_tier": "standard_only"}, Priority.DEFAULT),
        ({"speed": "standard"}, Priority.DEFAULT),
        ({"speed": "fast"}, Priority.HIGH),
    ],
)
def test_who_goes_first(fields: dict[str, Any], priority: Priority) -> None:
    assert made(**fields).request.priority is priority


def test_what_has_no_effect_is_taken() -> None:
    hint = {"type": "ephemeral"}
    assert (
        sent(
            cache_control=hint,
            context_management={"edits": []},
            diagnostics={"previous_message_id": None},
            inference_geo="eu",
            output_config={"effort": "max"},
            thinking={"type": "enabled", "budget_tokens": 2048},
            messages=[{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": hint, "new": 1}]}],
        )
        == sent()
    )


def test_a_system_prompt_comes_first() -> None:
    system = {"role": "system", "content": "a"}
    assert sent(system="a")["messages"] == [system, USER]
    assert sent(system=[text("a")])["messages"] == [system, USER]
    assert sent(system=[text("a"), text("b")])["messages"][0]["content"] == "a\nb"
    assert sent(messages=[{"role": "system", "content": "a"}, USER])["messages"] == [system, USER]
    assert sent(system="")["messages"] == [USER]


def test_a_turn_of_the_model() -> None:
    content = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        text("a"),
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": [1]}, "caller": {"type": "direct"}},
        {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
    ]
    assert chat(*content, role="assistant") == [
        {
            "role": "assistant",
            "content": "a",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"x":[1]}'}},
                {"id": "t2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        }
    ]


def test_what_tools_answered_comes_before_what_the_user_says() -> None:
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("1"), text("2")]}
    failed = {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True}
    assert chat(text("So?"), result, failed) == [
        {"role": "tool", "tool_call_id": "t1", "content": "1\n2"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no"},
        {"role": "user", "content": "So?"},
    ]
    assert chat({"type": "tool_result", "tool_use_id": "t"}) == [{"role": "tool", "tool_call_id": "t", "content": ""}]


def test_images_are_found_and_put_back_in_their_order() -> None:
    elsewhere = {"type": "image", "source": {"type": "url", "url": "https://images.example.com/a.png"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("see"), elsewhere]}
    messages = [{"role": "user", "content": [text("a"), PNG, result]}]
    found = message_images(parse(MessagesBody, body(messages=messages)))
    assert [ref.url for ref in found] == ["https://images.example.com/a.png", "data:image/png;base64,AAAA"]
    assert [ref.param for ref in found] == ["messages[0].content[2].content[1].source", "messages[0].content[1].source"]
    call = made(images=("data:1", "data:2"), messages=messages)
    assert json.loads(call.request.body)["messages"] == [
        {"role": "tool", "tool_call_id": "t1", "content": "see"},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:1"}},
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": "data:2"}},
            ],
        },
    ]
    assert message_images(parse(MessagesBody, body())) == ()
    assert refused(messages=messages).code == "capability_not_supported"


@pytest.mark.parametrize(
    ("choice", "becomes"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_tools_and_the_choice_between_them(choice: dict[str, Any], becomes: Any) -> None:
    fields = sent(tools=[TOOL], tool_choice={**choice, "disable_parallel_tool_use": True})
    assert fields["tools"] == [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    ]
    assert fields["tool_choice"] == becomes
    assert fields["parallel_tool_calls"] is False
    assert made(tools=[TOOL]).request.tools
    assert "tools" not in sent(tools=[TOOL], tool_choice={"type": "none"})


@pytest.mark.parametrize("place", ["output_config", "output_format"])
def test_a_schema_for_the_answer(place: str) -> None:
    wanted = {"type": "json_schema", "schema": {"type": "object"}}
    fields = sent(**{place: {"format": wanted} if place == "output_config" else wanted})
    assert fields["response_format"]["json_schema"] == {"name": "answer", "schema": {"type": "object"}, "strict": True}


@pytest.mark.parametrize("extensions", ["llama.cpp", "vllm", None])
def test_not_to_think_is_said_to_engines_that_understand(extensions: Extensions | None) -> None:
    fields = json.loads(made(extensions, thinking={"type": "disabled"}).request.body)
    assert fields.get("chat_template_kwargs") == ({"enable_thinking": False} if extensions else None)
    assert "chat_template_kwargs" not in json.loads(made(extensions, thinking={"type": "adaptive"}).request.body)
    stopped = json.loads(made(extensions, thinking={"type": "disabled"}, stop_sequences=["x"]).request.body)
    wanted = {**fields, "stop": ["x"]}
    assert stopped == (wanted | {"verbose": True} if extensions == "llama.cpp" else wanted)


def test_not_to_think_is_counted_as_it_is_asked_for() -> None:
    asked = parse(CountBody, json.dumps({"model": "m", "messages": [USER], "thinking": {"type": "disabled"}}).encode())
    counted = json.loads(count_call(asked, context("vllm")).request.body)
    assert counted["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": None},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
        {"messages": [{"role": "system", "content": [PNG]}]},
        {"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": str(i), "name": "f", "input": {}} for i in range(129)]}]},
        {"messages": [{"role": "user", "content": [text("x")] * 1025}]},
        {"stop_sequences": ["a"] * 5},
        {"temperature": 2.1},
        {"top_k": -1},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"name": "f"}]},
        {"tools": [{"name": "a b", "input_schema": {}}]},
        {"tools": [TOOL], "tool_choice": {"type": "tool"}},
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}},
        {"tool_choice": {"type": "any"}},
        {"tools": [{"name": "f", "input_schema": {"pattern": "(a{999}){999}"}}]},
        {"output_config": {"format": {"type": "json_schema"}}},
        {"container": "c"},
        {"n": 2},
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_a_sentence(wrong: dict[str, Any]) -> None:
    error = refused(**wrong)
    assert error.status == 400
    assert 5 < len(str(error)) < 500


def test_the_place_of_a_mistake_is_named() -> None:
    error = refused(messages=[{"role": "user", "content": [{"type": "text"}]}])
    assert error.param == "messages[0].content[0].text"
    error = refused(messages=[{"role": "user", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": 5}]}])
    assert error.param == "messages[0].content[0].input"


def test_tokens_are_counted_of_the_same_chat() -> None:
    raw = json.dumps({"model": "m", "messages": [USER], "system": "s", "tools": [TOOL]}).encode()
    call = count_call(parse(CountBody, raw), context())
    assert call.request.path == "/v1/chat/completions/input_tokens"
    assert json.loads(call.request.body) == sent(system="s", tools=[TOOL], max_tokens=1)
    assert count_call(parse(CountBody, raw), context("vllm")).request.path == "/tokenize"
    with pytest.raises(InvalidRequest) as error:
        count_call(parse(CountBody, raw), context(None))
    assert error.value.code == "capability_not_supported"


def test_texts_as_tokens() -> None:
    wanted = parse(TokenizeBody, b'{"model": "m", "content": "a", "add_special": true}')
    llama, vllm = tokenize_call(wanted, context()).request, tokenize_call(wanted, context("vllm")).request
    assert (llama.path, vllm.path) == ("/tokenize", "/tokenize")
    assert json.loads(llama.body) == {"content": "a", "add_special": True, "parse_special": True}
    assert json.loads(vllm.body) == {"model": "m", "prompt": "a", "add_special_tokens": True}
    back = detokenize_call(parse(DetokenizeBody, b'{"model": "m", "tokens": [1, 2]}'), context()).request
    assert (back.path, json.loads(back.body)) == ("/detokenize", {"model": "m", "tokens": [1, 2]})


@pytest.mark.parametrize("fields", [{}, {"content": "a", "prompt": "a"}])
def test_a_text_is_given_once(fields: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        tokenize_call(TokenizeBody(model="m", **fields), context())


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [(Overloaded(), 529, "overloaded_error"), (RateLimited(), 429, "rate_limit_error"), (InvalidRequest(), 400, "invalid_request_error")],
)  # fmt: skip
def test_errors_have_its_words(error: ForebayError, status: int, kind: str) -> None:
    from forebay.dialects.anthropic.errors import body_of, status_of

    assert status_of(error) == status
    assert body_of(error, "req_1") == {
        "type": "error",
        "error": {"type": kind, "message": str(error), "code": error.code},
        "request_id": "req_1",
    }

"""Errors on the wire: ours in OpenAI's shape, an engine's without its paths and addresses."""

import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay import errors
from forebay.dialects.openai.errors import body_of, from_engine, from_upstream, retry_after, sanitise

NAMES = st.text(string.ascii_letters + string.digits + "_.-+@~", min_size=1, max_size=12).filter(
    lambda name: name.strip(".")
)
PATHS = st.lists(NAMES, min_size=2, max_size=6).flatmap(
    lambda names: st.sampled_from(["/" + "/".join(names), "C:\\" + "\\".join(names)])
)
OCTET = st.integers(0, 255)
ADDRESSES = st.tuples(OCTET, OCTET, OCTET, OCTET, st.integers(1, 65535)).map(
    lambda parts: ".".join(map(str, parts[:4])) + f":{parts[4]}"
)
POINTERS = st.integers(16**6, 16**12).map(hex)
WORDS = st.text(string.ascii_lowercase + " .,:'\"()", max_size=20)


@given(WORDS, PATHS | ADDRESSES | POINTERS, WORDS)
def test_paths_and_addresses_never_survive(before: str, secret: str, after: str) -> None:
    message = sanitise(f"{before} {secret} {after}")
    assert secret not in message
    for piece in secret.replace("\\", "/").split("/"):
        assert len(piece) < 6 or piece in before + after or piece not in message


@given(st.text(max_size=3_000))
def test_a_message_is_one_printable_line_of_bounded_length(text: str) -> None:
    message = sanitise(text)
    assert len(message) <= 500
    assert message == "" or message.isprintable()


@given(
    st.integers(100, 599),
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["error", "message", "type", "code", "n_ctx"]), inner, max_size=4)
        ),
    ).map(lambda value: json.dumps(value).encode()),
)
def test_whatever_an_engine_says_becomes_an_error_in_shape(status: int, body: bytes) -> None:
    error = from_engine(status, body)
    shaped = body_of(error)["error"]
    assert set(shaped) == {"message", "type", "param", "code"}
    assert shaped["message"]
    assert 400 <= error.status < 600
    assert (
        status >= 500
        or status < 400
        or error.status < 500
        or isinstance(error, errors.EngineGarbled | errors.EngineUnavailable)
    )


@pytest.mark.parametrize(
    ("status", "detail", "kind", "code"),
    [
        (400, {"message": "bad"}, errors.InvalidRequest, "invalid_request"),
        (404, {"message": "bad"}, errors.InvalidRequest, "invalid_request"),
        (422, {}, errors.InvalidRequest, "invalid_request"),
        (
            400,
            {"type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 4},
            errors.InvalidRequest,
            "context_length_exceeded",
        ),
        (400, {"message": "maximum context length is 4"}, errors.InvalidRequest, "context_length_exceeded"),
        (401, {"message": "key abc"}, errors.EngineUnavailable, "engine_unavailable"),
        (413, {}, errors.PayloadTooLarge, "payload_too_large"),
        (429, {}, errors.Overloaded, "queue_full"),
        (500, {"message": "boom"}, errors.ServerError, "engine_error"),
        (500, {"message": "boom", "code": "out_of_memory"}, errors.EngineCrashed, "out_of_memory"),
        (500, {"code": "out_of_memory"}, errors.EngineCrashed, "out_of_memory"),
        (503, {}, errors.EngineUnavailable, "engine_unavailable"),
        (302, {}, errors.EngineGarbled, "engine_garbled"),
    ],
)
def test_what_an_engines_error_means(status: int, detail: dict[str, Any], kind: type, code: str) -> None:
    error = from_engine(status, json.dumps({"error": detail}).encode())
    assert (type(error), error.code) == (kind, code)
    assert "abc" not in str(error)


@pytest.mark.parametrize(
    ("detail", "param", "index", "words"),
    [
        (
            {"type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 4},
            "messages",
            None,
            "the prompt has 9.",
        ),
        (
            {"code": "context_length_exceeded", "param": "input", "index": 3, "n_prompt_tokens": 9, "n_ctx": 4},
            *("input", 3, "holds 4 tokens, and the input has 9."),
        ),
        (
            {"code": "context_length_exceeded", "param": "query", "index": None, "n_prompt_tokens_min": 9, "n_ctx": 4},
            *("query", None, "has at least 9."),
        ),
        (
            {"message": "input (9 tokens) is too large to process. increase the size (current batch size: 4)"},
            *("messages", None, "holds 4 tokens, and the input has 9."),
        ),
        (
            {"message": "This model's maximum context length is 4 tokens. However, you requested 9 tokens."},
            *("messages", None, "However, you requested 9 tokens."),
        ),
        ({"code": "context_length_exceeded"}, "messages", None, "The prompt is longer"),
        ({"message": "No.", "param": "dimensions"}, "dimensions", None, "No."),
        ({"message": "No.", "param": "input", "index": 1}, "input", 1, "No."),
        ({"message": "No.", "param": "n_keep", "index": 1}, None, None, "No."),
        ({"message": "No.", "param": ["input"], "index": "1"}, None, None, "No."),
        ({"message": "No.", "param": "input", "index": -1}, "input", None, "No."),
    ],
)
def test_which_part_of_a_request_an_engine_refuses(
    detail: dict[str, Any], param: str | None, index: int | None, words: str
) -> None:
    error = from_engine(400, json.dumps({"error": detail}).encode())
    assert isinstance(error, errors.InvalidRequest)
    assert (error.param, error.index) == (param, index)
    assert words in str(error)


def test_a_providers_shortage_of_memory_is_its_own_trouble() -> None:
    error = from_upstream(500, b'{"error": {"message": "boom", "code": "out_of_memory"}}')
    assert (type(error), error.code, str(error)) == (errors.UpstreamError, "upstream_error", "boom")


def every_error(kind: type[errors.ForebayError]) -> list[type[errors.ForebayError]]:
    return [kind, *(inner for child in kind.__subclasses__() for inner in every_error(child))]


@pytest.mark.parametrize("kind", every_error(errors.ForebayError))
def test_every_error_has_a_body(kind: type[errors.ForebayError]) -> None:
    assert set(body_of(kind())["error"]) == {"message", "type", "param", "code"}
    assert body_of(kind("m", param="p", code="c"))["error"] == {
        "message": "m",
        "type": kind.type,
        "param": "p",
        "code": "c",
    }


def test_a_token_that_is_none_is_the_caller_s_mistake() -> None:
    said = (
        b'{"error": {"code": 500, "message": "vector::_M_range_check: __n (which is 9) >= this->size() (which is 5)"}}'
    )
    error = from_engine(500, said)
    assert (error.status, error.param) == (400, "tokens")
    assert "vector" not in str(error)


@given(
    st.integers(100, 599).filter(lambda status: status != 200),
    st.binary(max_size=60),
    st.none() | st.floats(0, 1e5),
    st.booleans(),
)
def test_whatever_a_provider_says_is_no_fault_of_the_callers_key(
    status: int, body: bytes, seconds: float | None, callers_key: bool
) -> None:
    error = from_upstream(status, body, retry_after_seconds=seconds, callers_key=callers_key)
    assert 400 <= error.status < 600
    assert str(error)
    assert error.status != 401 or (callers_key and status in {401, 403})
    if status in {429, 503}:
        assert error.retry_after_seconds == seconds


NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("7", 7.0),
        (" 0.5 ", 0.5),
        ("-3", None),
        ("soon", None),
        ("٣", None),
        ("9" * 400, 86_400.0),
        ("Fri, 15 Jan 2027 08:01:00 GMT", 60.0),
        ("Fri, 15 Jan 2026 08:01:00 GMT", 0.0),
        ("Fri, 99 Jan 2027 08:01:00 GMT", None),
    ],
)
def test_when_a_provider_wants_to_be_asked_again(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, NOW) == seconds


@given(st.text(max_size=40))
def test_whatever_is_written_there_is_a_bounded_wait_or_none(value: str) -> None:
    seconds = retry_after(value, NOW)
    assert seconds is None or 0 <= seconds <= 86_400

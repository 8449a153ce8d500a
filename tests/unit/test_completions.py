"""The body of a completion request: its prompts, and what is refused."""

import json
from typing import Any

import pytest

from forebay.dialects.openai.call import Call, Context, parse
from forebay.dialects.openai.completions import CompletionBody, completion_call
from forebay.errors import InvalidRequest


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
        ("echo", {"echo": True}),
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

"""Bodies as wide as the body limit allows: refused for their first mistake, and soon, for all callers wait meanwhile."""

import json
import time
from typing import Any

import pytest

from forebay.dialects.openai.call import Sampling, parse
from forebay.dialects.openai.chat import ChatBody
from forebay.dialects.openai.completions import CompletionBody
from forebay.errors import InvalidRequest

BODY_BYTES = 8 * 2**20
SECONDS = 4.0  # it takes a tenth of that; trying every form on every item took minutes
HI = b'"messages":[{"role":"user","content":"x"}]'


def wide(item: bytes, head: bytes = b"") -> bytes:
    return b"[" + head + b",".join([item] * (BODY_BYTES // (len(item) + 1))) + b"]"


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (CompletionBody, b'"prompt":' + wide(b"1"), "prompt"),
        (CompletionBody, b'"prompt":' + wide(b'"a"'), "prompt"),
        (CompletionBody, b'"prompt":' + wide(b"1", b'"a",'), "prompt[1]"),
        (CompletionBody, b'"prompt":' + wide(b'""', b"[1],"), "prompt[1]"),
        (CompletionBody, b'"prompt":' + wide(b"{}"), "prompt[0]"),
        (ChatBody, HI + b',"stop":' + wide(b"1"), "stop"),
        (ChatBody, HI + b',"tools":' + wide(b"1"), "tools[0]"),
        (ChatBody, HI + b',"modalities":' + wide(b"1"), "modalities[0]"),
        (ChatBody, b'"messages":' + wide(b"1"), "messages[0]"),
        (ChatBody, b'"messages":[{"role":"user","content":' + wide(b"1") + b"}]", "messages[0].content[0]"),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else None,
)
def test_a_wide_body_is_refused_soon(kind: type[Sampling], fields: bytes, param: str) -> None:
    began = time.process_time()
    with pytest.raises(InvalidRequest) as refused:
        parse(kind, b'{"model":"m",' + fields + b"}")
    assert time.process_time() - began < SECONDS
    assert refused.value.param == param


@pytest.mark.parametrize("prompt", ["a", ("a", "b"), (1, 2), ((1, 2), (3,))])
def test_a_prompt_has_four_forms(prompt: Any) -> None:
    text = repr(prompt).replace("(", "[").replace(",)", "]").replace(")", "]").replace("'", '"')
    assert parse(CompletionBody, f'{{"model":"m","prompt":{text}}}'.encode()).prompt == prompt


@pytest.mark.parametrize("prompt", ["[]", "[[]]", "5", "null", "{}", "[1.5]", "[-1]", "[true]", "[null]"])
def test_a_prompt_has_no_other_form(prompt: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(CompletionBody, f'{{"model":"m","prompt":{prompt}}}'.encode())
    assert (refused.value.param or "").startswith("prompt")


@pytest.mark.parametrize("colon", [b":", b" \n\t:"])
@pytest.mark.parametrize("inside", ["", "logit_bias", "metadata"])
def test_a_body_of_very_many_fields_is_refused_before_it_is_parsed(colon: bytes, inside: str) -> None:
    fields = b",".join(b'"%d"%b1' % (number, colon) for number in range(60_000))
    many = fields if not inside else b'"%b":{%b}' % (inside.encode(), fields)
    with pytest.raises(InvalidRequest, match="more than 50000 fields"):
        parse(ChatBody, b'{"model":"m",' + HI + b"," + many + b"}")


def test_json_inside_a_text_is_not_taken_for_fields() -> None:
    text = '"a": 1, ' * 60_000
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()
    assert parse(ChatBody, body).messages[0].content == text


def test_names_that_end_in_a_backslash_are_fields_too() -> None:
    fields = b",".join(b'"%d\\\\":1' % number for number in range(60_000))
    with pytest.raises(InvalidRequest, match="more than 50000 fields"):
        parse(ChatBody, b'{"model":"m",' + HI + b"," + fields + b"}")
